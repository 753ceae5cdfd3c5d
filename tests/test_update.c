// Goal: what the coordinator reads is the node's delta to the bound of its encoding, to the same
// bits everywhere, and hostile payloads are refused. Method: random layers of every awkward size,
// a naive reader of the format written apart, every truncation and every kind of forbidden byte.
#include "common/checked.h"
#include "proto/update.h"
#include "tests/check.h"

static const uint32_t counts[] = {1, 2, 255, 256, 257, 511, 512, 513, 1000, 5184 * 8};

static void fill(float *v, uint32_t n, float size) {
    for (uint32_t i = 0; i < n; i++) v[i] = size * t_randf();
}

static uint8_t *encode(const fl_update_info *info, const float *v, uint64_t key, float *residual,
                       size_t *ret_size) {
    *ret_size = fl_update_size(info->count, info->encoding);
    uint8_t *out = t_guarded(*ret_size);
    fl_err err;
    T_OK(fl_update_encode(info, v, key, out, *ret_size, residual, &err), err);
    return out;
}

// Round trip within half a step (int16) or one step (int8); the residual closes the sum.
static void test_round_trip(void) {
    for (size_t c = 0; c < FL_COUNT(counts); c++) {
        for (int enc = FL_UPDATE_INT16; enc <= FL_UPDATE_INT8; enc++) {
            const uint32_t n = counts[c];
            const fl_update_info info = {(fl_update_encoding)enc, 7, n, 41, 12345};
            float *v = t_guarded(n * sizeof(*v)), *res = t_guarded(n * sizeof(*res));
            double *back = t_guarded(n * sizeof(*back));
            int64_t *fixed = t_guarded(n * sizeof(*fixed));
            fill(v, n, 0.03f);
            size_t size;
            uint8_t *bytes = encode(&info, v, 99, res, &size);
            fl_update u;
            fl_err err;
            T_OK(fl_update_open((fl_bytes){bytes, size}, &u, &err), err);
            T_CHECK(u.info.layer == 7 && u.info.count == n && u.info.base_version == 41 &&
                        u.info.tokens == 12345 && u.info.encoding == info.encoding,
                    "head of %u values", n);
            fl_update_values(&u, 0, n, back);
            fl_update_fixed(&u, 0, n, fixed);
            double norm2 = 0;
            for (uint32_t i = 0; i < n; i++) {
                float largest = 0;
                for (uint32_t k = i / 256 * 256; k < n && k < i / 256 * 256 + 256; k++)
                    largest = fmaxf(largest, fabsf(v[k]));
                // A step, and what rounding the scale and the quotient to 24 bits may add.
                const double step = (double)largest / (enc == FL_UPDATE_INT16 ? 32767 : 127);
                const double bound = step * (enc == FL_UPDATE_INT16 ? 0.5 : 1.0) * (1 + 1e-4) +
                                     (double)largest * 0x1p-23;
                T_NEAR(back[i], (double)v[i], bound, "value %u of %u", i, n);
                T_NEAR(back[i] + (double)res[i], (double)v[i], 1e-9, "residual %u of %u", i, n);
                T_EQ(fixed[i], llrint(back[i] * 0x1p32));
                T_CHECK(fabs(back[i]) <= (double)largest, "value %u beyond its block", i);
                norm2 += back[i] * back[i];
            }
            T_CHECK(norm2 == fl_update_norm2(&u), "norm");
            int64_t part[3];
            for (uint32_t i = 0; i + 3 <= n; i += n / 3) { // any range gives the same numbers
                fl_update_fixed(&u, i, 3, part);
                T_CHECK(memcmp(part, fixed + i, sizeof(part)) == 0, "range at %u", i);
                if (n < 6) break;
            }
            t_guarded_free(bytes, size);
            t_guarded_free(v, n * sizeof(*v)), t_guarded_free(res, n * sizeof(*res));
            t_guarded_free(back, n * sizeof(*back)), t_guarded_free(fixed, n * sizeof(*fixed));
        }
    }
}

// The same bytes on every machine: a digest-free golden check of a few codes, and of the key's use.
static void test_golden_bytes(void) {
    const float v[4] = {1.0f, -0.5f, 0.25f, 0.0f};
    const fl_update_info info = {FL_UPDATE_INT16, 1, 4, 2, 3};
    size_t size;
    uint8_t *b = encode(&info, v, 0, NULL, &size);
    T_EQ(size, 32 + 4 + 8);
    // 1/32767 rounded down so that 32767 steps are not above 1; codes by hand: -16383.5 and 8191.75
    // lie at or above the tie, and the rounded-down scale pushes both away from zero.
    const float scale = fl_get_f32(b + 32);
    T_CHECK((double)scale * 32767 <= 1.0 && (double)nextafterf(scale, 1.0f) * 32767 > 1.0, "scale");
    T_EQ((int16_t)fl_get_u16(b + 36), 32767);
    T_CHECK((int16_t)fl_get_u16(b + 38) == -16384 || (int16_t)fl_get_u16(b + 38) == -16383, "half");
    T_EQ((int16_t)fl_get_u16(b + 40), 8192);
    T_EQ(fl_get_u16(b + 42), 0);
    t_guarded_free(b, size);
    float w[300];
    fill(w, 300, 1.0f);
    const fl_update_info info8 = {FL_UPDATE_INT8, 1, 300, 2, 3};
    size_t s1, s2, s3;
    uint8_t *b1 = encode(&info8, w, 5, NULL, &s1), *b2 = encode(&info8, w, 5, NULL, &s2),
            *b3 = encode(&info8, w, 6, NULL, &s3);
    T_CHECK(memcmp(b1, b2, s1) == 0, "same key, same bytes");
    T_CHECK(memcmp(b1, b3, s1) != 0, "another key rounds otherwise");
    t_guarded_free(b1, s1), t_guarded_free(b2, s2), t_guarded_free(b3, s3);
}

