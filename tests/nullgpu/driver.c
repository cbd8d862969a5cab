// The CUDA driver: what Triton, Inductor's launcher and torch's expandable segments ask of it.
// Every other function of cuda.h is a no-op that build.py writes; a function here replaces it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "nullgpu.h"

// Contexts, modules and kernels are addresses that are compared and never read.
static char contexts[NULLGPU_MOST_DEVICES];
static char a_module, a_kernel;

// ---- Devices and contexts

CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    *count = nullgpu_devices();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < nullgpu_devices() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
    snprintf(name, (size_t)length, "%s", nullgpu_gpu()->name);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[0] = (char)(device + 1);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
    *bytes = nullgpu_gpu()->memory;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    *value = nullgpu_attribute(attribute, device);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = (CUcontext)&contexts[device];
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    return cuDevicePrimaryCtxRetain(context, nullgpu_device);
}

CUresult cuCtxSetCurrent(CUcontext context) {
    if (context) nullgpu_device = (int)((char*)context - contexts);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = nullgpu_device;
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
    COUNT_STALL(device_sync, __func__);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
    COUNT_STALL(stream_sync, __func__);
    return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
    COUNT_STALL(event_sync, __func__);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
    switch (error) {
        case CUDA_SUCCESS:
            *name = "CUDA_SUCCESS";
            break;
        case CUDA_ERROR_INVALID_VALUE:
            *name = "CUDA_ERROR_INVALID_VALUE";
            break;
        case CUDA_ERROR_OUT_OF_MEMORY:
            *name = "CUDA_ERROR_OUT_OF_MEMORY";
            break;
        case CUDA_ERROR_INVALID_DEVICE:
            *name = "CUDA_ERROR_INVALID_DEVICE";
            break;
        default:
            *name = "an error without a name on the null GPU";
    }
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    return cuGetErrorName(error, text);
}

// ---- How others find the driver's functions

// Functions are found by their plain name; the newest version (cuMemGetInfo_v2) is the one written here.
CUresult cuGetProcAddress(const char* symbol, void** function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult* status) {
    char name[128];
    *function = NULL;
    for (int suffix = 4; suffix >= 2 && !*function; suffix--) {
        snprintf(name, sizeof name, "%s_v%d", symbol, suffix);
        *function = dlsym(RTLD_DEFAULT, name);
    }
    if (!*function) *function = dlsym(RTLD_DEFAULT, symbol);
    if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// Before CUDA 12 it had no status; libraries that contain an old runtime still call that one.
CUresult nullgpu_get_proc_address_v1(const char* symbol, void** function, int version,
                                     cuuint64_t flags) __asm__("cuGetProcAddress");
CUresult nullgpu_get_proc_address_v1(const char* symbol, void** function, int version, cuuint64_t flags) {
    return cuGetProcAddress(symbol, function, version, flags, NULL);
}

// NVIDIA's private tables: a no-op would leave the caller with a pointer to nothing.
CUresult cuGetExportTable(const void** table, const CUuuid* id) {
    *table = NULL;
    return CUDA_ERROR_NOT_FOUND;
}

// ---- Kernels

static CUresult load(CUmodule* module) {
    COUNT(module);
    *module = (CUmodule)&a_module;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
    return load(module);
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return load(module);
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) {
    return load(module);
}

CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) {
    return load(module);
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = (CUfunction)&a_kernel;
    return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* options, void** values, unsigned count,
                           CUlibraryOption* library_options, void** library_values, unsigned library_count) {
    return load((CUmodule*)library);
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    *kernel = (CUkernel)&a_kernel;
    return CUDA_SUCCESS;
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
}

// What Triton reads of a kernel that it loaded: registers, spills (local memory), threads.
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = 1024;
            break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS:
            *value = 32;
            break;
        default:
            *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    bool fits = attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ||
                value <= nullgpu_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, nullgpu_device);
    return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t shared) {
    *blocks = nullgpu_blocks_per_processor(threads, shared);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction function, int threads,
                                                              size_t shared, unsigned flags) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
    *clusters = nullgpu_gpu()->processors;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** arguments,
                        void** extra) {
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    if (!nullgpu_launchable(grid, block, shared)) return CUDA_ERROR_INVALID_VALUE;
    if (!nullgpu_of_current_device(stream)) return CUDA_ERROR_INVALID_CONTEXT;
    COUNT(triton);
    nullgpu_captured(stream);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                          config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->hStream, arguments,
                          extra);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void** arguments) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, arguments, NULL);
}

