// The CUDA runtime's streams and events, and the capture of a stream's work in a graph.
// Nothing is ever pending: what is given to a stream is done when the call returns.
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "runtime.h"

struct CUstream_st {
    int device;
    int priority;
    unsigned long long capture;  // the capture it began or joined; ended if it is not the current one
};

struct CUevent_st {
    bool timed;
    bool recorded;
    double milliseconds;
    unsigned long long capture;  // the capture of the stream that recorded it
};

struct CUgraph_st {
    size_t nodes;
};

// One capture at a time. `id` is set last and read first.
static struct {
    _Atomic unsigned long long id;  // 0: none
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    cudaStream_t stream;
    struct CUgraph_st* graph;
    _Atomic bool broken;
} capture;

static _Atomic unsigned long long captures;
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// Handles 0, 1 and 2 are the default streams.
static cudaStream_t as_struct(cudaStream_t stream) {
    static struct CUstream_st default_stream;
    return (size_t)stream <= 2 ? &default_stream : stream;
}

bool captured(cudaStream_t stream) {
    return capture.id && as_struct(stream)->capture == capture.id;
}

void nullgpu_captured(CUstream stream) {
    if (captured(stream)) capture.graph->nodes++;
}

cudaError_t break_capture(const char* call) {
    fprintf(stderr, "nullgpu: %s is not allowed while a stream is captured\n", call);
    capture.broken = true;
    return failed(cudaErrorStreamCaptureUnsupported);
}

// Calls that wait, or that may wait, are forbidden by a capture: the rules of cudaThreadExchangeStreamCaptureMode.
bool forbidden(void) {
    if (!capture.id || capture.mode == cudaStreamCaptureModeRelaxed || thread_mode == cudaStreamCaptureModeRelaxed)
        return false;
    bool everyone = capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    return everyone || pthread_equal(capture.thread, pthread_self());
}

bool nullgpu_of_current_device(cudaStream_t stream) {
    return (size_t)stream <= 2 || stream->device == nullgpu_device;
}

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
    (*event)->timed = !(flags & cudaEventDisableTiming);
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
    bool known = start->timed && start->recorded && end->timed && end->recorded;
    if (!known) return failed(cudaErrorInvalidResourceHandle);
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
    static char an_executable;
    *executable = (cudaGraphExec_t)&an_executable;
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
    return cudaSuccess;
}
