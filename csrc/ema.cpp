// t <- t + weight * (s - t) over lists of tensors.

#include "lists.h"

namespace jepa {

void ema(std::vector<Tensor> targets, std::vector<Tensor> sources, Tensor weight) {
    check_lists("ema_", targets, {&sources}, {});
    check_flat(weight, 1, ScalarType::Float, "ema_: weight");
    const float w = *pointer<const float>(weight);
    for_each_piece(targets, [&](size_t i, int64_t from, int64_t n) {
        float target_buffer[kPiece], source_buffer[kPiece];
        float* target = read(targets[i], from, n, target_buffer);
        lerp(target, read(sources[i], from, n, source_buffer), w, n);
        write(targets[i], from, n, target);
    });
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("ema_", TORCH_BOX(&jepa::ema));
}
