/* The pretended GPU: what it says of itself, after GPU_DRY_SM, which is 90 (Hopper) unless set. */

#define _GNU_SOURCE
#include "cudart.h"
#include "log.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    CUDA_VERSION = 13000,
    MULTIPROCESSORS = 132,
    BLOCK_THREADS = 1024,
    MULTIPROCESSOR_THREADS = 2048,
    MULTIPROCESSOR_BLOCKS = 32,
    REGISTERS = 65536,
    SHARED = 48 << 10,
    SHARED_RESERVED = 1 << 10,
};

static int architecture(void)
{
    const char *text = getenv("GPU_DRY_SM");
    return text ? atoi(text) : 90;
}

/* Shared memory of a multiprocessor in bytes: 228 KiB on 9.0 and 10.0, 164 on 8.0, 100 on 8.6, 8.9 and 12.0
 * (CUDA C++ Programming Guide, technical specifications per compute capability). Kernels are chosen by it. */
static int shared_of_multiprocessor(void)
{
    switch (architecture()) {
    case 90: case 100: return 228 << 10;
    case 80: return 164 << 10;
    default: return 100 << 10;
    }
}

static int shared_of_block_at_most(void)
{
    return shared_of_multiprocessor() - SHARED_RESERVED;
}

/* Byte offsets in cudaDeviceProp of CUDA 13.0, from offsetof with its headers. What is not set is 0. */
enum {
    PROPERTIES_BYTES = 1008,
    NAME = 0,
    TOTAL_MEMORY = 288,
    SHARED_PER_BLOCK = 296,
    REGISTERS_PER_BLOCK = 304,
    WARP = 308,
    THREADS_PER_BLOCK = 320,
    BLOCK_DIMENSIONS = 324,
    GRID_DIMENSIONS = 336,
    CONSTANT_MEMORY = 352,
    MAJOR = 360,
    MINOR = 364,
    TEXTURE_ALIGNMENT = 368,
    MULTIPROCESSOR_COUNT = 384,
    CONCURRENT_KERNELS = 560,
    COPY_ENGINES = 584,
    UNIFIED_ADDRESSING = 588,
    L2_BYTES = 596,
    THREADS_PER_MULTIPROCESSOR = 604,
    SHARED_PER_MULTIPROCESSOR = 624,
    REGISTERS_PER_MULTIPROCESSOR = 632,
    COOPERATIVE_LAUNCH = 668,
    SHARED_PER_BLOCK_OPTIN = 672,
    BLOCKS_PER_MULTIPROCESSOR = 688,
    MEMORY_POOLS = 720,
    CLUSTER_LAUNCH = 748,
};

static void put_int(unsigned char *properties, int offset, int value)
{
    memcpy(properties + offset, &value, sizeof value);
}

static void put_size(unsigned char *properties, int offset, size_t value)
{
    memcpy(properties + offset, &value, sizeof value);
}

static void put_dimensions(unsigned char *properties, int offset, const int dimensions[3])
{
    memcpy(properties + offset, dimensions, 3 * sizeof *dimensions);
}

static void put_limits(unsigned char *to)
{
    put_dimensions(to, BLOCK_DIMENSIONS, (const int[]){1024, 1024, 64});
    put_dimensions(to, GRID_DIMENSIONS, (const int[]){INT32_MAX, 65535, 65535});
    put_int(to, WARP, 32);
    put_int(to, THREADS_PER_BLOCK, BLOCK_THREADS);
    put_int(to, THREADS_PER_MULTIPROCESSOR, MULTIPROCESSOR_THREADS);
    put_int(to, BLOCKS_PER_MULTIPROCESSOR, MULTIPROCESSOR_BLOCKS);
    put_int(to, MULTIPROCESSOR_COUNT, MULTIPROCESSORS);
    put_int(to, REGISTERS_PER_BLOCK, REGISTERS);
    put_int(to, REGISTERS_PER_MULTIPROCESSOR, REGISTERS);
    put_size(to, SHARED_PER_BLOCK, SHARED);
    put_size(to, SHARED_PER_BLOCK_OPTIN, (size_t)shared_of_block_at_most());
    put_size(to, SHARED_PER_MULTIPROCESSOR, (size_t)shared_of_multiprocessor());
    put_size(to, CONSTANT_MEMORY, 65536);
    put_size(to, TEXTURE_ALIGNMENT, 512);
    put_int(to, L2_BYTES, 50 << 20);
}

