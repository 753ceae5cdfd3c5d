#include "node/upload/residual.h"

#include "common/checked.h"

#include <math.h>
#include <string.h>

static const int64_t most = (int64_t)FL_UPDATE_ABS_MAX << FL_UPDATE_FIXED_BITS;

static int64_t to_fixed(float v) {
    return (int64_t)rint((double)v * 0x1p32);
}

fl_status node_residual_add(const float *delta, uint32_t count, int64_t *sum, bool *ret_kept,
                            fl_err *err) {
    bool fits = true;
    for (uint32_t i = 0; i < count; i++) {
        if (!(fabsf(delta[i]) <= (float)FL_UPDATE_ABS_MAX)) // false for NaN
            return FL_FAIL(err, FL_EFORMAT,
                           "value %u of a change is not finite or above %d; training diverged", i,
                           FL_UPDATE_ABS_MAX);
        const int64_t s = sum[i] + to_fixed(delta[i]);
        fits = fits && s <= most && s >= -most;
    }
    for (uint32_t i = 0; i < count; i++) sum[i] = (fits ? sum[i] : 0) + to_fixed(delta[i]);
    *ret_kept = fits;
    return FL_OK;
}

void node_residual_take(const fl_update *sent, int64_t *sum) {
    int64_t read[FL_UPDATE_PAGE];
    for (uint32_t at = 0; at < sent->info.count; at += FL_UPDATE_PAGE) {
        const uint32_t left = sent->info.count - at;
        const uint32_t n = left < FL_UPDATE_PAGE ? left : FL_UPDATE_PAGE;
        fl_update_fixed(sent, at, n, read);
        for (uint32_t i = 0; i < n; i++) sum[at + i] -= read[i];
    }
}

void node_residual_age(int64_t *values, uint32_t count, uint64_t versions) {
    const uint64_t halvings = versions / NODE_RESIDUAL_FRESH;
    if (halvings == 0) return;
    for (uint32_t i = 0; i < count; i++)
        values[i] = halvings < 40 ? values[i] / ((int64_t)1 << halvings) : 0;
}

node_residual_fate node_residual_judge(fl_verdict verdict, fl_code code) {
    if (verdict != FL_VERDICT_REFUSED) return NODE_RESIDUAL_KEEP;
    switch (code) {
    case FL_CODE_NORM:
    case FL_CODE_NOT_FINITE:
    case FL_CODE_SHAPE:
    case FL_CODE_MALFORMED:
    case FL_CODE_RUN:
        return NODE_RESIDUAL_DROP;
    default: // late, on an old base, damaged on the way, of no task
        return NODE_RESIDUAL_RETURN;
    }
}

// ---- as bytes

static void make_key(const fl_secret *identity, uint8_t ret[FL_SEAL_KEY]) {
    fl_hasher h;
    fl_hash_init(&h, fl_secret_view(identity), FL_SEAL_KEY);
    fl_hash_add(&h, (fl_bytes){(const uint8_t *)"fleetune/1 residual", 19});
    fl_hash_done(&h, ret);
}

size_t node_residual_size(uint32_t count, size_t payload_size) {
    return FL_SEAL_NONCE + NODE_RESIDUAL_HEAD + payload_size + (size_t)count * NODE_RESIDUAL_VALUE +
           FL_SEAL_TAG;
}

// |value| <= 2^39: a sum is within 2^38, and so is what is read of it.
static void put_value(uint8_t *p, int64_t v) {
    const uint64_t bits = (uint64_t)v;
    FL_ASSERT(v >= -((int64_t)1 << 39) && v < (int64_t)1 << 39);
    fl_put_u32(p, (uint32_t)bits);
    p[4] = (uint8_t)(bits >> 32);
}

static int64_t get_value(const uint8_t *p) {
    const int64_t v = (int64_t)(fl_get_u32(p) | (uint64_t)p[4] << 32);
    return p[4] < 0x80 ? v : v - ((int64_t)1 << 40);
}

