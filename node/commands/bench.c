// bench: what this machine does with a model: prefill of 512 tokens, decode of 128 from an empty
// context (with the last exit alone, and voted by all exits), tuning steps.
#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "common/rng.h"
#include "node/commands/commands.h"
#include "node/commands/setup.h"
#include "node/commands/show.h"
#include "node/commands/state_dir.h"
#include "node/exits/head.h"
#include "node/model/generate.h"
#include "node/tune/tuner.h"

#include <stdlib.h>
#include <string.h>

typedef struct bench_opts {
    char model[FL_SETTING_TEXT_MAX];
    int64_t threads, runs;
    bool json;
} bench_opts;

static const fl_setting table[] = {
    {NULL, "MODEL", FL_KIND_TEXT, "FILE", 0, 0, "", "a GGUF model (default: the fleet's)", NULL,
     offsetof(bench_opts, model)},
    {NULL, "threads", FL_KIND_INTEGER, "N", 0, 64, "0", "threads; 0: the machine's fast cores",
     NULL, offsetof(bench_opts, threads)},
    {NULL, "runs", FL_KIND_INTEGER, "N", 1, 100, "5", "the median of so many runs", NULL,
     offsetof(bench_opts, runs)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,
     offsetof(bench_opts, json)},
};

enum { PREFILL = 512, DECODE = 128, RUNS_MAX = 100, TUNE_STEPS = 2 };

// A model that knows fewer tokens is measured with what it knows, in the same proportion.
static uint32_t decode_tokens(const node_model *m) {
    return m->context >= PREFILL + DECODE ? DECODE : m->context / 5;
}

static uint32_t prefill_tokens(const node_model *m) {
    return m->context >= PREFILL + DECODE ? PREFILL : m->context - decode_tokens(m);
}

// What was measured, and the schedule by which it was run.
typedef struct rates {
    double prefill[RUNS_MAX], decode[RUNS_MAX], voted[RUNS_MAX], tune[RUNS_MAX];
    node_schedule schedule;
    uint32_t prefill_threads, decode_threads;
} rates;

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int64_t n) {
    qsort(v, (size_t)n, sizeof(*v), compare);
    return v[n / 2];
}

// Tokens drawn at random: speed does not depend on what they are.
static void draw(int32_t *ids, size_t count, uint32_t vocabulary) {
    for (size_t i = 0; i < count; i++) ids[i] = (int32_t)fl_rng_below(7, i, vocabulary);
}

// What decoding works with.
typedef struct writer {
    node_setup *setup;
    node_session *session;
    node_head head;
    node_scratch *scratch;
    float *logits; // [exits + 1][vocabulary]
} writer;

static fl_status time_prefill(writer *w, const int32_t *ids, double *ret_rate, fl_err *err) {
    const uint32_t count = prefill_tokens(w->setup->model);
    const float *hidden;
    node_session_rewind(w->session, 0);
    const double start = fl_clock_s();
    FL_TRY(node_session_feed(w->session, &w->setup->engine, NULL, ids, count, &hidden, err));
    *ret_rate = count / (fl_clock_s() - start);
    return FL_OK;
}

// Token after token from an empty context: each is fed, then the next one's distribution is made.
static fl_status time_decode(writer *w, const node_vote *vote, const int32_t *ids, double *ret_rate,
                             fl_err *err) {
    const node_model *m = w->setup->model;
    const node_engine *engine = &w->setup->engine;
    const uint32_t count = decode_tokens(m);
    float *distribution = w->logits + (size_t)m->exits * m->vocabulary;
    const float *hidden;
    node_session_rewind(w->session, 0);
    const double start = fl_clock_s();
    for (uint32_t i = 0; i < count; i++) {
        FL_TRY(node_session_feed(w->session, engine, NULL, &ids[i], 1, &hidden, err));
        node_head_vote(engine, &w->head, m, NULL, vote, hidden, w->logits, distribution,
                       w->scratch);
    }
    *ret_rate = count / (fl_clock_s() - start);
    return FL_OK;
}

// An equal mixture of all exits.
static void vote_all(node_vote *vote, uint32_t exits) {
    node_vote_init(vote, exits);
    vote->mode = NODE_VOTE_MIXTURE;
    for (uint32_t e = 0; e < exits; e++) vote->weight[e] = 1.0f / (float)exits;
}

static fl_status time_inference(writer *w, int64_t runs, rates *r, fl_err *err) {
    int32_t ids[PREFILL];
    const node_model *m = w->setup->model;
    node_vote last, all;
    node_vote_init(&last, m->exits);
    vote_all(&all, m->exits);
    draw(ids, PREFILL, m->vocabulary);
    for (int64_t i = 0; i < runs; i++) {
        FL_TRY(node_setup_threads(w->setup, r->prefill_threads, err));
        FL_TRY(time_prefill(w, ids, &r->prefill[i], err));
        FL_TRY(node_setup_threads(w->setup, r->decode_threads, err));
        FL_TRY(time_decode(w, &last, ids, &r->decode[i], err));
        FL_TRY(time_decode(w, &all, ids, &r->voted[i], err));
    }
    return FL_OK;
}

