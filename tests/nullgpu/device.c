// The counters, and the GPU that is pretended: its properties and what it can launch.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)
#define GIB ((size_t)1 << 30)

// Read by nullgpu.py.
#define NAME(name) #name,
const char* const nullgpu_counter_names[] = {NULLGPU_COUNTERS(NAME) NULL};
static _Atomic long counters[NULLGPU_COUNTERS_END];

void nullgpu_count(enum nullgpu_counter counter) {
    atomic_fetch_add_explicit(&counters[counter], 1, memory_order_relaxed);
}

long nullgpu_counted(int counter) {
    return atomic_load(&counters[counter]);
}

void nullgpu_trace(const char* counter, const char* call) {
    const char* level = getenv("NULLGPU_TRACE");
    if (!level || atoi(level) < 1) return;
    fprintf(stderr, "nullgpu: %s: %s\n", counter, call);
    if (atoi(level) < 2) return;
    // What faulthandler prints, of this thread. A thread of the autograd engine has no Python stack.
    void* (*state)(void) = (void* (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
    void (*dump)(int, void*) = (void (*)(int, void*))dlsym(RTLD_DEFAULT, "_Py_DumpTraceback");
    if (state && dump && state()) dump(fileno(stderr), state());
}

static const struct nullgpu_gpu gpus[] = {
    {80, "NVIDIA A100-SXM4-80GB", 108, 164 * KIB, 40 * MIB, 1410000, 1593000, 5120, 79 * GIB},
    {90, "NVIDIA H200", 132, 228 * KIB, 60 * MIB, 1980000, 3201000, 6144, 139 * GIB},
    {100, "NVIDIA B200", 148, 228 * KIB, 126 * MIB, 1965000, 3996000, 8192, 178 * GIB},
};

static struct nullgpu_gpu chosen;

static void choose(void) {
    const char *capability = getenv("NULLGPU_CC"), *name = getenv("NULLGPU_NAME"), *memory = getenv("NULLGPU_GB");
    int wanted = capability ? atoi(capability) : 90;
    for (size_t i = 0; i < sizeof gpus / sizeof *gpus; i++)
        if (gpus[i].capability == wanted) chosen = gpus[i];
    if (!chosen.capability) {
        fprintf(stderr, "nullgpu: NULLGPU_CC=%s is none of the GPUs known: 80, 90, 100\n", capability);
        exit(2);
    }
    if (name) chosen.name = name;
    if (memory) chosen.memory = (size_t)(atof(memory) * (double)GIB);
}

const struct nullgpu_gpu* nullgpu_gpu(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose);
    return &chosen;
}

int nullgpu_all_devices(void) {
    const char* given = getenv("NULLGPU_N");
    int devices = given ? atoi(given) : 1;
    if (devices < 0 || devices > NULLGPU_MOST_DEVICES) {
        fprintf(stderr, "nullgpu: NULLGPU_N=%s is not between 0 and %d GPUs\n", given, NULLGPU_MOST_DEVICES);
        exit(2);
    }
    return devices;
}

int nullgpu_devices(void) {
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    int devices = nullgpu_all_devices(), listed = 0;
    if (!visible) return devices;
    char* end;
    for (long device; (device = strtol(visible, &end, 10)), end != visible; visible = end + 1) {
        if (device < 0 || device >= devices) break;
        listed++;
        if (*end != ',') break;
    }
    return listed;
}

_Thread_local int nullgpu_device = 0;

// cudaDeviceAttr has the same numbers, so the runtime asks here too. What is not listed is not supported: 0.
int nullgpu_attribute(CUdevice_attribute attribute, int device) {
    const struct nullgpu_gpu* gpu = nullgpu_gpu();
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            return gpu->capability / 10;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            return gpu->capability % 10;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            return gpu->processors;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
            return gpu->shared_per_processor;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            return gpu->shared_per_processor - (int)KIB;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
            return 48 * KIB;
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK:
            return KIB;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
            return gpu->l2;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
            return gpu->clock;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
            return gpu->memory_clock;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
            return gpu->memory_bus;
        case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID:
            return device + 1;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
            return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
            return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_PITCH:
            return 2147483647;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
            return 65535;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
            return 2048;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR:
            return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY:
            return 64 * KIB;
        case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT:
            return 512;
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT:
            return 3;
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
        case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM:
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED:
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
            return 1;
        default:
            return 0;
    }
}

bool nullgpu_launchable(const unsigned grid[3], const unsigned block[3], size_t shared) {
    static const unsigned most_blocks[3] = {2147483647, 65535, 65535}, most_threads[3] = {1024, 1024, 64};
    for (int i = 0; i < 3; i++)
        if (!grid[i] || grid[i] > most_blocks[i] || !block[i] || block[i] > most_threads[i]) return false;
    return (size_t)block[0] * block[1] * block[2] <= 1024 &&
           shared + KIB <= (size_t)nullgpu_gpu()->shared_per_processor;
}

int nullgpu_blocks_per_processor(int threads, size_t shared) {
    int by_threads = threads > 0 ? 2048 / threads : 0;
    int by_shared = (int)((size_t)nullgpu_gpu()->shared_per_processor / (shared + KIB));
    int blocks = by_threads < by_shared ? by_threads : by_shared;
    return blocks < 32 ? blocks : 32;
}
