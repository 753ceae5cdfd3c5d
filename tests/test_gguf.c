// Goal: hostile GGUF bytes give a status that names what is wrong, never a crash or a wrapped size;
// what the writer writes is read back exactly.
// Method: a small valid file is built byte by byte; every truncation and every flipped byte of it
// is read with its end at a guard page; then one damage for every check of the reader.
#include "common/checked.h"
#include "common/fault.h"
#include "node/model/gguf.h"
#include "node/model/gguf_write.h"
#include "tests/check.h"

// A file under construction.
typedef struct build {
    uint8_t data[8192];
    size_t size;
} build;

static void put(build *b, const void *p, size_t size) {
    T_NEED(size <= sizeof(b->data) - b->size, "the builder is full");
    memcpy(b->data + b->size, p, size);
    b->size += size;
}

static void put_u32(build *b, uint32_t v) {
    uint8_t p[4];
    fl_put_u32(p, v);
    put(b, p, 4);
}

static void put_u64(build *b, uint64_t v) {
    uint8_t p[8];
    fl_put_u64(p, v);
    put(b, p, 8);
}

static void put_text(build *b, const char *s) {
    put_u64(b, strlen(s));
    put(b, s, strlen(s));
}

static void put_head(build *b, uint32_t version, uint64_t tensors, uint64_t keys) {
    b->size = 0;
    put(b, "GGUF", 4);
    put_u32(b, version);
    put_u64(b, tensors);
    put_u64(b, keys);
}

static void put_key_u32(build *b, const char *key, uint32_t v) {
    put_text(b, key);
    put_u32(b, NODE_GGUF_U32);
    put_u32(b, v);
}

static void put_tensor(build *b, const char *name, uint32_t type, uint32_t dims,
                       const uint64_t *dim, uint64_t offset) {
    put_text(b, name);
    put_u32(b, dims);
    for (uint32_t i = 0; i < dims; i++) put_u64(b, dim[i]);
    put_u32(b, type);
    put_u64(b, offset);
}

static void put_padding(build *b, size_t alignment, size_t extra) {
    static const uint8_t zero[4096];
    put(b, zero, (alignment - b->size % alignment) % alignment);
    put(b, zero, extra);
}

// Reads with the end of the bytes at an unmapped page, then touches everything that was accepted.
static fl_status open_guarded(const uint8_t *data, size_t size, fl_err *err) {
    uint8_t *p = t_guarded(size);
    memcpy(p, data, size);
    node_gguf *g = NULL;
    const fl_status st = node_gguf_open_bytes((fl_bytes){p, size}, &g, err);
    uint32_t sum = 0;
    if (st == FL_OK) {
        for (size_t i = 0; i < node_gguf_key_count(g); i++) {
            const node_gguf_value *v = &node_gguf_key_at(g, i)->value;
            for (size_t j = 0; j < v->bytes.size; j++) sum += v->bytes.data[j];
            fl_reader r = {.in = v->bytes};
            if (v->type == NODE_GGUF_ARRAY && v->item == NODE_GGUF_STRING)
                for (uint64_t j = 0; j < v->count; j++)
                    sum += (uint32_t)node_gguf_next_string(&r).size;
            T_CHECK(!r.bad, "strings that were checked can be walked");
        }
        for (size_t i = 0; i < node_gguf_tensor_count(g); i++) {
            const fl_bytes d = node_gguf_tensor_at(g, i)->data;
            T_CHECK(d.data >= p && d.data + d.size <= p + size, "data lies inside");
            for (size_t j = 0; j < d.size; j++) sum += d.data[j];
        }
    }
    node_gguf_close(g);
    t_guarded_free(p, size);
    return sum == UINT32_MAX ? FL_EIO : st; // `sum` must be computed
}

