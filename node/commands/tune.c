// tune and plan: adaptive layer tuning on private text; and, without touching a byte of it, exactly
// how much memory that will take.
#include "node/tune/evaluate.h"
#include "node/tune/tuner.h"

#include "common/clock.h"
#include "common/file.h"
#include "common/json.h"
#include "common/progress.h"
#include "node/commands/choose.h"
#include "node/commands/commands.h"
#include "node/commands/setup.h"
#include "node/commands/state_dir.h"
#include "node/prefix_disk.h"
#include "node/schedule/policy.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct tune_opts {
    char model[FL_SETTING_TEXT_MAX], data[FL_SETTING_TEXT_MAX], out[FL_SETTING_TEXT_MAX];
    char adapter[FL_SETTING_TEXT_MAX], prefix_folder[FL_SETTING_TEXT_MAX];
    int64_t steps, window, rank, seed, sequence, micro, threads, schedule, exits;
    uint64_t memory, prefix_cache, prefix_disk;
    double lr;
    bool json;
} tune_opts;

#define SET(field) NULL, offsetof(tune_opts, field)
// The last two rows are tune's own; plan takes the others.
enum { TUNE_ONLY = 2 };
static const fl_setting table[] = {
    {NULL, "MODEL", FL_KIND_TEXT, "FILE", 0, 0, NULL, "a GGUF model, best a compressed one",
     SET(model)},
    {NULL, "data", FL_KIND_TEXT, "PATH", 0, 0, NULL, "text file, or folder of text files",
     SET(data)},
    {NULL, "memory", FL_KIND_SIZE, "SIZE", 0, 0, "0",
     "resident memory of the whole process; 0: what is free", SET(memory)},
    {NULL, "window", FL_KIND_INTEGER, "LAYERS", 0, 256, "0",
     "layers that learn in a step; 0: chosen", SET(window)},
    {NULL, "schedule", FL_KIND_CHOICE, NULL, 0, 0, "last", "which window a step trains",
     "last|ordered|cyclic|random|heavy|importance", offsetof(tune_opts, schedule)},
    {NULL, "exits", FL_KIND_INTEGER, "N", 1, 8, "4", "exits, evenly spaced", SET(exits)},
    {NULL, "sequence", FL_KIND_INTEGER, "TOKENS", 0, 4096, "0",
     "tokens of a micro-batch; 0: chosen", SET(sequence)},
    {NULL, "micro-batches", FL_KIND_INTEGER, "N", 0, 1024, "0", "micro-batches a step; 0: chosen",
     SET(micro)},
    {NULL, "prefix-cache", FL_KIND_SIZE, "SIZE", 0, 0, "64M",
     "of the memory, for states of layers below the window that come again; 0: none",
     SET(prefix_cache)},
    {NULL, "prefix-folder", FL_KIND_TEXT, "FOLDER", 0, 0, "",
     "keep more of them here on disk, sealed, while it runs", SET(prefix_folder)},
    {NULL, "prefix-disk", FL_KIND_SIZE, "SIZE", 0, 0, "1G", "of that disk, at most",
     SET(prefix_disk)},
    {NULL, "rank", FL_KIND_INTEGER, "R", 1, 64, "8", "rank of the adapters", SET(rank)},
    {NULL, "steps", FL_KIND_INTEGER, "N", 1, 1000000, "128", "tuning steps", SET(steps)},
    {NULL, "seed", FL_KIND_INTEGER, "S", 0, 0, "1", "seed of the order of the data", SET(seed)},
    {NULL, "lr", FL_KIND_NUMBER, "RATE", 1e-6, 1, "0.005", "learning rate", SET(lr)},
    {NULL, "threads", FL_KIND_INTEGER, "N", 0, 64, "0", "threads; 0: all fast cores", SET(threads)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "JSON for machines", SET(json)},
    {NULL, "out", FL_KIND_TEXT, "ADAPTER", 0, 0, NULL, "where the adapter is written", SET(out)},
    {NULL, "adapter", FL_KIND_TEXT, "ADAPTER", 0, 0, "", "go on from this adapter", SET(adapter)},
};

