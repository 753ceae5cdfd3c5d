// model.h: a language model whose weights are mapped, read-only, from a GGUF file.
//
// `llama` architecture: token embedding, L layers of (RMSNorm, attention with rotary positions and
// grouped queries, RMSNorm, SwiGLU), final RMSNorm, head (its own or the embedding's matrix).
// `qwen2` is the same with biases on q, k, v and half-split rotation. A compressed model (see
// container.h) is the same structure with packed matrices, and may have fewer heads and FFN
// channels in some layers. Opaque resources live behind `file`.
#ifndef NODE_MODEL_MODEL_H
#define NODE_MODEL_MODEL_H

#include "common/status.h"
#include "node/model/gguf.h"

enum {
    NODE_LAYERS_MAX = 256,
    NODE_EXITS_MAX = 8,
    NODE_EXITS = 4, // unless set otherwise
    NODE_HEAD_SIZE_MAX = 256,
    NODE_WIDTH_MAX = 1 << 17, // hidden, ffn
    NODE_VOCABULARY_MAX = 1 << 20,
    NODE_CONTEXT_MAX = 1 << 20,
    NODE_TYPE_PACKED = 1000, // no ggml type: the form of kernels/packed.h
};

// The seven linear maps of a layer, in the order in which everything that is "per module" is kept.
typedef enum node_module {
    NODE_Q,
    NODE_K,
    NODE_V,
    NODE_O,
    NODE_GATE,
    NODE_UP,
    NODE_DOWN,
    NODE_MODULES
} node_module;

// W[rows][cols], y = W x. `type` is a ggml type id or, for packed matrices, NODE_TYPE_PACKED.
typedef struct node_matrix {
    uint32_t type;
    uint32_t bits; // 2..8 of a packed matrix, else 0
    uint32_t rows, cols;
    const uint8_t *data;
    size_t size;
} node_matrix;

typedef struct node_layer {
    node_matrix linear[NODE_MODULES];
    const float *bias[3];     // q, k, v; NULL when the model has none
    const float *attn_norm;   // [hidden]
    const float *ffn_norm;    // [hidden]
    uint32_t heads, kv_heads; // of this layer: structured pruning may have removed kv groups
    uint32_t ffn;             // channels of this layer
} node_layer;

// How `compress` made the model: what `inspect` shows.
typedef struct node_luc_policy {
    char name[16];
    uint32_t head_bits;
    uint32_t bits[NODE_LAYERS_MAX];
    float sparsity[NODE_LAYERS_MAX];
    float sensitivity_quant[NODE_LAYERS_MAX];
    float sensitivity_prune[NODE_LAYERS_MAX];
} node_luc_policy;

typedef struct node_model {
    char architecture[32];
    char name[64];
    uint32_t layers, hidden, ffn, heads, kv_heads, head_size, vocabulary, context;
    uint32_t rope_size; // dimensions of a head that rotate (even)
    bool rope_half;     // false: pairs (2i, 2i+1), as GGUF's llama stores; true: (i, i + n/2)
    float rope_base, norm_epsilon;
    const float *rope_factors; // [rope_size / 2] frequency divisors (llama3 scaling); NULL for none
    double rope_freq[NODE_HEAD_SIZE_MAX / 2]; // [rope_size / 2] angle per position, factors applied
    node_layer layer[NODE_LAYERS_MAX];
    node_matrix embedding; // [vocabulary][hidden]
    node_matrix head;      // [vocabulary][hidden]; equals `embedding` when tied
    bool tied;
    const float *final_norm;             // [hidden]
    uint32_t exits;                      // number of exits, the last one is the model's own
    uint32_t exit_layer[NODE_EXITS_MAX]; // layers below each exit: it follows layer exit_layer - 1
    bool compressed;                     // made by `compress`: has a policy
    node_luc_policy policy;              // zeros unless compressed
    uint64_t bytes;                      // of the file
    node_gguf *file;                     // owns the mapping and the metadata
    struct node_resident *resident;      // what is in memory when (resident.h); NULL: all of it
} node_model;

// Maps the file and checks every shape. FL_EFORMAT names the tensor or key that is wrong,
// FL_EUNSUPPORTED an architecture or type that is not known. Vectors must be finite; matrices are
// not read.
fl_status node_model_open(const char *path, node_model **ret, fl_err *err) FL_NODISCARD;
// The same over bytes that the caller keeps alive, 64-byte aligned.
fl_status node_model_open_bytes(fl_bytes bytes, node_model **ret, fl_err *err) FL_NODISCARD;
void node_model_close(node_model *model); // NULL is fine

// Exits after `count` evenly spaced layers: layer i of count ends at round(layers * (i+1) / count);
// the last is `layers`. 1 <= count <= min(layers, NODE_EXITS_MAX).
void node_model_set_exits(node_model *model, uint32_t count);

// "blk.<layer>.attn_q.weight" and so on. name[NODE_GGUF_NAME_MAX + 1].
void node_model_linear_name(uint32_t layer, node_module module, char *name);

// Row r of a matrix as floats, out[cols]. The definition, not fast.
void node_matrix_row(const node_matrix *w, uint32_t row, float *out);

#endif
