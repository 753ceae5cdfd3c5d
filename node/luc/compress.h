// compress.h: a model file in, a compressed model file out (node/model/container.h).
//
// Two passes over the layers. The first measures (sensitivity.h), then the policy decides
// (policy.h). The second runs the calibration text through the layers compressed so far, so that
// each layer is fitted to the inputs it will really get, removes what the policy removes, rounds
// with feedback, and writes the layer. The file appears only when it is complete.
#ifndef NODE_LUC_COMPRESS_H
#define NODE_LUC_COMPRESS_H

#include "node/luc/policy.h"
#include "node/luc/prune.h"

enum {
    NODE_COMPRESS_TOKENS = 2048, // of calibration, when not said
    NODE_COMPRESS_TOKENS_MAX = 16384,
    NODE_COMPRESS_WINDOW = 256, // tokens that see each other
    NODE_COMPRESS_HEAD_BITS = 8,
};

typedef struct node_compress_opts {
    node_policy_kind policy;
    node_prune_kind prune;
    double bits;          // mean over the layers' stored weights, 2..8
    double sparsity;      // share of the layers' weights removed, 0..NODE_PRUNE_MOST
    uint32_t head_bits;   // of embedding and head, 2..8; 0: NODE_COMPRESS_HEAD_BITS
    fl_bytes calibration; // UTF-8 text; empty: node_luc_text
    const int32_t *ids;   // tokens in place of a text, [id_count]; NULL: the text's
    size_t id_count;
    uint32_t tokens; // of calibration used; 0: NODE_COMPRESS_TOKENS
    uint64_t seed;   // chooses the windows of the text
    // Called from the caller's thread; done counts up to total. May be NULL.
    void (*progress)(void *ctx, const char *stage, uint32_t done, uint32_t total);
    void *ctx;
} node_compress_opts;

typedef struct node_compress_layer {
    uint32_t bits; // mean over its weights, rounded
    double mean_bits;
    uint8_t matrix_bits[NODE_MODULES];
    double sparsity;
    double sensitivity_quant; // at these bits
    double sensitivity_prune; // at its own sparsity, or at the requested one where that is 0
    double loss_weight;       // predicted loss a unit of sensitivity
    uint32_t heads, kv_heads, ffn;
} node_compress_layer;

typedef struct node_compress_result {
    uint32_t layers;
    node_compress_layer layer[NODE_LAYERS_MAX];
    double mean_bits, mean_sparsity; // over weights, embedding and head left out
    uint32_t head_bits;
    uint64_t bytes_in, bytes_out, layer_bytes; // files; packed layers alone
    uint32_t calibration_tokens;
} node_compress_result;

// Our own text, for when none is given.
extern const char node_luc_text[];

// FL_EARG for options out of range, FL_ESTATE when the model is compressed already, FL_EFORMAT for
// text that is not UTF-8 or too short, or a damaged model; FL_ENOMEM; what writing a file can give.
fl_status node_compress(const node_engine *engine, const node_model *model,
                        const node_compress_opts *opts, const char *out_path,
                        node_compress_result *ret, fl_err *err) FL_NODISCARD;

#endif