// Everything a run needs, opened in order and closed together.
typedef struct tune_run {
    node_setup session;
    node_adapter *adapter; // session.adapter, or one of our own
    bool own_adapter;
    node_corpus *corpus;
    char folder[FL_SETTING_TEXT_MAX]; // of what was measured
    node_job job;
    node_schedule schedule;
    node_tune_plan plan;
    node_prefix_home prefix;
    bool spare;       // the device is warm: half the threads
    uint32_t threads; // that were free at the last look
    uint32_t seen;    // the same at the one before: a change counts when it stays
    node_watch watch; // since the last look
} tune_run;

static void close_run(tune_run *r) {
    node_prefix_home_close(&r->prefix);
    if (r->own_adapter) node_adapter_close(r->adapter);
    node_corpus_close(r->corpus);
    node_setup_close(&r->session);
}

static fl_status open_adapter(tune_run *r, const tune_opts *o, fl_err *err) {
    r->adapter = r->session.adapter;
    if (r->adapter != NULL) return FL_OK;
    node_model *model = r->session.model;
    if (o->exits > model->layers)
        return FL_FAIL(err, FL_EARG, "%lld exits, but the model has %u layers", (long long)o->exits,
                       model->layers);
    node_model_set_exits(model, (uint32_t)o->exits);
    node_adapter_opts adapter = node_adapter_defaults();
    adapter.alpha = adapter.alpha / (float)adapter.rank * (float)o->rank; // the same alpha / rank
    adapter.rank = (uint32_t)o->rank;
    r->own_adapter = true;
    return node_adapter_open(model, &adapter, &r->adapter, err);
}

static void make_job(tune_run *r, const tune_opts *o, uint64_t steps) {
    static const node_window_kind kinds[] = {NODE_WINDOW_LAST,   NODE_WINDOW_ORDERED,
                                             NODE_WINDOW_CYCLIC, NODE_WINDOW_RANDOM,
                                             NODE_WINDOW_HEAVY,  NODE_WINDOW_IMPORTANCE};
    node_tune_opts t = node_tune_defaults();
    t.window.kind = kinds[o->schedule];
    t.window.size = (uint32_t)o->window;
    t.window.steps = (uint64_t)o->steps;
    t.window.seed = t.seed = t.text_seed = (uint64_t)o->seed;
    t.prefix_bytes = o->prefix_cache;
    t.prefix_disk = o->prefix_folder[0] == '\0' ? 0 : o->prefix_disk;
    t.sequence = (uint32_t)o->sequence;
    t.micro = (uint32_t)o->micro;
    t.lr = t.gain_lr = (float)o->lr;
    t.threads = (uint32_t)o->threads;
    t.memory_bytes = node_facts_memory_budget(&r->session.facts, o->memory);
    t.resident_bytes = node_setup_bytes(&r->session);
    t.stream = true;
    if (node_state_dir("", r->folder, sizeof(r->folder), NULL) != FL_OK) r->folder[0] = '\0';
    r->job = (node_job){.kern = &r->session.kern,
                        .facts = &r->session.facts,
                        .model = r->session.model,
                        .adapter = r->adapter,
                        .docs = &r->corpus->train,
                        .opts = t,
                        .threads_max = node_facts_threads(&r->session.facts),
                        .steps = steps,
                        .folder = r->folder,
                        .path = o->model};
}

