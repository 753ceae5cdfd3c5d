// Built with -mavx2 -mfma. Register blocks of 12 accumulators: two multiply-adds a cycle with a
// latency of four need at least eight; 16 registers leave four for operands.
#include "kernels/gemm_f32.h"

#include <immintrin.h>

#define INLINE                  static inline __attribute__((always_inline))
#define UNROLL                  _Pragma("GCC unroll 8")
#define MULTIPLY_ADD(sum, x, y) ((sum) = _mm256_fmadd_ps(x, y, sum))

static const int32_t mask_bits[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

// Lanes 0 .. n-1, n = 0..8.
INLINE __m256i mask_of(size_t n) {
    return _mm256_loadu_si256((const __m256i *)(const void *)(mask_bits + 8 - n));
}

// A masked store costs many times a plain one, so full vectors must not pay for the last one's
// mask.
INLINE __m256 load(const float *p, const bool tail, __m256i mask) {
    return tail ? _mm256_maskload_ps(p, mask) : _mm256_loadu_ps(p);
}

INLINE void store(float *p, const bool tail, __m256i mask, __m256 v) {
    if (tail)
        _mm256_maskstore_ps(p, mask, v);
    else
        _mm256_storeu_ps(p, v);
}

// Sums of the lanes of four vectors; each is ((0+4) + (1+5)) + ((2+6) + (3+7)).
INLINE __m128 sum4(const __m256 *v) {
    __m128 h[4];
    UNROLL for (int i = 0; i < 4; i++) h[i] =
        _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
    return _mm_hadd_ps(_mm_hadd_ps(h[0], h[1]), _mm_hadd_ps(h[2], h[3]));
}

// mt x nr elements of y, nr <= 4: eight lanes along k, then the sum of the lanes. Whatever mt and
// nr are, an element sees the same operations.
INLINE void nt_block(const size_t mt, const size_t nr, size_t k, const float *x, size_t ldx,
                     const float *w, size_t ldw, float *y, size_t ldy) {
    __m256 acc[3][4], xv[3];
    UNROLL for (size_t a = 0; a < mt; a++) UNROLL for (size_t b = 0; b < 4; b++) acc[a][b] =
        _mm256_setzero_ps();
    size_t i = 0;
    for (; i + 8 <= k; i += 8) {
        UNROLL for (size_t a = 0; a < mt; a++) xv[a] = _mm256_loadu_ps(x + a * ldx + i);
        UNROLL for (size_t b = 0; b < nr; b++) {
            const __m256 wv = _mm256_loadu_ps(w + b * ldw + i);
            UNROLL for (size_t a = 0; a < mt; a++) MULTIPLY_ADD(acc[a][b], xv[a], wv);
        }
    }
    if (i < k) {
        const __m256i mask = mask_of(k - i);
        UNROLL for (size_t a = 0; a < mt; a++) xv[a] = _mm256_maskload_ps(x + a * ldx + i, mask);
        UNROLL for (size_t b = 0; b < nr; b++) {
            const __m256 wv = _mm256_maskload_ps(w + b * ldw + i, mask);
            UNROLL for (size_t a = 0; a < mt; a++) MULTIPLY_ADD(acc[a][b], xv[a], wv);
        }
    }
    UNROLL for (size_t a = 0; a < mt; a++) {
        if (nr == 4)
            _mm_storeu_ps(y + a * ldy, sum4(acc[a]));
        else
            _mm_maskstore_ps(y + a * ldy, _mm256_castsi256_si128(mask_of(nr)), sum4(acc[a]));
    }
}

INLINE void nt_tokens(const size_t nr, size_t tokens, size_t k, const float *x, size_t ldx,
                      const float *w, size_t ldw, float *y, size_t ldy) {
    size_t t = 0;
    for (; t + 3 <= tokens; t += 3) nt_block(3, nr, k, x + t * ldx, ldx, w, ldw, y + t * ldy, ldy);
    if (tokens - t == 2) nt_block(2, nr, k, x + t * ldx, ldx, w, ldw, y + t * ldy, ldy);
    if (tokens - t == 1) nt_block(1, nr, k, x + t * ldx, ldx, w, ldw, y + t * ldy, ldy);
}

FL_GEMM_F32_NT(avx2) {
    // Tokens in tiles of about 128 KiB stay in the second-level cache while four rows of w, in the
    // first, pass over them.
    const size_t fit = k == 0 ? tokens : FL_KIB(32) / k, tile = fit < 12 ? 12 : fit / 3 * 3;
    for (size_t t = 0; t < tokens; t += tile) {
        const size_t count = tokens - t < tile ? tokens - t : tile;
        const float *xt = x + t * ldx;
        for (size_t j = 0; j < n; j += 4) {
            const float *wj = w + j * ldw;
            float *yj = y + t * ldy + j;
            switch (n - j) {
            case 1:
                nt_tokens(1, count, k, xt, ldx, wj, ldw, yj, ldy);
                break;
            case 2:
                nt_tokens(2, count, k, xt, ldx, wj, ldw, yj, ldy);
                break;
            case 3:
                nt_tokens(3, count, k, xt, ldx, wj, ldw, yj, ldy);
                break;
            default:
                nt_tokens(4, count, k, xt, ldx, wj, ldw, yj, ldy);
                break;
            }
        }
    }
}

// mt rows by nv vectors of dx; the last vector is masked when `tail`.
INLINE void nn_block(const size_t mt, const size_t nv, const bool tail, __m256i mask, size_t n,
                     const float *dy, size_t lddy, const float *w, size_t ldw, float *dx,
                     size_t lddx, bool accumulate) {
    __m256 acc[4][3], wv[3];
    UNROLL for (size_t a = 0; a < mt; a++) {
        UNROLL for (size_t b = 0; b < nv; b++) {
            const float *p = dx + a * lddx + 8 * b;
            acc[a][b] = _mm256_setzero_ps();
            if (accumulate) acc[a][b] = load(p, tail && b == nv - 1, mask);
        }
    }
    for (size_t j = 0; j < n; j++, w += ldw) {
        UNROLL for (size_t b = 0; b < nv; b++) wv[b] = load(w + 8 * b, tail && b == nv - 1, mask);
        UNROLL for (size_t a = 0; a < mt; a++) {
            const __m256 g = _mm256_broadcast_ss(dy + a * lddy + j);
            UNROLL for (size_t b = 0; b < nv; b++) MULTIPLY_ADD(acc[a][b], g, wv[b]);
        }
    }
    UNROLL for (size_t a = 0; a < mt; a++) {
        UNROLL for (size_t b = 0; b < nv; b++)
            store(dx + a * lddx + 8 * b, tail && b == nv - 1, mask, acc[a][b]);
    }
}

INLINE void nn_tokens(const size_t nv, const bool tail, size_t cols, size_t tokens, size_t n,
                      const float *dy, size_t lddy, const float *w, size_t ldw, float *dx,
                      size_t lddx, bool accumulate) {
    const __m256i mask = mask_of(cols - 8 * (nv - 1));
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4, dy += 4 * lddy, dx += 4 * lddx)
        nn_block(4, nv, tail, mask, n, dy, lddy, w, ldw, dx, lddx, accumulate);
    for (; t < tokens; t++, dy += lddy, dx += lddx)
        nn_block(1, nv, tail, mask, n, dy, lddy, w, ldw, dx, lddx, accumulate);
}

