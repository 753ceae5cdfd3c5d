// run: the agent. Trains when the fleet has work and the owner's rules allow it.
//
// Settings come, in this order, from defaults, STATE/node.ini, the environment
// (FLEETUNE_SECTION_KEY), and the command line.
#include "common/log.h"
#include "node/commands/commands.h"
#include "node/commands/state_dir.h"
#include "node/loop.h"
#include "node/schedule/probe.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

typedef struct run_settings {
    char data[FL_SETTING_TEXT_MAX];
    uint64_t memory;
    int64_t threads;
    double pause_c, resume_c;
    int64_t hour_first, hour_last;
    uint64_t disk_free, prefix_cache, prefix_disk;
    char prefix_folder[FL_SETTING_TEXT_MAX];
    char upload[FL_SETTING_TEXT_MAX];
    uint64_t upload_budget;
    node_upload_rule rule; // the two above, parsed
    bool log_json;
} run_settings;

#define SET(field) NULL, offsetof(run_settings, field)
static const fl_setting settings[] = {
    {"node", "data", FL_KIND_TEXT, "PATH", 0, 0, "", "file or folder of private text to learn from",
     SET(data)},
    {"limits", "memory", FL_KIND_SIZE, "SIZE", 0, 0, "0",
     "memory the agent may use; 0: what the machine has free", SET(memory)},
    {"limits", "threads", FL_KIND_INTEGER, "count", 0, 64, "0", "threads; 0: the best number",
     SET(threads)},
    {"limits", "disk_free", FL_KIND_SIZE, "SIZE", 0, 0, "200M",
     "pause when less than this is free on the disk", SET(disk_free)},
    {"limits", "prefix_cache", FL_KIND_SIZE, "SIZE", 0, 0, "64M",
     "of the memory, for states of layers below the window that come again; 0: none",
     SET(prefix_cache)},
    {"limits", "prefix_folder", FL_KIND_TEXT, "FOLDER", 0, 0, "",
     "keep more of them here on disk, sealed, while the agent runs", SET(prefix_folder)},
    {"limits", "prefix_disk", FL_KIND_SIZE, "SIZE", 0, 0, "1G", "of that disk, at most",
     SET(prefix_disk)},
    {"limits", "upload", FL_KIND_TEXT, "HOW", 0, 0, "auto",
     "how much of an update to send: auto, by the link; dense, all that is wanted; or a share",
     SET(upload)},
    {"limits", "upload_budget", FL_KIND_SIZE, "SIZE", 0, 0, "0",
     "bytes of updates a day (UTC); 0: no limit", SET(upload_budget)},
    {"policy", "pause_celsius", FL_KIND_NUMBER, "degrees", 30, 120, "75",
     "pause at this temperature", SET(pause_c)},
    {"policy", "resume_celsius", FL_KIND_NUMBER, "degrees", 20, 119, "65",
     "go on at this temperature", SET(resume_c)},
    {"policy", "hour_first", FL_KIND_INTEGER, "hour", 0, 23, "0", "train from this hour on",
     SET(hour_first)},
    {"policy", "hour_last", FL_KIND_INTEGER, "hour", 0, 23, "0",
     "train until this hour; the same as hour_first: always", SET(hour_last)},
    {"log", "json", FL_KIND_FLAG, NULL, 0, 0, "no", "log JSON lines", SET(log_json)},
};

typedef struct run_opts {
    char state[FL_SETTING_TEXT_MAX], data[FL_SETTING_TEXT_MAX], memory[FL_SETTING_TEXT_MAX];
    char upload[FL_SETTING_TEXT_MAX], upload_budget[FL_SETTING_TEXT_MAX];
    int64_t threads;
    bool sample;
} run_opts;

static const fl_setting table[] = {
    {NULL, "data", FL_KIND_TEXT, "PATH", 0, 0, "", "file or folder of private text to learn from",
     NULL, offsetof(run_opts, data)},
    {NULL, "memory", FL_KIND_TEXT, "SIZE", 0, 0, "", "memory the agent may use, e.g. 300M", NULL,
     offsetof(run_opts, memory)},
    {NULL, "threads", FL_KIND_INTEGER, "N", 0, 64, "0", "threads; 0: the best number", NULL,
     offsetof(run_opts, threads)},
    {NULL, "upload", FL_KIND_TEXT, "HOW", 0, 0, "",
     "how much of an update to send: auto (default), dense, or a share as 0.02", NULL,
     offsetof(run_opts, upload)},
    {NULL, "upload-budget", FL_KIND_TEXT, "SIZE", 0, 0, "", "bytes of updates a day, e.g. 20M",
     NULL, offsetof(run_opts, upload_budget)},
    {NULL, "state", FL_KIND_TEXT, "FOLDER", 0, 0, "", "where the node keeps its state", NULL,
     offsetof(run_opts, state)},
    {NULL, "sample-config", FL_KIND_FLAG, NULL, 0, 0, "no", "print a documented node.ini and exit",
     NULL, offsetof(run_opts, sample)},
};

