// Goal: what evaluation reports is the loss of the model, whatever shares a pass with what. Method:
// small random models against the double reference, brute force over the vocabulary for `max`,
// different windows and packings, every fault.
#include "common/fault.h"
#include "node/exits/head.h"
#include "node/tune/evaluate.h"
#include "tests/reference.h"
#include "tests/tiny_model.h"

enum { IDS = 400 };

typedef struct rig {
    tiny_model *t;
    node_adapter *adapter;
    fl_kern kern;
    node_engine engine;
    int32_t ids[IDS];
    uint64_t begin[8];
    node_docs docs;
} rig;

static rig *rig_open(void) {
    static const uint64_t begin[] = {0, 20, 22, 51, 130, 131, 300, IDS};
    rig *r = calloc(1, sizeof(*r));
    T_NEED(r != NULL, "memory");
    r->t = tiny_open(&tiny_default);
    fl_kern_select(&r->kern, fl_cpu_detect());
    r->engine = (node_engine){&r->kern, NULL};
    node_adapter_opts opts = {.rank = 2, .alpha = 4.0f, .seed = 3};
    fl_err err;
    T_OK(node_adapter_open(&r->t->model, &opts, &r->adapter, &err), err);
    for (uint32_t id = 0; id < node_adapter_spans(r->adapter); id++)
        for (uint32_t i = 0; i < r->adapter->span_count[id]; i++)
            r->adapter->span[id][i] += 0.1f * t_randf();
    for (int i = 0; i < IDS; i++) r->ids[i] = (int32_t)(t_rand() % tiny_default.vocabulary);
    memcpy(r->begin, begin, sizeof(begin));
    r->docs = (node_docs){r->ids, r->begin, 7};
    return r;
}

static void rig_close(rig *r) {
    node_adapter_close(r->adapter);
    tiny_close(r->t);
    free(r);
}

static node_eval_result evaluate(rig *r, node_eval_opts opts, const node_vote *vote) {
    node_eval *e = NULL;
    node_eval_result result = {0};
    fl_err err;
    opts.threads = 1;
    T_OK(node_eval_open(&r->engine, &r->t->model, &r->adapter->lora, &opts, &e, &err), err);
    T_OK(node_eval_run(e, vote, &r->docs, &result, &err), err);
    node_eval_close(e);
    return result;
}

// Windows of 40 tokens of one document, scored by the reference one by one.
static double reference_nll(rig *r, uint32_t exit, uint32_t window, uint64_t *ret_tokens) {
    ref *f = ref_open(&r->t->model, &r->adapter->lora);
    double sum = 0;
    *ret_tokens = 0;
    for (uint32_t d = 0; d < r->docs.count; d++)
        for (uint64_t at = r->begin[d]; at + 1 < r->begin[d + 1]; at += window) {
            const uint64_t left = r->begin[d + 1] - at, n = (left < window ? left : window) - 1;
            uint32_t pos[64], kv_begin[64] = {0}, kv_row[64];
            if (n == 0) continue;
            for (uint32_t i = 0; i < n; i++) pos[i] = kv_row[i] = i;
            const node_batch batch = {(uint32_t)n, r->ids + at, pos, kv_begin, kv_row};
            sum += (double)n * ref_loss(f, &batch, r->ids + at + 1, exit, 0, NULL, NULL);
            *ret_tokens += n;
        }
    ref_close(f);
    return sum / (double)*ret_tokens;
}

static void test_loss_is_the_models(void) {
    rig *r = rig_open();
    const node_eval_opts opts = {.window = 40, .all_exits = true};
    const node_eval_result got = evaluate(r, opts, NULL);
    for (uint32_t exit = 0; exit < 2; exit++) {
        uint64_t tokens;
        const double want = reference_nll(r, exit, 40, &tokens);
        T_EQ(got.tokens, tokens);
        T_NEAR(got.exit_nll[exit], want, 1e-5 * want, "exit %u", exit);
    }
    T_NEAR(got.nll, got.last_exit_nll, 1e-9, "without a vote, the last exit");
    const node_eval_opts last = {.window = 40};
    const node_eval_result alone = evaluate(r, last, NULL);
    T_NEAR(alone.nll, got.last_exit_nll, 0, "the same bits when the others are not looked at");
    T_EQ(alone.exits, 1);
    rig_close(r);
}

