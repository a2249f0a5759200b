/* cuDNN 9, as far as onnxruntime goes: handles with their stream, and plans of convolutions and attention.
 *
 * Whoever plans describes an operation, asks for engines that can run it, and reads what an engine needs. Here
 * there always is exactly one engine, which needs nothing: numbers that are asked for are 0. */

#include "log.h"

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

size_t cudnnGetVersion(void)
{
    return 91400;
}

const char *cudnnGetErrorString(int status)
{
    return status == 0 ? "CUDNN_STATUS_SUCCESS" : "an error of the stub libraries";
}

void cudnnGetLastErrorString(char *text, size_t bytes)
{
    if (bytes > 0)
        text[0] = '\0';
}

struct handle {
    void *stream;
};

int cudnnCreate(struct handle **handle)
{
    *handle = calloc(1, sizeof **handle);
    return 0;
}

int cudnnDestroy(struct handle *handle)
{
    free(handle);
    return 0;
}

int cudnnSetStream(struct handle *handle, void *stream)
{
    handle->stream = stream;
    return 0;
}

int cudnnGetStream(struct handle *handle, void **stream)
{
    *stream = handle->stream;
    return 0;
}

/* Numbers of cudnnBackendAttributeType_t and cudnnBackendAttributeName_t. */
enum { TYPE_INT64 = 3, TYPE_INT32 = 23 };
enum { HEURISTIC_RESULTS = 202 };

struct descriptor {
    int type;
};

int cudnnBackendCreateDescriptor(int type, struct descriptor **descriptor)
{
    *descriptor = malloc(sizeof **descriptor);
    (*descriptor)->type = type;
    return 0;
}

int cudnnBackendDestroyDescriptor(struct descriptor *descriptor)
{
    free(descriptor);
    return 0;
}

int cudnnBackendSetAttribute(void)
{
    return 0;
}

int cudnnBackendFinalize(struct descriptor *descriptor)
{
    log_line("plan type=%d", descriptor->type);
    return 0;
}

int cudnnBackendGetAttribute(struct descriptor *descriptor, int name, int type, int64_t wanted, int64_t *count,
                             void *values)
{
    (void)descriptor;
    if (count)
        *count = name == HEURISTIC_RESULTS;
    if (values && wanted > 0 && type == TYPE_INT64)
        *(int64_t *)values = 0;
    if (values && wanted > 0 && type == TYPE_INT32)
        *(int32_t *)values = 0;
    return 0;
}

int cudnnBackendExecute(struct handle *handle)
{
    log_line("call name=cudnnBackendExecute stream=%p", handle->stream);
    return 0;
}

int cudnnGetReductionWorkspaceSize(void *handle, void *reduction, void *from, void *to, size_t *bytes)
{
    (void)handle, (void)reduction, (void)from, (void)to;
    *bytes = 0;
    return 0;
}

int cudnnGetReductionIndicesSize(void *handle, void *reduction, void *from, void *to, size_t *bytes)
{
    return cudnnGetReductionWorkspaceSize(handle, reduction, from, to, bytes);
}
