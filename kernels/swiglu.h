// swiglu: act = silu(gate) * up, silu(g) = g / (1 + exp(-g)).
//
//   Shape     all [n], n >= 0.
//   Backward  dgate = dact * up * s * (1 + gate * (1 - s)), dup = dact * gate * s, s =
//             sigmoid(gate). Overwrites dgate and dup.
//   Aliasing  an output may be the very array of an input (act = gate; dgate = dact); no other
//             overlap.
//   Numerics  silu(gate) has a relative error below 8 * FLT_EPSILON for gate >= -88.7 (or an
//             absolute one below FLT_MIN); below that, where exp(-gate) is infinite, it is zero, an
//             absolute error below 3e-37. ref calls expf, other variants a polynomial exp within 2
//             ulp. An element's bits depend on its operands alone. NaN stays NaN.
//   Errors    none.   Threads  pure.
//   Source    Shazeer 2020, arXiv 2002.05202, eq. 6 (SwiGLU).
#ifndef FL_KERNELS_SWIGLU_H
#define FL_KERNELS_SWIGLU_H

#include "kernels/cpu.h"

#define FL_SWIGLU_LIST(X)                                                                          \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_FMA))                                                   \
    FL_ON_X86(X(avx512, FL_CPU_AVX512_VNNI))                                                       \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))

#define FL_SWIGLU_FORWARD(tag)                                                                     \
    void fl_swiglu_forward_##tag(size_t n, const float *gate, const float *up, float *act)
#define FL_SWIGLU_BACKWARD(tag)                                                                    \
    void fl_swiglu_backward_##tag(size_t n, const float *gate, const float *up, const float *dact, \
                                  float *dgate, float *dup)

#define X(tag, need)                                                                               \
    FL_SWIGLU_FORWARD(tag);                                                                        \
    FL_SWIGLU_BACKWARD(tag);
FL_SWIGLU_LIST(X)
#undef X

typedef struct fl_swiglu_variant {
    const char *tag; // NULL ends the list
    uint32_t need;
    void (*forward)(size_t n, const float *gate, const float *up, float *act);
    void (*backward)(size_t n, const float *gate, const float *up, const float *dact, float *dgate,
                     float *dup);
} fl_swiglu_variant;

extern const fl_swiglu_variant fl_swiglu_variants[];

#endif
