// Goal: an adapter's file is the adapter: what is saved is loaded bit for bit, and nothing else is.
// Method: round trips over shapes, every truncation, every flipped bit, every fault, wrong models.
#include "common/fault.h"
#include "common/file.h"
#include "node/tune/adapter.h"
#include "tests/tiny_model.h"

static node_adapter *make(tiny_model *t, uint32_t rank) {
    node_adapter_opts opts = node_adapter_defaults();
    fl_err err;
    node_adapter *a = NULL;
    opts.rank = rank;
    opts.seed = t_rand();
    T_OK(node_adapter_open(&t->model, &opts, &a, &err), err);
    return a;
}

// Layers 1 and 3 are trained, the others as born; versions vary.
static void train(node_adapter *a) {
    for (uint32_t id = 1; id < node_adapter_spans(a); id += 2)
        for (uint32_t i = 0; i < a->span_count[id]; i++) a->span[id][i] += t_randf();
    a->version[3] = 7;
    a->version[2] = 1; // touched by the federation, yet all zero
    a->vote.mode = NODE_VOTE_MIXTURE;
    a->vote.tau[0] = 1.3f;
    if (a->vote.exits == 1) return;
    a->vote.weight[0] = 0.25f;
    a->vote.weight[a->vote.exits - 1] = 0.75f;
}

static bool same(const node_adapter *a, const node_adapter *b) {
    bool ok = node_adapter_spans(a) == node_adapter_spans(b) && a->model_id == b->model_id &&
              memcmp(&a->opts, &b->opts, sizeof(a->opts)) == 0 &&
              memcmp(a->version, b->version, sizeof(a->version)) == 0 &&
              memcmp(&a->vote, &b->vote, sizeof(a->vote)) == 0;
    for (uint32_t id = 0; ok && id < node_adapter_spans(a); id++)
        ok = a->span_count[id] == b->span_count[id] &&
             memcmp(a->span[id], b->span[id], a->span_count[id] * sizeof(float)) == 0;
    return ok;
}

static void test_round_trip(void) {
    for (uint32_t rank = 1; rank <= 9; rank += 4)
        for (uint32_t exits = 1; exits <= 4; exits++) {
            tiny_shape shape = tiny_default;
            shape.exits = exits;
            tiny_model *t = tiny_open(&shape);
            node_adapter *a = make(t, rank), *b = NULL;
            train(a);
            const size_t size = node_adapter_file_size(a);
            uint8_t *bytes = t_guarded(size), *again = t_guarded(size);
            node_adapter_encode(a, bytes);
            node_model_set_exits(&t->model, 2); // decode puts the adapter's own back
            fl_err err;
            T_OK(node_adapter_decode((fl_bytes){bytes, size}, &t->model, false, &b, &err), err);
            T_EQ(t->model.exits, exits);
            T_CHECK(same(a, b), "rank %u, %u exits", rank, exits);
            for (int m = 0; m < NODE_MODULES; m++)
                T_CHECK(memcmp(a->lora.layer[1].a[m], b->lora.layer[1].a[m],
                               rank * t->model.layer[1].linear[m].cols * sizeof(float)) == 0,
                        "A of module %d is drawn again", m);
            T_EQ(node_adapter_file_size(b), size);
            node_adapter_encode(b, again);
            T_CHECK(memcmp(bytes, again, size) == 0, "the file writes back to itself");
            t_guarded_free(bytes, size);
            t_guarded_free(again, size);
            node_adapter_close(a);
            node_adapter_close(b);
            tiny_close(t);
        }
}

