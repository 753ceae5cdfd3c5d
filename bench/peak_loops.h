// peak_loops.h: the loops of peak.c, by machine. Only where fl_cpu_detect says so may one be
// called.
#ifndef FL_BENCH_PEAK_LOOPS_H
#define FL_BENCH_PEAK_LOOPS_H

#include "bench/peak.h"

// `count` rounds of bench_loop_ops[rate] operations each.
void bench_loop(bench_rate rate, size_t count);
extern const double bench_loop_ops[];

// Loads `size` bytes, a multiple of 512, once. Fetching early by hand makes it slower here.
void bench_loop_read(const void *data, size_t size);

#endif
