// cli.h: a program is a table of commands, a command a table of arguments and options. Parsing,
// --help, the man page and shell completion come from the tables.
//
// Exit status of every program: 0 done, 1 failed, 2 wrong usage.
#ifndef FL_COMMON_CLI_H
#define FL_COMMON_CLI_H

#include "common/conf.h"

enum { FL_EXIT_OK = 0, FL_EXIT_FAILED = 1, FL_EXIT_USAGE = 2 };

// An option is an fl_setting with section NULL. A row whose key begins with a capital letter is a
// positional argument, in table order: required when `otherwise` is NULL. The structure's fields
// are as in conf.h.
typedef struct fl_command {
    const char *name;
    const char *summary; // one line, no full stop
    const char *example; // a whole command line
    const fl_setting *table;
    size_t count;
    size_t options_size; // of the structure that the table fills, at most FL_OPTIONS_MAX
    // Returns an exit status; says on standard error what went wrong, once.
    int (*run)(const void *options);
} fl_command;

enum { FL_OPTIONS_MAX = 65536 };

typedef struct fl_program {
    const char *name;
    const char *summary;
    const fl_command *const *commands; // each defined in a file of its own
    size_t count;
} fl_program;

// Parses and runs: `main` is `return fl_cli_main(&program, argc, argv);`. Understands --help after
// any command, --version, --man and --completion.
int fl_cli_main(const fl_program *program, int argc, char **argv);

// "fleetune-node: eval: cannot open x: No such file" and an exit status: FL_EXIT_USAGE for FL_EARG,
// else FL_EXIT_FAILED.
int fl_cli_fail(const fl_err *err);

#endif
