// cost.h: how long a piece of work takes on this machine, and which way of doing it is best.
//
//   Model    each part of a step by the roofline
//                T = max(compute, memory bytes / read rate)
//            (Edge-LLM Eq. 3 on a CPU; Williams et al. 2009) with measured rates (probe.h); weights
//            that do not stay in memory add T = max(T, storage bytes / storage rate) a micro-batch.
//            What no rate tells (elementwise work, panels unpacked for few tokens, threads that
//            wait for one another) is measured once on the model itself: each part at two sizes of
//            micro-batch. The quotient measured / roofline is linear in 1 / tokens between them,
//            which makes a part's time a line in the tokens plus the attention's square.
//   Choice   window, tokens of a sequence and sequences a step change what is learned: they are
//            functions of the memory and the owner's wishes, never of a clock. The widest window
//            that fits is taken, then the longest sequence. Threads and kept activations change
//            only the time: the fastest that fits is taken. The chunk of the vocabulary changes
//            the last bits: the fastest by prediction, a larger one when it is as good.
#ifndef NODE_SCHEDULE_COST_H
#define NODE_SCHEDULE_COST_H

#include "node/schedule/probe.h"

// The model as the cost sees it: weights an average layer has, bytes they take, and the head.
typedef struct node_shape {
    uint32_t layers, hidden, vocabulary, exits;
    double layer_weights, head_weights; // multiplied weights
    double first_weights;               // of q, k, v: not gone back through in the lowest layer
    double layer_bytes, head_bytes;     // as they lie in memory
    double attention_width;             // heads * head_size
    double adapter_weights;             // A and B of a layer
    double trained;                     // B of a layer
    double kept_floats;                 // activations a kept layer holds, a token
    bool below_adapted;                 // layers below the window have adapters at work too
} node_shape;

// Parts of a tuning step, and the unit in which a part is predicted and measured.
typedef enum node_part {
    NODE_PART_BELOW,  // forward, one layer and micro-batch, no adapter
    NODE_PART_WINDOW, // forward, one layer and micro-batch, with its adapter
    NODE_PART_HEAD,   // loss and its gradient, one micro-batch, were there no chunks
    NODE_PART_CHUNK,  // what a chunk of the vocabulary costs besides, one micro-batch
    NODE_PART_BACK,   // backward, one layer and micro-batch, what is computed again not counted
    NODE_PART_UPDATE, // norms, clipping, AdamW: one layer and step
    NODE_PARTS
} node_part;

enum { NODE_POINTS = 2 };

// Measured / roofline. Threads that were not measured (0) take what the nearest measured has.
typedef struct node_calibration {
    uint64_t key; // node_calibration_key
    uint32_t threads;
    uint32_t tokens[NODE_POINTS];
    double part[NODE_THREADS_MAX + 1][NODE_POINTS][NODE_PARTS];
    double prefill[NODE_THREADS_MAX + 1], decode[NODE_THREADS_MAX + 1];
} node_calibration;

uint64_t node_calibration_key(const node_facts *facts, const node_shape *shape);
// The cache, as for rates. FL_ENOENT when it is of another machine or model.
fl_status node_calibration_read(const char *path, uint64_t key, node_calibration *ret,
                                fl_err *err) FL_NODISCARD;
fl_status node_calibration_write(const char *path, const node_calibration *calibration,
                                 fl_err *err) FL_NODISCARD;

typedef struct node_cost {
    node_shape shape;
    node_rates rates;
    bool calibrated;
    node_calibration calibration;
} node_cost;

// One way to run the tuning.
typedef struct node_choice {
    uint32_t threads;
    uint32_t window;       // layers that back-propagate
    uint32_t micro_batch;  // sequences a step
    uint32_t sequence;     // tokens of one
    uint32_t chunk;        // vocabulary rows of the loss at a time
    uint32_t kept;         // layers whose activations are kept, not computed again
    uint64_t peak_bytes;   // exact, from the tuner's plan
    uint64_t stream_bytes; // of weights that come from storage in every micro-batch
    double seconds;        // predicted, of a step
    double measured;       // seconds of a step; 0: not measured
} node_choice;

// Seconds of a part's unit by the roofline, and with what was measured.
double node_cost_roofline(const node_cost *cost, node_part part, uint32_t threads, uint32_t tokens);
double node_cost_part(const node_cost *cost, node_part part, uint32_t threads, uint32_t tokens);
// Seconds of one step at an exit after `depth` layers.
double node_cost_step(const node_cost *cost, const node_choice *choice, uint32_t depth);
// Tokens a second of reading a prompt, and of writing one token after another.
double node_cost_prefill(const node_cost *cost, uint32_t threads, uint32_t tokens);
double node_cost_decode(const node_cost *cost, uint32_t threads);

// Measured seconds of the parts of one micro-batch and one update, for node_calibration_set.
// `chunks`, `window` and so on say how often each unit ran.
typedef struct node_timing {
    uint32_t threads, tokens, below, window, chunks;
    double below_s, window_s, head_s, back_s, update_s; // back_s: with what was computed again
} node_timing;

// Takes two samples of the same tokens that differ in their chunks (many, then few) as point
// `point` of `threads`. Without it the part stays as the roofline says.
void node_calibration_set(node_cost *cost, uint32_t point, const node_timing sample[2]);

// What is asked: 0 is free, except `kept`, where UINT32_MAX is.
typedef struct node_wish {
    uint32_t threads, threads_max; // threads_max: of the free choice
    uint32_t window, window_max;   // window_max: where the free choice starts
    uint32_t micro_batch, sequence, chunk, kept;
    uint32_t tokens;     // of a step when neither micro_batch nor sequence is given
    uint32_t depth;      // layers to the exit, on average
    uint64_t peak_bytes; // most; 0: no limit
} node_wish;

// Exact peak (and what is streamed) of a candidate; the tuner's plan behind a function, for it is
// not this module's. Writes c->peak_bytes and c->stream_bytes.
typedef fl_status (*node_peak_fn)(void *ctx, node_choice *c, fl_err *err);

enum { NODE_CHOICES_MAX = 64 };

// The choices with the window, sequences and chunk that are taken, best first, at most `max`; the
// first is the choice. *ret_seen: candidates whose peak was asked for. FL_ENOMEM when nothing fits:
// then list[0] is the smallest that there is.
fl_status node_cost_choose(const node_cost *cost, const node_wish *wish, node_peak_fn peak,
                           void *peak_ctx, node_choice *list, uint32_t max, uint32_t *ret_count,
                           uint32_t *ret_seen, fl_err *err) FL_NODISCARD;

#endif
