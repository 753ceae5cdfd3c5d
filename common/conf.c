#include "common/conf.h"

#include <ctype.h>
#include <errno.h>
#include <ini.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void *field(const fl_setting *row, void *into) {
    return (uint8_t *)into + row->offset;
}

static const void *field_const(const fl_setting *row, const void *from) {
    return (const uint8_t *)from + row->offset;
}

static fl_status out_of_range(const fl_setting *row, const char *text, fl_err *err) {
    return FL_FAIL(err, FL_EARG, "%s = %s is outside %.10g to %.10g", row->key, text, row->min,
                   row->max);
}

static bool in_range(const fl_setting *row, double v) {
    return (row->min == 0 && row->max == 0) || (v >= row->min && v <= row->max);
}

static fl_status parse_number(const fl_setting *row, const char *text, double *ret, fl_err *err) {
    char *end;
    errno = 0;
    const double v = strtod(text, &end);
    if (end == text || *end != '\0' || errno != 0 || !isfinite(v))
        return FL_FAIL(err, FL_EARG, "%s wants a number, not \"%s\"", row->key, text);
    if (!in_range(row, v)) return out_of_range(row, text, err);
    *ret = v;
    return FL_OK;
}

static fl_status parse_integer(const fl_setting *row, const char *text, int64_t *ret, fl_err *err) {
    char *end;
    errno = 0;
    const long long v = strtoll(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0)
        return FL_FAIL(err, FL_EARG, "%s wants a whole number, not \"%s\"", row->key, text);
    if (!in_range(row, (double)v)) return out_of_range(row, text, err);
    *ret = v;
    return FL_OK;
}

static fl_status parse_size(const fl_setting *row, const char *text, uint64_t *ret, fl_err *err) {
    char *end;
    errno = 0;
    const double v = strtod(text, &end);
    double unit = 1;
    if (*end == 'K' || *end == 'k') unit = 0x1p10;
    if (*end == 'M' || *end == 'm') unit = 0x1p20;
    if (*end == 'G' || *end == 'g') unit = 0x1p30;
    if (unit > 1) end++;
    if (unit > 1 && *end == 'i') end++;
    if (unit > 1 && *end == 'B') end++;
    if (end == text || *end != '\0' || errno != 0 || !(v >= 0) || v * unit > 0x1p62)
        return FL_FAIL(err, FL_EARG, "%s wants a size like 300M or 2G, not \"%s\"", row->key, text);
    if (!in_range(row, v * unit)) return out_of_range(row, text, err);
    *ret = (uint64_t)(v * unit);
    return FL_OK;
}

static fl_status parse_flag(const fl_setting *row, const char *text, bool *ret, fl_err *err) {
    static const char *const yes[] = {"yes", "true", "on", "1"};
    static const char *const no[] = {"no", "false", "off", "0"};
    for (size_t i = 0; i < FL_COUNT(yes); i++) {
        if (strcmp(text, yes[i]) == 0) return *ret = true, FL_OK;
        if (strcmp(text, no[i]) == 0) return *ret = false, FL_OK;
    }
    return FL_FAIL(err, FL_EARG, "%s wants yes or no, not \"%s\"", row->key, text);
}

static fl_status parse_choice(const fl_setting *row, const char *text, int64_t *ret, fl_err *err) {
    const size_t size = strlen(text);
    int64_t index = 0;
    for (const char *word = row->choices; word != NULL; index++) {
        const char *bar = strchr(word, '|');
        const size_t n = bar == NULL ? strlen(word) : (size_t)(bar - word);
        if (n == size && strncmp(word, text, n) == 0) return *ret = index, FL_OK;
        word = bar == NULL ? NULL : bar + 1;
    }
    return FL_FAIL(err, FL_EARG, "%s wants one of %s, not \"%s\"", row->key, row->choices, text);
}

