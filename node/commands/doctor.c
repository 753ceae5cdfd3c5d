// doctor: what this machine is, how fast it is, and what the scheduler chose; every problem with
// what to do about it.
#include "common/file.h"
#include "common/rng.h"
#include "node/commands/commands.h"
#include "node/commands/setup.h"
#include "node/commands/show.h"
#include "node/commands/state_dir.h"

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>

typedef struct doctor_opts {
    char model[FL_SETTING_TEXT_MAX];
    char state[FL_SETTING_TEXT_MAX];
    bool again;
    bool json;
} doctor_opts;

static const fl_setting table[] = {
    {NULL, "model", FL_KIND_TEXT, "FILE", 0, 0, "",
     "show, and measure, how this model would be tuned here (default: the fleet's, not measured)",
     NULL, offsetof(doctor_opts, model)},
    {NULL, "state", FL_KIND_TEXT, "FOLDER", 0, 0, "", "where the node keeps its state", NULL,
     offsetof(doctor_opts, state)},
    {NULL, "again", FL_KIND_FLAG, NULL, 0, 0, "no", "measure again, do not use the cache", NULL,
     offsetof(doctor_opts, again)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,
     offsetof(doctor_opts, json)},
};

// One line of the report. `fix` says what to do when it is not fine.
typedef struct check {
    const char *name;
    bool fine;
    char found[200];
    const char *fix;
} check;

enum { CHECKS_MAX = 16 };
typedef struct report {
    check list[CHECKS_MAX];
    size_t count;
} report;

static void add(report *r, const char *name, bool fine, const char *fix, const char *fmt, ...)
    FL_PRINTF(5, 6);

static void add(report *r, const char *name, bool fine, const char *fix, const char *fmt, ...) {
    FL_ASSERT(r->count < CHECKS_MAX);
    check *c = &r->list[r->count++];
    *c = (check){.name = name, .fine = fine, .fix = fix};
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(c->found, sizeof(c->found), fmt, ap);
    va_end(ap);
}

static void check_machine(report *r, const node_facts *f) {
    char features[128] = "";
    for (unsigned i = 0; fl_cpu_feature(f->cpu, i) != NULL; i++) {
        const size_t n = strlen(features);
        snprintf(features + n, sizeof(features) - n, " %s", fl_cpu_feature(f->cpu, i));
    }
    add(r, "processor", f->cpu != 0,
        "none of the fast kernels runs here: expect it to be slow, use a 64-bit system",
        "%s, %u cores, instructions:%s", f->cpu_name, f->cores, features[0] ? features : " none");
    char kinds[128] = "";
    for (uint32_t i = 0; i < f->kinds; i++) {
        const size_t n = strlen(kinds);
        snprintf(kinds + n, sizeof(kinds) - n, "%s%u of speed %u", i == 0 ? "" : ", ",
                 f->kind_cores[i], f->kind_capacity[i]);
    }
    add(r, "cores", f->quota_cores == 0 || f->quota_cores >= 1,
        "less than one core is allowed: raise the container's or unit's CPU limit if you can",
        "%s; limit %s%.1f; threads to use %u", kinds, f->quota_cores == 0 ? "none, " : "",
        f->quota_cores, node_facts_threads(f));
    const double budget = (double)node_facts_memory_budget(f, 0) / 0x1p20;
    add(r, "memory", budget >= 200,
        "below 200 MB a 135M model cannot be tuned: close programs or take a smaller model",
        "%.0f MB in all, %.0f MB usable%s", (double)f->memory_total / 0x1p20, budget,
        f->memory_limit != 0 ? " (cgroup limit)" : "");
    add(r, "memory cgroup", !f->memory_cgroup_off,
        "add cgroup_enable=memory to the line in /boot/firmware/cmdline.txt and restart",
        f->memory_cgroup_off ? "off: memory limits are silently ignored" : "limits are honoured");
    const double c = f->temperature_c;
    if (isnan(c))
        add(r, "temperature", true, "", "not reported by this machine");
    else
        add(r, "temperature", c < 70, "cool the device: tuning pauses at 75 degrees",
            "%.1f degrees Celsius", c);
    add(r, "power", (f->throttle_bits & 0xf) == 0,
        "use the supply made for this board and a short cable", "throttle word 0x%x",
        f->throttle_bits);
}

