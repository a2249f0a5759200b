/* Every library has its own copy of this file; a line is one write to a file opened for appending, so lines
 * of several libraries and threads never mix. */

#include "log.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int open_log(void)
{
    static int descriptor = -1;
    if (descriptor < 0) {
        const char *path = getenv("GPU_DRY_LOG");
        descriptor = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0644) : STDERR_FILENO;
    }
    return descriptor;
}

void log_line(const char *format, ...)
{
    char line[2048]; /* mangled names of kernels are long; what does not fit is cut off */
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line - 1, format, values);
    va_end(values);
    if (length < 0)
        return;
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length] = '\n';
    if (write(open_log(), line, (size_t)length + 1) < 0)
        abort(); /* a log with holes would prove nothing */
}
