/* The log that every stub library writes to: one event a line, "event field=value field=value". */

#ifndef GPU_DRY_LOG_H
#define GPU_DRY_LOG_H

/* Append one line to the file named by GPU_DRY_LOG, or to stderr without it.
 * Values must not contain blanks, except in the last field of a mark. */
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
