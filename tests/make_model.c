// Writes a model with the shapes of a published one and random weights, front to back, without ever
// holding more of it than one run of rows: what the programs do with a model of a gigabyte can be
// tested without one.
//
//   make_model OUT.gguf --shape tinyllama|qwen2.5-0.5b|smollm2 [--type q4_0|q8_0|f16] [--layers N]
//              [--seed S]
//
// tinyllama: TinyLlama-1.1B (llama, 22 layers, its own head, SentencePiece). qwen2.5-0.5b: biases
// on q, k and v, half-split rotation, head tied to an embedding of 151,936 rows. smollm2:
// SmolLM2-135M. As in published files the embedding and the head stay at 8 bits when the layers
// have 4.
#include "common/checked.h"
#include "common/rng.h"
#include "kernels/ggml.h"
#include "kernels/packed.h"
#include "node/model/gguf_write.h"
#include "node/model/model.h"
#include "tests/make_vocabulary.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEAD_SIZE = 64 };

typedef struct shape {
    const char *name, *title, *architecture;
    uint32_t layers, hidden, ffn, heads, kv_heads, vocabulary, context;
    float rope_base, epsilon;
    bool biases, untied, pieces;
} shape;

static const shape shapes[] = {
    {.name = "tinyllama",
     .title = "TinyLlama-1.1B shapes",
     .architecture = "llama",
     .layers = 22,
     .hidden = 2048,
     .ffn = 5632,
     .heads = 32,
     .kv_heads = 4,
     .vocabulary = 32000,
     .context = 2048,
     .rope_base = 1e4f,
     .epsilon = 1e-5f,
     .untied = true,
     .pieces = true},
    {.name = "qwen2.5-0.5b",
     .title = "Qwen2.5-0.5B shapes",
     .architecture = "qwen2",
     .layers = 24,
     .hidden = 896,
     .ffn = 4864,
     .heads = 14,
     .kv_heads = 2,
     .vocabulary = 151936,
     .context = 32768,
     .rope_base = 1e6f,
     .epsilon = 1e-6f,
     .biases = true},
    {.name = "smollm2",
     .title = "SmolLM2-135M shapes",
     .architecture = "llama",
     .layers = 30,
     .hidden = 576,
     .ffn = 1536,
     .heads = 9,
     .kv_heads = 3,
     .vocabulary = 49152,
     .context = 8192,
     .rope_base = 1e5f,
     .epsilon = 1e-5f},
};

typedef struct options {
    shape shape;
    uint32_t type; // of the layers' matrices
    uint64_t seed;
    const char *out;
} options;

typedef struct tensor {
    char name[NODE_GGUF_NAME_MAX + 1];
    uint32_t type;
    uint32_t rows, cols; // rows 0: a vector
    float middle, spread;
} tensor;

typedef struct maker {
    const options *options;
    node_gguf_writer *w;
    tensor *tensor;
    uint32_t count;
} maker;

static void *need(void *p) {
    if (p == NULL) abort();
    return p;
}

static void matrix(maker *m, uint32_t type, uint32_t rows, uint32_t cols, const char *name) {
    tensor *t = &m->tensor[m->count++];
    // Random maps that neither blow the residual stream up nor let it die.
    *t = (tensor){.type = type, .rows = rows, .cols = cols, .spread = 0.5f / sqrtf((float)cols)};
    snprintf(t->name, sizeof(t->name), "%s", name);
    const uint64_t dim[2] = {cols, rows};
    node_gguf_write_tensor(m->w, t->name, type, 2, dim);
}

static void vector(maker *m, uint32_t count, float middle, const char *name) {
    tensor *t = &m->tensor[m->count++];
    *t = (tensor){.type = FL_GGML_F32, .cols = count, .middle = middle, .spread = 0.1f};
    snprintf(t->name, sizeof(t->name), "%s", name);
    const uint64_t dim[1] = {count};
    node_gguf_write_tensor(m->w, t->name, FL_GGML_F32, 1, dim);
}

