// Goal: the packed form is what packed.h says, byte for byte, for every width; half precision is
// IEEE. Method: bytes worked out by hand; a round trip of random tiles; every one of the 65536
// halves; the spacing of halves recomputed in double; buffers that end at a guard page.
#include "kernels/packed.h"
#include "tests/check.h"

static uint16_t random_half(void) {
    return fl_f16_from_f32(t_randf());
}

static void test_planes_are_as_documented(void) {
    uint8_t codes[16 * 64] = {0}, tile[64 + 128 * 8];
    uint16_t scale[16], minimum[16];
    for (unsigned r = 0; r < 16; r++) {
        scale[r] = (uint16_t)(0x0100 + r), minimum[r] = (uint16_t)(0x8200 + r);
    }
    codes[0 * 64 + 0] = 0x55;  // row 0, column 0: code 0
    codes[1 * 64 + 2] = 0x2b;  // row 1, column 2: code 0 * 64 + 1 * 4 + 2 = 6
    codes[3 * 64 + 34] = 0x7f; // row 3, column 34: code 8 * 64 + 3 * 4 + 2 = 526
    fl_packed_tile_write(tile, 7, codes, scale, minimum);
    T_EQ(tile[0], 0x00);
    T_EQ(tile[1], 0x01); // scales, little-endian
    T_EQ(tile[30], 0x0f);
    T_EQ(tile[31], 0x01);
    T_EQ(tile[32], 0x00);
    T_EQ(tile[33], 0x82);
    T_EQ(tile[62], 0x0f);
    T_EQ(tile[63], 0x82);
    const uint8_t *p4 = tile + 64, *p2 = p4 + 512, *p1 = p2 + 256;
    T_EQ(p4[0], 0x05);  // code 0: low nibble of byte 0 (0x55 & 15)
    T_EQ(p4[6], 0x0b);  // code 6
    T_EQ(p4[14], 0xf0); // code 526 = 14 + 512: high nibble of byte 14
    T_EQ(p2[0], 0x01);  // (0x55 >> 4) & 3 = 1
    T_EQ(p2[6], 0x02);  // (0x2b >> 4) & 3 = 2
    T_EQ(p2[14], 0x30); // code 526 = 14 + 2 * 256: bits 4 and 5
    T_EQ(p1[0], 0x01);  // 0x55 >> 6 = 1
    T_EQ(p1[6], 0x00);
    T_EQ(p1[14], 0x10); // code 526 = 14 + 4 * 128: bit 4
    size_t nonzero = 0;
    for (size_t i = 64; i < 64 + 128 * 7; i++) nonzero += tile[i] != 0;
    T_EQ(nonzero, 8);
}

static void test_width_orders_its_planes(void) {
    static const struct {
        uint32_t bits;
        size_t offset[3],
            byte[3]; // where code 1000's planes lie, and what the byte is for all ones
    } wanted[] = {
        {2, {1000 % 256}, {0xc0}}, // 1000 = 232 + 3 * 256: bits 6 and 7
        {3, {1000 % 256, 256 + 1000 % 128}, {0xc0, 0x80}},
        {4, {1000 % 512}, {0xf0}},
        {5, {1000 % 512, 512 + 1000 % 128}, {0xf0, 0x80}},
        {6, {1000 % 512, 512 + 1000 % 256}, {0xf0, 0xc0}},
        {7, {1000 % 512, 512 + 1000 % 256, 768 + 1000 % 128}, {0xf0, 0xc0, 0x80}},
        {8, {1000}, {0xff}},
    };
    for (size_t n = 0; n < sizeof(wanted) / sizeof(wanted[0]); n++) {
        uint8_t codes[16 * 64] = {0}, want[64 + 128 * 8] = {0}, tile[64 + 128 * 8] = {0};
        const uint16_t none[16] = {0};
        // Code 1000 = 15 * 64 + 10 * 4 + 0: row 10, column 60.
        codes[10 * 64 + 60] = (uint8_t)((1u << wanted[n].bits) - 1);
        for (size_t i = 0; i < 3 && wanted[n].byte[i] != 0; i++)
            want[64 + wanted[n].offset[i]] = (uint8_t)wanted[n].byte[i];
        fl_packed_tile_write(tile, wanted[n].bits, codes, none, none);
        T_CHECK(memcmp(tile, want, sizeof(want)) == 0, "bits=%u", wanted[n].bits);
    }
}

