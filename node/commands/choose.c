#include "node/commands/choose.h"

#include "common/clock.h"
#include "node/commands/state_dir.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

// A run that is predicted to be shorter takes what is known: measuring would not be paid back.
static const double PAYS_S = 30;
// Of the best few, those that are predicted to take at most this much longer are measured.
static const double CLOSE = 1.15;
static const double FEW_SECONDS = 2;
// Processors that other programs may take, on average, while something is measured for good.
static const double OTHERS_MAX = 0.15;
enum { FEW_MAX = 4, PATH_SIZE = 1024 };

static void add_layer(const node_layer *l, uint32_t rank, node_shape *s) {
    for (int m = 0; m < NODE_MODULES; m++) {
        const double rows = l->linear[m].rows, cols = l->linear[m].cols;
        s->layer_weights += rows * cols;
        s->layer_bytes += (double)l->linear[m].size;
        s->adapter_weights += rank * (rows + cols);
        s->trained += rank * rows;
        if (m <= NODE_V) s->first_weights += rows * cols;
    }
}

void node_shape_of(const node_model *m, const node_adapter *adapter, node_shape *ret) {
    const uint32_t rank = adapter->opts.rank;
    node_shape s = {.layers = m->layers,
                    .hidden = m->hidden,
                    .vocabulary = m->vocabulary,
                    .exits = m->exits,
                    .head_weights = (double)m->head.rows * m->head.cols,
                    .head_bytes = (double)m->head.size};
    for (uint32_t i = 0; i < m->layers; i++) {
        const node_layer *l = &m->layer[i];
        const double q = (double)l->heads * m->head_size, kv = (double)l->kv_heads * m->head_size;
        add_layer(l, rank, &s);
        s.attention_width += q;
        s.kept_floats += 3.0 * m->hidden + 2 * q + 2 * kv + 3.0 * l->ffn + NODE_MODULES * rank;
        if (i == 0) s.below_adapted = node_lora_at_work(&adapter->lora, m, 0) != NULL;
    }
    double *const means[] = {&s.layer_weights, &s.layer_bytes,     &s.adapter_weights, &s.trained,
                             &s.first_weights, &s.attention_width, &s.kept_floats};
    for (size_t i = 0; i < FL_COUNT(means); i++) *means[i] /= m->layers;
    *ret = s;
}

// A window of 0 stands for: all that the schedule can train.
static uint32_t widest(const node_job *job) {
    node_window_opts w = job->opts.window;
    w.size = 0;
    return node_window_layers(job->model, &w);
}

void node_job_opts(const node_job *job, const node_choice *c, node_tune_opts *ret) {
    *ret = job->opts;
    if (ret->window.size == 0 && c->window != widest(job)) ret->window.size = c->window;
    ret->threads = c->threads;
    ret->sequence = c->sequence;
    ret->micro = c->micro_batch;
    ret->chunk = c->chunk;
    ret->kept = c->kept;
    ret->stream = c->stream_bytes > 0;
}

static fl_status peak_of(void *ctx, node_choice *c, fl_err *err) {
    const node_job *job = ctx;
    node_tune_opts opts;
    node_tune_plan plan;
    (void)err;
    node_job_opts(job, c, &opts);
    opts.stream = job->opts.stream;
    node_tune_measure(job->model, job->adapter->opts.rank, job->docs, &opts, &plan);
    c->peak_bytes = plan.peak_bytes;
    c->stream_bytes = plan.resident.streamed;
    return FL_OK;
}

// Layers to the exit of a step, on average.
static uint32_t mean_depth(const node_job *job) {
    const node_model *m = job->model;
    const node_window_opts *w = &job->opts.window;
    uint32_t sum = 0;
    if (w->kind == NODE_WINDOW_FIXED) return m->exit_layer[w->exit];
    if (w->kind == NODE_WINDOW_LAST) return m->layers;
    for (uint32_t e = 0; e < m->exits; e++) sum += m->exit_layer[e];
    if (w->kind == NODE_WINDOW_HEAVY && m->exits > 1)
        return (m->layers + (sum - m->layers) / (m->exits - 1)) / 2;
    return (sum + m->exits / 2) / m->exits;
}

static node_wish wish_of(const node_job *job) {
    const node_tune_opts *o = &job->opts;
    return (node_wish){.threads = o->threads,
                       .threads_max = job->threads_max,
                       .window = o->window.size,
                       .window_max = widest(job),
                       .micro_batch = o->micro != 0      ? o->micro
                                      : o->sequence != 0 ? 1
                                                         : 0,
                       .sequence = o->sequence,
                       .chunk = o->chunk,
                       .kept = o->kept == NODE_TUNE_KEEP_AUTO ? UINT32_MAX : o->kept,
                       .tokens = NODE_TUNE_SEQUENCE,
                       .depth = mean_depth(job),
                       .peak_bytes = o->memory_bytes};
}

