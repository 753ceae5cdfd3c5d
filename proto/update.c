#include "proto/update.h"

#include "common/checked.h"
#include "proto/update_impl.h"

#include <math.h>
#include <string.h>

enum { BLOCK_HEAD = 4, LAYER_MAX = 255, NIBBLE_MAX = 7 };

const char *fl_update_encoding_name(fl_update_encoding encoding) {
    static const char *const names[] = {"unknown", "int16",   "int8",
                                        "int4",    "sparse8", "sparse4"};
    return names[(unsigned)encoding <= FL_UPDATE_ENCODINGS ? encoding : 0];
}

static uint32_t code_bits(fl_update_encoding encoding) {
    return encoding == FL_UPDATE_INT16  ? 16
           : encoding == FL_UPDATE_INT8 ? 8
           : encoding == FL_UPDATE_INT4 ? 4
                                        : 0;
}

static int32_t code_max(fl_update_encoding encoding) {
    return encoding == FL_UPDATE_INT16 ? 32767 : encoding == FL_UPDATE_INT8 ? 127 : NIBBLE_MAX;
}

static size_t codes_size(fl_update_encoding encoding, uint32_t n) {
    return ((size_t)n * code_bits(encoding) + 7) / 8;
}

// count <= 2^22, so nothing here can wrap.
size_t fl_update_size(uint32_t count, fl_update_encoding encoding) {
    if (count == 0 || count > FL_UPDATE_VALUES_MAX || code_bits(encoding) == 0) return 0;
    const size_t blocks = (count + FL_UPDATE_BLOCK - 1) / FL_UPDATE_BLOCK;
    return FL_UPDATE_HEAD + blocks * BLOCK_HEAD + codes_size(encoding, count);
}

size_t fl_update_size_max(uint32_t count, fl_update_encoding encoding, uint32_t kept) {
    if (!fl_update_is_sparse(encoding)) return fl_update_size(count, encoding);
    if (count == 0 || count > FL_UPDATE_VALUES_MAX) return 0;
    return fl_sparse_size_max(count, encoding == FL_UPDATE_SPARSE8 ? 8 : 4,
                              kept < count ? kept : count);
}

size_t fl_update_size_about(uint32_t count, fl_update_encoding encoding, uint32_t kept) {
    if (!fl_update_is_sparse(encoding)) return fl_update_size(count, encoding);
    if (count == 0 || count > FL_UPDATE_VALUES_MAX) return 0;
    return fl_sparse_size_about(count, encoding == FL_UPDATE_SPARSE8 ? 8 : 4,
                                kept < count ? kept : count);
}

bool fl_update_size_fits(uint32_t count, uint64_t size) {
    if (count == 0 || count > FL_UPDATE_VALUES_MAX) return false;
    for (int e = FL_UPDATE_INT16; e <= FL_UPDATE_INT4; e++) {
        if (size == fl_update_size(count, (fl_update_encoding)e)) return true;
    }
    return size >= fl_sparse_size_min(count) &&
           size <= fl_update_size_max(count, FL_UPDATE_SPARSE8, count);
}

// Integer code, so the same bytes come out everywhere. Source: the finaliser of SplitMix64, Steele,
// Lea, Flood 2014.
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double fl_update_uniform(uint64_t key, uint64_t index) {
    return (double)(mix(mix(key + 0x9e3779b97f4a7c15u) + (index + 1) * 0x9e3779b97f4a7c15u) >> 40) *
           0x1p-24;
}

// Values to be encoded: floats, or numbers of the fixed-point grid. Both are exact in double.
typedef struct source {
    const float *real;
    const int64_t *fixed;
} source;

static double source_at(const source *s, uint32_t i) {
    return s->real != NULL ? (double)s->real[i] : (double)s->fixed[i] * 0x1p-32;
}