fl_status fl_setting_parse(const fl_setting *row, const char *text, void *into, fl_err *err) {
    void *at = field(row, into);
    switch (row->kind) {
    case FL_KIND_TEXT:
        if (strlen(text) >= FL_SETTING_TEXT_MAX)
            return FL_FAIL(err, FL_EARG, "%s is longer than %d bytes", row->key,
                           FL_SETTING_TEXT_MAX - 1);
        memcpy(at, text, strlen(text) + 1);
        return FL_OK;
    case FL_KIND_INTEGER:
        return parse_integer(row, text, at, err);
    case FL_KIND_NUMBER:
        return parse_number(row, text, at, err);
    case FL_KIND_SIZE:
        return parse_size(row, text, at, err);
    case FL_KIND_FLAG:
        return parse_flag(row, text, at, err);
    case FL_KIND_CHOICE:
        return parse_choice(row, text, at, err);
    }
    fl_panic(__FILE__, __LINE__, "a setting of no kind");
}

void fl_setting_defaults(const fl_setting *table, size_t count, void *into) {
    static const size_t sizes[] = {FL_SETTING_TEXT_MAX, sizeof(int64_t), sizeof(double),
                                   sizeof(uint64_t),    sizeof(bool),    sizeof(int64_t)};
    for (size_t i = 0; i < count; i++) {
        memset(field(&table[i], into), 0, sizes[table[i].kind]);
        if (table[i].otherwise == NULL) continue;
        const fl_status st = fl_setting_parse(&table[i], table[i].otherwise, into, NULL);
        FL_ASSERT(st == FL_OK); // a default that does not obey its own row
    }
}

static size_t edit_distance(const char *a, const char *b) {
    enum { WORD_MAX = 40 };
    const size_t n = strlen(a), m = strlen(b);
    if (n >= WORD_MAX || m >= WORD_MAX) return WORD_MAX;
    size_t row[WORD_MAX + 1];
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            const size_t change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            const size_t gap = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            row[j] = change < gap ? change : gap;
        }
    }
    return row[m];
}

const char *fl_nearest(const char *word, const char *const *names, size_t count) {
    const char *best = NULL;
    size_t best_distance = 4;
    for (size_t i = 0; i < count; i++) {
        const size_t d = edit_distance(word, names[i]);
        if (d < best_distance) {
            best_distance = d;
            best = names[i];
        }
    }
    return best;
}

// One pass over a file: what the INI reader's callbacks need, and the first failure. Debian's
// library is built without line numbers in its callback, so lines are counted as they are read.
typedef struct conf_pass {
    FILE *file;
    const char *path;
    const fl_setting *table;
    size_t count;
    void *into;
    int line;
    fl_err *err;
    fl_status status;
} conf_pass;

static fl_status unknown_key(const conf_pass *p, const char *section, const char *key) {
    enum { ROWS_MAX = 128 };
    const char *names[ROWS_MAX];
    size_t n = 0;
    for (size_t i = 0; i < p->count && n < ROWS_MAX; i++) {
        if (p->table[i].section != NULL) names[n++] = p->table[i].key;
    }
    const char *near = fl_nearest(key, names, n);
    return FL_FAIL(p->err, FL_EARG, "%s:%d: unknown key '%s' in [%s]%s%s%s", p->path, p->line, key,
                   section, near == NULL ? "" : ", did you mean '", near == NULL ? "" : near,
                   near == NULL ? "" : "'?");
}

static char *next_line(char *text, int size, void *ctx) {
    conf_pass *p = ctx;
    p->line++;
    return fgets(text, size, p->file);
}

static int on_pair(void *ctx, const char *section, const char *key, const char *value) {
    conf_pass *p = ctx;
    if (p->status != FL_OK) return 0;
    for (size_t i = 0; i < p->count; i++) {
        const fl_setting *row = &p->table[i];
        if (row->section == NULL || strcmp(row->section, section) != 0) continue;
        if (strcmp(row->key, key) != 0) continue;
        fl_err why = {0};
        p->status = fl_setting_parse(row, value, p->into, &why);
        if (p->status != FL_OK) FL_FAIL(p->err, p->status, "%s:%d: %s", p->path, p->line, why.text);
        return p->status == FL_OK;
    }
    p->status = unknown_key(p, section, key);
    return 0;
}

