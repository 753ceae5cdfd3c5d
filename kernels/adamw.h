// adamw: one step of Adam with decoupled weight decay, on plain arrays.
//
//   Shape     param, grad, m, v[n]; m and v start as zero; step counts from 1.
//   Step      m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
//             param -= lr * (m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + epsilon)
//                            + decay * param)
//             (the paper's schedule multiplier is part of lr). Bias corrections in double, rounded
//             once; element arithmetic in float.
//   Numerics  only +, -, *, / and sqrt of IEEE floats, never contracted: the same bits on every
//             machine, given that pow(beta, step) is.
//   Errors    none.   Threads  pure; split by ranges.
//   Source    Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.
#ifndef FL_KERNELS_ADAMW_H
#define FL_KERNELS_ADAMW_H

#include "kernels/cpu.h"

typedef struct fl_adamw {
    float lr, beta1, beta2, epsilon, decay;
    uint64_t step; // of this update, the first is 1
} fl_adamw;

void fl_adamw_step(const fl_adamw *opts, size_t n, float *param, const float *grad, float *m,
                   float *v);

#endif