static void check_disk(report *r, const char *folder) {
    struct statvfs s;
    if (statvfs(folder, &s) != 0) {
        add(r, "disk", false, "the state folder must be on a disk that can be read", "unknown");
        return;
    }
    const double mb = (double)s.f_bavail * (double)s.f_frsize / 0x1p20;
    add(r, "disk", mb >= 500, "free at least 500 MB: the model and its state need them",
        "%.0f MB free at %s", mb, folder);
}

static fl_status rates_of(const doctor_opts *o, const char *folder, const char *model,
                          const node_facts *f, const fl_kern *kern, node_rates *ret,
                          bool *ret_cached, fl_err *err) {
    char path[PATH_MAX];
    if (snprintf(path, sizeof(path), "%s/rates", folder) >= (int)sizeof(path))
        return FL_FAIL(err, FL_EARG, "the state folder's path is too long");
    *ret_cached = !o->again && node_rates_read(path, f, ret, NULL) == FL_OK;
    if (*ret_cached) return FL_OK;
    const node_watch watch = node_watch_begin();
    FL_TRY(
        node_rates_measure(kern, node_facts_threads(f), node_facts_memory_budget(f, 0), ret, err));
    if (model[0] != '\0' && node_rates_storage(model, &ret->storage_bytes, NULL) != FL_OK)
        ret->storage_bytes = 0;
    return node_watch_disturbed(&watch) ? FL_OK : node_rates_write(path, f, ret, err);
}

// How the model would be tuned here: with the recipe, on a made-up document. Measured only when the
// owner named the model, for that takes seconds.
static fl_status schedule_of(const doctor_opts *o, const char *folder, const char *model,
                             node_schedule *ret, fl_err *err) {
    enum { TOKENS = 4097 };
    static int32_t ids[TOKENS];
    static const uint64_t begin[] = {0, TOKENS};
    const node_docs docs = {.ids = ids, .begin = begin, .count = 1};
    const node_setup_opts setup = {.model = model, .without_tokenizer = true};
    const node_adapter_opts adapter_opts = node_adapter_defaults();
    node_setup s = {0};
    node_adapter *adapter = NULL;
    fl_status st = node_setup_open(&setup, &s, err);
    if (st == FL_OK) st = node_adapter_open(s.model, &adapter_opts, &adapter, err);
    if (st == FL_OK) {
        for (int i = 0; i < TOKENS; i++)
            ids[i] = (int32_t)fl_rng_below(7, (uint64_t)i, s.model->vocabulary);
        node_job job = {.kern = &s.kern,
                        .facts = &s.facts,
                        .model = s.model,
                        .adapter = adapter,
                        .docs = &docs,
                        .opts = node_tune_defaults(),
                        .threads_max = node_facts_threads(&s.facts),
                        .steps = o->model[0] != '\0' ? UINT64_MAX : 0,
                        .folder = folder,
                        .path = model};
        job.opts.threads = 0;
        job.opts.prefix_bytes = 0;
        job.opts.stream = true;
        job.opts.memory_bytes = node_facts_memory_budget(&s.facts, 0);
        st = node_schedule_make(&job, ret, err);
    }
    node_adapter_close(adapter);
    node_setup_close(&s);
    return st;
}

