// The kept patches of uint8 images, normalised and cast: y[b, k, (c, py, px)] = pixel * scale[c] + bias[c].

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu.h"

namespace jepa {
namespace {

// One patch: per channel, its bytes are copied together and converted in one vector loop. `kP` is P for the usual
// sizes, else 0: the short loops over a run are worth unrolling.
template <class T, int64_t kP>
JEPA_VECTOR_CLONES void patch(const uint8_t* corner, int64_t s_c, int64_t s_h, int64_t s_w, int64_t run_time_P,
                              const float* scale, const float* bias, uint8_t* pixels, T* to) {
    const int64_t P = kP ? kP : run_time_P;
    for (int64_t c = 0; c < 3; ++c, to += P * P) {
        for (int64_t py = 0; py < P; ++py) {
            const uint8_t* run = corner + c * s_c + py * s_h;
            if (s_w == 1) {
                std::memcpy(pixels + py * P, run, P);
            } else {
                for (int64_t px = 0; px < P; ++px) pixels[py * P + px] = run[px * s_w];
            }
        }
        for (int64_t i = 0; i < P * P; ++i) {
            to[i] = static_cast<T>(static_cast<float>(pixels[i]) * scale[c] + bias[c]);
        }
    }
}

template <class T>
auto patch_of_size(int64_t P) {
    switch (P) {
        case 4:
            return &patch<T, 4>;
        case 8:
            return &patch<T, 8>;
        case 14:
            return &patch<T, 14>;
        case 16:
            return &patch<T, 16>;
        default:
            return &patch<T, 0>;
    }
}

}  // namespace

Tensor patchify(const Tensor& images, const std::optional<Tensor>& index_BK, const std::vector<double>& scales,
                const std::vector<double>& biases, int64_t P, ScalarType dtype) {
    STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == 3 && images.scalar_type() == ScalarType::Byte,
                    "patchify: images must be uint8 [B, 3, H, W]");
    STD_TORCH_CHECK(P > 0 && scales.size() == 3 && biases.size() == 3,
                    "patchify: needs P > 0, three scales and three biases");
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
    const std::array<float, 3> scale{static_cast<float>(scales[0]), static_cast<float>(scales[1]),
                                     static_cast<float>(scales[2])};
    const std::array<float, 3> bias{static_cast<float>(biases[0]), static_cast<float>(biases[1]),
                                    static_cast<float>(biases[2])};
    dispatch(dtype, [&](auto type) {
        using T = decltype(type);
        auto* to = pointer<T>(y);
        const auto write = patch_of_size<T>(P);
        torch::stable::parallel_for(0, B * K, grain(3 * plane * sizeof(T)), [&](int64_t begin, int64_t end) {
            std::vector<uint8_t> pixels(plane);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t at = n ? n[i] : i % K;
                write(from + i / K * s_b + at / grid_w * P * s_h + at % grid_w * P * s_w, s_c, s_h, s_w, P,
                      scale.data(), bias.data(), pixels.data(), to + i * 3 * plane);
            }
        });
    });
    return y;
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("patchify", TORCH_BOX(&jepa::patchify));
}