// Whole weights first: what is computed twice costs less than what is read again. Where they do
// not fit in any way they pass through, and then nothing is kept that could be computed again.
static fl_status choose(const node_job *job, node_schedule *s, fl_err *err) {
    node_wish wish = wish_of(job);
    node_job shifting = *job; // peak_of's context
    shifting.opts.stream = false;
    fl_status st = node_cost_choose(&s->cost, &wish, peak_of, &shifting, s->list, NODE_CHOICES_MAX,
                                    &s->count, &s->seen, err);
    if (st == FL_ENOMEM && job->opts.stream) {
        const uint32_t seen = s->seen;
        shifting.opts.stream = true;
        if (wish.kept == UINT32_MAX) wish.kept = 0;
        st = node_cost_choose(&s->cost, &wish, peak_of, &shifting, s->list, NODE_CHOICES_MAX,
                              &s->count, &s->seen, err);
        s->seen += seen;
    }
    FL_TRY(st);
    s->choice = s->list[0];
    return FL_OK;
}

// The owner's choices do not fit, or nothing does: says which, and what would.
static fl_status refuse(const node_job *job, node_schedule *s, fl_err *err) {
    const double mb = 1e6, asked = (double)job->opts.memory_bytes / mb;
    node_choice least = s->list[0];
    node_tune_opts opts;
    node_tune_plan plan;
    node_job freed = *job;
    freed.opts.window.size = freed.opts.sequence = freed.opts.chunk = 0;
    freed.opts.kept = NODE_TUNE_KEEP_AUTO;
    if (choose(&freed, s, NULL) == FL_OK) {
        const node_choice *c = &s->choice;
        return FL_FAIL(err, FL_ENOMEM,
                       "that does not fit %.0f MB: it needs %.0f MB; a window of %u layers, "
                       "%u x %u tokens and chunks of %u need %.0f MB",
                       asked, ceil((double)least.peak_bytes / mb), c->window, c->micro_batch,
                       c->sequence, c->chunk, (double)c->peak_bytes / mb);
    }
    least = s->list[0];
    node_job_opts(&freed, &least, &opts);
    opts.stream = job->opts.stream;
    node_tune_measure(job->model, job->adapter->opts.rank, job->docs, &opts, &plan);
    return FL_FAIL(
        err, FL_ENOMEM,
        "nothing fits %.0f MB: the smallest plan (a window of %u layers, %u tokens) needs "
        "%.0f MB, %.0f of them weights",
        asked, least.window, least.sequence, ceil((double)least.peak_bytes / mb),
        (double)plan.weight_bytes / mb);
}

static bool cache_path(const node_job *job, const char *name, uint64_t key, char *path) {
    if (job->folder[0] == '\0') return false;
    const int n = key == 0 ? snprintf(path, PATH_SIZE, "%s/%s", job->folder, name)
                           : snprintf(path, PATH_SIZE, "%s/%s-%016llx", job->folder, name,
                                      (unsigned long long)key);
    return n > 0 && n < PATH_SIZE;
}

static void read_caches(const node_job *job, node_schedule *s) {
    char path[PATH_SIZE];
    node_cost *c = &s->cost;
    if (job->again || !cache_path(job, "rates", 0, path)) return;
    s->measured = node_rates_read(path, job->facts, &c->rates, NULL) == FL_OK &&
                  c->rates.threads >= job->threads_max;
    const uint64_t key = node_calibration_key(job->facts, &c->shape);
    if (!s->measured || !cache_path(job, "calibration", key, path)) return;
    c->calibrated = node_calibration_read(path, key, &c->calibration, NULL) == FL_OK;
}

node_watch node_watch_begin(void) {
    return (node_watch){node_busy_s(""), node_busy_own_s(), fl_clock_s()};
}

bool node_watch_disturbed(const node_watch *w) {
    const double others = (node_busy_s("") - w->busy_s) - (node_busy_own_s() - w->own_s);
    return others > OTHERS_MAX * (fl_clock_s() - w->start_s) + 0.05;
}

double node_watch_others(const node_watch *w) {
    const double seconds = fl_clock_s() - w->start_s;
    const double others = (node_busy_s("") - w->busy_s) - (node_busy_own_s() - w->own_s);
    return seconds < 0.5 || others < 0 ? 0 : others / seconds;
}

static fl_status measure_rates(const node_job *job, node_rates *ret, fl_err *err) {
    const uint64_t limit = job->opts.memory_bytes, has = job->opts.resident_bytes;
    const uint64_t left = limit > has ? limit - has : 1;
    FL_TRY(node_rates_measure(job->kern, job->threads_max, limit == 0 ? 0 : left, ret, err));
    if (job->path[0] != '\0' && node_rates_storage(job->path, &ret->storage_bytes, NULL) != FL_OK)
        ret->storage_bytes = 0;
    return FL_OK;
}

