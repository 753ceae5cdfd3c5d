// attention_run.h: which tokens a vector variant of attention takes together. Static: no copy of it
// can be linked into code for other machines.
#ifndef FL_KERNELS_ATTENTION_RUN_H
#define FL_KERNELS_ATTENTION_RUN_H

#include "kernels/attention.h"

// Tokens [first, first + result), at most `most`, that share a first row and end one row after the
// other.
static inline uint32_t fl_attention_run(const fl_attention *a, uint32_t first, uint32_t end,
                                        uint32_t most) {
    uint32_t count = 1;
    while (count < most && first + count < end &&
           a->kv_begin[first + count] == a->kv_begin[first] &&
           a->kv_row[first + count] == a->kv_row[first] + count)
        count++;
    return count;
}

#endif
