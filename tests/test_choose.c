// Goal: scheduler and tuner agree: what is chosen fits exactly, what is learned does not depend on
// the machine's speed, and measuring changes no bit of an adapter. Method: small random models, a
// sweep of budgets, caches in a temporary folder.
#include "common/file.h"
#include "node/commands/choose.h"
#include "tests/tiny_model.h"

typedef struct rig {
    tiny_model *t;
    node_adapter *adapter;
    fl_kern kern;
    node_facts facts;
    int32_t ids[1500];
    uint64_t begin[2];
    node_docs docs;
    node_job job;
    char folder[64];
} rig;

static rig *rig_open(void) {
    rig *r = calloc(1, sizeof(*r));
    T_NEED(r != NULL, "memory");
    tiny_shape shape = tiny_default;
    shape.vocabulary = 300;
    shape.layers = 6;
    shape.bits = 4;
    t_seed = 5;
    r->t = tiny_open(&shape);
    node_facts_read("", &r->facts);
    fl_kern_select(&r->kern, r->facts.cpu);
    const node_adapter_opts opts = {.rank = 4, .alpha = 8.0f, .seed = 3};
    fl_err err;
    T_OK(node_adapter_open(&r->t->model, &opts, &r->adapter, &err), err);
    for (uint32_t i = 0; i < FL_COUNT(r->ids); i++) r->ids[i] = (int32_t)(i * 7 % 300);
    r->begin[1] = FL_COUNT(r->ids);
    r->docs = (node_docs){r->ids, r->begin, 1};
    snprintf(r->folder, sizeof(r->folder), "/tmp/fleetune_choose_XXXXXX");
    T_NEED(mkdtemp(r->folder) != NULL, "a temporary folder");
    r->job = (node_job){.kern = &r->kern,
                        .facts = &r->facts,
                        .model = &r->t->model,
                        .adapter = r->adapter,
                        .docs = &r->docs,
                        .opts = node_tune_defaults(),
                        .threads_max = 2,
                        .folder = r->folder,
                        .path = ""};
    r->job.opts.threads = 0;
    r->job.opts.prefix_bytes = 0;
    return r;
}

static void rig_close(rig *r) {
    char command[128];
    snprintf(command, sizeof(command), "rm -rf '%s'", r->folder);
    FILE *p = popen(command, "r");
    if (p != NULL) pclose(p);
    node_adapter_close(r->adapter);
    tiny_close(r->t);
    free(r);
}

static uint32_t files_in(const rig *r) {
    char command[128];
    unsigned count = 0;
    snprintf(command, sizeof(command), "ls '%s' | wc -l", r->folder);
    FILE *p = popen(command, "r");
    T_NEED(p != NULL && fscanf(p, "%u", &count) == 1, "%s", command);
    pclose(p);
    return count;
}

static void test_every_budget(void) {
    rig *r = rig_open();
    node_schedule s;
    fl_err err;
    T_OK(node_schedule_make(&r->job, &s, &err), err);
    const uint64_t most = s.plan.peak_bytes;
    uint64_t least = 0;
    T_EQ(s.choice.window, node_window_layers(&r->t->model, &r->job.opts.window));
    T_EQ(s.plan.opts.window.size, 0); // the default window stays: all layers
    for (uint64_t budget = most; least == 0; budget -= 4096) {
        r->job.opts.memory_bytes = budget;
        const fl_status st = node_schedule_make(&r->job, &s, &err);
        if (st == FL_ENOMEM) {
            T_CHECK(strstr(err.text, "the smallest plan (a window of 1 layers, 16 tokens)") != NULL,
                    "%s", err.text);
            least = budget;
            break;
        }
        T_OK(st, err);
        T_CHECK(s.plan.peak_bytes <= budget, "%llu of %llu", (unsigned long long)s.plan.peak_bytes,
                (unsigned long long)budget);
        T_EQ(s.plan.peak_bytes, s.choice.peak_bytes);
        T_EQ(s.plan.opts.sequence * s.plan.opts.micro, NODE_TUNE_SEQUENCE);
        node_tune_plan again; // what was chosen is what the tuner plans
        T_OK(node_tune_make_plan(&r->t->model, 4, &r->docs, &s.plan.opts, &again, &err), err);
        T_EQ(again.peak_bytes, s.plan.peak_bytes);
        T_EQ(again.window, s.choice.window);
    }
    T_CHECK(least > 0 && least < most, "something does not fit");
    T_EQ(files_in(r), 0); // nothing was measured: nothing is stored
    rig_close(r);
}