static void declare_layer(maker *m, uint32_t layer) {
    const shape *s = &m->options->shape;
    const uint32_t q = s->heads * HEAD_SIZE, kv = s->kv_heads * HEAD_SIZE;
    const uint32_t rows[NODE_MODULES] = {q, kv, kv, s->hidden, s->ffn, s->ffn, s->hidden};
    const uint32_t cols[NODE_MODULES] = {s->hidden, s->hidden, s->hidden, q,
                                         s->hidden, s->hidden, s->ffn};
    static const char *const bias[] = {"attn_q", "attn_k", "attn_v"};
    char name[NODE_GGUF_NAME_MAX + 1];
    snprintf(name, sizeof(name), "blk.%u.attn_norm.weight", layer);
    vector(m, s->hidden, 1.0f, name);
    for (int i = 0; i < NODE_MODULES; i++) {
        node_model_linear_name(layer, (node_module)i, name);
        matrix(m, m->options->type, rows[i], cols[i], name);
    }
    for (int i = 0; s->biases && i < 3; i++) {
        snprintf(name, sizeof(name), "blk.%u.%s.bias", layer, bias[i]);
        vector(m, rows[i], 0.0f, name);
    }
    snprintf(name, sizeof(name), "blk.%u.ffn_norm.weight", layer);
    vector(m, s->hidden, 1.0f, name);
}

static void declare(maker *m) {
    const shape *s = &m->options->shape;
    const uint32_t wide = m->options->type == FL_GGML_Q4_0 ? FL_GGML_Q8_0 : m->options->type;
    matrix(m, wide, s->vocabulary, s->hidden, "token_embd.weight");
    for (uint32_t l = 0; l < s->layers; l++) declare_layer(m, l);
    vector(m, s->hidden, 1.0f, "output_norm.weight");
    if (s->untied) matrix(m, wide, s->vocabulary, s->hidden, "output.weight");
}

static void write_keys(maker *m) {
    const shape *s = &m->options->shape;
    node_gguf_writer *w = m->w;
    char key[64];
#define KEY(suffix) (snprintf(key, sizeof(key), "%s." suffix, s->architecture), key)
    node_gguf_write_text(w, "general.architecture", s->architecture);
    node_gguf_write_text(w, "general.name", s->title);
    node_gguf_write_u32(w, KEY("block_count"), s->layers);
    node_gguf_write_u32(w, KEY("embedding_length"), s->hidden);
    node_gguf_write_u32(w, KEY("feed_forward_length"), s->ffn);
    node_gguf_write_u32(w, KEY("attention.head_count"), s->heads);
    node_gguf_write_u32(w, KEY("attention.head_count_kv"), s->kv_heads);
    node_gguf_write_u32(w, KEY("context_length"), s->context);
    if (!s->biases) node_gguf_write_u32(w, KEY("rope.dimension_count"), HEAD_SIZE);
    node_gguf_write_f32(w, KEY("rope.freq_base"), s->rope_base);
    node_gguf_write_f32(w, KEY("attention.layer_norm_rms_epsilon"), s->epsilon);
#undef KEY
    if (s->pieces)
        t_vocabulary_pieces(w, s->vocabulary);
    else
        t_vocabulary_merges(w, s->vocabulary);
}

// One 32-block or one number of a row whose weights spread as `spread` says. Codes are uniform; the
// sign of the scale is random too, so that the mean is zero though 4-bit codes reach further down.
static void write_block(uint32_t type, float spread, uint64_t draw, uint8_t *out) {
    const float sign = draw >> 63 ? -1.0f : 1.0f;
    switch (type) {
    case FL_GGML_Q4_0:
        fl_put_u16(out, fl_f16_from_f32(sign * spread / 4.6f));
        break;
    case FL_GGML_Q8_0:
        fl_put_u16(out, fl_f16_from_f32(sign * spread / 74.0f));
        break;
    default:
        fl_put_u16(out, fl_f16_from_f32(sign * spread * 1.7f * (float)(draw & 0xffff) * 0x1p-16f));
    }
}

// Rows of a matrix: random bytes are the codes, then every block gets its scale.
static void fill_rows(const tensor *t, const fl_ggml_type *type, uint64_t key, uint64_t first,
                      size_t size, uint8_t *out) {
    for (size_t i = 0; i < size; i += 8) {
        const uint64_t v = fl_rng_u64(key, first + i);
        memcpy(out + i, &v, size - i < 8 ? size - i : 8);
    }
    for (size_t i = 0; i < size; i += type->block_bytes) {
        uint64_t v = 0;
        memcpy(&v, out + i, type->block_bytes < 8 ? 2 : 8);
        if (type->block_bytes < 8) v = v << 63 | (v & 0xffff);
        write_block(t->type, t->spread, v, out + i);
    }
}

