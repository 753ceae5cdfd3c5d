// container.h: names that make a GGUF file a compressed model.
//
// The file keeps the keys of its architecture, with the sizes of the original model, and has
// `general.alignment` 64 (or a multiple). A packed matrix is a one-dimensional I8 tensor of
// fl_packed_size bytes named "<original name>.packed": any GGUF tool can list it, and it is used as
// it lies in the mapping. How many bits it has follows from its size. Matrices that are not packed,
// and all vectors, stay ordinary tensors. Arrays have one element a layer.
#ifndef NODE_MODEL_CONTAINER_H
#define NODE_MODEL_CONTAINER_H

#define NODE_CONTAINER_VERSION   "fleetune.version" // u32, NODE_CONTAINER_VERSION_1
#define NODE_CONTAINER_VERSION_1 1u
#define NODE_CONTAINER_ALIGNMENT 64u
#define NODE_CONTAINER_PACKED    ".packed" // suffix of a packed tensor's name

#define NODE_LUC_POLICY      "fleetune.luc.policy"            // string: luc, uniform, paper
#define NODE_LUC_BITS        "fleetune.luc.bits"              // u32[]: 2..8, or 16 for untouched
#define NODE_LUC_SPARSITY    "fleetune.luc.sparsity"          // f32[]: share of weights removed
#define NODE_LUC_SENSE_QUANT "fleetune.luc.sensitivity_quant" // f32[]: relative squared error
#define NODE_LUC_SENSE_PRUNE "fleetune.luc.sensitivity_prune" // f32[]: relative squared error
#define NODE_LUC_HEAD_BITS   "fleetune.luc.head_bits"         // u32: of embedding and head

// What structured pruning left of each layer: u32[] each.
#define NODE_LAYER_HEADS    "fleetune.layer.heads"
#define NODE_LAYER_KV_HEADS "fleetune.layer.kv_heads"
#define NODE_LAYER_FFN      "fleetune.layer.ffn"

#endif