// What is stored is read again: a later run chooses by the same digits.
static void store(const node_job *job, node_schedule *s) {
    char path[PATH_SIZE], folder[PATH_SIZE];
    node_cost *c = &s->cost;
    snprintf(folder, sizeof(folder), "%s", job->folder);
    if (!cache_path(job, "rates", 0, path) || node_state_dir_make(folder, NULL) != FL_OK) return;
    if (node_rates_write(path, job->facts, &c->rates, NULL) == FL_OK)
        s->measured = node_rates_read(path, job->facts, &c->rates, NULL) == FL_OK;
    const uint64_t key = c->calibration.key;
    if (c->calibrated && cache_path(job, "calibration", key, path) &&
        node_calibration_write(path, &c->calibration, NULL) == FL_OK)
        c->calibrated = node_calibration_read(path, key, &c->calibration, NULL) == FL_OK;
}

// Measures what the caches do not have. What was measured while other programs were busy serves
// this run only.
static void measure_machine(const node_job *job, node_schedule *s) {
    const node_watch watch = node_watch_begin();
    if (!s->measured && measure_rates(job, &s->cost.rates, NULL) != FL_OK) return;
    s->measured = true;
    if (node_job_calibrate(job, &s->cost, NULL) != FL_OK) s->cost.calibrated = false;
    node_resident_drop(job->model); // a plan may have less of it in memory
    s->disturbed = node_watch_disturbed(&watch);
    if (!s->disturbed) store(job, s);
}

static double run_s(const node_job *job, const node_schedule *s) {
    return job->steps == UINT64_MAX ? INFINITY : (double)job->steps * s->choice.seconds;
}

// Is a candidate different enough from those that were measured to be worth a measurement?
static bool differs(const node_choice *list, const uint32_t *few, uint32_t count,
                    const node_choice *c) {
    for (uint32_t i = 0; i < count; i++) {
        const node_choice *o = &list[few[i]];
        if (o->threads == c->threads &&
            (o->kept > c->kept ? o->kept - c->kept : c->kept - o->kept) * 2 <= c->window)
            return false;
    }
    return true;
}

// Measures the best few; the fastest is the choice. None of them changes what is learned.
static void measure_best(const node_job *job, node_schedule *s) {
    uint32_t few[FEW_MAX], count = 0;
    double spent = 0;
    for (uint32_t i = 0; i < s->count && count < FEW_MAX; i++)
        if (s->list[i].seconds <= CLOSE * s->list[0].seconds &&
            differs(s->list, few, count, &s->list[i]))
            few[count++] = i;
    for (uint32_t i = 0; count > 1 && i < count; i++) {
        node_choice *c = &s->list[few[i]];
        const double left = (FEW_SECONDS - spent) / (count - i) / c->seconds - 1;
        if (left < 1) break;
        const uint32_t runs = left > 5 ? 5 : (uint32_t)left;
        if (node_job_time(job, c, runs, &c->measured, NULL) != FL_OK) c->measured = 0;
        spent += c->measured * (runs + 1);
        if (s->list[few[0]].measured == 0) break; // nothing to compare with
        if (c->measured > 0 && (s->choice.measured == 0 || c->measured < s->choice.measured))
            s->choice = *c;
    }
}

// The plan of the choice, and what the limit cost beside what would be chosen without one.
static fl_status plan_of(const node_job *job, node_schedule *s, fl_err *err) {
    const uint32_t rank = job->adapter->opts.rank;
    node_job free = *job;
    node_tune_opts opts;
    node_tune_plan best;
    node_schedule other = {.cost = s->cost};
    node_job_opts(job, &s->choice, &opts);
    FL_TRY(node_tune_make_plan(job->model, rank, job->docs, &opts, &s->plan, err));
    if (job->opts.memory_bytes == 0) return FL_OK;
    free.opts.memory_bytes = 0;
    FL_TRY(choose(&free, &other, err));
    node_job_opts(&free, &other.choice, &opts);
    node_tune_measure(job->model, rank, job->docs, &opts, &best);
    node_tune_compare(job->model, &best, &s->plan);
    return FL_OK;
}

fl_status node_schedule_make(const node_job *job, node_schedule *ret, fl_err *err) {
    node_tune_opts opts = job->opts;
    node_tune_plan plan;
    opts.memory_bytes = 0;
    if (opts.threads == 0) opts.threads = 1;
    FL_TRY(node_tune_make_plan(job->model, job->adapter->opts.rank, job->docs, &opts, &plan, err));
    node_schedule *s = ret;
    const uint32_t threads =
        job->opts.threads > job->threads_max ? job->opts.threads : job->threads_max;
    *s = (node_schedule){.cost = {.rates = node_rates_assumed(threads)}};
    node_shape_of(job->model, job->adapter, &s->cost.shape);
    read_caches(job, s);
    const fl_status st = choose(job, s, err);
    if (st == FL_ENOMEM) return refuse(job, s, err);
    FL_TRY(st);
    if (!s->cost.calibrated && run_s(job, s) >= PAYS_S) {
        measure_machine(job, s);
        FL_TRY(choose(job, s, err));
    }
    if (s->cost.calibrated && run_s(job, s) >= PAYS_S) measure_best(job, s);
    return plan_of(job, s, err);
}