static void test_packing_and_threads_change_no_bit(void) {
    rig *r = rig_open();
    fl_pool *pool = NULL;
    fl_err err;
    T_OK(fl_pool_open(3, &pool, &err), err);
    node_eval_opts opts = {.window = 400, .all_exits = true};
    const node_eval_result one = evaluate(r, opts, NULL);
    node_eval *e = NULL;
    node_eval_result many;
    opts.threads = 3;
    r->engine.pool = pool;
    T_OK(node_eval_open(&r->engine, &r->t->model, &r->adapter->lora, &opts, &e, &err), err);
    for (int again = 0; again < 2; again++) {
        T_OK(node_eval_run(e, NULL, &r->docs, &many, &err), err);
        T_CHECK(memcmp(&many.sums, &one.sums, sizeof(one.sums)) == 0, "run %d", again);
    }
    node_eval_close(e);
    // A document alone scores what it scores in company.
    const node_docs all = r->docs;
    node_vote_sums sum = {0};
    opts.threads = 1;
    r->engine.pool = NULL;
    for (uint32_t d = 0; d < all.count; d++) {
        r->docs = (node_docs){r->ids, r->begin + d, 1};
        if (r->begin[d + 1] - r->begin[d] < 2) continue;
        const node_eval_result part = evaluate(r, opts, NULL);
        node_vote_sums_merge(&sum, &part.sums);
    }
    T_CHECK(memcmp(&sum, &one.sums, sizeof(sum)) == 0, "sums of documents");
    fl_pool_close(pool);
    rig_close(r);
}

// p_t(v) of every exit, token by token of the vocabulary, at the first positions of a document.
static void test_votes_by_brute_force(void) {
    rig *r = rig_open();
    enum { N = 3, V = 67 };
    r->docs.count = 1; // 20 tokens
    node_eval_opts opts = {.window = 64, .all_exits = true};
    static double p[2][N][V];
    ref *f = ref_open(&r->t->model, &r->adapter->lora);
    uint32_t pos[N], kv_begin[N] = {0}, kv_row[N];
    for (uint32_t i = 0; i < N; i++) pos[i] = kv_row[i] = i;
    for (uint32_t exit = 0; exit < 2; exit++)
        for (uint32_t i = 0; i < N; i++)
            for (int32_t v = 0; v < V; v++) {
                int32_t target[N];
                for (uint32_t k = 0; k < N; k++) target[k] = k == i ? v : -1;
                const node_batch batch = {i + 1, r->ids, pos, kv_begin, kv_row};
                p[exit][i][v] = exp(-ref_loss(f, &batch, target, exit, 0, NULL, NULL));
            }
    ref_close(f);
    node_vote vote;
    node_vote_init(&vote, 2);
    vote.mode = NODE_VOTE_MAX;
    opts.tokens_max = N;
    const node_eval_result got = evaluate(r, opts, &vote);
    double want = 0;
    for (uint32_t i = 0; i < N; i++) {
        double z = 0;
        for (int v = 0; v < V; v++) z += fmax(p[0][i][v], p[1][i][v]);
        want -= log(fmax(p[0][i][r->ids[i + 1]], p[1][i][r->ids[i + 1]]) / z) / N;
    }
    T_EQ(got.tokens, N);
    T_NEAR(got.nll, want, 1e-4, "max");
    vote.mode = NODE_VOTE_MIXTURE;
    vote.weight[0] = 0.3f, vote.weight[1] = 0.7f;
    vote.tau[0] = 1.3f;
    want = 0;
    for (uint32_t i = 0; i < N; i++) {
        double z = 0;
        for (int v = 0; v < V; v++) z += pow(p[0][i][v], 1 / 1.3);
        const int32_t y = r->ids[i + 1];
        want -= log(0.3 * pow(p[0][i][y], 1 / 1.3) / z + 0.7 * p[1][i][y]) / N;
    }
    const node_eval_result mixed = evaluate(r, opts, &vote);
    T_NEAR(mixed.nll, want, 1e-4, "mixture with a temperature");
    rig_close(r);
}

