// Register blocks of 16 accumulators, out of 32 registers: enough to hide the latency of a
// multiply-add on one unit (Cortex-A72) and on two (Cortex-A76).
#include "kernels/gemm_f32.h"

#include "kernels/arm/exp_neon.h"

// mt x nr elements of y, nr <= 4: four lanes along k, then the sum of the lanes. Whatever mt and nr
// are, an element sees the same operations.
FL_INLINE void nt_block(const size_t mt, const size_t nr, size_t k, const float *x, size_t ldx,
                        const float *w, size_t ldw, float *y, size_t ldy) {
    float32x4_t acc[4][4], xv[4];
    FL_UNROLL for (size_t a = 0; a < mt; a++)
        FL_UNROLL for (size_t b = 0; b < 4; b++) acc[a][b] = vdupq_n_f32(0.0f);
    size_t i = 0;
    for (; i + 4 <= k; i += 4) {
        FL_UNROLL for (size_t a = 0; a < mt; a++) xv[a] = vld1q_f32(x + a * ldx + i);
        FL_UNROLL for (size_t b = 0; b < nr; b++) {
            const float32x4_t wv = vld1q_f32(w + b * ldw + i);
            FL_UNROLL for (size_t a = 0; a < mt; a++) acc[a][b] = vfmaq_f32(acc[a][b], xv[a], wv);
        }
    }
    if (i < k) {
        FL_UNROLL for (size_t a = 0; a < mt; a++) xv[a] = fl_load4(x + a * ldx + i, k - i);
        FL_UNROLL for (size_t b = 0; b < nr; b++) {
            const float32x4_t wv = fl_load4(w + b * ldw + i, k - i);
            FL_UNROLL for (size_t a = 0; a < mt; a++) acc[a][b] = vfmaq_f32(acc[a][b], xv[a], wv);
        }
    }
    FL_UNROLL for (size_t a = 0; a < mt; a++) fl_store4(y + a * ldy, nr, fl_sum4(acc[a]));
}

FL_INLINE void nt_tokens(const size_t nr, size_t tokens, size_t k, const float *x, size_t ldx,
                         const float *w, size_t ldw, float *y, size_t ldy) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        nt_block(4, nr, k, x + t * ldx, ldx, w, ldw, y + t * ldy, ldy);
    for (; t < tokens; t++) nt_block(1, nr, k, x + t * ldx, ldx, w, ldw, y + t * ldy, ldy);
}

FL_GEMM_F32_NT(neon) {
    // Tokens in tiles of about 128 KiB stay in the second-level cache while four rows of w, in the
    // first, pass over them.
    const size_t fit = k == 0 ? tokens : FL_KIB(32) / k, tile = fit < 12 ? 12 : fit / 4 * 4;
    for (size_t t = 0; t < tokens; t += tile) {
        const size_t count = tokens - t < tile ? tokens - t : tile;
        const float *xt = x + t * ldx;
        for (size_t j = 0; j < n; j += 4) {
            const float *wj = w + j * ldw;
            float *yj = y + t * ldy + j;
            switch (n - j) {
            case 1: nt_tokens(1, count, k, xt, ldx, wj, ldw, yj, ldy); break;
            case 2: nt_tokens(2, count, k, xt, ldx, wj, ldw, yj, ldy); break;
            case 3: nt_tokens(3, count, k, xt, ldx, wj, ldw, yj, ldy); break;
            default: nt_tokens(4, count, k, xt, ldx, wj, ldw, yj, ldy); break;
            }
        }
    }
}

// mt rows by nv vectors of dx; `last` is the width of the last vector.
FL_INLINE void nn_block(const size_t mt, const size_t nv, const size_t last, size_t n,
                        const float *dy, size_t lddy, const float *w, size_t ldw, float *dx,
                        size_t lddx, bool accumulate) {
    float32x4_t acc[4][4], wv[4];
    FL_UNROLL for (size_t a = 0; a < mt; a++) {
        FL_UNROLL for (size_t b = 0; b < nv; b++) {
            acc[a][b] = vdupq_n_f32(0.0f);
            if (accumulate) acc[a][b] = fl_load4(dx + a * lddx + 4 * b, b + 1 < nv ? 4 : last);
        }
    }
    for (size_t j = 0; j < n; j++, w += ldw) {
        FL_UNROLL for (size_t b = 0; b < nv; b++)
            wv[b] = fl_load4(w + 4 * b, b + 1 < nv ? 4 : last);
        FL_UNROLL for (size_t a = 0; a < mt; a++) {
            const float g = dy[a * lddy + j];
            FL_UNROLL for (size_t b = 0; b < nv; b++)
                acc[a][b] = vfmaq_n_f32(acc[a][b], wv[b], g);
        }
    }
    FL_UNROLL for (size_t a = 0; a < mt; a++)
        FL_UNROLL for (size_t b = 0; b < nv; b++)
            fl_store4(dx + a * lddx + 4 * b, b + 1 < nv ? 4 : last, acc[a][b]);
}

