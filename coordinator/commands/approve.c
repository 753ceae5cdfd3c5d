// approve: lets a node that waits take part.
#include "coordinator/commands/commands.h"

static const fl_setting table[] = {
    COORD_ROW_DIR,
    {NULL, "NODE", FL_KIND_TEXT, "NODE", 0, 0, NULL, "number, name or first digits of its key",
     NULL, offsetof(coord_dir_opts, node)},
    COORD_ROW_JSON,
};

static int run(const void *options) {
    return coord_cmd_set_state(options, COORD_NODE_ACTIVE);
}

const fl_command coord_cmd_approve = {
    .name = "approve",
    .summary = "let a node that waits take part; a running coordinator notices at once",
    .example = "fleetune-coordinator approve home kitchen-pi",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(coord_dir_opts),
    .run = run,
};
