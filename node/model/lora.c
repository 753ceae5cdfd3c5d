#include "node/model/lora.h"

#include <math.h>

#include "common/rng.h"

void node_lora_draw_a(uint64_t seed, uint32_t layer, node_module module, uint32_t rank,
                      uint32_t cols, float *a) {
    const uint64_t key = fl_rng_key(seed, layer, (uint64_t)module);
    const float bound = sqrtf(3.0f / (float)cols); // both correctly rounded by IEEE 754
    const size_t count = (size_t)rank * cols;
    for (size_t i = 0; i < count; i++) // 24 bits: the difference is exact, one rounding follows
        a[i] = (2.0f * fl_rng_unit(key, i) - 1.0f) * bound;
}

static bool all_zero(const float *b, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (b[i] != 0.0f) return false;
    return true;
}

const node_lora *node_lora_at_work(const node_lora *lora, const node_model *model, uint32_t layer) {
    for (int m = 0; lora != NULL && m < NODE_MODULES; m++) {
        const float *b = lora->layer[layer].b[m];
        const size_t count = (size_t)model->layer[layer].linear[m].rows * lora->rank;
        if (lora->layer[layer].a[m] != NULL && !all_zero(b, count)) return lora;
    }
    return NULL;
}
