/* The CUDA runtime of a device that is not there: an H200 whose kernels return at once and compute nothing.
 *
 * Preloaded before torch (build.py), it answers for libcudart. Memory is address space that the host backs when it is
 * touched; copies up to COPY_BYTES are made, so that what a program sends and fetches is what it gets, larger ones are
 * only recorded. Streams and events complete at once. Other functions that torch needs return 0 (build.py).
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "device.h"

#define GIB (1ull << 30)
#define CAPACITY ((unsigned long long)(139.8 * GIB))
#define SPACE (1ull << 43) /* addresses, each given out once */
#define COPY_BYTES (1ull << 20)
#define GRANULE (2ull << 20)
#define MOST_BLOCKS (1 << 16)

struct block { char *start; size_t size; };
struct blocks { struct block all[MOST_BLOCKS]; int count; size_t bytes; };

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static struct blocks device_blocks, host_blocks;
static char *space, *next_free;
static __thread int current_device;

static void add(struct blocks *blocks, void *start, size_t size) {
  pthread_mutex_lock(&mutex);
  if (blocks->count == MOST_BLOCKS) abort();
  blocks->all[blocks->count++] = (struct block){start, size};
  blocks->bytes += size;
  pthread_mutex_unlock(&mutex);
}

/* Remove the block that begins at `start`; its size, or 0 if there is none. */
static size_t take(struct blocks *blocks, const void *start) {
  size_t size = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < blocks->count && !size; i++)
    if (blocks->all[i].start == start) {
      size = blocks->all[i].size;
      blocks->all[i] = blocks->all[--blocks->count];
      blocks->bytes -= size;
    }
  pthread_mutex_unlock(&mutex);
  return size;
}

static int is_device(const void *p) { return space && (const char *)p >= space && (const char *)p < space + SPACE; }

static int is_pinned(const void *p) {
  int found = 0;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < host_blocks.count && !found; i++)
    found = (const char *)p >= host_blocks.all[i].start && (const char *)p < host_blocks.all[i].start + host_blocks.all[i].size;
  pthread_mutex_unlock(&mutex);
  return found;
}

static void *reserve(size_t size) {
  void *p = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? NULL : p;
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *count) { *count = num_devices(); return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) { return "an error of the fake CUDA device"; }
const char *cudaGetErrorName(cudaError_t error) { return "cudaErrorOfTheFakeDevice"; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200");
  p->major = 9; p->minor = 0; p->multiProcessorCount = 132; p->warpSize = 32;
  p->totalGlobalMem = CAPACITY; p->totalConstMem = 65536; p->l2CacheSize = 50 << 20;
  p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448; p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048; p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->unifiedAddressing = p->managedMemory = p->concurrentKernels = p->cooperativeLaunch = 1;
  p->asyncEngineCount = 3; p->textureAlignment = 512;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = device_attribute(attribute, 1); /* its numbers are those of CUdevice_attribute */
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) { snprintf(text, size, "0000:%02x:00.0", device + 1); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 1; return cudaSuccess; }

/* ---- memory ---- */

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = CAPACITY; *available = CAPACITY - device_blocks.bytes;
  return cudaSuccess;
}

/* Device addresses without memory; NULL when they are used up. The caller holds the mutex. */
static void *addresses(size_t size) {
  if (!space) next_free = space = reserve(SPACE);
  if (!space || next_free + size > space + SPACE) return NULL;
  void *start = next_free;
  next_free += (size + GRANULE - 1) / GRANULE * GRANULE;
  return start;
}

cudaError_t cudaMalloc(void **p, size_t size) {
  pthread_mutex_lock(&mutex);
  *p = device_blocks.bytes + size <= CAPACITY ? addresses(size) : NULL;
  if (*p) add(&device_blocks, *p, size);
  pthread_mutex_unlock(&mutex);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *p) { size_t size = take(&device_blocks, p); if (size) madvise(p, size, MADV_DONTNEED); return cudaSuccess; }
cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t stream) { return cudaMalloc(p, size); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) { return cudaFree(p); }
cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { return cudaMalloc(p, 512); }
cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) { add(&host_blocks, p, size); return cudaSuccess; }
cudaError_t cudaHostUnregister(void *p) { take(&host_blocks, p); return cudaSuccess; }

cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  *p = reserve(size);
  return *p ? cudaHostRegister(*p, size, flags) : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *p) { size_t size = take(&host_blocks, p); if (size) munmap(p, size); return cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->device = current_device;
  a->type = is_device(p) ? cudaMemoryTypeDevice : is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  if (a->type == cudaMemoryTypeUnregistered) a->device = -1;
  else a->devicePointer = (void *)p;
  if (a->type == cudaMemoryTypeHost) a->hostPointer = (void *)p;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  const char *name = is_device(from) ? is_device(to) ? "device to device" : "device to host" : "host to device";
  fake_cuda_note("{\"kind\": \"copy\", \"name\": \"%s\", \"bytes\": %zu}\n", name, size);
  if (size <= COPY_BYTES) memmove(to, from, size);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *p, int value, size_t size) {
  fake_cuda_note("{\"kind\": \"fill\", \"name\": \"cudaMemset\", \"bytes\": %zu}\n", size);
  if (size <= COPY_BYTES) memset(p, value, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy(to, from, size, kind);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
  return cudaMemcpy(to, from, size, cudaMemcpyDefault);
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) { return cudaMemset(p, value, size); }

/* ---- streams and events ---- */

static long last_stream = 1000;

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = (cudaStream_t)__sync_add_and_fetch(&last_stream, 1);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return cudaSuccess; }

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  *status = 0;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data, unsigned flags) {
  call(stream, cudaSuccess, data);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *data) { call(data); return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = (cudaEvent_t)calloc(1, sizeof(struct timespec));
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  struct timespec *a = (struct timespec *)start, *b = (struct timespec *)end;
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
  return cudaSuccess;
}

/* ---- kernels ---- */

static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configured;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  configured.grid = grid; configured.block = block; configured.shared = shared; configured.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configured.grid; *block = configured.block; *shared = configured.shared;
  *(cudaStream_t *)stream = configured.stream;
  return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { static void *handle[4]; return handle; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024; a->numRegs = 32; a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *f, int size, size_t shared, unsigned flags) {
  *count = 2;
  return cudaSuccess;
}

/* ---- the driver's memory, which torch's allocator maps piece by piece into segments that grow ---- */

static CUresult mem_address_reserve(CUdeviceptr *p, size_t size, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
  pthread_mutex_lock(&mutex);
  *p = (CUdeviceptr)addresses(size);
  pthread_mutex_unlock(&mutex);
  return *p ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult mem_create(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags) {
  CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
  pthread_mutex_lock(&mutex);
  if (device_blocks.bytes + size <= CAPACITY) {
    *handle = (CUmemGenericAllocationHandle)malloc(1);
    add(&device_blocks, (void *)*handle, size);
    result = CUDA_SUCCESS;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}

static CUresult mem_release(CUmemGenericAllocationHandle handle) {
  take(&device_blocks, (void *)handle);
  free((void *)handle);
  return CUDA_SUCCESS;
}

static CUresult mem_unmap(CUdeviceptr p, size_t size) { madvise((void *)p, size, MADV_DONTNEED); return CUDA_SUCCESS; }

static CUresult mem_granularity(size_t *size, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags option) {
  *size = GRANULE;
  return CUDA_SUCCESS;
}

static int nothing(void) { return 0; }

static const struct { const char *name; void *function; } driver[] = {
  {"cuMemAddressReserve", mem_address_reserve}, {"cuMemCreate", mem_create}, {"cuMemRelease", mem_release},
  {"cuMemUnmap", mem_unmap}, {"cuMemGetAllocationGranularity", mem_granularity},
};

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **p, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *p = (void *)nothing;
  for (size_t i = 0; i < sizeof driver / sizeof *driver; i++)
    if (!strcmp(name, driver[i].name)) *p = driver[i].function;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
