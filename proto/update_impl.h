// update_impl.h: what update.c and update_sparse.c share; nobody else includes it.
#ifndef FL_PROTO_UPDATE_IMPL_H
#define FL_PROTO_UPDATE_IMPL_H

#include "proto/update.h"

enum { FL_SPARSE_HEAD = 8, FL_PAGE_BLOCKS = FL_UPDATE_PAGE / FL_UPDATE_BLOCK };

// Counter generator of the stochastic rounding: uniform in [0, 1), a multiple of 2^-24.
double fl_update_uniform(uint64_t key, uint64_t index);

static inline bool fl_update_is_sparse(fl_update_encoding e) {
    return e == FL_UPDATE_SPARSE8 || e == FL_UPDATE_SPARSE4;
}

// One page of a validated sparse delta. Borrows the delta's bytes.
typedef struct fl_sparse_page {
    uint32_t kept, bits;
    uint16_t at[FL_UPDATE_PAGE]; // [kept] places in the page, ascending
    double step[FL_PAGE_BLOCKS]; // of the blocks that have a value
    const uint8_t *codes;
} fl_sparse_page;

size_t fl_sparse_size_max(uint32_t count, uint32_t bits, uint32_t kept); // padded
size_t fl_sparse_size_about(uint32_t count, uint32_t bits, uint32_t kept);
size_t fl_sparse_size_min(uint32_t count); // nothing is kept

// Writes what follows the update's head and pads; the caller has checked everything.
size_t fl_sparse_encode(const fl_update_info *info, uint32_t keep, const int64_t *values,
                        uint64_t key, uint8_t *out);
// Checks all of it; `in` begins after the head. *ret_used: its bytes without the padding.
fl_status fl_sparse_check(fl_bytes in, const fl_update_info *info, size_t *ret_used,
                          fl_err *err) FL_NODISCARD;
void fl_sparse_page_read(const fl_update *u, uint32_t page, fl_sparse_page *ret);
double fl_sparse_value(const fl_sparse_page *p, uint32_t i); // of at[i]

#endif