static void test_tile_round_trip(void) {
    for (uint32_t bits = 2; bits <= 8; bits++) {
        const size_t size = fl_packed_tile_size(bits);
        T_EQ(size, 64 + 128 * bits);
        uint8_t *tile = t_guarded(size), *codes = t_guarded(1024), *got = t_guarded(1024);
        uint16_t *scale = t_guarded(32), *minimum = t_guarded(32);
        uint16_t got_scale[16], got_minimum[16];
        for (int run = 0; run < 20; run++) {
            for (size_t i = 0; i < 1024; i++) codes[i] = (uint8_t)(t_rand() >> (64 - bits));
            for (size_t i = 0; i < 16; i++) scale[i] = random_half(), minimum[i] = random_half();
            memset(tile, 0xa5, size); // old content must not shine through
            fl_packed_tile_write(tile, bits, codes, scale, minimum);
            fl_packed_tile_read(tile, bits, got, got_scale, got_minimum);
            T_CHECK(memcmp(got, codes, 1024) == 0, "bits=%u", bits);
            T_CHECK(memcmp(got_scale, scale, 32) == 0, "bits=%u", bits);
            T_CHECK(memcmp(got_minimum, minimum, 32) == 0, "bits=%u", bits);
        }
        t_guarded_free(tile, size);
        t_guarded_free(codes, 1024), t_guarded_free(got, 1024);
        t_guarded_free(scale, 32), t_guarded_free(minimum, 32);
    }
}

static void test_size_is_checked(void) {
    size_t size = 7;
    T_CHECK(fl_packed_size(1, 1, 4, &size), "one weight");
    T_EQ(size, 576);
    T_CHECK(fl_packed_size(17, 65, 2, &size), "four tiles");
    T_EQ(size, 4 * 320);
    T_CHECK(fl_packed_size(49152, 576, 8, &size), "a head");
    T_EQ(size, 3072ull * 9 * 1088);
    T_CHECK(fl_packed_size(0, 5, 3, &size), "no rows");
    T_EQ(size, 0);
    size = 7;
    T_CHECK(!fl_packed_size(1, 1, 1, &size), "too few bits");
    T_CHECK(!fl_packed_size(1, 1, 9, &size), "too many bits");
    T_CHECK(!fl_packed_size(1, 1, UINT32_MAX, &size), "absurd bits");
    // 2^28 panels of 2^26 tiles of 1088 bytes: just above 2^64.
    T_CHECK(!fl_packed_size(UINT32_MAX, UINT32_MAX, 8, &size), "must not wrap");
    T_EQ(size, 7);
}

// The value of a half, from the definition of the format.
static double half_value(uint16_t h) {
    const double sign = h & 0x8000u ? -1.0 : 1.0;
    const int e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return m != 0 ? NAN : sign * INFINITY;
    return sign * (e == 0 ? ldexp(m, -24) : ldexp(1024 + m, e - 25));
}

static void test_every_half(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        const float v = fl_f16_to_f32((uint16_t)h);
        const double want = half_value((uint16_t)h);
        if (isnan(want)) {
            T_CHECK(isnan(v), "h=%04x", h);
            T_CHECK((fl_f16_from_f32(v) & 0x7e00) == 0x7e00, "h=%04x", h);
            continue;
        }
        T_CHECK((double)v == want && (signbit(v) != 0) == (h >> 15 != 0), "h=%04x", h);
        T_EQ(fl_f16_from_f32(v), h);
    }
}

