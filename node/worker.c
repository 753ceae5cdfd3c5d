#include "node/worker.h"

#include "common/checked.h"
#include "common/clock.h"
#include "node/commands/choose.h"
#include "node/commands/setup.h"
#include "node/exits/head.h"
#include "node/outbox.h"
#include "node/prefix_disk.h"
#include "node/schedule/policy.h"
#include "node/tune/evaluate.h"
#include "node/tune/tuner.h"
#include "proto/update.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PAUSE_MS = 200, UNKNOWN_WINDOW = FL_LAYERS_MAX };

struct node_worker {
    node_worker_opts opts;
    node_state *state;

    // The model and the text stay open between tasks; the thread alone touches them.
    node_setup session;
    bool open;
    uint8_t model_digest[FL_DIGEST_SIZE];
    node_corpus *corpus;
    // States below the window outlive a task: a round is shorter than an epoch, and as long as the
    // fleet trains what lies above them they are found again in the next.
    node_prefix_home prefix;
    bool spare;       // the device is warm: half the threads
    node_watch watch; // since the task began
    double base_nll;  // held-out loss of the model without adapter; NAN until measured

    fl_task task;
    fl_layer_version bases[FL_LAYERS_MAX];
    uint8_t update_key[FL_KEY_SIZE];
    node_worker_upload upload;
    double started_s;
    fl_vote vote; // newest of the fleet; count 0: none

    pthread_t thread;
    bool started;     // a thread is there to be joined
    _Atomic int work; // node_work
    _Atomic bool pause, stop;
    _Atomic uint32_t step, window_max;
    _Atomic uint64_t tokens, tokens_local;
    _Atomic float loss, speed;

    node_work_result result;
    fl_err err;
};

