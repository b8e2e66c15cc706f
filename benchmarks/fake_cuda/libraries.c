/* What torch reads from cuBLAS, cuDNN and NCCL on its way to a product or a collective; none of these computes. */
#include <stdlib.h>
#include <string.h>

#include "device.h"

#define HANDLE ((void *)16)

int cublasCreate_v2(void **handle) { *handle = HANDLE; return 0; }
int cublasLtCreate(void **handle) { *handle = HANDLE; return 0; }
int cublasGetVersion_v2(void *handle, int *version) { *version = 130000; return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
const char *cublasGetStatusString(int status) { return "a status of the fake CUDA device"; }

/* One algorithm, whose record (cublasLtMatmulHeuristicResult_t: 8 words of choice, a size, a status) is all zeros. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, char *results, int *found) {
  if (results) memset(results, 0, 8 * sizeof(long) + 16);
  *found = 1;
  return 0;
}

struct layout { int type; unsigned long rows, columns; };

int cublasLtMatrixLayoutCreate(struct layout **made, int type, unsigned long rows, unsigned long columns, long stride) {
  *made = malloc(sizeof **made);
  **made = (struct layout){type, rows, columns};
  return 0;
}

int cublasLtMatrixLayoutDestroy(struct layout *layout) { free(layout); return 0; }

/* m, n and k as cuBLAS counts them, which keeps columns; cudaDataType_t of an operand and of the result. */
static int product(const char *name, long m, long n, long k, int count, int from, int to, float beta) {
  fake_cuda_note("{\"kind\": \"product\", \"name\": \"%s\", \"m\": %ld, \"n\": %ld, \"k\": %ld, \"count\": %d, \"from\": %d, "
                 "\"to\": %d, \"beta\": %g}\n", name, m, n, k, count, from, to, beta);
  return 0;
}

int cublasLtMatmul(void *handle, void *description, const void *alpha, const void *a, struct layout *of_a, const void *b,
                   struct layout *of_b, const float *beta, const void *c, struct layout *of_c, void *d, struct layout *of_d) {
  long inner = of_a->rows * of_a->columns / of_d->rows;
  return product("cublasLtMatmul", of_d->rows, of_d->columns, inner, 1, of_a->type, of_d->type, *beta);
}

int cublasGemmEx(void *handle, int transposes_a, int transposes_b, int m, int n, int k, const void *alpha, const void *a,
                 int type_of_a, int stride_a, const void *b, int type_of_b, int stride_b, const float *beta, void *c, int type_of_c) {
  return product("cublasGemmEx", m, n, k, 1, type_of_a, type_of_c, *beta);
}

int cublasGemmStridedBatchedEx(void *handle, int transposes_a, int transposes_b, int m, int n, int k, const void *alpha,
                               const void *a, int type_of_a, int row_a, long stride_a, const void *b, int type_of_b,
                               int row_b, long stride_b, const float *beta, void *c, int type_of_c, int row_c,
                               long stride_c, int count) {
  return product("cublasGemmStridedBatchedEx", m, n, k, count, type_of_a, type_of_c, *beta);
}

int cublasSgemm_v2(void *handle, int transposes_a, int transposes_b, int m, int n, int k, const float *alpha, const float *a,
                   int row_a, const float *b, int row_b, const float *beta, float *c, int row_c) {
  return product("cublasSgemm", m, n, k, 1, 0, 0, *beta);
}

int cudnnCreate(void **handle) { *handle = HANDLE; return 0; }

int ncclGetVersion(int *version) { *version = 22809; return 0; }
int ncclGetUniqueId(char *id) { memset(id, 7, 128); return 0; }
int ncclCommInitRankConfig(void **comm, int ranks, char id[128], int rank, void *config) { *comm = malloc(64); return 0; }
int ncclCommInitRank(void **comm, int ranks, char id[128], int rank) { *comm = malloc(64); return 0; }
int ncclCommInitRankScalable(void **comm, int ranks, int rank, int ids, void *id, void *config) { *comm = malloc(64); return 0; }
int ncclCommSplit(void *comm, int color, int key, void **made, void *config) { *made = malloc(64); return 0; }
int ncclCommGetAsyncError(void *comm, int *error) { *error = 0; return 0; }
const char *ncclGetErrorString(int error) { return "an error of the fake CUDA device"; }
const char *ncclGetLastError(void *comm) { return "an error of the fake CUDA device"; }

static int collective(const char *name, size_t elements, int type) {
  fake_cuda_note("{\"kind\": \"collective\", \"name\": \"%s\", \"elements\": %zu, \"from\": %d}\n", name, elements, type);
  return 0;
}

int ncclAllGather(const void *from, void *to, size_t count, int type) { return collective("ncclAllGather", count, type); }
int ncclReduceScatter(const void *from, void *to, size_t count, int type) { return collective("ncclReduceScatter", count, type); }
int ncclAllReduce(const void *from, void *to, size_t count, int type) { return collective("ncclAllReduce", count, type); }
int ncclBroadcast(const void *from, void *to, size_t count, int type) { return collective("ncclBroadcast", count, type); }
