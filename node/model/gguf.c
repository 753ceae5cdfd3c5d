#include "node/model/gguf.h"

#include <stdlib.h>
#include <string.h>

#include "common/fault.h"
#include "common/file.h"

enum {
    KEY_BYTES_MIN = 8 + 4 + 1,            // empty name, type, one byte of value
    TENSOR_BYTES_MIN = 8 + 4 + 8 + 4 + 8, // empty name, dims, one dim, type, offset
    SHOWN = 80,                           // bytes of a foreign name in a message
};

struct node_gguf {
    fl_map map; // empty when the bytes are the caller's
    fl_bytes bytes;
    uint32_t version, alignment;
    size_t key_count, tensor_count;
    node_gguf_key *key;
    node_gguf_tensor *tensor;
    uint32_t *key_order, *tensor_order; // indices sorted by name
};

static const node_ggml_info ggml_types[] = {
    [0] = {"F32", 1, 4},         [1] = {"F16", 1, 2},         [2] = {"Q4_0", 32, 18},
    [3] = {"Q4_1", 32, 20},      [6] = {"Q5_0", 32, 22},      [7] = {"Q5_1", 32, 24},
    [8] = {"Q8_0", 32, 34},      [9] = {"Q8_1", 32, 36},      [10] = {"Q2_K", 256, 84},
    [11] = {"Q3_K", 256, 110},   [12] = {"Q4_K", 256, 144},   [13] = {"Q5_K", 256, 176},
    [14] = {"Q6_K", 256, 210},   [15] = {"Q8_K", 256, 292},   [16] = {"IQ2_XXS", 256, 66},
    [17] = {"IQ2_XS", 256, 74},  [18] = {"IQ3_XXS", 256, 98}, [19] = {"IQ1_S", 256, 50},
    [20] = {"IQ4_NL", 32, 18},   [21] = {"IQ3_S", 256, 110},  [22] = {"IQ2_S", 256, 82},
    [23] = {"IQ4_XS", 256, 136}, [24] = {"I8", 1, 1},         [25] = {"I16", 1, 2},
    [26] = {"I32", 1, 4},        [27] = {"I64", 1, 8},        [28] = {"F64", 1, 8},
    [29] = {"IQ1_M", 256, 56},   [30] = {"BF16", 1, 2},       [34] = {"TQ1_0", 256, 54},
    [35] = {"TQ2_0", 256, 66},   [39] = {"MXFP4", 32, 17},
};

const node_ggml_info *node_ggml_type(uint32_t id) {
    if (id >= FL_COUNT(ggml_types) || ggml_types[id].name == NULL) return NULL;
    return &ggml_types[id];
}

// Bytes of a scalar; 0 for strings and arrays.
static uint32_t scalar_size(node_gguf_type type) {
    static const uint8_t size[NODE_GGUF_TYPES] = {
        [NODE_GGUF_U8] = 1,  [NODE_GGUF_I8] = 1,  [NODE_GGUF_U16] = 2, [NODE_GGUF_I16] = 2,
        [NODE_GGUF_U32] = 4, [NODE_GGUF_I32] = 4, [NODE_GGUF_F32] = 4, [NODE_GGUF_BOOL] = 1,
        [NODE_GGUF_U64] = 8, [NODE_GGUF_I64] = 8, [NODE_GGUF_F64] = 8,
    };
    return size[type];
}

static int shown(fl_bytes name) {
    return name.size < SHOWN ? (int)name.size : SHOWN;
}

// For messages: "%.*s" with the first bytes of a foreign name.
#define NAME(n) shown(n), (const char *)(n).data

static int compare_names(fl_bytes a, fl_bytes b) {
    const size_t common = a.size < b.size ? a.size : b.size;
    const int order = common == 0 ? 0 : memcmp(a.data, b.data, common);
    return order != 0 ? order : (a.size > b.size) - (a.size < b.size);
}

static int compare_keys(const void *a, const void *b, void *ctx) {
    const node_gguf *g = ctx;
    return compare_names(g->key[*(const uint32_t *)a].name, g->key[*(const uint32_t *)b].name);
}

