// work.h: the memory that measuring and compressing share, and the steps on one layer.
#ifndef NODE_LUC_WORK_H
#define NODE_LUC_WORK_H

#include "node/luc/prune.h"

enum {
    NODE_LUC_WORK_BITS = 8, // of the working copy that stands for the exact model
    NODE_LUC_WIDTHS = 6,    // numbers of bits that a layer is tried with, at most
};

typedef struct node_luc_work {
    const node_engine *engine;
    const node_model *model;           // as given
    node_model *copy;                  // the same with packed layers of NODE_LUC_WORK_BITS
    node_model *trial;                 // the same with one layer changed
    uint8_t *layer_block;              // a packed layer of up to 8 bits: what `trial` points to
    uint8_t *copy_block;               // all layers of `copy`
    size_t layer_size;                 // bytes of each
    uint8_t *width_block;              // [NODE_LUC_WIDTHS][layer_size]
    node_layer width[NODE_LUC_WIDTHS]; // the layer at hand with low, low + 1 ... bits
    node_batch batch;
    uint32_t tokens;
    float *x, *y, *other; // [tokens][hidden]
    node_acts acts;
    node_scratch *scratch;
    node_factor factor;
    node_quantise quantise;
    float *w[NODE_MODULES]; // [rows][cols] weights of the layer at hand
    float *moved;           // the largest matrix, rows and columns in another order
    uint32_t *order[2];     // heads' columns, channels
    double *score;          // [widest]
} node_luc_work;

// Memory for batches of `tokens` tokens; counts with a counting arena. `copies`: room for the
// working copy too.
void node_luc_work_bind(node_luc_work *work, const node_engine *engine, const node_model *model,
                        uint32_t tokens, fl_arena *arena);

// Windows of `window` tokens: positions restart, nothing is seen across.
void node_luc_work_batch(node_luc_work *work, const int32_t *ids, uint32_t tokens, uint32_t window);

// work->w = the layer's matrices as floats.
void node_luc_load(node_luc_work *work, uint32_t layer);

// Packs work->w by nearest codes, all modules with these bits, into block; *ret gets the matrices.
void node_luc_pack(node_luc_work *work, uint32_t layer, uint32_t bits, bool keep_zeros,
                   uint8_t *block, node_layer *ret);

// work->width[i] = the layer just run, work->w rounded to low + i bits, up to high: with feedback,
// or to nearest codes.
fl_status node_luc_pack_widths(node_luc_work *work, uint32_t layer, uint32_t low, uint32_t high,
                               bool nearest, fl_err *err) FL_NODISCARD;

// Runs a layer of `model` over the batch on rows in place.
void node_luc_run(node_luc_work *work, const node_model *model, uint32_t layer, float *x);

// Bytes of a layer of this shape, packed.
uint64_t node_luc_layer_bytes(const node_model *model, uint32_t layer, node_layer_shape shape,
                              uint32_t bits);

// The layer's matrices' rows and columns for a shape.
void node_luc_dims(const node_model *model, uint32_t layer, node_layer_shape shape,
                   uint32_t rows[NODE_MODULES], uint32_t cols[NODE_MODULES]);

// Costs of removing kv groups and channels, from work->acts and work->w of the layer just run:
// costs->attn[kv_heads], costs->ffn[ffn / 16], cumulated as node_prune_shape wants them; and the
// orders. FL_EFORMAT from the factors.
fl_status node_luc_prune_costs(node_luc_work *work, uint32_t layer, node_prune_costs *costs,
                               fl_err *err) FL_NODISCARD;

// The factor of the inputs of one of the four groups of modules, ready for rounding: module Q (also
// K, V), O, GATE (also UP) or DOWN. order NULL: as they are.
fl_status node_luc_factor(node_luc_work *work, uint32_t layer, node_module module,
                          const uint32_t *order, fl_err *err) FL_NODISCARD;

// norm[cols] of a module's inputs over the batch just run.
void node_luc_norms(const node_luc_work *work, uint32_t layer, node_module module, float *norm);

#endif
