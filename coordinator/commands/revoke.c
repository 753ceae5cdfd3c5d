// revoke: a node's keys are worth nothing from its next frame on.
#include "coordinator/commands/commands.h"

static const fl_setting table[] = {
    COORD_ROW_DIR,
    {NULL, "NODE", FL_KIND_TEXT, "NODE", 0, 0, NULL, "number, name or first digits of its key",
     NULL, offsetof(coord_dir_opts, node)},
    COORD_ROW_JSON,
};

static int run(const void *options) {
    return coord_cmd_set_state(options, COORD_NODE_REVOKED);
}

const fl_command coord_cmd_revoke = {
    .name = "revoke",
    .summary = "shut a node out for good; a running coordinator notices at once",
    .example = "fleetune-coordinator revoke home kitchen-pi",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(coord_dir_opts),
    .run = run,
};
