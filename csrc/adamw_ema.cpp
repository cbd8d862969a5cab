// AdamW, the average of the weights and 16-bit copies of both, in one pass over memory.

#include <cmath>

#include "lists.h"

namespace jepa {

namespace {

struct Step {  // a row of the coefficients
    float decay, lr, rsqrt_bias2, weight, scale, apply;
};

JEPA_VECTOR_CLONES void adamw(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                              int64_t n, const Step& s, float beta1_c, float beta2_c, float eps) {
    const float decay = s.decay, lr = s.lr, rsqrt_bias2 = s.rsqrt_bias2, scale = s.scale;
    for (int64_t i = 0; i < n; ++i) {
        const float gradient = scale * g[i];
        m[i] = lerp(m[i], gradient, beta1_c);
        v[i] = lerp(v[i], gradient * gradient, beta2_c);
        p[i] -= decay * p[i] + lr * m[i] / (std::sqrt(v[i]) * rsqrt_bias2 + eps);
    }
}

}  // namespace

void adamw_ema(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> emas, std::vector<Tensor> weight_copies,
               std::vector<Tensor> ema_copies, Tensor coefficients, double beta1, double beta2, double eps) {
    const auto* steps = pointer<const Step>(coefficients);
    for_each_piece(params, [&](size_t i, int64_t from, int64_t n) {
        if (steps[i].apply == 0) return;
        float buffer[kPiece];
        float* p = pointer<float>(params[i]) + from;
        adamw(p, read(grads[i], from, n, buffer), pointer<float>(exp_avgs[i]) + from,
              pointer<float>(exp_avg_sqs[i]) + from, n, steps[i], static_cast<float>(1 - beta1),
              static_cast<float>(1 - beta2), static_cast<float>(eps));
        if (!weight_copies.empty()) write(weight_copies[i], from, n, p);
        if (emas.empty()) return;
        float* e = pointer<float>(emas[i]) + from;
        lerp(e, p, steps[i].weight, n);
        if (!ema_copies.empty()) write(ema_copies[i], from, n, e);
    });
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("adamw_ema_", TORCH_BOX(&jepa::adamw_ema));
}
