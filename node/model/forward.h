// forward.h: layers, exactly one implementation for tuning, evaluation and generation.
//
// A batch is a list of tokens, packed without padding: token t has a RoPE position pos[t] and sees
// the key/value rows kv_begin[t] .. kv_row[t], its own row last. In tuning and evaluation the rows
// are the batch's own; in generation they are the cache. What a token's output is does not depend,
// in any bit, on the other tokens of the batch, on its size, or on the number of threads.
#ifndef NODE_MODEL_FORWARD_H
#define NODE_MODEL_FORWARD_H

#include "common/arena.h"
#include "common/pool.h"
#include "kernels/dispatch.h"
#include "node/model/lora.h"
#include "node/model/model.h"

// What every computation runs on: kernels chosen for this machine, and threads (NULL: the caller).
typedef struct node_engine {
    const fl_kern *kern;
    fl_pool *pool;
} node_engine;

typedef struct node_batch {
    uint32_t tokens;
    const int32_t *id;        // [tokens] each in [0, vocabulary): callers check ids from outside
    const uint32_t *pos;      // [tokens]
    const uint32_t *kv_begin; // [tokens] first key/value row that the token sees
    const uint32_t *kv_row;   // [tokens] the row that the token itself writes
} node_batch;

// What a layer leaves behind. T = tokens of the batch (T rows), R = rows of keys and values. The
// backward pass needs all of it but the passing ones, which layers may share.
typedef struct node_acts {
    float *norm1;             // [T][hidden] passing: input of q, k, v
    float *q;                 // [T][heads * head_size], rotated
    float *k, *v;             // [R][kv_heads * head_size], k rotated
    float *attn;              // [T][heads * head_size] input of o
    float *lse;               // [T][heads] log-sum-exp of each attention row
    float *mid;               // [T][hidden] residual stream after attention
    float *norm2;             // [T][hidden] passing: input of gate, up
    float *gate;              // [T][ffn] before the activation
    float *up;                // [T][ffn]
    float *act;               // [T][ffn] passing: silu(gate) * up, input of down
    float *low[NODE_MODULES]; // [T][rank] A x of each module; NULL without adapter
} node_acts;

// Scratch for at most `tokens` rows: quantised activations, panels. Bound once, used by every call.
typedef struct node_scratch node_scratch;

// Takes everything a layer needs from the arena (also a counting one: then only sizes matter).
// kv_rows: rows of acts->k and acts->v; 0 when the caller points them into a cache.
void node_acts_bind(node_acts *acts, const node_model *model, uint32_t tokens, uint32_t kv_rows,
                    uint32_t rank, fl_arena *arena);
// The two parts of it, for who shares what passes: each sets its own pointers only.
void node_acts_bind_lasting(node_acts *acts, const node_model *model, uint32_t tokens,
                            uint32_t kv_rows, uint32_t rank, fl_arena *arena);
void node_acts_bind_passing(node_acts *acts, const node_model *model, uint32_t tokens,
                            fl_arena *arena);
node_scratch *node_scratch_bind(const node_model *model, uint32_t tokens, uint32_t threads,
                                fl_arena *arena);
// [tokens][rope_size] cosines and sines of the batch's positions (kernels/rope.h), kept from call
// to call while positions stay the same. Valid until a call with another batch.
const float *node_scratch_rope(node_scratch *scratch, const node_model *model,
                               const node_batch *batch);

// x[T][hidden] = embedding rows of the batch's ids.
void node_embed(const node_engine *engine, const node_model *model, const node_batch *batch,
                float *x);

// Runs layer `layer` on x[T][hidden] in place and fills *acts. lora may be NULL.
void node_layer_forward(const node_engine *engine, const node_model *model, uint32_t layer,
                        const node_lora *lora, const node_batch *batch, node_acts *acts,
                        node_scratch *scratch, float *x);

// y[T][rows] = x[T][cols] W^T. dx[T][cols] (+)= dy[T][rows] W.
void node_matmul(const node_engine *engine, const node_matrix *w, uint32_t tokens, const float *x,
                 float *y, node_scratch *scratch);
void node_matmul_dx(const node_engine *engine, const node_matrix *w, uint32_t tokens,
                    const float *dy, float *dx, bool accumulate, node_scratch *scratch);
// Only rows [row_begin, row_end) of W: y[T][row_end - row_begin]; row_begin, row_end multiples of
// 16 or the end. For vocabulary chunks of the head.
void node_matmul_rows(const node_engine *engine, const node_matrix *w, uint32_t row_begin,
                      uint32_t row_end, uint32_t tokens, const float *x, float *y,
                      node_scratch *scratch);
// dx[T][cols] (+)= dy[T][row_end - row_begin] W[row_begin..row_end).
void node_matmul_rows_dx(const node_engine *engine, const node_matrix *w, uint32_t row_begin,
                         uint32_t row_end, uint32_t tokens, const float *dy, float *dx,
                         bool accumulate, node_scratch *scratch);

#endif
