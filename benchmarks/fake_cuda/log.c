/* What is asked of the fake device, a line of JSON each, while fake_cuda_log has named a file: kernels, copies, fills,
 * products and collectives. launches.py reads it. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "device.h"

static int log_file = -1;

/* Begin to write to the end of this file; NULL: stop. */
void fake_cuda_log(const char *path) {
  if (log_file >= 0) close(log_file);
  log_file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0644) : -1;
}

void fake_cuda_note(const char *format, ...) {
  if (log_file < 0) return;
  char line[8192]; /* mangled names are up to 4 KB long */
  va_list arguments;
  va_start(arguments, format);
  int size = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (size >= (int)sizeof line || write(log_file, line, size) != size) abort();
}

/* ---- kernels that nvcc compiled: their names come when a library is loaded ---- */

struct kernel { const void *function; const char *name; };

static struct kernel *kernels;
static size_t num_kernels, room;
static int is_sorted;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int by_function(const void *a, const void *b) {
  const void *left = ((const struct kernel *)a)->function, *right = ((const struct kernel *)b)->function;
  return (left > right) - (left < right);
}

void __cudaRegisterFunction(void **binary, const char *function, char *device_function, const char *name, int limit,
                            void *thread, void *block, dim3 *block_size, dim3 *grid_size, int *warp) {
  pthread_mutex_lock(&mutex);
  if (num_kernels == room) kernels = realloc(kernels, (room = room ? 2 * room : 1024) * sizeof *kernels);
  kernels[num_kernels++] = (struct kernel){function, name};
  is_sorted = 0;
  pthread_mutex_unlock(&mutex);
}

static const char *name_of(const void *function) {
  pthread_mutex_lock(&mutex);
  if (!is_sorted) qsort(kernels, num_kernels, sizeof *kernels, by_function);
  is_sorted = 1;
  struct kernel wanted = {function}, *found = bsearch(&wanted, kernels, num_kernels, sizeof *kernels, by_function);
  pthread_mutex_unlock(&mutex);
  return found ? found->name : "unknown";
}

/* torch's elementwise kernels take the number of elements first. */
static cudaError_t launched(const void *function, dim3 grid, dim3 block, void **arguments) {
  if (log_file < 0) return cudaSuccess;
  const char *name = name_of(function);
  long elements = strstr(name, "elementwise_kernel") ? *(int *)arguments[0] : -1;
  fake_cuda_note("{\"kind\": \"kernel\", \"name\": \"%s\", \"blocks\": %ld, \"threads\": %u, \"elements\": %ld}\n", name,
                 (long)grid.x * grid.y * grid.z, block.x * block.y * block.z, elements);
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return launched(kernel, grid, block, arguments); /* a kernel's handle is its function here */
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return launched(function, grid, block, arguments);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  return launched(function, config->gridDim, config->blockDim, arguments);
}