FL_INLINE void nn_tokens(const size_t nv, const size_t last, size_t tokens, size_t n,
                         const float *dy, size_t lddy, const float *w, size_t ldw, float *dx,
                         size_t lddx, bool accumulate) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4, dy += 4 * lddy, dx += 4 * lddx)
        nn_block(4, nv, last, n, dy, lddy, w, ldw, dx, lddx, accumulate);
    for (; t < tokens; t++, dy += lddy, dx += lddx)
        nn_block(1, nv, last, n, dy, lddy, w, ldw, dx, lddx, accumulate);
}

FL_GEMM_F32_NN(neon) {
    size_t i = 0;
    for (; i + 16 <= k; i += 16)
        nn_tokens(4, 4, tokens, n, dy, lddy, w + i, ldw, dx + i, lddx, accumulate);
    for (; i + 4 <= k; i += 4)
        nn_tokens(1, 4, tokens, n, dy, lddy, w + i, ldw, dx + i, lddx, accumulate);
    if (i < k) nn_tokens(1, k - i, tokens, n, dy, lddy, w + i, ldw, dx + i, lddx, accumulate);
}

// nj rows of db by one vector of `width` ranks.
FL_INLINE void tn_block(const size_t nj, const size_t width, size_t tokens, const float *dy,
                        size_t lddy, const float *u, size_t ldu, float *db, size_t lddb) {
    float32x4_t acc[8];
    FL_UNROLL for (size_t b = 0; b < nj; b++) acc[b] = fl_load4(db + b * lddb, width);
    for (size_t t = 0; t < tokens; t++, dy += lddy, u += ldu) {
        const float32x4_t uv = fl_load4(u, width);
        FL_UNROLL for (size_t b = 0; b < nj; b++) acc[b] = vfmaq_n_f32(acc[b], uv, dy[b]);
    }
    FL_UNROLL for (size_t b = 0; b < nj; b++) fl_store4(db + b * lddb, width, acc[b]);
}

FL_INLINE void tn_rows(const size_t width, size_t tokens, size_t n, const float *dy, size_t lddy,
                       const float *u, size_t ldu, float *db, size_t lddb) {
    size_t j = 0;
    for (; j + 8 <= n; j += 8)
        tn_block(8, width, tokens, dy + j, lddy, u, ldu, db + j * lddb, lddb);
    for (; j < n; j++) tn_block(1, width, tokens, dy + j, lddy, u, ldu, db + j * lddb, lddb);
}

FL_GEMM_F32_TN(neon) {
    enum { TILE = 32 }; // tokens: their lines of dy stay in the first-level cache
    for (size_t t = 0; t < tokens; t += TILE) {
        const size_t count = tokens - t < TILE ? tokens - t : TILE;
        const float *g = dy + t * lddy, *ut = u + t * ldu;
        size_t r = 0;
        for (; r + 4 <= rank; r += 4) tn_rows(4, count, n, g, lddy, ut + r, ldu, db + r, lddb);
        if (r < rank) tn_rows(rank - r, count, n, g, lddy, ut + r, ldu, db + r, lddb);
    }
}

// mt rows by `cols` columns of y, at most 16; bt[rank][16].
FL_INLINE void up_block(const size_t mt, const size_t cols, size_t rank, float s, const float *u,
                        size_t ldu, const float *bt, float *y, size_t ldy) {
    float32x4_t acc[4][4];
    FL_UNROLL for (size_t a = 0; a < mt; a++)
        FL_UNROLL for (size_t b = 0; b < 4; b++) acc[a][b] = vdupq_n_f32(0.0f);
    for (size_t r = 0; r < rank; r++) {
        FL_UNROLL for (size_t b = 0; b < 4; b++) {
            const float32x4_t bv = vld1q_f32(bt + 16 * r + 4 * b);
            FL_UNROLL for (size_t a = 0; a < mt; a++)
                acc[a][b] = vfmaq_n_f32(acc[a][b], bv, u[a * ldu + r]);
        }
    }
    for (size_t a = 0; a < mt; a++) {
        FL_UNROLL for (size_t b = 0; b < 4; b++) {
            if (4 * b >= cols) break;
            float *p = y + a * ldy + 4 * b;
            fl_store4(p, cols - 4 * b, vfmaq_n_f32(fl_load4(p, cols - 4 * b), acc[a][b], s));
        }
    }
}

FL_INLINE void up_tokens(const size_t cols, size_t tokens, size_t rank, float s, const float *u,
                         size_t ldu, const float *bt, float *y, size_t ldy) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        up_block(4, cols, rank, s, u + t * ldu, ldu, bt, y + t * ldy, ldy);
    for (; t < tokens; t++) up_block(1, cols, rank, s, u + t * ldu, ldu, bt, y + t * ldy, ldy);
}

FL_GEMM_F32_RANK_UP(neon) {
    float bt[FL_RANK_MAX * 16];
    for (size_t j = 0; j < n; j += 16) {
        const size_t cols = n - j < 16 ? n - j : 16;
        for (size_t c = 0; c < 16; c++)
            for (size_t r = 0; r < rank; r++)
                bt[16 * r + c] = c < cols ? b[(j + c) * ldb + r] : 0.0f;
        if (cols == 16)
            up_tokens(16, tokens, rank, s, u, ldu, bt, y + j, ldy);
        else
            up_tokens(cols, tokens, rank, s, u, ldu, bt, y + j, ldy);
    }
}
