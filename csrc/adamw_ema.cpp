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

double number(const Tensor& t) {
    return *pointer<const double>(torch::stable::to(t, ScalarType::Double));
}

}  // namespace

// Counts the steps, and returns [R, 6]: a `Step` for each. Numbers: lr, weight decay, momentum, gradient scale, not 0
// where nothing is to happen.
Tensor adamw_ema_coefficients(std::vector<Tensor> steps, std::vector<Tensor> numbers, double beta1, double beta2) {
    STD_TORCH_CHECK(!steps.empty() && numbers.size() == 5, "adamw_ema_coefficients_: steps and five numbers wanted");
    for (const Tensor& t : steps) check_flat(t, 1, ScalarType::Float, "adamw_ema_coefficients_: a step");
    for (const Tensor& t : numbers) STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1, "a number must be one, on the CPU");
    const double lr = number(numbers[0]), momentum = number(numbers[2]);
    const float decay = static_cast<float>(lr * number(numbers[1])), scale = static_cast<float>(number(numbers[3]));
    const float apply = number(numbers[4]) == 0 ? 1 : 0;
    const Tensor coefficients =
        torch::stable::new_empty(steps[0], {static_cast<int64_t>(steps.size()), 6}, ScalarType::Float);
    auto* row = pointer<Step>(coefficients);
    for (const Tensor& step : steps) {
        const double t = *pointer<float>(step) += apply;
        *row++ = {decay,
                  static_cast<float>(lr / (1 - std::pow(beta1, t))),
                  static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
                  static_cast<float>(1 - momentum),
                  scale,
                  apply};
    }
    return coefficients;
}

void adamw_ema(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
               std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> emas, std::vector<Tensor> weight_copies,
               std::vector<Tensor> ema_copies, Tensor coefficients, double beta1, double beta2, double eps) {
    check_flat(coefficients, static_cast<int64_t>(params.size()) * 6, ScalarType::Float, "adamw_ema_: coefficients");
    check_lists("adamw_ema_", params, {&grads, &exp_avgs, &exp_avg_sqs}, {&emas, &weight_copies, &ema_copies});
    for (const auto* wide : {&params, &exp_avgs, &exp_avg_sqs, &emas}) {
        for (const Tensor& t : *wide) check_flat(t, t.numel(), ScalarType::Float, "adamw_ema_: a weight or state");
    }
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
    m.impl("adamw_ema_coefficients_", TORCH_BOX(&jepa::adamw_ema_coefficients));
    m.impl("adamw_ema_", TORCH_BOX(&jepa::adamw_ema));
}
