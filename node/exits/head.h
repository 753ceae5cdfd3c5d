// head.h: what an exit says: RMSNorm with the exit's own gain, then the head matrix that all exits
// share. Nothing here ever holds logits of many tokens by the whole vocabulary: the head goes by in
// chunks of rows, with a running log-sum-exp.
//
//   Rows      the hidden rows of all exits are stacked as if they were tokens, so that one pass
//             over the head serves every exit.
//   Bits      a logit is what node_matmul_rows gives for its row: the same in tuning, evaluation
//             and generation.
//   Memory    bound once; calls allocate nothing. Threads: the engine's pool, one caller.
//   Source    Milakov & Gimelshein 2018, arXiv 1805.02867, algorithm 3 (running log-sum-exp).
#ifndef NODE_EXITS_HEAD_H
#define NODE_EXITS_HEAD_H

#include "node/exits/vote.h"
#include "node/model/forward.h"

typedef struct node_head {
    uint32_t rows;   // most rows of a call: exits * tokens
    uint32_t taus;   // most temperatures of a call
    uint32_t chunk;  // vocabulary entries at a time: a multiple of 16
    float *norm;     // [rows][hidden]
    float *logits;   // [rows][chunk]
    float *picked;   // [rows] logit of the target
    float *lse;      // [rows] log-sum-exp at temperature 1
    int32_t *target; // [rows]
    fl_lse *state;   // [taus][rows]
} node_head;

enum { NODE_HEAD_CHUNK = 1024 };

// chunk 0: NODE_HEAD_CHUNK; any other is rounded up to 16 and cut to the vocabulary.
void node_head_bind(node_head *head, const node_model *model, uint32_t rows, uint32_t taus,
                    uint32_t chunk, fl_arena *arena);

// The gain of an exit: the adapter's, or the model's final norm without one.
const float *node_exit_gain(const node_model *model, const node_lora *lora, uint32_t exit);

// y[rows][hidden] = RMSNorm of x[rows][hidden] with this gain.
void node_head_norm(const node_engine *engine, const node_model *model, const float *gain,
                    uint32_t rows, const float *x, float *y);

typedef struct node_head_job {
    const node_model *model;
    const node_lora *lora;  // NULL: no adapter
    uint32_t exits, tokens; // exits * tokens <= head->rows
    const float *hidden;    // [exits][tokens][hidden] residual stream after each exit's layer
    const int32_t *target;  // [tokens]; negative: none, its log-probability is given as 0
    uint32_t taus;          // temperatures an exit, at least 1
    const float *tau;       // [exits][taus]
    float *logp;            // [exits][taus] rows of `stride` floats, the first `tokens` written
    size_t stride;
    uint8_t
        *correct; // [exits] rows of `stride`: is the target the likeliest? or NULL. Wants tau[0] 1
    float *log_max; // [tokens] log sum_u max_t p_t(u) at temperature 1, or NULL. Wants tau[0] 1
} node_head_job;

// Log-probabilities of the targets. log_max costs a second pass over the head; with it and `max`,
// log P(y) = max_t logp_t(y) - log_max.
void node_head_logp(const node_engine *engine, node_head *head, const node_head_job *job,
                    node_scratch *scratch);

// Next-token distribution of the vote for one position: hidden[exits][hidden] of that position,
// logits[exits][vocabulary] for scratch, ret_p[vocabulary]. Reads the shared head once. A vote
// `last` looks at the last exit only. head->rows >= exits.
void node_head_vote(const node_engine *engine, node_head *head, const node_model *model,
                    const node_lora *lora, const node_vote *vote, const float *hidden,
                    float *logits, float *ret_p, node_scratch *scratch);

#endif