fl_status node_worker_open(const node_worker_opts *opts, node_state *state, node_worker **ret,
                           fl_err *err) {
    node_worker *w = calloc(1, sizeof(*w));
    if (w == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the worker");
    if (!fl_file_exists(opts->data)) {
        free(w);
        return FL_FAIL(err, FL_ENOENT, "there is no text at %s", opts->data);
    }
    w->opts = *opts;
    w->state = state;
    w->base_nll = NAN;
    w->window_max = UNKNOWN_WINDOW;
    *ret = w;
    return FL_OK;
}

static void close_model(node_worker *w) {
    if (!w->open) return;
    node_prefix_home_close(&w->prefix);
    node_corpus_close(w->corpus);
    node_setup_close(&w->session);
    w->corpus = NULL;
    w->open = false;
    w->base_nll = NAN;
}

void node_worker_close(node_worker *w) {
    if (w == NULL) return;
    w->stop = true;
    if (w->started) pthread_join(w->thread, NULL);
    close_model(w);
    free(w);
}

// ---- the fleet's state as an adapter

// The layers whose exit has its gain in that layer's vector: the last one below each exit.
static int exit_of_layer(const node_model *m, uint32_t layer) {
    for (uint32_t e = 0; e < m->exits; e++) {
        if (m->exit_layer[e] == layer + 1) return (int)e;
    }
    return -1;
}

// Values of a layer's vector on the wire: its B's, then its exit's gain if it has one.
static uint32_t vector_count(const node_adapter *a, const node_model *m, uint32_t layer) {
    const int e = exit_of_layer(m, layer);
    return a->span_count[layer] + (e < 0 ? 0 : a->span_count[m->layers + (uint32_t)e]);
}

static void vector_get(const node_adapter *a, const node_model *m, uint32_t layer, float *values) {
    const int e = exit_of_layer(m, layer);
    node_adapter_get(a, layer, values);
    if (e >= 0) node_adapter_get(a, m->layers + (uint32_t)e, values + a->span_count[layer]);
}

// The coordinator keeps every layer as a change from how it was born: zeros for B, the model's
// final norm for a gain.
static fl_status vector_set(node_adapter *a, const node_model *m, uint32_t layer, float *values,
                            uint64_t version, fl_err *err) {
    const int e = exit_of_layer(m, layer);
    FL_TRY(node_adapter_set(a, layer, values, version, err));
    if (e < 0) return FL_OK;
    float *gain = values + a->span_count[layer];
    for (uint32_t i = 0; i < m->hidden; i++) gain[i] += m->final_norm[i];
    return node_adapter_set(a, m->layers + (uint32_t)e, gain, version, err);
}

static fl_status load_layer(node_worker *w, node_adapter *a, uint32_t layer, fl_err *err) {
    char path[NODE_PATH_MAX];
    node_state_layer_path(w->state, layer, path);
    fl_map map = {0};
    const fl_status there = fl_map_open(path, &map, err);
    if (there == FL_ENOENT) return FL_OK; // version 0: as born
    FL_TRY(there);
    const node_model *m = w->session.model;
    const uint32_t count = vector_count(a, m, layer);
    float *values = NULL;
    fl_layer l;
    fl_status st = fl_layer_open(map.bytes, &l, err);
    if (st != FL_OK) goto out;
    if (l.layer != layer || l.count != count) {
        st = FL_FAIL(err, FL_EFORMAT, "the fleet's layer %u has %u values, this model's has %u",
                     layer, l.count, count);
        goto out;
    }
    values = malloc(count * sizeof(*values));
    if (values == NULL) {
        st = FL_FAIL(err, FL_ENOMEM, "no memory for layer %u", layer);
        goto out;
    }
    fl_layer_values(&l, 0, count, values);
    st = vector_set(a, m, layer, values, l.version, err);
out:
    free(values);
    fl_map_close(&map);
    return st;
}

static void take_vote(const fl_vote *v, node_vote *ret) {
    static const node_vote_mode modes[] = {[FL_VOTE_MIXTURE] = NODE_VOTE_MIXTURE,
                                           [FL_VOTE_MAX] = NODE_VOTE_MAX,
                                           [FL_VOTE_LAST] = NODE_VOTE_LAST};
    if (v->count != ret->exits) return;
    node_vote vote = {.mode = modes[v->mode], .exits = ret->exits};
    for (uint32_t t = 0; t < vote.exits; t++) {
        vote.weight[t] = v->weights[t];
        vote.tau[t] = v->temperatures[t];
    }
    if (node_vote_check(&vote, NULL) == FL_OK) *ret = vote;
}

static fl_status open_adapter(node_worker *w, node_adapter **ret, fl_err *err) {
    node_model *m = w->session.model;
    const fl_task *t = &w->task;
    if (t->exit_count > NODE_EXITS_MAX || t->exit_count > m->layers)
        return FL_FAIL(err, FL_ELIMIT, "the run has %zu exits", t->exit_count);
    node_model_set_exits(m, (uint32_t)t->exit_count);
    for (uint32_t e = 0; e < m->exits; e++) {
        if (m->exit_layer[e] != t->exit_layers[e] + 1)
            return FL_FAIL(err, FL_EUNSUPPORTED, "the run's exits are not evenly spaced");
    }
    const node_adapter_opts opts = {.rank = t->rank, .alpha = t->alpha, .seed = t->a_seed};
    node_adapter *a = NULL;
    FL_TRY(node_adapter_open(m, &opts, &a, err));
    take_vote(&w->vote, &a->vote);
    for (uint32_t layer = 0; layer < m->layers; layer++) {
        const fl_status st = load_layer(w, a, layer, err);
        if (st == FL_OK) continue;
        node_adapter_close(a);
        return st;
    }
    *ret = a;
    return FL_OK;
}

// ---- steps of a task

static fl_status open_model(node_worker *w, fl_err *err) {
    if (w->open && memcmp(w->model_digest, w->task.model_digest, FL_DIGEST_SIZE) == 0) return FL_OK;
    close_model(w);
    char path[NODE_PATH_MAX];
    node_state_path(w->state, "model.gguf", path);
    const node_setup_opts opts = {.model = path, .threads = w->opts.threads};
    FL_TRY(node_setup_open(&opts, &w->session, err));
    w->open = true;
    memcpy(w->model_digest, w->task.model_digest, FL_DIGEST_SIZE);
    const node_corpus_opts corpus = {0};
    FL_TRY(node_corpus_open(w->opts.data, w->session.tokenizer, &corpus, &w->corpus, err));
    node_tokenizer_close(w->session.tokenizer);
    w->session.tokenizer = NULL;
    w->tokens_local = node_docs_inputs(&w->corpus->train);
    return FL_OK;
}

// Held-out loss under a vote; NULL: the last exit of the plain model.
static fl_status evaluate(node_worker *w, const node_adapter *a, bool all_exits,
                          node_eval_result *ret, fl_err *err) {
    const node_lora *lora = a == NULL ? NULL : &a->lora;
    const node_eval_opts opts = {.threads = fl_pool_threads(w->session.pool),
                                 .window = 256,
                                 .all_exits = all_exits,
                                 .tokens_max = w->task.eval_tokens,
                                 .stop = &w->stop};
    const node_model *m = w->session.model;
    const node_resident_use use = {.layers = m->layers, .head_rows = NODE_HEAD_CHUNK};
    node_eval *eval = NULL;
    uint64_t peak;
    FL_TRY(node_setup_fit(&w->session, &use, w->opts.memory_bytes, node_eval_size(m, lora, &opts),
                          &peak, err));
    FL_TRY(node_eval_open(&w->session.engine, m, lora, &opts, &eval, err));
    const node_docs *docs = w->corpus->held.count > 0 ? &w->corpus->held : &w->corpus->train;
    const fl_status st =
        node_eval_run(eval, a == NULL || !all_exits ? NULL : &a->vote, docs, ret, err);
    node_eval_close(eval);
    return st;
}

static int64_t q20(double nats, uint64_t tokens) {
    return llrint(nats * (double)tokens * FL_Q20);
}

// What the report says of the fleet's state before this task's training changes it.
static fl_status measure(node_worker *w, const node_adapter *a, fl_report *r, fl_err *err) {
    node_eval_result e;
    if (isnan(w->base_nll)) {
        FL_TRY(evaluate(w, NULL, false, &e, err));
        w->base_nll = e.last_exit_nll;
    }
    FL_TRY(evaluate(w, a, true, &e, err));
    r->tokens = e.tokens;
    r->nll_base_q20 = q20(w->base_nll, e.tokens);
    r->nll_voted_q20 = q20(e.nll, e.tokens);
    r->vote_version = w->vote.version;
    r->exit_count = e.sums.exits;
    for (uint32_t t = 0; t < e.sums.exits; t++)
        r->exits[t] = (fl_exit_sums){.nll_q20 = (int64_t)e.sums.exit_nll[t],
                                     .responsibility_q20 = e.sums.responsibility[t],
                                     .correct = e.correct[t]};
    return FL_OK;
}

static node_tune_opts tune_opts(node_worker *w) {
    const fl_task *t = &w->task;
    node_tune_opts o = node_tune_defaults();
    o.window.kind = NODE_WINDOW_FIXED;
    o.window.size = t->exit_layer - t->layer_first + 1;
    o.window.still = t->exit_layer - t->layer_last;
    for (uint32_t e = 0; e < t->exit_count; e++) {
        if (t->exit_layers[e] == t->exit_layer) o.window.exit = e;
    }
    o.sequence = t->sequence;
    o.micro = t->micro_batch;
    o.lr = o.gain_lr = t->learning_rate;
    o.seed = t->seed ^ fl_get_u64(w->state->identity_key); // each node its own order
    o.text_seed = fl_get_u64(w->state->identity_key);      // of the same micro-batches in each task
    o.prefix_bytes = w->opts.prefix_bytes;
    o.prefix_disk = w->opts.prefix_folder[0] == '\0' ? 0 : w->opts.prefix_disk;
    o.threads = (uint32_t)w->opts.threads;
    o.memory_bytes = w->opts.memory_bytes;
    const uint64_t limit = w->session.facts.memory_limit; // it may have changed since the start
    if (limit != 0 && (o.memory_bytes == 0 || limit < o.memory_bytes)) o.memory_bytes = limit;
    o.resident_bytes = node_setup_bytes(&w->session);
    o.stream = true;
    return o;
}

// The plan of the task for the machine as it is now, with shorter sequences, and more of them, when
// the coordinator's do not fit. Also learns the widest window that this device can hold. `steps`: 0
// plans by what is known, else what is not known may be measured.
static fl_status make_plan(node_worker *w, node_adapter *a, uint64_t steps, node_tune_plan *ret,
                           fl_err *err) {
    node_facts_read("", &w->session.facts);
    const node_facts *facts = &w->session.facts;
    w->spare = node_policy_spare(facts->temperature_c, w->opts.pause_c, w->spare);
    if (steps == 0) w->watch = node_watch_begin();
    const uint32_t online = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN);
    const uint32_t threads =
        node_policy_threads(node_facts_threads(facts), online, node_watch_others(&w->watch));
    char path[NODE_PATH_MAX], folder[NODE_PATH_MAX];
    node_state_path(w->state, "model.gguf", path);
    node_state_path(w->state, "", folder);
    node_job job = {.kern = &w->session.kern,
                    .facts = facts,
                    .model = w->session.model,
                    .adapter = a,
                    .docs = &w->corpus->train,
                    .opts = tune_opts(w),
                    .threads_max = w->spare && threads > 1 ? threads / 2 : threads,
                    .steps = steps,
                    .folder = folder,
                    .path = path};
    node_tune_opts *o = &job.opts;
    node_schedule s;
    fl_status st = FL_ENOMEM;
    for (; o->sequence >= NODE_TUNE_SEQUENCE_MIN && st == FL_ENOMEM; o->sequence /= 2) {
        st = node_schedule_make(&job, &s, err);
        if (o->micro <= NODE_TUNE_MICRO_MAX / 2) o->micro *= 2;
    }
    if (st == FL_ENOMEM) w->window_max = o->window.size > 1 ? o->window.size / 2 : 0;
    FL_TRY(st);
    *ret = s.plan;
    return node_setup_threads(&w->session, s.plan.opts.threads, err);
}

