// Elementwise operations on lists of tensors of mixed dtypes, in pieces that stay in cache, where they are converted to
// float32 if necessary.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu.h"

namespace jepa {

constexpr int64_t kPiece = 1024;  // elements: conversion buffers stay in the L1 cache

// a + weight * (b - a), computed from the nearer end like torch.lerp: exact at both ends.
inline float lerp(float a, float b, float weight) {
    return weight < 0.5f ? a + weight * (b - a) : b - (1 - weight) * (b - a);
}

// A tensor's memory: querying a stable tensor is a call into libtorch, too expensive to make for every piece.
struct Flat {
    void* data;
    int64_t numel;
    ScalarType dtype;
};
using Flats = std::vector<Flat>;

// Throws unless all are float32, bfloat16 or float16 on the CPU, with the number of tensors and elements of `like`; an
// `optional` list may be empty.
Flats flats(const char* op, const std::vector<Tensor>& tensors);
Flats flats(const char* op, const std::vector<Tensor>& tensors, const Flats& like, bool optional = false);
// Throws unless all are float32.
void check_wide(const char* op, const Flats& tensors);
// Throws unless t is `numel` elements of `dtype` on the CPU.
void check_flat(const Tensor& t, int64_t numel, ScalarType dtype, const char* name);

// Elements [from, from + n) as float32: in place, or converted into `buffer`.
float* read(const Flat& t, int64_t from, int64_t n, float* buffer);
// Stores n values from element `from` on. Does nothing if `values` already points there.
void write(const Flat& t, int64_t from, int64_t n, const float* values);

// Calls body(i, from, n) for every piece of every tensor i, in parallel. Elements are counted in memory order.
template <class Body>
void for_each_piece(const Flats& tensors, const Body& body) {
    std::vector<int64_t> first{0};  // pieces before tensor i
    for (const Flat& t : tensors) first.push_back(first.back() + (t.numel + kPiece - 1) / kPiece);
    torch::stable::parallel_for(0, first.back(), 32, [&](int64_t begin, int64_t end) {
        size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (int64_t k = begin; k < end; ++k) {
            while (k >= first[i + 1]) ++i;
            const int64_t from = (k - first[i]) * kPiece;
            body(i, from, std::min<int64_t>(kPiece, tensors[i].numel - from));
        }
    });
}

}  // namespace jepa
