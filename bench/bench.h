// bench.h: how every kernel benchmark measures and what it prints.
//
// A job is run by one or two threads that take pieces as the engine's pool does. Each sample of it
// is taken right after a sample of what limits it (the peak of the arithmetic, or reading the same
// bytes), so that both see the machine in the same state. A sample in which a thread had less than
// 97 % of the time on a processor is thrown away. Printed are medians:
//
//   kernel  variant  shape  threads  ns a call  GOP/s  GB/s  share of the limit  thrown away  check
//
//   --smoke      one tiny pass; ctest does that on every build so that benchmarks never rot
//   --threads=N  only with N threads; without it with 1 and with 2
//   --only=TEXT  only lines whose kernel, variant or shape contains TEXT
#ifndef FL_BENCH_BENCH_H
#define FL_BENCH_BENCH_H

#include "bench/peak.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BENCH_RUNS = 11, BENCH_TRIES = 40 };

typedef struct bench_args {
    bool smoke;
    unsigned threads; // 0: 1, then 2
    const char *only;
} bench_args;

// Exits with a message for what it does not know.
bench_args bench_args_parse(int argc, char **argv);
// Numbers of threads to measure with: true while there is a next one; begin with *threads = 0.
bool bench_next_threads(const bench_args *args, unsigned *threads);

// Zeroed memory on a cache line; free() gives it back.
void *bench_alloc(size_t size);
// Floats in [-1, 1) from bench_alloc.
float *bench_floats(size_t count);
float bench_randf(void); // repeatable

typedef struct bench_case {
    const char *kernel, *tag, *shape;
    bench_job job;     // one call
    double ops, bytes; // of a call; 2 operations a multiply-add, bytes moved at the least
    bench_rate rate;   // the limit's arithmetic, or BENCH_NONE
    // When set, the limit is reading this memory instead.
    const void *stream;
    size_t stream_size;
    const float *check; // makes the work observable and a wrong answer visible
} bench_case;

// Measures and prints a line.
void bench_run(const bench_args *args, bench_team *team, const bench_case *c);

#endif
