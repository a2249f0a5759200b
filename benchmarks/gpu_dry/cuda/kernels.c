/* Kernels: their names are registered when a library is loaded, launches are logged and nothing is run. */

#include "cudart.h"
#include "log.h"

#include <stdint.h>
#include <string.h>
#include <stdlib.h>

/* Names by the address of the host function, in a hash table that is never full: the CUDA provider registers
 * some ten thousand. */
enum { SLOTS = 1 << 20 };
static struct {
    const void *function;
    const char *name;
} kernels[SLOTS];

static size_t slot_of(const void *function)
{
    size_t slot = ((uintptr_t)function * 0x9E3779B97F4A7C15u) >> 44;
    while (kernels[slot].function && kernels[slot].function != function)
        slot = (slot + 1) % SLOTS;
    return slot;
}

static void name_kernel(const void *function, const char *name)
{
    size_t slot = slot_of(function);
    kernels[slot].function = function;
    kernels[slot].name = name;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, cudaStream_t stream)
{
    const char *name = kernels[slot_of(function)].name;
    log_line("kernel name=%s grid=%u,%u,%u block=%u,%u,%u stream=%p", name ? name : "unknown", grid.x, grid.y,
             grid.z, block.x, block.y, block.z, (void *)stream);
    count_node(stream);
    return cudaSuccess;
}

/* What the compiler of CUDA puts into a library calls these when the library is loaded. */

void **__cudaRegisterFatBinary(void *binary)
{
    (void)binary;
    return malloc(sizeof(void *));
}

void __cudaRegisterFatBinaryEnd(void **binary)
{
    (void)binary;
}

void __cudaUnregisterFatBinary(void **binary)
{
    (void)binary;
}

void __cudaRegisterFunction(void **binary, const char *function, char *device_function, const char *name)
{
    (void)binary, (void)device_function;
    name_kernel(function, name);
}

void __cudaRegisterVar(void)
{
}

/* kernel<<<grid, block, shared, stream>>>(...) pushes its configuration, and the code of the kernel on the host
 * pops it and launches. */

static _Thread_local struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} pushed;

unsigned int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream)
{
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, cudaStream_t *stream)
{
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *stream = pushed.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(const void **kernel, const void *function)
{
    *kernel = function;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream)
{
    (void)arguments, (void)shared;
    return launch(function, grid, block, stream);
}

cudaError_t __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream)
{
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                        size_t shared, cudaStream_t stream)
{
    return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

struct launch_config {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};

cudaError_t cudaLaunchKernelExC(const struct launch_config *config, const void *function, void **arguments)
{
    return cudaLaunchKernel(function, config->grid, config->block, arguments, config->shared, config->stream);
}

/* A kernel of a compiled module that is loaded as data is known by its name alone. */
cudaError_t cudaLibraryGetKernel(const void **kernel, void *library, const char *name)
{
    (void)library;
    char *own = strdup(name);
    name_kernel(own, own);
    *kernel = own;
    return cudaSuccess;
}
