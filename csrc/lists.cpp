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

using torch::headeronly::Half;

}  // namespace

JEPA_VECTOR_CLONES void lerp(float* __restrict target, const float* __restrict source, float weight, int64_t n) {
    for (int64_t i = 0; i < n; ++i) target[i] = lerp(target[i], source[i], weight);
}

float* read(const Tensor& t, int64_t from, int64_t n, float* buffer) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            return pointer<float>(t) + from;
        case ScalarType::BFloat16:
            from_bfloat16(pointer<const uint16_t>(t) + from, buffer, n);
            return buffer;
        default:
            std::copy_n(pointer<const Half>(t) + from, n, buffer);
            return buffer;
    }
}

void write(const Tensor& t, int64_t from, int64_t n, const float* values) {
    switch (t.scalar_type()) {
        case ScalarType::Float:
            if (values != pointer<float>(t) + from) std::copy_n(values, n, pointer<float>(t) + from);
            break;
        case ScalarType::BFloat16:
            to_bfloat16(values, pointer<uint16_t>(t) + from, n);
            break;
        default:
            std::copy_n(values, n, pointer<Half>(t) + from);
    }
}

void check_flat(const Tensor& t, int64_t numel, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.numel() == numel, name, " has another dtype or size");
}

void check_lists(const char* op, const std::vector<Tensor>& tensors,
                 std::initializer_list<const std::vector<Tensor>*> lists,
                 std::initializer_list<const std::vector<Tensor>*> optional) {
    const auto check = [&](const std::vector<Tensor>& list) {
        STD_TORCH_CHECK(list.size() == tensors.size(), op, ": lists of ", tensors.size(), " and ", list.size());
        for (size_t i = 0; i < list.size(); ++i) {
            const auto dtype = list[i].scalar_type();
            STD_TORCH_CHECK(
                list[i].is_cpu() && list[i].numel() == tensors[i].numel() &&
                    (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half),
                op, ": tensors ", i, " do not go together");
        }
    };
    check(tensors);
    for (const auto* list : lists) check(*list);
    for (const auto* list : optional) {
        if (!list->empty()) check(*list);
    }
}

}  // namespace jepa
