// What every CPU kernel here shares: the stable-ABI names, and one macro for run-time vector dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

// One binary for every x86-64: the loader picks the widest version that the machine can run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JEPA_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JEPA_VECTOR_CLONES
#endif

namespace jepa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* pointer(const Tensor& t) {
    return static_cast<T*>(t.data_ptr());
}

// What sums and statistics of T are kept in.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(T()) with the type of a floating dtype.
template <class F>
void dispatch(ScalarType dtype, const F& f) {
    switch (dtype) {
        case ScalarType::Float:
            return f(float());
        case ScalarType::Double:
            return f(double());
        case ScalarType::BFloat16:
            return f(torch::headeronly::BFloat16());
        case ScalarType::Half:
            return f(torch::headeronly::Half());
        default:
            STD_TORCH_CHECK(false, "jepa_kernels: the CPU kernels take float32, float64, bfloat16 and float16");
    }
}

// Nothing is read through an index that has not passed here. Before any parallel_for: what is thrown inside one
// loses its text.
inline const int64_t* checked_index(const Tensor& index, int64_t rows, const char* name) {
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_contiguous(), name, " must be int64");
    const auto* at = pointer<const int64_t>(index);
    for (int64_t i = 0, count = index.numel(); i < count; ++i) {
        STD_TORCH_CHECK(at[i] >= 0 && at[i] < rows, name, " holds ", at[i], "; it must lie in 0..", rows - 1);
    }
    return at;
}

}  // namespace jepa