static int compare_tensors(const void *a, const void *b, void *ctx) {
    const node_gguf *g = ctx;
    return compare_names(g->tensor[*(const uint32_t *)a].name,
                         g->tensor[*(const uint32_t *)b].name);
}

static int compare_offsets(const void *a, const void *b, void *ctx) {
    const node_gguf *g = ctx;
    const uint64_t x = g->tensor[*(const uint32_t *)a].offset;
    const uint64_t y = g->tensor[*(const uint32_t *)b].offset;
    return (x > y) - (x < y);
}

static void sort_indices(uint32_t *order, size_t count,
                         int (*compare)(const void *, const void *, void *), node_gguf *g) {
    for (size_t i = 0; i < count; i++) order[i] = (uint32_t)i;
    if (count != 0) qsort_r(order, count, sizeof(*order), compare, g);
}

static fl_status read_name(fl_reader *r, uint64_t size_max, const char *what, fl_bytes *ret,
                           fl_err *err) {
    const uint64_t size = fl_read_u64(r);
    if (r->bad || size > fl_reader_left(r))
        return FL_FAIL(err, FL_EFORMAT, "a %s's name runs past the end of the file", what);
    if (size == 0) return FL_FAIL(err, FL_EFORMAT, "a %s has an empty name", what);
    if (size > size_max)
        return FL_FAIL(err, FL_ELIMIT, "a %s's name has %llu bytes, the limit is %llu", what,
                       (unsigned long long)size, (unsigned long long)size_max);
    *ret = fl_read_bytes(r, size);
    return FL_OK;
}

static fl_status check_bools(fl_bytes key, fl_bytes values, fl_err *err) {
    for (size_t i = 0; i < values.size; i++)
        if (values.data[i] > 1)
            return FL_FAIL(err, FL_EFORMAT, "key '%.*s' holds a boolean of value %u", NAME(key),
                           values.data[i]);
    return FL_OK;
}

static fl_status read_strings(fl_reader *r, fl_bytes key, node_gguf_value *v, fl_err *err) {
    if (v->count > fl_reader_left(r) / 8)
        return FL_FAIL(err, FL_EFORMAT, "key '%.*s' claims %llu strings, more than the file has",
                       NAME(key), (unsigned long long)v->count);
    const size_t begin = r->at;
    for (uint64_t i = 0; i < v->count; i++) {
        fl_read_bytes(r, fl_read_u64(r));
        if (r->bad)
            return FL_FAIL(err, FL_EFORMAT, "string %llu of key '%.*s' runs past the end",
                           (unsigned long long)i, NAME(key));
    }
    v->bytes = (fl_bytes){r->in.data + begin, r->at - begin};
    return FL_OK;
}

static fl_status read_array(fl_reader *r, fl_bytes key, node_gguf_value *v, fl_err *err) {
    const uint32_t item = fl_read_u32(r);
    v->count = fl_read_u64(r);
    if (r->bad) return FL_FAIL(err, FL_EFORMAT, "array '%.*s' is cut short", NAME(key));
    if (item == NODE_GGUF_ARRAY)
        return FL_FAIL(err, FL_EUNSUPPORTED, "key '%.*s' is an array of arrays", NAME(key));
    if (item >= NODE_GGUF_TYPES)
        return FL_FAIL(err, FL_EFORMAT, "array '%.*s' has unknown element type %u", NAME(key),
                       item);
    v->item = (node_gguf_type)item;
    if (v->item == NODE_GGUF_STRING) return read_strings(r, key, v, err);
    const uint32_t size = scalar_size(v->item);
    if (v->count > fl_reader_left(r) / size)
        return FL_FAIL(err, FL_EFORMAT, "array '%.*s' claims %llu elements, more than the file has",
                       NAME(key), (unsigned long long)v->count);
    v->bytes = fl_read_bytes(r, v->count * size);
    return v->item == NODE_GGUF_BOOL ? check_bools(key, v->bytes, err) : FL_OK;
}