// ---- Memory

CUresult cuMemGetInfo(size_t* left, size_t* total) {
    *left = nullgpu_free_memory(nullgpu_device);
    *total = nullgpu_gpu()->memory;
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
    return nullgpu_malloc((void**)pointer, bytes);
}

CUresult cuMemFree(CUdeviceptr pointer) {
    return nullgpu_free((void*)pointer);
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr pointer) {
    struct nullgpu_range range = nullgpu_find_range((void*)pointer);
    if (range.place != NULLGPU_DEVICE) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = (CUdeviceptr)range.start;
    if (size) *size = range.size;
    return CUDA_SUCCESS;
}

// Triton asks this of every pointer that a kernel is given, and so refuses a tensor of the CPU.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    struct nullgpu_range range = nullgpu_find_range((void*)pointer);
    if (range.place == NULLGPU_PAGEABLE) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
            *(CUdeviceptr*)value = pointer;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *(CUmemorytype*)value = range.place == NULLGPU_DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            *(int*)value = range.device;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_CONTEXT:
            return cuDevicePrimaryCtxRetain(value, range.device);
        default:
            return CUDA_ERROR_NOT_SUPPORTED;
    }
}

// Virtual memory, for expandable segments: addresses are reserved, memory is created (and counted), mapped, unmapped.

struct allocation {
    size_t size;
    int device;
    int references;  // the handle, and every place where it is mapped
};

static pthread_mutex_t allocations = PTHREAD_MUTEX_INITIALIZER;

static void refer(struct allocation* allocation, int difference) {
    pthread_mutex_lock(&allocations);
    bool unused = (allocation->references += difference) == 0;
    pthread_mutex_unlock(&allocations);
    if (!unused) return;
    nullgpu_give_back(allocation->device, allocation->size);
    free(allocation);
}

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags option) {
    *granularity = (size_t)2 << 20;
    return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* pointer, size_t size, size_t alignment, CUdeviceptr wanted,
                             unsigned long long flags) {
    void* start = mmap((void*)wanted, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *pointer = (CUdeviceptr)start;
    return start == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size) {
    return munmap((void*)pointer, size) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* properties,
                     unsigned long long flags) {
    if (properties->requestedHandleTypes & CU_MEM_HANDLE_TYPE_FABRIC) return CUDA_ERROR_NOT_SUPPORTED;
    if (!nullgpu_take(properties->location.id, size)) return CUDA_ERROR_OUT_OF_MEMORY;
    struct allocation* allocation = malloc(sizeof *allocation);
    if (!allocation) abort();
    *allocation = (struct allocation){size, properties->location.id, 1};
    COUNT(malloc);
    *handle = (CUmemGenericAllocationHandle)(size_t)allocation;
    return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    refer((struct allocation*)(size_t)handle, -1);
    return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
    struct allocation* allocation = (struct allocation*)(size_t)handle;
    refer(allocation, 1);
    nullgpu_add_range((struct nullgpu_range){(char*)pointer, size, NULLGPU_DEVICE, allocation->device, allocation});
    return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc* access, size_t count) {
    return mprotect((void*)pointer, size, PROT_READ | PROT_WRITE) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

// The addresses stay reserved; their pages go back to the host. May span several mappings.
CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
    struct nullgpu_range range;
    for (size_t done = 0; done < size; done += range.size) {
        if (!nullgpu_remove_range((char*)pointer + done, &range)) return CUDA_ERROR_INVALID_VALUE;
        refer(range.backing, -1);
    }
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap((void*)pointer, size, PROT_NONE, flags, -1, 0) == MAP_FAILED ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* pointer) {
    struct nullgpu_range range = nullgpu_find_range(pointer);
    if (!range.backing) return CUDA_ERROR_INVALID_VALUE;
    refer(range.backing, 1);
    *handle = (CUmemGenericAllocationHandle)(size_t)range.backing;
    return CUDA_SUCCESS;
}
