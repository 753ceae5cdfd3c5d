#include "common/cli.h"

#include <ctype.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_MAX = 64 };

static const char *program_name = "fleetune";
static const char *command_name = "";

static bool positional(const fl_setting *row) {
    return isupper((unsigned char)row->key[0]);
}

int fl_cli_fail(const fl_err *err) {
    fprintf(stderr, "%s: %s%s%s\n", program_name, command_name, command_name[0] ? ": " : "",
            err->text);
    return err->status == FL_EARG ? FL_EXIT_USAGE : FL_EXIT_FAILED;
}

static void print_usage(const fl_program *p, const fl_command *c, FILE *out) {
    fprintf(out, "usage: %s %s", p->name, c->name);
    for (size_t i = 0; i < c->count; i++) {
        const fl_setting *row = &c->table[i];
        if (positional(row)) fprintf(out, row->otherwise == NULL ? " %s" : " [%s]", row->key);
    }
    fprintf(out, " [options]\n");
}

static void print_row(const fl_setting *row, FILE *out) {
    char left[64];
    if (positional(row))
        snprintf(left, sizeof(left), "%s", row->key);
    else if (row->kind == FL_KIND_FLAG)
        snprintf(left, sizeof(left), "--%s", row->key);
    else
        snprintf(left, sizeof(left), "--%s %s", row->key,
                 row->choices != NULL ? row->choices : row->unit);
    fprintf(out, "  %-28s %s", left, row->help);
    if (row->otherwise != NULL && row->otherwise[0] != '\0' && row->kind != FL_KIND_FLAG)
        fprintf(out, " (default %s)", row->otherwise);
    else if (row->otherwise == NULL && !positional(row))
        fprintf(out, " (required)");
    fprintf(out, "\n");
}

static void print_command(const fl_program *p, const fl_command *c, FILE *out) {
    fprintf(out, "%s\n\n", c->summary);
    print_usage(p, c, out);
    fprintf(out, "\n");
    for (size_t i = 0; i < c->count; i++) print_row(&c->table[i], out);
    fprintf(out, "  %-28s this text\n\nexample:\n  %s\n", "--help", c->example);
}

static void print_program(const fl_program *p, FILE *out) {
    fprintf(out, "%s: %s\n\nusage: %s COMMAND [arguments]\n\n", p->name, p->summary, p->name);
    for (size_t i = 0; i < p->count; i++)
        fprintf(out, "  %-12s %s\n", p->commands[i]->name, p->commands[i]->summary);
    fprintf(out, "\n%s COMMAND --help explains one command.\n", p->name);
}

// roff wants a minus sign that stays one, and no line that begins with a dot.
static void print_roff(const char *text, FILE *out) {
    for (; *text != '\0'; text++) {
        if (*text == '-' || *text == '\\') fputc('\\', out);
        fputc(*text, out);
    }
}

static void print_man(const fl_program *p, FILE *out) {
    fprintf(out, ".TH %s 1 \"\" \"fleetune %s\"\n.SH NAME\n%s \\- %s\n", p->name, FL_VERSION,
            p->name, p->summary);
    fprintf(out, ".SH SYNOPSIS\n.B %s\nCOMMAND [arguments]\n.SH COMMANDS\n", p->name);
    for (size_t i = 0; i < p->count; i++) {
        const fl_command *c = p->commands[i];
        fprintf(out, ".SS %s\n%s.\n", c->name, c->summary);
        for (size_t k = 0; k < c->count; k++) {
            const fl_setting *row = &c->table[k];
            fprintf(out, ".TP\n.B ");
            if (!positional(row)) print_roff("--", out);
            print_roff(row->key, out);
            fprintf(out, "\n");
            print_roff(row->help, out);
            if (row->otherwise != NULL && row->otherwise[0] != '\0' && row->kind != FL_KIND_FLAG) {
                fprintf(out, " (default ");
                print_roff(row->otherwise, out);
                fprintf(out, ")");
            }
            fprintf(out, ".\n");
        }
        fprintf(out, ".PP\nExample:\n.EX\n");
        print_roff(c->example, out);
        fprintf(out, "\n.EE\n");
    }
    fprintf(out, ".SH EXIT STATUS\n0 done, 1 failed, 2 wrong usage.\n");
}

static void print_completion(const fl_program *p, FILE *out) {
    fprintf(out, "complete -W \"");
    for (size_t i = 0; i < p->count; i++)
        fprintf(out, "%s%s", i == 0 ? "" : " ", p->commands[i]->name);
    fprintf(out, "\" -o default %s\n", p->name);
}

static int usage_error(const fl_program *p, const fl_command *c, const char *what,
                       const char *value) {
    fprintf(stderr, "%s: %s: %s%s; ", p->name, c->name, what, value);
    print_usage(p, c, stderr);
    return FL_EXIT_USAGE;
}