// Between two neighbouring halves: below the middle down, above it up, the middle to the even one.
static void test_halves_round_to_even(void) {
    for (uint32_t h = 0; h < 0x7c00; h++) {
        const double low = half_value((uint16_t)h);
        const double high = h + 1 == 0x7c00 ? 65536.0 : half_value((uint16_t)(h + 1));
        const float mid = (float)((low + high) / 2); // exact: one bit more than a half
        const float below = nextafterf(mid, -INFINITY), above = nextafterf(mid, INFINITY);
        T_EQ(fl_f16_from_f32(mid), h + (h & 1));
        T_EQ(fl_f16_from_f32(below), h);
        T_EQ(fl_f16_from_f32(above), h + 1);
        T_EQ(fl_f16_from_f32(-above), 0x8000 + h + 1);
    }
    T_EQ(fl_f16_from_f32(0x1p-149f), 0);
    T_EQ(fl_f16_from_f32(-0.0f), 0x8000);
    T_EQ(fl_f16_from_f32(3e38f), 0x7c00);
    T_EQ(fl_f16_from_f32(-INFINITY), 0xfc00);
}

// Row r of a matrix is scale * code + minimum, whatever the sizes; nothing past out[cols] is
// written and nothing past the matrix read.
static void check_row(uint32_t rows, uint32_t cols, uint32_t bits) {
    size_t size = 0;
    T_NEED(fl_packed_size(rows, cols, bits, &size), "size");
    uint8_t *data = t_guarded(size);
    const size_t groups = (cols + 63) / 64, tile_size = fl_packed_tile_size(bits);
    static uint8_t codes[1024 * 64];
    static uint16_t scale[16 * 64], minimum[16 * 64];
    const size_t tiles = size / tile_size;
    T_NEED(tiles <= 64, "tiles");
    for (size_t n = 0; n < tiles; n++) {
        for (size_t i = 0; i < 1024; i++) codes[n * 1024 + i] = (uint8_t)(t_rand() >> (64 - bits));
        for (size_t i = 0; i < 16; i++) {
            scale[n * 16 + i] = random_half(), minimum[n * 16 + i] = random_half();
        }
        fl_packed_tile_write(data + n * tile_size, bits, codes + n * 1024, scale + n * 16,
                             minimum + n * 16);
    }
    const fl_packed w = {.data = data, .rows = rows, .cols = cols, .bits = bits};
    float *out = t_guarded(cols * sizeof(*out));
    for (uint32_t r = 0; r < rows; r++) {
        fl_packed_row(&w, r, out);
        for (uint32_t k = 0; k < cols; k++) {
            const size_t n = r / 16 * groups + k / 64, i = n * 16 + r % 16;
            const double want = half_value(scale[i]) * codes[n * 1024 + r % 16 * 64 + k % 64] +
                                half_value(minimum[i]);
            T_NEAR(out[k], want, 0x1p-23 * (256 * fabs(half_value(scale[i])) + 1),
                   "rows=%u cols=%u bits=%u r=%u k=%u", rows, cols, bits, r, k);
        }
    }
    t_guarded_free(data, size);
    t_guarded_free(out, cols * sizeof(*out));
}

static void test_rows_of_odd_matrices(void) {
    static const uint32_t cols[] = {1, 2, 3, 4, 5, 31, 63, 64, 65, 127, 128, 129, 172, 200, 576};
    for (uint32_t bits = 2; bits <= 8; bits++) {
        for (size_t c = 0; c < sizeof(cols) / sizeof(cols[0]); c++)
            for (uint32_t rows = 1; rows <= 33; rows += rows == 1 ? 14 : rows == 17 ? 16 : 1)
                check_row(rows, cols[c], bits);
    }
}

T_MAIN({"planes_are_as_documented", test_planes_are_as_documented},
       {"width_orders_its_planes", test_width_orders_its_planes},
       {"tile_round_trip", test_tile_round_trip}, {"size_is_checked", test_size_is_checked},
       {"every_half", test_every_half}, {"halves_round_to_even", test_halves_round_to_even},
       {"rows_of_odd_matrices", test_rows_of_odd_matrices})
