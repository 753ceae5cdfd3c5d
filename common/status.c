#include "common/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

_Noreturn void fl_panic(const char *file, int line, const char *what) {
    fprintf(stderr, "panic: %s:%d: %s\n", file, line, what);
    abort();
}

static const char *const names[] = {
#define X(name, text) "FL_" #name,
    FL_STATUS_LIST(X)
#undef X
};
static const char *const texts[] = {
#define X(name, text) text,
    FL_STATUS_LIST(X)
#undef X
};

const char *fl_status_name(fl_status st) {
    FL_ASSERT((size_t)st < FL_COUNT(names));
    return names[st];
}

const char *fl_status_text(fl_status st) {
    FL_ASSERT((size_t)st < FL_COUNT(texts));
    return texts[st];
}

fl_status fl_err_set(fl_err *err, fl_status st, const char *where, const char *fmt, ...) {
    FL_ASSERT(st != FL_OK);
    if (err == NULL) return st;
    err->status = st;
    err->where = where;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err->text, sizeof(err->text), fmt, ap);
    va_end(ap);
    for (char *c = err->text; *c != '\0'; c++) {
        if ((unsigned char)*c < ' ') *c = '?'; // a name from a file or a peer stays on one line
    }
    return st;
}