static void put_valid(build *b) {
    put_head(b, 3, 2, 8);
    put_key_u32(b, "general.alignment", 64);
    put_text(b, "general.architecture");
    put_u32(b, NODE_GGUF_STRING);
    put_text(b, "llama");
    put_text(b, "an.i16");
    put_u32(b, NODE_GGUF_I16);
    put(b, "\xfe\xff", 2);
    put_text(b, "a.bool");
    put_u32(b, NODE_GGUF_BOOL);
    put(b, "\1", 1);
    put_text(b, "a.f64");
    put_u32(b, NODE_GGUF_F64);
    put_u64(b, 0x3ff8000000000000u); // 1.5
    put_text(b, "tokens");
    put_u32(b, NODE_GGUF_ARRAY);
    put_u32(b, NODE_GGUF_STRING);
    put_u64(b, 3);
    put_text(b, "ab");
    put_text(b, "");
    put_text(b, "cde");
    put_text(b, "scores");
    put_u32(b, NODE_GGUF_ARRAY);
    put_u32(b, NODE_GGUF_F32);
    put_u64(b, 2);
    put_u32(b, 0x3f800000u);
    put_u32(b, 0x40000000u);
    put_text(b, "big");
    put_u32(b, NODE_GGUF_U64);
    put_u64(b, UINT64_MAX);
    put_tensor(b, "second", 3, 2, (uint64_t[]){64, 3}, 64); // Q4_1: 6 blocks of 20
    put_tensor(b, "first", 0, 1, (uint64_t[]){7}, 0);
    put_padding(b, 64, 64 + 120);
}

static void test_reads_every_kind_of_value(void) {
    build b;
    put_valid(&b);
    node_gguf *g = NULL;
    fl_err err;
    T_OK(node_gguf_open_bytes((fl_bytes){b.data, b.size}, &g, &err), err);
    T_EQ(node_gguf_version(g), 3);
    T_EQ(node_gguf_alignment(g), 64);
    fl_bytes s = {0};
    T_CHECK(node_gguf_get_string(g, "general.architecture", &s) && s.size == 5, "llama");
    uint32_t u = 7;
    T_CHECK(!node_gguf_get_u32(g, "an.i16", &u), "-2 is no u32");
    T_CHECK(!node_gguf_get_u32(g, "big", &u), "2^64 - 1 is no u32");
    T_CHECK(!node_gguf_get_u32(g, "a.bool", &u), "a boolean is no number");
    T_CHECK(!node_gguf_get_u32(g, "nothing", &u), "not there");
    T_EQ(u, 7);
    uint64_t v = 0;
    T_CHECK(!node_gguf_get_u64(g, "an.i16", &v), "-2 is no u64");
    T_CHECK(node_gguf_get_u64(g, "big", &v) && v == UINT64_MAX, "%llu", (unsigned long long)v);
    bool flag = false;
    T_CHECK(node_gguf_get_bool(g, "a.bool", &flag) && flag, "true");
    float f = 0;
    T_CHECK(node_gguf_get_f32(g, "a.f64", &f) && f == 1.5f, "%g", (double)f);
    node_gguf_value a;
    T_CHECK(!node_gguf_get_array(g, "tokens", NODE_GGUF_F32, &a), "of strings");
    T_NEED(node_gguf_get_array(g, "tokens", NODE_GGUF_STRING, &a) && a.count == 3, "tokens");
    fl_reader r = {.in = a.bytes};
    T_EQ(node_gguf_next_string(&r).size, 2);
    T_EQ(node_gguf_next_string(&r).size, 0);
    s = node_gguf_next_string(&r);
    T_CHECK(s.size == 3 && memcmp(s.data, "cde", 3) == 0 && fl_reader_left(&r) == 0, "cde");
    T_NEED(node_gguf_get_array(g, "scores", NODE_GGUF_F32, &a) && a.count == 2, "scores");
    T_CHECK(fl_get_f32(a.bytes.data + 4) == 2.0f, "2");
    const node_gguf_tensor *t = node_gguf_find_tensor(g, "second");
    T_NEED(t != NULL, "second");
    T_EQ(t->data.size, 120);
    T_EQ(t->data.data - b.data, (long long)(b.size - 120));
    T_EQ(node_gguf_find_tensor(g, "first")->data.size, 28);
    T_CHECK(node_gguf_find_tensor(g, "third") == NULL, "not there");
    T_CHECK(node_gguf_find_tensor(g, "") == NULL, "not there");
    node_gguf_close(g);
}

static void test_every_truncation_is_refused(void) {
    build b;
    put_valid(&b);
    fl_err err;
    T_OK(open_guarded(b.data, b.size, &err), err);
    for (size_t size = 0; size < b.size; size++) {
        const fl_status st = open_guarded(b.data, size, &err);
        T_CHECK(st == FL_EFORMAT, "%zu of %zu bytes give %s", size, b.size, fl_status_name(st));
    }
}

static void test_every_flipped_byte_is_survived(void) {
    build b;
    put_valid(&b);
    for (size_t i = 0; i < b.size; i++)
        for (uint32_t flip = 1; flip < 256; flip = flip == 1 ? 0x80 : flip == 0x80 ? 0xff : 256) {
            b.data[i] ^= (uint8_t)flip;
            const fl_status st = open_guarded(b.data, b.size, NULL);
            T_CHECK(st != FL_ENOMEM && st != FL_EIO, "byte %zu: %s", i, fl_status_name(st));
            b.data[i] ^= (uint8_t)flip;
        }
}

