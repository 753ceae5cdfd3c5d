// prune.h: what to take out of a layer, and what it costs.
//
// structured: whole kv groups (the key and value heads with all queries that read them) and FFN
// channels in blocks of 16. Rows and columns are really removed. Candidates are ordered by what
// they add to the block's output, |column of W_out|^2 times its input's energy; with the inputs in
// that order one Cholesky factor gives the cost of removing any number from the end, after the
// others have made good what they can (node_quantise_removal), and the repair itself is the
// feedback of rounding (quantise.h).
// unstructured: in each row the weights with the smallest |w| times the norm of its input become
// zero (Sun et al. 2023, Wanda, arXiv 2306.11695, eq. 1). Bytes and speed stay what they were.
#ifndef NODE_LUC_PRUNE_H
#define NODE_LUC_PRUNE_H

#include "node/luc/quantise.h"

typedef enum node_prune_kind { NODE_PRUNE_STRUCTURED, NODE_PRUNE_UNSTRUCTURED } node_prune_kind;

enum { NODE_PRUNE_CHANNELS = 16 }; // FFN channels are removed in blocks of this many

#define NODE_PRUNE_MOST 0.7 // of a layer's weights; above that nothing useful is left

// What remains of a layer.
typedef struct node_layer_shape {
    uint32_t kv_heads, ffn;
} node_layer_shape;

uint64_t node_layer_weights(const node_model *model, uint32_t heads, uint32_t kv_heads,
                            uint32_t ffn);
// Weights that this shape lacks.
uint64_t node_shape_removed(const node_model *model, uint32_t layer, node_layer_shape shape);

// order[0..n): columns by falling score, blocks of `block` neighbours staying together, ties by
// index. score[n] is replaced. w[rows][n] makes the output, x[tokens][n] are its inputs.
void node_prune_order(const float *w, uint32_t rows, uint32_t n, uint32_t block, const float *x,
                      uint32_t tokens, double *score, uint32_t *ret_order);

// The shape that removes `weights` weights (to the nearest block) of a layer at the least cost.
// attn_cost[kv_heads], ffn_cost[ffn / 16]: output error of removing that many from the end,
// cumulated: attn_cost[i] with i + 1 groups removed. At least one group and 16 channels stay.
// Where less can go than is wanted, as much as can goes.
typedef struct node_prune_costs {
    double *attn, *ffn;
} node_prune_costs;
node_layer_shape node_prune_shape(const node_model *model, uint32_t layer, uint64_t weights,
                                  const node_prune_costs *costs, double *ret_cost);

// Zeroes the share `sparsity` of each row of w[rows][n]; norm[n] of the inputs.
void node_prune_mask(const node_engine *engine, float *w, uint32_t rows, uint32_t n,
                     double sparsity, const float *norm);

#endif