// The number of threads for which the model of the machine predicts most, or the owner's.
static uint32_t best_threads(const node_cost *c, uint32_t most, int64_t asked, bool decode) {
    uint32_t best = 1;
    if (asked != 0) return (uint32_t)asked;
    for (uint32_t n = 2; n <= most; n++) {
        const double now = decode ? node_cost_decode(c, n) : node_cost_prefill(c, n, PREFILL);
        const double was = decode ? node_cost_decode(c, best) : node_cost_prefill(c, best, PREFILL);
        if (now > 1.02 * was) best = n;
    }
    return best;
}

static fl_status bench_inference(node_setup *s, int64_t runs, rates *r, fl_err *err) {
    const node_model *m = s->model;
    const uint32_t context = prefill_tokens(m) + decode_tokens(m);
    const node_session_opts opts = {
        .context = context,
        .chunk = context < 256 ? context : 256,
        .threads = r->prefill_threads > r->decode_threads ? r->prefill_threads : r->decode_threads};
    size_t session_size;
    FL_TRY(node_session_plan(m, &opts, &session_size, err));
    writer w = {.setup = s};
    fl_arena arena;
    fl_arena_init_counting(&arena);
    node_head_bind(&w.head, m, m->exits, 1, 0, &arena);
    node_scratch_bind(m, m->exits, opts.threads, &arena);
    const size_t logits_size = (size_t)m->vocabulary * (m->exits + 1) * sizeof(float);
    const size_t size = session_size + arena.peak + logits_size + 4096;
    void *block = NULL;
    FL_TRY(node_block_take(size, &block, err));
    fl_arena_init(&arena, block, size);
    w.session = node_session_bind(m, &opts, &arena);
    node_head_bind(&w.head, m, m->exits, 1, 0, &arena);
    w.scratch = node_scratch_bind(m, m->exits, opts.threads, &arena);
    w.logits = fl_arena_alloc(&arena, logits_size, 1, 64);
    const fl_status st = time_inference(&w, runs, r, err);
    free(block);
    return st;
}

// A made-up document, so that no text is needed.
typedef struct tuning {
    int32_t ids[4097];
    uint64_t begin[2];
    node_docs docs;
    node_adapter *adapter;
    node_tuner tuner;
    node_job job;
    char folder[FL_SETTING_TEXT_MAX];
} tuning;

static fl_status tuning_open(const node_setup *s, const bench_opts *o, const char *path, tuning *t,
                             fl_err *err) {
    const node_adapter_opts adapter_opts = node_adapter_defaults();
    draw(t->ids, FL_COUNT(t->ids), s->model->vocabulary);
    t->begin[0] = 0, t->begin[1] = FL_COUNT(t->ids);
    t->docs = (node_docs){.ids = t->ids, .begin = t->begin, .count = 1};
    if (node_state_dir("", t->folder, sizeof(t->folder), NULL) != FL_OK) t->folder[0] = '\0';
    FL_TRY(node_adapter_open(s->model, &adapter_opts, &t->adapter, err));
    t->job = (node_job){.kern = &s->kern,
                        .facts = &s->facts,
                        .model = s->model,
                        .adapter = t->adapter,
                        .docs = &t->docs,
                        .opts = node_tune_defaults(),
                        .threads_max = node_facts_threads(&s->facts),
                        .steps = UINT64_MAX,
                        .folder = t->folder,
                        .path = path};
    t->job.opts.threads = (uint32_t)o->threads;
    t->job.opts.prefix_bytes = 0;
    t->job.opts.stream = true;
    t->job.opts.memory_bytes = node_facts_memory_budget(&s->facts, 0);
    return FL_OK;
}

static fl_status bench_tune(node_setup *s, int64_t runs, tuning *t, rates *r, fl_err *err) {
    const node_tune_plan *plan = &r->schedule.plan;
    void *block = NULL;
    FL_TRY(node_setup_threads(s, plan->opts.threads, err));
    FL_TRY(node_setup_place_weights(s, &plan->resident, err));
    FL_TRY(node_block_take(plan->arena_bytes, &block, err));
    fl_arena arena;
    fl_arena_init(&arena, block, plan->arena_bytes);
    node_tuner_bind(&t->tuner, &s->engine, s->model, t->adapter, &t->docs, &plan->opts, &arena);
    for (int64_t i = 0; i < runs; i++) {
        node_tune_report report;
        uint64_t tokens = 0;
        const double start = fl_clock_s();
        for (int k = 0; k < TUNE_STEPS; k++) {
            node_tuner_step(&t->tuner, &report);
            tokens += report.tokens;
        }
        r->tune[i] = (double)tokens / (fl_clock_s() - start);
    }
    free(block);
    return FL_OK;
}

