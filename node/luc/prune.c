#include "node/luc/prune.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

uint64_t node_layer_weights(const node_model *m, uint32_t heads, uint32_t kv_heads, uint32_t ffn) {
    const uint64_t attn = 2ull * m->hidden * m->head_size * ((uint64_t)heads + kv_heads);
    return attn + 3ull * m->hidden * ffn;
}

uint64_t node_shape_removed(const node_model *m, uint32_t layer, node_layer_shape shape) {
    const node_layer *l = &m->layer[layer];
    const uint32_t group = l->heads / l->kv_heads;
    return node_layer_weights(m, l->heads, l->kv_heads, l->ffn) -
           node_layer_weights(m, group * shape.kv_heads, shape.kv_heads, shape.ffn);
}

// Insertion of blocks in falling order of score: there are at most some hundreds.
static void sort_blocks(uint32_t blocks, const double *score, uint32_t *first) {
    for (uint32_t i = 0; i < blocks; i++) {
        uint32_t at = i;
        while (at > 0 && score[first[at - 1]] < score[i]) {
            first[at] = first[at - 1];
            at--;
        }
        first[at] = i;
    }
}

void node_prune_order(const float *w, uint32_t rows, uint32_t n, uint32_t block, const float *x,
                      uint32_t tokens, double *score, uint32_t *ret_order) {
    const uint32_t blocks = n / block;
    FL_ASSERT(blocks * block == n);
    memset(score, 0, n * sizeof(*score));
    for (size_t t = 0; t < tokens; t++)
        for (size_t c = 0; c < n; c++) score[c] += (double)x[t * n + c] * (double)x[t * n + c];
    for (size_t c = 0; c < n; c++) {
        double norm = 0;
        for (size_t r = 0; r < rows; r++) norm += (double)w[r * n + c] * (double)w[r * n + c];
        score[c] *= norm;
    }
    for (uint32_t b = 0; b < blocks; b++) {
        double sum = 0;
        for (uint32_t i = 0; i < block; i++) sum += score[b * block + i];
        score[b] = sum; // b <= b * block: nothing unread is overwritten
    }
    sort_blocks(blocks, score, ret_order);
    for (uint32_t b = blocks; b-- > 0;)
        for (uint32_t i = block; i-- > 0;) ret_order[b * block + i] = ret_order[b] * block + i;
}

node_layer_shape node_prune_shape(const node_model *m, uint32_t layer, uint64_t weights,
                                  const node_prune_costs *costs, double *ret_cost) {
    const node_layer *l = &m->layer[layer];
    const uint32_t group = l->heads / l->kv_heads;
    const uint64_t of_group = 2ull * m->hidden * m->head_size * (group + 1);
    const uint64_t of_block = 3ull * m->hidden * NODE_PRUNE_CHANNELS;
    const uint32_t blocks = l->ffn / NODE_PRUNE_CHANNELS - 1; // that may go
    node_layer_shape best = {l->kv_heads, l->ffn};
    double least = INFINITY;
    for (uint32_t k = 0; k < l->kv_heads; k++) {
        const uint64_t part = k * of_group;
        const uint64_t rest = weights > part ? weights - part : 0;
        const uint64_t want = (rest + of_block / 2) / of_block;
        if (part > weights + of_block / 2) break;
        const uint32_t b = want > blocks ? blocks : (uint32_t)want;
        double cost = (k == 0 ? 0 : costs->attn[k - 1]) + (b == 0 ? 0 : costs->ffn[b - 1]);
        if (want > blocks) cost += 1e30; // too little goes: only when nothing else will do
        if (!(cost < least)) continue;
        least = cost;
        best = (node_layer_shape){l->kv_heads - k, l->ffn - b * NODE_PRUNE_CHANNELS};
    }
    *ret_cost = least;
    return best;
}

typedef struct mask_run {
    float *w;
    uint32_t n, gone; // of each row
    const float *norm;
} mask_run;

// Positive floats order as their bits do: the score at rank `gone`, found bit by bit.
static uint32_t score_bits(const mask_run *r, const float *row, size_t c) {
    const float s = fabsf(row[c]) * r->norm[c];
    uint32_t bits;
    memcpy(&bits, &s, sizeof(bits));
    return bits;
}

static void mask_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const mask_run *r = ctx;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        float *row = r->w + i * r->n;
        uint32_t limit = 0; // the largest value that at most `gone` scores are below
        for (uint32_t bit = 1u << 30; bit != 0; bit >>= 1) {
            uint32_t below = 0;
            for (uint32_t c = 0; c < r->n; c++) below += score_bits(r, row, c) < (limit | bit);
            if (below <= r->gone) limit |= bit;
        }
        uint32_t left = r->gone;
        for (uint32_t c = 0; c < r->n; c++) left -= score_bits(r, row, c) < limit;
        for (uint32_t c = 0; c < r->n; c++) {
            const uint32_t s = score_bits(r, row, c);
            if (s > limit || (s == limit && left == 0)) continue;
            if (s == limit) left--;
            row[c] = 0.0f;
        }
    }
}

void node_prune_mask(const node_engine *engine, float *w, uint32_t rows, uint32_t n,
                     double sparsity, const float *norm) {
    mask_run r = {w, n, (uint32_t)lround(sparsity * n), norm};
    if (r.gone == 0) return;
    fl_pool_run(engine->pool, rows, 16, mask_rows, &r);
}
