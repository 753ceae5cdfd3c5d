// status: what the agent on this device is doing, from the file that it keeps up to date.
#include "common/clock.h"
#include "common/json.h"
#include "node/commands/commands.h"
#include "node/commands/state_dir.h"
#include "node/loop.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

typedef struct status_opts {
    char state[FL_SETTING_TEXT_MAX];
    bool json;
} status_opts;

static const fl_setting table[] = {
    {NULL, "state", FL_KIND_TEXT, "FOLDER", 0, 0, "", "where the node keeps its state", NULL,
     offsetof(status_opts, state)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,
     offsetof(status_opts, json)},
};

static void print_text(const fl_json *j, bool running) {
    const double step = fl_json_number(fl_json_get(j, "step"), 0);
    printf("%s: %s\n", fl_json_string(fl_json_get(j, "name"), "node"),
           running ? fl_json_string(fl_json_get(j, "phase"), "unknown") : "not running");
    printf("  round %.0f, step %.0f of %.0f, loss %.3f\n",
           fl_json_number(fl_json_get(j, "round"), 0), step,
           fl_json_number(fl_json_get(j, "steps"), 0), fl_json_number(fl_json_get(j, "loss"), 0));
    printf("  sent %.2f MB, received %.2f MB, %.0f updates waiting\n",
           fl_json_number(fl_json_get(j, "bytes_up"), 0) / 1e6,
           fl_json_number(fl_json_get(j, "bytes_down"), 0) / 1e6,
           fl_json_number(fl_json_get(j, "updates_waiting"), 0));
    printf("  %s; last written %.0f s ago\n", fl_json_string(fl_json_get(j, "policy"), ""),
           (double)fl_clock_wall_s() - fl_json_number(fl_json_get(j, "written"), 0));
}

static int run(const void *options) {
    const status_opts *o = options;
    char folder[NODE_PATH_MAX - 64], path[NODE_PATH_MAX];
    fl_err err;
    uint8_t *text = NULL;
    size_t size = 0;
    fl_json *j = NULL;
    fl_status st = node_state_dir(o->state, folder, sizeof(folder), &err);
    if (st != FL_OK) return fl_cli_fail(&err);
    snprintf(path, sizeof(path), "%s/%s", folder, NODE_STATUS_FILE);
    st = fl_file_read(path, 1 << 16, &text, &size, &err);
    if (st == FL_ENOENT)
        FL_FAIL(&err, st, "no agent has run with the state in %s: start `fleetune-node run`",
                folder);
    if (st == FL_OK) st = fl_json_parse((fl_bytes){text, size}, &j, &err);
    if (st == FL_OK) {
        const double process = fl_json_number(fl_json_get(j, "process"), 0);
        const bool running = process >= 1 && kill((pid_t)process, 0) == 0;
        fl_json_set_bool(j, "running", running);
        if (o->json)
            st = fl_json_print(j, stdout, &err);
        else
            print_text(j, running);
    }
    fl_json_free(j);
    free(text);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_status = {
    .name = "status",
    .summary = "shows what the agent on this device is doing",
    .example = "fleetune-node status",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(status_opts),
    .run = run,
};
