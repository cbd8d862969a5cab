// What the stubs share: the calls they count, the GPU they pretend to be, and the memory it has.
#pragma once

#include <cuda.h>
#include <stdbool.h>
#include <stddef.h>

// Everything counted, and the names by which nullgpu.py reports it: this list is the only one.
#define NULLGPU_COUNTERS(COUNTER)                                                     \
    COUNTER(stream_sync)  /* the host waited for a stream */                          \
    COUNTER(device_sync)  /* the host waited for the device */                        \
    COUNTER(event_sync)   /* the host waited for an event */                          \
    COUNTER(d2h)          /* copies from device to host */                            \
    COUNTER(h2d)          /* copies from host to device */                            \
    COUNTER(d2d)          /* copies from device to device */                          \
    COUNTER(memcpy_sync)  /* of the copies above, those that wait until it is done */ \
    COUNTER(pageable)     /* of h2d, those whose source is not pinned */              \
    COUNTER(launch)       /* kernels that the runtime launched: torch's own */        \
    COUNTER(triton)       /* kernels that the driver launched: Triton's */            \
    COUNTER(graph_launch) /* CUDA graphs replayed */                                  \
    COUNTER(gemm)         /* matrix products of cuBLAS and cuBLASLt */                \
    COUNTER(nccl)         /* collectives, sends and receives */                       \
    COUNTER(malloc)       /* device memory asked of CUDA, past torch's allocator */   \
    COUNTER(host_alloc)   /* pinned memory asked of CUDA, past torch's allocator */   \
    COUNTER(module)       /* modules of kernels loaded */

#define NULLGPU_ENUMERATOR(name) NULLGPU_##name,
enum nullgpu_counter { NULLGPU_COUNTERS(NULLGPU_ENUMERATOR) NULLGPU_COUNTERS_END };

// Adds one to a counter. The backward pass and the loader call from threads of their own: counters are atomic.
#define COUNT(name) nullgpu_count(NULLGPU_##name)
void nullgpu_count(enum nullgpu_counter counter);

// The same for calls that stall the host: NULLGPU_TRACE=1 prints the name of each, 2 the Python stack as well.
#define COUNT_STALL(name, call) (nullgpu_count(NULLGPU_##name), nullgpu_trace(#name, call))
void nullgpu_trace(const char* counter, const char* call);

// The GPU, chosen by NULLGPU_CC, NULLGPU_NAME and NULLGPU_GB.
struct nullgpu_gpu {
    int capability;  // 90: sm_90
    const char* name;
    int processors;
    int shared_per_processor;  // bytes; a block may take all but the 1 KiB that CUDA reserves
    int l2;                    // bytes
    int clock;                 // kHz
    int memory_clock;          // kHz
    int memory_bus;            // bits
    size_t memory;             // bytes
};
const struct nullgpu_gpu* nullgpu_gpu(void);
#define NULLGPU_MOST_DEVICES 64
int nullgpu_all_devices(void);  // NULLGPU_N
int nullgpu_devices(void);      // of these, those that CUDA_VISIBLE_DEVICES shows: launchers hide devices by it
int nullgpu_attribute(CUdevice_attribute attribute, int device);

// The calling thread's current device.
extern _Thread_local int nullgpu_device;

// Whether a real GPU would accept these dimensions. A kernel that asks for too much fails here too.
bool nullgpu_launchable(const unsigned grid[3], const unsigned block[3], size_t shared);
int nullgpu_blocks_per_processor(int threads, size_t shared);

// Memory. Device memory is the host's, reserved but not touched until something small is copied there.
enum nullgpu_place { NULLGPU_PAGEABLE, NULLGPU_PINNED, NULLGPU_DEVICE };

struct nullgpu_range {
    char* start;
    size_t size;
    enum nullgpu_place place;
    int device;
    void* backing;  // the allocation mapped there, of virtual memory; else null
};

bool nullgpu_take(int device, size_t bytes);  // false: the device has not that much left
void nullgpu_give_back(int device, size_t bytes);
size_t nullgpu_free_memory(int device);

void nullgpu_add_range(struct nullgpu_range range);
bool nullgpu_remove_range(const void* start, struct nullgpu_range* removed);
struct nullgpu_range nullgpu_find_range(const void* pointer);  // place NULLGPU_PAGEABLE where it is in none

CUresult nullgpu_malloc(void** pointer, size_t bytes);
CUresult nullgpu_free(void* pointer);

// Copies from the host, copies within the device, and fills: of what is small enough to matter to the host's logic.
void nullgpu_copy_in(void* to, const void* from, size_t bytes);
void nullgpu_copy_within(void* to, const void* from, size_t bytes);
void nullgpu_fill(void* to, int value, size_t bytes);

// Streams are the runtime's, and the driver is given them too. A kernel runs in a stream of the thread's current
// device; while the stream is captured, the kernel becomes a node of the graph.
bool nullgpu_of_current_device(CUstream stream);
void nullgpu_captured(CUstream stream);
