// The CUDA runtime, as torch calls it: errors, devices, memory and kernels. Preloaded, it stands before libcudart.
// What is missing here but declared by the header says so and fails (build.py).
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- Errors

static _Thread_local cudaError_t last_error = cudaSuccess;

cudaError_t failed(cudaError_t error) {
    return last_error = error;
}

// The driver's errors have the runtime's numbers.
static cudaError_t as_runtime(CUresult result) {
    return result ? failed((cudaError_t)result) : cudaSuccess;
}

cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

// ---- Devices

cudaError_t cudaDriverGetVersion(int* version) {
    return as_runtime(cuDriverGetVersion(version));
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
    *count = nullgpu_devices();
    return *count ? cudaSuccess : failed(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* device) {
    *device = nullgpu_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= nullgpu_devices()) return failed(cudaErrorInvalidDevice);
    nullgpu_device = device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
    *value = nullgpu_attribute((CUdevice_attribute)attribute, device);
    return cudaSuccess;
}

static int attribute(enum cudaDeviceAttr name, int device) {
    return nullgpu_attribute((CUdevice_attribute)name, device);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
    if (device < 0 || device >= nullgpu_devices()) return failed(cudaErrorInvalidDevice);
    struct cudaDeviceProp p = {0};
    snprintf(p.name, sizeof p.name, "%s", nullgpu_gpu()->name);
    p.uuid.bytes[0] = (char)(device + 1);
    p.totalGlobalMem = nullgpu_gpu()->memory;
    p.major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    p.minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    p.multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount, device);
    p.warpSize = attribute(cudaDevAttrWarpSize, device);
    p.maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock, device);
    p.maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
    p.maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor, device);
    p.maxThreadsDim[0] = attribute(cudaDevAttrMaxBlockDimX, device);
    p.maxThreadsDim[1] = attribute(cudaDevAttrMaxBlockDimY, device);
    p.maxThreadsDim[2] = attribute(cudaDevAttrMaxBlockDimZ, device);
    p.maxGridSize[0] = attribute(cudaDevAttrMaxGridDimX, device);
    p.maxGridSize[1] = attribute(cudaDevAttrMaxGridDimY, device);
    p.maxGridSize[2] = attribute(cudaDevAttrMaxGridDimZ, device);
    p.sharedMemPerBlock = (size_t)attribute(cudaDevAttrMaxSharedMemoryPerBlock, device);
    p.sharedMemPerBlockOptin = (size_t)attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    p.sharedMemPerMultiprocessor = (size_t)attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    p.reservedSharedMemPerBlock = (size_t)attribute(cudaDevAttrReservedSharedMemoryPerBlock, device);
    p.regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock, device);
    p.regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor, device);
    p.totalConstMem = (size_t)attribute(cudaDevAttrTotalConstantMemory, device);
    p.l2CacheSize = attribute(cudaDevAttrL2CacheSize, device);
    p.memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth, device);
    p.memPitch = (size_t)attribute(cudaDevAttrMaxPitch, device);
    p.textureAlignment = (size_t)attribute(cudaDevAttrTextureAlignment, device);
    p.asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount, device);
    p.concurrentKernels = attribute(cudaDevAttrConcurrentKernels, device);
    p.cooperativeLaunch = attribute(cudaDevAttrCooperativeLaunch, device);
    p.unifiedAddressing = attribute(cudaDevAttrUnifiedAddressing, device);
    p.streamPrioritiesSupported = attribute(cudaDevAttrStreamPrioritiesSupported, device);
    p.hostRegisterSupported = attribute(cudaDevAttrHostRegisterSupported, device);
    p.pciBusID = attribute(cudaDevAttrPciBusId, device);
    *properties = p;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
    snprintf(text, (size_t)length, "0000:%02x:00.0", attribute(cudaDevAttrPciBusId, device));
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
    *can = device != peer;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaProfilerStart(void) {
    return cudaSuccess;
}

cudaError_t cudaProfilerStop(void) {
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* status) {
    CUresult result = cuGetProcAddress(symbol, function, (int)version, flags, NULL);
    if (status) *status = result ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult* status) {
    return cudaGetDriverEntryPointByVersion(symbol, function, CUDART_VERSION, flags, status);
}
#endif

// ---- Memory

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    UNLESS_FORBIDDEN();
    return as_runtime(nullgpu_malloc(pointer, bytes));
}

cudaError_t cudaFree(void* pointer) {
    UNLESS_FORBIDDEN();
    return as_runtime(nullgpu_free(pointer));
}

cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
    return as_runtime(cuMemGetInfo(left, total));
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    COUNT(host_alloc);
    UNLESS_FORBIDDEN();
    if (posix_memalign(pointer, 4096, bytes)) return failed(cudaErrorMemoryAllocation);
    nullgpu_add_range((struct nullgpu_range){*pointer, bytes, NULLGPU_PINNED, nullgpu_device, NULL});
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
    struct nullgpu_range range;
    if (!pointer) return cudaSuccess;
    if (!nullgpu_remove_range(pointer, &range)) return failed(cudaErrorInvalidValue);
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned flags) {
    nullgpu_add_range((struct nullgpu_range){pointer, bytes, NULLGPU_PINNED, nullgpu_device, NULL});
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
    struct nullgpu_range range;
    return nullgpu_remove_range(pointer, &range) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* pointer) {
    static const enum cudaMemoryType types[] = {
        [NULLGPU_PAGEABLE] = cudaMemoryTypeUnregistered,
        [NULLGPU_PINNED] = cudaMemoryTypeHost,
        [NULLGPU_DEVICE] = cudaMemoryTypeDevice,
    };
    struct nullgpu_range range = nullgpu_find_range(pointer);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = types[range.place];
    attributes->device = range.place == NULLGPU_PAGEABLE ? -1 : range.device;
    if (range.place != NULLGPU_PAGEABLE) attributes->devicePointer = (void*)pointer;
    if (range.place != NULLGPU_DEVICE) attributes->hostPointer = (void*)pointer;
    return cudaSuccess;
}

// Of a copy whose kind is cudaMemcpyDefault, the addresses tell.
static enum cudaMemcpyKind kind_of(const void* to, const void* from, enum cudaMemcpyKind kind) {
    if (kind != cudaMemcpyDefault) return kind;
    bool to_device = nullgpu_find_range(to).place == NULLGPU_DEVICE;
    bool from_device = nullgpu_find_range(from).place == NULLGPU_DEVICE;
    if (to_device) return from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
    return from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

// What comes to the host is always copied: it is the host that reads it.
static cudaError_t copy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream,
                        const char* call) {
    bool pageable = false;
    switch (kind_of(to, from, kind)) {
        case cudaMemcpyHostToDevice:
            COUNT(h2d);
            pageable = nullgpu_find_range(from).place == NULLGPU_PAGEABLE;
            if (pageable) COUNT_STALL(pageable, call);
            if (!captured(stream)) nullgpu_copy_in(to, from, bytes);
            break;
        case cudaMemcpyDeviceToHost:
            COUNT(d2h);
            pageable = nullgpu_find_range(to).place == NULLGPU_PAGEABLE;
            if (!captured(stream)) memmove(to, from, bytes);
            break;
        case cudaMemcpyDeviceToDevice:
            COUNT(d2d);
            if (!captured(stream)) nullgpu_copy_within(to, from, bytes);
            break;
        default:
            memmove(to, from, bytes);
    }
    nullgpu_captured(stream);
    return pageable && captured(stream) ? break_capture("a copy of pageable memory") : cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
    COUNT_STALL(memcpy_sync, __func__);
    UNLESS_FORBIDDEN();
    return copy(to, from, bytes, kind, NULL, __func__);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes, kind, stream, __func__);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, size_t bytes,
                                cudaStream_t stream) {
    return copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream, __func__);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    for (size_t row = 0; row < height; row++) {
        cudaError_t error =
            copy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width, kind, stream, __func__);
        if (error) return error;
    }
    return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
    nullgpu_fill(pointer, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
    if (!captured(stream)) nullgpu_fill(pointer, value, bytes);
    nullgpu_captured(stream);
    return cudaSuccess;
}

// Variables of the device: all in one place, as no kernel reads them.
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
    static char place[1 << 20];
    *pointer = place;
    return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

// ---- Kernels

static cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    const unsigned blocks[3] = {grid.x, grid.y, grid.z}, threads[3] = {block.x, block.y, block.z};
    if (!nullgpu_launchable(blocks, threads, shared)) return failed(cudaErrorInvalidConfiguration);
    if (!nullgpu_of_current_device(stream)) return failed(cudaErrorInvalidResourceHandle);
    COUNT(launch);
    nullgpu_captured(stream);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
    return launch(grid, block, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t stream) {
    return launch(grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = nullgpu_gpu()->capability;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute, int value) {
    return as_runtime(cuFuncSetAttribute((CUfunction)function, (CUfunction_attribute)attribute, value));
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
    *blocks = nullgpu_blocks_per_processor(threads, shared);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                                   size_t shared, unsigned flags) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

// What nvcc makes of kernel<<<grid, block, shared, stream>>>(...): the configuration is pushed, popped by the kernel's
// stub on the host, and launched.

static _Thread_local struct {
    dim3 grid, block;
    size_t shared;
    void* stream;
} pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void**)stream = pushed.stream;
    return cudaSuccess;
}

char __cudaInitModule(void** binary) {
    return 1;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
    return launch(grid, block, shared, stream);
}