// Code i of a block. A byte of two nibbles is begun by its first.
static void put_code(uint8_t *codes, uint32_t i, fl_update_encoding encoding, int32_t code) {
    const uint32_t bits = (uint32_t)code;
    if (encoding == FL_UPDATE_INT16)
        fl_put_u16(codes + (size_t)i * 2, (uint16_t)bits);
    else if (encoding == FL_UPDATE_INT8)
        codes[i] = (uint8_t)bits;
    else if (i % 2 == 0)
        codes[i / 2] = bits & 15;
    else
        codes[i / 2] |= (uint8_t)(bits << 4);
}

static int32_t get_code(const uint8_t *codes, uint32_t i, fl_update_encoding encoding) {
    if (encoding == FL_UPDATE_INT16) {
        const int32_t v = fl_get_u16(codes + (size_t)i * 2);
        return v < 0x8000 ? v : v - 0x10000;
    }
    if (encoding == FL_UPDATE_INT8) return codes[i] < 0x80 ? (int32_t)codes[i] : codes[i] - 0x100;
    const int32_t v = i % 2 == 0 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
    return v < 8 ? v : v - 16;
}

// One block of n values; `first` is the place of its first value in the layer.
static void encode_block(fl_update_encoding encoding, const source *values, uint32_t first,
                         uint32_t n, uint64_t key, uint8_t *out, float *residual) {
    double largest = 0.0;
    for (uint32_t i = 0; i < n; i++) largest = fmax(largest, fabs(source_at(values, first + i)));
    const int32_t max = code_max(encoding);
    float scale = (float)(largest / max); // subnormal or 0 for a block of almost nothing
    // Rounded down, so that no code's value is beyond the largest: the reader bounds values.
    if ((double)scale * max > largest) scale = nextafterf(scale, 0.0f);
    fl_put_f32(out, scale);
    out += BLOCK_HEAD;
    for (uint32_t i = 0; i < n; i++) {
        const double v = source_at(values, first + i);
        double q = scale > 0.0f ? v / (double)scale : 0.0;
        if (encoding == FL_UPDATE_INT16)
            q = nearbyint(q);
        else
            q = floor(q + fl_update_uniform(key, (uint64_t)first + i));
        // The division's rounding, or a subnormal scale's, may lead past the last code.
        const int32_t code = q > max ? max : q < -max ? -max : (int32_t)q;
        put_code(out, i, encoding, code);
        if (residual != NULL) residual[first + i] = (float)(v - code * (double)scale);
    }
}

static void put_head(const fl_update_info *info, uint8_t *out) {
    memset(out, 0, FL_UPDATE_HEAD);
    memcpy(out, "FLU1", 4);
    out[4] = (uint8_t)info->encoding;
    fl_put_u32(out + 8, info->layer);
    fl_put_u32(out + 12, info->count);
    fl_put_u64(out + 16, info->base_version);
    fl_put_u64(out + 24, info->tokens);
}

static void encode_dense(const fl_update_info *info, const source *values, uint64_t key,
                         uint8_t *out, float *residual) {
    put_head(info, out);
    uint8_t *p = out + FL_UPDATE_HEAD;
    for (uint32_t at = 0; at < info->count; at += FL_UPDATE_BLOCK) {
        const uint32_t left = info->count - at, n = left < FL_UPDATE_BLOCK ? left : FL_UPDATE_BLOCK;
        encode_block(info->encoding, values, at, n, key, p, residual);
        p += BLOCK_HEAD + codes_size(info->encoding, n);
    }
}

static fl_status fail_value(const fl_update_info *info, uint32_t i, fl_err *err) {
    return FL_FAIL(err, FL_EFORMAT,
                   "layer %u: value %u is not finite or above %d; training diverged", info->layer,
                   i, FL_UPDATE_ABS_MAX);
}

