// fleetune-coordinator: the program on the home server. Each command lives in a file of commands/.
#include "coordinator/commands/commands.h"

int main(int argc, char **argv) {
    static const fl_command *const commands[] = {
        &coord_cmd_init,    &coord_cmd_run,    &coord_cmd_token,  &coord_cmd_nodes,
        &coord_cmd_approve, &coord_cmd_revoke, &coord_cmd_status, &coord_cmd_rounds,
        &coord_cmd_export,  &coord_cmd_verify, &coord_cmd_backup, &coord_cmd_restore,
        &coord_cmd_simulate,
    };
    static const fl_program program = {
        .name = "fleetune-coordinator",
        .summary = "let a fleet of small devices tune one language model together",
        .commands = commands,
        .count = FL_COUNT(commands),
    };
    return fl_cli_main(&program, argc, argv);
}