static fl_status print_rates(const bench_opts *o, const node_setup *s, rates *r, fl_err *err) {
    const double prefill = median(r->prefill, o->runs), decode = median(r->decode, o->runs);
    const double voted = median(r->voted, o->runs), tune = median(r->tune, o->runs);
    const node_cost *cost = &r->schedule.cost;
    const node_choice *c = &r->schedule.choice;
    const double prefill_p = node_cost_prefill(cost, r->prefill_threads, prefill_tokens(s->model));
    const double decode_p = node_cost_decode(cost, r->decode_threads);
    const double tune_p = (double)c->micro_batch * c->sequence / c->seconds;
    if (!o->json) {
        node_show_rates(&cost->rates, stdout);
        node_show_schedule(&r->schedule, stdout);
        printf("predicted: prefill %.1f tokens/s with %u threads, decode %.1f with %u, tuning %.1f "
               "with %u\n",
               prefill_p, r->prefill_threads, decode_p, r->decode_threads, tune_p, c->threads);
        printf("prefill %.1f tokens/s (%u tokens)\n"
               "decode  %.1f tokens/s (%u tokens from an empty context, the last exit alone)\n"
               "decode  %.1f tokens/s (the same, voted by all %u exits)\n"
               "tuning  %.1f tokens/s (%u threads)\n"
               "medians of %lld, peak %.1f MB\n",
               prefill, prefill_tokens(s->model), decode, decode_tokens(s->model), voted,
               s->model->exits, tune, c->threads, (long long)o->runs,
               (double)node_rss_peak() / 1e6);
        return FL_OK;
    }
    fl_json *root = fl_json_object();
    fl_json_set_number(root, "prefill_tokens_per_second", prefill);
    fl_json_set_number(root, "decode_tokens_per_second", decode);
    fl_json_set_number(root, "decode_voted_tokens_per_second", voted);
    fl_json_set_number(root, "tune_tokens_per_second", tune);
    fl_json_set_integer(root, "peak_rss_bytes", (int64_t)node_rss_peak());
    fl_json_set_integer(root, "threads", c->threads);
    fl_json_set_integer(root, "prefill_threads", r->prefill_threads);
    fl_json_set_integer(root, "decode_threads", r->decode_threads);
    fl_json_set_number(root, "prefill_predicted_tokens_per_second", prefill_p);
    fl_json_set_number(root, "decode_predicted_tokens_per_second", decode_p);
    fl_json_set_number(root, "tune_predicted_tokens_per_second", tune_p);
    node_show_rates_json(&cost->rates, root);
    node_show_schedule_json(&r->schedule, root);
    fl_json_set_integer(root, "runs", o->runs);
    const fl_status st = fl_json_print(root, stdout, err);
    fl_json_free(root);
    return st;
}

static int run(const void *options) {
    const bench_opts *o = options;
    char folder[FL_SETTING_TEXT_MAX / 2], path[FL_SETTING_TEXT_MAX];
    node_setup s = {0};
    static rates r;
    fl_err err;
    fl_status st = FL_OK;
    snprintf(path, sizeof(path), "%s", o->model);
    if (path[0] == '\0') {
        st = node_state_dir("", folder, sizeof(folder), &err);
        snprintf(path, sizeof(path), "%s/model.gguf", folder);
        if (st == FL_OK && !fl_file_exists(path))
            st = FL_FAIL(&err, FL_EARG, "no model: give one, this node has none of a fleet");
    }
    const node_setup_opts setup = {.model = path, .threads = o->threads, .without_tokenizer = true};
    if (st == FL_OK) st = node_setup_open(&setup, &s, &err);
    static tuning t;
    if (st == FL_OK) st = tuning_open(&s, o, path, &t, &err);
    if (st == FL_OK) st = node_schedule_make(&t.job, &r.schedule, &err);
    if (st == FL_OK) {
        const uint32_t most = r.schedule.cost.rates.threads;
        r.prefill_threads = best_threads(&r.schedule.cost, most, o->threads, false);
        r.decode_threads = best_threads(&r.schedule.cost, most, o->threads, true);
        st = bench_inference(&s, o->runs, &r, &err);
    }
    if (st == FL_OK) st = bench_tune(&s, o->runs, &t, &r, &err);
    if (st == FL_OK) st = print_rates(o, &s, &r, &err);
    node_adapter_close(t.adapter);
    node_setup_close(&s);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_bench = {
    .name = "bench",
    .summary = "measures prefill, decode and tuning on this machine",
    .example = "fleetune-node bench smollm2-4bit.gguf --threads 2",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(bench_opts),
    .run = run,
};