static void test_the_owner_is_told_what_would_fit(void) {
    rig *r = rig_open();
    node_schedule s;
    fl_err err;
    T_OK(node_schedule_make(&r->job, &s, &err), err);
    r->job.opts = s.plan.opts; // all of it fixed, and one byte too little
    r->job.opts.window.size = s.plan.window;
    r->job.opts.memory_bytes = s.plan.peak_bytes - 1;
    T_EQ(node_schedule_make(&r->job, &s, &err), FL_ENOMEM);
    T_CHECK(strstr(err.text, "that does not fit") != NULL &&
                strstr(err.text, "a window of") != NULL,
            "%s", err.text);
    r->job.opts.memory_bytes++;
    T_OK(node_schedule_make(&r->job, &s, &err), err);
    r->job.opts.sequence = 5;
    T_EQ(node_schedule_make(&r->job, &s, &err), FL_EARG);
    rig_close(r);
}

// Whole weights in every way first; with less memory than any of them takes, weights pass through,
// nothing is kept that can be computed again, and the plan says what that costs.
static void test_weights_pass_through_when_nothing_else_fits(void) {
    rig *r = rig_open();
    node_schedule s;
    fl_err err;
    T_OK(node_schedule_make(&r->job, &s, &err), err);
    T_EQ(s.plan.gave_up_count, 0);
    const uint64_t most = s.plan.peak_bytes;
    uint32_t whole = 0, passing = 0;
    r->job.opts.stream = true;
    for (uint64_t budget = most - 1;; budget -= 4096) {
        r->job.opts.memory_bytes = budget;
        const fl_status st = node_schedule_make(&r->job, &s, &err);
        if (st == FL_ENOMEM) break;
        T_OK(st, err);
        T_CHECK(s.plan.peak_bytes <= budget, "%llu of %llu", (unsigned long long)s.plan.peak_bytes,
                (unsigned long long)budget);
        T_EQ(s.plan.resident.ring != 0, s.choice.stream_bytes > 0);
        r->job.opts.stream = false;
        node_schedule alone;
        const fl_status without = node_schedule_make(&r->job, &alone, NULL);
        r->job.opts.stream = true;
        T_EQ(without, s.choice.stream_bytes > 0 ? FL_ENOMEM : FL_OK);
        if (s.choice.stream_bytes == 0) {
            whole++;
            continue;
        }
        passing++;
        T_EQ(s.plan.opts.kept, 0);
        bool said = false;
        for (uint32_t i = 0; i < s.plan.gave_up_count; i++)
            said = said || strstr(s.plan.gave_up[i], "are read again") != NULL;
        T_CHECK(said, "%u phrases", s.plan.gave_up_count);
    }
    T_CHECK(whole > 0 && passing > 0, "%u whole, %u passing", whole, passing);
    T_CHECK(strstr(err.text, "nothing fits") != NULL, "%s", err.text);
    rig_close(r);
}

// The prefix cache takes what the choice leaves, and changes no choice.
static void test_the_prefix_cache_takes_what_is_left(void) {
    rig *r = rig_open();
    node_schedule bare, s;
    fl_err err;
    r->job.opts.window.size = 1;
    T_OK(node_schedule_make(&r->job, &bare, &err), err);
    uint32_t some = 0;
    for (uint64_t left = 0; left <= 1 << 20; left += 1 << 17) {
        r->job.opts.prefix_bytes = 1 << 30;
        r->job.opts.memory_bytes = bare.plan.peak_bytes + left;
        T_OK(node_schedule_make(&r->job, &s, &err), err);
        T_EQ(s.plan.peak_bytes, bare.plan.peak_bytes + s.plan.prefix_bytes);
        T_CHECK(s.plan.peak_bytes <= r->job.opts.memory_bytes, "above the limit");
        T_EQ(s.choice.kept, bare.choice.kept);
        T_EQ(s.choice.chunk, bare.choice.chunk);
        T_EQ(s.plan.gave_up_count, 0);
        some += s.plan.prefix_bytes > 0;
    }
    T_CHECK(some > 0, "a prefix cache was planned");
    rig_close(r);
}

