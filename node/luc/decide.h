// decide.h: from sensitivities to bits, sparsity and shape of every layer.
#ifndef NODE_LUC_DECIDE_H
#define NODE_LUC_DECIDE_H

#include "node/luc/compress.h"
#include "node/luc/sensitivity.h"

typedef struct node_decision {
    uint8_t bits[NODE_LAYERS_MAX][NODE_MODULES];
    double sparsity[NODE_LAYERS_MAX];
    node_layer_shape shape[NODE_LAYERS_MAX];
} node_decision;

// Bits that a policy may choose, so that they are measured. Both included.
void node_decide_range(node_policy_kind policy, double bits, uint32_t *ret_low, uint32_t *ret_high);

size_t node_decide_size(const node_model *model); // bytes of scratch, 8-byte aligned

// Sparsity first, then bits under the bytes that `uniform` would take with the same shapes. luc
// chooses the bits of each matrix: the layers' losses differ less than those of a layer's matrices.
fl_status node_decide(const node_model *model, const node_compress_opts *opts,
                      const node_sense *sense, void *scratch, node_decision *ret,
                      fl_err *err) FL_NODISCARD;

// Relative error that this sparsity predicts for a layer; between measured levels by a straight
// line.
double node_decide_prune_error(const node_sense *sense, uint32_t layer, double sparsity);

#endif