cudaError_t cudaGetDeviceProperties(unsigned char *to, int device)
{
    (void)device;
    memset(to, 0, PROPERTIES_BYTES);
    snprintf((char *)to + NAME, 64, "no GPU, sm%d pretended", architecture());
    put_size(to, TOTAL_MEMORY, (size_t)80 << 30);
    put_int(to, MAJOR, architecture() / 10);
    put_int(to, MINOR, architecture() % 10);
    put_limits(to);
    put_int(to, CONCURRENT_KERNELS, 1);
    put_int(to, COPY_ENGINES, 3);
    put_int(to, UNIFIED_ADDRESSING, 1);
    put_int(to, COOPERATIVE_LAUNCH, 1);
    put_int(to, MEMORY_POOLS, 1);
    put_int(to, CLUSTER_LAUNCH, architecture() >= 90);
    return cudaSuccess;
}

/* Numbers of cudaDeviceAttr. All others are switches that this GPU has on. */
cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    switch (attribute) {
    case 1: *value = BLOCK_THREADS; break;
    case 8: *value = SHARED; break;
    case 10: *value = 32; break;
    case 12: case 82: *value = REGISTERS; break;
    case 16: *value = MULTIPROCESSORS; break;
    case 39: *value = MULTIPROCESSOR_THREADS; break;
    case 75: *value = architecture() / 10; break;
    case 76: *value = architecture() % 10; break;
    case 81: *value = shared_of_multiprocessor(); break;
    case 97: *value = shared_of_block_at_most(); break;
    case 106: *value = MULTIPROCESSOR_BLOCKS; break;
    case 111: *value = SHARED_RESERVED; break;
    case 120: *value = architecture() >= 90; break;
    default: *value = 1; break;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    (void)device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDA_VERSION;
    return cudaSuccess;
}

struct function_attributes {
    size_t shared, constant, local;
    int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared;
    unsigned char rest[96];
};
_Static_assert(sizeof(struct function_attributes) == 144, "cudaFuncAttributes of CUDA 13.0");

cudaError_t cudaFuncGetAttributes(struct function_attributes *attributes, const void *function)
{
    (void)function;
    memset(attributes, 0, sizeof *attributes);
    attributes->max_threads = BLOCK_THREADS;
    attributes->registers = 64;
    attributes->ptx_version = attributes->binary_version = architecture();
    attributes->max_dynamic_shared = shared_of_block_at_most();
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks)
{
    *blocks = 2;
    return cudaSuccess;
}

static _Thread_local cudaError_t last_error;

cudaError_t keep_error(cudaError_t error)
{
    if (error != cudaSuccess)
        last_error = error;
    return error;
}

cudaError_t cudaPeekAtLastError(void)
{
    return last_error;
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

const char *cudaGetErrorName(cudaError_t error)
{
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    }
    return "an error that the stub libraries do not know";
}

const char *cudaGetErrorString(cudaError_t error)
{
    return cudaGetErrorName(error);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned int version,
                                             unsigned long long flags, int *found)
{
    enum { SUCCESS = 0, SYMBOL_NOT_FOUND = 1 };
    (void)version, (void)flags;
    *function = dlsym(RTLD_DEFAULT, name);
    if (found)
        *found = *function ? SUCCESS : SYMBOL_NOT_FOUND;
    return cudaSuccess;
}

/* For whoever drives the libraries: a line of its own between two calls. */
void gpu_dry_mark(const char *text)
{
    log_line("mark %s", text);
}
