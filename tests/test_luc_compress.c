// Goal: compressing gives a file that opens, keeps its budget, says what it did, and still computes
// what the model computed; pruned layers are really smaller; failures leave nothing behind.
// Method: small random models with token ids for calibration; outputs of the last layer are
// compared with the original's.
#include "node/luc/compress.h"

#include "common/fault.h"
#include "common/file.h"
#include "tests/check.h"
#include "tests/model_fixtures.h"

enum { CALIBRATION = 96, TOKENS = 48 };

static fl_kern kern;
static node_engine engine = {&kern, NULL};
static int32_t ids[CALIBRATION];

static const char *scratch_path(void) {
    static char path[128];
    snprintf(path, sizeof(path), "test_luc_compress.%d.gguf", (int)getpid());
    return path;
}

static node_compress_opts opts_for(const node_model *m, node_policy_kind policy, double bits) {
    fl_kern_select(&kern, fl_cpu_detect());
    for (int i = 0; i < CALIBRATION; i++) ids[i] = (int32_t)(t_rand() % m->vocabulary);
    return (node_compress_opts){
        .policy = policy, .bits = bits, .ids = ids, .id_count = CALIBRATION, .tokens = CALIBRATION};
}

static node_model *compressed(const node_model *m, const node_compress_opts *o,
                              node_compress_result *r) {
    fl_err err;
    node_model *out = NULL;
    T_OK(node_compress(&engine, m, o, scratch_path(), r, &err), err);
    T_OK(node_model_open(scratch_path(), &out, &err), err);
    T_EQ(out->bytes, r->bytes_out);
    T_EQ(m->bytes, r->bytes_in);
    T_CHECK(out->compressed, "has a policy");
    unlink(scratch_path());
    return out;
}

// The residual stream behind the last layer, out[TOKENS][hidden].
static void run(const node_model *m, float *out) {
    int32_t id[TOKENS];
    uint32_t pos[TOKENS], begin[TOKENS] = {0};
    fl_arena a;
    node_acts acts;
    node_scratch *scratch = NULL;
    void *block = NULL;
    for (uint32_t t = 0; t < TOKENS; t++) {
        id[t] = (int32_t)((t * 37 + 11) % m->vocabulary);
        pos[t] = t;
    }
    for (int pass = 0; pass < 2; pass++) {
        const size_t size = pass == 0 ? 0 : (a.peak + 127) / 64 * 64;
        if (pass == 0) fl_arena_init_counting(&a);
        if (pass == 1) fl_arena_init(&a, block = aligned_alloc(64, size), size);
        node_acts_bind(&acts, m, TOKENS, TOKENS, 0, &a);
        scratch = node_scratch_bind(m, TOKENS, 1, &a);
    }
    const node_batch batch = {TOKENS, id, pos, begin, pos};
    node_embed(&engine, m, &batch, out);
    for (uint32_t l = 0; l < m->layers; l++)
        node_layer_forward(&engine, m, l, NULL, &batch, &acts, scratch, out);
    free(block);
}

// |a - b|^2 / |a|^2
static double distance(const node_model *a, const node_model *b) {
    static float x[TOKENS * 128], y[TOKENS * 128];
    double gap = 0, all = 0;
    T_NEED(a->hidden <= 128 && a->hidden == b->hidden, "shapes");
    run(a, x);
    run(b, y);
    for (uint32_t i = 0; i < TOKENS * a->hidden; i++) {
        gap += pow((double)x[i] - (double)y[i], 2);
        all += (double)x[i] * (double)x[i];
    }
    return gap / all;
}

static void check_metadata(const node_model *m, const node_compress_result *r, const char *policy) {
    T_STR(m->policy.name, policy);
    T_EQ(m->policy.head_bits, r->head_bits);
    for (uint32_t l = 0; l < m->layers; l++) {
        const node_compress_layer *want = &r->layer[l];
        T_EQ(m->policy.bits[l], want->bits);
        T_NEAR((double)m->policy.sparsity[l], want->sparsity, 1e-6, "layer %u", l);
        T_EQ(m->layer[l].ffn, want->ffn);
        T_EQ(m->layer[l].kv_heads, want->kv_heads);
        T_EQ(m->layer[l].heads, want->heads);
        for (int k = 0; k < NODE_MODULES; k++)
            T_EQ(m->layer[l].linear[k].bits, want->matrix_bits[k]);
        T_CHECK(want->sensitivity_quant > 0, "layer %u", l);
    }
}

