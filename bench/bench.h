// bench.h: median-of-runs timing, one tab-separated line per (kernel, variant, shape).
// --smoke runs one tiny pass; ctest does that on every build so that benchmarks never rot.
#ifndef FL_BENCH_BENCH_H
#define FL_BENCH_BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BENCH_RUNS = 15 };

static inline double bench_now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static inline bool bench_smoke(int argc, char **argv) {
    return argc > 1 && strcmp(argv[1], "--smoke") == 0;
}

static inline int bench_cmp(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Zeroed memory on a cache line; benchmarks end without giving it back.
static inline void *bench_alloc(size_t size) {
    void *p = aligned_alloc(64, (size + 63) / 64 * 64);
    if (p == NULL) abort();
    return memset(p, 0, (size + 63) / 64 * 64);
}

// A repeatable number in [-1, 1).
static inline float bench_randf(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(int32_t)state * 0x1p-31f;
}

// How many calls make a run of some milliseconds, given what one call took.
static inline size_t bench_calls(double one_s, bool smoke) {
    return smoke || one_s > 2e-3 ? 1 : (size_t)(2e-3 / (one_s + 1e-9)) + 1;
}

// Prints ns a call and the rates (2 operations a multiply-add; bytes moved at the least); `check`
// makes the work observable and a wrong answer visible.
static inline void bench_report(const char *kernel, const char *tag, const char *shape,
                                double *runs, size_t calls, double ops, double bytes,
                                double check) {
    qsort(runs, BENCH_RUNS, sizeof(*runs), bench_cmp);
    const double s = runs[BENCH_RUNS / 2] / (double)calls;
    printf("%s\t%s\t%s\t%.0f ns\t%.2f GOP/s\t%.2f GB/s\tcheck=%.6g\n", kernel, tag, shape, s * 1e9,
           ops / s * 1e-9, bytes / s * 1e-9, check);
}

#endif
