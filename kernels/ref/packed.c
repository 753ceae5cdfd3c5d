// The definition of the packed form. Integer code throughout: every machine writes the same bytes.
#include "kernels/packed.h"

#include "common/checked.h"

#include <string.h>

// The bit planes of each width, lowest bits first; a plane of 2^n bits is named by n.
static const struct {
    uint8_t count, log2_width[3];
} planes[FL_PACKED_BITS_MAX + 1] = {
    [2] = {1, {1}},    [3] = {2, {1, 0}},    [4] = {1, {2}}, [5] = {2, {2, 0}},
    [6] = {2, {2, 1}}, [7] = {3, {2, 1, 0}}, [8] = {1, {3}},
};

size_t fl_packed_tile_size(uint32_t bits) {
    return FL_PACKED_HEAD + (size_t)bits * (FL_PACKED_CODES / 8);
}

bool fl_packed_size(uint32_t rows, uint32_t cols, uint32_t bits, size_t *ret) {
    if (bits < FL_PACKED_BITS_MIN || bits > FL_PACKED_BITS_MAX) return false;
    const size_t panels = (size_t)rows / FL_PACKED_ROWS + (rows % FL_PACKED_ROWS != 0);
    const size_t groups = (size_t)cols / FL_PACKED_GROUP + (cols % FL_PACKED_GROUP != 0);
    size_t tiles, size;
    if (!fl_mul_size(panels, groups, &tiles)) return false;
    if (!fl_mul_size(tiles, fl_packed_tile_size(bits), &size)) return false;
    *ret = size;
    return true;
}

uint16_t fl_f16_from_f32(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof(u));
    const uint32_t sign = u >> 16 & 0x8000u, mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (mag >> 13 & 0x1ffu)); // quiet NaN
    if (mag >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); // 65520 and above round to infinity
    if (mag < 0x33000000u) return (uint16_t)sign;              // below half the least subnormal
    uint32_t kept, rest, half; // kept: the result's integer; rest: what is cut, against half a unit
    if (mag >= 0x38800000u) {
        kept = (mag - 0x38000000u) >> 13;
        rest = mag & 0x1fffu, half = 0x1000u;
    } else { // a subnormal half: units of 2^-24
        const uint32_t shift = 126 - (mag >> 23), m = (mag & 0x7fffffu) | 0x800000u;
        kept = m >> shift;
        rest = m & ((1u << shift) - 1), half = 1u << (shift - 1);
    }
    kept += rest > half || (rest == half && (kept & 1u)); // a carry into the exponent is right
    return (uint16_t)(sign | kept);
}

float fl_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, mag = h & 0x7fffu;
    uint32_t u;
    if (mag >= 0x7c00u) {
        u = 0x7f800000u | (mag & 0x3ffu) << 13 | (mag > 0x7c00u ? 0x400000u : 0u); // NaN: quiet
    } else if (mag >= 0x400u) {
        u = (mag << 13) + 0x38000000u;
    } else {
        const float exact = (float)mag * 0x1p-24f; // an integer times a power of two
        memcpy(&u, &exact, sizeof(u));
    }
    u |= sign;
    float v;
    memcpy(&v, &u, sizeof(v));
    return v;
}

// Place of weight (row, k) of a tile in the order of the codes.
static size_t code_index(size_t row, size_t k) {
    return k / 4 * 64 + row * 4 + k % 4;
}

// Where a plane of 2^log2 bits keeps code i: the byte, and the bit in it.
static size_t plane_byte(unsigned log2, size_t i) {
    return i & (((size_t)128 << log2) - 1);
}

static unsigned plane_bit(unsigned log2, size_t i) {
    return (unsigned)(i >> (7 + log2) << log2);
}

static uint8_t code_get(const uint8_t *data, uint32_t bits, size_t i) {
    unsigned code = 0, shift = 0;
    for (int n = 0; n < planes[bits].count; n++) {
        const unsigned log2 = planes[bits].log2_width[n], width = 1u << log2;
        const unsigned byte = data[plane_byte(log2, i)];
        code |= (byte >> plane_bit(log2, i) & ((1u << width) - 1)) << shift;
        shift += width;
        data += (size_t)128 << log2;
    }
    return (uint8_t)code;
}

static void code_or(uint8_t *data, uint32_t bits, size_t i, unsigned code) {
    for (int n = 0; n < planes[bits].count; n++) {
        const unsigned log2 = planes[bits].log2_width[n], width = 1u << log2;
        const unsigned part = code & ((1u << width) - 1);
        data[plane_byte(log2, i)] |= (uint8_t)(part << plane_bit(log2, i));
        code >>= width;
        data += (size_t)128 << log2;
    }
}

void fl_packed_tile_write(uint8_t *tile, uint32_t bits, const uint8_t *codes, const uint16_t *scale,
                          const uint16_t *minimum) {
    memset(tile, 0, fl_packed_tile_size(bits));
    for (size_t r = 0; r < FL_PACKED_ROWS; r++) {
        fl_put_u16(tile + 2 * r, scale[r]);
        fl_put_u16(tile + 32 + 2 * r, minimum[r]);
        for (size_t k = 0; k < FL_PACKED_GROUP; k++)
            code_or(tile + FL_PACKED_HEAD, bits, code_index(r, k), codes[r * FL_PACKED_GROUP + k]);
    }
}

void fl_packed_tile_read(const uint8_t *tile, uint32_t bits, uint8_t *codes, uint16_t *scale,
                         uint16_t *minimum) {
    for (size_t r = 0; r < FL_PACKED_ROWS; r++) {
        scale[r] = fl_get_u16(tile + 2 * r);
        minimum[r] = fl_get_u16(tile + 32 + 2 * r);
        for (size_t k = 0; k < FL_PACKED_GROUP; k++)
            codes[r * FL_PACKED_GROUP + k] =
                code_get(tile + FL_PACKED_HEAD, bits, code_index(r, k));
    }
}

void fl_packed_row(const fl_packed *w, uint32_t row, float *out) {
    const size_t groups = (w->cols + (size_t)FL_PACKED_GROUP - 1) / FL_PACKED_GROUP;
    const size_t r = row % FL_PACKED_ROWS, tile_size = fl_packed_tile_size(w->bits);
    const uint8_t *tile = w->data + row / FL_PACKED_ROWS * groups * tile_size;
    for (size_t k = 0; k < w->cols; k++) {
        if (k != 0 && k % FL_PACKED_GROUP == 0) tile += tile_size;
        const size_t i = code_index(r, k % FL_PACKED_GROUP);
        const float code = (float)code_get(tile + FL_PACKED_HEAD, w->bits, i);
        out[k] = fl_f16_to_f32(fl_get_u16(tile + 2 * r)) * code;
        out[k] += fl_f16_to_f32(fl_get_u16(tile + 32 + 2 * r));
    }
}
