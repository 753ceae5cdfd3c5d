// ggml: the tensor types of published GGUF files, read only: a row of blocks to floats.
//
// A block is `elements` consecutive weights of a row in `bytes` bytes, little-endian, no padding.
// d, dmin: IEEE half. q: unsigned code of weight i. All arithmetic below is in float, each
// operation rounded, in the order written.
//
//   F32 F16 BF16  one element a block.
//   Q4_0   32: d, qs[16]            w_i = d * (q_i - 8)
//   Q4_1   32: d, m, qs[16]         w_i = d * q_i + m
//          q_i = low nibble of qs[i] for i < 16, high nibble of qs[i - 16] else.
//   Q5_0   32: d, qh[4], qs[16]     w_i = d * (q_i - 16)
//   Q5_1   32: d, m, qh[4], qs[16]  w_i = d * q_i + m
//          nibbles as in Q4_0; bit i of qh, read as one little-endian word, is bit 4 of q_i.
//   Q8_0   32: d, int8 qs[32]       w_i = d * qs[i]
//   Q2_K  256: scales[16], qs[64], d, dmin
//          w_i = d * (scales[s] & 15) * q_i - dmin * (scales[s] >> 4), s = i / 16;
//          q_i = bits 2j, 2j + 1 of qs[32 h + i % 32], h = i / 128, j = i / 32 % 4.
//   Q3_K  256: hmask[32], qs[64], scales[12], d
//          w_i = d * (S_s - 32) * (q_i - (bit i / 32 of hmask[i % 32] ? 0 : 4)); q_i as in Q2_K;
//          S_s of 6 bits: low nibbles of S_0..S_7 are low nibbles of scales[0..7], of S_8..S_15 the
//          high nibbles; bits 4, 5 of S_s are bits 2 (s / 4), 2 (s / 4) + 1 of scales[8 + s % 4].
//   Q4_K  256: d, dmin, scales[12], qs[128]
//          w_i = d * S_s * q_i - dmin * M_s, s = i / 32; q_i: low nibble of qs[32 (i / 64) + i %
//          32] for even s, high nibble for odd s. S_s, M_s of 6 bits: for s < 4 the low 6 bits of
//          scales[s], scales[s + 4]; else low (S) and high (M) nibble of scales[s + 4] with the
//          high two bits of scales[s - 4] (S), scales[s] (M) above it.
//   Q5_K  256: d, dmin, scales[12], qh[32], qs[128]    as Q4_K; bit s of qh[i % 32] is bit 4
//          of q_i.
//   Q6_K  256: ql[128], qh[64], int8 scales[16], d     w_i = d * scales[i / 16] * (q_i - 32);
//          with h = i / 128, j = i / 32 % 4, l = i % 32: low 4 bits are a nibble of
//          ql[64 h + l + 32 (j % 2)], low for j < 2, else high; bits 4, 5 are bits 2j, 2j + 1 of
//          qh[32 h + l].
//
//   Numerics  every variant gives the same bits, but for which NaN a NaN becomes.
//   Errors    none; fl_ggml_type_find tells what is known, sizes are the caller's contract.
//   Threads   pure.   Source  the GGUF specification and ggml's published block definitions.
#ifndef FL_KERNELS_GGML_H
#define FL_KERNELS_GGML_H

#include "kernels/cpu.h"

// X(name, id stored in GGUF files, elements and bytes of a block)
#define FL_GGML_TYPE_LIST(X)                                                                       \
    X(F32, 0, 1, 4)                                                                                \
    X(F16, 1, 1, 2)                                                                                \
    X(Q4_0, 2, 32, 18)                                                                             \
    X(Q4_1, 3, 32, 20)                                                                             \
    X(Q5_0, 6, 32, 22)                                                                             \
    X(Q5_1, 7, 32, 24)                                                                             \
    X(Q8_0, 8, 32, 34)                                                                             \
    X(Q2_K, 10, 256, 84)                                                                           \
    X(Q3_K, 11, 256, 110)                                                                          \
    X(Q4_K, 12, 256, 144)                                                                          \
    X(Q5_K, 13, 256, 176)                                                                          \
    X(Q6_K, 14, 256, 210)                                                                          \
    X(BF16, 30, 1, 2)

typedef enum fl_ggml_id {
#define X(name, id, elements, bytes) FL_GGML_##name = id,
    FL_GGML_TYPE_LIST(X)
#undef X
} fl_ggml_id;

// The definition of each type: `blocks` blocks at src, of any alignment, to floats.
#define X(name, id, elements, bytes)                                                               \
    void fl_ggml_##name##_to_f32(const uint8_t *src, size_t blocks, float *out);
FL_GGML_TYPE_LIST(X)
#undef X

typedef struct fl_ggml_type {
    uint32_t id;
    const char *name;        // "Q4_1"; NULL ends the table
    uint32_t block_elements; // a row's length is a multiple of this
    uint32_t block_bytes;
    void (*to_f32)(const uint8_t *src, size_t blocks, float *out);
} fl_ggml_type;

extern const fl_ggml_type fl_ggml_types[];

// NULL when the type is not known: the id may come from a file.
const fl_ggml_type *fl_ggml_type_find(uint32_t id);

// Bytes of a row of n elements; false when n is not whole blocks, the type unknown or the size
// overflows.
bool fl_ggml_row_size(uint32_t id, size_t n, size_t *ret) FL_NODISCARD;

// out[n] = the row's values. The type is known and n is whole blocks: the caller has checked.
// src needs no alignment.
#define FL_GGML_LIST(X)                                                                            \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_F16C))                                                  \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))

#define X(tag, need)                                                                               \
    void fl_ggml_row_to_f32_##tag(uint32_t id, const uint8_t *src, size_t n, float *out);
FL_GGML_LIST(X)
#undef X

typedef void (*fl_ggml_row_to_f32_fn)(uint32_t id, const uint8_t *src, size_t n, float *out);

typedef struct fl_ggml_variant {
    const char *tag; // NULL ends the list
    uint32_t need;
    fl_ggml_row_to_f32_fn row_to_f32;
} fl_ggml_variant;

extern const fl_ggml_variant fl_ggml_variants[];

// The definition, for callers without a dispatch table.
void fl_ggml_row_to_f32(uint32_t id, const uint8_t *src, size_t n, float *out);

#endif
