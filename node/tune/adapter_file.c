// The adapter's file: see adapter.h for the layout.
#include "common/checked.h"
#include "common/fault.h"
#include "common/file.h"
#include "node/tune/adapter.h"

#include <stdlib.h>
#include <string.h>

enum { FILE_MAX = 1 << 30, HEAD_FIXED = 8 + 8 + 4 * 5 + 8 + 4, SPAN_HEAD = 16 };
static const char magic[8] = "FLTADPT1";

static uint32_t crc32_of(const uint8_t *p, size_t size) {
    uint32_t table[16], crc = 0xffffffffu; // reflected polynomial of IEEE 802.3, a nibble at a time
    for (uint32_t i = 0; i < 16; i++) {
        uint32_t c = i;
        for (int k = 0; k < 4; k++) c = (c >> 1) ^ ((c & 1) != 0 ? 0xedb88320u : 0);
        table[i] = c;
    }
    for (size_t i = 0; i < size; i++) {
        crc ^= p[i];
        crc = (crc >> 4) ^ table[crc & 15];
        crc = (crc >> 4) ^ table[crc & 15];
    }
    return ~crc;
}

static bool is_born(const node_adapter *a, uint32_t layer) {
    if (a->version[layer] != 0) return false;
    for (uint32_t i = 0; i < a->span_count[layer]; i++) {
        uint32_t bits;
        memcpy(&bits, &a->span[layer][i], sizeof(bits));
        if (bits != 0) return false;
    }
    return true;
}

static bool is_stored(const node_adapter *a, uint32_t id) {
    return id >= a->lora.layers || !is_born(a, id);
}

size_t node_adapter_file_size(const node_adapter *a) {
    size_t size = HEAD_FIXED + 12 * (size_t)a->lora.exits + 8 + 4 + 4;
    for (uint32_t id = 0; id < node_adapter_spans(a); id++)
        if (is_stored(a, id)) size += SPAN_HEAD + (size_t)a->span_count[id] * sizeof(float);
    return size;
}

static uint8_t *put_u32(uint8_t *p, uint32_t v) {
    fl_put_u32(p, v);
    return p + 4;
}

static uint8_t *put_u64(uint8_t *p, uint64_t v) {
    fl_put_u64(p, v);
    return p + 8;
}

static uint8_t *put_floats(uint8_t *p, const float *v, uint32_t count) {
    for (uint32_t i = 0; i < count; i++, p += 4) fl_put_f32(p, v[i]);
    return p;
}

static uint8_t *put_header(const node_adapter *a, uint8_t *p) {
    memcpy(p, magic, sizeof(magic));
    p = put_u64(p + sizeof(magic), a->model_id);
    p = put_u32(p, a->lora.layers);
    p = put_u32(p, a->hidden);
    p = put_u32(p, a->vocabulary);
    p = put_u32(p, a->opts.rank);
    p = put_floats(p, &a->opts.alpha, 1);
    p = put_u64(p, a->opts.seed);
    p = put_u32(p, a->lora.exits);
    for (uint32_t t = 0; t < a->lora.exits; t++) p = put_u32(p, a->exit_layer[t]);
    p = put_u32(p, (uint32_t)a->vote.mode);
    p = put_u32(p, a->vote.fell_back);
    p = put_floats(p, a->vote.weight, a->lora.exits);
    return put_floats(p, a->vote.tau, a->lora.exits);
}

void node_adapter_encode(const node_adapter *a, uint8_t *out) {
    uint32_t stored = 0;
    for (uint32_t id = 0; id < node_adapter_spans(a); id++) stored += is_stored(a, id);
    uint8_t *p = put_u32(put_header(a, out), stored);
    for (uint32_t id = 0; id < node_adapter_spans(a); id++) {
        if (!is_stored(a, id)) continue;
        p = put_u32(p, id);
        p = put_u64(p, a->version[id]);
        p = put_u32(p, a->span_count[id]);
        p = put_floats(p, a->span[id], a->span_count[id]);
    }
    put_u32(p, crc32_of(out, (size_t)(p - out)));
}

static float read_f32(fl_reader *r) {
    uint8_t bytes[4];
    fl_put_u32(bytes, fl_read_u32(r));
    return fl_get_f32(bytes);
}

typedef struct header {
    uint64_t model_id;
    uint32_t layers, hidden, vocabulary;
    node_adapter_opts opts;
    uint32_t exits, exit_layer[NODE_EXITS_MAX];
    node_vote vote;
    uint32_t stored;
} header;

static fl_status read_header(fl_reader *r, header *h, fl_err *err) {
    const fl_bytes mark = fl_read_bytes(r, sizeof(magic));
    if (r->bad || memcmp(mark.data, magic, sizeof(magic)) != 0)
        return FL_FAIL(err, FL_EFORMAT, "this is not an adapter of fleetune");
    h->model_id = fl_read_u64(r);
    h->layers = fl_read_u32(r);
    h->hidden = fl_read_u32(r);
    h->vocabulary = fl_read_u32(r);
    h->opts.rank = fl_read_u32(r);
    h->opts.alpha = read_f32(r);
    h->opts.seed = fl_read_u64(r);
    h->exits = fl_read_u32(r);
    if (h->exits < 1 || h->exits > NODE_EXITS_MAX)
        return FL_FAIL(err, FL_EFORMAT, "the adapter names %u exits; 1 to %d are possible",
                       h->exits, NODE_EXITS_MAX);
    for (uint32_t t = 0; t < h->exits; t++) h->exit_layer[t] = fl_read_u32(r);
    const uint32_t mode = fl_read_u32(r), fell_back = fl_read_u32(r);
    if (mode > NODE_VOTE_LAST || fell_back > 1)
        return FL_FAIL(err, FL_EFORMAT, "the adapter's vote is damaged");
    h->vote =
        (node_vote){.mode = (node_vote_mode)mode, .exits = h->exits, .fell_back = fell_back != 0};
    for (uint32_t t = 0; t < h->exits; t++) h->vote.weight[t] = read_f32(r);
    for (uint32_t t = 0; t < h->exits; t++) h->vote.tau[t] = read_f32(r);
    h->stored = fl_read_u32(r);
    if (r->bad) return FL_FAIL(err, FL_EFORMAT, "the adapter ends in its header");
    return node_vote_check(&h->vote, err);
}

