// Goal: a model opens with the shapes its file says, and a file whose parts disagree is refused
// with the key or tensor named. Method: small models of every storage are written, opened and
// compared row by row with the float one; then one key or tensor at a time is left out or changed
// while copying a valid file.
#include "common/fault.h"
#include "kernels/ggml.h"
#include "node/model/container.h"
#include "node/model/gguf_write.h"
#include "tests/check.h"
#include "tests/model_fixtures.h"

static void test_opens_what_the_file_says(void) {
    t_model_opts o = t_model_odd();
    node_model *m = t_model_make(&o);
    T_STR(m->architecture, "llama");
    T_STR(m->name, "a random test model");
    T_EQ(m->layers, o.layers);
    T_EQ(m->hidden, o.hidden);
    T_EQ(m->ffn, o.ffn);
    T_EQ(m->heads, o.heads);
    T_EQ(m->kv_heads, o.kv_heads);
    T_EQ(m->head_size, o.head_size);
    T_EQ(m->vocabulary, o.vocabulary);
    T_EQ(m->context, 512);
    T_CHECK(m->tied && !m->compressed && !m->rope_half, "llama, tied");
    T_CHECK(m->head.data == m->embedding.data, "the head is the embedding");
    T_CHECK(m->rope_factors == NULL && m->rope_freq[0] == 1.0, "no factors");
    T_EQ(m->layer[2].linear[NODE_DOWN].cols, o.ffn);
    T_EQ(m->layer[2].linear[NODE_DOWN].rows, o.hidden);
    node_model_close(m);
    o.architecture = "qwen2";
    o.untied = o.biases = o.rope_factors = true;
    m = t_model_make(&o);
    T_CHECK(!m->tied && m->rope_half && m->head.data != m->embedding.data, "qwen2, untied");
    T_CHECK(m->layer[1].bias[0] != NULL && m->layer[1].bias[2] != NULL, "biases");
    T_NEAR(m->rope_freq[0] * (double)m->rope_factors[0], 1.0, 1e-12, "factors are applied");
    node_model_close(m);
}

// How far a storage may be from the float weights: half a step of the range 2 * spread, or the
// rounding of its format.
static double storage_error(const t_model_opts *o, double spread) {
    if (o->bits != 0) return spread / ((1 << o->bits) - 1) * 1.01 + spread * 0x1p-9;
    switch (o->type) {
    case FL_GGML_F16:
        return spread * 0x1p-11;
    case FL_GGML_BF16:
        return spread * 0x1p-7;
    case FL_GGML_Q8_0:
        return spread / 127 * 0.51 + spread * 0x1p-9;
    case FL_GGML_Q4_1:
        return spread / 15 * 1.01 + spread * 0x1p-9;
    default:
        return 0;
    }
}

static void check_rows(const t_model_opts *o, const node_matrix *got, const node_matrix *want) {
    float *a = calloc(got->cols, sizeof(float)), *b = calloc(got->cols, sizeof(float));
    T_EQ(got->rows, want->rows);
    double spread = 0;
    for (uint32_t r = 0; r < want->rows; r++) {
        node_matrix_row(want, r, b);
        for (uint32_t c = 0; c < want->cols; c++) spread = fmax(spread, fabs((double)b[c]));
    }
    for (uint32_t r = 0; r < got->rows; r++) {
        node_matrix_row(got, r, a);
        node_matrix_row(want, r, b);
        for (uint32_t c = 0; c < got->cols; c++)
            T_NEAR((double)a[c], (double)b[c], storage_error(o, spread), "type %u bits %u at %u,%u",
                   o->type, o->bits, r, c);
    }
    free(a);
    free(b);
}

static void check_same_model(const t_model_opts *o, const node_model *want) {
    node_model *m = t_model_make(o);
    check_rows(o, &m->embedding, &want->embedding);
    check_rows(o, &m->head, &want->head);
    for (uint32_t l = 0; l < m->layers; l++)
        for (node_module i = 0; i < NODE_MODULES; i++)
            check_rows(o, &m->layer[l].linear[i], &want->layer[l].linear[i]);
    node_model_close(m);
}

static void test_every_storage_is_the_same_model(void) {
    static const uint32_t types[] = {FL_GGML_F16, FL_GGML_BF16, FL_GGML_Q8_0, FL_GGML_Q4_1};
    t_model_opts o = t_model_even();
    o.untied = true;
    node_model *want = t_model_make(&o);
    for (size_t i = 0; i < FL_COUNT(types); i++) {
        o.type = types[i];
        check_same_model(&o, want);
    }
    for (o.bits = 2; o.bits <= 8; o.bits++) check_same_model(&o, want);
    node_model_close(want);
}

