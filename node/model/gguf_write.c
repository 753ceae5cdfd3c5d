#include "node/model/gguf_write.h"

#include <stdlib.h>
#include <string.h>

#include "common/fault.h"
#include "common/file.h"

// Bytes that grow.
typedef struct buffer {
    uint8_t *data;
    size_t size, room;
} buffer;

typedef struct span {
    size_t size, padded; // bytes of one tensor, and with alignment
} span;

struct node_gguf_writer {
    fl_file *file;
    fl_err failed; // the first failure; FL_OK before it
    uint32_t alignment;
    bool started; // the head is written, data follows
    uint64_t keys, tensors, offset;
    buffer head, table;
    span *span;
    size_t span_room;
    size_t at;      // the tensor being written
    size_t written; // its bytes so far
};

static bool good(const node_gguf_writer *w) {
    return w->failed.status == FL_OK;
}

static void append(node_gguf_writer *w, buffer *b, const void *data, size_t size) {
    if (!good(w) || size == 0) return;
    if (size > b->room - b->size) {
        size_t room;
        if (!fl_add_size(b->size, size, &room) || !fl_mul_size(room, 2, &room)) room = 0;
        uint8_t *grown = room == 0 || fl_fault() ? NULL : realloc(b->data, room);
        if (grown == NULL) {
            (void)FL_FAIL(&w->failed, FL_ENOMEM, "no memory for the head of a GGUF file");
            return;
        }
        b->data = grown;
        b->room = room;
    }
    memcpy(b->data + b->size, data, size);
    b->size += size;
}

static void append_u32(node_gguf_writer *w, buffer *b, uint32_t v) {
    uint8_t p[4];
    fl_put_u32(p, v);
    append(w, b, p, sizeof(p));
}

static void append_u64(node_gguf_writer *w, buffer *b, uint64_t v) {
    uint8_t p[8];
    fl_put_u64(p, v);
    append(w, b, p, sizeof(p));
}

static void append_string(node_gguf_writer *w, buffer *b, fl_bytes s) {
    append_u64(w, b, s.size);
    append(w, b, s.data, s.size);
}

static fl_bytes text(const char *s) {
    return (fl_bytes){(const uint8_t *)s, strlen(s)};
}

static void begin_key(node_gguf_writer *w, fl_bytes key, node_gguf_type type) {
    if (good(w) && w->started)
        (void)FL_FAIL(&w->failed, FL_ESTATE, "metadata must be written before data");
    append_string(w, &w->head, key);
    append_u32(w, &w->head, (uint32_t)type);
    w->keys++;
}

static void begin_array(node_gguf_writer *w, const char *key, node_gguf_type item, size_t count) {
    begin_key(w, text(key), NODE_GGUF_ARRAY);
    append_u32(w, &w->head, (uint32_t)item);
    append_u64(w, &w->head, count);
}

