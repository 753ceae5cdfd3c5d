// fleetune-node: the program on every device. Each command lives in a file of commands/.
#include "node/commands/commands.h"

int main(int argc, char **argv) {
    static const fl_command *const commands[] = {
        &node_cmd_doctor, &node_cmd_inspect, &node_cmd_compress, &node_cmd_plan,
        &node_cmd_tune,   &node_cmd_eval,    &node_cmd_generate, &node_cmd_bench,
        &node_cmd_join,   &node_cmd_run,     &node_cmd_status,
    };
    static const fl_program program = {
        .name = "fleetune-node",
        .summary = "run, tune and federate a small language model on this device",
        .commands = commands,
        .count = FL_COUNT(commands),
    };
    return fl_cli_main(&program, argc, argv);
}
