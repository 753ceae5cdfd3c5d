// loss.h: cross entropy at an exit and its gradient, in one pass over the head.
//
// With p the softmax of the logits z = W n, n = RMSNorm(x): dn = sum_v p_v W_v - W_target. The sum
// is kept unnormalised beside the running log-sum-exp, as exp(z_v - m) W_v with m the largest logit
// so far, and rescaled when m grows: the head goes by once forward and once backward, and logits of
// tokens by vocabulary never exist.
//   Source   running rescaling: Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3; carried
//            over to a weighted sum as in Dao et al. 2022, arXiv 2205.14135, algorithm 1.
//   Threads  the engine's pool. Allocates nothing.
#ifndef NODE_TUNE_LOSS_H
#define NODE_TUNE_LOSS_H

#include "node/exits/head.h"

// What tuning passes as `least`. p_v is at most exp(z_v - m), so no more of it is thinned.
#define NODE_LOSS_LEAST 0x1p-10f

typedef struct node_loss_job {
    const node_model *model;
    const float *gain;     // [hidden] of the exit
    uint32_t tokens;       // <= head->rows
    const float *x;        // [tokens][hidden] residual stream at the exit
    const int32_t *target; // [tokens]; negative: the token carries no loss
    float least;           // thins the gradient, see softmax_xent.h; 0: exact
    uint64_t draw;         // key of that thinning
    float weight;          // of each token's loss in the gradient, 1 / (tokens of the step)
    float *dnorm;          // [tokens][hidden] scratch
    float *dx;             // [tokens][hidden] overwritten by the gradient of x
    float *dgain;          // [hidden] added to
} node_loss_job;

// Sum over the targets of -log p, in nats (not weighted).
double node_loss_step(const node_engine *engine, node_head *head, const node_loss_job *job,
                      node_scratch *scratch);

#endif
