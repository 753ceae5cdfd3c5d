// fold_loop.h: the loops of fold.h, plain C that the compiler makes vectors of; a variant's file is
// this text built for its instruction set.
#ifndef FL_KERNELS_FOLD_LOOP_H
#define FL_KERNELS_FOLD_LOOP_H

#include "kernels/fold.h"

#include <string.h>

#define FL_FOLD_ROUND 0x1.8p52 // beside it a double's last bit is 1

static inline int64_t fl_fold_fixed(float x) {
    const double sum = (double)x * 0x1p32 + FL_FOLD_ROUND, zero = FL_FOLD_ROUND;
    int64_t bits, at_zero;
    memcpy(&bits, &sum, sizeof(bits));
    memcpy(&at_zero, &zero, sizeof(at_zero));
    return bits - at_zero;
}

// Magnitudes have no sign bit, and vectors of int32 have a maximum everywhere.
static inline uint32_t fl_fold_most(size_t n, const float *x) {
    int32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof(bits));
        const int32_t mag = (int32_t)(bits & 0x7fffffffu);
        most = mag > most ? mag : most;
    }
    return (uint32_t)most;
}

static inline void fl_fold_f32(size_t n, const float *restrict x, uint64_t m,
                               int64_t *restrict lane) {
    for (size_t i = 0; i < n; i++)
        lane[i] = (int64_t)((uint64_t)lane[i] + m * (uint64_t)fl_fold_fixed(x[i]));
}

static inline void fl_fold_i64(size_t n, const int64_t *restrict x, uint64_t m,
                               int64_t *restrict lane) {
    for (size_t i = 0; i < n; i++)
        lane[i] = (int64_t)((uint64_t)lane[i] + m * (uint64_t)x[i]);
}

#endif
