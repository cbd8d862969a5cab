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

}  // namespace jepa
