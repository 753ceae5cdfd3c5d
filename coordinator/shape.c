#include "coordinator/shape.h"

#include "common/checked.h"
#include "kernels/ggml.h"
#include "proto/update.h"

#include <stdio.h>
#include <string.h>

enum { KEYS_MAX = 1 << 16, TENSORS_MAX = 1 << 16, STRING_MAX = 1 << 24, DIMS_MAX = 4 };
enum { SIZE_MAX_EACH = 1 << 20, ALIGNMENT = 32, GGML_I8 = 24 };

// GGUF value types, by number.
enum { TYPE_U32 = 4, TYPE_STRING = 8, TYPE_ARRAY = 9, TYPE_COUNT = 13 };
static const uint8_t type_size[TYPE_COUNT] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static fl_bytes read_string(fl_reader *r) {
    const uint64_t size = fl_read_u64(r);
    if (size > STRING_MAX) r->bad = true;
    return r->bad ? (fl_bytes){0} : fl_read_bytes(r, size);
}

static void skip_array(fl_reader *r) {
    const uint32_t item = fl_read_u32(r);
    const uint64_t count = fl_read_u64(r);
    if (item >= TYPE_COUNT || item == TYPE_ARRAY || count > fl_reader_left(r)) r->bad = true;
    if (r->bad) return;
    if (item != TYPE_STRING) {
        fl_read_bytes(r, count * type_size[item]); // count < 2^61: left is a size in memory
        return;
    }
    for (uint64_t i = 0; i < count && !r->bad; i++) read_string(r);
}

static void skip_value(fl_reader *r, uint32_t type) {
    if (type == TYPE_STRING)
        read_string(r);
    else if (type == TYPE_ARRAY)
        skip_array(r);
    else if (type < TYPE_COUNT)
        fl_read_bytes(r, type_size[type]);
    else
        r->bad = true;
}

static bool is(fl_bytes name, const char *text) {
    return name.size == strlen(text) && memcmp(name.data, text, name.size) == 0;
}

typedef struct gguf { // readers at what follows the head, and at the tensors' table
    fl_reader keys, tensors;
    uint64_t key_count, tensor_count;
    char architecture[64];
} gguf;

// The value of a key: a reader in front of it.
static bool find(const gguf *g, const char *prefix, const char *name, uint32_t type,
                 fl_reader *ret) {
    char wanted[128];
    snprintf(wanted, sizeof(wanted), "%s%s", prefix, name);
    fl_reader r = g->keys;
    for (uint64_t i = 0; i < g->key_count && !r.bad; i++) {
        const fl_bytes key = read_string(&r);
        const uint32_t found = fl_read_u32(&r);
        if (!r.bad && found == type && is(key, wanted)) {
            *ret = r;
            return true;
        }
        skip_value(&r, found);
    }
    return false;
}

// A number in 1..SIZE_MAX_EACH; `otherwise` when it is not there.
static uint32_t number(const gguf *g, const char *prefix, const char *name, uint32_t otherwise) {
    fl_reader r;
    if (!find(g, prefix, name, TYPE_U32, &r)) return otherwise;
    const uint32_t n = fl_read_u32(&r);
    return n <= SIZE_MAX_EACH ? n : 0;
}

// One number a layer: from an array of the container, else the same for all.
static void numbers(const gguf *g, const char *name, uint32_t otherwise, uint32_t layers,
                    uint32_t *ret) {
    fl_reader r;
    const bool each = find(g, "fleetune.layer.", name, TYPE_ARRAY, &r) &&
                      fl_read_u32(&r) == TYPE_U32 && fl_read_u64(&r) == layers;
    for (uint32_t l = 0; l < layers; l++) {
        const uint32_t n = each ? fl_read_u32(&r) : otherwise;
        ret[l] = n <= SIZE_MAX_EACH ? n : 0;
    }
}

static fl_status open_head(fl_bytes file, gguf *g, fl_err *err) {
    fl_reader r = {.in = file};
    const fl_bytes magic = fl_read_bytes(&r, 4);
    const uint32_t version = fl_read_u32(&r);
    if (r.bad || memcmp(magic.data, "GGUF", 4) != 0 || version < 2 || version > 3)
        return FL_FAIL(err, FL_EFORMAT, "not a GGUF model of version 2 or 3");
    *g = (gguf){.tensor_count = fl_read_u64(&r)};
    g->key_count = fl_read_u64(&r);
    if (g->key_count > KEYS_MAX || g->tensor_count > TENSORS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "the model has too many metadata keys or tensors");
    g->keys = r;
    for (uint64_t i = 0; i < g->key_count && !r.bad; i++) {
        read_string(&r);
        skip_value(&r, fl_read_u32(&r));
    }
    if (r.bad) return FL_FAIL(err, FL_EFORMAT, "the model's metadata is cut off or damaged");
    g->tensors = r;
    if (!find(g, "general.", "architecture", TYPE_STRING, &r)) return FL_OK;
    const fl_bytes text = read_string(&r);
    if (!r.bad && text.size < sizeof(g->architecture) - 1)
        snprintf(g->architecture, sizeof(g->architecture), "%.*s.", (int)text.size,
                 (const char *)text.data);
    return FL_OK;
}