void node_residual_write(const node_residual *r, fl_bytes payload, const int64_t *values,
                         const fl_secret *identity, const uint8_t run_id[FL_ID_SIZE],
                         const uint8_t random[FL_SEAL_NONCE], uint8_t *out) {
    uint8_t key[FL_SEAL_KEY], *plain = out + FL_SEAL_NONCE, *p = plain + NODE_RESIDUAL_HEAD;
    memcpy(out, random, FL_SEAL_NONCE);
    memcpy(plain, "FLE1", 4);
    fl_put_u32(plain + 4, r->layer);
    fl_put_u32(plain + 8, r->count);
    fl_put_u32(plain + 12, (uint32_t)payload.size);
    fl_put_u64(plain + 16, r->base_version);
    fl_put_u64(plain + 24, r->sequence);
    memcpy(p, payload.data, payload.size);
    p += payload.size;
    for (uint32_t i = 0; i < r->count; i++, p += NODE_RESIDUAL_VALUE) put_value(p, values[i]);
    make_key(identity, key);
    const fl_bytes all = {plain, (size_t)(p - plain)};
    fl_seal(key, out, (fl_bytes){run_id, FL_ID_SIZE}, all, plain);
    fl_wipe(key, sizeof(key));
}

// The values, and with them what the update carried when it comes back.
static fl_status read_plain(fl_bytes plain, uint32_t layer, uint32_t count, bool returned,
                            node_residual *ret, int64_t *ret_values, fl_err *err) {
    fl_reader r = {.in = plain};
    const fl_bytes magic = fl_read_bytes(&r, 4);
    node_residual head;
    head.layer = fl_read_u32(&r);
    head.count = fl_read_u32(&r);
    const uint32_t payload_size = fl_read_u32(&r);
    head.base_version = fl_read_u64(&r);
    head.sequence = fl_read_u64(&r);
    const fl_bytes payload = fl_read_bytes(&r, payload_size);
    if (r.bad || memcmp(magic.data, "FLE1", 4) != 0)
        return FL_FAIL(err, FL_EFORMAT, "not the rest of an update");
    if (head.layer != layer || head.count != count)
        return FL_FAIL(err, FL_ELIMIT, "the rest of layer %u with %u values", head.layer,
                       head.count);
    const fl_bytes values = fl_read_bytes(&r, (uint64_t)count * NODE_RESIDUAL_VALUE);
    if (r.bad || fl_reader_left(&r) != 0)
        return FL_FAIL(err, FL_EFORMAT, "the rest of an update is cut short");
    for (uint32_t i = 0; i < count; i++)
        ret_values[i] = get_value(values.data + (size_t)i * NODE_RESIDUAL_VALUE);
    if (returned) {
        fl_update u;
        FL_TRY(fl_update_open(payload, &u, err));
        if (u.info.count != count) return FL_FAIL(err, FL_ELIMIT, "an update of another size");
        for (uint32_t at = 0; at < count; at += FL_UPDATE_PAGE) {
            int64_t sent[FL_UPDATE_PAGE];
            const uint32_t n = count - at < FL_UPDATE_PAGE ? count - at : FL_UPDATE_PAGE;
            fl_update_fixed(&u, at, n, sent);
            for (uint32_t i = 0; i < n; i++) ret_values[at + i] += sent[i];
        }
    }
    *ret = head;
    return FL_OK;
}

fl_status node_residual_read(uint8_t *bytes, size_t size, uint32_t layer, uint32_t count,
                             bool returned, const fl_secret *identity,
                             const uint8_t run_id[FL_ID_SIZE], node_residual *ret,
                             int64_t *ret_values, fl_err *err) {
    if (size < FL_SEAL_NONCE + FL_SEAL_TAG)
        return FL_FAIL(err, FL_EFORMAT, "the rest of an update is cut short");
    uint8_t key[FL_SEAL_KEY], *plain = bytes + FL_SEAL_NONCE;
    make_key(identity, key);
    const fl_status st = fl_unseal(key, bytes, (fl_bytes){run_id, FL_ID_SIZE},
                                   (fl_bytes){plain, size - FL_SEAL_NONCE}, plain, err);
    fl_wipe(key, sizeof(key));
    FL_TRY(st);
    return read_plain((fl_bytes){plain, size - FL_SEAL_NONCE - FL_SEAL_TAG}, layer, count, returned,
                      ret, ret_values, err);
}
