// sensitivity.h: what compressing one layer alone does to its output and to the model's.
//
// Error of layer j with bits b (or sparsity p): the exact layer and the compressed one run on the
// same exact input over calibration tokens, e_j = sum |y' - y|^2 / sum |y|^2 in double, y the
// layer's output on the residual stream. It has no scale. The compressed layer is rounded as the
// final one will be, with feedback: plain rounding errs by other factors in other layers. Where
// nothing is decided by it, as under uniform bits, plain rounding, which takes a fraction of the
// time, has to do for the report. For
// structured pruning the same number comes from the factor of the Gram matrices in closed form,
// the repair included.
//
// Harm of layer j: the same relative error does not harm alike at every depth. With this layer
// alone rounded to NODE_SENSE_HARM_BITS, the divergence of the model's next-token distribution
// from that of the untouched one, KL(p || p'), is measured; one bit less, where it grows faster
// than the error does, is measured too if the policy may choose it; above, it is taken to follow
// the error. Any change of a layer, however small, also rounds the activations above it otherwise:
// what putting in the exact layer gives is taken off. The predicted loss of pruning is
// KL_j * e_j(p) / e_j.
//
// Share of a matrix: some tokens carry outputs a thousand times larger than the others, and they
// alone would speak in e_j. What the next norm sees is each token's own relative error,
// r = mean over tokens of |y' - y|^2 / |y|^2. Each of the seven matrices is rounded alone to as few
// bits, which splits KL_j between them in proportion to r, and r_j(b) of the whole layer says how
// it changes with the bits.
//
// The distribution is taken over the first NODE_SENSE_VOCABULARY entries, which are the frequent
// ones in every vocabulary made by merging; the untouched model is the 8-bit working copy.
#ifndef NODE_LUC_SENSITIVITY_H
#define NODE_LUC_SENSITIVITY_H

#include "node/luc/work.h"

enum {
    NODE_SENSE_BITS = FL_PACKED_BITS_MAX + 1, // index is the number of bits
    NODE_SENSE_LEVELS = 33,                   // of sparsity, at most
    NODE_SENSE_HARM_BITS = 3,
    NODE_SENSE_FIT_TOKENS = 1024, // of calibration that trials are fitted to
    NODE_SENSE_TOKENS = 256,      // that errors are measured on
    NODE_SENSE_HARM_TOKENS = 192, // and harm
    NODE_SENSE_VOCABULARY = 8192,
};

typedef struct node_sense_opts {
    uint32_t bits_low, bits_high; // measured, both included; with predict, 3 is among them
    bool predict;                 // measure harm and shares at all: only `luc` asks for them
    bool nearest;    // the widths are rounded to nearest codes: where nothing is decided by them
    double sparsity; // 0: nothing is pruned
    node_prune_kind prune;
    void (*progress)(void *ctx, uint32_t done, uint32_t total);
    void *ctx;
} node_sense_opts;

typedef struct node_sense {
    uint32_t layers, levels;         // levels is 0 without pruning
    uint32_t bits_low, bits_high;    // measured
    double *quant;                   // [layers][NODE_SENSE_BITS]; 0 where not measured
    double *curve;                   // [layers][NODE_SENSE_BITS] predicted loss of b bits, 1 at 3
    double *share;                   // [layers][NODE_MODULES], sums to 1
    double *prune;                   // [layers][NODE_SENSE_LEVELS]; level 0 is no pruning, 0
    double level[NODE_SENSE_LEVELS]; // sparsities
    node_layer_shape *shape;         // [layers][NODE_SENSE_LEVELS] structured
    double *harm;                    // [layers] KL at 3 bits
    double *weight;                  // [layers] harm a unit of e_j
    float *hidden;                   // [layers + 1][NODE_SENSE_HARM_TOKENS][hidden]
    float *logits[2];                // [NODE_SENSE_HARM_TOKENS][NODE_SENSE_VOCABULARY]
    double *costs;                   // scratch of the closed form
} node_sense;

void node_sense_bind(node_sense *sense, const node_model *model, fl_arena *arena);

// Predicted loss of one matrix at so many bits.
double node_sense_loss(const node_sense *sense, uint32_t layer, node_module module, uint32_t bits);

// Over the first tokens of work->batch (closed forms: over all of them; windows must divide
// NODE_SENSE_HARM_TOKENS or be longer). Leaves the whole working copy in work->copy. FL_EFORMAT
// when a measurement is zero or not finite.
fl_status node_sense_measure(node_luc_work *work, const node_sense_opts *opts, node_sense *sense,
                             fl_err *err) FL_NODISCARD;

#endif