// Bytes of a tensor; 0 when its type is not known here.
static bool tensor_size(const uint64_t dim[DIMS_MAX], uint32_t type, uint64_t *ret) {
    const fl_ggml_type *info = fl_ggml_type_find(type);
    const uint64_t block = info == NULL ? 1 : info->block_elements;
    size_t elements = 1, size = 0;
    for (int i = 0; i < DIMS_MAX; i++) {
        if (!fl_mul_size(elements, (size_t)dim[i], &elements)) return false;
    }
    if (info != NULL && !fl_mul_size(elements / block, info->block_bytes, &size)) return false;
    *ret = type == GGML_I8 ? elements : size;
    return true;
}

// Does the file hold all that its table of tensors names?
static fl_status check_tensors(const gguf *g, fl_err *err) {
    fl_reader r = g->tensors;
    uint64_t end = 0;
    size_t data;
    for (uint64_t i = 0; i < g->tensor_count && !r.bad; i++) {
        uint64_t dim[DIMS_MAX] = {1, 1, 1, 1}, size = 0;
        read_string(&r);
        const uint32_t dims = fl_read_u32(&r);
        if (dims == 0 || dims > DIMS_MAX) r.bad = true;
        for (uint32_t k = 0; k < dims && !r.bad; k++) dim[k] = fl_read_u64(&r);
        const uint32_t type = fl_read_u32(&r);
        const uint64_t offset = fl_read_u64(&r);
        if (!tensor_size(dim, type, &size) || offset > SIZE_MAX / 2 || size > SIZE_MAX / 2)
            r.bad = true;
        if (!r.bad && offset + size > end) end = offset + size;
    }
    if (r.bad)
        return FL_FAIL(err, FL_EFORMAT, "the model's table of tensors is cut off or damaged");
    const uint32_t alignment = number(g, "general.", "alignment", ALIGNMENT);
    if (alignment == 0 || !fl_round_up(r.at, alignment, &data) ||
        (end != 0 && (data > r.in.size || end > r.in.size - data)))
        return FL_FAIL(err, FL_EFORMAT, "the model is cut off: its tensors need more bytes");
    return FL_OK;
}

fl_status coord_shape_read(fl_bytes file, coord_shape *ret, fl_err *err) {
    gguf g;
    coord_shape s = {0};
    FL_TRY(open_head(file, &g, err));
    const char *a = g.architecture;
    s.layers = a[0] == '\0' ? 0 : number(&g, a, "block_count", 0);
    if (s.layers == 0)
        return FL_FAIL(err, FL_EFORMAT, "the model does not say how many layers it has");
    if (s.layers > COORD_SHAPE_LAYERS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "the model has %u layers, more than %d", s.layers,
                       COORD_SHAPE_LAYERS_MAX);
    FL_TRY(check_tensors(&g, err));
    const uint32_t heads = number(&g, a, "attention.head_count", 0);
    s.hidden = number(&g, a, "embedding_length", 0);
    s.head_size = number(&g, a, "attention.key_length", heads == 0 ? 0 : s.hidden / heads);
    numbers(&g, "heads", heads, s.layers, s.heads);
    numbers(&g, "kv_heads", number(&g, a, "attention.head_count_kv", heads), s.layers, s.kv_heads);
    numbers(&g, "ffn", number(&g, a, "feed_forward_length", 0), s.layers, s.ffn);
    *ret = s;
    return FL_OK;
}

uint32_t coord_shape_values(const coord_shape *s, uint32_t layer, uint32_t rank, bool has_exit) {
    FL_ASSERT(layer < s->layers);
    // Each is at most 2^20, and rank is small: no product leaves 64 bits.
    const uint64_t heads = s->heads[layer], kv = s->kv_heads[layer], ffn = s->ffn[layer];
    if (heads == 0 || kv == 0 || ffn == 0 || s->hidden == 0 || s->head_size == 0) return 0;
    const uint64_t rows = (heads + 2 * kv) * s->head_size + 2 * ffn + 2 * (uint64_t)s->hidden;
    const uint64_t values = rows * rank + (has_exit ? s->hidden : 0);
    return values <= FL_UPDATE_VALUES_MAX ? (uint32_t)values : 0;
}