static fl_status read_environment(const char *prefix, const fl_setting *table, size_t count,
                                  void *into, fl_err *err) {
    for (size_t i = 0; i < count; i++) {
        if (table[i].section == NULL) continue;
        char name[128];
        snprintf(name, sizeof(name), "%s_%s_%s", prefix, table[i].section, table[i].key);
        for (char *c = name; *c != '\0'; c++)
            *c = *c == '-' ? '_' : (char)toupper((unsigned char)*c);
        const char *value = getenv(name);
        if (value == NULL) continue;
        fl_err why = {0};
        const fl_status st = fl_setting_parse(&table[i], value, into, &why);
        if (st != FL_OK) return FL_FAIL(err, st, "environment %s: %s", name, why.text);
    }
    return FL_OK;
}

fl_status fl_conf_load(const char *path, const char *env_prefix, const fl_setting *table,
                       size_t count, void *into, fl_err *err) {
    fl_setting_defaults(table, count, into);
    FILE *f = fopen(path, "re");
    if (f == NULL) {
        const fl_status st = errno == ENOENT ? FL_ENOENT : FL_EIO;
        return FL_FAIL(err, st, "cannot open %s: %s", path, strerror(errno));
    }
    conf_pass pass = {
        .file = f, .path = path, .table = table, .count = count, .into = into, .err = err};
    const int line = ini_parse_stream(next_line, &pass, on_pair, &pass);
    fclose(f);
    if (pass.status != FL_OK) return pass.status;
    if (line != 0)
        return FL_FAIL(err, FL_EFORMAT, "%s:%d: not a [section], a key = value or a comment", path,
                       line);
    return read_environment(env_prefix, table, count, into, err);
}

static void print_value(const fl_setting *row, const void *values, FILE *out) {
    const void *at = field_const(row, values);
    switch (row->kind) {
    case FL_KIND_TEXT:
        fprintf(out, "%s", (const char *)at);
        return;
    case FL_KIND_INTEGER:
        fprintf(out, "%lld", (long long)*(const int64_t *)at);
        return;
    case FL_KIND_NUMBER:
        fprintf(out, "%.10g", *(const double *)at);
        return;
    case FL_KIND_SIZE:
        fprintf(out, "%llu", (unsigned long long)*(const uint64_t *)at);
        return;
    case FL_KIND_FLAG:
        fprintf(out, "%s", *(const bool *)at ? "yes" : "no");
        return;
    case FL_KIND_CHOICE:
        break;
    }
    int64_t index = *(const int64_t *)at;
    const char *word = row->choices;
    while (index-- > 0) word = strchr(word, '|') + 1;
    fprintf(out, "%.*s", (int)strcspn(word, "|"), word);
}

void fl_conf_print(const fl_setting *table, size_t count, const void *values, FILE *out) {
    const char *section = "";
    for (size_t i = 0; i < count; i++) {
        const fl_setting *row = &table[i];
        if (row->section == NULL) continue;
        if (strcmp(section, row->section) != 0) fprintf(out, "\n[%s]\n", row->section);
        section = row->section;
        fprintf(out, "\n# %s", row->help);
        if (row->unit != NULL) fprintf(out, " [%s]", row->unit);
        if (row->choices != NULL) fprintf(out, " One of %s.", row->choices);
        if (row->min != 0 || row->max != 0) fprintf(out, " %.10g to %.10g.", row->min, row->max);
        fprintf(out, "\n%s%s = ", values == NULL ? "#" : "", row->key);
        if (values != NULL)
            print_value(row, values, out);
        else
            fprintf(out, "%s", row->otherwise == NULL ? "" : row->otherwise);
        fprintf(out, "\n");
    }
}
