#include "lists.h"

#include <bit>

namespace jepa {

namespace {

JEPA_VECTOR_CLONES void from_bfloat16(const uint16_t* __restrict from, float* __restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16);
}

JEPA_VECTOR_CLONES void to_bfloat16(const float* __restrict from, uint16_t* __restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(from[i]);
        const uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const bool nan = (bits & 0x7fffffff) > 0x7f800000;
        to[i] = static_cast<uint16_t>(nan ? 0x7fc0 : even);
    }
}

// float16 as bits: its exponent bias is 112 smaller, and one float32 subtraction normalises its subnormals.
JEPA_VECTOR_CLONES void from_float16(const uint16_t* __restrict from, float* __restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t half = from[i], bits = (half & 0x7fff) << 13, exponent = bits & 0x0f800000;
        const uint32_t normal = bits + (112u << 23) + (exponent == 0x0f800000 ? 112u << 23 : 0);  // or inf, or NaN
        const float small = std::bit_cast<float>(bits + (113u << 23)) - std::bit_cast<float>(113u << 23);
        const uint32_t size = exponent == 0 ? std::bit_cast<uint32_t>(small) : normal;
        to[i] = std::bit_cast<float>(size | (half & 0x8000) << 16);
    }
}

JEPA_VECTOR_CLONES void to_float16(const float* __restrict from, uint16_t* __restrict to, int64_t n) {
    constexpr uint32_t kRound = 126u << 23;  // 0.5: adding it rounds to multiples of float16's smallest subnormal
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(from[i]), size = bits & 0x7fffffff;
        const uint32_t normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
        const float sum = std::bit_cast<float>(size) + std::bit_cast<float>(kRound);
        const uint32_t small = std::bit_cast<uint32_t>(sum) - kRound;
        const uint32_t large = size > 0x7f800000 ? 0x7e00 : 0x7c00;
        const uint32_t half = size >= 0x47800000 ? large : size < (113u << 23) ? small : normal;
        to[i] = static_cast<uint16_t>(half | (bits & 0x80000000) >> 16);
    }
}

}  // namespace

float* read(const Flat& t, int64_t from, int64_t n, float* buffer) {
    switch (t.dtype) {
        case ScalarType::Float:
            return static_cast<float*>(t.data) + from;
        case ScalarType::BFloat16:
            from_bfloat16(static_cast<const uint16_t*>(t.data) + from, buffer, n);
            return buffer;
        default:
            from_float16(static_cast<const uint16_t*>(t.data) + from, buffer, n);
            return buffer;
    }
}

void write(const Flat& t, int64_t from, int64_t n, const float* values) {
    switch (t.dtype) {
        case ScalarType::Float:
            if (values != static_cast<float*>(t.data) + from)
                std::copy_n(values, n, static_cast<float*>(t.data) + from);
            break;
        case ScalarType::BFloat16:
            to_bfloat16(values, static_cast<uint16_t*>(t.data) + from, n);
            break;
        default:
            to_float16(values, static_cast<uint16_t*>(t.data) + from, n);
    }
}

void check_flat(const Tensor& t, int64_t numel, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.numel() == numel, name, " has the wrong dtype or size");
}

Flats flats(const char* op, const std::vector<Tensor>& tensors) {
    Flats found;
    found.reserve(tensors.size());
    for (const Tensor& t : tensors) {
        found.push_back({t.data_ptr(), t.numel(), t.scalar_type()});
        const ScalarType dtype = found.back().dtype;
        STD_TORCH_CHECK(
            t.is_cpu() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half),
            op, ": tensor ", found.size() - 1, " is not float32, bfloat16 or float16 on the CPU");
    }
    return found;
}

Flats flats(const char* op, const std::vector<Tensor>& tensors, const Flats& like, bool optional) {
    Flats found = flats(op, tensors);
    if (optional && found.empty()) return found;
    STD_TORCH_CHECK(found.size() == like.size(), op, ": lists must have the same length; got ", like.size(), " and ",
                    found.size());
    for (size_t i = 0; i < found.size(); ++i) {
        STD_TORCH_CHECK(found[i].numel == like[i].numel, op, ": tensors ", i, " differ in size");
    }
    return found;
}

void check_wide(const char* op, const Flats& tensors) {
    for (const Flat& t : tensors)
        STD_TORCH_CHECK(t.dtype == ScalarType::Float, op, ": weights and states must be float32");
}

}  // namespace jepa