fl_status node_gguf_writer_open(const char *path, uint32_t alignment, node_gguf_writer **ret,
                                fl_err *err) {
    FL_ASSERT(alignment >= NODE_GGUF_ALIGNMENT_MIN && alignment <= NODE_GGUF_ALIGNMENT_MAX);
    FL_ASSERT((alignment & (alignment - 1)) == 0);
    node_gguf_writer *w = fl_fault() ? NULL : calloc(1, sizeof(*w));
    if (w == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for a GGUF writer");
    w->alignment = alignment;
    const fl_status st = fl_file_create(path, &w->file, err);
    if (st != FL_OK) {
        free(w);
        return st;
    }
    node_gguf_write_u32(w, "general.alignment", alignment);
    *ret = w;
    return FL_OK;
}

void node_gguf_write_u32(node_gguf_writer *w, const char *key, uint32_t value) {
    begin_key(w, text(key), NODE_GGUF_U32);
    append_u32(w, &w->head, value);
}

void node_gguf_write_f32(node_gguf_writer *w, const char *key, float value) {
    uint8_t p[4];
    fl_put_f32(p, value);
    begin_key(w, text(key), NODE_GGUF_F32);
    append(w, &w->head, p, sizeof(p));
}

void node_gguf_write_bool(node_gguf_writer *w, const char *key, bool value) {
    const uint8_t byte = value;
    begin_key(w, text(key), NODE_GGUF_BOOL);
    append(w, &w->head, &byte, 1);
}

void node_gguf_write_string(node_gguf_writer *w, const char *key, fl_bytes value) {
    begin_key(w, text(key), NODE_GGUF_STRING);
    append_string(w, &w->head, value);
}

void node_gguf_write_text(node_gguf_writer *w, const char *key, const char *value) {
    node_gguf_write_string(w, key, text(value));
}

void node_gguf_write_u32s(node_gguf_writer *w, const char *key, const uint32_t *values,
                          size_t count) {
    begin_array(w, key, NODE_GGUF_U32, count);
    for (size_t i = 0; i < count; i++) append_u32(w, &w->head, values[i]);
}

void node_gguf_write_i32s(node_gguf_writer *w, const char *key, const int32_t *values,
                          size_t count) {
    begin_array(w, key, NODE_GGUF_I32, count);
    for (size_t i = 0; i < count; i++) append_u32(w, &w->head, (uint32_t)values[i]);
}

void node_gguf_write_f32s(node_gguf_writer *w, const char *key, const float *values, size_t count) {
    begin_array(w, key, NODE_GGUF_F32, count);
    for (size_t i = 0; i < count; i++) {
        uint8_t p[4];
        fl_put_f32(p, values[i]);
        append(w, &w->head, p, sizeof(p));
    }
}

void node_gguf_write_strings(node_gguf_writer *w, const char *key, const fl_bytes *values,
                             size_t count) {
    begin_array(w, key, NODE_GGUF_STRING, count);
    for (size_t i = 0; i < count; i++) append_string(w, &w->head, values[i]);
}

void node_gguf_write_key(node_gguf_writer *w, const node_gguf_key *key) {
    static const char alignment[] = "general.alignment";
    if (key->name.size == strlen(alignment) &&
        memcmp(key->name.data, alignment, key->name.size) == 0)
        return;
    const node_gguf_value *v = &key->value;
    begin_key(w, key->name, v->type);
    if (v->type == NODE_GGUF_ARRAY) {
        append_u32(w, &w->head, (uint32_t)v->item);
        append_u64(w, &w->head, v->count);
    } else if (v->type == NODE_GGUF_STRING) {
        append_u64(w, &w->head, v->bytes.size);
    }
    append(w, &w->head, v->bytes.data, v->bytes.size);
}

static bool add_span(node_gguf_writer *w, size_t size, size_t padded) {
    if (w->tensors == w->span_room) {
        const size_t room = w->span_room * 2 + 64;
        span *grown = fl_fault() ? NULL : realloc(w->span, room * sizeof(*grown));
        if (grown == NULL) return false;
        w->span = grown;
        w->span_room = room;
    }
    w->span[w->tensors] = (span){size, padded};
    return true;
}

void node_gguf_write_tensor(node_gguf_writer *w, const char *name, uint32_t type, uint32_t dims,
                            const uint64_t *dim) {
    if (!good(w)) return;
    const node_ggml_info *info = node_ggml_type(type);
    FL_ASSERT(info != NULL && dims >= 1 && dims <= NODE_GGUF_DIMS_MAX);
    FL_ASSERT(dim[0] % info->block == 0);
    size_t size = info->size, padded;
    bool fits = fl_mul_size(size, (size_t)(dim[0] / info->block), &size);
    for (uint32_t i = 1; i < dims; i++) fits = fits && fl_mul_size(size, (size_t)dim[i], &size);
    if (!fits || !fl_round_up(size, w->alignment, &padded)) {
        (void)FL_FAIL(&w->failed, FL_ELIMIT, "tensor '%s' is too large", name);
        return;
    }
    if (w->started || !add_span(w, size, padded)) {
        (void)FL_FAIL(&w->failed, w->started ? FL_ESTATE : FL_ENOMEM,
                      "tensor '%s' cannot be declared", name);
        return;
    }
    append_string(w, &w->table, text(name));
    append_u32(w, &w->table, dims);
    for (uint32_t i = 0; i < dims; i++) append_u64(w, &w->table, dim[i]);
    append_u32(w, &w->table, type);
    append_u64(w, &w->table, w->offset);
    w->offset += padded;
    w->tensors++;
}

static void put(node_gguf_writer *w, fl_bytes bytes) {
    if (!good(w) || bytes.size == 0) return;
    const fl_status st = fl_file_write(w->file, bytes, &w->failed);
    FL_ASSERT(st == w->failed.status);
}

static void write_zeros(node_gguf_writer *w, size_t size) {
    static const uint8_t zeros[NODE_GGUF_ALIGNMENT_MAX];
    FL_ASSERT(size <= sizeof(zeros));
    put(w, (fl_bytes){zeros, size});
}

static void write_head(node_gguf_writer *w) {
    if (!good(w) || w->started) return;
    uint8_t first[24] = {'G', 'G', 'U', 'F', 3};
    fl_put_u64(first + 8, w->tensors);
    fl_put_u64(first + 16, w->keys);
    const fl_bytes parts[] = {
        {first, sizeof(first)}, {w->head.data, w->head.size}, {w->table.data, w->table.size}};
    size_t size = 0;
    for (size_t i = 0; i < FL_COUNT(parts); i++) {
        put(w, parts[i]);
        size += parts[i].size;
    }
    if (w->tensors != 0) write_zeros(w, (w->alignment - size % w->alignment) % w->alignment);
    w->started = true;
}

fl_status node_gguf_write_data(node_gguf_writer *w, fl_bytes bytes, fl_err *err) {
    write_head(w);
    while (good(w) && bytes.size != 0) {
        if (w->at == w->tensors) {
            (void)FL_FAIL(&w->failed, FL_ESTATE, "more data than the tensors have");
            break;
        }
        const span *s = &w->span[w->at];
        const size_t left = s->size - w->written;
        const fl_bytes part = {bytes.data, bytes.size < left ? bytes.size : left};
        put(w, part);
        w->written += part.size;
        bytes = (fl_bytes){bytes.data + part.size, bytes.size - part.size};
        if (w->written < s->size) continue;
        write_zeros(w, s->padded - s->size);
        w->at++;
        w->written = 0;
    }
    if (good(w)) return FL_OK;
    if (err != NULL) *err = w->failed;
    return w->failed.status;
}

fl_status node_gguf_writer_commit(node_gguf_writer **writer, fl_err *err) {
    node_gguf_writer *w = *writer;
    *writer = NULL;
    write_head(w);
    if (good(w) && w->at != w->tensors)
        (void)FL_FAIL(&w->failed, FL_ESTATE, "data of %llu tensors is missing",
                      (unsigned long long)(w->tensors - w->at));
    fl_status st = w->failed.status;
    if (st == FL_OK) st = fl_file_commit(&w->file, &w->failed);
    if (st != FL_OK && err != NULL) *err = w->failed;
    node_gguf_writer_discard(w);
    return st;
}

void node_gguf_writer_discard(node_gguf_writer *w) {
    if (w == NULL) return;
    fl_file_discard(w->file);
    free(w->head.data);
    free(w->table.data);
    free(w->span);
    free(w);
}
