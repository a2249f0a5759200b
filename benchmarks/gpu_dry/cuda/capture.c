/* Streams, events, and the capture of a stream into a graph. Graphs hold nothing but a number and a count. */

#include "cudart.h"
#include "log.h"

#include <stdlib.h>

static cudaStream_t captured_stream;
static bool spoilt;
static int nodes;

struct stub_stream {
    int unused;
};
struct stub_event {
    int unused;
};
struct stub_graph {
    int number, nodes;
};

static bool is_captured(cudaStream_t stream)
{
    return captured_stream != NULL && stream == captured_stream;
}

bool is_refused(void)
{
    if (captured_stream)
        spoilt = true;
    return captured_stream != NULL;
}

cudaError_t refusal(void)
{
    return keep_error(cudaErrorStreamCaptureUnsupported);
}

void count_node(cudaStream_t stream)
{
    if (is_captured(stream))
        nodes++;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, int mode)
{
    log_line("begin-capture stream=%p mode=%d", (void *)stream, mode);
    captured_stream = stream;
    spoilt = false;
    nodes = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    static int number;
    captured_stream = NULL;
    *graph = NULL;
    if (spoilt) {
        log_line("end-capture stream=%p refused=1", (void *)stream);
        return keep_error(cudaErrorStreamCaptureInvalidated);
    }
    *graph = malloc(sizeof **graph);
    **graph = (struct stub_graph){++number, nodes};
    log_line("end-capture stream=%p graph=%d nodes=%d", (void *)stream, number, nodes);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, int *status)
{
    enum { NONE = 0, ACTIVE = 1, INVALIDATED = 2 };
    *status = is_captured(stream) ? (spoilt ? INVALIDATED : ACTIVE) : NONE;
    return cudaSuccess;
}

/* An instance is launched under the number of its graph. */
cudaError_t cudaGraphInstantiate(cudaGraph_t *instance, cudaGraph_t graph, unsigned long long flags)
{
    (void)flags;
    *instance = malloc(sizeof **instance);
    **instance = *graph;
    log_line("instantiate graph=%d", graph->number);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraph_t instance, cudaStream_t stream)
{
    log_line("launch-graph graph=%d nodes=%d stream=%p", instance->number, instance->nodes, (void *)stream);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraph_t instance)
{
    free(instance);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    *stream = malloc(sizeof **stream);
    log_line("create-stream stream=%p", (void *)*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned int flags)
{
    (void)flags;
    return cudaStreamCreate(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    free(stream);
    return cudaSuccess;
}

static cudaError_t synchronize(const char *what)
{
    bool refused = is_refused();
    log_line("synchronize what=%s%s", what, refused ? " refused=1" : "");
    return refused ? refusal() : cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    return synchronize("device");
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    (void)stream;
    return synchronize("stream");
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    (void)event;
    return synchronize("event");
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    *event = malloc(sizeof **event);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned int flags)
{
    (void)flags;
    return cudaEventCreate(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    log_line("record-event event=%p stream=%p", (void *)event, (void *)stream);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned int flags)
{
    (void)flags;
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    (void)start, (void)end;
    *milliseconds = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags)
{
    (void)flags;
    log_line("wait-event event=%p stream=%p", (void *)event, (void *)stream);
    return cudaSuccess;
}

/* Called at once: onnxruntime frees pinned buffers in such functions, and no time passes on this GPU. */
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *), void *argument)
{
    log_line("host-function stream=%p", (void *)stream);
    count_node(stream);
    function(argument);
    return cudaSuccess;
}
