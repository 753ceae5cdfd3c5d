// fold: adds a vector times an integer to exact sums. What a coordinator does for each value that a
// node sends.
//
//   Shape     x[n], lane[n], n >= 0, no overlap.
//   most      the largest magnitude of x as the bits of a float, which order as the magnitudes do,
//             NaN above infinity; 0 for n = 0. Besides, it brings x near: a fold that waits for
//             memory itself is slower than both together, as its lanes' hits in the second cache
//             keep the processor from reading ahead (measured on Zen 4).
//   f32       lane[i] += m * round_half_even(x[i] * 2^32), modulo 2^64. |x[i]| <= 64.
//   i64       lane[i] += m * x[i], modulo 2^64.
//   Numerics  exact: the same bits from every variant. The product with 2^32 is exact, in float as
//             in double, and adding 1.5 * 2^52 rounds a double to an integer, which is then the low
//             part of its bits.
//   Errors    none; that lanes do not overflow is the caller's contract.   Threads  pure.
//   Source    the rounding by addition: Knuth, The Art of Computer Programming 2, 4.2.2.
#ifndef FL_KERNELS_FOLD_H
#define FL_KERNELS_FOLD_H

#include "kernels/cpu.h"

#define FL_FOLD_LIST(X)                                                                            \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_FMA))                                                   \
    FL_ON_X86(X(avx512, FL_CPU_AVX512_VNNI))

#define FL_FOLD_MOST(tag) uint32_t fl_fold_most_##tag(size_t n, const float *x)
#define FL_FOLD_F32(tag)                                                                           \
    void fl_fold_f32_##tag(size_t n, const float *x, uint64_t m, int64_t *lane)
#define FL_FOLD_I64(tag)                                                                           \
    void fl_fold_i64_##tag(size_t n, const int64_t *x, uint64_t m, int64_t *lane)

#define X(tag, need)                                                                               \
    FL_FOLD_MOST(tag);                                                                             \
    FL_FOLD_F32(tag);                                                                              \
    FL_FOLD_I64(tag);
FL_FOLD_LIST(X)
#undef X

typedef struct fl_fold_variant {
    const char *tag; // NULL ends the list
    uint32_t need;
    uint32_t (*most)(size_t n, const float *x);
    void (*f32)(size_t n, const float *x, uint64_t m, int64_t *lane);
    void (*i64)(size_t n, const int64_t *x, uint64_t m, int64_t *lane);
} fl_fold_variant;

extern const fl_fold_variant fl_fold_variants[];

// The last variant of the list that runs with these features.
const fl_fold_variant *fl_fold_select(uint32_t cpu);

#endif
