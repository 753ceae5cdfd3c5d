// packed.h: the one packed form of a weight matrix W[rows][cols] with 2 to 8 bits a weight.
//
// Every kernel reads this form as it lies in the mapped file, forward (Y = X W^T) and backward
// (dX = dY W); there is no second copy.
//
//   Groups    FL_PACKED_GROUP = 64 weights along a row share an fp16 scale and an fp16 minimum:
//             w = scale * code + minimum, code an unsigned integer below 2^bits.
//   Tiles     FL_PACKED_ROWS = 16 rows by one group of 64 columns, one row panel after the other:
//             all column groups of rows 0..15, then of rows 16..31, ...
//   A tile    16 fp16 scales (32 bytes), 16 fp16 minima (32 bytes), then 1024 codes in bit planes.
//             Code number i of a tile, i = (k / 4) * 64 + row * 4 + k % 4, so that 64 consecutive
//             codes are 16 rows by 4 columns: one step of an integer dot product.
//   Planes    bits 2 = {2}, 3 = {2,1}, 4 = {4}, 5 = {4,1}, 6 = {4,2}, 7 = {4,2,1}; at 8 bits a
//             code is a byte. The first plane holds the low bits. A plane of p bits has 128 * p
//             bytes; its byte j holds codes j + n * 128 * p, n = 0 .. 8/p - 1, code n at bit n * p.
//   Padding   rows are padded to 16, columns to 64; padded codes, scales and minima are zero.
//   Size      tiles * (64 + 128 * bits) bytes; 64-byte aligned. Bits a weight: bits + 0.5.
#ifndef FL_KERNELS_PACKED_H
#define FL_KERNELS_PACKED_H

#include "common/base.h"

enum {
    FL_PACKED_GROUP = 64,
    FL_PACKED_ROWS = 16,
    FL_PACKED_CODES = FL_PACKED_GROUP * FL_PACKED_ROWS,
    FL_PACKED_HEAD = 64, // bytes of scales and minima before a tile's codes
    FL_PACKED_BITS_MIN = 2,
    FL_PACKED_BITS_MAX = 8,
};

// DO(width) with the width as a constant, so that code forced inline is made for each of them.
#define FL_PACKED_WITH_BITS(bits, DO)                                                              \
    switch (bits) {                                                                                \
    case 2:                                                                                        \
        DO(2);                                                                                     \
        break;                                                                                     \
    case 3:                                                                                        \
        DO(3);                                                                                     \
        break;                                                                                     \
    case 4:                                                                                        \
        DO(4);                                                                                     \
        break;                                                                                     \
    case 5:                                                                                        \
        DO(5);                                                                                     \
        break;                                                                                     \
    case 6:                                                                                        \
        DO(6);                                                                                     \
        break;                                                                                     \
    case 7:                                                                                        \
        DO(7);                                                                                     \
        break;                                                                                     \
    default:                                                                                       \
        DO(8);                                                                                     \
        break;                                                                                     \
    }

// A borrowed view of a packed matrix.
typedef struct fl_packed {
    const uint8_t *data; // 64-byte aligned
    uint32_t rows, cols; // unpadded
    uint32_t bits;
} fl_packed;

size_t fl_packed_tile_size(uint32_t bits);
// Bytes of the whole matrix; false when it would overflow or bits is out of range.
bool fl_packed_size(uint32_t rows, uint32_t cols, uint32_t bits, size_t *ret) FL_NODISCARD;

// IEEE half precision, round to nearest even; integer code, the same bits on every machine.
uint16_t fl_f16_from_f32(float v);
float fl_f16_to_f32(uint16_t h);

// Writes one tile. codes[16][64] row-major (each < 2^bits), scale[16], minimum[16] as fp16 bits.
void fl_packed_tile_write(uint8_t *tile, uint32_t bits, const uint8_t *codes, const uint16_t *scale,
                          const uint16_t *minimum);
// The definition of the form: one tile back to codes[16][64], scale[16], minimum[16].
void fl_packed_tile_read(const uint8_t *tile, uint32_t bits, uint8_t *codes, uint16_t *scale,
                         uint16_t *minimum);
// Row r as floats, out[cols]. Used for embeddings, exports and tests.
void fl_packed_row(const fl_packed *w, uint32_t row, float *out);

#endif
