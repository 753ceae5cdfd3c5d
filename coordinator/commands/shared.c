#include "common/clock.h"
#include "coordinator/commands/commands.h"

fl_json *coord_cmd_object(void) {
    fl_json *j = fl_json_object();
    if (j == NULL) fprintf(stderr, "fleetune-coordinator: no memory\n");
    return j;
}

int coord_cmd_print(fl_json *j) {
    fl_err err;
    const fl_status st = fl_json_print(j, stdout, &err);
    fl_json_free(j);
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

static fl_status set_state(coord_store *s, const coord_dir_opts *o, coord_node_state state,
                           coord_node_row *node, fl_err *err) {
    FL_TRY(coord_store_begin(s, err));
    FL_TRY(coord_store_find_node(s, o->node, node, err));
    FL_TRY(coord_store_set_node_state(s, node->id, state, err));
    FL_TRY(coord_store_add_event(
        s, fl_clock_wall_s(), state == COORD_NODE_ACTIVE ? "node.approved" : "node.revoked",
        node->id, state == COORD_NODE_ACTIVE ? "approved by the owner" : "revoked by the owner",
        err));
    return coord_store_commit(s, err);
}

int coord_cmd_set_state(const coord_dir_opts *o, coord_node_state state) {
    coord_store *s = NULL;
    coord_node_row node;
    fl_err err;
    fl_status st = coord_store_open(o->dir, &s, &err);
    if (st == FL_OK) st = set_state(s, o, state, &node, &err);
    coord_store_close(s);
    if (st != FL_OK) return fl_cli_fail(&err);
    if (!o->json) {
        printf("%s (%lld) is %s\n", node.name, (long long)node.id, coord_node_state_text(state));
        return FL_EXIT_OK;
    }
    fl_json *j = coord_cmd_object();
    if (j == NULL) return FL_EXIT_FAILED;
    fl_json_set_integer(j, "id", node.id);
    fl_json_set_string(j, "name", node.name);
    fl_json_set_string(j, "state", coord_node_state_text(state));
    return coord_cmd_print(j);
}
