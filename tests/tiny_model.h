// tiny_model.h: a small random model in memory, float or packed, for tests that need weights and no
// file. Everything is a function of the seed.
#ifndef FL_TESTS_TINY_MODEL_H
#define FL_TESTS_TINY_MODEL_H

#include "kernels/ggml.h"
#include "kernels/packed.h"
#include "kernels/rope.h"
#include "node/model/model.h"
#include "tests/check.h"

typedef struct tiny_shape {
    uint32_t layers, hidden, ffn, heads, kv_heads, head_size, vocabulary, exits;
    uint32_t bits; // 0: float matrices; 2..8: packed
    bool rope_half, biased;
} tiny_shape;

static const tiny_shape tiny_default = {.layers = 4,
                                        .hidden = 24,
                                        .ffn = 40,
                                        .heads = 4,
                                        .kv_heads = 2,
                                        .head_size = 6,
                                        .vocabulary = 67,
                                        .exits = 2};

typedef struct tiny_model {
    node_model model;
    void *taken[NODE_LAYERS_MAX * 12];
    size_t count;
} tiny_model;

static inline void *tiny_take(tiny_model *t, size_t size) {
    void *p = aligned_alloc(64, (size + 63) / 64 * 64 + 64);
    if (p == NULL || t->count == FL_COUNT(t->taken)) abort();
    memset(p, 0, (size + 63) / 64 * 64 + 64);
    return t->taken[t->count++] = p;
}

static inline float *tiny_floats(tiny_model *t, size_t n, float middle, float spread) {
    float *p = tiny_take(t, n * sizeof(float));
    for (size_t i = 0; i < n; i++) p[i] = middle + spread * t_randf();
    return p;
}

// One row of a tile to codes: the smallest and largest weight are met.
static inline void tiny_quantise_row(const float *w, uint32_t n, uint32_t bits, uint8_t *codes,
                                     uint16_t *scale, uint16_t *minimum) {
    float low = w[0], high = w[0];
    for (uint32_t i = 1; i < n; i++) low = fminf(low, w[i]), high = fmaxf(high, w[i]);
    const float top = (float)((1u << bits) - 1);
    *scale = fl_f16_from_f32((high - low) / top);
    *minimum = fl_f16_from_f32(low);
    const float step = fl_f16_to_f32(*scale), base = fl_f16_to_f32(*minimum);
    for (uint32_t i = 0; i < n; i++)
        codes[i] = (uint8_t)fminf(fmaxf(rintf((w[i] - base) / step), 0.0f), top);
}

static inline void *tiny_pack(tiny_model *t, const float *w, uint32_t rows, uint32_t cols,
                              uint32_t bits, size_t *ret_size) {
    if (!fl_packed_size(rows, cols, bits, ret_size)) abort();
    uint8_t *out = tiny_take(t, *ret_size), *tile = out;
    for (uint32_t r = 0; r < rows; r += FL_PACKED_ROWS)
        for (uint32_t c = 0; c < cols; c += FL_PACKED_GROUP) {
            static uint8_t codes[FL_PACKED_CODES];
            uint16_t scale[FL_PACKED_ROWS] = {0}, minimum[FL_PACKED_ROWS] = {0};
            memset(codes, 0, sizeof(codes));
            for (uint32_t i = 0; i < FL_PACKED_ROWS && r + i < rows; i++)
                tiny_quantise_row(w + (size_t)(r + i) * cols + c,
                                  cols - c < FL_PACKED_GROUP ? cols - c : FL_PACKED_GROUP, bits,
                                  codes + (size_t)i * FL_PACKED_GROUP, &scale[i], &minimum[i]);
            fl_packed_tile_write(tile, bits, codes, scale, minimum);
            tile += fl_packed_tile_size(bits);
        }
    return out;
}

static inline node_matrix tiny_matrix(tiny_model *t, uint32_t rows, uint32_t cols, uint32_t bits,
                                      float spread) {
    float *w = tiny_floats(t, (size_t)rows * cols, 0.0f, spread);
    node_matrix m = {.type = FL_GGML_F32,
                     .rows = rows,
                     .cols = cols,
                     .data = (const uint8_t *)w,
                     .size = (size_t)rows * cols * sizeof(float)};
    if (bits == 0) return m;
    m.type = NODE_TYPE_PACKED;
    m.bits = bits;
    m.data = tiny_pack(t, w, rows, cols, bits, &m.size);
    return m;
}

static inline void tiny_layer(tiny_model *t, const tiny_shape *s, node_layer *l) {
    const uint32_t q = s->heads * s->head_size, kv = s->kv_heads * s->head_size, d = s->hidden;
    const uint32_t rows[NODE_MODULES] = {q, kv, kv, d, s->ffn, s->ffn, d};
    const uint32_t cols[NODE_MODULES] = {d, d, d, q, d, d, s->ffn};
    for (int m = 0; m < NODE_MODULES; m++)
        l->linear[m] = tiny_matrix(t, rows[m], cols[m], s->bits, 1.7f / sqrtf((float)cols[m]));
    for (int b = 0; b < 3 && s->biased; b++) l->bias[b] = tiny_floats(t, rows[b], 0.0f, 0.3f);
    l->attn_norm = tiny_floats(t, d, 1.0f, 0.3f);
    l->ffn_norm = tiny_floats(t, d, 1.0f, 0.3f);
    l->heads = s->heads;
    l->kv_heads = s->kv_heads;
    l->ffn = s->ffn;
}

static inline tiny_model *tiny_open(const tiny_shape *s) {
    tiny_model *t = calloc(1, sizeof(*t));
    if (t == NULL) abort();
    node_model *m = &t->model;
    snprintf(m->architecture, sizeof(m->architecture), "llama");
    snprintf(m->name, sizeof(m->name), "tiny");
    m->layers = s->layers, m->hidden = s->hidden, m->ffn = s->ffn, m->heads = s->heads;
    m->kv_heads = s->kv_heads, m->head_size = s->head_size, m->vocabulary = s->vocabulary;
    m->context = 512, m->rope_size = s->head_size, m->rope_half = s->rope_half;
    m->rope_base = 10000.0f, m->norm_epsilon = 1e-5f;
    fl_rope_freq(m->rope_size, (double)m->rope_base, NULL, m->rope_freq);
    for (uint32_t l = 0; l < s->layers; l++) tiny_layer(t, s, &m->layer[l]);
    m->embedding = tiny_matrix(t, s->vocabulary, s->hidden, s->bits == 0 ? 0 : 8, 1.0f);
    m->head = m->embedding;
    m->tied = true;
    m->final_norm = tiny_floats(t, s->hidden, 1.0f, 0.3f);
    node_model_set_exits(m, s->exits);
    return t;
}

static inline void tiny_close(tiny_model *t) {
    for (size_t i = 0; i < t->count; i++) free(t->taken[i]);
    free(t);
}

#endif
