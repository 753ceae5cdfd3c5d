// one_token_neon.h: a tile by one token, with an instruction that multiplies and adds four bytes.
// The file that includes this has defined
//     dot_4(sum, codes, x, lane)     sum[r] += codes of row r times the four bytes x.s[lane]
// for codes below 128 at least.
#include "kernels/arm/unpack_neon.h"

// sum += code n of block b by its four columns. A block's steps go in twos.
FL_INLINE int32x4_t step(int32x4_t sum, uint8x16_t codes, const int8x16_t *x, int b, int n) {
    const int s = b / 4 + 2 * n;
    return dot_4(sum, codes, x[s / 4], s % 4);
}

// 2 and 3 bits: codes are left where they lie in their byte and added up times 4 and times 16 apart
// from the others, which saves shifts. `plane` is the 2 bits', codes n and n + 2 and n + 4 and
// n + 6 of it; `more` holds the third bit of code n at bit n + 2, or is not used.
typedef struct low_sums {
    int32x4_t by_1, by_4, by_16;
} low_sums;

FL_INLINE void block_2(low_sums *a, uint8x16_t v, const int8x16_t *x, int b, int n) {
    a->by_1 = step(a->by_1, vandq_u8(v, vdupq_n_u8(0x03)), x, b, n);
    a->by_4 = step(a->by_4, vandq_u8(v, vdupq_n_u8(0x0c)), x, b, n + 2);
    a->by_16 = step(a->by_16, vandq_u8(v, vdupq_n_u8(0x30)), x, b, n + 4);
    a->by_1 = step(a->by_1, v >> 6, x, b, n + 6);
}

FL_INLINE void block_3(low_sums *a, uint8x16_t v, uint8x16_t third, const int8x16_t *x, int b,
                       int n) {
    const uint8x16_t at = third << (uint8_t)(2 - n); // of code n + 2 i at bit 2 i + 2
    const uint8x16_t middle = vbslq_u8(vdupq_n_u8(0x10), at, vandq_u8(v, vdupq_n_u8(0x0c)));
    const uint8x16_t last = vbslq_u8(vdupq_n_u8(0x04), third >> (uint8_t)(4 + n), v >> 6);
    const uint8x16_t ends = vbslq_u8(vdupq_n_u8(0x44), at, v);
    a->by_1 = step(a->by_1, vandq_u8(ends, vdupq_n_u8(0x07)), x, b, n);
    a->by_4 = step(a->by_4, middle, x, b, n + 2);
    a->by_16 = step(a->by_16, vandq_u8(ends, vdupq_n_u8(0x70)), x, b, n + 4);
    a->by_1 = step(a->by_1, last, x, b, n + 6);
}

FL_INLINE int32x4_t rows_low(const uint8_t *data, int bits, const int8x16_t *x, int i) {
    low_sums a = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
#pragma GCC unroll 2
    for (int b = i; b < 8; b += 4) {
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
            const uint8x16_t v = fl_plane_neon(data, 2, b, n);
            if (bits == 2)
                block_2(&a, v, x, b, n);
            else
                block_3(&a, v, fl_plane_neon(data + 256, 1, b, 0), x, b, n);
        }
    }
    return vsraq_n_s32(vsraq_n_s32(a.by_1, a.by_4, 2), a.by_16, 4);
}

// dot[i] of rows 4 i .. 4 i + 3, begun at `begin`.
FL_INLINE void dots_planes(const uint8_t *data, int bits, const int8_t *codes, int32_t begin,
                           uint8_t flip, int32x4_t *dot) {
    int8x16_t x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) x[i] = vld1q_s8(codes + 16 * i);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        FL_STAY();
        if (bits <= 3) {
            dot[i] = rows_low(data, bits, x, i);
            continue;
        }
        int32x4_t sum = vdupq_n_s32(begin);
#pragma GCC unroll 2
        for (int b = i; b < 8; b += 4) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) {
                const int n = j / 2 + j % 2 * 4; // both nibbles of a byte in turn
                const uint8x16_t c = fl_codes_neon(data, bits, b, n);
                sum = step(sum, flip != 0 ? veorq_u8(c, vdupq_n_u8(flip)) : c, x, b, n);
            }
        }
        dot[i] = sum;
    }
}