// steps 0: nothing is measured.
static fl_status open_run(tune_run *r, const tune_opts *o, uint64_t steps, fl_err *err) {
    const node_setup_opts session = {
        .model = o->model, .adapter = o->adapter, .threads = o->threads};
    FL_TRY(node_setup_open(&session, &r->session, err));
    FL_TRY(open_adapter(r, o, err));
    const node_corpus_opts corpus = {0};
    FL_TRY(node_corpus_open(o->data, r->session.tokenizer, &corpus, &r->corpus, err));
    node_tokenizer_close(r->session.tokenizer); // megabytes that tuning has better use for
    r->session.tokenizer = NULL;
    make_job(r, o, steps);
    FL_TRY(node_schedule_make(&r->job, &r->schedule, err));
    r->plan = r->schedule.plan;
    const uint64_t opened = node_rss_peak(); // reading the text, or measuring, took so much
    if (r->plan.peak_bytes < opened) r->plan.peak_bytes = opened;
    r->threads = r->seen = node_facts_threads(&r->session.facts);
    r->watch = node_watch_begin();
    return node_setup_threads(&r->session, r->plan.opts.threads, err);
}

static void add_plan(fl_json *root, const node_tune_plan *p) {
    fl_json_set_integer(root, "planned_peak_bytes", (int64_t)p->peak_bytes);
    fl_json_set_integer(root, "arena_bytes", (int64_t)p->arena_bytes);
    fl_json_set_integer(root, "weight_bytes", (int64_t)p->weight_bytes);
    fl_json_set_integer(root, "resident_bytes", (int64_t)p->resident_bytes);
    fl_json_set_integer(root, "prefix_cache_bytes", (int64_t)p->prefix_bytes);
    fl_json_set_integer(root, "prefix_cache_batches", p->prefix.places);
    fl_json_set_integer(root, "prefix_disk_batches", p->prefix.store_places);
    fl_json_set_integer(root, "batches", (int64_t)p->batches);
    fl_json_set_integer(root, "window", p->window);
    fl_json_set_integer(root, "sequence", p->opts.sequence);
    fl_json_set_integer(root, "micro_batches", p->opts.micro);
    fl_json_set_integer(root, "chunk", p->opts.chunk);
    fl_json_set_integer(root, "kept_layers", p->opts.kept);
    fl_json_set_integer(root, "threads", p->opts.threads);
    fl_json_set_integer(root, "streamed_bytes_per_pass", (int64_t)p->resident.streamed);
    fl_json_set_integer(root, "streamed_layers", p->resident.layers_streamed);
}

static void add_gave_up(fl_json *root, const node_tune_plan *p) {
    fl_json *list = fl_json_add_array(root, "gave_up");
    for (uint32_t i = 0; i < p->gave_up_count; i++) fl_json_set_string(list, NULL, p->gave_up[i]);
}

static void print_gave_up(const node_tune_plan *p) {
    for (uint32_t i = 0; i < p->gave_up_count; i++)
        printf("%s%s%s", i == 0 ? "to fit the memory: " : "; ", p->gave_up[i],
               i + 1 == p->gave_up_count ? "\n" : "");
}

static double predicted_rate(const node_schedule *s) {
    return (double)s->choice.micro_batch * s->choice.sequence / s->choice.seconds;
}

