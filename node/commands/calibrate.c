// Small measurements of real steps, prompts and tokens.
#include "common/clock.h"
#include "node/commands/choose.h"
#include "node/exits/head.h"
#include "node/model/generate.h"

#include <malloc.h>
#include <stdlib.h>

enum { RUNS_MAX = 64, FEW = 32, MANY = 192, MANY_SLOW = 96, PROMPT = 256, WRITTEN = 8 };
// A step of FEW tokens that takes longer than this makes MANY too long to wait for.
static const double SLOW_S = 0.15;

// A tuner that runs and changes nothing.
typedef struct rig {
    fl_pool *pool;
    node_engine engine;
    node_tuner tuner;
    void *block;
} rig;

static void rig_close(rig *r) {
    if (r == NULL) return;
    fl_pool_close(r->pool);
    free(r->block);
    free(r);
    malloc_trim(0); // the plan of the run counts on what was taken here being the system's again
}

static fl_status rig_open(const node_job *job, const node_tune_opts *asked, rig **ret,
                          fl_err *err) {
    node_tune_opts opts = *asked;
    opts.lr = opts.gain_lr = opts.decay = 0;
    opts.prefix_bytes = opts.prefix_disk = 0;
    opts.stream = false; // weights that pass through are opened for the run, not for a measurement
    node_tune_plan plan;
    FL_TRY(node_tune_make_plan(job->model, job->adapter->opts.rank, job->docs, &opts, &plan, err));
    rig *r = calloc(1, sizeof(*r));
    if (r == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to measure with");
    const size_t size = (plan.arena_bytes + 63) & ~(size_t)63;
    r->block = aligned_alloc(64, size);
    fl_status st = r->block == NULL
                       ? FL_FAIL(err, FL_ENOMEM, "no memory (%zu bytes) to measure with", size)
                       : fl_pool_open(opts.threads, &r->pool, err);
    if (st != FL_OK) {
        rig_close(r);
        return st;
    }
    fl_arena arena;
    fl_arena_init(&arena, r->block, plan.arena_bytes);
    r->engine = (node_engine){job->kern, r->pool};
    node_tuner_bind(&r->tuner, &r->engine, job->model, job->adapter, job->docs, &plan.opts, &arena);
    *ret = r;
    return FL_OK;
}

static double step_s(const node_tune_report *r) {
    return r->below_s + r->window_s + r->head_s + r->back_s + r->rest_s;
}

static int shorter(const void *a, const void *b) {
    const double x = step_s(a), y = step_s(b);
    return (x > y) - (x < y);
}

// The reports of `runs` steps, the shortest first.
static void sorted_steps(rig *r, uint32_t runs, node_tune_report *ret) {
    for (uint32_t i = 0; i < runs; i++) node_tuner_step(&r->tuner, &ret[i]);
    qsort(ret, runs, sizeof(*ret), shorter);
}

fl_status node_job_time(const node_job *job, const node_choice *choice, uint32_t runs,
                        double *ret_s, fl_err *err) {
    node_tune_opts opts;
    rig *r = NULL;
    node_job_opts(job, choice, &opts);
    FL_TRY(rig_open(job, &opts, &r, err));
    node_tune_report all[RUNS_MAX];
    if (runs > RUNS_MAX) runs = RUNS_MAX;
    if (runs < 1) runs = 1;
    node_tuner_step(&r->tuner, &all[0]);
    sorted_steps(r, runs, all);
    *ret_s = step_s(&all[runs / 2]);
    rig_close(r);
    return FL_OK;
}

// A step at the last exit with two layers, nothing kept.
static fl_status sample(const node_job *job, uint32_t threads, uint32_t tokens, uint32_t chunk,
                        node_timing *ret, fl_err *err) {
    const node_model *m = job->model;
    node_tune_opts opts = job->opts;
    rig *r = NULL;
    opts.window = (node_window_opts){.kind = NODE_WINDOW_LAST, .size = m->layers < 2 ? 1 : 2};
    opts.threads = threads;
    opts.sequence = tokens;
    opts.micro = 1;
    opts.chunk = chunk;
    opts.kept = 0;
    FL_TRY(rig_open(job, &opts, &r, err));
    node_tune_report all[4], *report = &all[0];
    node_tuner_step(&r->tuner, report);          // first touch of everything
    sorted_steps(r, tokens == FEW ? 4 : 2, all); // the fastest: others were disturbed
    *ret = (node_timing){.threads = threads,
                         .tokens = tokens,
                         .below = m->layers - r->tuner.window,
                         .window = r->tuner.window,
                         .chunks = (m->vocabulary + chunk - 1) / chunk,
                         .below_s = report->below_s,
                         .window_s = report->window_s,
                         .head_s = report->head_s,
                         .back_s = report->back_s,
                         .update_s = report->rest_s};
    rig_close(r);
    return FL_OK;
}

static uint32_t round_16(uint32_t v) {
    return (v + 15) / 16 * 16;
}

static fl_status calibrate_point(const node_job *job, node_cost *cost, uint32_t point,
                                 uint32_t threads, uint32_t tokens, double *ret_s, fl_err *err) {
    const uint32_t v = job->model->vocabulary;
    const uint32_t small = v / 4 < 256 ? round_16(v / 4) : 256, large = v < 2048 ? v : 2048;
    node_timing s[2];
    FL_TRY(sample(job, threads, tokens, small, &s[0], err));
    FL_TRY(sample(job, threads, tokens, large, &s[1], err));
    *ret_s = s[1].below_s + s[1].window_s + s[1].head_s + s[1].back_s;
    if (s[0].chunks != s[1].chunks) node_calibration_set(cost, point, s);
    return FL_OK;
}

// What one prompt and a few written tokens take.
typedef struct talk {
    fl_pool *pool;
    void *block;
    node_engine engine;
    node_session *session;
    node_head head;
    node_scratch *scratch;
    float *logits;
    int32_t ids[PROMPT + WRITTEN];
    uint32_t prompt;
} talk;

static void talk_bind(talk *t, const node_model *m, uint32_t threads, fl_arena *arena) {
    node_head_bind(&t->head, m, m->exits, 1, 0, arena);
    t->scratch = node_scratch_bind(m, m->exits, threads, arena);
    t->logits = fl_arena_alloc(arena, (size_t)m->vocabulary * (m->exits + 1), sizeof(float), 64);
}

static fl_status talk_run(talk *t, const node_model *m, double *ret_prompt_s, double *ret_token_s,
                          fl_err *err) {
    const float *hidden;
    node_vote vote;
    node_vote_init(&vote, m->exits);
    FL_TRY(node_session_feed(t->session, &t->engine, NULL, t->ids, WRITTEN, &hidden, err));
    node_session_rewind(t->session, 0); // once for the caches
    const double start = fl_clock_s();
    FL_TRY(node_session_feed(t->session, &t->engine, NULL, t->ids, t->prompt, &hidden, err));
    const double filled = fl_clock_s();
    for (uint32_t i = 0; i < WRITTEN; i++) {
        node_head_vote(&t->engine, &t->head, m, NULL, &vote, hidden, t->logits,
                       t->logits + (size_t)m->exits * m->vocabulary, t->scratch);
        FL_TRY(node_session_feed(t->session, &t->engine, NULL, &t->ids[i], 1, &hidden, err));
    }
    *ret_prompt_s = filled - start;
    *ret_token_s = (fl_clock_s() - filled) / WRITTEN;
    return FL_OK;
}

static fl_status calibrate_talk(const node_job *job, node_cost *cost, uint32_t threads,
                                fl_err *err) {
    const node_model *m = job->model;
    talk t = {.prompt = m->context > PROMPT + WRITTEN ? PROMPT : m->context / 2};
    if (t.prompt < WRITTEN) return FL_OK;
    const node_session_opts opts = {
        .context = t.prompt + WRITTEN, .chunk = t.prompt, .threads = threads};
    for (uint32_t i = 0; i < PROMPT + WRITTEN; i++)
        t.ids[i] = job->docs->ids[i % job->docs->begin[job->docs->count]];
    size_t session_size;
    FL_TRY(node_session_plan(m, &opts, &session_size, err));
    fl_arena arena;
    fl_arena_init_counting(&arena);
    talk_bind(&t, m, threads, &arena);
    const size_t size = (session_size + arena.peak + 4096) & ~(size_t)63;
    const uint64_t limit = job->opts.memory_bytes;
    if (limit != 0 && job->opts.resident_bytes + m->bytes + size > limit) return FL_OK;
    t.block = aligned_alloc(64, size);
    if (t.block == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to measure with");
    double prompt_s = 0, token_s = 0;
    fl_status st = fl_pool_open(threads, &t.pool, err);
    if (st == FL_OK) {
        fl_arena_init(&arena, t.block, size);
        t.session = node_session_bind(m, &opts, &arena);
        talk_bind(&t, m, threads, &arena);
        t.engine = (node_engine){job->kern, t.pool};
        st = talk_run(&t, m, &prompt_s, &token_s, err);
    }
    if (st == FL_OK) {
        node_cost plain = *cost; // the roofline alone
        plain.calibrated = false;
        const double prefill = node_cost_prefill(&plain, threads, t.prompt);
        cost->calibration.prefill[threads] = prompt_s * prefill / t.prompt;
        cost->calibration.decode[threads] = token_s * node_cost_decode(&plain, threads);
    }
    fl_pool_close(t.pool);
    free(t.block);
    malloc_trim(0);
    return st;
}

fl_status node_job_calibrate(const node_job *job, node_cost *cost, fl_err *err) {
    const uint32_t most = cost->rates.threads;
    const uint32_t threads[] = {most, 1, most / 2};
    uint32_t many = MANY;
    cost->calibrated = false;
    cost->calibration = (node_calibration){.key = node_calibration_key(job->facts, &cost->shape)};
    for (size_t i = 0; i < FL_COUNT(threads); i++) {
        if (threads[i] == 0 || cost->calibration.part[threads[i]][0][0] > 0) continue;
        double seconds;
        FL_TRY(calibrate_point(job, cost, 0, threads[i], FEW, &seconds, err));
        if (i == 0 && seconds > SLOW_S) many = MANY_SLOW;
        fl_status st = FL_ENOMEM; // with little memory, what fits
        for (; st == FL_ENOMEM && many > FEW; many /= 2) {
            st = calibrate_point(job, cost, 1, threads[i], many, &seconds, err);
            if (st == FL_OK) break;
        }
        if (st != FL_OK && st != FL_ENOMEM) return st;
        FL_TRY(calibrate_talk(job, cost, threads[i], err));
        if (cost->calibration.threads == 0) break; // a vocabulary of one chunk: nothing to learn
    }
    return FL_OK;
}