static void test_compressed_models_have_a_policy(void) {
    t_model_opts o = t_model_odd();
    o.bits = 3;
    o.pruned = true;
    node_model *m = t_model_make(&o);
    T_CHECK(m->compressed, "has a policy");
    T_STR(m->policy.name, "uniform");
    T_EQ(m->policy.head_bits, 3);
    T_EQ(m->policy.bits[1], 3);
    T_CHECK(m->policy.sparsity[0] == 0.0f && m->policy.sparsity[1] > 0.1f, "sparsity");
    T_CHECK(m->policy.sensitivity_quant[2] > m->policy.sensitivity_quant[1], "sensitivity");
    T_EQ(m->layer[0].kv_heads, 3);
    T_EQ(m->layer[1].kv_heads, 2);
    T_EQ(m->layer[1].heads, 4);
    T_EQ(m->layer[1].ffn, 80);
    T_EQ(m->layer[1].linear[NODE_Q].rows, 48);
    T_EQ(m->layer[1].linear[NODE_O].cols, 48);
    T_EQ(m->layer[1].linear[NODE_DOWN].cols, 80);
    T_EQ(m->layer[1].linear[NODE_UP].bits, 3);
    T_EQ(m->embedding.type, NODE_TYPE_PACKED);
    node_model_close(m);
}

static void test_exits_are_evenly_spaced(void) {
    t_model_opts o = t_model_even();
    o.layers = 7;
    node_model *m = t_model_make(&o);
    T_EQ(m->exits, 4);
    static const uint32_t want[] = {2, 4, 5, 7}; // 1.75 3.5 5.25 7
    for (uint32_t i = 0; i < 4; i++) T_EQ(m->exit_layer[i], want[i]);
    for (uint32_t n = 1; n <= 7; n++) {
        node_model_set_exits(m, n);
        T_EQ(m->exit_layer[n - 1], 7);
        for (uint32_t i = 1; i < n; i++)
            T_CHECK(m->exit_layer[i] > m->exit_layer[i - 1], "%u of %u", i, n);
    }
    node_model_close(m);
    o.layers = 2;
    m = t_model_make(&o);
    T_EQ(m->exits, 2);
    node_model_close(m);
}

static const char source[] = "test_model.src.gguf", target[] = "test_model.tmp.gguf";

// One change to a valid file: a key or a tensor left out, or replaced.
typedef struct change {
    const char *without; // key or tensor
    const char *u32;     // key to write instead
    uint32_t value;
    const char *u32s; // array of three
    uint32_t values[3];
    const char *f32;
    float number;
    const char *text, *string; // key and value
    const char *tensor;        // tensor to declare with another shape or type
    uint32_t type, dims;
    uint64_t dim[2];
} change;

static bool same(fl_bytes name, const char *text) {
    return text != NULL && name.size == strlen(text) && memcmp(name.data, text, name.size) == 0;
}

static void write_zeros(node_gguf_writer *w, size_t size) {
    uint8_t *zero = calloc(size, 1);
    fl_err err;
    T_OK(node_gguf_write_data(w, (fl_bytes){zero, size}, &err), err);
    free(zero);
}

static void copy_keys(const node_gguf *g, node_gguf_writer *w, const change *c) {
    for (size_t i = 0; i < node_gguf_key_count(g); i++) {
        const node_gguf_key *k = node_gguf_key_at(g, i);
        if (same(k->name, c->without) || same(k->name, c->u32) || same(k->name, c->u32s) ||
            same(k->name, c->f32) || same(k->name, c->text))
            continue;
        node_gguf_write_key(w, k);
    }
    if (c->u32 != NULL) node_gguf_write_u32(w, c->u32, c->value);
    if (c->u32s != NULL) node_gguf_write_u32s(w, c->u32s, c->values, 3);
    if (c->f32 != NULL) node_gguf_write_f32(w, c->f32, c->number);
    if (c->text != NULL) node_gguf_write_text(w, c->text, c->string);
}