fl_status fl_update_encode(const fl_update_info *info, const float *values, uint64_t key,
                           uint8_t *out, size_t out_size, float *residual, fl_err *err) {
    const size_t size = fl_update_size(info->count, info->encoding);
    if (size == 0 || out_size != size || info->layer > LAYER_MAX)
        return FL_FAIL(err, FL_EARG, "an update of %u values for layer %u in %zu bytes",
                       info->count, info->layer, out_size);
    for (uint32_t i = 0; i < info->count; i++) {
        if (!(fabsf(values[i]) <= (float)FL_UPDATE_ABS_MAX)) // false for NaN
            return fail_value(info, i, err);
    }
    encode_dense(info, &(source){.real = values}, key, out, residual);
    return FL_OK;
}

fl_status fl_update_encode_fixed(const fl_update_info *info, uint32_t keep, const int64_t *values,
                                 uint64_t key, uint8_t *out, size_t out_size, size_t *ret_size,
                                 fl_err *err) {
    static const int64_t most = (int64_t)FL_UPDATE_ABS_MAX << FL_UPDATE_FIXED_BITS;
    const size_t size = fl_update_size_max(info->count, info->encoding, keep);
    const bool sparse = fl_update_is_sparse(info->encoding);
    if (size == 0 || out_size < size || info->layer > LAYER_MAX || (sparse && keep == 0))
        return FL_FAIL(err, FL_EARG, "an update of %u values, %u kept, for layer %u in %zu bytes",
                       info->count, keep, info->layer, out_size);
    for (uint32_t i = 0; i < info->count; i++) {
        if (values[i] > most || values[i] < -most) return fail_value(info, i, err);
    }
    if (sparse) {
        put_head(info, out);
        *ret_size =
            FL_UPDATE_HEAD + fl_sparse_encode(info, keep, values, key, out + FL_UPDATE_HEAD);
    } else {
        encode_dense(info, &(source){.fixed = values}, key, out, NULL);
        *ret_size = size;
    }
    return FL_OK;
}

static fl_status check_block(const uint8_t *p, uint32_t n, fl_update_encoding encoding,
                             uint32_t block, fl_err *err) {
    const float scale = fl_get_f32(p);
    if (!isfinite(scale) || signbit(scale))
        return FL_FAIL(err, FL_EFORMAT, "block %u: scale is not a finite number >= 0", block);
    const int32_t max = code_max(encoding);
    int32_t largest = 0;
    for (uint32_t i = 0; i < n; i++) {
        const int32_t code = get_code(p + BLOCK_HEAD, i, encoding);
        const int32_t size = code < 0 ? -code : code;
        if (size > max) return FL_FAIL(err, FL_EFORMAT, "block %u: forbidden code", block);
        if (size > largest) largest = size;
    }
    if (encoding == FL_UPDATE_INT4 && n % 2 == 1 && p[BLOCK_HEAD + n / 2] >> 4 != 0)
        return FL_FAIL(err, FL_EFORMAT, "block %u: bits are set that are to be 0", block);
    if (scale == 0.0f && largest != 0)
        return FL_FAIL(err, FL_EFORMAT, "block %u: codes without a scale", block);
    if ((double)largest * (double)scale > FL_UPDATE_ABS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "block %u: a value is above %d", block, FL_UPDATE_ABS_MAX);
    return FL_OK;
}

static fl_status check_dense(fl_bytes in, const fl_update_info *info, size_t *ret_used,
                             fl_err *err) {
    if (in.size != fl_update_size(info->count, info->encoding) - FL_UPDATE_HEAD)
        return FL_FAIL(err, FL_EFORMAT, "%zu bytes for %u values", in.size, info->count);
    const uint8_t *p = in.data;
    for (uint32_t at = 0; at < info->count; at += FL_UPDATE_BLOCK) {
        const uint32_t left = info->count - at, n = left < FL_UPDATE_BLOCK ? left : FL_UPDATE_BLOCK;
        FL_TRY(check_block(p, n, info->encoding, at / FL_UPDATE_BLOCK, err));
        p += BLOCK_HEAD + codes_size(info->encoding, n);
    }
    *ret_used = in.size;
    return FL_OK;
}