static void sleep_ms(unsigned ms) {
    const struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    nanosleep(&t, NULL);
}

static fl_status run_steps(node_worker *w, node_tuner *tuner, uint64_t *ret_tokens, fl_err *err) {
    const double start = fl_clock_s();
    double paused_s = 0;
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < w->task.steps; i++) {
        const double before = fl_clock_s();
        while (w->pause && !w->stop) sleep_ms(PAUSE_MS);
        paused_s += fl_clock_s() - before;
        if (w->stop) return FL_FAIL(err, FL_ESTATE, "the task was given up");
        node_tune_report r;
        node_tuner_step(tuner, &r);
        tokens += r.tokens;
        w->step = i + 1;
        w->tokens = tokens;
        w->loss = (float)r.loss;
        w->speed = (float)((double)tokens / (fl_clock_s() - start - paused_s));
    }
    *ret_tokens = tokens;
    return FL_OK;
}

// How this task's updates are to be made, as far as it can be said now.
static node_upload_choice choose_upload(node_worker *w, const node_adapter *a) {
    uint32_t counts[FL_LAYERS_MAX];
    for (size_t i = 0; i < w->task.base_count; i++)
        counts[i] = vector_count(a, w->session.model, w->bases[i].layer);
    const double passed_s = fl_clock_s() - w->started_s;
    const double left_s = w->upload.left_s - passed_s;
    const node_outbox_terms terms = {.rule = w->upload.rule,
                                     .uplink = w->upload.uplink,
                                     .work_s = passed_s,
                                     .left_s = left_s > 0.0 ? left_s : 0.0,
                                     .now_s = fl_clock_wall_s()};
    return node_outbox_choose(w->state, &w->task, &terms, counts, (uint32_t)w->task.base_count);
}