// `cols` columns, at most 24.
static void nn_columns(size_t cols, size_t tokens, size_t n, const float *dy, size_t lddy,
                       const float *w, size_t ldw, float *dx, size_t lddx, bool accumulate) {
    if (cols == 24)
        nn_tokens(3, false, cols, tokens, n, dy, lddy, w, ldw, dx, lddx, accumulate);
    else if (cols > 16)
        nn_tokens(3, true, cols, tokens, n, dy, lddy, w, ldw, dx, lddx, accumulate);
    else if (cols > 8)
        nn_tokens(2, true, cols, tokens, n, dy, lddy, w, ldw, dx, lddx, accumulate);
    else
        nn_tokens(1, true, cols, tokens, n, dy, lddy, w, ldw, dx, lddx, accumulate);
}

// A block of columns of w lies in one page and cache set after the other; when many tokens read
// it, a copy of 64 rows side by side is cheaper.
static void nn_packed(size_t cols, size_t tokens, size_t n, const float *dy, size_t lddy,
                      const float *w, size_t ldw, float *dx, size_t lddx, bool accumulate) {
    enum { ROWS = 64 };
    float block[ROWS * 24];
    for (size_t j = 0; j < n; j += ROWS) {
        const size_t count = n - j < ROWS ? n - j : ROWS;
        for (size_t r = 0; r < count; r++)
            for (size_t c = 0; c < cols; c++) block[24 * r + c] = w[(j + r) * ldw + c];
        nn_columns(cols, tokens, count, dy + j, lddy, block, 24, dx, lddx, accumulate || j > 0);
    }
}