// Generation's next-token distribution is what evaluation scores, in every mode.
static void test_generation_votes_alike(void) {
    rig *r = rig_open();
    const node_model *m = &r->t->model;
    static _Alignas(64) uint8_t block[1 << 20];
    fl_arena arena;
    node_acts acts;
    node_head head;
    fl_arena_init(&arena, block, sizeof(block));
    node_scratch *scratch = node_scratch_bind(m, 2, 1, &arena);
    node_acts_bind(&acts, m, 1, 1, 2, &arena);
    node_head_bind(&head, m, 2, 1, 16, &arena);
    float x[24], hidden[2][24], logits[2 * 67], p[67];
    const uint32_t zero = 0;
    const node_batch batch = {1, r->ids, &zero, &zero, &zero};
    node_embed(&r->engine, m, &batch, x);
    for (uint32_t l = 0, exit = 0; l < m->layers; l++) {
        node_layer_forward(&r->engine, m, l, &r->adapter->lora, &batch, &acts, scratch, x);
        if (l + 1 == m->exit_layer[exit]) memcpy(hidden[exit++], x, sizeof(x));
    }
    for (int mode = NODE_VOTE_MIXTURE; mode <= NODE_VOTE_LAST; mode++) {
        node_vote vote;
        node_vote_init(&vote, 2);
        vote.mode = (node_vote_mode)mode;
        vote.weight[0] = 0.4f, vote.weight[1] = 0.6f;
        vote.tau[0] = mode == NODE_VOTE_MIXTURE ? 0.8f : 1.0f;
        node_head_vote(&r->engine, &head, m, &r->adapter->lora, &vote, hidden[0], logits, p,
                       scratch);
        const node_eval_opts opts = {.window = 64, .all_exits = true, .tokens_max = 1};
        T_NEAR(-log((double)p[r->ids[1]]), evaluate(r, opts, &vote).nll, 1e-5, "%s",
               node_vote_mode_name(vote.mode));
    }
    rig_close(r);
}

static void test_fit_is_no_worse_than_the_last_exit(void) {
    rig *r = rig_open();
    node_eval_opts opts = {.window = 64, .all_exits = true, .threads = 1};
    node_eval *e = NULL;
    node_vote vote;
    node_eval_result result;
    fl_err err;
    T_OK(node_eval_open(&r->engine, &r->t->model, &r->adapter->lora, &opts, &e, &err), err);
    T_OK(node_eval_fit(e, &r->docs, 0, &vote, &err), err);
    T_EQ(node_vote_check(&vote, NULL), FL_OK);
    T_OK(node_eval_run(e, &vote, &r->docs, &result, &err), err);
    T_CHECK(result.nll <= result.last_exit_nll + 1e-6 || vote.tau[1] != 1.0f, "%.6f against %.6f",
            result.nll, result.last_exit_nll);
    T_EQ(vote.fell_back, vote.mode == NODE_VOTE_LAST);
    // Random labels under a sharp random model: hotter exits win, so a mixture must.
    T_EQ(vote.mode, NODE_VOTE_MIXTURE);
    node_eval_close(e);
    // Settled on halves: whatever it decides, the adapter's vote is at least the last exit's equal.
    T_OK(node_eval_settle_vote(&r->engine, &r->t->model, r->adapter, &r->docs, 0, 1, &result, &err),
         err);
    T_EQ(node_vote_check(&r->adapter->vote, NULL), FL_OK);
    T_EQ(result.vote.mode, r->adapter->vote.mode);
    T_CHECK(result.nll < result.last_exit_nll || result.vote.mode == NODE_VOTE_LAST, "%.6f",
            result.nll);
    rig_close(r);
}

