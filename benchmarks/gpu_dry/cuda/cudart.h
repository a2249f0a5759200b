/* What the stub runtime library takes from CUDA 13's interface: names and numbers, written down here so that
 * no header of NVIDIA's is needed, and the state that its source files share. */

#ifndef GPU_DRY_CUDART_H
#define GPU_DRY_CUDART_H

#include <stdbool.h>
#include <stddef.h>

typedef enum {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
} cudaError_t;

typedef struct stub_stream *cudaStream_t;
typedef struct stub_event *cudaEvent_t;
typedef struct stub_graph *cudaGraph_t;

typedef struct {
    unsigned int x, y, z;
} dim3;

/* capture.c: the one capture that may be under way, in CUDA's "global" mode. */

/* A call that CUDA does not allow while a capture is under way: true, with the capture spoilt, if one is.
 * The caller logs what it was and returns refusal(). */
bool is_refused(void);
cudaError_t refusal(void);

/* Count one operation as part of the graph that is being captured, if this stream is. */
void count_node(cudaStream_t stream);

/* device.c: cudaGetLastError returns what was kept here. */
cudaError_t keep_error(cudaError_t error);

#endif
