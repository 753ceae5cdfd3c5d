// convert_common.h: a llama model under conversion: tensors and tokens by name, written at the end.
#ifndef FL_TESTS_CONVERT_COMMON_H
#define FL_TESTS_CONVERT_COMMON_H

#include <stdlib.h>

#include "common/checked.h"
#include "tests/convert.h"

enum { T_CONVERT_TENSORS = 64, T_CONVERT_TOKENS = 4096 };

typedef struct t_convert_tensor {
    char name[64];
    uint32_t rows, cols; // rows 0: a vector
    const float *data;
    float *own; // freed at the end
} t_convert_tensor;

typedef struct t_convert {
    t_llama_config config;
    const float *end; // of the floats that t_convert_take may take
    t_convert_tensor tensor[T_CONVERT_TENSORS];
    uint32_t tensors;
    fl_bytes token[T_CONVERT_TOKENS]; // owned copies
    float score[T_CONVERT_TOKENS];
    int32_t type[T_CONVERT_TOKENS];
    uint32_t tokens;
} t_convert;

_Noreturn void t_convert_die(const char *what);
fl_bytes t_convert_read(const char *path); // freed by the caller

// Takes the next rows * cols floats (cols of a vector) and returns what follows them.
const float *t_convert_take(t_convert *c, const float *w, const char *name, uint32_t rows,
                            uint32_t cols);
// The same for "blk.0.<part>.weight", "blk.1.<part>.weight", ...
const float *t_convert_take_layers(t_convert *c, const float *w, const char *part, uint32_t rows,
                                   uint32_t cols);
// A copy; spaces become U+2581.
void t_convert_token(t_convert *c, fl_bytes text, float score, int32_t type);
// Writes the file and frees what is owned.
void t_convert_write(t_convert *c, const char *out);

#endif
