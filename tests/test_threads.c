// Goal: what the program gives does not depend, in any bit, on the number of threads.
// Method: a model wide enough that every kind of work is cut into several pieces (rows, columns of
// the gradient, tokens, heads, chunks of the vocabulary); whole tuning steps, an evaluation of what
// they made, and a conversation with it, by 1, 2, 3 and 5 threads, compared as bytes. The canary is
// another seed: it must differ.
#include "common/pool.h"
#include "node/exits/head.h"
#include "node/model/generate.h"
#include "node/tune/evaluate.h"
#include "node/tune/tuner.h"
#include "tests/tiny_model.h"

enum { STEPS = 2, WORDS = 260, ANSWER = 6, PROMPT = 45 };

static const tiny_shape shape = {.layers = 2,
                                 .hidden = 192,
                                 .ffn = 320,
                                 .heads = 6,
                                 .kv_heads = 3,
                                 .head_size = 32,
                                 .vocabulary = 700,
                                 .exits = 2};

// What came out, byte after byte.
typedef struct record {
    uint8_t *bytes;
    size_t size;
} record;

static void put(record *r, const void *data, size_t size) {
    r->bytes = realloc(r->bytes, r->size + size);
    T_NEED(r->bytes != NULL, "memory");
    memcpy(r->bytes + r->size, data, size);
    r->size += size;
}

static void tune(record *r, const node_engine *engine, const node_model *model,
                 node_adapter *adapter, const node_docs *docs, unsigned threads, uint64_t seed) {
    node_tune_opts opts = node_tune_defaults();
    node_tune_plan plan;
    fl_err err;
    fl_arena arena;
    opts.window.kind = NODE_WINDOW_CYCLIC;
    opts.sequence = 45, opts.micro = 2, opts.kept = 1, opts.chunk = 256;
    opts.threads = threads, opts.seed = seed;
    T_OK(node_tune_make_plan(model, adapter->lora.rank, docs, &opts, &plan, &err), err);
    void *block = aligned_alloc(64, (plan.arena_bytes + 63) / 64 * 64);
    node_tuner *tuner = malloc(sizeof(*tuner));
    T_NEED(block != NULL && tuner != NULL, "memory");
    fl_arena_init(&arena, block, plan.arena_bytes);
    node_tuner_bind(tuner, engine, model, adapter, docs, &plan.opts, &arena);
    for (int i = 0; i < STEPS; i++) {
        node_tune_report report;
        node_tuner_step(tuner, &report);
        put(r, &report.loss, sizeof(report.loss));
        put(r, &report.grad_norm, sizeof(report.grad_norm));
        T_CHECK(isfinite(report.loss) && report.grad_norm > 0, "step %d", i);
    }
    for (uint32_t id = 0; id < node_adapter_spans(adapter); id++)
        put(r, adapter->span[id], adapter->span_count[id] * sizeof(float));
    free(tuner);
    free(block);
}

static void evaluate(record *r, const node_engine *engine, const node_model *model,
                     const node_lora *lora, const node_docs *docs, unsigned threads) {
    const node_eval_opts opts = {.window = 64, .all_exits = true, .threads = threads};
    node_eval *e = NULL;
    node_eval_result result = {0};
    fl_err err;
    T_OK(node_eval_open(engine, model, lora, &opts, &e, &err), err);
    T_OK(node_eval_run(e, NULL, docs, &result, &err), err);
    put(r, &result.sums, sizeof(result.sums));
    put(r, &result.last_exit_nll, sizeof(result.last_exit_nll));
    node_eval_close(e);
}