static const fl_setting *setting(const char *key) {
    size_t i = 0;
    while (strcmp(settings[i].key, key) != 0) FL_ASSERT(++i < FL_COUNT(settings));
    return &settings[i];
}

static fl_status load_settings(const run_opts *o, const char *folder, run_settings *ret,
                               fl_err *err) {
    char path[NODE_PATH_MAX];
    snprintf(path, sizeof(path), "%s/node.ini", folder);
    fl_status st = fl_conf_load(path, "FLEETUNE", settings, FL_COUNT(settings), ret, err);
    if (st == FL_ENOENT) // no file: the environment still counts
        st = fl_conf_load("/dev/null", "FLEETUNE", settings, FL_COUNT(settings), ret, err);
    FL_TRY(st);
    if (o->data[0] != '\0') snprintf(ret->data, sizeof(ret->data), "%s", o->data);
    if (o->threads != 0) ret->threads = o->threads;
    if (o->memory[0] != '\0') FL_TRY(fl_setting_parse(setting("memory"), o->memory, ret, err));
    if (o->upload[0] != '\0') snprintf(ret->upload, sizeof(ret->upload), "%s", o->upload);
    if (o->upload_budget[0] != '\0')
        FL_TRY(fl_setting_parse(setting("upload_budget"), o->upload_budget, ret, err));
    ret->rule.budget_bytes = ret->upload_budget;
    FL_TRY(node_upload_parse(ret->upload, &ret->rule, err));
    if (ret->data[0] == '\0')
        return FL_FAIL(err, FL_EARG, "no text to learn from: give --data PATH, or set `data` in %s",
                       path);
    if (ret->resume_c >= ret->pause_c)
        return FL_FAIL(err, FL_EARG, "resume_celsius must be below pause_celsius");
    return FL_OK;
}

// Looked at before the folder is opened, which would make it.
static fl_status check_enrolled(const char *folder, fl_err *err) {
    char path[NODE_PATH_MAX];
    snprintf(path, sizeof(path), "%s/enrolment.ini", folder);
    if (fl_file_exists(path)) return FL_OK;
    return FL_FAIL(err, FL_ESTATE,
                   "this node belongs to no fleet yet: run `fleetune-node join URL` first");
}

static fl_status run_agent(const run_settings *set, node_state *state, fl_err *err) {
    node_facts facts;
    node_facts_read("", &facts);
    const uint64_t memory = node_facts_memory_budget(&facts, set->memory);
    const node_worker_opts worker_opts = {.data = set->data,
                                          .memory_bytes = memory,
                                          .threads = set->threads,
                                          .prefix_bytes = set->prefix_cache,
                                          .prefix_folder = set->prefix_folder,
                                          .prefix_disk = set->prefix_disk,
                                          .pause_c = set->pause_c};
    node_worker *worker = NULL;
    FL_TRY(node_worker_open(&worker_opts, state, &worker, err));
    const node_loop_opts opts = {
        .state = state,
        .worker = worker,
        .memory_bytes = memory,
        .data = set->data,
        .upload = set->rule,
        .rules = {.pause_c = set->pause_c,
                  .resume_c = set->resume_c,
                  .busy_max = 1.0,
                  .hour_first = (uint32_t)set->hour_first,
                  .hour_last = (uint32_t)set->hour_last,
                  .disk_free_min = set->disk_free},
    };
    const fl_status st = node_loop_run(&opts, err);
    node_worker_close(worker);
    return st;
}

static int run(const void *options) {
    const run_opts *o = options;
    if (o->sample) {
        printf("# fleetune-node: copy to node.ini in the state folder and change what you need.\n");
        fl_conf_print(settings, FL_COUNT(settings), NULL, stdout);
        return FL_EXIT_OK;
    }
    char folder[NODE_PATH_MAX - 64];
    run_settings set;
    node_state state = {0};
    fl_err err;
    struct sigaction stop = {.sa_handler = node_loop_stop};
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGINT, &stop, NULL);
    signal(SIGXFSZ, SIG_IGN); // a file size limit is a full disk: the write fails
    fl_status st = node_state_dir(o->state, folder, sizeof(folder), &err);
    if (st == FL_OK) st = load_settings(o, folder, &set, &err);
    if (st == FL_OK) st = check_enrolled(folder, &err);
    if (st == FL_OK) st = node_state_open(folder, &state, &err);
    if (st == FL_OK) {
        fl_log_init(FL_LOG_INFO, set.log_json);
        st = run_agent(&set, &state, &err);
    }
    node_state_close(&state);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_run = {
    .name = "run",
    .summary = "the agent: trains for the fleet on this device's text",
    .example = "fleetune-node run --data ~/notes --memory 300M",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(run_opts),
    .run = run,
};