static fl_status read_key(fl_reader *r, node_gguf_key *k, fl_err *err) {
    FL_TRY(read_name(r, NODE_GGUF_KEY_MAX, "metadata key", &k->name, err));
    const uint32_t type = fl_read_u32(r);
    if (r->bad || type >= NODE_GGUF_TYPES)
        return FL_FAIL(err, FL_EFORMAT, "key '%.*s' has unknown type %u", NAME(k->name), type);
    node_gguf_value *v = &k->value;
    v->type = (node_gguf_type)type;
    if (v->type == NODE_GGUF_ARRAY) return read_array(r, k->name, v, err);
    v->bytes =
        fl_read_bytes(r, v->type == NODE_GGUF_STRING ? fl_read_u64(r) : scalar_size(v->type));
    if (r->bad)
        return FL_FAIL(err, FL_EFORMAT, "the value of key '%.*s' runs past the end", NAME(k->name));
    return v->type == NODE_GGUF_BOOL ? check_bools(k->name, v->bytes, err) : FL_OK;
}

// Bytes of a tensor; every product checked in 64 bits and in size_t, which is smaller on armhf.
static fl_status tensor_size(const node_gguf_tensor *t, size_t *ret, fl_err *err) {
    const node_ggml_info *info = node_ggml_type(t->type);
    if (t->dim[0] % info->block != 0)
        return FL_FAIL(err, FL_EFORMAT, "tensor '%.*s': rows of %llu are not whole %s blocks of %u",
                       NAME(t->name), (unsigned long long)t->dim[0], info->name, info->block);
    uint64_t elements = 1, bytes = 0;
    bool wraps = false;
    for (uint32_t i = 0; i < NODE_GGUF_DIMS_MAX; i++)
        wraps |= __builtin_mul_overflow(elements, t->dim[i], &elements);
    wraps |= __builtin_mul_overflow(elements / info->block, info->size, &bytes);
    if (wraps || bytes > SIZE_MAX || elements > INT64_MAX)
        return FL_FAIL(err, FL_ELIMIT, "tensor '%.*s' is too large to address", NAME(t->name));
    *ret = (size_t)bytes;
    return FL_OK;
}

static fl_status read_tensor(fl_reader *r, node_gguf_tensor *t, fl_err *err) {
    FL_TRY(read_name(r, NODE_GGUF_NAME_MAX, "tensor", &t->name, err));
    t->dims = fl_read_u32(r);
    if (r->bad || t->dims < 1 || t->dims > NODE_GGUF_DIMS_MAX)
        return FL_FAIL(err, FL_EFORMAT, "tensor '%.*s' has %u dimensions, not 1 to %d",
                       NAME(t->name), t->dims, NODE_GGUF_DIMS_MAX);
    for (uint32_t i = 0; i < NODE_GGUF_DIMS_MAX; i++) {
        t->dim[i] = i < t->dims ? fl_read_u64(r) : 1;
        if (t->dim[i] == 0)
            return FL_FAIL(err, FL_EFORMAT, "dimension %u of tensor '%.*s' is zero or cut short", i,
                           NAME(t->name));
    }
    t->type = fl_read_u32(r);
    t->offset = fl_read_u64(r);
    if (r->bad) return FL_FAIL(err, FL_EFORMAT, "tensor '%.*s' is cut short", NAME(t->name));
    if (node_ggml_type(t->type) == NULL)
        return FL_FAIL(err, FL_EUNSUPPORTED, "tensor '%.*s' has unknown ggml type %u",
                       NAME(t->name), t->type);
    return FL_OK;
}