static int unknown_option(const fl_program *p, const fl_command *c, const char *given) {
    const char *names[ROWS_MAX];
    size_t n = 0;
    for (size_t i = 0; i < c->count && n < ROWS_MAX; i++) {
        if (!positional(&c->table[i])) names[n++] = c->table[i].key;
    }
    const char *word = given + strspn(given, "-");
    const char *near = fl_nearest(word, names, n);
    fprintf(stderr, "%s: %s: unknown option %s%s%s%s\n", p->name, c->name, given,
            near == NULL ? "" : ", did you mean --", near == NULL ? "" : near,
            near == NULL ? "" : "?");
    return FL_EXIT_USAGE;
}

static int take_positionals(const fl_program *p, const fl_command *c, int argc, char **argv,
                            bool *given, void *options) {
    fl_err err;
    for (size_t i = 0; i < c->count; i++) {
        const fl_setting *row = &c->table[i];
        if (!positional(row) || optind >= argc) continue;
        if (fl_setting_parse(row, argv[optind++], options, &err) != FL_OK) return fl_cli_fail(&err);
        given[i] = true;
    }
    if (optind < argc) return usage_error(p, c, "one argument too many: ", argv[optind]);
    for (size_t i = 0; i < c->count; i++) {
        const fl_setting *row = &c->table[i];
        if (row->otherwise == NULL && !given[i] && row->kind != FL_KIND_FLAG)
            return usage_error(p, c, positional(row) ? "missing argument " : "missing option --",
                               row->key);
    }
    return FL_EXIT_OK;
}

static int run_command(const fl_program *p, const fl_command *c, int argc, char **argv) {
    FL_ASSERT(c->count < ROWS_MAX && c->options_size <= FL_OPTIONS_MAX);
    static _Alignas(16) uint8_t options[FL_OPTIONS_MAX];
    struct option longs[ROWS_MAX + 1] = {{"help", no_argument, NULL, ROWS_MAX}};
    bool given[ROWS_MAX] = {false};
    size_t n = 1;
    for (size_t i = 0; i < c->count; i++) {
        const fl_setting *row = &c->table[i];
        if (positional(row)) continue;
        longs[n++] = (struct option){
            row->key, row->kind == FL_KIND_FLAG ? no_argument : required_argument, NULL, (int)i};
    }
    fl_setting_defaults(c->table, c->count, options);
    opterr = 0;
    optind = 1;
    for (;;) {
        const int i = getopt_long(argc, argv, ":", longs, NULL);
        if (i == -1) break;
        if (i == ROWS_MAX) return print_command(p, c, stdout), FL_EXIT_OK;
        if (i == '?') return unknown_option(p, c, argv[optind - 1]);
        if (i == ':') return usage_error(p, c, "no value after ", argv[argc - 1]);
        fl_err err;
        const char *value = c->table[i].kind == FL_KIND_FLAG ? "yes" : optarg;
        if (fl_setting_parse(&c->table[i], value, options, &err) != FL_OK) return fl_cli_fail(&err);
        given[i] = true;
    }
    const int status = take_positionals(p, c, argc, argv, given, options);
    return status != FL_EXIT_OK ? status : c->run(options);
}

int fl_cli_main(const fl_program *p, int argc, char **argv) {
    program_name = p->name;
    const char *word = argc > 1 ? argv[1] : "--help";
    if (strcmp(word, "--help") == 0 || strcmp(word, "help") == 0) {
        print_program(p, argc > 1 ? stdout : stderr);
        return argc > 1 ? FL_EXIT_OK : FL_EXIT_USAGE;
    }
    if (strcmp(word, "--version") == 0) return printf("%s %s\n", p->name, FL_VERSION), FL_EXIT_OK;
    if (strcmp(word, "--man") == 0) return print_man(p, stdout), FL_EXIT_OK;
    if (strcmp(word, "--completion") == 0) return print_completion(p, stdout), FL_EXIT_OK;
    const char *names[ROWS_MAX];
    for (size_t i = 0; i < p->count && i < ROWS_MAX; i++) {
        names[i] = p->commands[i]->name;
        if (strcmp(word, names[i]) != 0) continue;
        command_name = names[i];
        return run_command(p, p->commands[i], argc - 1, argv + 1);
    }
    const char *near = fl_nearest(word, names, p->count);
    fprintf(stderr, "%s: unknown command '%s'%s%s%s; '%s --help' lists them\n", p->name, word,
            near == NULL ? "" : ", did you mean '", near == NULL ? "" : near,
            near == NULL ? "" : "'?", p->name);
    return FL_EXIT_USAGE;
}