static void refused(const build *b, fl_status want, const char *reason) {
    fl_err err = {0};
    const fl_status st = open_guarded(b->data, b->size, &err);
    T_CHECK(st == want, "%s: got %s, want %s", reason, fl_status_name(st), fl_status_name(want));
    T_CHECK(strstr(err.text, reason) != NULL, "\"%s\" does not say \"%s\"", err.text, reason);
}

static void test_header_checks(void) {
    build b;
    put_head(&b, 3, 0, 0);
    b.data[0] = 'X';
    refused(&b, FL_EFORMAT, "magic");
    put_head(&b, 1, 0, 0);
    refused(&b, FL_EUNSUPPORTED, "version 1");
    put_head(&b, 4, 0, 0);
    refused(&b, FL_EUNSUPPORTED, "version 4");
    put_head(&b, 0x03000000, 0, 0);
    refused(&b, FL_EUNSUPPORTED, "big-endian");
    put_head(&b, 3, UINT64_MAX, 0);
    refused(&b, FL_ELIMIT, "limit");
    put_head(&b, 3, 0, NODE_GGUF_KEYS_MAX + 1);
    refused(&b, FL_ELIMIT, "limit");
    put_head(&b, 3, 0, 1000);
    put_padding(&b, 1, 100);
    refused(&b, FL_EFORMAT, "do not fit");
    put_head(&b, 3, 5, 0);
    put_padding(&b, 1, 100);
    refused(&b, FL_EFORMAT, "do not fit");
    put_head(&b, 2, 0, 0);
    T_EQ(open_guarded(b.data, b.size, NULL), FL_OK);
}

static void put_array(build *b, uint32_t item, uint64_t count) {
    put_head(b, 3, 0, 1);
    put_text(b, "arr");
    put_u32(b, NODE_GGUF_ARRAY);
    put_u32(b, item);
    put_u64(b, count);
    put_padding(b, 1, 64);
}

static void test_key_checks(void) {
    build b;
    put_head(&b, 3, 0, 1);
    put_u64(&b, UINT64_MAX);
    put_padding(&b, 1, 64);
    refused(&b, FL_EFORMAT, "past the end");
    put_head(&b, 3, 0, 1);
    put_key_u32(&b, "", 1);
    put_padding(&b, 1, 64);
    refused(&b, FL_EFORMAT, "empty name");
    put_head(&b, 3, 0, 1);
    put_u64(&b, NODE_GGUF_KEY_MAX + 1);
    put_padding(&b, 1, 4096);
    refused(&b, FL_ELIMIT, "name has 1025 bytes");
    put_head(&b, 3, 0, 1);
    put_text(&b, "odd");
    put_u32(&b, NODE_GGUF_TYPES);
    put_padding(&b, 1, 64);
    refused(&b, FL_EFORMAT, "'odd' has unknown type 13");
    put_head(&b, 3, 0, 2);
    put_key_u32(&b, "twice", 1);
    put_key_u32(&b, "twice", 1);
    refused(&b, FL_EFORMAT, "'twice' occurs twice");
    put_head(&b, 3, 0, 1);
    put_text(&b, "flag");
    put_u32(&b, NODE_GGUF_BOOL);
    put(&b, "\2", 1);
    refused(&b, FL_EFORMAT, "boolean of value 2");
    put_head(&b, 3, 0, 1);
    put_text(&b, "long");
    put_u32(&b, NODE_GGUF_STRING);
    put_u64(&b, UINT64_MAX - 7); // position + size wraps
    put_padding(&b, 1, 64);
    refused(&b, FL_EFORMAT, "'long' runs past");
}