static void test_eight_bits_change_little(void) {
    const node_policy_kind kinds[] = {NODE_POLICY_LUC, NODE_POLICY_UNIFORM, NODE_POLICY_PAPER};
    for (int odd = 0; odd < 2; odd++)
        for (size_t k = 0; k < FL_COUNT(kinds); k++) {
            t_model_opts shape = odd ? t_model_odd() : t_model_even();
            shape.biases = shape.untied = k == 1;
            if (k == 1) shape.architecture = "qwen2";
            node_model *m = t_model_make(&shape);
            static node_compress_result r;
            const node_compress_opts o = opts_for(m, kinds[k], 8.0);
            node_model *c = compressed(m, &o, &r);
            check_metadata(c, &r, node_policy_name(kinds[k]));
            T_NEAR(r.mean_bits, 8.0, 1e-9, "mean bits");
            const double d = distance(m, c);
            T_CHECK(d < 1e-3, "odd %d policy %zu: %g", odd, k, d);
            node_model_close(c);
            node_model_close(m);
        }
}

static void test_budget_and_order_of_policies(void) {
    const t_model_opts shape = t_model_even();
    node_model *m = t_model_make(&shape);
    static node_compress_result r[2];
    double d[2];
    for (int k = 0; k < 2; k++) {
        t_seed = 5;
        const node_compress_opts o =
            opts_for(m, k == 0 ? NODE_POLICY_UNIFORM : NODE_POLICY_LUC, 3.0);
        node_model *c = compressed(m, &o, &r[k]);
        T_NEAR(r[k].mean_bits, 3.0, 0.03, "policy %d", k);
        d[k] = distance(m, c);
        node_model_close(c);
    }
    T_CHECK(r[1].layer_bytes <= r[0].layer_bytes, "luc takes %llu bytes, uniform %llu",
            (unsigned long long)r[1].layer_bytes, (unsigned long long)r[0].layer_bytes);
    T_CHECK(d[1] < 1.2 * d[0], "luc %g, uniform %g", d[1], d[0]);
    node_model_close(m);
}

static void test_structured_pruning(void) {
    t_model_opts shape = t_model_even();
    shape.layers = 6, shape.ffn = 160, shape.biases = true, shape.architecture = "qwen2";
    node_model *m = t_model_make(&shape);
    const node_policy_kind kinds[] = {NODE_POLICY_UNIFORM, NODE_POLICY_PAPER, NODE_POLICY_LUC};
    for (size_t k = 0; k < FL_COUNT(kinds); k++) {
        static node_compress_result r;
        node_compress_opts o = opts_for(m, kinds[k], 8.0);
        o.sparsity = 0.25;
        node_model *c = compressed(m, &o, &r);
        check_metadata(c, &r, node_policy_name(kinds[k]));
        T_NEAR(r.mean_sparsity, 0.25, 0.03, "policy %zu", k); // blocks are 7 % of so small a layer
        uint32_t removed = 0;
        for (uint32_t l = 0; l < m->layers; l++) {
            removed += m->layer[l].ffn - c->layer[l].ffn;
            removed += m->layer[l].kv_heads - c->layer[l].kv_heads;
            T_EQ(c->layer[l].ffn % 16, 0);
            T_EQ(c->layer[l].linear[NODE_DOWN].cols, c->layer[l].ffn);
            T_CHECK(r.layer[l].sensitivity_prune > 0, "layer %u", l);
        }
        T_CHECK(removed != 0, "something is gone");
        const double d = distance(m, c);
        T_CHECK(d > 1e-6 && d < 0.8, "policy %zu: %g", k, d);
        node_model_close(c);
    }
    node_model_close(m);
}

