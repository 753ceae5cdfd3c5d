// state_dir.h: where a node keeps what it must not lose: keys, enrolment, adapter, measured rates.
#ifndef NODE_COMMANDS_STATE_DIR_H
#define NODE_COMMANDS_STATE_DIR_H

#include "common/status.h"

// The folder: `given`, else $FLEETUNE_STATE, else $STATE_DIRECTORY (a service unit's), else
// ~/.local/state/fleetune. path[size].
fl_status node_state_dir(const char *given, char *path, size_t size, fl_err *err) FL_NODISCARD;
// Makes it, and what is missing above it, with mode 0700.
fl_status node_state_dir_make(char *path, fl_err *err) FL_NODISCARD;

#endif
