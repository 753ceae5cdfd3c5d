#include "proto/update.h"

#include "common/checked.h"

#include <math.h>
#include <string.h>

enum { BLOCK_HEAD = 4, LAYER_MAX = 255 };

static uint32_t code_size(fl_update_encoding encoding) {
    return encoding == FL_UPDATE_INT16 ? 2 : encoding == FL_UPDATE_INT8 ? 1 : 0;
}

static int32_t code_max(fl_update_encoding encoding) {
    return encoding == FL_UPDATE_INT16 ? 32767 : 127;
}

// count <= 2^22, so nothing here can wrap.
size_t fl_update_size(uint32_t count, fl_update_encoding encoding) {
    const uint32_t size = code_size(encoding);
    if (count == 0 || count > FL_UPDATE_VALUES_MAX || size == 0) return 0;
    const size_t blocks = (count + FL_UPDATE_BLOCK - 1) / FL_UPDATE_BLOCK;
    return FL_UPDATE_HEAD + blocks * BLOCK_HEAD + (size_t)count * size;
}

// Counter generator of the stochastic rounding: 24 uniform bits from (key, index). Integer code, so
// the same bytes come out everywhere. Source: the finaliser of SplitMix64, Steele, Lea, Flood 2014.
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double uniform(uint64_t key, uint64_t index) {
    return (double)(mix(mix(key + 0x9e3779b97f4a7c15u) + (index + 1) * 0x9e3779b97f4a7c15u) >> 40) *
           0x1p-24;
}

static void put_code(uint8_t *p, fl_update_encoding encoding, int32_t code) {
    if (encoding == FL_UPDATE_INT16)
        fl_put_u16(p, (uint16_t)(uint32_t)code);
    else
        *p = (uint8_t)(uint32_t)code;
}

static int32_t get_code(const uint8_t *p, fl_update_encoding encoding) {
    if (encoding == FL_UPDATE_INT16) {
        const int32_t v = fl_get_u16(p);
        return v < 0x8000 ? v : v - 0x10000;
    }
    return *p < 0x80 ? (int32_t)*p : (int32_t)*p - 0x100;
}

// One block of n values; `index` is that of its first value in the layer.
static void encode_block(fl_update_encoding encoding, const float *values, uint32_t n, uint64_t key,
                         uint64_t index, uint8_t *out, float *residual) {
    float largest = 0.0f;
    for (uint32_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(values[i]));
    const int32_t max = code_max(encoding);
    float scale = largest / (float)max; // subnormal or 0 for a block of almost nothing
    // Rounded down, so that no code's value is beyond the largest: the reader bounds values.
    if ((double)scale * max > (double)largest) scale = nextafterf(scale, 0.0f);
    fl_put_f32(out, scale);
    out += BLOCK_HEAD;
    for (uint32_t i = 0; i < n; i++) {
        double q = scale > 0.0f ? (double)values[i] / (double)scale : 0.0;
        if (encoding == FL_UPDATE_INT16)
            q = nearbyint(q);
        else
            q = floor(q + uniform(key, index + i));
        // The division's rounding, or a subnormal scale's, may lead past the last code.
        const int32_t code = q > max ? max : q < -max ? -max : (int32_t)q;
        put_code(out + (size_t)i * code_size(encoding), encoding, code);
        if (residual != NULL) residual[i] = (float)((double)values[i] - code * (double)scale);
    }
}

