// team.h: threads that run a job and know whether they really had a processor each.
#ifndef FL_BENCH_TEAM_H
#define FL_BENCH_TEAM_H

#include "common/base.h"

typedef struct bench_team bench_team;

// One piece of a call; `thread` counts from 0.
typedef void (*bench_piece_fn)(void *ctx, size_t piece, unsigned thread);

typedef struct bench_job {
    bench_piece_fn fn;
    void *ctx;
    size_t pieces;      // of a call
    const size_t *last; // [stages] piece numbers where a stage ends; NULL: a call is one stage
    bool fixed;         // piece i belongs to thread i; else threads take the next piece
} bench_job;

bench_team *bench_team_open(unsigned threads); // warmed up; aborts when the system refuses
void bench_team_close(bench_team *team);
unsigned bench_team_threads(const bench_team *team);

// `calls` calls one after the other: no piece of a stage begins before the stage before it has
// ended. Returns seconds; *ret_share is the least share of them that a thread was on a processor.
double bench_team_run(bench_team *team, const bench_job *job, size_t calls, double *ret_share);

#endif