static void test_array_checks(void) {
    build b;
    put_array(&b, NODE_GGUF_ARRAY, 1);
    refused(&b, FL_EUNSUPPORTED, "array of arrays");
    put_array(&b, 99, 1);
    refused(&b, FL_EFORMAT, "element type 99");
    put_array(&b, NODE_GGUF_U64, UINT64_MAX / 8 + 2); // count * 8 wraps to 8
    refused(&b, FL_EFORMAT, "more than the file has");
    put_array(&b, NODE_GGUF_U8, 65);
    refused(&b, FL_EFORMAT, "more than the file has");
    put_array(&b, NODE_GGUF_STRING, UINT64_MAX);
    refused(&b, FL_EFORMAT, "more than the file has");
    put_array(&b, NODE_GGUF_STRING, 8); // 8 empty strings: exactly 64 bytes
    T_EQ(open_guarded(b.data, b.size, NULL), FL_OK);
    b.data[b.size - 8] = 1; // the last one has a byte that is not there
    refused(&b, FL_EFORMAT, "string 7 of key 'arr'");
    put_array(&b, NODE_GGUF_BOOL, 64);
    b.data[b.size - 1] = 7;
    refused(&b, FL_EFORMAT, "boolean of value 7");
    put_array(&b, NODE_GGUF_U8, 64);
    T_EQ(open_guarded(b.data, b.size, NULL), FL_OK);
}

static void test_alignment_checks(void) {
    static const uint32_t bad[] = {0, 1, 4, 12, 33, 8192, 0x80000000u, UINT32_MAX};
    build b;
    for (size_t i = 0; i < FL_COUNT(bad); i++) {
        put_head(&b, 3, 0, 1);
        put_key_u32(&b, "general.alignment", bad[i]);
        refused(&b, FL_EFORMAT, "power of two");
    }
    put_head(&b, 3, 0, 1);
    put_text(&b, "general.alignment");
    put_u32(&b, NODE_GGUF_U64);
    put_u64(&b, 64);
    refused(&b, FL_EFORMAT, "not u32");
}

// One tensor of this shape, with `room` bytes of data behind the table.
static void put_one(build *b, uint32_t type, uint32_t dims, const uint64_t *dim, uint64_t offset,
                    size_t room) {
    put_head(b, 3, 1, 0);
    put_tensor(b, "t", type, dims, dim, offset);
    put_padding(b, NODE_GGUF_ALIGNMENT, room);
}

static void test_tensor_checks(void) {
    build b;
    put_one(&b, 0, 0, NULL, 0, 64);
    refused(&b, FL_EFORMAT, "'t' has 0 dimensions");
    put_one(&b, 0, 5, (uint64_t[]){1, 1, 1, 1, 1}, 0, 64);
    refused(&b, FL_EFORMAT, "'t' has 5 dimensions");
    put_one(&b, 0, 2, (uint64_t[]){1, 0}, 0, 64);
    refused(&b, FL_EFORMAT, "dimension 1 of tensor 't' is zero");
    static const uint32_t unknown[] = {4, 5, 31, 36, 40, 1000, UINT32_MAX};
    for (size_t i = 0; i < FL_COUNT(unknown); i++) {
        put_one(&b, unknown[i], 1, (uint64_t[]){32}, 0, 64);
        refused(&b, FL_EUNSUPPORTED, "'t' has unknown ggml type");
    }
    put_one(&b, 3, 1, (uint64_t[]){33}, 0, 64);
    refused(&b, FL_EFORMAT, "whole Q4_1 blocks of 32");
    put_one(&b, 0, 2, (uint64_t[]){1ull << 32, 1ull << 32}, 0, 64); // elements wrap to 0
    refused(&b, FL_ELIMIT, "too large");
    put_one(&b, 0, 1, (uint64_t[]){1ull << 62}, 0, 64); // bytes wrap to 0
    refused(&b, FL_ELIMIT, "too large");
    put_one(&b, 3, 4, (uint64_t[]){1ull << 20, 1ull << 20, 1ull << 20, 32}, 0, 64);
    refused(&b, FL_ELIMIT, "too large");
    put_one(&b, 0, 1, (uint64_t[]){1}, 4, 64);
    refused(&b, FL_EFORMAT, "not aligned to 32");
    put_one(&b, 0, 1, (uint64_t[]){1}, 96, 64);
    refused(&b, FL_EFORMAT, "past the end");
    put_one(&b, 0, 1, (uint64_t[]){1}, UINT64_MAX - 31, 64); // offset + size wraps
    refused(&b, FL_EFORMAT, "past the end");
    put_one(&b, 0, 1, (uint64_t[]){17}, 0, 64);
    refused(&b, FL_EFORMAT, "'t' ends past the end");
    put_one(&b, 0, 1, (uint64_t[]){16}, 0, 64);
    T_EQ(open_guarded(b.data, b.size, NULL), FL_OK);
}

