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

static int32_t max_of(int enc) {
    return enc == FL_UPDATE_INT16 ? 32767 : enc == FL_UPDATE_INT8 ? 127 : 7;
}

// Round trip within half a step (int16) or one step (others); the residual closes the sum.
static void test_round_trip(void) {
    for (size_t c = 0; c < FL_COUNT(counts); c++) {
        for (int enc = FL_UPDATE_INT16; enc <= FL_UPDATE_INT4; enc++) {
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
                const double step = (double)largest / max_of(enc);
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

// int8 and int4 rounding has no bias: the mean over many keys comes to the value. The mean of n
// draws, each within one step, has a standard deviation below step / (2 sqrt n); five of them is
// the bound.
static void test_rounding_without_bias(void) {
    enum { N = 64, KEYS = 4000 };
    float v[N];
    fill(v, N, 0.01f);
    v[0] = 0.01f;
    for (int enc = FL_UPDATE_INT8; enc <= FL_UPDATE_INT4; enc++) {
        double sum[N] = {0}, back[N];
        const fl_update_info info = {(fl_update_encoding)enc, 0, N, 0, 1};
        uint8_t bytes[32 + 4 + N];
        const size_t size = fl_update_size(N, info.encoding);
        for (uint64_t key = 0; key < KEYS; key++) {
            fl_update u;
            T_EQ(fl_update_encode(&info, v, key, bytes, size, NULL, NULL), FL_OK);
            T_EQ(fl_update_open((fl_bytes){bytes, size}, &u, NULL), FL_OK);
            fl_update_values(&u, 0, N, back);
            for (int i = 0; i < N; i++) sum[i] += back[i];
        }
        const double step = 0.01 / max_of(enc);
        const double bound = 5 * step / (2 * sqrt(KEYS)) + 0.01 * 0x1p-22;
        for (int i = 0; i < N; i++) T_NEAR(sum[i] / KEYS, (double)v[i], bound, "value %d", i);
    }
}

static void test_extremes(void) {
    const float edge[] = {64.0f, -64.0f, 0.0f, -0.0f, 0x1p-149f, 1e-40f};
    for (int enc = FL_UPDATE_INT16; enc <= FL_UPDATE_INT4; enc++) {
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
    T_EQ(fl_update_size(1, FL_UPDATE_SPARSE8), 0); // depends on what is named
    T_EQ(fl_update_size(1, (fl_update_encoding)6), 0);
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
    for (int enc = FL_UPDATE_INT16; enc <= FL_UPDATE_INT4; enc++) {
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
        const size_t block2 = 32 + 4 + 512u / (1u << (enc - 1));
        for (size_t at = 32; at <= block2; at += block2 - 32) {
            memcpy(keep, b + at, 4);
            for (size_t i = 0; i < FL_COUNT(scales); i++) {
                fl_put_f32(b + at, scales[i]);
                refuse(b, size, FL_EFORMAT, "scale");
            }
            fl_put_f32(b + at, 33.0f);
            refuse(b, size, FL_ELIMIT, "values above 64");
            memcpy(b + at, keep, 4);
        }
        const size_t last = size - (enc == FL_UPDATE_INT16 ? 2 : 1);
        memcpy(keep, b + last, size - last);
        memset(b + last, 0, size - last);
        b[size - 1] = enc == FL_UPDATE_INT4 ? 0x88 : 0x80; // the one code that has no opposite
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
            const bool known = e >= FL_UPDATE_INT16 && e <= FL_UPDATE_ENCODINGS;
            refuse(b, size, known ? FL_EFORMAT : FL_EUNSUPPORTED, "encoding");
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

// ---- sparse

typedef struct sparse {
    uint8_t *bytes;
    size_t size;
    fl_update u;
    int64_t *read; // [count], as the coordinator reads it
} sparse;

static sparse encode_sparse(const fl_update_info *info, uint32_t keep, const int64_t *v,
                            uint64_t key) {
    const size_t most = fl_update_size_max(info->count, info->encoding, keep);
    uint8_t *room = t_guarded(most);
    sparse s = {0};
    fl_err err;
    T_OK(fl_update_encode_fixed(info, keep, v, key, room, most, &s.size, &err), err);
    s.bytes = t_guarded(s.size);
    memcpy(s.bytes, room, s.size);
    t_guarded_free(room, most);
    T_OK(fl_update_open((fl_bytes){s.bytes, s.size}, &s.u, &err), err);
    s.read = t_guarded(info->count * sizeof(*s.read));
    fl_update_fixed(&s.u, 0, info->count, s.read);
    return s;
}

static void free_sparse(sparse *s) {
    t_guarded_free(s->read, s->u.info.count * sizeof(*s->read));
    t_guarded_free(s->bytes, s->size);
}

// Heavy tails, as a layer's change has: most of the energy in few values.
static void fill_fixed(int64_t *v, uint32_t n, double size) {
    for (uint32_t i = 0; i < n; i++) {
        const double x = (double)t_randf();
        v[i] = llrint(size * x * x * x * x * x * 0x1p32);
    }
}

// A naive reader of the format as update.h has it, written apart; NULL or what is wrong.
static bool read_naively(const uint8_t *b, size_t size, uint32_t n, unsigned width, int64_t *out) {
    static const unsigned rice[8] = {0, 1, 2, 3, 4, 5, 6, 8};
    const uint32_t pages = (n + 4095) / 4096;
    const uint8_t *p = b + 40 + 2 * pages;
    uint32_t total = 0;
    memset(out, 0, n * sizeof(*out));
    for (uint32_t page = 0; page < pages; page++) {
        const uint32_t page_size = fl_get_u16(b + 40 + 2 * page);
        if (page_size == 0) continue;
        const uint32_t kept = fl_get_u16(p) & 8191, r = rice[fl_get_u16(p) >> 13];
        uint32_t bit = 0, place = 0, places[4096], blocks = 0;
        const uint8_t *q = p + 2;
        for (uint32_t i = 0; i < kept; i++, bit++) {
            for (; (q[bit / 8] >> bit % 8 & 1) == 0; bit++) place += 1u << r;
            for (uint32_t k = 0; k < r; k++)
                place += ((uint32_t)q[(bit + 1 + k) / 8] >> (bit + 1 + k) % 8 & 1) << k;
            bit += r;
            places[i] = place++;
        }
        q += (bit + 7) / 8;
        for (uint32_t i = 0; i < kept; i++) {
            if (i == 0 || places[i] / 256 != places[i - 1] / 256) blocks++;
        }
        for (uint32_t i = 0, block = 0; i < kept; i++) {
            if (i > 0 && places[i] / 256 != places[i - 1] / 256) block++;
            const uint32_t byte = q[blocks + i * width / 8];
            const uint32_t code = byte >> i * width % 8 & ((1u << width) - 1);
            const double m = 1.0 + (code & ((1u << (width - 1)) - 1));
            const double step =
                (double)fl_get_f32(b + 36) * (16 - q[block] % 8) / pow(2, 4 + q[block] / 8);
            out[page * 4096 + places[i]] = llrint((code >> (width - 1) ? -m : m) * step * 0x1p32);
        }
        total += kept;
        p += page_size;
    }
    while (p < b + size) {
        if (*p++ != 0) return false;
    }
    return total == fl_get_u32(b + 32);
}

static int by_magnitude(const void *a, const void *b) {
    const int64_t x = llabs(*(const int64_t *)a), y = llabs(*(const int64_t *)b);
    return (x < y) - (x > y);
}

// What is read is within a step of the k largest values and nothing else, by any range.
static void check_sparse(const fl_update_info *info, uint32_t keep, const int64_t *v) {
    const uint32_t n = info->count;
    const unsigned width = info->encoding == FL_UPDATE_SPARSE8 ? 8 : 4;
    sparse s = encode_sparse(info, keep, v, 7);
    int64_t *sorted = t_guarded(n * sizeof(*sorted)), *naive = t_guarded(n * sizeof(*naive));
    memcpy(sorted, v, n * sizeof(*sorted));
    qsort(sorted, n, sizeof(*sorted), by_magnitude);
    const int64_t least = llabs(sorted[keep < n ? keep - 1 : n - 1]);
    uint32_t named = 0;
    double norm2 = 0;
    for (uint32_t i = 0; i < n; i++) {
        int64_t largest = 0;
        for (uint32_t k = i / 256 * 256; k < n && k < i / 256 * 256 + 256; k++)
            if (llabs(v[k]) > largest) largest = llabs(v[k]);
        // The step of a block is at most 1/8 above what its largest needs, or the finest there is.
        const double step =
            (double)largest / (1 << (width - 1)) * 1.13 + (double)llabs(sorted[0]) * 0x1p-34;
        named += s.read[i] != 0;
        if (s.read[i] != 0) {
            T_CHECK(llabs(v[i]) >= least, "value %u of %u is not among the largest", i, n);
            T_NEAR((double)s.read[i], (double)v[i], step + 1, "value %u of %u", i, n);
        } else {
            T_CHECK(llabs(v[i]) <= least || (double)llabs(v[i]) <= step, "value %u left out", i);
        }
        norm2 += (double)s.read[i] * (double)s.read[i];
    }
    T_CHECK(named <= fl_update_kept(&s.u) && fl_update_kept(&s.u) <= keep, "%u named", named);
    T_NEAR(fl_update_norm2(&s.u), norm2 * 0x1p-64, 1e-6 * norm2 * 0x1p-64 + 1e-15, "norm");
    T_CHECK(fl_update_size_fits(n, s.size), "size %zu", s.size);
    T_CHECK(read_naively(s.bytes, s.size, n, width, naive), "the naive reader is lost");
    T_CHECK(memcmp(naive, s.read, n * sizeof(*naive)) == 0, "the naive reader sees other values");
    for (uint32_t i = 0; i < n; i += 1 + n / 7) {
        int64_t one;
        fl_update_fixed(&s.u, i, 1, &one);
        T_EQ(one, s.read[i]);
        double two[2];
        if (i + 2 > n) continue;
        fl_update_values(&s.u, i, 2, two);
        T_EQ(llrint(two[1] * 0x1p32), s.read[i + 1]);
    }
    t_guarded_free(sorted, n * sizeof(*sorted)), t_guarded_free(naive, n * sizeof(*naive));
    free_sparse(&s);
}

static void test_sparse_round_trip(void) {
    static const uint32_t sizes[] = {1, 2, 255, 256, 257, 4095, 4096, 4097, 8192, 5184 * 8};
    for (size_t c = 0; c < FL_COUNT(sizes); c++) {
        for (int enc = FL_UPDATE_SPARSE8; enc <= FL_UPDATE_SPARSE4; enc++) {
            const uint32_t n = sizes[c];
            const uint32_t keeps[] = {1, n / 100 + 1, n / 20 + 1, n / 2 + 1, n, n + 9};
            const fl_update_info info = {(fl_update_encoding)enc, 7, n, 41, 12345};
            int64_t *v = t_guarded(n * sizeof(*v));
            for (size_t k = 0; k < FL_COUNT(keeps); k++) {
                fill_fixed(v, n, 0.03);
                check_sparse(&info, keeps[k], v);
            }
            for (uint32_t i = 0; i < n; i++) v[i] = i % 3 == 0 ? 0 : 5; // equal ones, and zeros
            check_sparse(&info, n / 2 + 1, v);
            memset(v, 0, n * sizeof(*v));
            v[n - 1] = (int64_t)FL_UPDATE_ABS_MAX << 32;
            v[0] = -v[n - 1];
            check_sparse(&info, n, v);
            v[n / 2] = ((int64_t)FL_UPDATE_ABS_MAX << 32) + 1;
            uint8_t room[64];
            size_t size;
            T_EQ(fl_update_encode_fixed(&info, 1, v, 0, room, 0, &size, NULL), FL_EARG);
            uint8_t *most = t_guarded(fl_update_size_max(n, info.encoding, n));
            T_EQ(fl_update_encode_fixed(&info, n, v, 0, most,
                                        fl_update_size_max(n, info.encoding, n), &size, NULL),
                 FL_EFORMAT);
            t_guarded_free(most, fl_update_size_max(n, info.encoding, n));
            t_guarded_free(v, n * sizeof(*v));
        }
    }
}

// A layer in which nothing changed is the smallest update there is.
static void test_sparse_nothing(void) {
    static const int64_t zeros[5000];
    const fl_update_info info = {FL_UPDATE_SPARSE4, 3, 5000, 1, 1};
    sparse s = encode_sparse(&info, 100, zeros, 1);
    T_EQ(fl_update_kept(&s.u), 0);
    T_EQ(s.size, 44);
    for (uint32_t i = 0; i < 5000; i++) T_EQ(s.read[i], 0);
    free_sparse(&s);
}

// Of the values that are named, the mean over many keys comes to the value.
static void test_sparse_without_bias(void) {
    enum { N = 300, KEYS = 4000 };
    int64_t v[N];
    for (int enc = FL_UPDATE_SPARSE8; enc <= FL_UPDATE_SPARSE4; enc++) {
        const int max = enc == FL_UPDATE_SPARSE8 ? 128 : 8;
        const fl_update_info info = {(fl_update_encoding)enc, 0, N, 0, 1};
        double sum[N] = {0};
        for (int i = 0; i < N; i++) v[i] = llrint(0.01 * (double)t_randf() * 0x1p32);
        v[0] = v[299] = llrint(0.01 * 0x1p32);
        for (uint64_t key = 0; key < KEYS; key++) {
            sparse s = encode_sparse(&info, N, v, key);
            for (int i = 0; i < N; i++) sum[i] += (double)s.read[i];
            free_sparse(&s);
        }
        const double step = 0.01 / max * 1.13, bound = 5 * step / (2 * sqrt(KEYS)) + 0.01 * 0x1p-22;
        for (int i = 0; i < N; i++)
            T_NEAR(sum[i] / KEYS * 0x1p-32, (double)v[i] * 0x1p-32, bound, "value %d", i);
    }
}

// The same bytes on every machine, worked out by hand: three values of a layer of 300.
static void test_sparse_golden(void) {
    const int64_t one = (int64_t)1 << 32, v[300] = {[2] = one, [3] = -one, [290] = one / 4};
    const fl_update_info info = {FL_UPDATE_SPARSE4, 9, 300, 2, 3};
    static const uint8_t tail[] = {
        3,    0, 0,    0,    // values named
        0,    0, 0,    0x3e, // 1 / 8
        10,   0,             // bytes of the page
        3,    6 << 5,        // 3 values, r = 6. Gaps of 2, 0 and 286 = 4 * 64 + 30, low bits first:
        0x85, 0, 0xf4, 0,    // 1 010000, 1 000000, 0000 1 011110, and a bit to fill up
        0,    16,            // steps: the layer's, and a quarter of it
        0xf7, 0x07,          // +8 and -8 steps; +8
    };
    sparse s = encode_sparse(&info, 3, v, 0);
    T_EQ(s.size, 32 + sizeof(tail));
    T_CHECK(memcmp(s.bytes + 32, tail, sizeof(tail)) == 0, "bytes");
    T_CHECK(s.read[2] == one && s.read[3] == -one && s.read[290] == one / 4, "values");
    free_sparse(&s);
}

// Every truncation and every other value of every byte: refused, or read within the range. The
// head's own rules are those of test_hostile.
static void test_sparse_hostile(void) {
    enum { N = 4500 };
    static int64_t v[N], read[N];
    for (int enc = FL_UPDATE_SPARSE8; enc <= FL_UPDATE_SPARSE4; enc++) {
        fill_fixed(v, N, 0.5);
        const fl_update_info info = {(fl_update_encoding)enc, 3, N, 1, 1};
        sparse s = encode_sparse(&info, 40, v, 3);
        for (size_t n = 0; n < s.size; n++) refuse(s.bytes, n, FL_EFORMAT, "truncated");
        uint8_t *b = calloc(1, s.size + 64);
        T_NEED(b != NULL, "memory");
        memcpy(b, s.bytes, s.size);
        for (size_t more = 1; more <= 64; more++)
            refuse(b, s.size + more, FL_EFORMAT, "trailing bytes");
        unsigned taken = 0;
        for (size_t at = 32; at < s.size; at++) {
            for (unsigned value = 0; value < 256; value++) {
                fl_update u;
                b[at] = (uint8_t)value;
                if (value == s.bytes[at]) continue;
                if (fl_update_open((fl_bytes){b, s.size}, &u, NULL) != FL_OK) continue;
                taken++;
                T_CHECK(at < FL_UPDATE_HEAD + u.blocks.size, "padding byte %zu set", at);
                fl_update_fixed(&u, 0, N, read);
                for (uint32_t i = 0; i < N; i++)
                    T_CHECK(llabs(read[i]) <= (int64_t)64 << 32, "byte %zu = %u", at, value);
                T_CHECK(memcmp(read, s.read, sizeof(read)) != 0, "two spellings: byte %zu", at);
            }
            b[at] = s.bytes[at];
        }
        T_CHECK(taken > 1000, "%u other payloads were read: does the test see any?", taken);
        const float scales[] = {NAN, -NAN, INFINITY, -INFINITY, -1.0f, -0.0f, 0.0f};
        for (size_t i = 0; i < FL_COUNT(scales); i++) {
            fl_put_f32(b + 36, scales[i]);
            refuse(b, s.size, FL_EFORMAT, "scale");
        }
        fl_put_f32(b + 36, 9.0f);
        refuse(b, s.size, FL_ELIMIT, "values above 64");
        free(b);
        free_sparse(&s);
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
       {"hostile", test_hostile}, {"sparse_round_trip", test_sparse_round_trip},
       {"sparse_nothing", test_sparse_nothing}, {"sparse_without_bias", test_sparse_without_bias},
       {"sparse_golden", test_sparse_golden}, {"sparse_hostile", test_sparse_hostile},
       {"layer_state", test_layer_state})