// int8 rounding has no bias: the mean over many keys comes to the value. The mean of n draws, each
// within one step, has a standard deviation below step / (2 sqrt n); five of them is the bound.
static void test_rounding_without_bias(void) {
    enum { N = 64, KEYS = 4000 };
    float v[N];
    double sum[N] = {0}, back[N];
    fill(v, N, 0.01f);
    v[0] = 0.01f;
    const fl_update_info info = {FL_UPDATE_INT8, 0, N, 0, 1};
    uint8_t bytes[32 + 4 + N];
    for (uint64_t key = 0; key < KEYS; key++) {
        fl_update u;
        T_EQ(fl_update_encode(&info, v, key, bytes, sizeof(bytes), NULL, NULL), FL_OK);
        T_EQ(fl_update_open((fl_bytes){bytes, sizeof(bytes)}, &u, NULL), FL_OK);
        fl_update_values(&u, 0, N, back);
        for (int i = 0; i < N; i++) sum[i] += back[i];
    }
    const double step = 0.01 / 127, bound = 5 * step / (2 * sqrt(KEYS)) + 0.01 * 0x1p-22;
    for (int i = 0; i < N; i++) T_NEAR(sum[i] / KEYS, (double)v[i], bound, "value %d", i);
}

static void test_extremes(void) {
    const float edge[] = {64.0f, -64.0f, 0.0f, -0.0f, 0x1p-149f, 1e-40f};
    for (int enc = FL_UPDATE_INT16; enc <= FL_UPDATE_INT8; enc++) {
        for (size_t first = 0; first < FL_COUNT(edge); first++) {
            const fl_update_info info = {(fl_update_encoding)enc, 255, (uint32_t)(6 - first), 0, 0};
            float res[6];
            size_t size;
            uint8_t *b = encode(&info, edge + first, 1, res, &size);
            fl_update u;
            fl_err err;
            int64_t fixed[6];
            T_OK(fl_update_open((fl_bytes){b, size}, &u, &err), err);
            fl_update_fixed(&u, 0, info.count, fixed);
            for (uint32_t i = 0; i < info.count; i++)
                T_CHECK(fixed[i] >= -((int64_t)1 << 38) && fixed[i] <= (int64_t)1 << 38, "%u", i);
            t_guarded_free(b, size);
        }
    }
    uint8_t out[64];
    const fl_update_info one = {FL_UPDATE_INT16, 0, 1, 0, 0};
    const float bad[] = {64.001f, -65.0f, INFINITY, -INFINITY, NAN};
    for (size_t i = 0; i < FL_COUNT(bad); i++)
        T_EQ(fl_update_encode(&one, &bad[i], 0, out, 38, NULL, NULL), FL_EFORMAT);
    T_EQ(fl_update_encode(&one, edge, 0, out, 37, NULL, NULL), FL_EARG);
    T_EQ(fl_update_encode(&one, edge, 0, out, 39, NULL, NULL), FL_EARG);
    T_EQ(fl_update_size(0, FL_UPDATE_INT16), 0);
    T_EQ(fl_update_size(FL_UPDATE_VALUES_MAX + 1, FL_UPDATE_INT8), 0);
    T_EQ(fl_update_size(1, (fl_update_encoding)3), 0);
}

static void refuse(const uint8_t *b, size_t size, fl_status want, const char *what) {
    uint8_t *q = t_guarded(size + (size == 0));
    memcpy(q, b, size);
    fl_update u = {.info = {.count = 7777}};
    const fl_status st = fl_update_open((fl_bytes){q, size}, &u, NULL);
    T_CHECK(st == want && u.info.count == 7777, "%s: %s", what, fl_status_name(st));
    t_guarded_free(q, size + (size == 0));
}