static void copy_changed(const change *c) {
    node_gguf *g = NULL;
    node_gguf_writer *w = NULL;
    fl_err err;
    T_OK(node_gguf_open(source, &g, &err), err);
    T_OK(node_gguf_writer_open(target, 64, &w, &err), err);
    copy_keys(g, w, c);
    for (int data = 0; data < 2; data++)
        for (size_t i = 0; i < node_gguf_tensor_count(g); i++) {
            const node_gguf_tensor *t = node_gguf_tensor_at(g, i);
            const bool changed = same(t->name, c->tensor);
            char name[NODE_GGUF_NAME_MAX + 1] = {0};
            memcpy(name, t->name.data, t->name.size);
            if (same(t->name, c->without)) continue;
            const node_ggml_info *info = node_ggml_type(c->type);
            if (!data)
                node_gguf_write_tensor(w, name, changed ? c->type : t->type,
                                       changed ? c->dims : t->dims, changed ? c->dim : t->dim);
            else if (changed)
                write_zeros(w,
                            c->dim[0] / info->block * info->size * (c->dims > 1 ? c->dim[1] : 1));
            else
                T_OK(node_gguf_write_data(w, t->data, &err), err);
        }
    T_OK(node_gguf_writer_commit(&w, &err), err);
    node_gguf_close(g);
}

static void refused(const change *c, fl_status want, const char *reason) {
    copy_changed(c);
    node_model *m = NULL;
    fl_err err = {0};
    const fl_status st = node_model_open(target, &m, &err);
    T_CHECK(st == want, "%s: got %s, want %s", reason, fl_status_name(st), fl_status_name(want));
    T_CHECK(strstr(err.text, reason) != NULL, "\"%s\" does not say \"%s\"", err.text, reason);
    node_model_close(m);
    unlink(target);
}

static void test_wrong_keys_are_named(void) {
    fl_err err;
    t_model_opts o = t_model_odd();
    T_OK(t_model_write(source, &o, &err), err);
    refused(&(change){.text = "general.architecture", .string = "mamba"}, FL_EUNSUPPORTED,
            "'mamba'");
    refused(&(change){.without = "llama.block_count"}, FL_EFORMAT,
            "'llama.block_count' is missing");
    refused(&(change){.text = "llama.block_count", .string = "3"}, FL_EFORMAT, "whole number");
    refused(&(change){.u32 = "llama.block_count", .value = 0}, FL_EFORMAT, "below 1");
    refused(&(change){.u32 = "llama.block_count", .value = 257}, FL_ELIMIT, "above 256");
    refused(&(change){.u32 = "llama.block_count", .value = 4}, FL_EFORMAT, "'blk.3.attn_q.weight'");
    refused(&(change){.u32 = "llama.attention.head_count_kv", .value = 4}, FL_EFORMAT, "evenly");
    refused(&(change){.u32 = "llama.attention.head_count_kv", .value = 7}, FL_ELIMIT, "above 6");
    refused(&(change){.u32 = "llama.attention.key_length", .value = 14}, FL_EUNSUPPORTED, "values");
    refused(&(change){.u32 = "llama.rope.dimension_count", .value = 14}, FL_ELIMIT, "above 12");
    refused(&(change){.u32 = "llama.rope.dimension_count", .value = 11}, FL_EFORMAT, "odd");
    refused(&(change){.u32 = "llama.embedding_length", .value = 71}, FL_EFORMAT,
            "'token_embd.weight'");
    refused(&(change){.f32 = "llama.attention.layer_norm_rms_epsilon", .number = NAN}, FL_EFORMAT,
            "epsilon");
    refused(&(change){.without = "llama.attention.layer_norm_rms_epsilon"}, FL_EFORMAT, "missing");
    refused(&(change){.f32 = "llama.rope.freq_base", .number = -1}, FL_EFORMAT, "freq_base");
    refused(&(change){.text = "llama.rope.scaling.type", .string = "yarn"}, FL_EUNSUPPORTED,
            "yarn");
    unlink(source);
}

