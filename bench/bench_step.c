// Where the time of tuning, prefill and decode goes, by part, with one thread and with two.
//   bench_step                        SmolLM2-135M's shapes at 4 bits, random weights, random text
//   bench_step --model=M.gguf --text=FILE   a real model, on real text: the head's gradient is
//                                     thinned by what the model believes, so its time is real too
//   --sequence=N --micro=N --rank=N   tokens of a micro-batch, micro-batches a step, of adapters
// A round of steps takes its loss at every exit once. Rates are of the run without the profile;
// the profiled run is next to it, so that what counting costs is seen.
#include "bench/peak.h"
#include "bench/profile.h"
#include "common/clock.h"
#include "common/pool.h"
#include "node/exits/head.h"
#include "node/model/generate.h"
#include "node/tune/tuner.h"
#include "tests/tiny_model.h"

#include <unistd.h>

typedef struct step_args {
    bool smoke;
    unsigned threads; // 0: 1, then 2
    const char *model, *text;
    uint32_t sequence, micro, rank, prefill, decode;
} step_args;

typedef struct setup {
    tiny_model *tiny; // one of the two
    node_model *file;
    const node_model *model;
    node_corpus *corpus;
    int32_t *ids; // of a made-up text
    node_docs docs;
} setup;

static void must(fl_status st, const fl_err *err) {
    if (st == FL_OK) return;
    fprintf(stderr, "bench_step: %s\n", err->text);
    exit(1);
}

static bool number(const char *arg, const char *name, uint32_t *ret) {
    if (strncmp(arg, name, strlen(name)) != 0) return false;
    *ret = (uint32_t)strtoul(arg + strlen(name), NULL, 10);
    return true;
}

static step_args parse(int argc, char **argv) {
    step_args a = {.sequence = 256, .micro = 4, .rank = 8, .prefill = 512, .decode = 64};
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i];
        if (strcmp(arg, "--smoke") == 0)
            a = (step_args){true, a.threads, NULL, NULL, 32, 1, 4, 20, 3};
        else if (strncmp(arg, "--model=", 8) == 0)
            a.model = arg + 8;
        else if (strncmp(arg, "--text=", 7) == 0)
            a.text = arg + 7;
        else if (!number(arg, "--threads=", &a.threads) &&
                 !number(arg, "--sequence=", &a.sequence) && !number(arg, "--micro=", &a.micro) &&
                 !number(arg, "--rank=", &a.rank)) {
            fprintf(stderr, "bench_step: what is %s?\n", arg);
            exit(2);
        }
    }
    return a;
}

static const uint64_t made_up[] = {0, 8192}; // one document

static setup setup_make(const step_args *a) {
    enum { EXITS = 4 };
    const size_t words = made_up[1];
    setup s = {0};
    fl_err err = {0};
    if (a->model != NULL) {
        must(node_model_open(a->model, &s.file, &err), &err);
        node_model_set_exits(s.file, EXITS);
        s.model = s.file;
    } else {
        tiny_shape shape = {.layers = 30,
                            .hidden = 576,
                            .ffn = 1536,
                            .heads = 9,
                            .kv_heads = 3,
                            .head_size = 64,
                            .vocabulary = 49152,
                            .exits = EXITS,
                            .bits = 4};
        if (a->smoke)
            shape.layers = 4, shape.hidden = 64, shape.ffn = 128, shape.heads = 4,
            shape.kv_heads = 2, shape.head_size = 16, shape.vocabulary = 512;
        s.tiny = tiny_open(&shape);
        s.tiny->model.context = 1024;
        s.model = &s.tiny->model;
    }
    if (a->model != NULL && a->text != NULL) {
        node_tokenizer *tokenizer = NULL;
        const node_corpus_opts opts = {.tokens_max = 1 << 18};
        must(node_tokenizer_open_gguf(s.file->file, &tokenizer, &err), &err);
        must(node_corpus_open(a->text, tokenizer, &opts, &s.corpus, &err), &err);
        node_tokenizer_close(tokenizer);
        s.docs = s.corpus->train;
        return s;
    }
    s.ids = malloc(words * sizeof(*s.ids));
    if (s.ids == NULL) abort();
    for (size_t i = 0; i < words; i++) s.ids[i] = (int32_t)(t_rand() % s.model->vocabulary);
    s.docs = (node_docs){s.ids, made_up, 1};
    return s;
}