FL_GEMM_F32_NN(avx2) {
    for (size_t i = 0; i < k; i += 24) {
        const size_t cols = k - i < 24 ? k - i : 24;
        if (tokens >= 64 && n > 0)
            nn_packed(cols, tokens, n, dy, lddy, w + i, ldw, dx + i, lddx, accumulate);
        else
            nn_columns(cols, tokens, n, dy, lddy, w + i, ldw, dx + i, lddx, accumulate);
    }
}

// nj rows of db by one vector of ranks.
INLINE void tn_block(const size_t nj, const bool tail, __m256i mask, size_t tokens, const float *dy,
                     size_t lddy, const float *u, size_t ldu, float *db, size_t lddb) {
    __m256 acc[8];
    UNROLL for (size_t b = 0; b < nj; b++) acc[b] = load(db + b * lddb, tail, mask);
    for (size_t t = 0; t < tokens; t++, dy += lddy, u += ldu) {
        const __m256 uv = load(u, tail, mask);
        UNROLL for (size_t b = 0; b < nj; b++) acc[b] =
            _mm256_fmadd_ps(_mm256_broadcast_ss(dy + b), uv, acc[b]);
    }
    UNROLL for (size_t b = 0; b < nj; b++) store(db + b * lddb, tail, mask, acc[b]);
}

INLINE void tn_rows(const bool tail, __m256i mask, size_t tokens, size_t n, const float *dy,
                    size_t lddy, const float *u, size_t ldu, float *db, size_t lddb) {
    size_t j = 0;
    for (; j + 8 <= n; j += 8)
        tn_block(8, tail, mask, tokens, dy + j, lddy, u, ldu, db + j * lddb, lddb);
    for (; j < n; j++) tn_block(1, tail, mask, tokens, dy + j, lddy, u, ldu, db + j * lddb, lddb);
}

FL_GEMM_F32_TN(avx2) {
    enum { TILE = 32 }; // tokens: their lines of dy stay in the first-level cache
    for (size_t t = 0; t < tokens; t += TILE) {
        const size_t count = tokens - t < TILE ? tokens - t : TILE;
        const float *g = dy + t * lddy, *ut = u + t * ldu;
        size_t r = 0;
        for (; r + 8 <= rank; r += 8)
            tn_rows(false, mask_of(8), count, n, g, lddy, ut + r, ldu, db + r, lddb);
        if (r < rank)
            tn_rows(true, mask_of(rank - r), count, n, g, lddy, ut + r, ldu, db + r, lddb);
    }
}