static fl_status read_header(node_gguf *g, fl_reader *r, fl_err *err) {
    const fl_bytes magic = fl_read_bytes(r, 4);
    if (r->bad || memcmp(magic.data, "GGUF", 4) != 0)
        return FL_FAIL(err, FL_EFORMAT, "not a GGUF file: it does not begin with the magic 'GGUF'");
    g->version = fl_read_u32(r);
    const uint64_t tensors = fl_read_u64(r), keys = fl_read_u64(r);
    if (r->bad) return FL_FAIL(err, FL_EFORMAT, "the GGUF header is cut short");
    if (g->version != 0 && (g->version & 0xffff) == 0)
        return FL_FAIL(err, FL_EUNSUPPORTED, "big-endian GGUF files are not supported");
    if (g->version != 2 && g->version != 3)
        return FL_FAIL(err, FL_EUNSUPPORTED, "GGUF version %u; versions 2 and 3 are supported",
                       g->version);
    if (tensors > NODE_GGUF_TENSORS_MAX || keys > NODE_GGUF_KEYS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "%llu tensors and %llu keys; the limit is %d of each",
                       (unsigned long long)tensors, (unsigned long long)keys,
                       NODE_GGUF_TENSORS_MAX);
    const size_t left = fl_reader_left(r);
    if (keys > left / KEY_BYTES_MIN || tensors > left / TENSOR_BYTES_MIN)
        return FL_FAIL(err, FL_EFORMAT, "%llu tensors and %llu keys do not fit into %zu bytes",
                       (unsigned long long)tensors, (unsigned long long)keys, left);
    g->tensor_count = (size_t)tensors;
    g->key_count = (size_t)keys;
    return FL_OK;
}

static void *take(size_t count, size_t size) {
    return fl_fault() ? NULL : calloc(count + 1, size); // + 1: never a request for nothing
}

