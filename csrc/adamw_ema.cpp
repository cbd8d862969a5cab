// AdamW, the moving average of the weights and 16-bit copies of both, in one pass over memory.

#include <cmath>

#include "lists.h"

namespace jepa {

namespace {

struct Step {  // a row of the coefficients
    float decay, lr, rsqrt_bias2, weight, scale, apply;
};

// Without EMA, `e` is not accessed.
template <bool EMA>
JEPA_VECTOR_CLONES void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                               float* __restrict e, int64_t n, const Step& s, float beta1_c, float beta2_c, float eps) {
    const float decay = s.decay, lr = s.lr, rsqrt_bias2 = s.rsqrt_bias2, weight = s.weight, scale = s.scale;
    for (int64_t i = 0; i < n; ++i) {
        const float gradient = scale * g[i];
        const float m_i = m[i] = lerp(m[i], gradient, beta1_c);
        const float v_i = v[i] = lerp(v[i], gradient * gradient, beta2_c);
        const float p_i = p[i] -= decay * p[i] + lr * m_i / (std::sqrt(v_i) * rsqrt_bias2 + eps);
        if constexpr (EMA) e[i] = lerp(e[i], p_i, weight);
    }
}

double number(const Tensor& t) {
    return *pointer<const double>(torch::stable::to(t, ScalarType::Double));
}

}  // namespace

// Increments the steps and returns [R, 6]: a `Step` for each. Numbers: lr, weight decay, momentum, gradient scale, and
// found_inf, which skips the update if it is not 0.
Tensor adamw_ema_coefficients(std::vector<Tensor> steps, std::vector<Tensor> numbers, double beta1, double beta2) {
    STD_TORCH_CHECK(!steps.empty() && numbers.size() == 5, "adamw_ema_coefficients_: needs steps and five numbers");
    for (const Tensor& t : steps) check_flat(t, 1, ScalarType::Float, "adamw_ema_coefficients_: a step");
    for (const Tensor& t : numbers)
        STD_TORCH_CHECK(t.is_cpu() && t.numel() == 1,
                        "adamw_ema_coefficients_: numbers must be one-element CPU tensors");
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
    const char* op = "adamw_ema_";
    const Flats p = flats(op, params), g = flats(op, grads, p), m = flats(op, exp_avgs, p),
                v = flats(op, exp_avg_sqs, p);
    const Flats e = flats(op, emas, p, true), p_copies = flats(op, weight_copies, p, true);
    const Flats e_copies = flats(op, ema_copies, p, true);
    for (const Flats* wide : {&p, &m, &v, &e}) check_wide(op, *wide);
    const auto* steps = pointer<const Step>(coefficients);
    const auto update = e.empty() ? jepa::update<false> : jepa::update<true>;
    for_each_piece(p, [&](size_t i, int64_t from, int64_t n) {
        if (steps[i].apply == 0) return;
        const auto at = [&](const Flats& list) { return static_cast<float*>(list[i].data) + from; };
        float buffer[kPiece];
        float* average = e.empty() ? nullptr : at(e);
        update(at(p), read(g[i], from, n, buffer), at(m), at(v), average, n, steps[i], static_cast<float>(1 - beta1),
               static_cast<float>(1 - beta2), static_cast<float>(eps));
        if (!p_copies.empty()) write(p_copies[i], from, n, at(p));
        if (!e_copies.empty()) write(e_copies[i], from, n, average);
    });
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("adamw_ema_coefficients_", TORCH_BOX(&jepa::adamw_ema_coefficients));
    m.impl("adamw_ema_", TORCH_BOX(&jepa::adamw_ema));
}
