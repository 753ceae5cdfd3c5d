// run: serves the fleet until it is told to stop.
#include "common/log.h"
#include "coordinator/commands/commands.h"
#include "coordinator/loop.h"

#include <string.h>

static volatile sig_atomic_t stop;

static void on_signal(int number) {
    (void)number;
    stop = 1;
}

static const fl_setting table[] = {
    COORD_ROW_DIR,
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "log as JSON lines", NULL,
     offsetof(coord_dir_opts, json)},
};

static int run(const void *options) {
    const coord_dir_opts *o = options;
    coord_loop *loop = NULL;
    fl_err err;
    fl_log_init(FL_LOG_INFO, o->json);
    struct sigaction act;
    memset(&act, 0, sizeof(act));
    act.sa_handler = on_signal; // no SA_RESTART: a wait ends at once
    sigaction(SIGTERM, &act, NULL);
    sigaction(SIGINT, &act, NULL);
    signal(SIGPIPE, SIG_IGN);
    fl_status st = coord_loop_open(o->dir, &loop, &err);
    if (st == FL_OK) st = coord_loop_run(loop, &stop, &err);
    coord_loop_close(loop);
    if (st != FL_OK) return fl_cli_fail(&err);
    fl_log(FL_LOG_INFO, "coordinator.stopped", "as asked");
    return FL_EXIT_OK;
}

const fl_command coord_cmd_run = {
    .name = "run",
    .summary = "serve the fleet until SIGTERM or ctrl-C; safe to kill at any moment",
    .example = "fleetune-coordinator run home",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(coord_dir_opts),
    .run = run,
};
