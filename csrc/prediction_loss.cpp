// Smooth L1 between predictions and layer-normed target rows, with its gradient written in the same pass.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu.h"

namespace jepa {
namespace {

constexpr int64_t kLanes = 16;       // separate sums, so that the compiler can vectorise; the order is fixed
constexpr int64_t kGrain = 1 << 14;  // elements per task
constexpr double kEps = 1e-5;

template <class A>
A total(const A* lanes) {
    double sum = 0;
    for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
    return static_cast<A>(sum);
}

template <class T, class A>
JEPA_VECTOR_CLONES void widen(const T* x, A* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(static_cast<Wide<T>>(x[i]));
}

// Sum of smooth_l1(e) over a row, e = p - norm(y), which overwrites y; writes clamp(e) * fraction as the gradient.
template <class P, class A = Wide<P>>
JEPA_VECTOR_CLONES A row_loss(const P* p, A* y, P* grad, int64_t D, A fraction) {
    const int64_t body = D - D % kLanes;
    A sums[kLanes] = {}, squares[kLanes] = {}, losses[kLanes] = {};
    for (int64_t d = 0; d < body; d += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) sums[l] += y[d + l];
    }
    for (int64_t d = body; d < D; ++d) sums[d - body] += y[d];
    const A mean = total(sums) / static_cast<A>(D);
    for (int64_t d = 0; d < body; d += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) squares[l] += (y[d + l] - mean) * (y[d + l] - mean);
    }
    for (int64_t d = body; d < D; ++d) squares[d - body] += (y[d] - mean) * (y[d] - mean);
    const A scale = 1 / std::sqrt(total(squares) / static_cast<A>(D) + static_cast<A>(kEps));

    for (int64_t d = 0; d < D; ++d) y[d] = static_cast<A>(p[d]) - (y[d] - mean) * scale;
    // With c = clamp(e, -1, 1) the loss is c * (e - c / 2). Both propagate NaN.
    const auto clamp = [](A e) { return e > 1 ? A(1) : e < -1 ? A(-1) : e; };
    for (int64_t d = 0; d < body; d += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
            const A c = clamp(y[d + l]);
            losses[l] += c * (y[d + l] - c / 2);
        }
    }
    for (int64_t d = body; d < D; ++d) {
        const A c = clamp(y[d]);
        losses[d - body] += c * (y[d] - c / 2);
    }
    if (grad != nullptr) {
        for (int64_t d = 0; d < D; ++d) grad[d] = static_cast<P>(clamp(y[d]) * fraction);
    }
    return total(losses);
}

// Where the loss is linear every element is +-fraction, rounded: there the unrounded fraction is multiplied instead.
template <class T, class A = Wide<T>>
JEPA_VECTOR_CLONES void multiply(T* x, A weight, A fraction, int64_t n) {
    const A stored = static_cast<A>(static_cast<T>(fraction));
    for (int64_t i = 0; i < n; ++i) {
        const A y = static_cast<A>(x[i]);
        x[i] = static_cast<T>((y == stored ? fraction : y == -stored ? -fraction : y) * weight);
    }
}

// 1 / numel as (fraction, power of two): the stored gradient contains only the fraction. The power is 1 except for
// float16.
std::pair<double, double> unit(const Tensor& pred) {
    const double mean = 1.0 / static_cast<double>(std::max<int64_t>(pred.numel(), 1));
    if (pred.scalar_type() != ScalarType::Half) return {mean, 1.0};
    int exponent;
    const double fraction = std::frexp(mean, &exponent);
    return {fraction, std::ldexp(1.0, exponent)};
}

}  // namespace

