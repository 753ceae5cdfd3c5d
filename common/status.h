// status.h: what an operation that can fail returns, and how it explains itself.
#ifndef FL_COMMON_STATUS_H
#define FL_COMMON_STATUS_H

#include "common/base.h"

#define FL_STATUS_LIST(X)                                                                          \
    X(OK, "success")                                                                               \
    X(EARG, "a value is outside its documented range")                                             \
    X(ENOMEM, "the memory budget is spent")                                                        \
    X(EIO, "the operating system failed an I/O request")                                           \
    X(EFORMAT, "bytes do not parse")                                                               \
    X(EAUTH, "peer is unknown or bytes were altered")                                              \
    X(ESTATE, "valid request at the wrong moment")                                                 \
    X(ELIMIT, "well-formed but above a limit")                                                     \
    X(ETIME, "deadline passed")                                                                    \
    X(ENOENT, "the thing named does not exist")                                                    \
    X(EUNSUPPORTED, "well-formed, but of a kind that is not supported")

typedef enum fl_status {
#define X(name, text) FL_##name,
    FL_STATUS_LIST(X)
#undef X
} fl_status;

typedef struct fl_err {
    fl_status status;
    const char *where; // "file.c:123" of the first failure; static storage
    char text[240];    // one sentence for a person; no newline, no key material, no user text
} fl_err;

#define FL_STR2(x)            #x
#define FL_STR(x)             FL_STR2(x)
// Fills *err when err is not NULL; its value is st, so a failure is born and returned in one line,
// and the compiler sees that it is not FL_OK: what a callee writes on success needs no start value.
#define FL_FAIL(err, st, ...)                                                                      \
    ({                                                                                             \
        const fl_status fl_fail_ = (st);                                                           \
        fl_err_set((err), fl_fail_, __FILE__ ":" FL_STR(__LINE__), __VA_ARGS__);                   \
        fl_fail_;                                                                                  \
    })

fl_status fl_err_set(fl_err *err, fl_status st, const char *where, const char *fmt, ...)
    FL_PRINTF(4, 5);
const char *fl_status_name(fl_status st);
const char *fl_status_text(fl_status st);

// Only in functions that hold nothing yet; a function that holds something uses `goto out`.
#define FL_TRY(expr)                                                                               \
    do {                                                                                           \
        const fl_status fl_try_ = (expr);                                                          \
        if (fl_try_ != FL_OK) return fl_try_;                                                      \
    } while (0)

#endif