static fl_status write_tensor(maker *m, const tensor *t, uint64_t index, uint8_t *buffer,
                              size_t room, fl_err *err) {
    const uint64_t key = fl_rng_key(m->options->seed, index, 0);
    if (t->rows == 0) {
        for (uint32_t i = 0; i < t->cols; i++)
            fl_put_f32(buffer + 4 * (size_t)i,
                       t->middle + t->spread * (2 * fl_rng_unit(key, i) - 1));
        return node_gguf_write_data(m->w, (fl_bytes){buffer, 4 * (size_t)t->cols}, err);
    }
    const fl_ggml_type *type = fl_ggml_type_find(t->type);
    const size_t row = t->cols / type->block_elements * (size_t)type->block_bytes;
    const uint32_t step = (uint32_t)(room / row);
    for (uint32_t r = 0; r < t->rows; r += step) {
        const size_t size = (t->rows - r < step ? t->rows - r : step) * row;
        fill_rows(t, type, key, r * row, size, buffer);
        FL_TRY(node_gguf_write_data(m->w, (fl_bytes){buffer, size}, err));
    }
    return FL_OK;
}

static fl_status make(const options *o, fl_err *err) {
    enum { BUFFER = 1 << 20 };
    maker m = {.options = o};
    m.tensor = need(calloc(NODE_LAYERS_MAX * 16, sizeof(*m.tensor)));
    uint8_t *buffer = need(malloc(BUFFER + 8));
    fl_status st = node_gguf_writer_open(o->out, 32, &m.w, err);
    if (st == FL_OK) {
        write_keys(&m);
        declare(&m);
    }
    for (uint32_t i = 0; st == FL_OK && i < m.count; i++)
        st = write_tensor(&m, &m.tensor[i], i, buffer, BUFFER, err);
    if (st == FL_OK) st = node_gguf_writer_commit(&m.w, err);
    node_gguf_writer_discard(m.w);
    free(buffer);
    free(m.tensor);
    return st;
}

static bool parse_shape(const char *name, options *ret) {
    for (size_t i = 0; i < FL_COUNT(shapes); i++) {
        if (strcmp(shapes[i].name, name) != 0) continue;
        ret->shape = shapes[i];
        return true;
    }
    return false;
}

static bool parse_type(const char *name, options *ret) {
    static const struct {
        const char *name;
        uint32_t type;
    } types[] = {{"q4_0", FL_GGML_Q4_0}, {"q8_0", FL_GGML_Q8_0}, {"f16", FL_GGML_F16}};
    for (size_t i = 0; i < FL_COUNT(types); i++) {
        if (strcmp(types[i].name, name) != 0) continue;
        ret->type = types[i].type;
        return true;
    }
    return false;
}

static bool parse(int count, char **args, options *ret) {
    *ret = (options){.type = FL_GGML_Q4_0, .seed = 1};
    uint32_t layers = 0;
    for (int i = 1; i < count; i++) {
        const char *value = i + 1 < count ? args[i + 1] : NULL;
        if (args[i][0] != '-') {
            if (ret->out != NULL) return false;
            ret->out = args[i];
            continue;
        }
        if (value == NULL) return false;
        i++;
        if (strcmp(args[i - 1], "--shape") == 0) {
            if (!parse_shape(value, ret)) return false;
        } else if (strcmp(args[i - 1], "--type") == 0) {
            if (!parse_type(value, ret)) return false;
        } else if (strcmp(args[i - 1], "--layers") == 0) {
            layers = (uint32_t)strtoul(value, NULL, 10);
        } else if (strcmp(args[i - 1], "--seed") == 0) {
            ret->seed = strtoull(value, NULL, 10);
        } else {
            return false;
        }
    }
    if (layers != 0) ret->shape.layers = layers;
    return ret->out != NULL && ret->shape.name != NULL && ret->shape.layers <= NODE_LAYERS_MAX;
}

int main(int count, char **args) {
    options o;
    fl_err err = {0};
    if (!parse(count, args, &o)) {
        fprintf(stderr, "usage: make_model OUT.gguf --shape tinyllama|qwen2.5-0.5b|smollm2\n"
                        "                  [--type q4_0|q8_0|f16] [--layers N] [--seed S]\n");
        return 2;
    }
    if (make(&o, &err) == FL_OK) return 0;
    fprintf(stderr, "make_model: %s\n", err.text);
    return 1;
}