static fl_status check_model(const header *h, const node_model *model, bool any_base, fl_err *err) {
    if (h->layers != model->layers || h->hidden != model->hidden ||
        h->vocabulary != model->vocabulary)
        return FL_FAIL(err, FL_EARG,
                       "the adapter is for a model of %u layers of %u with %u tokens; this one has "
                       "%u of %u with %u",
                       h->layers, h->hidden, h->vocabulary, model->layers, model->hidden,
                       model->vocabulary);
    if (!any_base && h->model_id != node_adapter_model_id(model))
        return FL_FAIL(
            err, FL_EARG,
            "the adapter was made for another model file: use the model it was tuned on");
    if (h->exits > model->layers)
        return FL_FAIL(err, FL_EFORMAT, "the adapter has more exits than the model has layers");
    return FL_OK;
}

static fl_status read_spans(fl_reader *r, uint32_t stored, node_adapter *a, fl_err *err) {
    uint32_t next = 0, gains = 0;
    for (uint32_t i = 0; i < stored; i++) {
        const uint32_t id = fl_read_u32(r);
        const uint64_t version = fl_read_u64(r);
        const uint32_t count = fl_read_u32(r);
        if (r->bad || id < next || id >= node_adapter_spans(a) || count != a->span_count[id])
            return FL_FAIL(err, FL_EFORMAT, "span %u of the adapter does not fit this model", i);
        const fl_bytes bytes = fl_read_bytes(r, (uint64_t)count * sizeof(float));
        if (r->bad) return FL_FAIL(err, FL_EFORMAT, "the adapter ends inside span %u", id);
        for (uint32_t k = 0; k < count; k++) {
            a->span[id][k] = fl_get_f32(bytes.data + (size_t)k * sizeof(float));
            if (!(a->span[id][k] - a->span[id][k] == 0.0f)) // infinite or not a number
                return FL_FAIL(err, FL_EFORMAT, "span %u of the adapter is not finite", id);
        }
        a->version[id] = version;
        if (!is_stored(a, id))
            return FL_FAIL(err, FL_EFORMAT, "span %u of the adapter says nothing", id);
        gains += id >= a->lora.layers;
        next = id + 1;
    }
    if (gains != a->lora.exits || r->bad || fl_reader_left(r) != 0)
        return FL_FAIL(err, FL_EFORMAT, "the adapter lacks exit gains or has bytes left over");
    return FL_OK;
}

fl_status node_adapter_decode(fl_bytes bytes, node_model *model, bool any_base, node_adapter **ret,
                              fl_err *err) {
    header h = {0};
    if (bytes.size < 4) return FL_FAIL(err, FL_EFORMAT, "this is not an adapter of fleetune");
    fl_reader r = {.in = {bytes.data, bytes.size - 4}};
    FL_TRY(read_header(&r, &h, err));
    if (crc32_of(bytes.data, r.in.size) != fl_get_u32(bytes.data + r.in.size))
        return FL_FAIL(err, FL_EFORMAT, "the adapter is damaged: its checksum does not match");
    FL_TRY(check_model(&h, model, any_base, err));
    const uint32_t exits_before = model->exits;
    node_adapter *a = NULL;
    node_model_set_exits(model, h.exits);
    fl_status st = node_adapter_open(model, &h.opts, &a, err);
    if (st != FL_OK) goto out;
    if (memcmp(h.exit_layer, a->exit_layer, h.exits * sizeof(uint32_t)) != 0) {
        st = FL_FAIL(err, FL_EFORMAT, "the adapter's exits lie after other layers than here");
        goto out;
    }
    st = read_spans(&r, h.stored, a, err);
    if (st != FL_OK) goto out;
    a->vote = h.vote;
    a->model_id = h.model_id;
    *ret = a;
    a = NULL;
out:
    if (st != FL_OK && exits_before != 0) node_model_set_exits(model, exits_before);
    node_adapter_close(a);
    return st;
}

fl_status node_adapter_save(const node_adapter *a, const char *path, fl_err *err) {
    const size_t size = node_adapter_file_size(a);
    uint8_t *bytes = fl_fault() ? NULL : malloc(size);
    if (bytes == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to write %s", path);
    node_adapter_encode(a, bytes);
    const fl_status st = fl_file_replace(path, (fl_bytes){bytes, size}, err);
    free(bytes);
    return st;
}

fl_status node_adapter_load(const char *path, node_model *model, bool any_base, node_adapter **ret,
                            fl_err *err) {
    uint8_t *data = NULL;
    size_t size = 0;
    FL_TRY(fl_file_read(path, FILE_MAX, &data, &size, err));
    const fl_status st = node_adapter_decode((fl_bytes){data, size}, model, any_base, ret, err);
    free(data);
    return st;
}
