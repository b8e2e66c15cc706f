/* What torch reads from cuBLAS, cuDNN and NCCL on its way to a product or a collective; none of these computes. */
#include <stdlib.h>
#include <string.h>

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
