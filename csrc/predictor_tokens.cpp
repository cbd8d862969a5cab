// The predictor's input, [context + pos, mask token + pos] for every target block, and its gradient.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace jepa {
namespace {

template <class T, class A>
JEPA_VECTOR_CLONES void add_position(const A* token, const Wide<T>* pos, T* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<Wide<T>>(token[i]) + pos[i]);
}

// pos and the mask token are small compared with the result: widened once, not per row.
Tensor widened(const Tensor& table, const Tensor& like) {
    return torch::stable::contiguous(torch::stable::to(table, wide_of(like)));
}

}  // namespace

Tensor predictor_tokens(const Tensor& context_BKD, const Tensor& context_index, const Tensor& target_index,
                        const Tensor& pos_ND, const Tensor& mask_token_D) {
    STD_TORCH_CHECK(context_BKD.dim() == 3 && context_index.dim() == 2 && target_index.dim() == 3 &&
                        pos_ND.dim() == 2 && mask_token_D.dim() == 1,
                    "predictor_tokens: context must be [B, Kc, D], context_index [B, Kc], target_index [M, B, Kt], "
                    "pos [N, D], mask_token [D]");
    const int64_t B = context_BKD.size(0), Kc = context_BKD.size(1), D = context_BKD.size(2);
    const int64_t M = target_index.size(0), Kt = target_index.size(2), S = Kc + Kt, N = pos_ND.size(0);
    STD_TORCH_CHECK(context_index.size(0) == B && context_index.size(1) == Kc && target_index.size(1) == B &&
                        pos_ND.size(1) == D && mask_token_D.size(0) == D,
                    "predictor_tokens: the sizes of the arguments do not match");
    const auto dtype = context_BKD.scalar_type();
    const Tensor context = with_rows(context_BKD);
    const Tensor pos = widened(pos_ND, context_BKD), mask = widened(mask_token_D, context_BKD);
    const Tensor seen = torch::stable::contiguous(context_index);
    const Tensor hidden = torch::stable::contiguous(target_index);
    const auto* seen_at = checked_index(seen, N, "predictor_tokens: context_index");
    const auto* hidden_at = checked_index(hidden, N, "predictor_tokens: target_index");
    const Tensor y = torch::stable::new_empty(context, {M * B, S, D});
    if (y.numel() == 0) return y;
    dispatch(dtype, [&](auto type) {
        using T = decltype(type);
        const auto* from = pointer<const T>(context);
        const auto* table = pointer<const Wide<T>>(pos);
        const auto* mask_row = pointer<const Wide<T>>(mask);
        auto* to = pointer<T>(y);
        torch::stable::parallel_for(0, M * B, grain(S * D * sizeof(T)), [&](int64_t begin, int64_t end) {
            for (int64_t q = begin; q < end; ++q) {
                const int64_t b = q % B;
                for (int64_t k = 0; k < Kc; ++k) {
                    add_position<T>(from + b * context.stride(0) + k * context.stride(1),
                                    table + seen_at[b * Kc + k] * D, to + (q * S + k) * D, D);
                }
                for (int64_t t = 0; t < Kt; ++t) {
                    add_position<T>(mask_row, table + hidden_at[q * Kt + t] * D, to + (q * S + Kc + t) * D, D);
                }
            }
        });
    });
    return y;
}

// Sums over blocks per image, then over images: the order does not depend on the number of threads.
std::tuple<Tensor, Tensor> predictor_tokens_backward(const Tensor& dy_QSD, int64_t M, int64_t B, int64_t Kc) {
    STD_TORCH_CHECK(dy_QSD.dim() == 3 && dy_QSD.size(0) == M * B && Kc >= 0 && Kc <= dy_QSD.size(1),
                    "predictor_tokens_backward: dy must be [M*B, Kc+Kt, D]");
    const Tensor dy = with_rows(dy_QSD);
    const int64_t S = dy.size(1), D = dy.size(2);
    const auto dtype = dy.scalar_type();
    const auto wide = wide_of(dy);
    const Tensor d_context = torch::stable::new_empty(dy, {B, Kc, D});
    const Tensor d_mask = torch::stable::new_zeros(dy, {D}, wide);
    const Tensor partial = torch::stable::new_zeros(dy, {B, D}, wide);
    dispatch(dtype, [&](auto type) {
        using T = decltype(type);
        const auto* from = pointer<const T>(dy);
        auto* to = pointer<T>(d_context);
        auto* partial_at = pointer<Wide<T>>(partial);
        torch::stable::parallel_for(0, B, grain(M * S * D * sizeof(T)), [&](int64_t begin, int64_t end) {
            std::vector<Wide<T>> total(D);
            for (int64_t b = begin; b < end; ++b) {
                const auto row = [&](int64_t m, int64_t s) {
                    return from + (m * B + b) * dy.stride(0) + s * dy.stride(1);
                };
                for (int64_t k = 0; k < Kc; ++k) {
                    std::fill(total.begin(), total.end(), 0);
                    for (int64_t m = 0; m < M; ++m) add_row(row(m, k), total.data(), D);
                    round_row(total.data(), to + (b * Kc + k) * D, D);
                }
                for (int64_t m = 0; m < M; ++m) {
                    for (int64_t s = Kc; s < S; ++s) add_row(row(m, s), partial_at + b * D, D);
                }
            }
        });
        for (int64_t b = 0; b < B; ++b) add_row(partial_at + b * D, pointer<Wide<T>>(d_mask), D);
    });
    return {d_context, d_mask};
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("predictor_tokens", TORCH_BOX(&jepa::predictor_tokens));
    m.impl("predictor_tokens_backward", TORCH_BOX(&jepa::predictor_tokens_backward));
}
