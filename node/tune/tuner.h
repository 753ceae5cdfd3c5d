// tuner.h: tuning as plan, bind, step.
//
// One step: `micro` micro-batches of at most `sequence` tokens go through layers 0 .. e only, the
// loss is taken there, and gradients go back through the window that ends at e; AdamW then changes
// the B's of the window and the gain of the exit, and nothing else. Window inputs are kept and each
// layer is run again on the way back, except the `kept` topmost, whose activations are kept too
// (the same bits, less time, more memory).
//
//   Memory   node_tune_plan knows the exact number of bytes that bind takes, from sizes alone, and
//            adds what else will be resident: the mapped weights that steps touch and what the
//            process holds already. A plan that does not fit `memory_bytes` is refused. What the
//            caller left at 0 the plan sets to what is best where memory is no matter; who looks
//            for what fits and is fastest is node/schedule, which asks node_tune_measure.
//   Prefix   the state that enters a window is rounded as prefix.h says and may come from its
//   cache:
//            node_tuner_use_prefix. The plan sizes it: nothing for schedules under which no state
//            comes again, or for runs that end with the first epoch.
//   Bits     a run is a function of (model, adapter, documents, options): of seed and step, not of
//            threads, of the prefix cache, or of what was planned for `kept` and `chunk` (chunk: in
//            the last bits only).
//   Source   truncated forward and windows: Edge-LLM, arXiv 2406.15758, section 3.2; recomputation:
//            Chen et al. 2016, arXiv 1604.06174; AdamW: arXiv 1711.05101, algorithm 2.
#ifndef NODE_TUNE_TUNER_H
#define NODE_TUNE_TUNER_H

#include "node/model/resident.h"
#include "node/tune/adapter.h"
#include "node/tune/backward.h"
#include "node/tune/data.h"
#include "node/tune/loss.h"
#include "node/tune/prefix.h"
#include "node/tune/window.h"

enum {
    NODE_TUNE_SEQUENCE = 128, // many small steps learned more from a token than few large ones
    NODE_TUNE_CHUNK = 2048,
    NODE_TUNE_SEQUENCE_MIN = 16,
    NODE_TUNE_SEQUENCE_MAX = 4096,
    NODE_TUNE_MICRO_MAX = 1024,
    NODE_TUNE_RESIDENT = 12 << 20, // bytes of the program itself, when the caller does not know
    NODE_TUNE_PREFIX = 64 << 20,   // 58,000 tokens of a model of 576
};
#define NODE_TUNE_KEEP_AUTO UINT32_MAX

typedef struct node_tune_opts {
    node_window_opts window; // window.size 0: what its kind trains
    uint32_t sequence;       // tokens of a micro-batch; 0: NODE_TUNE_SEQUENCE
    uint32_t micro;          // micro-batches a step; 0: 1
    uint32_t chunk;          // vocabulary entries at a time; 0: NODE_TUNE_CHUNK
    uint32_t kept;           // layers whose activations are kept; NODE_TUNE_KEEP_AUTO: all
    uint32_t threads;        // of the engine's pool
    float lr, gain_lr;       // of the B's and of the exit's gain
    float beta1, beta2, epsilon, decay;
    float clip;              // largest norm of the gradient of all that the step trains; 0: none
    uint32_t warmup;         // steps over which the rates rise linearly
    uint64_t seed;           // of the order of the data, of random windows, of thinning
    uint64_t text_seed;      // of what the micro-batches are: runs that share it share their states
    uint64_t prefix_bytes;   // the prefix cache may take in memory, if the limit leaves as much
    uint64_t prefix_disk;    // and in the program's store
    uint64_t memory_bytes;   // the whole process may have resident; 0: no limit
    uint64_t resident_bytes; // what it has already, weights not counted; 0: NODE_TUNE_RESIDENT,
                             // the adapter and the tokens
    bool stream; // may weights pass through memory? The caller then opens plan->resident
} node_tune_opts;

// The measured recipe (SmolLM2-135M, three domains, 12,000 tokens each): last window at the last
// exit, lr 5e-3 for B and gain, betas 0.8 and 0.95, no decay, clip 1 as a safety net, 5 steps of
// warm-up, steps of 1 x 128 tokens. Training the lower layers for early exits in runs this short
// made the last exit worse. Everything that a plan can choose is left to it.
node_tune_opts node_tune_defaults(void);

enum { NODE_TUNE_GAVE_UP_MAX = 6, NODE_TUNE_GAVE_UP_SIZE = 120 };