static void test_wrong_tensors_are_named(void) {
    fl_err err;
    t_model_opts o = t_model_odd();
    T_OK(t_model_write(source, &o, &err), err);
    refused(&(change){.without = "token_embd.weight"}, FL_EFORMAT,
            "'token_embd.weight' is missing");
    refused(&(change){.without = "output_norm.weight"}, FL_EFORMAT, "'output_norm.weight'");
    refused(&(change){.without = "blk.1.ffn_gate.weight"}, FL_EFORMAT, "'blk.1.ffn_gate.weight'");
    refused(&(change){.tensor = "blk.1.ffn_up.weight", .dims = 2, .dim = {72, 99}}, FL_EFORMAT,
            "is 99 x 72, not 100 x 72");
    refused(&(change){.tensor = "blk.1.ffn_up.weight", .dims = 1, .dim = {7200, 1}}, FL_EFORMAT,
            "'blk.1.ffn_up.weight'");
    refused(&(change){.tensor = "blk.1.ffn_up.weight", .type = 26, .dims = 2, .dim = {72, 100}},
            FL_EUNSUPPORTED, "type I32");
    refused(&(change){.tensor = "blk.0.attn_norm.weight", .type = 1, .dims = 1, .dim = {72}},
            FL_EFORMAT, "not 72 floats");
    refused(&(change){.tensor = "blk.0.attn_norm.weight", .dims = 1, .dim = {71}}, FL_EFORMAT,
            "not 72 floats");
    refused(&(change){.tensor = "token_embd.weight", .dims = 1, .dim = {72}}, FL_EFORMAT,
            "'token_embd.weight'");
    unlink(source);
    o.rope_factors = true;
    T_OK(t_model_write(source, &o, &err), err);
    refused(&(change){.tensor = "rope_freqs.weight", .dims = 1, .dim = {6}}, FL_EFORMAT,
            "not positive");
    unlink(source);
}

static void test_wrong_containers_are_named(void) {
    fl_err err;
    t_model_opts o = t_model_odd();
    o.bits = 4;
    o.pruned = true;
    T_OK(t_model_write(source, &o, &err), err);
    refused(&(change){.u32 = NODE_CONTAINER_VERSION, .value = 2}, FL_EUNSUPPORTED, "version 2");
    refused(&(change){.without = NODE_LUC_BITS}, FL_EFORMAT, NODE_LUC_BITS);
    refused(&(change){.u32 = NODE_LAYER_FFN, .value = 80}, FL_EFORMAT, NODE_LAYER_FFN);
    refused(&(change){.u32s = NODE_LAYER_KV_HEADS, .values = {3, 3, 3}}, FL_EFORMAT, "evenly");
    refused(&(change){.u32s = NODE_LAYER_FFN, .values = {100, 0, 100}}, FL_EFORMAT, "below 1");
    refused(&(change){.u32s = NODE_LAYER_FFN, .values = {100, 101, 100}}, FL_ELIMIT, "above 100");
    refused(&(change){.u32s = NODE_LAYER_FFN, .values = {100, 100, 100}}, FL_EFORMAT, "blk.1.");
    refused(&(change){.without = NODE_LUC_HEAD_BITS}, FL_EFORMAT, NODE_LUC_HEAD_BITS);
    refused(&(change){.without = "llama.vocab_size"}, FL_EFORMAT, "'token_embd.weight'");
    refused(&(change){.u32 = "llama.vocab_size", .value = 200}, FL_EFORMAT, "packed 200 x 72");
    refused(&(change){.without = NODE_CONTAINER_VERSION}, FL_EFORMAT, "'token_embd.weight'");
    refused(&(change){.tensor = "blk.1.attn_q.weight.packed", .type = 24, .dims = 1, .dim = {4096}},
            FL_EFORMAT, "'blk.1.attn_q.weight.packed' has 4096 bytes");
    refused(
        &(change){.tensor = "blk.1.attn_q.weight.packed", .type = 24, .dims = 2, .dim = {64, 1}},
        FL_EFORMAT, "one-dimensional");
    unlink(source);
}

#ifdef FL_FAULTS
static void test_every_failure_is_clean(void) {
    fl_err err;
    const t_model_opts o = t_model_odd();
    T_OK(t_model_write(source, &o, &err), err);
    unsigned n = 0;
    do {
        node_model *m = NULL;
        fl_fault_arm(++n);
        const fl_status st = node_model_open(source, &m, NULL);
        T_CHECK((st == FL_OK) == (m != NULL) && (st != FL_OK) == fl_fault_fired(), "n=%u", n);
        node_model_close(m);
    } while (fl_fault_fired());
    fl_fault_arm(0);
    T_CHECK(n > 4, "%u", n);
    unlink(source);
}
#endif

T_MAIN({"opens_what_the_file_says", test_opens_what_the_file_says},
       {"every_storage_is_the_same_model", test_every_storage_is_the_same_model},
       {"compressed_models_have_a_policy", test_compressed_models_have_a_policy},
       {"exits_are_evenly_spaced", test_exits_are_evenly_spaced},
       {"wrong_keys_are_named", test_wrong_keys_are_named},
       {"wrong_tensors_are_named", test_wrong_tensors_are_named},
       {"wrong_containers_are_named", test_wrong_containers_are_named},
#ifdef FL_FAULTS
       {"every_failure_is_clean", test_every_failure_is_clean},
#endif
)
