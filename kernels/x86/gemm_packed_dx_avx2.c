// A register block of 6 tokens by 16 columns runs down a strip of the float panel.
#include "kernels/dx_loop.h"
#include "kernels/x86/unpack_avx2.h"

enum { TOKENS = 6, STRIP = FL_DX_STRIP };

FL_INLINE __m128i quarter(const uint8_t *codes, size_t step, size_t row) {
    return _mm_load_si128((const __m128i *)(const void *)(codes + 64 * step + 4 * row));
}

FL_INLINE void floats(__m128i codes, __m256 scale, __m256 minimum, float *out) {
    const __m256 a = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
    const __m256 b = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)));
    _mm256_store_ps(out, _mm256_add_ps(_mm256_mul_ps(scale, a), minimum));
    _mm256_store_ps(out + 8, _mm256_add_ps(_mm256_mul_ps(scale, b), minimum));
}

// One tile's 16 rows of the panel. A step's 64 bytes hold 4 columns of each row: four steps give a
// 4 x 4 transposition of 32-bit words for every 4 rows.
static void dequantise(const uint8_t *tile, const uint8_t *codes, float *panel) {
    _Alignas(32) float scale[FL_PACKED_ROWS], minimum[FL_PACKED_ROWS];
    _mm256_store_ps(scale, fl_halves_avx2(tile));
    _mm256_store_ps(scale + 8, fl_halves_avx2(tile + 16));
    _mm256_store_ps(minimum, fl_halves_avx2(tile + 32));
    _mm256_store_ps(minimum + 8, fl_halves_avx2(tile + 48));
    for (size_t strip = 0; strip < FL_PACKED_GROUP / STRIP; strip++) {
        for (size_t row = 0; row < FL_PACKED_ROWS; row += 4) {
            const __m128i a = quarter(codes, 4 * strip, row),
                          b = quarter(codes, 4 * strip + 1, row);
            const __m128i c = quarter(codes, 4 * strip + 2, row);
            const __m128i d = quarter(codes, 4 * strip + 3, row);
            const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
            const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
            const __m128i r[4] = {
                _mm_unpacklo_epi64(ab_low, cd_low), _mm_unpackhi_epi64(ab_low, cd_low),
                _mm_unpacklo_epi64(ab_high, cd_high), _mm_unpackhi_epi64(ab_high, cd_high)};
#pragma GCC unroll 4
            for (size_t i = 0; i < 4; i++)
                floats(r[i], _mm256_broadcast_ss(scale + row + i),
                       _mm256_broadcast_ss(minimum + row + i),
                       panel + strip * FL_DX_STRIP_SIZE + (row + i) * STRIP);
        }
    }
}

static void unpack(const uint8_t *data, uint32_t bits, uint8_t *codes) {
#define UNPACK(width) fl_unpack_avx2(data, width, codes)
    FL_PACKED_WITH_BITS(bits, UNPACK)
#undef UNPACK
}

// sum[tokens][2] += dy[tokens] of the rows times a strip: of its first rows, or of those listed.
FL_INLINE void add_rows(int tokens, const float *strip, const fl_dx_rows *rows, bool listed,
                        const float *dy, size_t dy_stride, __m256 *sum) {
#pragma GCC unroll 1
    for (size_t i = 0; i < rows->count; i++) {
        const size_t r = listed ? rows->row[i] : i;
        const __m256 w0 = _mm256_load_ps(strip + r * STRIP);
        const __m256 w1 = _mm256_load_ps(strip + r * STRIP + 8);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; t++) {
            const __m256 d = _mm256_broadcast_ss(dy + (size_t)t * dy_stride + r);
            sum[2 * t] = _mm256_fmadd_ps(d, w0, sum[2 * t]);
            sum[2 * t + 1] = _mm256_fmadd_ps(d, w1, sum[2 * t + 1]);
        }
    }
}

// dx[tokens][16] (+)= dy[tokens][rows] times a strip.
FL_INLINE void block(int tokens, const float *strip, const fl_dx_rows *rows, const float *dy,
                     size_t dy_stride, float *dx, size_t dx_stride, bool accumulate) {
    __m256 sum[2 * TOKENS];
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
        const float *old = dx + (size_t)t * dx_stride;
        sum[2 * t] = accumulate ? _mm256_loadu_ps(old) : _mm256_setzero_ps();
        sum[2 * t + 1] = accumulate ? _mm256_loadu_ps(old + 8) : _mm256_setzero_ps();
    }
    if (rows->all)
        add_rows(tokens, strip, rows, false, dy, dy_stride, sum);
    else
        add_rows(tokens, strip, rows, true, dy, dy_stride, sum);
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
        _mm256_storeu_ps(dx + (size_t)t * dx_stride, sum[2 * t]);
        _mm256_storeu_ps(dx + (size_t)t * dx_stride + 8, sum[2 * t + 1]);
    }
}

#define BLOCK(n)                                                                                   \
    static void block_##n(const float *strip, const fl_dx_rows *rows, const float *dy,             \
                          size_t dy_stride, float *dx, size_t dx_stride, bool accumulate) {        \
        block(n, strip, rows, dy, dy_stride, dx, dx_stride, accumulate);                           \
    }
BLOCK(1)
BLOCK(2)
BLOCK(3)
BLOCK(4)
BLOCK(5)
BLOCK(6)
#undef BLOCK

static void block_any(uint32_t tokens, const float *strip, const fl_dx_rows *rows, const float *dy,
                      size_t dy_stride, float *dx, size_t dx_stride, bool accumulate) {
    static void (*const blocks[])(const float *, const fl_dx_rows *, const float *, size_t, float *,
                                  size_t,
                                  bool) = {block_1, block_2, block_3, block_4, block_5, block_6};
    blocks[tokens - 1](strip, rows, dy, dy_stride, dx, dx_stride, accumulate);
}

static void tile_floats(const uint8_t *tile, uint32_t bits, float *panel) {
    _Alignas(64) uint8_t codes[FL_PACKED_CODES];
    unpack(tile + FL_PACKED_HEAD, bits, codes);
    dequantise(tile, codes, panel);
}

void fl_gemm_packed_dx_avx2(const fl_packed *w, const fl_packed_range *range, uint32_t tokens,
                            const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                            bool accumulate, void *scratch) {
    static const fl_dx_ops ops = {.tokens_max = TOKENS, .tile = tile_floats, .block = block_any};
    fl_dx_loop(&ops, w, range, tokens, dy, dy_stride, dx, dx_stride, accumulate, scratch);
}