typedef struct node_tune_plan {
    node_tune_opts opts;   // every choice made
    uint32_t window;       // layers of the widest window
    uint64_t arena_bytes;  // exactly what bind takes
    uint64_t prefix_bytes; // exactly what node_prefix_bind takes for this shape; 0: no cache
    node_prefix_shape prefix;
    uint32_t batches;        // micro-batches of an epoch
    uint64_t weight_bytes;   // of the mapped model, touched by steps
    uint64_t resident_bytes; // of the process besides
    uint64_t peak_bytes;     // the process's resident set at its highest
    node_resident_plan resident;
    uint32_t vote_window; // tokens of a window when the vote is settled at the end, with the arena
    uint64_t vote_bytes;  // given back; 0: it is not settled
    // What the memory limit cost, a phrase each ("a window of 3 layers instead of 7").
    uint32_t gave_up_count;
    char gave_up[NODE_TUNE_GAVE_UP_MAX][NODE_TUNE_GAVE_UP_SIZE];
} node_tune_plan;

// FL_EARG for options out of range (a window larger than the model, an exit that does not exist),
// FL_ENOMEM when they do not fit the memory, with what they need. `docs` are what will be trained
// on; `rank` the adapter's. The prefix cache takes of what the plan leaves.
fl_status node_tune_make_plan(const node_model *model, uint32_t rank, const node_docs *docs,
                              const node_tune_opts *opts, node_tune_plan *ret,
                              fl_err *err) FL_NODISCARD;
// The plan of options that node_tune_make_plan would accept, whatever the memory, without a prefix
// cache: with opts->stream weights pass through memory when they do not fit the limit, and
// peak_bytes says what is needed. Sizes alone: cheap enough to ask for hundreds of candidates.
void node_tune_measure(const node_model *model, uint32_t rank, const node_docs *docs,
                       const node_tune_opts *opts, node_tune_plan *ret);
// Writes plan->gave_up: what its limit cost against `best`, the plan that was chosen without one.
// Nothing when `best` fits: then they differ for other reasons.
void node_tune_compare(const node_model *model, const node_tune_plan *best, node_tune_plan *plan);

typedef struct node_tuner {
    const node_engine *engine;
    const node_model *model;
    node_adapter *adapter;
    node_tune_opts opts;
    uint64_t step;   // steps done
    uint64_t tokens; // inputs seen
    node_batches batches;
    node_micro micro;
    node_prefix *prefix; // NULL: nothing is kept
    uint8_t *entry;      // the state that enters the window, in the prefix's form
    node_scratch *scratch;
    node_head head;
    node_back back;
    node_acts acts;               // of layers that are recomputed
    node_acts *kept;              // [opts.kept]
    float *x, *dx;                // [sequence][hidden]
    float *dnorm;                 // [sequence][hidden] of the loss
    float *inputs;                // [window][sequence][hidden]
    float *grad;                  // [window] spans of a layer, then one gain
    float *m, *v;                 // moments: [slots] spans, then [exits] gains
    uint64_t *updates;            // [slots + exits] steps that each has taken
    uint32_t window, slots, span; // span: floats of the widest layer
    uint32_t slot_first;          // layer of slot 0
} node_tuner;

// Takes plan->arena_bytes from an arena whose block is 64-byte aligned, or counts them. Adapter,
// model, engine and documents outlive the tuner. Cannot fail.
void node_tuner_bind(node_tuner *tuner, const node_engine *engine, const node_model *model,
                     node_adapter *adapter, const node_docs *docs, const node_tune_opts *planned,
                     fl_arena *arena);

// States are kept in `prefix` from now on, which was bound for this plan's shape, and are found
// that an earlier tuner of the same shape left there. It outlives the tuner.
void node_tuner_use_prefix(node_tuner *tuner, node_prefix *prefix);

typedef struct node_tune_report {
    uint64_t step;      // the first is 1
    node_window window; // exit and layers
    uint32_t exit_layer;
    double loss;     // mean nats a token, before the update
    uint64_t tokens; // of this step
    float grad_norm; // before clipping
    bool skipped;    // the gradient was not finite: nothing was changed
    // Where the time went: layers below the window, layers of the window, head and loss, backward
    // (with what is computed again), the rest.
    double below_s, window_s, head_s, back_s, rest_s;
} node_tune_report;

// Allocates nothing. The adapter's values may be changed between steps (a federation's new round);
// the moments stay, and what is cached of states above a changed value is dropped.
void node_tuner_step(node_tuner *tuner, node_tune_report *ret);

// What a run has besides its adapter: steps, place in the data, moments. A tuner that is bound with
// another number of threads, chunk or number of kept layers goes on from it as if nothing had
// happened, with the prefix cache when node_tuner_use_prefix gives it the same one again; window,
// sequence, micro-batches, seeds and documents are the same. state: node_tuner_state_size bytes,
// 8-byte aligned.
size_t node_tuner_state_size(const node_tuner *tuner);
void node_tuner_state_get(const node_tuner *tuner, void *state);
void node_tuner_state_set(node_tuner *tuner, const void *state);

#endif