static fl_status print_json(const report *r, const node_facts *f, const fl_kern *k,
                            const node_rates *rates, const node_schedule *schedule, fl_err *err) {
    fl_json *root = fl_json_object();
    fl_json *checks = fl_json_add_array(root, "checks");
    for (size_t i = 0; i < r->count; i++) {
        fl_json *c = fl_json_add_object(checks, NULL);
        fl_json_set_string(c, "name", r->list[i].name);
        fl_json_set_bool(c, "fine", r->list[i].fine);
        fl_json_set_string(c, "found", r->list[i].found);
        if (!r->list[i].fine) fl_json_set_string(c, "fix", r->list[i].fix);
    }
    fl_json *kernels = fl_json_add_object(root, "kernels");
#define X(name) fl_json_set_string(kernels, #name, k->name##_tag);
    FL_KERN_LIST(X)
#undef X
#define X(name) fl_json_set_string(kernels, #name, k->name->tag);
    FL_KERN_GROUP_LIST(X)
#undef X
    node_show_rates_json(rates, root);
    if (schedule != NULL) node_show_schedule_json(schedule, root);
    fl_json_set_integer(root, "memory_budget_bytes", (int64_t)node_facts_memory_budget(f, 0));
    const fl_status st = fl_json_print(root, stdout, err);
    fl_json_free(root);
    return st;
}

static void print_text(const report *r, const fl_kern *k, const node_rates *rates,
                       const node_schedule *schedule, bool cached) {
    for (size_t i = 0; i < r->count; i++) {
        const check *c = &r->list[i];
        printf("%s %-14s %s\n", c->fine ? "ok  " : "FAIL", c->name, c->found);
        if (!c->fine) printf("     %-14s -> %s\n", "", c->fix);
    }
    printf("\nkernels chosen:");
#define X(name) printf(" %s=%s", #name, k->name##_tag);
    FL_KERN_LIST(X)
#undef X
#define X(name) printf(" %s=%s", #name, k->name->tag);
    FL_KERN_GROUP_LIST(X)
#undef X
    printf("\nmeasured%s:\n", cached ? " earlier (--again repeats it)" : "");
    node_show_rates(rates, stdout);
    printf("threads chosen: %u for tuning and prompts, %u for writing text\n",
           rates->threads_compute, rates->threads_stream);
    if (schedule != NULL) node_show_schedule(schedule, stdout);
}

static int run(const void *options) {
    const doctor_opts *o = options;
    char folder[PATH_MAX / 2];
    fl_err err;
    if (node_state_dir(o->state, folder, sizeof(folder), &err) != FL_OK ||
        node_state_dir_make(folder, &err) != FL_OK)
        return fl_cli_fail(&err);
    node_facts facts;
    fl_kern kern;
    node_facts_read("", &facts);
    fl_kern_select(&kern, facts.cpu);
    report r = {.count = 0};
    check_machine(&r, &facts);
    check_disk(&r, folder);
    node_rates rates;
    bool cached;
    char model[PATH_MAX];
    snprintf(model, sizeof(model), "%s", o->model);
    if (model[0] == '\0') snprintf(model, sizeof(model), "%s/model.gguf", folder);
    const bool has_model = o->model[0] != '\0' || fl_file_exists(model);
    static node_schedule schedule;
    const node_schedule *shown = has_model ? &schedule : NULL;
    if (rates_of(o, folder, has_model ? model : "", &facts, &kern, &rates, &cached, &err) !=
            FL_OK ||
        (has_model && schedule_of(o, folder, model, &schedule, &err) != FL_OK))
        return fl_cli_fail(&err);
    if (o->json) {
        if (print_json(&r, &facts, &kern, &rates, shown, &err) != FL_OK) return fl_cli_fail(&err);
    } else {
        print_text(&r, &kern, &rates, shown, cached);
    }
    for (size_t i = 0; i < r.count; i++) {
        if (!r.list[i].fine) return FL_EXIT_FAILED;
    }
    return FL_EXIT_OK;
}

const fl_command node_cmd_doctor = {
    .name = "doctor",
    .summary = "examines this machine and says what stands in the way",
    .example = "fleetune-node doctor --model smollm2-4bit.gguf",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(doctor_opts),
    .run = run,
};