static int run_plan(const void *options) {
    const tune_opts *o = options;
    tune_run r = {0};
    fl_err err;
    fl_status st = open_run(&r, o, 0, &err);
    const node_tune_plan *p = &r.plan;
    if (st == FL_OK && o->json) {
        fl_json *root = fl_json_object();
        add_plan(root, p);
        add_gave_up(root, p);
        fl_json_set_integer(root, "candidates", r.schedule.seen);
        if (r.schedule.measured)
            fl_json_set_number(root, "predicted_tokens_per_second", predicted_rate(&r.schedule));
        st = fl_json_print(root, stdout, &err);
        fl_json_free(root);
    } else if (st == FL_OK) {
        printf("peak %.1f MB = arena %.1f + weights %.1f + prefix cache %.1f + the rest of the "
               "process %.1f\n",
               (double)p->peak_bytes / 1e6, (double)p->arena_bytes / 1e6,
               (double)p->weight_bytes / 1e6, (double)p->prefix_bytes / 1e6,
               (double)p->resident_bytes / 1e6);
        printf("window of %u layers, %u x %u tokens a step, vocabulary %u at a time, "
               "activations of %u layers kept, %u threads\n",
               p->window, p->opts.micro, p->opts.sequence, p->opts.chunk, p->opts.kept,
               p->opts.threads);
        print_gave_up(p);
        printf("%u micro-batches an epoch; states kept of %u in memory and %u on disk\n",
               p->batches, p->prefix.places, p->prefix.store_places);
        if (r.schedule.measured)
            printf("predicted: %.0f tokens/s (%s)\n", predicted_rate(&r.schedule),
                   r.schedule.cost.calibrated ? "this model was measured here"
                                              : "from the machine's rates alone");
    }
    close_run(&r);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

// ---- tune

static volatile sig_atomic_t stop;
static void on_signal(int number) {
    (void)number;
    stop = 1;
}

static void add_prefix(fl_json *root, const node_prefix_home *home) {
    fl_json_set_integer(root, "prefix_hits", (int64_t)home->prefix.hits);
    fl_json_set_integer(root, "prefix_misses", (int64_t)home->prefix.misses);
    fl_json_set_integer(root, "prefix_bytes_written",
                        (int64_t)node_prefix_disk_written(home->disk));
}

static fl_status print_step(const tune_run *r, const node_tune_report *s, double rate, bool done,
                            fl_err *err) {
    fl_json *root = fl_json_object();
    fl_json_set_integer(root, "step", (int64_t)s->step);
    fl_json_set_integer(root, "tokens", (int64_t)s->tokens);
    fl_json_set_number(root, "loss", s->loss);
    fl_json_set_integer(root, "exit_layer", s->exit_layer);
    fl_json *window = fl_json_add_array(root, "window");
    fl_json_set_integer(window, NULL, s->window.first);
    fl_json_set_integer(window, NULL, s->window.last);
    fl_json_set_number(root, "tokens_per_second", rate);
    fl_json_set_integer(root, "rss_bytes", (int64_t)node_rss_now());
    add_prefix(root, &r->prefix);
    if (done) {
        fl_json_set_bool(root, "done", true);
        fl_json_set_integer(root, "peak_rss_bytes", (int64_t)node_rss_peak());
        fl_json_set_integer(root, "planned_peak_bytes", (int64_t)r->plan.peak_bytes);
        add_gave_up(root, &r->plan);
        node_setup_add_streamed(&r->session, root);
    }
    const fl_status st = fl_json_print(root, stdout, err);
    fl_json_free(root);
    return st;
}

// ---- a machine that changes

// The run as it stands: what a new plan moves.
typedef struct bound {
    node_tuner *tuner;
    void *block;
} bound;

static fl_status bind(tune_run *r, const node_tune_plan *plan, bound *ret, fl_err *err) {
    FL_TRY(node_setup_place_weights(&r->session, &plan->resident, err));
    FL_TRY(node_block_take(plan->arena_bytes, &ret->block, err));
    fl_arena arena;
    fl_arena_init(&arena, ret->block, plan->arena_bytes);
    node_tuner_bind(ret->tuner, &r->session.engine, r->session.model, r->adapter, &r->corpus->train,
                    &plan->opts, &arena);
    if (r->prefix.block != NULL) node_tuner_use_prefix(ret->tuner, &r->prefix.prefix);
    return FL_OK;
}

// Goes on with another plan of the same window, sequence and micro-batches. The weights' pages make
// room for the state, the old block for the new one.
static fl_status move(tune_run *r, const node_tune_plan *plan, bound *b, fl_err *err) {
    node_setup_let_go(&r->session);
    void *state = malloc(node_tuner_state_size(b->tuner));
    if (state == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to go on with another plan");
    node_tuner_state_get(b->tuner, state);
    free(b->block);
    b->block = NULL;
    node_setup_trim();
    fl_status st = node_setup_threads(&r->session, plan->opts.threads, err);
    if (st == FL_OK) st = bind(r, plan, b, err);
    if (st == FL_OK) {
        node_tuner_state_set(b->tuner, state);
        const uint64_t peak = r->plan.peak_bytes; // what was reached so far stays the highest
        r->plan = *plan;
        if (r->plan.peak_bytes < peak) r->plan.peak_bytes = peak;
    }
    free(state);
    node_setup_trim();
    return st;
}

// Looks at the machine; when its cores, the load that others put on them, its memory limit or its
// heat have changed, threads, kept layers and, if it must be, the chunk are chosen anew. What is
// learned stays what it was. A limit that nothing fits leaves the run as it is.
static fl_status replan(tune_run *r, const tune_opts *o, bound *b, fl_err *err) {
    const double pause_c = 75; // as the agent's default: node.ini is not this command's
    node_facts now;
    node_facts_read("", &now);
    const bool spare = node_policy_spare(now.temperature_c, pause_c, r->spare);
    const uint32_t online = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN);
    const uint32_t free_now =
        node_policy_threads(node_facts_threads(&now), online, node_watch_others(&r->watch));
    const bool load = free_now == r->seen && free_now != r->threads;
    r->watch = node_watch_begin();
    r->seen = free_now;
    const bool cores = node_facts_differ(&r->session.facts, &now);
    if (!cores && !load && spare == r->spare) return FL_OK;
    if (cores || load) r->threads = free_now;
    r->session.facts = now;
    r->spare = spare;
    node_schedule s;
    node_job job = r->job;
    job.threads_max = spare && r->threads > 1 ? r->threads / 2 : r->threads;
    if (now.memory_limit != 0 && now.memory_limit < job.opts.memory_bytes)
        job.opts.memory_bytes = now.memory_limit;
    job.steps = 0; // by what is known
    job.opts.window.size = r->plan.opts.window.size;
    job.opts.sequence = r->plan.opts.sequence;
    job.opts.micro = r->plan.opts.micro;
    job.opts.chunk = r->plan.opts.chunk;
    // The prefix cache stays as it is.
    job.opts.prefix_bytes = job.opts.prefix_disk = 0;
    job.opts.resident_bytes += r->plan.prefix_bytes;
    fl_status st = node_schedule_make(&job, &s, err);
    job.opts.chunk = 0;
    if (st == FL_ENOMEM) st = node_schedule_make(&job, &s, err);
    if (st == FL_ENOMEM) return FL_OK;
    FL_TRY(st);
    if (s.plan.window != r->plan.window) return FL_OK;
    if (s.plan.opts.threads == r->plan.opts.threads && s.plan.opts.kept == r->plan.opts.kept &&
        s.plan.opts.chunk == r->plan.opts.chunk && s.plan.resident.bytes == r->plan.resident.bytes)
        return FL_OK;
    s.plan.prefix = r->plan.prefix;
    s.plan.prefix_bytes = r->plan.prefix_bytes;
    if (!o->json)
        fprintf(stderr, "\nthe machine has changed: %u threads, %u layers kept from now on\n",
                s.plan.opts.threads, s.plan.opts.kept);
    return move(r, &s.plan, b, err);
}

// One report is a second's worth of steps in JSON, a line's redraw on a terminal. b->block, the
// tuner's, is freed when the steps are done: what follows has a plan of its own in its place.
static fl_status run_steps(tune_run *r, const tune_opts *o, bound *b, fl_err *err) {
    const double look_s = 5;
    fl_progress bar;
    fl_progress_init(&bar, "tuning", o->json);
    const double start = fl_clock_s();
    double reported = start, looked = start, loss = 0;
    node_tune_report s = {0};
    uint64_t tokens = 0;
    fl_status st = FL_OK;
    for (int64_t i = 0; i < o->steps && !stop && st == FL_OK; i++) {
        node_tuner_step(b->tuner, &s);
        tokens += s.tokens;
        const double now = fl_clock_s(), rate = (double)tokens / (now - start);
        loss = i == 0 ? s.loss : 0.9 * loss + 0.1 * s.loss;
        char note[96];
        snprintf(note, sizeof(note), "loss %.3f, %.0f tokens/s", loss, rate);
        fl_progress_step(&bar, (uint64_t)i + 1, (uint64_t)o->steps, note);
        const bool last = i + 1 == o->steps || stop;
        if (o->json && (last || now - reported >= 1.0)) {
            reported = now;
            st = print_step(r, &s, rate, false, err);
        }
        if (st == FL_OK && !last && now - looked >= look_s) {
            looked = now;
            st = replan(r, o, b, err);
        }
    }
    fl_progress_done(&bar);
    const double seconds = fl_clock_s() - start;
    free(b->block);
    b->block = NULL;
    if (st != FL_OK) return st;
    // An exit that was never trained has nothing to say: then the vote stays with the last one.
    if (r->plan.opts.window.kind != NODE_WINDOW_LAST && r->corpus->held.count > 0) {
        node_eval_result scored;
        st = node_eval_settle_vote(&r->session.engine, r->session.model, r->adapter,
                                   &r->corpus->held, r->plan.vote_window,
                                   fl_pool_threads(r->session.pool), &scored, err);
        if (st != FL_OK) return st;
    }
    st = node_adapter_save(r->adapter, o->out, err);
    if (st != FL_OK) return st;
    const double rate = (double)tokens / seconds;
    s.tokens = tokens;
    if (o->json) return print_step(r, &s, rate, true, err);
    printf("%llu steps, %llu tokens, %.0f tokens/s, last loss %.3f, peak %.1f MB (planned %.1f)\n"
           "%llu of %llu micro-batches found the state below the window, %.1f MB written to disk\n"
           "adapter written to %s\n",
           (unsigned long long)s.step, (unsigned long long)tokens, rate, loss,
           (double)node_rss_peak() / 1e6, (double)r->plan.peak_bytes / 1e6,
           (unsigned long long)r->prefix.prefix.hits,
           (unsigned long long)s.step * r->plan.opts.micro,
           (double)node_prefix_disk_written(r->prefix.disk) / 1e6, o->out);
    node_setup_print_streamed(&r->session, seconds, stdout);
    return FL_OK;
}

static int run_tune(const void *options) {
    const tune_opts *o = options;
    const struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGXFSZ, SIG_IGN); // a file size limit is a full disk: the write fails
    tune_run r = {0};
    bound b = {.tuner = malloc(sizeof(*b.tuner))};
    fl_err err;
    fl_status st = b.tuner == NULL ? FL_FAIL(&err, FL_ENOMEM, "no memory to tune") : FL_OK;
    if (st == FL_OK) st = open_run(&r, o, (uint64_t)o->steps, &err);
    if (st == FL_OK && !o->json) print_gave_up(&r.plan);
    if (st == FL_OK && r.plan.prefix_bytes > 0)
        st = node_prefix_home_open(&r.plan.prefix, o->prefix_folder, &r.prefix, &err);
    if (st == FL_OK) st = bind(&r, &r.plan, &b, &err);
    if (st == FL_OK) st = run_steps(&r, o, &b, &err);
    free(b.block);
    free(b.tuner);
    close_run(&r);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_plan = {
    .name = "plan",
    .summary = "says how much memory tuning will take, before it takes any",
    .example = "fleetune-node plan smollm2-4bit.gguf --data notes/ --memory 300M",
    .table = table,
    .count = FL_COUNT(table) - TUNE_ONLY,
    .options_size = sizeof(tune_opts),
    .run = run_plan,
};

const fl_command node_cmd_tune = {
    .name = "tune",
    .summary = "adapts a window of layers to private text",
    .example = "fleetune-node tune smollm2-4bit.gguf --data notes/ --out notes.adapter",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(tune_opts),
    .run = run_tune,
};
