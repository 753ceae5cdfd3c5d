// nodes: who is in the fleet.
#include "common/clock.h"
#include "common/crypto.h"
#include "coordinator/commands/commands.h"

#include <string.h>

static const fl_setting table[] = {COORD_ROW_DIR, COORD_ROW_JSON};

typedef struct listing {
    coord_store *store;
    fl_json *nodes; // NULL: print text
    int64_t now_s;
    unsigned count;
} listing;

typedef struct search {
    int64_t node;
    coord_report_row found;
    bool is_found;
} search;

static fl_status match_report(void *ctx, const coord_report_row *row, fl_err *err) {
    search *q = ctx;
    (void)err;
    if (row->node != q->node) return FL_OK;
    q->found = *row;
    q->is_found = true;
    return FL_OK;
}

static double per_token(int64_t nll, const coord_report_row *r) {
    return (double)nll / 1048576.0 / (double)r->tokens;
}

static void add_report(fl_json *j, const coord_report_row *r) {
    fl_json *o = fl_json_add_object(j, "report");
    fl_json_set_integer(o, "round", r->round);
    fl_json_set_integer(o, "tokens", r->tokens);
    fl_json_set_number(o, "nll_base", per_token(r->nll_base, r));
    fl_json_set_number(o, "nll_local", per_token(r->nll_local, r));
    fl_json_set_number(o, "nll_voted", per_token(r->nll_voted, r));
    fl_json_set_integer(o, "peak_rss_bytes", r->peak_rss_bytes);
}

static fl_status list_node(void *ctx, const coord_node_row *n, fl_err *err) {
    listing *l = ctx;
    char key[FL_HEX_SIZE(8)] = "";
    search q = {.node = n->id};
    if (!fl_hex_encode((fl_bytes){n->sign_key, 8}, key, sizeof(key))) key[0] = '\0';
    FL_TRY(coord_store_each_last_report(l->store, match_report, &q, err));
    l->count++;
    if (l->nodes == NULL) {
        if (l->count == 1)
            printf("%4s  %-20s %-8s %-17s %10s %8s\n", "", "name", "state", "key", "seen", "loss");
        char loss[16] = "-";
        if (q.is_found)
            snprintf(loss, sizeof(loss), "%.4f", per_token(q.found.nll_voted, &q.found));
        printf("%4lld  %-20s %-8s %-17s %7lld s %8s\n", (long long)n->id, n->name,
               coord_node_state_text(n->state), key, (long long)(l->now_s - n->seen_s), loss);
        return FL_OK;
    }
    fl_json *j = fl_json_add_object(l->nodes, NULL);
    fl_json_set_integer(j, "id", n->id);
    fl_json_set_string(j, "name", n->name);
    fl_json_set_string(j, "state", coord_node_state_text(n->state));
    fl_json_set_string(j, "key", key);
    fl_json_set_integer(j, "joined", n->joined_s);
    fl_json_set_integer(j, "seen", n->seen_s);
    fl_json_set_integer(j, "bytes_up", n->bytes_up);
    fl_json_set_integer(j, "bytes_down", n->bytes_down);
    if (q.is_found) add_report(j, &q.found);
    return FL_OK;
}

static int run(const void *options) {
    const coord_dir_opts *o = options;
    listing l = {.now_s = fl_clock_wall_s()};
    fl_json *root = NULL;
    fl_err err;
    if (o->json) {
        root = coord_cmd_object();
        if (root == NULL) return FL_EXIT_FAILED;
        l.nodes = fl_json_add_array(root, "nodes");
    }
    fl_status st = coord_store_open(o->dir, &l.store, &err);
    if (st == FL_OK) st = coord_store_each_node(l.store, list_node, &l, &err);
    coord_store_close(l.store);
    if (st != FL_OK) {
        fl_json_free(root);
        return fl_cli_fail(&err);
    }
    if (root != NULL) return coord_cmd_print(root);
    if (l.count == 0)
        printf("no node has joined; fleetune-coordinator token %s makes an invitation\n", o->dir);
    return FL_EXIT_OK;
}

const fl_command coord_cmd_nodes = {
    .name = "nodes",
    .summary = "list the fleet: names, states, when each was last heard, held-out losses",
    .example = "fleetune-coordinator nodes home",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(coord_dir_opts),
    .run = run,
};
