// base.h: the few things every file may use. Includes only the C standard library.
#ifndef FL_COMMON_BASE_H
#define FL_COMMON_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FL_NODISCARD         __attribute__((warn_unused_result))
#define FL_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define FL_COUNT(a)          (sizeof(a) / sizeof((a)[0]))
#define FL_KIB(n)            ((uint32_t)(n) << 10)
#define FL_MIB(n)            ((uint32_t)(n) << 20)

// A broken promise of our own code: stays on in release builds. Bytes from a peer, a file or a
// user must never be able to reach one.
#define FL_ASSERT(x) ((x) ? (void)0 : fl_panic(__FILE__, __LINE__, #x))
_Noreturn void fl_panic(const char *file, int line, const char *what);

// Borrowed, read-only bytes. A view never owns and is never freed.
typedef struct fl_bytes {
    const uint8_t *data;
    size_t size;
} fl_bytes;

#endif
