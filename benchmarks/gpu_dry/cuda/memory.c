/* Memory of the pretended GPU: ordinary pages at addresses that tell what they stand for.
 *
 * Nothing is ever allocated twice at one address, and freed pages are unmapped: a graph that would touch freed
 * memory crashes here instead of passing. */

#define _GNU_SOURCE
#include "cudart.h"
#include "log.h"

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

enum { PAGE = 4096 };

/* A range of addresses for one kind of memory. The size of an allocation stands in the page before it. */
struct range {
    const char *kind;
    uintptr_t first;
    atomic_uintptr_t next;
};

#define TERABYTE ((uintptr_t)1 << 40)
static struct range device = {"device", 32 * TERABYTE, 32 * TERABYTE};
static struct range pinned = {"pinned", 33 * TERABYTE, 33 * TERABYTE};

static atomic_size_t device_bytes;

static bool lies_in(const struct range *range, const void *pointer)
{
    return (uintptr_t)pointer - range->first < TERABYTE;
}

static const char *kind_of(const void *pointer)
{
    if (lies_in(&device, pointer))
        return device.kind;
    return lies_in(&pinned, pointer) ? pinned.kind : "pageable";
}

static void *take(struct range *range, size_t bytes)
{
    size_t length = PAGE + (bytes + PAGE - 1) / PAGE * PAGE;
    void *wanted = (void *)atomic_fetch_add(&range->next, length);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    size_t *page = mmap(wanted, length, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (page == MAP_FAILED)
        return NULL;
    *page = bytes;
    return (char *)page + PAGE;
}

static size_t give_back(void *pointer)
{
    size_t *page = (size_t *)((char *)pointer - PAGE);
    size_t bytes = *page;
    munmap(page, PAGE + bytes);
    return bytes;
}

static cudaError_t allocate(struct range *range, void **pointer, size_t bytes)
{
    if (is_refused()) {
        log_line("malloc kind=%s bytes=%zu refused=1", range->kind, bytes);
        return refusal();
    }
    *pointer = take(range, bytes);
    if (*pointer == NULL)
        return keep_error(cudaErrorMemoryAllocation);
    log_line("malloc kind=%s bytes=%zu address=%p", range->kind, bytes, *pointer);
    return cudaSuccess;
}

static cudaError_t release(struct range *range, void *pointer)
{
    if (pointer == NULL)
        return cudaSuccess;
    if (is_refused()) {
        log_line("free kind=%s address=%p refused=1", range->kind, pointer);
        return refusal();
    }
    size_t bytes = give_back(pointer);
    if (range == &device)
        atomic_fetch_sub(&device_bytes, bytes);
    log_line("free kind=%s bytes=%zu address=%p", range->kind, bytes, pointer);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes)
{
    cudaError_t error = allocate(&device, pointer, bytes);
    if (error == cudaSuccess)
        atomic_fetch_add(&device_bytes, bytes);
    return error;
}

cudaError_t cudaFree(void *pointer)
{
    return release(&device, pointer);
}

/* Allocations in stream order are not refused by CUDA, but become nodes of the graph; here they are judged like
 * any other allocation. */
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t bytes, void *pool, cudaStream_t stream)
{
    (void)pool, (void)stream;
    return cudaMalloc(pointer, bytes);
}

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream)
{
    (void)stream;
    return cudaFree(pointer);
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned int flags)
{
    (void)flags;
    return allocate(&pinned, pointer, bytes);
}

cudaError_t cudaMallocHost(void **pointer, size_t bytes)
{
    return allocate(&pinned, pointer, bytes);
}

cudaError_t cudaFreeHost(void *pointer)
{
    return release(&pinned, pointer);
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total)
{
    *total = (size_t)80 << 30;
    *available = *total - atomic_load(&device_bytes);
    return cudaSuccess;
}

/* Copies are done: onnxruntime brings weights to the device, and reads some back to fold constants. */

static cudaError_t copy(void *to, const void *from, size_t bytes, const char *how, cudaStream_t stream)
{
    log_line("copy from=%s to=%s bytes=%zu how=%s stream=%p", kind_of(from), kind_of(to), bytes, how,
             (void *)stream);
    memmove(to, from, bytes);
    count_node(stream);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, int kind)
{
    (void)kind;
    if (is_refused()) {
        log_line("copy from=%s to=%s bytes=%zu how=sync refused=1", kind_of(from), kind_of(to), bytes);
        return refusal();
    }
    return copy(to, from, bytes, "sync", NULL);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, cudaStream_t stream)
{
    (void)kind;
    return copy(to, from, bytes, "async", stream);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, int kind, cudaStream_t stream)
{
    (void)kind;
    log_line("copy from=%s to=%s bytes=%zu how=async stream=%p", kind_of(from), kind_of(to), width * height,
             (void *)stream);
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    count_node(stream);
    return cudaSuccess;
}

static cudaError_t fill(void *to, int value, size_t bytes, const char *how, cudaStream_t stream)
{
    log_line("fill bytes=%zu how=%s stream=%p", bytes, how, (void *)stream);
    memset(to, value, bytes);
    count_node(stream);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    if (is_refused()) {
        log_line("fill bytes=%zu how=sync refused=1", bytes);
        return refusal();
    }
    return fill(to, value, bytes, "sync", NULL);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    return fill(to, value, bytes, "async", stream);
}

struct pointer_attributes {
    int type, device;
    void *device_pointer, *host_pointer;
    long reserved[8];
};

cudaError_t cudaPointerGetAttributes(struct pointer_attributes *attributes, const void *pointer)
{
    enum { UNREGISTERED = 0, HOST = 1, DEVICE = 2 };
    int type = lies_in(&device, pointer) ? DEVICE : lies_in(&pinned, pointer) ? HOST : UNREGISTERED;
    *attributes = (struct pointer_attributes){type, 0, (void *)pointer, (void *)pointer, {0}};
    return cudaSuccess;
}
