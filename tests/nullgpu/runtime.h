// What the two halves of the runtime share.
#pragma once

#include <cuda_runtime_api.h>

#include "nullgpu.h"

// Plain names, which no library may find in place of its own.
#pragma GCC visibility push(hidden)

// Keeps the error for cudaGetLastError, and returns it.
cudaError_t failed(cudaError_t error);

// Whether what is given to the stream becomes part of a graph instead of being done.
bool captured(cudaStream_t stream);

// Whether a capture forbids calls that wait, or may wait, on the calling thread.
bool forbidden(void);

// Spoils the capture, as such a call does.
cudaError_t break_capture(const char* call);

#define UNLESS_FORBIDDEN() \
    if (forbidden()) return break_capture(__func__)

#pragma GCC visibility pop
