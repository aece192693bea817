/* CUDA's runtime in the processor's memory: what torch calls of it, so that CUDA tensors exist where no GPU is.
 *
 * Loaded before the real one (LD_PRELOAD). "Device memory" is host memory that is counted against SIMULATED_GB, copies are
 * memmove, streams and events are numbers and everything is done at once. Kernels are not here: kernels.py computes what
 * they would. The names and structures are those of CUDA 13 (driver_types.h); what is not named here goes to the real
 * runtime, which answers that there is no driver.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vector_types.h"

#include "driver_types.h"

typedef struct {
    char *start;
    size_t size;
    enum cudaMemoryType kind;
} Block;

static Block blocks[1 << 16];
static int held;
static size_t used;
static long number = 16;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int current;

static size_t total(void) {
    const char *told = getenv("SIMULATED_GB");
    return (size_t)((told ? atof(told) : 8.0) * 1e9);
}

/* As many as SIMULATED_GPUS says, of which CUDA_VISIBLE_DEVICES may hide some. */
static int cards(void) {
    const char *told = getenv("SIMULATED_GPUS"), *shown = getenv("CUDA_VISIBLE_DEVICES");
    int all = told ? atoi(told) : 1, visible = shown && *shown ? 1 : 0;
    if (!shown) return all;
    for (; *shown; shown++) visible += *shown == ',';
    return visible < all ? visible : all;
}

static cudaError_t keep(void **out, void *start, size_t size, enum cudaMemoryType kind) {
    cudaError_t error = cudaErrorMemoryAllocation;
    *out = NULL;
    pthread_mutex_lock(&lock);
    if (held < (int)(sizeof blocks / sizeof *blocks) && (kind != cudaMemoryTypeDevice || used + size <= total()) &&
        (start || !posix_memalign(&start, 4096, size ? size : 1))) {
        used += kind == cudaMemoryTypeDevice ? size : 0;
        blocks[held++] = (Block){start, size, kind};
        *out = start;
        error = cudaSuccess;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

static cudaError_t drop(void *start, int release) {
    pthread_mutex_lock(&lock);
    for (int i = 0; start && i < held; i++)
        if (blocks[i].start == start) {
            used -= blocks[i].kind == cudaMemoryTypeDevice ? blocks[i].size : 0;
            blocks[i] = blocks[--held];
            if (release) free(start);
            break;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **out, size_t size) { return keep(out, NULL, size, cudaMemoryTypeDevice); }
cudaError_t cudaFree(void *start) { return drop(start, 1); }
cudaError_t cudaHostAlloc(void **out, size_t size, unsigned flags) { return keep(out, NULL, size, cudaMemoryTypeHost); }
cudaError_t cudaFreeHost(void *start) { return drop(start, 1); }
cudaError_t cudaHostRegister(void *start, size_t size, unsigned flags) {
    return keep(&(void *){NULL}, start, size, cudaMemoryTypeHost);
}
cudaError_t cudaHostUnregister(void *start) { return drop(start, 0); }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    *all = total();
    *left = *all - used;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *at) {
    memset(out, 0, sizeof *out);
    out->type = cudaMemoryTypeUnregistered;
    out->hostPointer = (void *)at;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < held; i++)
        if ((char *)at >= blocks[i].start && (char *)at < blocks[i].start + blocks[i].size) out->type = blocks[i].kind;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t size, cudaStream_t stream) {
    return cudaMemcpy(to, from, size, cudaMemcpyDefault);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    memset(to, value, size);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *out) {
    *out = cards();
    return *out ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *out) {
    *out = current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device >= cards()) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *out) {
    *out = 13020;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    memset(out, 0, sizeof *out);
    strcpy(out->name, "simulated GPU");
    out->totalGlobalMem = total();
    out->major = 9;
    out->multiProcessorCount = 1;
    out->warpSize = 32;
    out->maxThreadsPerBlock = out->maxThreadsPerMultiProcessor = 1024;
    out->sharedMemPerBlock = out->sharedMemPerBlockOptin = out->sharedMemPerMultiprocessor = 1 << 17;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *out, int a, int b) {
    *out = 1;
    return cudaSuccess;
}

static cudaError_t begin(void *out) {
    *(long *)out = __sync_add_and_fetch(&number, 16);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags) { return begin(out); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority) { return begin(out); }
cudaError_t cudaEventCreate(cudaEvent_t *out) { return begin(out); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) { return begin(out); }
cudaError_t cudaEventElapsedTime(float *out, cudaEvent_t a, cudaEvent_t b) {
    *out = 1;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *out) {
    *out = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *out, unsigned long long *a,
                                     cudaGraph_t *b, const cudaGraphNode_t **c, const cudaGraphEdgeData **d, size_t *e) {
    *out = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

/* No kernel is ever to be launched: kernels.py has taken the operator's place. */
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **a, size_t b, cudaStream_t stream) {
    fputs("simulated GPU: a kernel was launched that kernels.py does not replace\n", stderr);
    abort();
}
cudaError_t cudaLaunchKernelExC(const void *how, const void *kernel, void **arguments) {
    return cudaLaunchKernel(kernel, (dim3){1, 1, 1}, (dim3){1, 1, 1}, arguments, 0, NULL);
}

#define DONE(name)                 \
    cudaError_t name(void) {       \
        return cudaSuccess;        \
    }
DONE(cudaDeviceSynchronize)
DONE(cudaDeviceEnablePeerAccess)
DONE(cudaEventDestroy)
DONE(cudaEventQuery)
DONE(cudaEventRecord)
DONE(cudaEventRecordWithFlags)
DONE(cudaEventSynchronize)
DONE(cudaFuncSetAttribute)
DONE(cudaGetLastError)
DONE(cudaPeekAtLastError)
DONE(cudaStreamDestroy)
DONE(cudaStreamQuery)
DONE(cudaStreamSynchronize)
DONE(cudaStreamWaitEvent)
DONE(cudaThreadExchangeStreamCaptureMode)

/* Of the driver torch asks whether a context is alive, before it saves the streams of a backward pass: none is. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
