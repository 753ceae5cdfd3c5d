// quantise_x8: one row of activations as 8-bit codes, one scale to each group of 64.
//
//   Shape     x[cols], cols >= 1; writes row `token` of the view. Reads nothing past x[cols - 1].
//   Layout    codes are padded with zeros to a multiple of 64.
//   Numerics  per group: scale = maxabs / 127; code = x * (127 / maxabs), rounded half to even,
//   thus
//             in [-127, 127]; sum = scale * (float)(sum of the codes). Plain f32 operations: every
//             variant on every machine gives the same bits.
//             maxabs below 2^-100 counts as zero: codes, scale and sum are 0 (127 / maxabs would
//             overflow). A group that holds a NaN or an infinity gets codes 0, scale NaN and sum
//             NaN, so that the fault shows in every product.
//   Aliasing  x and the view do not overlap.
//   Errors    none; sizes and pointers are the caller's contract.
//   Threads   pure; rows of one view may be written by different threads.
#ifndef FL_KERNELS_QUANTISE_X8_H
#define FL_KERNELS_QUANTISE_X8_H

#include "kernels/cpu.h"

enum { FL_X8_GROUP = 64 }; // equals FL_PACKED_GROUP

// A view of the caller's memory: `tokens` quantised rows.
typedef struct fl_x8 {
    int8_t *codes; // [tokens][groups * 64], each row 64-byte aligned
    float *scales; // [tokens][groups]
    float *sums;   // [tokens][groups]
    uint32_t tokens, groups;
} fl_x8;

// Bytes of memory for such a view, a multiple of 64; false on overflow.
bool fl_x8_size(uint32_t tokens, uint32_t cols, size_t *ret) FL_NODISCARD;
// The view itself. `memory` is 64-byte aligned and holds fl_x8_size bytes; nothing is written to
// it.
fl_x8 fl_x8_bind(void *memory, uint32_t tokens, uint32_t cols);
// Tokens [begin, end) of a view, as a view.
fl_x8 fl_x8_slice(const fl_x8 *x, uint32_t begin, uint32_t end);

#define FL_QUANTISE_X8_LIST(X)                                                                     \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2))                                                                \
    FL_ON_X86(X(avx512, FL_CPU_AVX512_VNNI))                                                       \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))

typedef void (*fl_quantise_x8_fn)(const float *x, uint32_t cols, const fl_x8 *ret, uint32_t token);

#define X(tag, need)                                                                               \
    void fl_quantise_x8_##tag(const float *x, uint32_t cols, const fl_x8 *ret, uint32_t token);
FL_QUANTISE_X8_LIST(X)
#undef X

typedef struct fl_quantise_x8_variant {
    const char *tag;
    uint32_t need; // FL_CPU_* bits that must all be present
    fl_quantise_x8_fn fn;
} fl_quantise_x8_variant;

extern const fl_quantise_x8_variant fl_quantise_x8_variants[]; // ends with fn == NULL

#endif