static void test_unstructured_pruning(void) {
    const t_model_opts shape = t_model_odd();
    node_model *m = t_model_make(&shape);
    for (int k = 0; k < 2; k++) {
        static node_compress_result r;
        node_compress_opts o = opts_for(m, k == 0 ? NODE_POLICY_UNIFORM : NODE_POLICY_LUC, 6.0);
        o.sparsity = 0.4, o.prune = NODE_PRUNE_UNSTRUCTURED;
        node_model *c = compressed(m, &o, &r);
        T_NEAR(r.mean_sparsity, 0.4, 0.004, "policy %d", k);
        double zeros = 0, all = 0;
        for (uint32_t l = 0; l < c->layers; l++)
            for (int i = 0; i < NODE_MODULES; i++) {
                const node_matrix *w = &c->layer[l].linear[i];
                for (uint32_t row = 0; row < w->rows; row++) {
                    float v[256];
                    node_matrix_row(w, row, v);
                    for (uint32_t col = 0; col < w->cols; col++) zeros += v[col] == 0.0f;
                    all += w->cols;
                }
            }
        // Rounding makes some of the small ones that stay zero as well.
        T_CHECK(zeros / all > 0.39 && zeros / all < 0.5, "%g of the weights are zero", zeros / all);
        T_CHECK(distance(m, c) < 0.8, "%g", distance(m, c));
        node_model_close(c);
    }
    node_model_close(m);
}

static void test_refusals_leave_no_file(void) {
    const t_model_opts shape = t_model_odd();
    node_model *m = t_model_make(&shape);
    static node_compress_result r;
    const node_compress_opts good = opts_for(m, NODE_POLICY_LUC, 4.0);
    node_compress_opts o = good;
    const fl_status wants[] = {FL_EARG,    FL_EARG,    FL_EARG,    FL_EARG,  FL_EFORMAT,
                               FL_EFORMAT, FL_EFORMAT, FL_EFORMAT, FL_ENOENT};
    for (size_t i = 0; i < FL_COUNT(wants); i++) {
        fl_err err = {0};
        o = good;
        const int32_t kept = ids[7];
        if (i == 0) o.bits = 1.5;
        if (i == 1) o.bits = NAN;
        if (i == 2) o.sparsity = 0.9;
        if (i == 3) o.head_bits = 9;
        if (i == 4) o.calibration = (fl_bytes){(const uint8_t *)"\xFF", 1};
        if (i == 5) o.id_count = 31;
        if (i == 6) ids[7] = (int32_t)m->vocabulary;
        if (i == 7) ids[7] = -1;
        if (i == 8) o.ids = NULL; // the fixture carries no tokenizer
        const fl_status got = node_compress(&engine, m, &o, scratch_path(), &r, &err);
        ids[7] = kept;
        T_CHECK(got == wants[i] && err.text[0] != '\0', "case %zu: %s (%s)", i, fl_status_name(got),
                err.text);
        T_CHECK(!fl_file_exists(scratch_path()), "case %zu left a file", i);
    }
    node_model *c = compressed(m, &good, &r);
    T_EQ(node_compress(&engine, c, &good, scratch_path(), &r, NULL), FL_ESTATE);
    node_model_close(c);
    node_model_close(m);
}

#ifdef FL_FAULTS
static void test_every_failure_is_clean(void) {
    t_model_opts shape = t_model_even();
    shape.layers = 1;
    node_model *m = t_model_make(&shape);
    static node_compress_result r;
    const node_compress_opts o = opts_for(m, NODE_POLICY_UNIFORM, 4.0);
    unsigned n = 0;
    bool fired;
    do {
        fl_fault_arm(++n);
        const fl_status st = node_compress(&engine, m, &o, scratch_path(), &r, NULL);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK(fired == (st != FL_OK), "n=%u: %s", n, fl_status_name(st));
        if (fl_file_exists(
                scratch_path())) { // whole, or not there: its folder's sync may fail late
            node_model *c = NULL;
            T_EQ(node_model_open(scratch_path(), &c, NULL), FL_OK);
            node_model_close(c);
        }
        unlink(scratch_path());
    } while (fired);
    T_CHECK(n > 8, "%u fallible calls", n);
    node_model_close(m);
}
#endif

T_MAIN({"eight_bits_change_little", test_eight_bits_change_little},
       {"budget_and_order_of_policies", test_budget_and_order_of_policies},
       {"structured_pruning", test_structured_pruning},
       {"unstructured_pruning", test_unstructured_pruning},
#ifdef FL_FAULTS
       {"every_failure_is_clean", test_every_failure_is_clean},
#endif
       {"refusals_leave_no_file", test_refusals_leave_no_file})
