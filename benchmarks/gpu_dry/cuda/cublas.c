/* cuBLAS: a handle is a cell with its stream, which the generated functions write into the log. */

#include <stdlib.h>

int cublasCreate_v2(void ***handle)
{
    *handle = calloc(1, sizeof **handle);
    return 0;
}

int cublasDestroy_v2(void **handle)
{
    free(handle);
    return 0;
}

int cublasSetStream_v2(void **handle, void *stream)
{
    *handle = stream;
    return 0;
}

int cublasSetMathMode(void)
{
    return 0;
}

int cublasGetMathMode(void **handle, int *mode)
{
    (void)handle;
    *mode = 0;
    return 0;
}

const char *cublasGetStatusName(int status)
{
    return status == 0 ? "CUBLAS_STATUS_SUCCESS" : "an error of the stub libraries";
}

const char *cublasGetStatusString(int status)
{
    return cublasGetStatusName(status);
}
