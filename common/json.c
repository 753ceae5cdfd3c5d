#include "common/json.h"

#include <math.h>
#include <stdlib.h>

#include <jansson.h>

// fl_json is jansson's value under our name: jansson counts references, we keep to trees.
static json_t *in(const fl_json *j) {
    return (json_t *)(uintptr_t)j;
}

fl_json *fl_json_object(void) {
    return (fl_json *)json_object();
}

fl_json *fl_json_array(void) {
    return (fl_json *)json_array();
}

void fl_json_free(fl_json *j) {
    json_decref(in(j));
}

// Adding is the one place where an allocation can fail; what could not be added is missing, and a
// document that misses something is not worth printing.
static _Thread_local bool incomplete;

static void add(fl_json *parent, const char *key, json_t *value) {
    const int rc = key == NULL ? json_array_append_new(in(parent), value)
                               : json_object_set_new(in(parent), key, value);
    if (rc != 0) incomplete = true;
}

void fl_json_set_number(fl_json *parent, const char *key, double v) {
    add(parent, key, isfinite(v) ? json_real(v) : json_null());
}

void fl_json_set_integer(fl_json *parent, const char *key, int64_t v) {
    add(parent, key, json_integer((json_int_t)v));
}

void fl_json_set_string(fl_json *parent, const char *key, const char *v) {
    json_t *s = json_string(v);
    add(parent, key, s != NULL ? s : json_string("(not UTF-8)"));
}

void fl_json_set_bool(fl_json *parent, const char *key, bool v) {
    add(parent, key, json_boolean(v));
}

fl_json *fl_json_add_object(fl_json *parent, const char *key) {
    json_t *j = json_object();
    add(parent, key, j);
    return (fl_json *)j;
}

fl_json *fl_json_add_array(fl_json *parent, const char *key) {
    json_t *j = json_array();
    add(parent, key, j);
    return (fl_json *)j;
}

fl_status fl_json_print(const fl_json *root, FILE *out, fl_err *err) {
    const bool lost = incomplete || root == NULL;
    incomplete = false;
    if (lost) return FL_FAIL(err, FL_ENOMEM, "no memory for the JSON output");
    const size_t flags = JSON_PRESERVE_ORDER | JSON_COMPACT | JSON_REAL_PRECISION(9);
    if (json_dumpf(in(root), out, flags) != 0 || fputc('\n', out) == EOF || fflush(out) != 0)
        return FL_FAIL(err, FL_EIO, "cannot write the JSON output");
    return FL_OK;
}

static bool too_deep(const json_t *j, int levels) {
    if (levels == 0) return true;
    const char *key;
    json_t *value;
    size_t i;
    if (json_is_object(j)) {
        json_object_foreach((json_t *)(uintptr_t)j, key, value) {
            if (too_deep(value, levels - 1)) return true;
        }
    } else if (json_is_array(j)) {
        json_array_foreach(j, i, value) {
            if (too_deep(value, levels - 1)) return true;
        }
    }
    return false;
}

fl_status fl_json_parse(fl_bytes text, fl_json **ret, fl_err *err) {
    enum { LEVELS_MAX = 32 };
    json_error_t why;
    json_t *j = json_loadb((const char *)text.data, text.size, JSON_REJECT_DUPLICATES, &why);
    if (j == NULL) return FL_FAIL(err, FL_EFORMAT, "line %d of the JSON: %s", why.line, why.text);
    if (too_deep(j, LEVELS_MAX)) {
        json_decref(j);
        return FL_FAIL(err, FL_ELIMIT, "JSON of more than %d levels", LEVELS_MAX);
    }
    *ret = (fl_json *)j;
    return FL_OK;
}

const fl_json *fl_json_get(const fl_json *object, const char *key) {
    return (const fl_json *)json_object_get(in(object), key);
}

const fl_json *fl_json_at(const fl_json *array, size_t index) {
    return (const fl_json *)json_array_get(in(array), index);
}

size_t fl_json_count(const fl_json *array) {
    return json_array_size(in(array));
}

double fl_json_number(const fl_json *j, double otherwise) {
    return json_is_number(in(j)) ? json_number_value(in(j)) : otherwise;
}

const char *fl_json_string(const fl_json *j, const char *otherwise) {
    return json_is_string(in(j)) ? json_string_value(in(j)) : otherwise;
}
