// adapter.h: everything that tuning changes: the B's of all layers, the gain of every exit, the
// vote; in memory, in a file, and as the flat spans that a federation sends.
//
//   Spans     span l < layers: the seven B's of layer l, [rows][rank] each, in module order, one
//             after the other. Span layers + t: the gain of exit t, [hidden]. A span has a version,
//             counted by the federation; 0 is "as born" (B = 0, gain = the model's final norm).
//   A         is drawn from (seed, layer, module) and is in no file (node/model/lora.h).
//   File      little-endian: "FLTADPT1"; u64 model identity; u32 layers, hidden, vocabulary, rank;
//             f32 alpha; u64 seed; u32 exits, then u32 layer of each; u32 vote mode, u32 fell back,
//             f32 weight and f32 temperature of each exit; u32 number of stored spans, and of each
//             u32 id (rising), u64 version, u32 count, f32[count]; last u32 CRC-32 of all before.
//             A layer whose version and B's are zero is left out; exit gains are always there. So
//             an adapter has exactly one file, and every accepted file writes back to itself.
//   Source    low-rank adapters: Hu et al. 2021, arXiv 2106.09685; frozen A: arXiv 2403.12313.
#ifndef NODE_TUNE_ADAPTER_H
#define NODE_TUNE_ADAPTER_H

#include "common/arena.h"
#include "node/exits/vote.h"
#include "node/model/lora.h"

enum { NODE_ADAPTER_RANK = 8, NODE_SPANS_MAX = NODE_LAYERS_MAX + NODE_EXITS_MAX };

typedef struct node_adapter_opts {
    uint32_t rank; // 1..64
    float alpha;   // the adapter's output is scaled by alpha / rank
    uint64_t seed; // of the A's; equal on all nodes of a run
} node_adapter_opts;

typedef struct node_adapter {
    node_lora lora; // what the forward pass sees; points into this structure and its block
    node_vote vote;
    node_adapter_opts opts;
    uint64_t model_id;
    uint32_t exit_layer[NODE_EXITS_MAX];
    uint32_t hidden, vocabulary;
    uint64_t version[NODE_SPANS_MAX];
    uint32_t span_count[NODE_SPANS_MAX]; // floats
    float *span[NODE_SPANS_MAX];
    node_lora_layer layer[NODE_LAYERS_MAX];
    void *block; // of node_adapter_open
} node_adapter;

// rank 8, alpha 16, seed 1.
node_adapter_opts node_adapter_defaults(void);

// Bytes that bind takes from an arena (the structure itself not counted).
size_t node_adapter_size(const node_model *model, uint32_t rank);

// Takes memory, draws every A, sets B = 0, gains = the final norm, vote = the last exit. *adapter
// must not move afterwards. The options have been checked; a counting arena only counts.
void node_adapter_bind(node_adapter *adapter, const node_model *model,
                       const node_adapter_opts *opts, fl_arena *arena);

// The same with one allocation of its own. FL_EARG for a rank or alpha out of range, FL_ENOMEM.
fl_status node_adapter_open(const node_model *model, const node_adapter_opts *opts,
                            node_adapter **ret, fl_err *err) FL_NODISCARD;
void node_adapter_close(node_adapter *adapter); // NULL is fine

// A number that differs between models whose shapes, types or sampled weights differ.
uint64_t node_adapter_model_id(const node_model *model);

uint32_t node_adapter_spans(const node_adapter *adapter); // layers + exits
// Floats of a layer's B's: sum of rows of its seven matrices, times rank.
uint32_t node_adapter_layer_count(const node_model *model, uint32_t layer, uint32_t rank);

// Copies of whole spans; `values` has span_count[id] floats and id < node_adapter_spans().
void node_adapter_get(const node_adapter *adapter, uint32_t id, float *values);
// FL_EFORMAT when a value is not finite; then nothing has changed.
fl_status node_adapter_set(node_adapter *adapter, uint32_t id, const float *values,
                           uint64_t version, fl_err *err) FL_NODISCARD;
// delta = span - base.
void node_adapter_delta(const node_adapter *adapter, uint32_t id, const float *base, float *delta);

// Bytes of the file. out[size] of node_adapter_encode is exactly filled.
size_t node_adapter_file_size(const node_adapter *adapter);
void node_adapter_encode(const node_adapter *adapter, uint8_t *out);

// Opens an adapter from the bytes of a file. Sets the model's exits to the adapter's. FL_EFORMAT:
// not an adapter, damaged, or with values that are not finite; FL_EARG: made for another model
// (`any_base` accepts a model of the same shapes with other weights, as a compressed one is of its
// original). On failure the model's exits are what they were.
fl_status node_adapter_decode(fl_bytes bytes, node_model *model, bool any_base, node_adapter **ret,
                              fl_err *err) FL_NODISCARD;

fl_status node_adapter_save(const node_adapter *adapter, const char *path,
                            fl_err *err) FL_NODISCARD;
fl_status node_adapter_load(const char *path, node_model *model, bool any_base, node_adapter **ret,
                            fl_err *err) FL_NODISCARD;

#endif