static void test_tensors_must_not_overlap_or_repeat(void) {
    build b;
    for (uint64_t second = 0; second <= 64; second += 32) {
        put_head(&b, 3, 2, 0);
        put_tensor(&b, "a", 0, 1, (uint64_t[]){9}, 0); // 36 bytes
        put_tensor(&b, "b", 0, 1, (uint64_t[]){9}, second);
        put_padding(&b, 32, 128);
        if (second == 64)
            T_EQ(open_guarded(b.data, b.size, NULL), FL_OK);
        else
            refused(&b, FL_EFORMAT, "overlap");
    }
    put_head(&b, 3, 2, 0);
    put_tensor(&b, "a", 0, 1, (uint64_t[]){1}, 0);
    put_tensor(&b, "a", 0, 1, (uint64_t[]){1}, 32);
    put_padding(&b, 32, 64);
    refused(&b, FL_EFORMAT, "'a' occurs twice");
    put_head(&b, 3, 1, 0);
    put_u64(&b, NODE_GGUF_NAME_MAX + 1);
    put_padding(&b, 1, 256);
    refused(&b, FL_ELIMIT, "name has 65 bytes");
}

static void test_missing_file(void) {
    node_gguf *g = NULL;
    fl_err err;
    T_EQ(node_gguf_open("no-such-file.gguf", &g, &err), FL_ENOENT);
    T_CHECK(strstr(err.text, "no-such-file.gguf") != NULL, "%s", err.text);
    T_CHECK(g == NULL, "written only on success");
}

static const char path[] = "test_gguf.tmp.gguf";

static fl_status write_sample(fl_err *err) {
    static const float data[7] = {1, 2, 3, 4, 5, 6, 7};
    static const uint32_t bits[3] = {2, 3, 8};
    static const int32_t types[2] = {-1, 6};
    static const float scores[2] = {0.5f, -3};
    const fl_bytes words[2] = {{(const uint8_t *)"a", 1}, {NULL, 0}};
    node_gguf_writer *w = NULL;
    FL_TRY(node_gguf_writer_open(path, 64, &w, err));
    node_gguf_write_text(w, "general.architecture", "llama");
    node_gguf_write_u32(w, "n", 7);
    node_gguf_write_f32(w, "f", -0.25f);
    node_gguf_write_bool(w, "yes", true);
    node_gguf_write_u32s(w, "bits", bits, 3);
    node_gguf_write_i32s(w, "types", types, 2);
    node_gguf_write_f32s(w, "scores", scores, 2);
    node_gguf_write_strings(w, "words", words, 2);
    node_gguf_write_tensor(w, "x", 0, 1, (uint64_t[]){7});
    node_gguf_write_tensor(w, "y", 24, 2, (uint64_t[]){5, 1});
    fl_status st = FL_OK;
    for (size_t i = 0; i < sizeof(data) && st == FL_OK; i += 4) // in pieces
        st = node_gguf_write_data(w, (fl_bytes){(const uint8_t *)data + i, 4}, err);
    if (st == FL_OK) st = node_gguf_write_data(w, (fl_bytes){(const uint8_t *)"hello", 5}, err);
    if (st == FL_OK) return node_gguf_writer_commit(&w, err);
    node_gguf_writer_discard(w);
    return st;
}

static void check_sample(void) {
    node_gguf *g = NULL;
    fl_err err;
    T_OK(node_gguf_open(path, &g, &err), err);
    T_EQ(node_gguf_alignment(g), 64);
    T_EQ(node_gguf_key_count(g), 9);
    uint32_t n = 0;
    float f = 0;
    node_gguf_value a;
    T_CHECK(node_gguf_get_u32(g, "n", &n) && n == 7, "%u", n);
    T_CHECK(node_gguf_get_f32(g, "f", &f) && f == -0.25f, "%g", (double)f);
    T_CHECK(node_gguf_get_array(g, "bits", NODE_GGUF_U32, &a) && fl_get_u32(a.bytes.data + 8) == 8,
            "bits");
    T_CHECK(node_gguf_get_array(g, "types", NODE_GGUF_I32, &a) &&
                fl_get_u32(a.bytes.data) == UINT32_MAX,
            "types");
    T_CHECK(node_gguf_get_array(g, "words", NODE_GGUF_STRING, &a) && a.count == 2, "words");
    const node_gguf_tensor *x = node_gguf_find_tensor(g, "x"), *y = node_gguf_find_tensor(g, "y");
    T_NEED(x != NULL && y != NULL, "tensors");
    T_CHECK(fl_get_f32(x->data.data + 24) == 7.0f, "x[6]");
    T_CHECK(y->dim[0] == 5 && memcmp(y->data.data, "hello", 5) == 0, "y");
    T_EQ((uintptr_t)y->data.data % 64, 0);
    node_gguf_close(g);
}

