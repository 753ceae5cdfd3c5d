// json.h: the little JSON that the programs speak (jansson behind it): objects with numbers,
// strings, booleans, arrays and objects, printed in the order in which they were set.
//
// A failed allocation is remembered in the root and reported once, by fl_json_print.
#ifndef FL_COMMON_JSON_H
#define FL_COMMON_JSON_H

#include "common/status.h"

#include <stdio.h>

typedef struct fl_json fl_json; // an object or an array; owned by its parent once added

fl_json *fl_json_object(void);
fl_json *fl_json_array(void);
void fl_json_free(fl_json *j); // of a root; NULL is fine

// key is NULL when the parent is an array. A number that is not finite is written as null.
void fl_json_set_number(fl_json *parent, const char *key, double v);
void fl_json_set_integer(fl_json *parent, const char *key, int64_t v);
void fl_json_set_string(fl_json *parent, const char *key, const char *v);
void fl_json_set_bool(fl_json *parent, const char *key, bool v);
fl_json *fl_json_add_object(fl_json *parent, const char *key);
fl_json *fl_json_add_array(fl_json *parent, const char *key);

// One line and a newline; flushed.
fl_status fl_json_print(const fl_json *root, FILE *out, fl_err *err) FL_NODISCARD;

// Reading: strict, at most 32 levels, duplicate keys refused. FL_EFORMAT names the line.
fl_status fl_json_parse(fl_bytes text, fl_json **ret, fl_err *err) FL_NODISCARD;
const fl_json *fl_json_get(const fl_json *object, const char *key); // NULL when absent
const fl_json *fl_json_at(const fl_json *array, size_t index);      // NULL past the end
size_t fl_json_count(const fl_json *array);
double fl_json_number(const fl_json *j, double otherwise);
const char *fl_json_string(const fl_json *j, const char *otherwise);

#endif
