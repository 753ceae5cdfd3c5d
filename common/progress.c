#include "common/progress.h"

#include "common/clock.h"

#include <stdio.h>
#include <unistd.h>

void fl_progress_init(fl_progress *p, const char *what, bool quiet) {
    const double now = fl_clock_s();
    *p = (fl_progress){
        .what = what, .shown = !quiet && isatty(STDERR_FILENO), .started_s = now, .last_s = now};
}

void fl_progress_step(fl_progress *p, uint64_t done, uint64_t total, const char *note) {
    enum { WIDTH = 28 };
    const double now = fl_clock_s();
    if (!p->shown || now - p->last_s < 0.1) return;
    p->last_s = now;
    const double share = total == 0 ? 0.0 : (double)done / (double)total;
    const double left = share > 0.0 ? (now - p->started_s) * (1.0 - share) / share : 0.0;
    char bar[WIDTH + 1];
    for (int i = 0; i < WIDTH; i++) bar[i] = i < (int)(share * WIDTH) ? '=' : ' ';
    bar[WIDTH] = '\0';
    fprintf(stderr, "\r%s [%s] %3.0f%%  %s  %.0f s left\x1b[K", p->what, bar, share * 100.0,
            note == NULL ? "" : note, left);
    fflush(stderr);
}

void fl_progress_done(fl_progress *p) {
    if (p->shown) fprintf(stderr, "\r\x1b[K");
}