static void test_full_windows_only(void) {
    rig *r = rig_open();
    r->begin[1] = IDS;
    r->docs.count = 1;
    node_eval_opts opts = {.window = 64, .full_windows = true};
    T_EQ(evaluate(r, opts, NULL).tokens, 6 * 63);
    opts.tokens_max = 100;
    T_EQ(evaluate(r, opts, NULL).tokens, 100);
    opts = (node_eval_opts){.window = 401, .full_windows = true, .threads = 1};
    node_eval *e = NULL;
    node_eval_result result;
    fl_err err;
    T_OK(node_eval_open(&r->engine, &r->t->model, &r->adapter->lora, &opts, &e, &err), err);
    T_EQ(node_eval_run(e, NULL, &r->docs, &result, &err), FL_EARG);
    T_CHECK(strstr(err.text, "too little text") != NULL, "%s", err.text);
    r->ids[9] = -1;
    T_EQ(node_eval_run(e, NULL, &r->docs, &result, &err), FL_EARG);
    r->ids[9] = 1;
    node_vote wrong;
    node_vote_init(&wrong, 3);
    opts.all_exits = true;
    node_eval_close(e);
    T_OK(node_eval_open(&r->engine, &r->t->model, &r->adapter->lora, &opts, &e, &err), err);
    T_EQ(node_eval_run(e, &wrong, &r->docs, &result, &err), FL_EARG);
    node_eval_close(e);
    opts.window = 1;
    T_EQ(node_eval_open(&r->engine, &r->t->model, NULL, &opts, &e, NULL), FL_EARG);
    rig_close(r);
}

static void test_stops_when_asked(void) {
    rig *r = rig_open();
    _Atomic bool stop = true;
    const node_eval_opts opts = {.window = 64, .threads = 1, .stop = &stop};
    node_eval *e = NULL;
    node_eval_result result;
    fl_err err;
    T_OK(node_eval_open(&r->engine, &r->t->model, &r->adapter->lora, &opts, &e, &err), err);
    T_EQ(node_eval_run(e, NULL, &r->docs, &result, &err), FL_ESTATE);
    stop = false;
    T_OK(node_eval_run(e, NULL, &r->docs, &result, &err), err);
    node_eval_close(e);
    rig_close(r);
}

static void test_halves(void) {
    rig *r = rig_open();
    uint64_t begin[16];
    node_docs a, b;
    node_docs_halve(&r->docs, begin, &a, &b);
    T_EQ(a.count + b.count, 7);
    T_EQ(node_docs_inputs(&a) + node_docs_inputs(&b), node_docs_inputs(&r->docs));
    r->docs.count = 1;
    node_docs_halve(&r->docs, begin, &a, &b);
    T_EQ(a.begin[1] - a.begin[0] + b.begin[1] - b.begin[0], 20);
    T_EQ(a.begin[1], b.begin[0]);
    rig_close(r);
}

#ifdef FL_FAULTS
static void test_every_failure_is_clean(void) {
    rig *r = rig_open();
    const node_eval_opts opts = {.window = 64, .all_exits = true, .threads = 1};
    unsigned n = 0;
    bool fired;
    do {
        node_eval *e = NULL;
        node_vote vote;
        node_eval_result result;
        fl_fault_arm(++n);
        fl_status st = node_eval_open(&r->engine, &r->t->model, &r->adapter->lora, &opts, &e, NULL);
        if (st == FL_OK) st = node_eval_fit(e, &r->docs, 100, &vote, NULL);
        if (st == FL_OK) st = node_eval_run(e, &vote, &r->docs, &result, NULL);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_EQ(st, fired ? FL_ENOMEM : FL_OK);
        node_eval_close(e);
    } while (fired);
    T_EQ(n, 5);
    rig_close(r);
}
#endif

T_MAIN({"loss_is_the_models", test_loss_is_the_models},
       {"packing_and_threads_change_no_bit", test_packing_and_threads_change_no_bit},
       {"votes_by_brute_force", test_votes_by_brute_force},
       {"generation_votes_alike", test_generation_votes_alike},
       {"fit_is_no_worse_than_the_last_exit", test_fit_is_no_worse_than_the_last_exit},
       {"full_windows_only", test_full_windows_only}, {"stops_when_asked", test_stops_when_asked},
#ifdef FL_FAULTS
       {"every_failure_is_clean", test_every_failure_is_clean},
#endif
       {"halves", test_halves})