static fl_status spool_window(node_worker *w, const node_adapter *a, const float *before,
                              uint64_t tokens, fl_err *err) {
    const node_model *m = w->session.model;
    const float *base = before;
    node_outbox out = {.state = w->state,
                       .task = &w->task,
                       .update_key = w->update_key,
                       .choice = choose_upload(w, a)};
    w->result.upload = out.choice;
    for (uint32_t i = 0; i < w->task.base_count; i++) {
        const uint32_t layer = w->bases[i].layer, count = vector_count(a, m, layer);
        float *delta = malloc(count * sizeof(*delta));
        if (delta == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for a delta");
        vector_get(a, m, layer, delta);
        for (uint32_t k = 0; k < count; k++) delta[k] -= base[k];
        fl_update_begin *made = &w->result.updates[w->result.update_count].begin;
        const fl_status st =
            node_outbox_put(&out, layer, w->bases[i].version, delta, count, tokens, made, err);
        free(delta);
        FL_TRY(st);
        w->result.update_count++;
        w->result.bytes += made->size;
        base += count;
    }
    return FL_OK;
}

// The cache of the last task if this one's plan has the same shape, else a new one.
static fl_status open_prefix(node_worker *w, const node_prefix_shape *shape, fl_err *err) {
    if (w->prefix.block != NULL && node_prefix_same_shape(&w->prefix.prefix.shape, shape))
        return FL_OK;
    node_prefix_home_close(&w->prefix);
    if (shape->places + shape->store_places == 0) return FL_OK;
    return node_prefix_home_open(shape, w->opts.prefix_folder, &w->prefix, err);
}

// Training that could not be sent for lack of the owner's bytes is not begun.
static fl_status check_upload(node_worker *w, const node_adapter *a, fl_err *err) {
    for (size_t i = 0; i < w->task.base_count; i++) {
        if (w->bases[i].layer >= w->session.model->layers)
            return FL_FAIL(err, FL_EFORMAT, "the model has no layer %u", w->bases[i].layer);
    }
    const node_upload_choice c = choose_upload(w, a);
    if (c.why != NODE_UPLOAD_SPENT) return FL_OK;
    FL_TRY(node_state_save_run(w->state, err)); // so that it is known after a restart, too
    return FL_FAIL(err, FL_ELIMIT, "%s: %llu bytes are left, an update takes %llu",
                   node_upload_why_text(c.why),
                   (unsigned long long)node_upload_left(&w->state->upload, &w->upload.rule),
                   (unsigned long long)c.least);
}

// Trains the window and spools what changed.
static fl_status train(node_worker *w, node_adapter *a, fl_err *err) {
    const node_model *m = w->session.model;
    node_tune_plan plan;
    FL_TRY(make_plan(w, a, w->task.steps, &plan, err));
    size_t values = 0;
    for (uint32_t i = 0; i < w->task.base_count; i++) {
        if (w->bases[i].layer >= m->layers || a->version[w->bases[i].layer] != w->bases[i].version)
            return FL_FAIL(err, FL_ESTATE, "layer %u is not of the version that the task names",
                           w->bases[i].layer);
        values += vector_count(a, m, w->bases[i].layer);
    }
    node_tuner *tuner = malloc(sizeof(*tuner));
    float *before = malloc(values * sizeof(*before));
    void *block = NULL;
    fl_status st = tuner == NULL || before == NULL ? FL_FAIL(err, FL_ENOMEM, "no memory to tune")
                                                   : node_block_take(plan.arena_bytes, &block, err);
    if (st == FL_OK) st = node_setup_place_weights(&w->session, &plan.resident, err);
    if (st == FL_OK) st = open_prefix(w, &plan.prefix, err);
    if (st == FL_OK) {
        float *at = before;
        for (uint32_t i = 0; i < w->task.base_count; i++) {
            vector_get(a, m, w->bases[i].layer, at);
            at += vector_count(a, m, w->bases[i].layer);
        }
        fl_arena arena;
        uint64_t tokens = 0;
        fl_arena_init(&arena, block, plan.arena_bytes);
        node_tuner_bind(tuner, &w->session.engine, m, a, &w->corpus->train, &plan.opts, &arena);
        if (w->prefix.block != NULL) node_tuner_use_prefix(tuner, &w->prefix.prefix);
        st = run_steps(w, tuner, &tokens, err);
        free(block); // the updates need memory of their own
        block = NULL;
        if (st == FL_OK) st = spool_window(w, a, before, tokens, err);
    }
    free(before);
    free(block);
    free(tuner);
    return st;
}

static fl_status do_task(node_worker *w, fl_err *err) {
    node_adapter *a = NULL;
    fl_report *r = &w->result.report;
    FL_TRY(open_model(w, err));
    FL_TRY(open_adapter(w, &a, err));
    char path[NODE_PATH_MAX];
    node_state_path(w->state, "adapter", path);
    fl_status st = node_adapter_save(a, path, err);
    if (st != FL_OK) goto out;
    node_tune_plan plan; // refused before anything takes time
    if (w->task.kind == FL_TASK_TRAIN) st = check_upload(w, a, err);
    if (st != FL_OK) goto out;
    if (w->task.kind == FL_TASK_TRAIN) st = make_plan(w, a, 0, &plan, err);
    if (st != FL_OK) goto out;
    st = measure(w, a, r, err);
    if (st != FL_OK) goto out;
    if (w->task.kind == FL_TASK_TRAIN) {
        st = train(w, a, err);
        if (st != FL_OK) goto out;
        node_eval_result e;
        st = evaluate(w, a, false, &e, err);
        if (st != FL_OK) goto out;
        r->nll_local_q20 = q20(e.last_exit_nll, r->tokens);
    }
    memcpy(r->run_id, w->task.run_id, sizeof(r->run_id));
    r->round = w->task.round;
    r->task_id = w->task.task_id;
    r->sequence = (uint64_t)++w->state->reports_made;
    r->peak_rss_bytes = node_rss_peak();
    w->result.has_report = true;
    st = node_state_save_run(w->state, err);
out:
    node_adapter_close(a);
    return st;
}

static void *work(void *arg) {
    node_worker *w = arg;
    memset(&w->result, 0, sizeof(w->result));
    const fl_status st = do_task(w, &w->err);
    // What was spooled before a failure is on disk and durable: it may be sent.
    w->work = st == FL_OK || w->result.update_count > 0 ? NODE_WORK_DONE : NODE_WORK_FAILED;
    return NULL;
}

fl_status node_worker_start(node_worker *w, const fl_task *task,
                            const uint8_t update_key[FL_KEY_SIZE],
                            const node_worker_upload *upload, fl_err *err) {
    if (w->work == NODE_WORK_BUSY) return FL_FAIL(err, FL_ESTATE, "another task is under way");
    w->task = *task;
    for (size_t i = 0; i < task->base_count; i++) w->bases[i] = task->bases[i];
    w->task.bases = w->bases;
    // Version 0 counts too: the coordinator's first EM step starts from its weights.
    if (task->vote.count > 0) w->vote = task->vote;
    memcpy(w->update_key, update_key, FL_KEY_SIZE);
    w->upload = *upload;
    w->started_s = fl_clock_s();
    w->stop = false;
    w->step = 0;
    w->tokens = 0;
    w->work = NODE_WORK_BUSY;
    if (pthread_create(&w->thread, NULL, work, w) != 0) {
        w->work = NODE_WORK_IDLE;
        return FL_FAIL(err, FL_EIO, "the system refused to start the worker");
    }
    w->started = true;
    return FL_OK;
}

void node_worker_pause(node_worker *w, bool pause) {
    w->pause = pause;
}

void node_worker_stop(node_worker *w) {
    w->stop = true;
}

void node_worker_set_vote(node_worker *w, const fl_vote *vote) {
    w->vote = *vote; // between tasks: the client asks for one at a time
}

node_work node_worker_poll(node_worker *w, node_progress *ret) {
    const node_work now = (node_work)w->work;
    *ret = (node_progress){.step = w->step,
                           .steps = w->task.steps,
                           .tokens = w->tokens,
                           .loss = w->loss,
                           .tokens_per_second = w->speed,
                           .window_max = w->window_max,
                           .tokens_local = w->tokens_local};
    if (now == NODE_WORK_DONE || now == NODE_WORK_FAILED) {
        pthread_join(w->thread, NULL);
        w->started = false;
        w->work = NODE_WORK_IDLE;
    }
    return now;
}

const node_work_result *node_worker_result(const node_worker *w) {
    return &w->result;
}

const fl_err *node_worker_error(const node_worker *w) {
    return &w->err;
}
