// The kept patches of uint8 images, normalised and cast: y[b, k, (c, py, px)] = pixel * scale[c] + bias[c].

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu.h"

namespace jepa {
namespace {

template <class T>
JEPA_VECTOR_CLONES void normalise(const uint8_t* pixel, float scale, float bias, int64_t n, T* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<float>(pixel[i]) * scale + bias);
}

}  // namespace

Tensor patchify(const Tensor& images, const std::optional<Tensor>& index_BK, const std::vector<double>& scale,
                const std::vector<double>& bias, int64_t P, ScalarType dtype) {
    STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == 3 && images.scalar_type() == ScalarType::Byte,
                    "patchify: images must be uint8 [B, 3, H, W]");
    STD_TORCH_CHECK(P > 0 && scale.size() == 3 && bias.size() == 3, "patchify: P > 0, three scales, three biases");
    const int64_t B = images.size(0), grid_w = images.size(3) / P, N = images.size(2) / P * grid_w;
    std::optional<Tensor> index;
    const int64_t* n = nullptr;
    if (index_BK) {
        STD_TORCH_CHECK(index_BK->dim() == 2 && index_BK->size(0) == B, "patchify: index must be [B, K]");
        index = torch::stable::contiguous(*index_BK);
        n = checked_index(*index, N, "patchify: index");
    }
    const int64_t K = index ? index->size(1) : N, plane = P * P;
    const Tensor y = torch::stable::new_empty(images, {B, K, 3 * plane}, dtype);
    if (y.numel() == 0) return y;
    const auto* from = pointer<const uint8_t>(images);
    const int64_t s_b = images.stride(0), s_c = images.stride(1), s_h = images.stride(2), s_w = images.stride(3);
    dispatch(dtype, [&](auto type) {
        using T = decltype(type);
        auto* to = pointer<T>(y);
        torch::stable::parallel_for(0, B * K, std::max<int64_t>(1, 65536 / plane), [&](int64_t begin, int64_t end) {
            std::vector<uint8_t> pixels(plane);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t patch = n ? n[i] : i % K;
                const auto* corner = from + i / K * s_b + patch / grid_w * P * s_h + patch % grid_w * P * s_w;
                for (int64_t c = 0; c < 3; ++c) {
                    for (int64_t py = 0; py < P; ++py) {
                        const auto* run = corner + c * s_c + py * s_h;
                        for (int64_t px = 0; px < P; ++px) pixels[py * P + px] = run[px * s_w];
                    }
                    normalise(pixels.data(), static_cast<float>(scale[c]), static_cast<float>(bias[c]), plane,
                              to + (i * 3 + c) * plane);
                }
            }
        });
    });
    return y;
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) { m.impl("patchify", TORCH_BOX(&jepa::patchify)); }