static void setup_free(setup *s) {
    node_corpus_close(s->corpus);
    node_model_close(s->file);
    if (s->tiny != NULL) tiny_close(s->tiny);
    free(s->ids);
}

// How much of the machine others had since `foreign` was read at `start`.
static double foreign_share(double foreign, double start) {
    const double all = (fl_clock_s() - start) * (double)sysconf(_SC_NPROCESSORS_ONLN);
    return 100 * (bench_foreign_s() - foreign) / all;
}

static void *block_take(size_t size) {
    void *block = aligned_alloc(64, (size + 63) / 64 * 64);
    if (block == NULL) abort();
    return block;
}

static double steps(node_tuner *tuner, uint32_t count, double *ret_loss) {
    uint64_t tokens = 0;
    const double start = fl_clock_s();
    for (uint32_t i = 0; i < count; i++) {
        node_tune_report report;
        node_tuner_step(tuner, &report);
        tokens += report.tokens;
        *ret_loss = report.loss;
    }
    return (double)tokens / (fl_clock_s() - start);
}

static void tune(const step_args *a, const setup *s, node_engine plain, node_engine counted,
                 unsigned threads) {
    fl_err err = {0};
    node_adapter *adapter = NULL;
    node_adapter_opts adapter_opts = node_adapter_defaults();
    node_tune_opts opts = node_tune_defaults();
    node_tune_plan plan;
    double loss = 0;
    adapter_opts.rank = a->rank;
    opts.window.kind = NODE_WINDOW_CYCLIC;
    opts.sequence = a->sequence, opts.micro = a->micro, opts.threads = threads;
    must(node_adapter_open(s->model, &adapter_opts, &adapter, &err), &err);
    must(node_tune_make_plan(s->model, a->rank, &s->docs, &opts, &plan, &err), &err);
    void *block = block_take(plan.arena_bytes);
    node_tuner *tuner = block_take(sizeof(*tuner));
    fl_arena arena;
    fl_arena_init(&arena, block, plan.arena_bytes);
    node_tuner_bind(tuner, &plain, s->model, adapter, &s->docs, &plan.opts, &arena);
    const uint32_t round = s->model->exits;
    (void)steps(tuner, round, &loss); // warm: adapters are no longer zero
    const double start = fl_clock_s(), foreign = bench_foreign_s();
    const double rate = steps(tuner, round, &loss);
    tuner->engine = &counted;
    bench_profile_begin();
    const double counted_rate = steps(tuner, round, &loss);
    const bench_profile p = bench_profile_end(threads);
    printf("tune: %u threads, %u x %u tokens a step, rank %u, a round of %u exits: %.1f tokens/s, "
           "%.1f while counted; kept %u of a window of %u, arena %.1f MB, loss %.4f; others had "
           "%.0f %%; a step:\n",
           threads, plan.opts.micro, plan.opts.sequence, a->rank, round, rate, counted_rate,
           plan.opts.kept, plan.window, (double)plan.arena_bytes * 1e-6, loss,
           foreign_share(foreign, start));
    bench_profile_print(&p, threads, round);
    free(tuner);
    free(block);
    node_adapter_close(adapter);
}

typedef struct talk {
    node_session *session;
    node_head head;
    node_scratch *scratch;
    float *logits;
    const float *hidden;
    int32_t *ids;
} talk;

