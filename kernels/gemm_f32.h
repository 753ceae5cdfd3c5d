// gemm_f32: products with a panel of float weights, in the three directions that a linear map
// needs, and the low-rank products of an adapter.
//
//   nt        y[t][j] = sum_k x[t][k] * w[j][k]                 forward; also u = A x of an adapter
//   nn        dx[t][k] = (accumulate ? dx[t][k] : 0) + sum_j dy[t][j] * w[j][k]  gradient of input
//   tn        db[j][r] += sum_t dy[t][j] * u[t][r]              gradient of a weight, small rank
//   rank_up   y[t][j] += s * sum_r u[t][r] * b[j][r]            adapter output, rank 1..64
//   Shape     x[tokens][k], w[n][k], y[tokens][n]; db[n][rank]; u[tokens][rank]. Any size, 0 too.
//   Layout    row-major; ld* is the distance between rows in floats, at least the row's length. No
//             alignment required. Row distances that are multiples of 4 KiB cost speed (cache
//             sets). Reads and writes nothing past a row's last element.
//   Aliasing  what is written overlaps nothing that is read, but for the accumulated operand.
//   Numerics  |got - exact| <= (m + 8) * FLT_EPSILON * sum of |terms| with m the number of terms.
//             nt: an element's bits depend on its two rows alone, not on tokens, n or its place.
//             nn, tn: terms are added one after the other, in order, to what is there; so a sum cut
//             into calls (ranges of j in nn, of t in tn) has the bits of one call. rank_up: the sum
//             over r is made first, in order. An element's bits depend on nothing but its operands.
//             Variants order nt differently, and fuse or do not fuse: machines may differ in the
//             last bits, runs on one machine never.
//   Errors    none; sizes and pointers are the caller's contract.   Threads  pure; split by t or j.
//   Source    register blocking: Goto & van de Geijn 2008, Anatomy of high-performance matrix
//             multiplication, section 4; low rank: Hu et al. 2021, arXiv 2106.09685, section 4.1.
#ifndef FL_KERNELS_GEMM_F32_H
#define FL_KERNELS_GEMM_F32_H

#include "kernels/cpu.h"

enum { FL_RANK_MAX = 64 };

#define FL_GEMM_F32_LIST(X)                                                                        \
    X(ref, FL_CPU_NONE)                                                                            \
    FL_ON_X86(X(avx2, FL_CPU_AVX2 | FL_CPU_FMA))                                                   \
    FL_ON_ARM64(X(neon, FL_CPU_NEON))

#define FL_GEMM_F32_NT(tag)                                                                        \
    void fl_gemm_f32_nt_##tag(size_t tokens, size_t n, size_t k, const float *x, size_t ldx,       \
                              const float *w, size_t ldw, float *y, size_t ldy)
#define FL_GEMM_F32_NN(tag)                                                                        \
    void fl_gemm_f32_nn_##tag(size_t tokens, size_t n, size_t k, const float *dy, size_t lddy,     \
                              const float *w, size_t ldw, float *dx, size_t lddx, bool accumulate)
#define FL_GEMM_F32_TN(tag)                                                                        \
    void fl_gemm_f32_tn_##tag(size_t tokens, size_t n, size_t rank, const float *dy, size_t lddy,  \
                              const float *u, size_t ldu, float *db, size_t lddb)
#define FL_GEMM_F32_RANK_UP(tag)                                                                   \
    void fl_gemm_f32_rank_up_##tag(size_t tokens, size_t n, size_t rank, float s, const float *u,  \
                                   size_t ldu, const float *b, size_t ldb, float *y, size_t ldy)

#define X(tag, need)                                                                               \
    FL_GEMM_F32_NT(tag);                                                                           \
    FL_GEMM_F32_NN(tag);                                                                           \
    FL_GEMM_F32_TN(tag);                                                                           \
    FL_GEMM_F32_RANK_UP(tag);
FL_GEMM_F32_LIST(X)
#undef X

typedef struct fl_gemm_f32_variant {
    const char *tag; // NULL ends the list
    uint32_t need;   // FL_CPU_* bits that must all be present
    void (*nt)(size_t tokens, size_t n, size_t k, const float *x, size_t ldx, const float *w,
               size_t ldw, float *y, size_t ldy);
    void (*nn)(size_t tokens, size_t n, size_t k, const float *dy, size_t lddy, const float *w,
               size_t ldw, float *dx, size_t lddx, bool accumulate);
    void (*tn)(size_t tokens, size_t n, size_t rank, const float *dy, size_t lddy, const float *u,
               size_t ldu, float *db, size_t lddb);
    void (*rank_up)(size_t tokens, size_t n, size_t rank, float s, const float *u, size_t ldu,
                    const float *b, size_t ldb, float *y, size_t ldy);
} fl_gemm_f32_variant;

extern const fl_gemm_f32_variant fl_gemm_f32_variants[];

#endif
