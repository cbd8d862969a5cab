// y[b, k, :] = x[b, index[b, k], :], rows copied as bytes, and its gradient.

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu.h"

namespace jepa {
namespace {

void check_shapes(const Tensor& x, const Tensor& index) {
    STD_TORCH_CHECK(x.dim() == 3 && index.dim() == 2 && x.size(0) == index.size(0),
                    "gather: x must be [B, N, D] and index [B, K]");
}

}  // namespace

Tensor gather(const Tensor& x_BND, const Tensor& index_BK) {
    check_shapes(x_BND, index_BK);
    const Tensor x = with_rows(x_BND), index = torch::stable::contiguous(index_BK);
    const int64_t B = index.size(0), K = index.size(1), D = x.size(2);
    const auto* n = checked_index(index, x.size(1), "gather: index");
    const Tensor y = torch::stable::new_empty(x, {B, K, D});
    const int64_t size = static_cast<int64_t>(x.element_size());
    const int64_t row = D * size, x_b = x.stride(0) * size, x_n = x.stride(1) * size;
    const auto* from = pointer<const char>(x);
    auto* to = pointer<char>(y);
    if (y.numel() == 0) return y;
    torch::stable::parallel_for(0, B * K, grain(row), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            std::memcpy(to + i * row, from + i / K * x_b + n[i] * x_n, row);
        }
    });
    return y;
}

// Each row of dx sums its own terms in the order of k: the result does not depend on the number of threads.
Tensor gather_backward(const Tensor& dy_BKD, const Tensor& index_BK, int64_t N) {
    check_shapes(dy_BKD, index_BK);
    STD_TORCH_CHECK(dy_BKD.size(1) == index_BK.size(1), "gather_backward: dy must be [B, K, D] for index [B, K]");
    const Tensor dy = with_rows(dy_BKD), index = torch::stable::contiguous(index_BK);
    const int64_t B = index.size(0), K = index.size(1), D = dy.size(2);
    const auto* index_at = checked_index(index, N, "gather_backward: index");
    const Tensor dx = torch::stable::new_empty(dy, {B, N, D});
    if (dx.numel() == 0) return dx;
    dispatch(dy.scalar_type(), [&](auto type) {
        using T = decltype(type);
        const auto* from = pointer<const T>(dy);
        auto* to = pointer<T>(dx);
        torch::stable::parallel_for(0, B * N, grain(D * sizeof(T)), [&](int64_t begin, int64_t end) {
            std::vector<int64_t> first(N), next(K);  // lists: a row's first term, the next after a term; -1 ends
            std::vector<Wide<T>> total(D);
            int64_t b = -1;
            for (int64_t i = begin; i < end; ++i) {
                if (i / N != b) {
                    b = i / N;
                    std::fill(first.begin(), first.end(), -1);
                    for (int64_t k = K - 1; k >= 0; --k) {
                        next[k] = std::exchange(first[index_at[b * K + k]], k);
                    }
                }
                const auto term = [&](int64_t k) { return from + b * dy.stride(0) + k * dy.stride(1); };
                const int64_t k = first[i % N];
                if (k < 0) {
                    std::memset(static_cast<void*>(to + i * D), 0, D * sizeof(T));
                } else if (next[k] < 0) {
                    std::memcpy(static_cast<void*>(to + i * D), term(k), D * sizeof(T));
                } else {
                    std::fill(total.begin(), total.end(), 0);
                    for (int64_t t = k; t >= 0; t = next[t]) add_row(term(t), total.data(), D);
                    round_row(total.data(), to + i * D, D);
                }
            }
        });
    });
    return dx;
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("gather", TORCH_BOX(&jepa::gather));
    m.impl("gather_backward", TORCH_BOX(&jepa::gather_backward));
}
