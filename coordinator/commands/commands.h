// commands.h: every command of fleetune-coordinator, one a file, and what several of them share.
#ifndef COORD_COMMANDS_H
#define COORD_COMMANDS_H

#include "common/cli.h"
#include "common/json.h"
#include "coordinator/store.h"

extern const fl_command coord_cmd_init, coord_cmd_run, coord_cmd_token, coord_cmd_nodes,
    coord_cmd_approve, coord_cmd_revoke, coord_cmd_status, coord_cmd_rounds, coord_cmd_export,
    coord_cmd_verify, coord_cmd_backup, coord_cmd_restore,
    coord_cmd_simulate; // the last is in sim/, above both programs' cores

// Options of commands that look at one folder.
typedef struct coord_dir_opts {
    char dir[FL_SETTING_TEXT_MAX];
    char node[FL_SETTING_TEXT_MAX]; // approve, revoke
    int64_t count;                  // rounds
    bool json;
} coord_dir_opts;

#define COORD_ROW_DIR                                                                              \
    {                                                                                              \
        NULL, "DIR", FL_KIND_TEXT, "DIR", 0, 0, NULL, "the coordinator's folder", NULL,            \
            offsetof(coord_dir_opts, dir)                                                          \
    }
#define COORD_ROW_JSON                                                                             \
    {                                                                                              \
        NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,        \
            offsetof(coord_dir_opts, json)                                                         \
    }

// A new object, or an error on standard error and NULL.
fl_json *coord_cmd_object(void);
// Prints one line, frees the object, gives the exit status.
int coord_cmd_print(fl_json *j);

// approve and revoke: the node's new state, and the event.
int coord_cmd_set_state(const coord_dir_opts *o, coord_node_state state);

#endif