fl_status fl_update_encode(const fl_update_info *info, const float *values, uint64_t key,
                           uint8_t *out, size_t out_size, float *residual, fl_err *err) {
    const size_t size = fl_update_size(info->count, info->encoding);
    if (size == 0 || out_size != size || info->layer > LAYER_MAX)
        return FL_FAIL(err, FL_EARG, "an update of %u values for layer %u in %zu bytes",
                       info->count, info->layer, out_size);
    for (uint32_t i = 0; i < info->count; i++) {
        if (!(fabsf(values[i]) <= (float)FL_UPDATE_ABS_MAX)) // false for NaN
            return FL_FAIL(err, FL_EFORMAT,
                           "layer %u: value %u is not finite or above %d; training diverged",
                           info->layer, i, FL_UPDATE_ABS_MAX);
    }
    memset(out, 0, FL_UPDATE_HEAD);
    memcpy(out, "FLU1", 4);
    out[4] = (uint8_t)info->encoding;
    fl_put_u32(out + 8, info->layer);
    fl_put_u32(out + 12, info->count);
    fl_put_u64(out + 16, info->base_version);
    fl_put_u64(out + 24, info->tokens);
    uint8_t *p = out + FL_UPDATE_HEAD;
    for (uint32_t at = 0; at < info->count; at += FL_UPDATE_BLOCK) {
        const uint32_t left = info->count - at, n = left < FL_UPDATE_BLOCK ? left : FL_UPDATE_BLOCK;
        encode_block(info->encoding, values + at, n, key, at, p,
                     residual == NULL ? NULL : residual + at);
        p += BLOCK_HEAD + (size_t)n * code_size(info->encoding);
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
        const int32_t code = get_code(p + BLOCK_HEAD + (size_t)i * code_size(encoding), encoding);
        const int32_t size = code < 0 ? -code : code;
        if (size > max) return FL_FAIL(err, FL_EFORMAT, "block %u: forbidden code", block);
        if (size > largest) largest = size;
    }
    if (scale == 0.0f && largest != 0)
        return FL_FAIL(err, FL_EFORMAT, "block %u: codes without a scale", block);
    if ((double)largest * (double)scale > FL_UPDATE_ABS_MAX)
        return FL_FAIL(err, FL_ELIMIT, "block %u: a value is above %d", block, FL_UPDATE_ABS_MAX);
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
    if (encoding != FL_UPDATE_INT16 && encoding != FL_UPDATE_INT8)
        return FL_FAIL(err, FL_EFORMAT, "encoding %u is unknown", encoding);
    if (zero.data[0] != 0 || zero.data[1] != 0 || zero.data[2] != 0)
        return FL_FAIL(err, FL_EFORMAT, "reserved bytes are set");
    if (layer > LAYER_MAX || count == 0 || count > FL_UPDATE_VALUES_MAX)
        return FL_FAIL(err, FL_ELIMIT, "layer %u with %u values", layer, count);
    const fl_update u = {
        .info = {(fl_update_encoding)encoding, layer, count, base_version, tokens},
        .blocks = {in.data + FL_UPDATE_HEAD, in.size - FL_UPDATE_HEAD},
    };
    if (in.size != fl_update_size(count, u.info.encoding))
        return FL_FAIL(err, FL_EFORMAT, "%zu bytes for %u values", in.size, count);
    const uint8_t *p = u.blocks.data;
    for (uint32_t at = 0; at < count; at += FL_UPDATE_BLOCK) {
        const uint32_t left = count - at, n = left < FL_UPDATE_BLOCK ? left : FL_UPDATE_BLOCK;
        FL_TRY(check_block(p, n, u.info.encoding, at / FL_UPDATE_BLOCK, err));
        p += BLOCK_HEAD + (size_t)n * code_size(u.info.encoding);
    }
    *ret = u;
    return FL_OK;
}

static double value_at(const fl_update *u, uint32_t i) {
    const size_t whole = BLOCK_HEAD + (size_t)FL_UPDATE_BLOCK * code_size(u->info.encoding);
    const uint8_t *block = u->blocks.data + i / FL_UPDATE_BLOCK * whole;
    const uint8_t *code =
        block + BLOCK_HEAD + (size_t)(i % FL_UPDATE_BLOCK) * code_size(u->info.encoding);
    return (double)get_code(code, u->info.encoding) * (double)fl_get_f32(block);
}

void fl_update_fixed(const fl_update *u, uint32_t first, uint32_t n, int64_t *out) {
    FL_ASSERT(first <= u->info.count && n <= u->info.count - first);
    // rint in the default mode: to nearest, ties to even. |value| <= 2^6, so the product is < 2^39.
    for (uint32_t i = 0; i < n; i++) out[i] = (int64_t)rint(value_at(u, first + i) * 0x1p32);
}

void fl_update_values(const fl_update *u, uint32_t first, uint32_t n, double *out) {
    FL_ASSERT(first <= u->info.count && n <= u->info.count - first);
    for (uint32_t i = 0; i < n; i++) out[i] = value_at(u, first + i);
}

double fl_update_norm2(const fl_update *u) {
    double sum = 0.0;
    for (uint32_t i = 0; i < u->info.count; i++) {
        const double v = value_at(u, i), square = v * v;
        sum += square;
    }
    return sum;
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