static void test_hostile(void) {
    enum { N = 300 };
    float v[N];
    fill(v, N, 0.5f);
    for (int enc = FL_UPDATE_INT16; enc <= FL_UPDATE_INT8; enc++) {
        const fl_update_info info = {(fl_update_encoding)enc, 3, N, 1, 1};
        size_t size;
        uint8_t *b = encode(&info, v, 1, NULL, &size), keep[4];
        for (size_t n = 0; n < size; n++) refuse(b, n, FL_EFORMAT, "truncated");
        uint8_t *longer = calloc(1, size + 1);
        T_NEED(longer != NULL, "memory");
        memcpy(longer, b, size);
        refuse(longer, size + 1, FL_EFORMAT, "trailing byte");
        free(longer);
        const float scales[] = {NAN, -NAN, INFINITY, -INFINITY, -1.0f, -0.0f, 0.0f, -0x1p-149f};
        const size_t block2 = 32 + 4 + 256 * (enc == FL_UPDATE_INT16 ? 2u : 1u);
        for (size_t at = 32; at <= block2; at += block2 - 32) {
            memcpy(keep, b + at, 4);
            for (size_t i = 0; i < FL_COUNT(scales); i++) {
                fl_put_f32(b + at, scales[i]);
                refuse(b, size, FL_EFORMAT, "scale");
            }
            fl_put_f32(b + at, 3.0f);
            refuse(b, size, FL_ELIMIT, "values above 64");
            memcpy(b + at, keep, 4);
        }
        const size_t last = size - (enc == FL_UPDATE_INT16 ? 2 : 1);
        memcpy(keep, b + last, size - last);
        memset(b + last, 0, size - last);
        b[size - 1] = 0x80; // the one code that has no opposite
        refuse(b, size, FL_EFORMAT, "most negative code");
        memcpy(b + last, keep, size - last);
        for (int i = 0; i < 8; i++) {
            if (i == 4) continue;
            b[i] ^= 0x20;
            refuse(b, size, FL_EFORMAT, "magic or reserved");
            b[i] ^= 0x20;
        }
        for (unsigned e = 0; e < 256; e++) {
            if (e == (unsigned)enc) continue;
            b[4] = (uint8_t)e;
            refuse(b, size, FL_EFORMAT, "encoding");
        }
        b[4] = (uint8_t)enc;
        const uint32_t wrong[] = {0, N - 1, N + 1, N + 256, FL_UPDATE_VALUES_MAX + 1, UINT32_MAX};
        for (size_t i = 0; i < FL_COUNT(wrong); i++) {
            fl_put_u32(b + 12, wrong[i]);
            const bool range = wrong[i] == 0 || wrong[i] > FL_UPDATE_VALUES_MAX;
            refuse(b, size, range ? FL_ELIMIT : FL_EFORMAT, "count");
        }
        fl_put_u32(b + 12, N);
        fl_put_u32(b + 8, 256);
        refuse(b, size, FL_ELIMIT, "layer");
        t_guarded_free(b, size);
    }
}

static void test_layer_state(void) {
    enum { N = 77 };
    float v[N], back[N];
    fill(v, N, 3.0f);
    const size_t size = fl_layer_size(N);
    uint8_t *b = t_guarded(size);
    fl_err err;
    fl_layer l;
    T_OK(fl_layer_encode(9, 4, v, N, b, size, &err), err);
    T_OK(fl_layer_open((fl_bytes){b, size}, &l, &err), err);
    T_CHECK(l.layer == 9 && l.version == 4 && l.count == N, "head");
    fl_layer_values(&l, 0, N, back);
    T_CHECK(memcmp(v, back, sizeof(v)) == 0, "exact");
    fl_layer_values(&l, N - 1, 1, back);
    T_CHECK(back[0] == v[N - 1], "last");
    for (size_t n = 0; n < size; n++) {
        uint8_t *q = t_guarded(n + (n == 0));
        memcpy(q, b, n);
        T_EQ(fl_layer_open((fl_bytes){q, n}, &l, NULL), FL_EFORMAT);
        t_guarded_free(q, n + (n == 0));
    }
    fl_put_f32(b + size - 4, NAN);
    T_EQ(fl_layer_open((fl_bytes){b, size}, &l, NULL), FL_EFORMAT);
    fl_put_f32(b + size - 4, 1.0f);
    b[13] = 1;
    T_EQ(fl_layer_open((fl_bytes){b, size}, &l, NULL), FL_EFORMAT);
    b[13] = 0;
    fl_put_u64(b + 16, 0);
    T_EQ(fl_layer_open((fl_bytes){b, size}, &l, NULL), FL_ELIMIT);
    v[5] = INFINITY;
    T_EQ(fl_layer_encode(9, 4, v, N, b, size, NULL), FL_EFORMAT);
    T_EQ(fl_layer_encode(256, 4, v, N, b, size, NULL), FL_EARG);
    T_EQ(fl_layer_encode(9, 0, v, N, b, size, NULL), FL_EARG);
    T_EQ(fl_layer_encode(9, 4, v, N, b, size - 1, NULL), FL_EARG);
    t_guarded_free(b, size);
}

T_MAIN({"round_trip", test_round_trip}, {"golden_bytes", test_golden_bytes},
       {"rounding_without_bias", test_rounding_without_bias}, {"extremes", test_extremes},
       {"hostile", test_hostile}, {"layer_state", test_layer_state})