static void test_writer_round_trip(void) {
    fl_err err;
    T_OK(write_sample(&err), err);
    check_sample();
    unlink(path);
}

static void test_writer_copies_keys(void) {
    build b;
    put_valid(&b);
    node_gguf *g = NULL, *copy = NULL;
    node_gguf_writer *w = NULL;
    fl_err err;
    T_OK(node_gguf_open_bytes((fl_bytes){b.data, b.size}, &g, &err), err);
    T_OK(node_gguf_writer_open(path, 32, &w, &err), err);
    for (size_t i = 0; i < node_gguf_key_count(g); i++)
        node_gguf_write_key(w, node_gguf_key_at(g, i));
    T_OK(node_gguf_writer_commit(&w, &err), err);
    T_OK(node_gguf_open(path, &copy, &err), err);
    T_EQ(node_gguf_key_count(copy), node_gguf_key_count(g));
    T_EQ(node_gguf_alignment(copy), 32);
    for (size_t i = 1; i < node_gguf_key_count(g); i++) { // 0 is the alignment
        const node_gguf_key *k = node_gguf_key_at(g, i), *c = node_gguf_key_at(copy, i);
        T_CHECK(k->value.type == c->value.type && k->value.count == c->value.count &&
                    k->value.bytes.size == c->value.bytes.size &&
                    memcmp(k->value.bytes.data, c->value.bytes.data, k->value.bytes.size) == 0,
                "key %zu", i);
    }
    node_gguf_close(g);
    node_gguf_close(copy);
    unlink(path);
}

static void test_writer_wants_all_data(void) {
    node_gguf_writer *w = NULL;
    fl_err err;
    T_OK(node_gguf_writer_open(path, 32, &w, &err), err);
    node_gguf_write_tensor(w, "x", 0, 1, (uint64_t[]){2});
    T_OK(node_gguf_write_data(w, (fl_bytes){(const uint8_t *)"1234567", 7}, &err), err);
    T_EQ(node_gguf_writer_commit(&w, &err), FL_ESTATE);
    T_CHECK(w == NULL && access(path, F_OK) != 0, "nothing is left behind");
    T_OK(node_gguf_writer_open(path, 32, &w, &err), err);
    node_gguf_write_tensor(w, "x", 0, 1, (uint64_t[]){1});
    T_EQ(node_gguf_write_data(w, (fl_bytes){(const uint8_t *)"12345", 5}, &err), FL_ESTATE);
    T_EQ(node_gguf_writer_commit(&w, &err), FL_ESTATE);
}

#ifdef FL_FAULTS
static void test_every_failure_is_clean(void) {
    unsigned n = 0;
    do {
        unlink(path);
        fl_fault_arm(++n);
        fl_err err;
        const fl_status st = write_sample(&err);
        const bool fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st != FL_OK) == fired, "n=%u gave %s", n, fl_status_name(st));
        if (access(path, F_OK) == 0) check_sample(); // whole or not there
        if (!fired) break;
    } while (n < 1000);
    T_CHECK(n > 8, "%u", n);
    n = 0;
    do {
        node_gguf *g = NULL;
        fl_fault_arm(++n);
        const fl_status st = node_gguf_open(path, &g, NULL);
        T_CHECK((st == FL_OK) == (g != NULL) && (st != FL_OK) == fl_fault_fired(), "n=%u", n);
        node_gguf_close(g);
    } while (fl_fault_fired());
    fl_fault_arm(0);
    unlink(path);
}
#endif

T_MAIN({"reads_every_kind_of_value", test_reads_every_kind_of_value},
       {"every_truncation_is_refused", test_every_truncation_is_refused},
       {"every_flipped_byte_is_survived", test_every_flipped_byte_is_survived},
       {"header_checks", test_header_checks}, {"key_checks", test_key_checks},
       {"array_checks", test_array_checks}, {"alignment_checks", test_alignment_checks},
       {"tensor_checks", test_tensor_checks},
       {"tensors_must_not_overlap_or_repeat", test_tensors_must_not_overlap_or_repeat},
       {"missing_file", test_missing_file}, {"writer_round_trip", test_writer_round_trip},
       {"writer_copies_keys", test_writer_copies_keys},
       {"writer_wants_all_data", test_writer_wants_all_data},
#ifdef FL_FAULTS
       {"every_failure_is_clean", test_every_failure_is_clean},
#endif
)
