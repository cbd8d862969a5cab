// t <- t + weight * (s - t) over lists of tensors.

#include "lists.h"

namespace jepa {
namespace {

JEPA_VECTOR_CLONES void move(float* __restrict target, const float* __restrict source, float weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) target[i] = lerp(target[i], source[i], weight);
}

}  // namespace

void ema(std::vector<Tensor> targets, std::vector<Tensor> sources, Tensor weight) {
    const Flats to = flats("ema_", targets), from = flats("ema_", sources, to);
    check_flat(weight, 1, ScalarType::Float, "ema_: weight");
    const float w = *pointer<const float>(weight);
    for_each_piece(to, [&](size_t i, int64_t first, int64_t n) {
        float target_buffer[kPiece], source_buffer[kPiece];
        float* target = read(to[i], first, n, target_buffer);
        move(target, read(from[i], first, n, source_buffer), w, n);
        write(to[i], first, n, target);
    });
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("ema_", TORCH_BOX(&jepa::ema));
}
