// cuBLAS, cuBLASLt and NCCL. The products themselves, and cuBLAS's other functions, are written by build.py.
// Kept out by their guards: the libraries include them for C++, and they need headers that pip does not bring.
#define __CUDA_FP8_H__
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__

#include <cublasLt.h>
#include <cublas_v2.h>
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

static void* new(size_t bytes) {
    void* made = calloc(1, bytes);
    if (!made) abort();
    return made;
}

// ---- cuBLAS

struct cublasContext {
    cudaStream_t stream;
    cublasMath_t math;
    cublasPointerMode_t pointer_mode;
};

// Every *gemm* of cuBLAS, whatever its arguments: the handle is the first.
int nullgpu_gemm(cublasHandle_t handle) {
    COUNT(gemm);
    nullgpu_captured(handle->stream);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasCreate(cublasHandle_t* handle) {
    *handle = new(sizeof **handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream(cublasHandle_t handle, cudaStream_t* stream) {
    *stream = handle->stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    handle->math = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    *mode = handle->math;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetPointerMode(cublasHandle_t handle, cublasPointerMode_t mode) {
    handle->pointer_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode(cublasHandle_t handle, cublasPointerMode_t* mode) {
    *mode = handle->pointer_mode;
    return CUBLAS_STATUS_SUCCESS;
}

// ---- cuBLASLt: descriptions are made and never read, and the first algorithm asked for always fits

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t compute, cudaDataType_t scale) {
    *made = new(sizeof **made);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t made) {
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
    *made = new(sizeof **made);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t made) {
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t stride) {
    *made = new(sizeof **made);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t made) {
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* found, int* count) {
    memset(found, 0, sizeof *found);
    found->state = CUBLAS_STATUS_SUCCESS;
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
    COUNT(gemm);
    nullgpu_captured(stream);
    return CUBLAS_STATUS_SUCCESS;
}

// ---- NCCL: a rank gets what it would if the others had sent what it sends itself. Nothing travels.

struct ncclComm {
    int ranks;
    int rank;
};

static ncclResult_t new_comm(ncclComm_t* comm, int ranks, int rank) {
    *comm = new(sizeof **comm);
    **comm = (struct ncclComm){ranks, rank};
    return ncclSuccess;
}

ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
    return result ? "an error of the null GPU" : "no error";
}

const char* ncclGetLastError(ncclComm_t comm) {
    return "";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    memset(id, 1, sizeof *id);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    return new_comm(comm, ranks, rank);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t* config) {
    return new_comm(comm, ranks, rank);
}

ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int ranks, int rank, int ids, ncclUniqueId* id,
                                      ncclConfig_t* config) {
    return new_comm(comm, ranks, rank);
}

// How many ranks share the colour cannot be known here: at least those before this one.
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* made, ncclConfig_t* config) {
    if (color == NCCL_SPLIT_NOCOLOR) {
        *made = NULL;
        return ncclSuccess;
    }
    return new_comm(made, key + 1, key);
}

static ncclResult_t delete_comm(ncclComm_t comm) {
    free(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    return delete_comm(comm);
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    return delete_comm(comm);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    return ncclSuccess;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

ncclResult_t ncclCommCount(ncclComm_t comm, int* count) {
    *count = comm->ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommRegister(ncclComm_t comm, void* buffer, size_t size, void** handle) {
    *handle = buffer;
    return ncclSuccess;
}

ncclResult_t ncclCommDeregister(ncclComm_t comm, void* handle) {
    return ncclSuccess;
}

ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t* op, void* scalar, ncclDataType_t type, ncclScalarResidence_t place,
                                      ncclComm_t comm) {
    *op = ncclSum;
    return ncclSuccess;
}

ncclResult_t ncclRedOpDestroy(ncclRedOp_t op, ncclComm_t comm) {
    return ncclSuccess;
}

ncclResult_t ncclGroupStart(void) {
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd(void) {
    return ncclSuccess;
}

static size_t bytes_of(size_t count, ncclDataType_t type) {
    switch (type) {
        case ncclInt32:
        case ncclUint32:
        case ncclFloat32:
            return 4 * count;
        case ncclInt64:
        case ncclUint64:
        case ncclFloat64:
            return 8 * count;
        case ncclFloat16:
        case ncclBfloat16:
            return 2 * count;
        default:  // integers and floats of 8 bits
            return count;
    }
}

static ncclResult_t transfer(void* to, const void* from, size_t bytes, cudaStream_t stream) {
    COUNT(nccl);
    nullgpu_captured(stream);
    if (to && from) nullgpu_copy_within(to, from, bytes);
    return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return transfer(to, from, bytes_of(count, type), stream);
}

ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t stream) {
    return transfer(to, from, bytes_of(count, type), stream);
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
    return transfer(to, from, bytes_of(count, type), stream);
}

ncclResult_t ncclBcast(void* buffer, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                       cudaStream_t stream) {
    return transfer(buffer, NULL, 0, stream);
}

ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t stream) {
    size_t bytes = bytes_of(count, type);
    return transfer(to, (const char*)from + (size_t)comm->rank * bytes, bytes, stream);
}

// This rank's part goes to every rank's place, so that sizes gathered ahead of objects are plausible.
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    size_t bytes = bytes_of(count, type);
    for (int rank = 0; rank < comm->ranks; rank++) nullgpu_copy_within((char*)to + (size_t)rank * bytes, from, bytes);
    return transfer(NULL, NULL, 0, stream);
}

ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return transfer(NULL, from, 0, stream);
}

ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    return transfer(to, NULL, 0, stream);
}
