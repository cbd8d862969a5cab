// Shared by all CPU kernels: the stable-ABI names, and a macro for run-time SIMD dispatch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

// One binary for every x86-64: the loader picks the widest version that the machine supports. GCC 11 cannot dispatch on
// x86-64 levels, only on single features (and on CPU model names, each of which matches that model alone).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define JEPA_VECTOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JEPA_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
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

// The type in which sums and statistics of T are accumulated.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType wide_of(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
static JEPA_VECTOR_CLONES void add_row(const T* term, Wide<T>* total, int64_t n) {
    for (int64_t i = 0; i < n; ++i) total[i] += static_cast<Wide<T>>(term[i]);
}

template <class T>
static JEPA_VECTOR_CLONES void round_row(const Wide<T>* total, T* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(total[i]);
}

// x [A, R, D] itself if its rows are contiguous, else a copy.
inline Tensor with_rows(const Tensor& x) {
    return x.size(2) > 1 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x;
}

// Rows per task: 64 KiB.
inline int64_t grain(int64_t row_bytes) {
    return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, row_bytes));
}

// Calls f(T()) with the C++ type T of a floating-point dtype.
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
            STD_TORCH_CHECK(false, "jepa_kernels: the CPU kernels support float32, float64, bfloat16 and float16");
    }
}

// Every index passes through here before anything is read through it. Not inside a parallel_for: an exception thrown
// there loses its message.
inline const int64_t* checked_index(const Tensor& index, int64_t rows, const char* name) {
    STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long && index.is_contiguous(), name, " must be int64");
    const auto* at = pointer<const int64_t>(index);
    for (int64_t i = 0, count = index.numel(); i < count; ++i) {
        STD_TORCH_CHECK(at[i] >= 0 && at[i] < rows, name, " contains ", at[i], "; it must be in 0..", rows - 1);
    }
    return at;
}

}  // namespace jepa