static void test_every_truncation_and_bit_flip_is_refused(void) {
    tiny_shape shape = tiny_default;
    shape.layers = 2, shape.hidden = 6, shape.heads = 2, shape.kv_heads = 1, shape.head_size = 4;
    shape.ffn = 5;
    tiny_model *t = tiny_open(&shape);
    node_adapter *a = make(t, 1), *b = NULL;
    for (uint32_t i = 0; i < a->span_count[1]; i++) a->span[1][i] = t_randf();
    const size_t size = node_adapter_file_size(a);
    uint8_t *whole = malloc(size);
    node_adapter_encode(a, whole);
    for (size_t n = 0; n < size; n++) {
        uint8_t *cut = t_guarded(n);
        memcpy(cut, whole, n);
        T_CHECK(node_adapter_decode((fl_bytes){cut, n}, &t->model, true, &b, NULL) != FL_OK,
                "cut to %zu", n);
        t_guarded_free(cut, n);
    }
    for (size_t bit = 0; bit < 8 * size; bit++) {
        whole[bit / 8] ^= (uint8_t)(1u << bit % 8);
        T_CHECK(node_adapter_decode((fl_bytes){whole, size}, &t->model, true, &b, NULL) != FL_OK,
                "bit %zu", bit);
        whole[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    T_CHECK(b == NULL, "nothing was given out");
    T_EQ(t->model.exits, shape.exits);
    free(whole);
    node_adapter_close(a);
    tiny_close(t);
}

static void test_wrong_models_are_named(void) {
    tiny_shape shape = tiny_default;
    tiny_model *t = tiny_open(&shape), *other = tiny_open(&shape);
    shape.layers = 5;
    tiny_model *deeper = tiny_open(&shape);
    node_adapter *a = make(t, 4), *b = NULL;
    const size_t size = node_adapter_file_size(a);
    uint8_t *bytes = malloc(size);
    node_adapter_encode(a, bytes);
    const fl_bytes file = {bytes, size};
    fl_err err;
    T_EQ(node_adapter_decode(file, &other->model, false, &b, &err), FL_EARG);
    T_CHECK(strstr(err.text, "another model") != NULL, "%s", err.text);
    T_EQ(node_adapter_decode(file, &deeper->model, true, &b, &err), FL_EARG);
    T_CHECK(strstr(err.text, "4 layers") != NULL, "%s", err.text);
    T_OK(node_adapter_decode(file, &other->model, true, &b, &err), err);
    node_adapter_close(b);
    free(bytes);
    node_adapter_close(a);
    tiny_close(t);
    tiny_close(other);
    tiny_close(deeper);
}

static void test_options_are_checked(void) {
    tiny_model *t = tiny_open(&tiny_default);
    static const float alphas[] = {0.0f, -1.0f, 1e9f, NAN};
    node_adapter_opts opts = node_adapter_defaults();
    node_adapter *a = NULL;
    opts.rank = 0;
    T_EQ(node_adapter_open(&t->model, &opts, &a, NULL), FL_EARG);
    opts.rank = 65;
    T_EQ(node_adapter_open(&t->model, &opts, &a, NULL), FL_EARG);
    opts.rank = 64;
    for (size_t i = 0; i < FL_COUNT(alphas); i++) {
        opts.alpha = alphas[i];
        T_EQ(node_adapter_open(&t->model, &opts, &a, NULL), FL_EARG);
    }
    tiny_close(t);
}

static void test_spans(void) {
    tiny_model *t = tiny_open(&tiny_default);
    node_adapter *a = make(t, 3);
    T_EQ(node_adapter_spans(a), tiny_default.layers + tiny_default.exits);
    for (uint32_t id = 0; id < node_adapter_spans(a); id++) {
        const uint32_t n = a->span_count[id];
        if (id < tiny_default.layers) {
            T_EQ(n, node_adapter_layer_count(&t->model, id, 3));
            T_CHECK(a->span[id] == a->lora.layer[id].b[NODE_Q], "q comes first");
            T_CHECK(a->lora.layer[id].b[NODE_DOWN] + 3 * tiny_default.hidden == a->span[id] + n,
                    "down comes last");
        } else {
            T_CHECK(memcmp(a->span[id], t->model.final_norm, n * sizeof(float)) == 0, "born");
        }
        float *base = t_guarded(n * sizeof(float)), *moved = t_guarded(n * sizeof(float));
        node_adapter_get(a, id, base);
        for (uint32_t i = 0; i < n; i++) moved[i] = base[i] + (float)i;
        T_EQ(node_adapter_set(a, id, moved, 9, NULL), FL_OK);
        T_CHECK(a->version[id] == 9, "the version goes with it");
        node_adapter_delta(a, id, base, moved);
        for (uint32_t i = 0; i < n; i++) T_NEAR(moved[i], (float)i, 1e-4, "delta of %u", i);
        moved[n - 1] = NAN;
        T_EQ(node_adapter_set(a, id, moved, 10, NULL), FL_EFORMAT);
        T_CHECK(a->version[id] == 9, "refused values change nothing");
        t_guarded_free(base, n * sizeof(float));
        t_guarded_free(moved, n * sizeof(float));
    }
    node_adapter_close(a);
    tiny_close(t);
}

// One number anywhere in a layer's B puts its adapter to work, and only that layer's.
static void test_untouched_layers_are_left_out(void) {
    tiny_model *t = tiny_open(&tiny_default);
    node_adapter *a = make(t, 3);
    for (uint32_t l = 0; l < tiny_default.layers; l++)
        for (uint32_t at = 0; at < a->span_count[l]; at += 17) {
            T_CHECK(node_lora_at_work(&a->lora, &t->model, l) == NULL, "layer %u as born", l);
            a->span[l][at] = t_rand() % 8 == 0 ? NAN : 1e-30f;
            for (uint32_t k = 0; k < tiny_default.layers; k++)
                T_CHECK((node_lora_at_work(&a->lora, &t->model, k) == &a->lora) == (k == l),
                        "layer %u, number %u of layer %u", k, at, l);
            a->span[l][at] = 0;
        }
    T_CHECK(node_lora_at_work(NULL, &t->model, 0) == NULL, "no adapter");
    node_adapter_close(a);
    tiny_close(t);
}

static void test_size_is_exact(void) {
    for (uint32_t rank = 1; rank <= 64; rank += 7) {
        tiny_model *t = tiny_open(&tiny_default);
        const size_t size = node_adapter_size(&t->model, rank);
        static _Alignas(64) uint8_t block[1 << 20];
        T_NEED(size <= sizeof(block), "%zu", size);
        node_adapter_opts opts = node_adapter_defaults();
        opts.rank = rank;
        fl_arena arena;
        fl_arena_init(&arena, block, size);
        node_adapter a;
        node_adapter_bind(&a, &t->model, &opts, &arena);
        T_EQ(arena.peak, size);
        tiny_close(t);
    }
}

static void test_files_survive_every_failure(void) {
    const char *path = "test_adapter.tmp";
    tiny_model *t = tiny_open(&tiny_default);
    node_adapter *a = make(t, 2), *b = NULL;
    fl_err err;
    T_EQ(node_adapter_load("test_adapter.none", &t->model, false, &b, &err), FL_ENOENT);
    T_OK(node_adapter_save(a, path, &err), err);
    train(a);
#ifdef FL_FAULTS
    unsigned n = 0;
    do {
        fl_fault_arm(++n);
        fl_status st = node_adapter_save(a, path, NULL);
        if (st == FL_OK) st = node_adapter_load(path, &t->model, false, &b, NULL);
        const bool fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st == FL_OK) == !fired, "fault %u gave %s", n, fl_status_name(st));
        if (st == FL_OK) break;
        T_OK(node_adapter_load(path, &t->model, false, &b, &err), err); // the old or the new one
        node_adapter_close(b);
        b = NULL;
    } while (n < 1000);
    T_CHECK(n > 5, "only %u fallible calls", n);
#else
    T_OK(node_adapter_save(a, path, &err), err);
    T_OK(node_adapter_load(path, &t->model, false, &b, &err), err);
#endif
    T_CHECK(b != NULL && same(a, b), "what was saved");
    unlink(path);
    node_adapter_close(a);
    node_adapter_close(b);
    tiny_close(t);
}

T_MAIN({"round_trip", test_round_trip},
       {"every_truncation_and_bit_flip_is_refused", test_every_truncation_and_bit_flip_is_refused},
       {"wrong_models_are_named", test_wrong_models_are_named},
       {"options_are_checked", test_options_are_checked}, {"spans", test_spans},
       {"untouched_layers_are_left_out", test_untouched_layers_are_left_out},
       {"size_is_exact", test_size_is_exact},
       {"files_survive_every_failure", test_files_survive_every_failure})
