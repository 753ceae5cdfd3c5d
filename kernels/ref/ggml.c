// The table of types, and the types of 1 and 32 elements a block.
#include "kernels/ggml.h"

#include "kernels/packed.h"

#include <string.h>

const fl_ggml_type fl_ggml_types[] = {
#define X(name, id, elements, bytes) {id, #name, elements, bytes, fl_ggml_##name##_to_f32},
    FL_GGML_TYPE_LIST(X)
#undef X
        {0, NULL, 0, 0, NULL},
};

const fl_ggml_type *fl_ggml_type_find(uint32_t id) {
    for (const fl_ggml_type *t = fl_ggml_types; t->name != NULL; t++)
        if (t->id == id) return t;
    return NULL;
}

bool fl_ggml_row_size(uint32_t id, size_t n, size_t *ret) {
    const fl_ggml_type *t = fl_ggml_type_find(id);
    if (t == NULL || n % t->block_elements != 0) return false;
    const size_t blocks = n / t->block_elements;
    if (blocks > SIZE_MAX / t->block_bytes) return false;
    *ret = blocks * t->block_bytes;
    return true;
}

void fl_ggml_row_to_f32_ref(uint32_t id, const uint8_t *src, size_t n, float *out) {
    const fl_ggml_type *t = fl_ggml_type_find(id);
    FL_ASSERT(t != NULL);
    t->to_f32(src, n / t->block_elements, out);
}

void fl_ggml_row_to_f32(uint32_t id, const uint8_t *src, size_t n, float *out) {
    fl_ggml_row_to_f32_ref(id, src, n, out);
}

static float half_at(const uint8_t *p) {
    return fl_f16_to_f32((uint16_t)(p[0] | p[1] << 8));
}

static uint32_t word_at(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}

void fl_ggml_F32_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (size_t i = 0; i < blocks; i++) out[i] = float_of(word_at(src + 4 * i));
}

void fl_ggml_F16_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (size_t i = 0; i < blocks; i++) out[i] = half_at(src + 2 * i);
}

void fl_ggml_BF16_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (size_t i = 0; i < blocks; i++)
        out[i] = float_of((uint32_t)(src[2 * i] | src[2 * i + 1] << 8) << 16);
}

void fl_ggml_Q4_0_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 18, out += 32) {
        const float d = half_at(src);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)((src[2 + i] & 15) - 8);
            out[i + 16] = d * (float)((src[2 + i] >> 4) - 8);
        }
    }
}

void fl_ggml_Q4_1_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 20, out += 32) {
        const float d = half_at(src), m = half_at(src + 2);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(src[4 + i] & 15) + m;
            out[i + 16] = d * (float)(src[4 + i] >> 4) + m;
        }
    }
}

void fl_ggml_Q5_0_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 22, out += 32) {
        const float d = half_at(src);
        const uint32_t high = word_at(src + 2);
        for (int i = 0; i < 16; i++) {
            const int q0 = (src[6 + i] & 15) | (int)(high >> i & 1) << 4;
            const int q1 = src[6 + i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
            out[i] = d * (float)(q0 - 16);
            out[i + 16] = d * (float)(q1 - 16);
        }
    }
}

void fl_ggml_Q5_1_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 24, out += 32) {
        const float d = half_at(src), m = half_at(src + 2);
        const uint32_t high = word_at(src + 4);
        for (int i = 0; i < 16; i++) {
            const int q0 = (src[8 + i] & 15) | (int)(high >> i & 1) << 4;
            const int q1 = src[8 + i] >> 4 | (int)(high >> (i + 16) & 1) << 4;
            out[i] = d * (float)q0 + m;
            out[i + 16] = d * (float)q1 + m;
        }
    }
}

void fl_ggml_Q8_0_to_f32(const uint8_t *src, size_t blocks, float *out) {
    for (; blocks > 0; blocks--, src += 34, out += 32) {
        const float d = half_at(src);
        for (int i = 0; i < 32; i++) out[i] = d * (float)(int8_t)src[2 + i];
    }
}
