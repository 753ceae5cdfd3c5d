// cost.h: how long a piece of work takes on this machine, by the roofline
//   T = max(compute, memory bytes / read rate, storage bytes / storage rate)
// an operation (Edge-LLM Eq. 3 on a CPU; Williams et al. 2009). Rates are measured ones (probe.h).
// And the choice among candidates: everything that fits the memory, fastest first.
#ifndef NODE_SCHEDULE_COST_H
#define NODE_SCHEDULE_COST_H

#include "node/schedule/probe.h"

// The model as the cost sees it: weights an average layer has, bytes they take, and the head.
typedef struct node_shape {
    uint32_t layers, hidden, vocabulary, exits;
    double layer_weights, head_weights; // multiplied weights
    double layer_bytes, head_bytes;     // as they lie in memory
    double attention_width;             // heads * head_size
} node_shape;

// One way to run the tuning.
typedef struct node_choice {
    uint32_t threads;
    uint32_t window;      // layers that back-propagate
    uint32_t micro_batch; // sequences a step
    uint32_t sequence;    // tokens of one
    uint32_t chunk;       // vocabulary rows of the loss at a time
    uint64_t peak_bytes;  // exact, from the tuner's plan
    double seconds;       // predicted, of a step
} node_choice;

// Seconds of one step at an exit after `depth` layers.
double node_cost_step(const node_shape *shape, const node_rates *rates, const node_choice *c,
                      uint32_t depth);
// Tokens a second of reading a prompt, and of writing one token after another.
double node_cost_prefill(const node_shape *shape, const node_rates *rates, uint32_t threads,
                         uint32_t tokens);
double node_cost_decode(const node_shape *shape, const node_rates *rates, uint32_t threads);

// Exact peak of a candidate; the tuner's plan behind a function, for it is not this module's.
typedef fl_status (*node_peak_fn)(void *ctx, const node_choice *c, uint64_t *ret, fl_err *err);

// Walks the candidates (wide windows and full sequences first) and returns the one with the most
// tokens a second among those with the widest window that fits `budget_bytes`; the owner's fixed
// choices in `wish` (0: free) are kept. FL_ENOMEM names the smallest budget that would do.
fl_status node_cost_choose(const node_shape *shape, const node_rates *rates,
                           const node_choice *wish, uint64_t budget_bytes, node_peak_fn peak,
                           void *peak_ctx, node_choice *ret, fl_err *err) FL_NODISCARD;

#endif