std::tuple<Tensor, Tensor> prediction_loss(const Tensor& pred_QKD, const Tensor& target_BND, const Tensor& index_MBK,
                                           bool with_grad) {
    STD_TORCH_CHECK(pred_QKD.dim() == 3 && target_BND.dim() == 3 && index_MBK.dim() == 3,
                    "prediction_loss: pred must be [M*B, K, D], target [B, N, D], index [M, B, K]");
    const int64_t M = index_MBK.size(0), B = index_MBK.size(1), K = index_MBK.size(2), D = pred_QKD.size(2);
    STD_TORCH_CHECK(
        pred_QKD.size(0) == M * B && pred_QKD.size(1) == K && target_BND.size(0) == B && target_BND.size(2) == D,
        "prediction_loss: the sizes of pred, target and index do not match");
    const Tensor pred = with_rows(pred_QKD), target = with_rows(target_BND);
    const Tensor index = torch::stable::contiguous(index_MBK);
    const auto* chosen = checked_index(index, target.size(1), "prediction_loss: index");
    const Tensor losses = torch::stable::new_empty(pred, {M}, wide_of(pred));
    const Tensor grad = with_grad ? torch::stable::new_empty(pred, {M * B, K, D}) : torch::stable::new_empty(pred, {0});
    dispatch(pred.scalar_type(), [&](auto pred_type) {
        dispatch(target.scalar_type(), [&](auto target_type) {
            using P = decltype(pred_type);
            using T = decltype(target_type);
            using A = Wide<P>;
            const auto fraction = static_cast<A>(unit(pred).first);
            const auto* from = pointer<const P>(pred);
            const auto* goal = pointer<const T>(target);
            auto* to = with_grad ? pointer<P>(grad) : nullptr;
            std::vector<A> rows(M * B * K);
            const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, D));
            torch::stable::parallel_for(0, M * B * K, grain, [&](int64_t begin, int64_t end) {
                std::vector<A> wide(D);
                for (int64_t r = begin; r < end; ++r) {
                    const P* p = from + r / K * pred.stride(0) + r % K * pred.stride(1);
                    const T* y = goal + r / K % B * target.stride(0) + chosen[r] * target.stride(1);
                    widen(y, wide.data(), D);
                    rows[r] = row_loss(p, wide.data(), to ? to + r * D : nullptr, D, fraction);
                }
            });
            for (int64_t m = 0; m < M; ++m) {
                double sum = 0;
                for (int64_t r = m * B * K; r < (m + 1) * B * K; ++r) sum += rows[r];
                pointer<A>(losses)[m] = static_cast<A>(sum / static_cast<double>(B * K * D));
            }
        });
    });
    return {losses, grad};
}

// Multiplies the gradient that the forward stored by each block's weight; usually 1, with nothing to do.
void prediction_loss_scale_(const Tensor& grad, const Tensor& grad_losses_M) {
    if (grad.numel() == 0) return;
    const int64_t M = grad_losses_M.numel(), block = M ? grad.numel() / M : 0;
    const Tensor grad_losses = torch::stable::contiguous(grad_losses_M);
    STD_TORCH_CHECK(
        grad.is_contiguous() && grad_losses.scalar_type() == wide_of(grad) && block * M == grad.numel(),
        "prediction_loss_scale_: grad must be M contiguous blocks, and grad_losses float32 (float64 for float64)");
    const std::pair<double, double> one = unit(grad);
    const double power = one.second * static_cast<double>(M);
    dispatch(grad.scalar_type(), [&](auto type) {
        using T = decltype(type);
        for (int64_t m = 0; m < M; ++m) {
            const auto weight = static_cast<Wide<T>>(pointer<const Wide<T>>(grad_losses)[m] * power);
            if (weight == 1) continue;
            torch::stable::parallel_for(0, block, kGrain, [&](int64_t begin, int64_t end) {
                multiply(pointer<T>(grad) + m * block + begin, weight, static_cast<Wide<T>>(one.first), end - begin);
            });
        }
    });
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("prediction_loss", TORCH_BOX(&jepa::prediction_loss));
    m.impl("prediction_loss_scale_", TORCH_BOX(&jepa::prediction_loss_scale_));
}