fl_status fl_update_open(fl_bytes in, fl_update *ret, fl_err *err) {
    fl_reader r = {.in = in};
    const fl_bytes magic = fl_read_bytes(&r, 4);
    const uint8_t encoding = fl_read_u8(&r);
    const fl_bytes zero = fl_read_bytes(&r, 3);
    const uint32_t layer = fl_read_u32(&r), count = fl_read_u32(&r);
    const uint64_t base_version = fl_read_u64(&r), tokens = fl_read_u64(&r);
    if (r.bad || memcmp(magic.data, "FLU1", 4) != 0)
        return FL_FAIL(err, FL_EFORMAT, "not a layer update");
    if (encoding < FL_UPDATE_INT16 || encoding > FL_UPDATE_ENCODINGS)
        return FL_FAIL(err, FL_EUNSUPPORTED, "encoding %u is unknown", encoding);
    if (zero.data[0] != 0 || zero.data[1] != 0 || zero.data[2] != 0)
        return FL_FAIL(err, FL_EFORMAT, "reserved bytes are set");
    if (layer > LAYER_MAX || count == 0 || count > FL_UPDATE_VALUES_MAX)
        return FL_FAIL(err, FL_ELIMIT, "layer %u with %u values", layer, count);
    fl_update u = {
        .info = {(fl_update_encoding)encoding, layer, count, base_version, tokens},
        .blocks = {in.data + FL_UPDATE_HEAD, in.size - FL_UPDATE_HEAD},
    };
    size_t used = 0;
    FL_TRY(fl_update_is_sparse(u.info.encoding) ? fl_sparse_check(u.blocks, &u.info, &used, err)
                                                : check_dense(u.blocks, &u.info, &used, err));
    u.blocks.size = used;
    *ret = u;
    return FL_OK;
}

static double value_at(const fl_update *u, uint32_t i) {
    const size_t whole = BLOCK_HEAD + codes_size(u->info.encoding, FL_UPDATE_BLOCK);
    const uint8_t *block = u->blocks.data + i / FL_UPDATE_BLOCK * whole;
    return (double)get_code(block + BLOCK_HEAD, i % FL_UPDATE_BLOCK, u->info.encoding) *
           (double)fl_get_f32(block);
}

// To nearest, ties to even, in the default mode. |v| <= 2^6, so the product is < 2^39.
static int64_t to_fixed(double v) {
    return (int64_t)rint(v * 0x1p32);
}

// The named values of a sparse delta in first .. first + n - 1, into one of the two.
static void read_sparse(const fl_update *u, uint32_t first, uint32_t n, double *real,
                        int64_t *fixed) {
    for (uint32_t i = 0; i < n; i++) {
        if (real != NULL) real[i] = 0.0;
        if (fixed != NULL) fixed[i] = 0;
    }
    const uint32_t end = first + n;
    for (uint32_t page = first / FL_UPDATE_PAGE; page * FL_UPDATE_PAGE < end; page++) {
        fl_sparse_page p;
        fl_sparse_page_read(u, page, &p);
        for (uint32_t i = 0; i < p.kept; i++) {
            const uint32_t at = page * FL_UPDATE_PAGE + p.at[i];
            if (at < first || at >= end) continue;
            const double v = fl_sparse_value(&p, i);
            if (real != NULL) real[at - first] = v;
            if (fixed != NULL) fixed[at - first] = to_fixed(v);
        }
    }
}

void fl_update_fixed(const fl_update *u, uint32_t first, uint32_t n, int64_t *out) {
    FL_ASSERT(first <= u->info.count && n <= u->info.count - first);
    if (fl_update_is_sparse(u->info.encoding)) {
        if (n > 0) read_sparse(u, first, n, NULL, out);
        return;
    }
    for (uint32_t i = 0; i < n; i++) out[i] = to_fixed(value_at(u, first + i));
}

void fl_update_values(const fl_update *u, uint32_t first, uint32_t n, double *out) {
    FL_ASSERT(first <= u->info.count && n <= u->info.count - first);
    if (fl_update_is_sparse(u->info.encoding)) {
        if (n > 0) read_sparse(u, first, n, out, NULL);
        return;
    }
    for (uint32_t i = 0; i < n; i++) out[i] = value_at(u, first + i);
}