static void test_measuring_changes_nothing(void) {
    rig *r = rig_open();
    for (uint32_t id = 0; id < node_adapter_spans(r->adapter); id++) // as after some training
        for (uint32_t i = 0; i < r->adapter->span_count[id]; i++)
            r->adapter->span[id][i] += 0.01f * t_randf();
    const size_t size = node_adapter_file_size(r->adapter);
    uint8_t *was = malloc(size), *now = malloc(size);
    T_NEED(was != NULL && now != NULL, "memory");
    node_adapter_encode(r->adapter, was);
    node_schedule quiet, s, again;
    fl_err err;
    T_OK(node_schedule_make(&r->job, &quiet, &err), err);
    T_CHECK(!quiet.measured && !quiet.cost.calibrated, "a run of no steps measures nothing");
    r->job.steps = UINT64_MAX;
    T_OK(node_schedule_make(&r->job, &s, &err), err);
    node_adapter_encode(r->adapter, now);
    T_CHECK(memcmp(was, now, size) == 0, "the adapter keeps its bits");
    T_CHECK(s.measured && s.cost.calibrated && s.cost.shape.below_adapted, "measured");
    T_EQ(files_in(r), s.disturbed ? 0 : 2);
    // What is learned is the same whether anything was measured or not.
    T_EQ(s.choice.window, quiet.choice.window);
    T_EQ(s.choice.sequence, quiet.choice.sequence);
    T_EQ(s.choice.micro_batch, quiet.choice.micro_batch);
    // The caches are read: the same predictions, the same chunk, without measuring. A machine that
    // is busy with other things stores nothing; then there is nothing to read.
    r->job.steps = 0;
    T_OK(node_schedule_make(&r->job, &again, &err), err);
    T_EQ(again.measured, !s.disturbed);
    T_EQ(again.cost.calibrated, !s.disturbed);
    if (!s.disturbed) {
        T_EQ(again.choice.chunk, s.choice.chunk);
        T_NEAR(node_cost_step(&again.cost, &s.choice, 6), node_cost_step(&s.cost, &s.choice, 6), 0,
               "the same digits");
    }
    double seconds = 0;
    T_OK(node_job_time(&r->job, &s.choice, 3, &seconds, &err), err);
    T_CHECK(seconds > 0, "%g", seconds);
    free(was);
    free(now);
    rig_close(r);
}

// A vocabulary of one chunk, one layer: little to measure, and no failure.
static void test_the_smallest_model(void) {
    rig *r = rig_open();
    tiny_shape shape = tiny_default;
    shape.layers = 1;
    shape.exits = 1;
    shape.vocabulary = 16;
    tiny_model *t = tiny_open(&shape);
    node_adapter *adapter = NULL;
    const node_adapter_opts opts = {.rank = 1, .alpha = 2.0f, .seed = 3};
    fl_err err;
    T_OK(node_adapter_open(&t->model, &opts, &adapter, &err), err);
    for (uint32_t i = 0; i < FL_COUNT(r->ids); i++) r->ids[i] %= 16;
    r->job.model = &t->model;
    r->job.adapter = adapter;
    r->job.steps = UINT64_MAX;
    node_schedule s;
    T_OK(node_schedule_make(&r->job, &s, &err), err);
    T_CHECK(!s.cost.calibrated && s.choice.window == 1, "window %u", s.choice.window);
    node_adapter_close(adapter);
    tiny_close(t);
    rig_close(r);
}

T_MAIN({"every_budget", test_every_budget},
       {"the_owner_is_told_what_would_fit", test_the_owner_is_told_what_would_fit},
       {"weights_pass_through_when_nothing_else_fits",
        test_weights_pass_through_when_nothing_else_fits},
       {"the_prefix_cache_takes_what_is_left", test_the_prefix_cache_takes_what_is_left},
       {"measuring_changes_nothing", test_measuring_changes_nothing},
       {"the_smallest_model", test_the_smallest_model})