// The prompt in one piece, then the likeliest token of the vote, again and again.
static void talk(record *r, const node_engine *engine, const node_model *model,
                 const node_lora *lora, const int32_t *ids, unsigned threads) {
    const node_session_opts opts = {PROMPT + ANSWER, PROMPT, threads, lora->rank};
    size_t size;
    fl_err err;
    fl_arena arena;
    node_head head;
    T_OK(node_session_plan(model, &opts, &size, &err), err);
    fl_arena_init_counting(&arena);
    node_head_bind(&head, model, model->exits, 1, 0, &arena);
    node_scratch_bind(model, model->exits, threads, &arena);
    size += arena.peak + 4096;
    void *block = aligned_alloc(64, (size + 63) / 64 * 64);
    float *logits = malloc((model->exits + 1) * model->vocabulary * sizeof(*logits));
    T_NEED(block != NULL && logits != NULL, "memory");
    fl_arena_init(&arena, block, size);
    node_session *s = node_session_bind(model, &opts, &arena);
    node_head_bind(&head, model, model->exits, 1, 0, &arena);
    node_scratch *scratch = node_scratch_bind(model, model->exits, threads, &arena);
    node_vote vote;
    node_vote_init(&vote, model->exits);
    vote.mode = NODE_VOTE_MIXTURE;
    for (uint32_t t = 0; t < model->exits; t++) vote.weight[t] = 1.0f / (float)model->exits;
    const float *hidden = NULL;
    float *p = logits + (size_t)model->exits * model->vocabulary;
    T_OK(node_session_feed(s, engine, lora, ids, PROMPT, &hidden, &err), err);
    for (int i = 0; i < ANSWER; i++) {
        node_head_vote(engine, &head, model, lora, &vote, hidden, logits, p, scratch);
        int32_t best = 0;
        for (uint32_t v = 0; v < model->vocabulary; v++)
            if (p[v] > p[best]) best = (int32_t)v;
        put(r, p, model->vocabulary * sizeof(*p));
        T_OK(node_session_feed(s, engine, lora, &best, 1, &hidden, &err), err);
    }
    free(logits);
    free(block);
}

static record everything(uint32_t bits, unsigned threads, uint64_t seed) {
    tiny_shape with = shape;
    with.bits = bits;
    t_seed = 5;
    tiny_model *t = tiny_open(&with);
    int32_t ids[WORDS];
    const uint64_t begin[] = {0, 90, 91, WORDS};
    const node_docs docs = {ids, begin, 3};
    for (int i = 0; i < WORDS; i++) ids[i] = (int32_t)(t_rand() % shape.vocabulary);
    fl_kern kern;
    fl_kern_select(&kern, fl_cpu_detect());
    fl_pool *pool = NULL;
    node_adapter *adapter = NULL;
    const node_adapter_opts opts = {.rank = 4, .alpha = 8.0f, .seed = 3};
    fl_err err;
    record r = {0};
    T_OK(fl_pool_open(threads, &pool, &err), err);
    T_OK(node_adapter_open(&t->model, &opts, &adapter, &err), err);
    const node_engine engine = {&kern, pool};
    tune(&r, &engine, &t->model, adapter, &docs, threads, seed);
    evaluate(&r, &engine, &t->model, &adapter->lora, &docs, threads);
    talk(&r, &engine, &t->model, &adapter->lora, ids, threads);
    node_adapter_close(adapter);
    fl_pool_close(pool);
    tiny_close(t);
    return r;
}

static void test_threads_change_no_bit(void) {
    static const unsigned threads[] = {2, 3, 5};
    for (uint32_t bits = 0; bits <= 4; bits += 4) {
        record one = everything(bits, 1, 1);
        for (size_t i = 0; i < FL_COUNT(threads); i++) {
            record many = everything(bits, threads[i], 1);
            size_t at = 0;
            while (at < one.size && at < many.size && one.bytes[at] == many.bytes[at]) at++;
            T_CHECK(one.size == many.size && at == one.size,
                    "%u threads, %u bits: byte %zu of %zu differs", threads[i], bits, at, one.size);
            free(many.bytes);
        }
        record other = everything(bits, 1, 2);
        T_CHECK(other.size == one.size && memcmp(other.bytes, one.bytes, one.size) != 0,
                "another seed gives other bytes");
        free(other.bytes);
        free(one.bytes);
    }
}

T_MAIN({"threads_change_no_bit", test_threads_change_no_bit})
