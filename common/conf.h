// conf.h: settings as rows of one table. From the table come the parser of the INI file, the
// environment overrides, the command line (cli.h), --help and the sample file.
#ifndef FL_COMMON_CONF_H
#define FL_COMMON_CONF_H

#include "common/status.h"

#include <stdio.h>

enum { FL_SETTING_TEXT_MAX = 4096 };

typedef enum fl_kind {
    FL_KIND_TEXT,    // char[FL_SETTING_TEXT_MAX]
    FL_KIND_INTEGER, // int64_t
    FL_KIND_NUMBER,  // double
    FL_KIND_SIZE,    // uint64_t bytes; 300M, 2G, 512K are understood
    FL_KIND_FLAG,    // bool
    FL_KIND_CHOICE,  // int64_t, index into the words of `choices`
} fl_kind;

typedef struct fl_setting {
    const char *section; // of the INI file; NULL on the command line
    const char *key;
    fl_kind kind;
    const char *unit;      // shown in help: "FILE", "tokens", "MB"; NULL for flags
    double min, max;       // of numbers; both 0 for "any"
    const char *otherwise; // default, as text; NULL when it must be given
    const char *help;      // one line
    const char *choices;   // "luc|uniform|paper" for FL_KIND_CHOICE
    size_t offset;         // into the structure that the table fills
} fl_setting;

// Writes every default into *into (fields without one are zeroed).
void fl_setting_defaults(const fl_setting *table, size_t count, void *into);
// Parses one value. FL_EARG says which key, what is wrong with the value and what is allowed.
fl_status fl_setting_parse(const fl_setting *row, const char *text, void *into,
                           fl_err *err) FL_NODISCARD;

// Reads the INI file over the defaults, then environment variables PREFIX_SECTION_KEY (upper case).
// An unknown key is an error with file, line and the nearest known key. A missing file is
// FL_ENOENT.
fl_status fl_conf_load(const char *path, const char *env_prefix, const fl_setting *table,
                       size_t count, void *into, fl_err *err) FL_NODISCARD;
// The documented sample file: every key with its help, unit, range and default. With `values` (a
// filled structure) the values are written instead of the defaults.
void fl_conf_print(const fl_setting *table, size_t count, const void *values, FILE *out);

// The word nearest to `word` among `count` names (edit distance at most 3), or NULL.
const char *fl_nearest(const char *word, const char *const *names, size_t count);

#endif