static void feed(const setup *s, const node_engine *e, talk *t, uint32_t count, bool one_by_one) {
    fl_err err = {0};
    node_vote vote;
    node_vote_init(&vote, s->model->exits); // the last exit alone
    if (!one_by_one) {
        node_session_rewind(t->session, 0);
        must(node_session_feed(t->session, e, NULL, t->ids, count, &t->hidden, &err), &err);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        node_head_vote(e, &t->head, s->model, NULL, &vote, t->hidden, t->logits,
                       t->logits + (size_t)s->model->exits * s->model->vocabulary, t->scratch);
        must(node_session_feed(t->session, e, NULL, t->ids + i, 1, &t->hidden, &err), &err);
    }
}

static void inference(const step_args *a, const setup *s, node_engine plain, node_engine counted,
                      unsigned threads) {
    const node_model *m = s->model;
    const node_session_opts opts = {a->prefill + 3 * a->decode, a->prefill < 256 ? a->prefill : 256,
                                    threads, 0};
    const size_t logits = (size_t)m->vocabulary * (m->exits + 1) * sizeof(float);
    size_t size;
    fl_err err = {0};
    fl_arena arena;
    talk t = {0};
    must(node_session_plan(m, &opts, &size, &err), &err);
    fl_arena_init_counting(&arena);
    node_head_bind(&t.head, m, m->exits, 1, 0, &arena);
    node_scratch_bind(m, m->exits, threads, &arena);
    size += arena.peak + logits + (1 << 16);
    void *block = block_take(size);
    fl_arena_init(&arena, block, size);
    t.session = node_session_bind(m, &opts, &arena);
    node_head_bind(&t.head, m, m->exits, 1, 0, &arena);
    t.scratch = node_scratch_bind(m, m->exits, threads, &arena);
    t.logits = fl_arena_alloc(&arena, logits, 1, 64);
    int32_t *ids = block_take(a->prefill * sizeof(*ids));
    for (uint32_t i = 0; i < a->prefill; i++) ids[i] = s->docs.ids[i];
    t.ids = ids;
    feed(s, &plain, &t, a->prefill, false);
    double start = fl_clock_s();
    const double began = start, foreign = bench_foreign_s();
    feed(s, &plain, &t, a->prefill, false);
    const double prefill = fl_clock_s() - start;
    bench_profile_begin();
    feed(s, &counted, &t, a->prefill, false);
    bench_profile p = bench_profile_end(threads);
    printf("prefill: %u threads, %u tokens: %.1f tokens/s, %.1f while counted; a token:\n", threads,
           a->prefill, a->prefill / prefill, a->prefill / p.wall_s);
    bench_profile_print(&p, threads, a->prefill);
    feed(s, &plain, &t, a->decode, true);
    start = fl_clock_s();
    feed(s, &plain, &t, a->decode, true);
    const double decode = fl_clock_s() - start;
    bench_profile_begin();
    feed(s, &counted, &t, a->decode, true);
    p = bench_profile_end(threads);
    printf("decode: %u threads, %u tokens, last exit's head: %.1f tokens/s, %.1f while counted; "
           "others had %.0f %% since prefill; a token:\n",
           threads, a->decode, a->decode / decode, a->decode / p.wall_s,
           foreign_share(foreign, began));
    bench_profile_print(&p, threads, a->decode);
    free(ids);
    free(block);
}

int main(int argc, char **argv) {
    const step_args a = parse(argc, argv);
    setup s = setup_make(&a);
    fl_err err = {0};
    fl_kern kern, counting;
    fl_kern_select(&kern, fl_cpu_detect());
    bench_profile_kern(&kern, &s.model->head, &counting);
    if (!a.smoke) bench_state_print("before");
    for (unsigned threads = a.threads == 0 ? 1 : a.threads;
         threads <= (a.threads == 0 ? 2 : a.threads); threads++) {
        fl_pool *pool = NULL;
        must(fl_pool_open(threads, &pool, &err), &err);
        const node_engine plain = {&kern, pool}, counted = {&counting, pool};
        tune(&a, &s, plain, counted, threads);
        inference(&a, &s, plain, counted, threads);
        fl_pool_close(pool);
    }
    if (!a.smoke) bench_state_print("after");
    setup_free(&s);
    return 0;
}
