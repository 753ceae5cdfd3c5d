// backward.h: the gradient of one layer, from what node_layer_forward left behind.
//
// Frozen matrices give only dX = dY W, from the form in which they lie in the file; adapters give
// the gradient of their B. With y = W x + s B A x:  dB += s dy^T (A x), dx = dy W + s (dy B) A.
//   Source   as the kernels say; low rank: Hu et al. 2021, arXiv 2106.09685, section 4.1.
//   Bits     a function of the inputs, not of the number of threads.
//   Threads  the engine's pool. Allocates nothing.
#ifndef NODE_TUNE_BACKWARD_H
#define NODE_TUNE_BACKWARD_H

#include "node/model/forward.h"

// Gradients inside a layer, for at most `tokens` rows.
typedef struct node_back {
    uint32_t tokens;
    float *wide1, *wide2; // [tokens][max(ffn, heads * head_size)]
    float *dk, *dv;       // [tokens][kv_heads * head_size]
    float *dnorm;         // [tokens][hidden]
    float *dlow, *low;    // [tokens][rank]
} node_back;

void node_back_bind(node_back *back, const node_model *model, uint32_t tokens, uint32_t rank,
                    fl_arena *arena);

typedef struct node_layer_job {
    const node_model *model;
    uint32_t layer;
    const node_lora *lora;
    const node_batch *batch; // kv_row[t] == t: keys and values are the batch's own
    const node_acts *acts;   // of the forward pass
    const float *x;          // [tokens][hidden] input of the layer
    float *dy; // [tokens][hidden] in: gradient of the layer's output; out: of its input
    float *db; // the layer's B's in module order, one span: added to
    bool last; // nothing below wants a gradient: dy is not made into that of the input
} node_layer_job;

void node_layer_backward(const node_engine *engine, const node_layer_job *job, node_back *back,
                         node_scratch *scratch);

#endif