static fl_status read_keys(node_gguf *g, fl_reader *r, fl_err *err) {
    g->key = take(g->key_count, sizeof(*g->key));
    g->key_order = take(g->key_count, sizeof(*g->key_order));
    if (g->key == NULL || g->key_order == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for %zu metadata keys", g->key_count);
    for (size_t i = 0; i < g->key_count; i++) FL_TRY(read_key(r, &g->key[i], err));
    sort_indices(g->key_order, g->key_count, compare_keys, g);
    for (size_t i = 1; i < g->key_count; i++) {
        const fl_bytes name = g->key[g->key_order[i]].name;
        if (compare_names(g->key[g->key_order[i - 1]].name, name) == 0)
            return FL_FAIL(err, FL_EFORMAT, "key '%.*s' occurs twice", NAME(name));
    }
    return FL_OK;
}

static fl_status read_alignment(node_gguf *g, fl_err *err) {
    g->alignment = NODE_GGUF_ALIGNMENT;
    const node_gguf_value *v = node_gguf_find(g, "general.alignment");
    if (v == NULL) return FL_OK;
    if (v->type != NODE_GGUF_U32)
        return FL_FAIL(err, FL_EFORMAT, "general.alignment has type %d, not u32", (int)v->type);
    const uint32_t a = fl_get_u32(v->bytes.data);
    if (a < NODE_GGUF_ALIGNMENT_MIN || a > NODE_GGUF_ALIGNMENT_MAX || (a & (a - 1)) != 0)
        return FL_FAIL(err, FL_EFORMAT, "general.alignment is %u, not a power of two from %d to %d",
                       a, NODE_GGUF_ALIGNMENT_MIN, NODE_GGUF_ALIGNMENT_MAX);
    g->alignment = a;
    return FL_OK;
}

static fl_status read_tensors(node_gguf *g, fl_reader *r, fl_err *err) {
    g->tensor = take(g->tensor_count, sizeof(*g->tensor));
    g->tensor_order = take(g->tensor_count, sizeof(*g->tensor_order));
    if (g->tensor == NULL || g->tensor_order == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for %zu tensors", g->tensor_count);
    for (size_t i = 0; i < g->tensor_count; i++) FL_TRY(read_tensor(r, &g->tensor[i], err));
    return FL_OK;
}

// Where the data of each tensor lies: aligned, inside the file, without overlap.
static fl_status place_tensors(node_gguf *g, size_t table_end, fl_err *err) {
    if (g->tensor_count == 0) return FL_OK;
    size_t start;
    if (!fl_round_up(table_end, g->alignment, &start) || start > g->bytes.size)
        return FL_FAIL(err, FL_EFORMAT, "the file ends before its tensor data begins");
    const fl_bytes data = {g->bytes.data + start, g->bytes.size - start};
    for (size_t i = 0; i < g->tensor_count; i++) {
        node_gguf_tensor *t = &g->tensor[i];
        size_t size;
        FL_TRY(tensor_size(t, &size, err));
        if (t->offset % g->alignment != 0)
            return FL_FAIL(err, FL_EFORMAT, "tensor '%.*s' is not aligned to %u bytes",
                           NAME(t->name), g->alignment);
        if (t->offset > data.size || size > data.size - (size_t)t->offset)
            return FL_FAIL(err, FL_EFORMAT,
                           "the data of tensor '%.*s' ends past the end of the file: it is cut "
                           "short or damaged",
                           NAME(t->name));
        t->data = (fl_bytes){data.data + (size_t)t->offset, size};
    }
    uint32_t *order = g->tensor_order;
    sort_indices(order, g->tensor_count, compare_offsets, g);
    for (size_t i = 1; i < g->tensor_count; i++) {
        const node_gguf_tensor *a = &g->tensor[order[i - 1]], *b = &g->tensor[order[i]];
        if (b->offset - a->offset < a->data.size)
            return FL_FAIL(err, FL_EFORMAT, "tensors '%.*s' and '%.*s' overlap", NAME(a->name),
                           NAME(b->name));
    }
    sort_indices(order, g->tensor_count, compare_tensors, g);
    for (size_t i = 1; i < g->tensor_count; i++) {
        const fl_bytes name = g->tensor[order[i]].name;
        if (compare_names(g->tensor[order[i - 1]].name, name) == 0)
            return FL_FAIL(err, FL_EFORMAT, "tensor '%.*s' occurs twice", NAME(name));
    }
    return FL_OK;
}

static fl_status parse(node_gguf *g, fl_err *err) {
    fl_reader r = {.in = g->bytes};
    FL_TRY(read_header(g, &r, err));
    FL_TRY(read_keys(g, &r, err));
    FL_TRY(read_alignment(g, err));
    FL_TRY(read_tensors(g, &r, err));
    return place_tensors(g, r.at, err);
}

fl_status node_gguf_open_bytes(fl_bytes bytes, node_gguf **ret, fl_err *err) {
    node_gguf *g = take(1, sizeof(*g));
    if (g == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for a GGUF reader");
    g->bytes = bytes;
    const fl_status st = parse(g, err);
    if (st != FL_OK)
        node_gguf_close(g);
    else
        *ret = g;
    return st;
}

fl_status node_gguf_open(const char *path, node_gguf **ret, fl_err *err) {
    fl_map map = {0};
    FL_TRY(fl_map_open(path, &map, err));
    const fl_status st = node_gguf_open_bytes(map.bytes, ret, err);
    if (st != FL_OK)
        fl_map_close(&map);
    else
        (*ret)->map = map;
    return st;
}

int node_gguf_fd(const node_gguf *g) {
    return g->map.bytes.data == NULL ? -1 : g->map.fd;
}

void node_gguf_close(node_gguf *g) {
    if (g == NULL) return;
    free(g->key);
    free(g->key_order);
    free(g->tensor);
    free(g->tensor_order);
    fl_map_close(&g->map);
    free(g);
}

uint32_t node_gguf_version(const node_gguf *g) {
    return g->version;
}

uint32_t node_gguf_alignment(const node_gguf *g) {
    return g->alignment;
}

fl_bytes node_gguf_bytes(const node_gguf *g) {
    return g->bytes;
}

size_t node_gguf_key_count(const node_gguf *g) {
    return g->key_count;
}

size_t node_gguf_tensor_count(const node_gguf *g) {
    return g->tensor_count;
}

const node_gguf_key *node_gguf_key_at(const node_gguf *g, size_t index) {
    FL_ASSERT(index < g->key_count);
    return &g->key[index];
}

const node_gguf_tensor *node_gguf_tensor_at(const node_gguf *g, size_t index) {
    FL_ASSERT(index < g->tensor_count);
    return &g->tensor[index];
}

static fl_bytes text(const char *s) {
    return (fl_bytes){(const uint8_t *)s, strlen(s)};
}

const node_gguf_value *node_gguf_find(const node_gguf *g, const char *key) {
    const fl_bytes want = text(key);
    size_t low = 0, high = g->key_count;
    while (low < high) {
        const size_t mid = low + (high - low) / 2;
        const node_gguf_key *k = &g->key[g->key_order[mid]];
        const int order = compare_names(k->name, want);
        if (order == 0) return &k->value;
        if (order < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return NULL;
}

const node_gguf_tensor *node_gguf_find_tensor(const node_gguf *g, const char *name) {
    const fl_bytes want = text(name);
    size_t low = 0, high = g->tensor_count;
    while (low < high) {
        const size_t mid = low + (high - low) / 2;
        const node_gguf_tensor *t = &g->tensor[g->tensor_order[mid]];
        const int order = compare_names(t->name, want);
        if (order == 0) return t;
        if (order < 0)
            low = mid + 1;
        else
            high = mid;
    }
    return NULL;
}

// Zero-extended, or sign-extended for the signed types; false for anything that is no integer.
static bool integer(const node_gguf_value *v, int64_t *ret, bool *ret_unsigned) {
    const uint8_t *p = v->bytes.data;
    *ret_unsigned = false;
    switch (v->type) {
    case NODE_GGUF_U8:
        *ret = p[0];
        return true;
    case NODE_GGUF_I8:
        *ret = (int8_t)p[0];
        return true;
    case NODE_GGUF_U16:
        *ret = fl_get_u16(p);
        return true;
    case NODE_GGUF_I16:
        *ret = (int16_t)fl_get_u16(p);
        return true;
    case NODE_GGUF_U32:
        *ret = fl_get_u32(p);
        return true;
    case NODE_GGUF_I32:
        *ret = (int32_t)fl_get_u32(p);
        return true;
    case NODE_GGUF_I64:
        *ret = (int64_t)fl_get_u64(p);
        return true;
    case NODE_GGUF_U64:
        *ret = (int64_t)fl_get_u64(p);
        *ret_unsigned = true;
        return true;
    default:
        return false;
    }
}

bool node_gguf_get_u64(const node_gguf *g, const char *key, uint64_t *ret) {
    const node_gguf_value *v = node_gguf_find(g, key);
    int64_t n;
    bool is_unsigned;
    if (v == NULL || !integer(v, &n, &is_unsigned) || (n < 0 && !is_unsigned)) return false;
    *ret = (uint64_t)n;
    return true;
}

bool node_gguf_get_u32(const node_gguf *g, const char *key, uint32_t *ret) {
    uint64_t n;
    if (!node_gguf_get_u64(g, key, &n) || n > UINT32_MAX) return false;
    *ret = (uint32_t)n;
    return true;
}

bool node_gguf_get_f32(const node_gguf *g, const char *key, float *ret) {
    const node_gguf_value *v = node_gguf_find(g, key);
    if (v == NULL) return false;
    if (v->type == NODE_GGUF_F32) {
        *ret = fl_get_f32(v->bytes.data);
        return true;
    }
    if (v->type != NODE_GGUF_F64) return false;
    const uint64_t bits = fl_get_u64(v->bytes.data);
    double d;
    memcpy(&d, &bits, sizeof(d));
    if (!(d >= -3.4e38 && d <= 3.4e38)) return false; // would not survive as a float
    *ret = (float)d;
    return true;
}

bool node_gguf_get_bool(const node_gguf *g, const char *key, bool *ret) {
    const node_gguf_value *v = node_gguf_find(g, key);
    if (v == NULL || v->type != NODE_GGUF_BOOL) return false;
    *ret = v->bytes.data[0] != 0;
    return true;
}

bool node_gguf_get_string(const node_gguf *g, const char *key, fl_bytes *ret) {
    const node_gguf_value *v = node_gguf_find(g, key);
    if (v == NULL || v->type != NODE_GGUF_STRING) return false;
    *ret = v->bytes;
    return true;
}

bool node_gguf_get_array(const node_gguf *g, const char *key, node_gguf_type item,
                         node_gguf_value *ret) {
    const node_gguf_value *v = node_gguf_find(g, key);
    if (v == NULL || v->type != NODE_GGUF_ARRAY || v->item != item) return false;
    *ret = *v;
    return true;
}

fl_bytes node_gguf_next_string(fl_reader *r) {
    return fl_read_bytes(r, fl_read_u64(r));
}
