// NVML (libnvidia-ml.so.1 is a link to this library): torch asks it how many GPUs there are, and with expandable
// segments how they are connected. No package brings its header: what is read of it is declared here.
#include <string.h>

#include "nullgpu.h"

enum { NVML_SUCCESS = 0, NVML_ERROR_NOT_SUPPORTED = 3, NVML_ERROR_NOT_FOUND = 6 };

static char a_device;

int nvmlInit(void) {
    return NVML_SUCCESS;
}

int nvmlInit_v2(void) {
    return NVML_SUCCESS;
}

int nvmlShutdown(void) {
    return NVML_SUCCESS;
}

const char* nvmlErrorString(int error) {
    return error ? "an error of the null GPU" : "no error";
}

int nvmlSystemGetCudaDriverVersion_v2(int* version) {
    *version = CUDA_VERSION;
    return NVML_SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned* count) {
    *count = (unsigned)nullgpu_all_devices();
    return NVML_SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
    *device = &a_device;
    return index < (unsigned)nullgpu_all_devices() ? NVML_SUCCESS : NVML_ERROR_NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** device) {
    *device = &a_device;
    return NVML_SUCCESS;
}

// Torch names the processes that use the GPU when memory runs out: none besides itself.
int nvmlDeviceGetComputeRunningProcesses(void* device, unsigned* count, void* processes) {
    *count = 0;
    return NVML_SUCCESS;
}

// The caller sets the state to "not supported" before it asks, and so it stays.
int nvmlDeviceGetGpuFabricInfoV(void* device, void* information) {
    return NVML_SUCCESS;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(void* device, unsigned link, int* type) {
    return NVML_ERROR_NOT_SUPPORTED;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(void* device, unsigned link, void* information) {
    return NVML_ERROR_NOT_SUPPORTED;
}