// mt rows by 16 columns, the columns under two masks when `tail`; bt[rank][16].
INLINE void up_block(const size_t mt, const bool tail, const __m256i *mask, size_t rank, __m256 s,
                     const float *u, size_t ldu, const float *bt, float *y, size_t ldy) {
    __m256 acc[4][2];
    UNROLL for (size_t a = 0; a < mt; a++) acc[a][0] = acc[a][1] = _mm256_setzero_ps();
    for (size_t r = 0; r < rank; r++) {
        const __m256 b0 = _mm256_loadu_ps(bt + 16 * r), b1 = _mm256_loadu_ps(bt + 16 * r + 8);
        UNROLL for (size_t a = 0; a < mt; a++) {
            const __m256 uv = _mm256_broadcast_ss(u + a * ldu + r);
            acc[a][0] = _mm256_fmadd_ps(uv, b0, acc[a][0]);
            acc[a][1] = _mm256_fmadd_ps(uv, b1, acc[a][1]);
        }
    }
    UNROLL for (size_t a = 0; a < mt; a++) {
        UNROLL for (size_t b = 0; b < 2; b++) {
            float *p = y + a * ldy + 8 * b;
            store(p, tail, mask[b], _mm256_fmadd_ps(s, acc[a][b], load(p, tail, mask[b])));
        }
    }
}

INLINE void up_tokens(const bool tail, const __m256i *mask, size_t tokens, size_t rank, __m256 s,
                      const float *u, size_t ldu, const float *bt, float *y, size_t ldy) {
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        up_block(4, tail, mask, rank, s, u + t * ldu, ldu, bt, y + t * ldy, ldy);
    for (; t < tokens; t++)
        up_block(1, tail, mask, rank, s, u + t * ldu, ldu, bt, y + t * ldy, ldy);
}

// ret[r][c] = b[c][r] for 8 by 8 floats; rows of ret are 16 apart.
static void turn_8(const float *b, size_t ldb, float *ret) {
    __m256 h[8]; // h[i]: columns 0..3 of row i, then of row i + 4; h[i + 4]: columns 4..7
    UNROLL for (size_t i = 0; i < 4; i++) {
        const float *low = b + i * ldb, *high = b + (i + 4) * ldb;
        h[i] =
            _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        h[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)),
                                        _mm_loadu_ps(high + 4), 1);
    }
    UNROLL for (size_t half = 0; half < 2; half++) {
        const __m256 *q = h + 4 * half;
        const __m256 a = _mm256_unpacklo_ps(q[0], q[1]), c = _mm256_unpackhi_ps(q[0], q[1]);
        const __m256 d = _mm256_unpacklo_ps(q[2], q[3]), e = _mm256_unpackhi_ps(q[2], q[3]);
        float *to = ret + 64 * half;
        _mm256_storeu_ps(to, _mm256_shuffle_ps(a, d, 0x44));
        _mm256_storeu_ps(to + 16, _mm256_shuffle_ps(a, d, 0xee));
        _mm256_storeu_ps(to + 32, _mm256_shuffle_ps(c, e, 0x44));
        _mm256_storeu_ps(to + 48, _mm256_shuffle_ps(c, e, 0xee));
    }
}

// bt[rank][16] from the first `cols` rows of b; the rest is zero.
static void turn_rows(size_t rank, size_t cols, const float *b, size_t ldb, float *bt) {
    size_t r = 0;
    for (; r + 8 <= rank && cols == 16; r += 8) {
        turn_8(b + r, ldb, bt + 16 * r);
        turn_8(b + 8 * ldb + r, ldb, bt + 16 * r + 8);
    }
    for (; r < rank; r++)
        for (size_t c = 0; c < 16; c++) bt[16 * r + c] = c < cols ? b[c * ldb + r] : 0.0f;
}

FL_GEMM_F32_RANK_UP(avx2) {
    float bt[FL_RANK_MAX * 16];
    const __m256 sv = _mm256_set1_ps(s);
    for (size_t j = 0; j < n; j += 16) {
        const size_t cols = n - j < 16 ? n - j : 16;
        const __m256i mask[2] = {mask_of(cols < 8 ? cols : 8), mask_of(cols < 8 ? 0 : cols - 8)};
        turn_rows(rank, cols, b + j * ldb, ldb, bt);
        if (cols == 16)
            up_tokens(false, mask, tokens, rank, sv, u, ldu, bt, y + j, ldy);
        else
            up_tokens(true, mask, tokens, rank, sv, u, ldu, bt, y + j, ldy);
    }
}
