// lora.h: low-rank adapters as the forward pass sees them: y = W x + scale * B (A x).
//
// A is frozen: drawn from a counter RNG keyed by (seed, layer, module), the same on every machine
// and never sent; only B is trained, sent and averaged, so that the mean of the B's is exactly the
// mean of the updates (architecture 1.3). LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1;
// frozen A: Sun et al. 2024 (FFA-LoRA), arXiv 2403.12313.
#ifndef NODE_MODEL_LORA_H
#define NODE_MODEL_LORA_H

#include "node/model/model.h"

typedef struct node_lora_layer {
    const float *a[NODE_MODULES]; // [rank][cols]; NULL: no adapter on this map
    float *b[NODE_MODULES];       // [rows][rank]
} node_lora_layer;

typedef struct node_lora {
    uint32_t rank;
    float scale; // alpha / rank
    uint32_t layers;
    node_lora_layer *layer;           // [layers]
    float *exit_gain[NODE_EXITS_MAX]; // [hidden] each: RMSNorm gain of every exit
    uint32_t exits;
} node_lora;

// Fills a[rank][cols] for one module: uniform in [-1, 1) * sqrt(3 / cols), so that the variance is
// 1 / cols. Integer draws, exactly the same floats on every platform.
void node_lora_draw_a(uint64_t seed, uint32_t layer, node_module module, uint32_t rank,
                      uint32_t cols, float *a);

// lora, or NULL where all B of this layer are zero, so that it changes nothing: what a forward pass
// takes that nobody goes back through. Layers below the trained window stay that way.
const node_lora *node_lora_at_work(const node_lora *lora, const node_model *model, uint32_t layer);

#endif
