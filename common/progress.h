// progress.h: one line on a terminal for anything that takes over a second; nothing elsewhere.
#ifndef FL_COMMON_PROGRESS_H
#define FL_COMMON_PROGRESS_H

#include "common/base.h"

typedef struct fl_progress {
    const char *what; // static storage
    bool shown;       // standard error is a terminal, and --quiet or --json was not given
    double started_s, last_s;
} fl_progress;

void fl_progress_init(fl_progress *p, const char *what, bool quiet);
// done of total, and a short note ("loss 3.12, 240 tokens/s"); note may be NULL. Draws at most
// ten times a second.
void fl_progress_step(fl_progress *p, uint64_t done, uint64_t total, const char *note);
void fl_progress_done(fl_progress *p); // clears the line

#endif
