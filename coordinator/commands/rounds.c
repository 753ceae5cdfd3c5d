// rounds: what each round brought.
#include "coordinator/commands/commands.h"

#include <math.h>
#include <stdlib.h>

static const fl_setting table[] = {
    COORD_ROW_DIR,
    {NULL, "count", FL_KIND_INTEGER, "N", 1, 100000, "50", "how many of the newest", NULL,
     offsetof(coord_dir_opts, count)},
    COORD_ROW_JSON,
};

static void print_text(const coord_round_row *rows, size_t count) {
    printf("%6s %6s %8s %7s %10s %8s  %s\n", "round", "nodes", "updates", "layers", "bytes up",
           "loss", "closed");
    for (size_t i = 0; i < count; i++) {
        const coord_round_row *r = &rows[i];
        char loss[16] = "-";
        if (isfinite(r->loss)) snprintf(loss, sizeof(loss), "%.4f", r->loss);
        printf("%6lld %6lld %8lld %7lld %10lld %8s  %s\n", (long long)r->round,
               (long long)r->contributions, (long long)r->updates, (long long)r->layers,
               (long long)r->bytes_up, loss, r->closed_s == 0 ? "open" : r->reason);
    }
}

static int print_json(const coord_round_row *rows, size_t count) {
    fl_json *root = coord_cmd_object();
    if (root == NULL) return FL_EXIT_FAILED;
    fl_json *list = fl_json_add_array(root, "rounds");
    for (size_t i = 0; i < count; i++) {
        const coord_round_row *r = &rows[i];
        fl_json *j = fl_json_add_object(list, NULL);
        fl_json_set_integer(j, "round", r->round);
        fl_json_set_bool(j, "open", r->closed_s == 0);
        fl_json_set_integer(j, "opened", r->opened_s);
        fl_json_set_integer(j, "closed", r->closed_s);
        fl_json_set_integer(j, "contributions", r->contributions);
        fl_json_set_integer(j, "updates", r->updates);
        fl_json_set_integer(j, "layers", r->layers);
        fl_json_set_integer(j, "bytes_up", r->bytes_up);
        fl_json_set_number(j, "loss", r->loss);
        fl_json_set_string(j, "reason", r->reason);
    }
    return coord_cmd_print(root);
}

static int run(const void *options) {
    const coord_dir_opts *o = options;
    coord_store *s = NULL;
    size_t count = 0;
    fl_err err;
    coord_round_row *rows = calloc((size_t)o->count, sizeof(*rows));
    fl_status st = rows != NULL ? FL_OK : FL_FAIL(&err, FL_ENOMEM, "no memory for the rounds");
    if (st == FL_OK) st = coord_store_open(o->dir, &s, &err);
    if (st == FL_OK) st = coord_store_rounds(s, rows, (size_t)o->count, &count, &err);
    coord_store_close(s);
    int status = FL_EXIT_OK;
    if (st != FL_OK)
        status = fl_cli_fail(&err);
    else if (o->json)
        status = print_json(rows, count);
    else
        print_text(rows, count);
    free(rows);
    return status;
}

const fl_command coord_cmd_rounds = {
    .name = "rounds",
    .summary = "list rounds: who contributed, what changed, the fleet's held-out loss",
    .example = "fleetune-coordinator rounds home --count 10",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(coord_dir_opts),
    .run = run,
};