double fl_update_norm2(const fl_update *u) {
    double sum = 0.0;
    if (fl_update_is_sparse(u->info.encoding)) { // what is not named adds exactly nothing
        for (uint32_t page = 0; page * FL_UPDATE_PAGE < u->info.count; page++) {
            fl_sparse_page p;
            fl_sparse_page_read(u, page, &p);
            for (uint32_t i = 0; i < p.kept; i++) {
                const double v = fl_sparse_value(&p, i), square = v * v;
                sum += square;
            }
        }
        return sum;
    }
    for (uint32_t i = 0; i < u->info.count; i++) {
        const double v = value_at(u, i), square = v * v;
        sum += square;
    }
    return sum;
}

uint32_t fl_update_kept(const fl_update *u) {
    return fl_update_is_sparse(u->info.encoding) ? fl_get_u32(u->blocks.data) : u->info.count;
}

// ---- layer state

size_t fl_layer_size(uint32_t count) {
    if (count == 0 || count > FL_UPDATE_VALUES_MAX) return 0;
    return FL_LAYER_HEAD + (size_t)count * 4;
}

fl_status fl_layer_encode(uint32_t layer, uint64_t version, const float *values, uint32_t count,
                          uint8_t *out, size_t out_size, fl_err *err) {
    const size_t size = fl_layer_size(count);
    if (size == 0 || out_size != size || layer > LAYER_MAX || version == 0)
        return FL_FAIL(err, FL_EARG, "state of layer %u with %u values in %zu bytes", layer, count,
                       out_size);
    memset(out, 0, FL_LAYER_HEAD);
    memcpy(out, "FLL1", 4);
    fl_put_u32(out + 4, layer);
    fl_put_u32(out + 8, count);
    fl_put_u64(out + 16, version);
    for (uint32_t i = 0; i < count; i++) {
        if (!isfinite(values[i]))
            return FL_FAIL(err, FL_EFORMAT, "layer %u: value %u is not finite", layer, i);
        fl_put_f32(out + FL_LAYER_HEAD + (size_t)i * 4, values[i]);
    }
    return FL_OK;
}

fl_status fl_layer_open(fl_bytes in, fl_layer *ret, fl_err *err) {
    fl_reader r = {.in = in};
    const fl_bytes magic = fl_read_bytes(&r, 4);
    const uint32_t layer = fl_read_u32(&r), count = fl_read_u32(&r), zero = fl_read_u32(&r);
    const uint64_t version = fl_read_u64(&r);
    if (r.bad || memcmp(magic.data, "FLL1", 4) != 0 || zero != 0)
        return FL_FAIL(err, FL_EFORMAT, "not a layer's state");
    if (layer > LAYER_MAX || count == 0 || count > FL_UPDATE_VALUES_MAX || version == 0)
        return FL_FAIL(err, FL_ELIMIT, "layer %u with %u values", layer, count);
    if (in.size != fl_layer_size(count))
        return FL_FAIL(err, FL_EFORMAT, "%zu bytes for %u values", in.size, count);
    const fl_bytes data = {in.data + FL_LAYER_HEAD, (size_t)count * 4};
    for (uint32_t i = 0; i < count; i++) {
        if (!isfinite(fl_get_f32(data.data + (size_t)i * 4)))
            return FL_FAIL(err, FL_EFORMAT, "layer %u: value %u is not finite", layer, i);
    }
    *ret = (fl_layer){layer, count, version, data};
    return FL_OK;
}

void fl_layer_values(const fl_layer *l, uint32_t first, uint32_t n, float *out) {
    FL_ASSERT(first <= l->count && n <= l->count - first);
    for (uint32_t i = 0; i < n; i++) out[i] = fl_get_f32(l->data.data + ((size_t)first + i) * 4);
}
