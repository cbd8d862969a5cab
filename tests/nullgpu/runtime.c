// The CUDA runtime, as torch calls it. Preloaded, it stands before libcudart.
// What is missing here but declared by the header says so and fails (build.py).
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nullgpu.h"

// ---- Errors

static _Thread_local cudaError_t last_error = cudaSuccess;

static cudaError_t failed(cudaError_t error) {
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

// ---- Streams, events, and the capture of a graph

struct CUstream_st {
    int device;
    int priority;
    unsigned long long capture;  // the capture it began or joined; ended if it is not the current one
};

struct CUevent_st {
    bool recorded;
    double milliseconds;
    unsigned long long capture;  // the capture of the stream that recorded it
};

struct CUgraph_st {
    size_t nodes;
};

struct CUgraphExec_st {
    size_t nodes;
};

// One capture at a time. `id` is set last and read first.
static struct {
    _Atomic unsigned long long id;  // 0: none
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    cudaStream_t stream;
    struct CUgraph_st* graph;
    bool broken;
} capture;

static _Atomic unsigned long long captures;
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// Handles 0, 1 and 2 are the default streams.
static cudaStream_t as_struct(cudaStream_t stream) {
    static struct CUstream_st default_stream;
    return (size_t)stream <= 2 ? &default_stream : stream;
}

static bool captured(cudaStream_t stream) {
    return capture.id && as_struct(stream)->capture == capture.id;
}

void nullgpu_captured(CUstream stream) {
    if (captured(stream)) capture.graph->nodes++;
}

static cudaError_t break_capture(const char* call) {
    fprintf(stderr, "nullgpu: %s is not allowed while a stream is captured\n", call);
    capture.broken = true;
    return failed(cudaErrorStreamCaptureUnsupported);
}

// Calls that wait, or that may wait, are forbidden by a capture: the rules of cudaThreadExchangeStreamCaptureMode.
static bool forbidden(void) {
    if (!capture.id || capture.mode == cudaStreamCaptureModeRelaxed || thread_mode == cudaStreamCaptureModeRelaxed)
        return false;
    bool everyone = capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    return everyone || pthread_equal(capture.thread, pthread_self());
}

#define UNLESS_FORBIDDEN() \
    if (forbidden()) return break_capture(__func__)

static cudaError_t new_stream(cudaStream_t* stream, int priority) {
    *stream = malloc(sizeof **stream);
    if (!*stream) abort();
    **stream = (struct CUstream_st){nullgpu_device, priority, 0};
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return new_stream(stream, 0);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    return new_stream(stream, 0);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    return new_stream(stream, priority);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (stream != as_struct(stream)) return failed(cudaErrorInvalidResourceHandle);
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    *priority = as_struct(stream)->priority;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (captured(stream)) return break_capture(__func__);
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    COUNT_STALL(stream_sync, __func__);
    if (captured(stream)) return break_capture(__func__);
    UNLESS_FORBIDDEN();
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    COUNT_STALL(device_sync, __func__);
    UNLESS_FORBIDDEN();
    return cudaSuccess;
}

// A stream that waits for a captured one joins its capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    if (capture.id && event->capture == capture.id) as_struct(stream)->capture = capture.id;
    return cudaSuccess;
}

// What the host is to do when the stream gets there is done at once.
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned flags) {
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    if (captured(stream))
        nullgpu_captured(stream);
    else
        function(data);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = calloc(1, sizeof **event);
    if (!*event) abort();
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

// The time is the host's: what lies between two events is what the host did there.
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->recorded = true;
    event->milliseconds = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    event->capture = captured(stream) ? capture.id : 0;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    UNLESS_FORBIDDEN();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    COUNT_STALL(event_sync, __func__);
    UNLESS_FORBIDDEN();
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
    if (!start->recorded || !end->recorded) return failed(cudaErrorInvalidResourceHandle);
    *milliseconds = (float)(end->milliseconds - start->milliseconds);
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    if (stream != as_struct(stream)) return failed(cudaErrorStreamCaptureUnsupported);  // a default stream
    if (capture.id) return failed(cudaErrorIllegalState);
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.stream = stream;
    capture.graph = calloc(1, sizeof *capture.graph);
    if (!capture.graph) abort();
    capture.broken = false;
    stream->capture = ++captures;
    capture.id = stream->capture;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    if (!capture.id || capture.stream != stream) return failed(cudaErrorIllegalState);
    capture.id = 0;
    *graph = capture.broken ? NULL : capture.graph;
    return capture.broken ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
    if (!captured(stream))
        *status = cudaStreamCaptureStatusNone;
    else
        *status = capture.broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

static cudaError_t capture_info(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                cudaGraph_t* graph, const cudaGraphNode_t** nodes, size_t* count) {
    if (id) *id = capture.id;
    if (graph) *graph = capture.graph;
    if (nodes) *nodes = NULL;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
    if (edges) *edges = NULL;
    return capture_info(stream, status, id, graph, nodes, count);
}
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, enum cudaStreamCaptureStatus* status,
                                        unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                        size_t* count) {
    return capture_info(stream, status, id, graph, nodes, count);
}

cudaError_t cudaStreamGetCaptureInfo_v3(cudaStream_t stream, enum cudaStreamCaptureStatus* status,
                                        unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                        const cudaGraphEdgeData** edges, size_t* count) {
    if (edges) *edges = NULL;
    return capture_info(stream, status, id, graph, nodes, count);
}
#endif

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
    *count = graph->nodes;
    return nodes ? failed(cudaErrorNotSupported) : cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    *executable = malloc(sizeof **executable);
    if (!*executable) abort();
    (*executable)->nodes = graph->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    COUNT(graph_launch);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    free(executable);
    return cudaSuccess;
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
            if (!captured(stream)) nullgpu_copy(to, from, bytes);
            break;
        case cudaMemcpyDeviceToHost:
            COUNT(d2h);
            pageable = nullgpu_find_range(to).place == NULLGPU_PAGEABLE;
            if (!captured(stream)) memmove(to, from, bytes);
            break;
        case cudaMemcpyDeviceToDevice:
            COUNT(d2d);
            if (!captured(stream)) nullgpu_copy(to, from, bytes);
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
