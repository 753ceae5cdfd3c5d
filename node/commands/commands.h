// commands.h: what fleetune-node does, one command a file in this folder.
#ifndef NODE_COMMANDS_COMMANDS_H
#define NODE_COMMANDS_COMMANDS_H

#include "common/cli.h"

extern const fl_command node_cmd_doctor, node_cmd_inspect, node_cmd_compress, node_cmd_plan,
    node_cmd_tune, node_cmd_eval, node_cmd_generate, node_cmd_bench, node_cmd_join, node_cmd_run,
    node_cmd_status;

#endif
