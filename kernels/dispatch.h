// dispatch.h: the table of kernels a program runs with. A value, not a global: the program builds
// one at start-up and passes it down; a test may hold two and compare them.
#ifndef FL_KERNELS_DISPATCH_H
#define FL_KERNELS_DISPATCH_H

#include "kernels/attention.h"
#include "kernels/gemm_f32.h"
#include "kernels/gemm_packed.h"
#include "kernels/gemm_packed_dx.h"
#include "kernels/ggml.h"
#include "kernels/quantise_x8.h"
#include "kernels/rmsnorm.h"
#include "kernels/softmax_xent.h"
#include "kernels/swiglu.h"

// One line a kernel: k.<name> is the function, k.<name>_tag the variant's name (for `doctor`).
#define FL_KERN_LIST(X)                                                                            \
    X(quantise_x8)                                                                                 \
    X(gemm_packed)                                                                                 \
    X(gemm_packed_dx)

// Kernels that are several functions of one variant: k.<name>-><function>, k.<name>->tag.
#define FL_KERN_GROUP_LIST(X)                                                                      \
    X(gemm_f32)                                                                                    \
    X(rmsnorm)                                                                                     \
    X(attention)                                                                                   \
    X(swiglu)                                                                                      \
    X(xent)                                                                                        \
    X(ggml)

typedef struct fl_kern {
#define X(name)                                                                                    \
    fl_##name##_fn name;                                                                           \
    const char *name##_tag;
    FL_KERN_LIST(X)
#undef X
#define X(name) const fl_##name##_variant *name;
    FL_KERN_GROUP_LIST(X)
#undef X
} fl_kern;

// Best variant of every kernel among the feature bits in `cpu`. 0 selects the references.
void fl_kern_select(fl_kern *k, uint32_t cpu);

#endif
