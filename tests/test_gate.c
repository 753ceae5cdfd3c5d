// Goal: none of a million hostile payloads reaches a layer's sum beyond what the gate promises:
// nothing that is not finite, and nothing longer than clip-factor times the running median.
// Method: payloads made from good ones (NaN, infinite, negative and huge scales, forbidden codes,
// huge norms, cut, lengthened, with a wrong head, random bits) go through fl_update_open, the gate
// and the fold as the coordinator does it. What passes is weighed again here, from the sum itself.
#include "common/checked.h"
#include "coordinator/aggregate.h"
#include "proto/update.h"
#include "tests/check.h"

enum { VALUES = 40, TRIES = 1000000, SIZE_MAX_HERE = 256 };

static const coord_gate gate = {.clip_factor = 4, .refuse_factor = 20, .norms_min = 6};

typedef enum kind {
    KIND_NAN,
    KIND_INFINITE,
    KIND_NEGATIVE,
    KIND_HUGE_SCALE,
    KIND_HUGE_NORM,
    KIND_CODE,
    KIND_CUT,
    KIND_LONG,
    KIND_HEAD,
    KIND_BITS,
    KIND_COUNT
} kind;

static size_t good_payload(float scale, uint8_t *out) {
    float values[VALUES];
    fl_err err;
    for (int i = 0; i < VALUES; i++) values[i] = scale * t_randf();
    const fl_update_info info = {
        .encoding = FL_UPDATE_INT16, .layer = 3, .count = VALUES, .base_version = 7, .tokens = 100};
    const size_t size = fl_update_size(VALUES, FL_UPDATE_INT16);
    T_NEED(size <= SIZE_MAX_HERE, "room");
    T_OK(fl_update_encode(&info, values, 1, out, size, NULL, &err), err);
    return size;
}

static void put_scale(uint8_t *payload, float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof(bits));
    fl_put_u32(payload + FL_UPDATE_HEAD, bits);
}

// *ret_valid: it may well be an update that is allowed.
static size_t hostile_payload(kind k, uint8_t *p, bool *ret_valid) {
    size_t size = good_payload(0.01f, p);
    const uint64_t r = t_rand();
    *ret_valid = false;
    switch (k) {
    case KIND_NAN:
        fl_put_u32(p + FL_UPDATE_HEAD,
                   0x7f800001u | (uint32_t)(r & 0x7fffff) | (uint32_t)(r >> 32 & 0x80000000u));
        break;
    case KIND_INFINITE:
        put_scale(p, r % 2 == 0 ? INFINITY : -INFINITY);
        break;
    case KIND_NEGATIVE:
        put_scale(p, -0.001f * (float)(1 + r % 1000));
        break;
    case KIND_HUGE_SCALE: // the largest code is 32767: anything above 64 / 32767 is too much
        put_scale(p, ldexpf(1.0f, -8 + (int)(r % 130)));
        break;
    case KIND_HUGE_NORM: // within the format's bounds, far above the others
        size = good_payload(1.0f + (float)(r % 60), p);
        break;
    case KIND_CODE: // the code without an opposite
        fl_put_u16(p + FL_UPDATE_HEAD + 4 + 2 * (r % VALUES), 0x8000);
        break;
    case KIND_CUT:
        size = (size_t)(r % size);
        break;
    case KIND_LONG:
        p[size] = (uint8_t)r;
        size++;
        break;
    case KIND_HEAD:
        p[r % 16] ^= (uint8_t)(1 + (r >> 8) % 255);
        *ret_valid = true; // another layer, say: what the loop compares with what was offered
        break;
    default:
        for (int i = 0; i < 3; i++) p[t_rand() % size] ^= (uint8_t)(1u << t_rand() % 8);
        *ret_valid = true;
        break;
    }
    return size;
}

static bool is_meant(const fl_update *u) { // as open_payload of the loop
    return u->info.layer == 3 && u->info.count == VALUES && u->info.base_version == 7 &&
           u->info.tokens == 100;
}

static void test_a_million_hostile_payloads(void) {
    static coord_norms norms;
    coord_sum sum;
    fl_err err;
    uint64_t passed = 0, per_kind[KIND_COUNT] = {0};
    T_OK(coord_sum_init(&sum, VALUES, &err), err);
    uint8_t p[SIZE_MAX_HERE];
    for (int i = 0; i < 10; i++) { // what the layer's honest updates were like
        fl_update u;
        const size_t size = good_payload(0.01f, p);
        T_OK(fl_update_open((fl_bytes){p, size}, &u, &err), err);
        coord_norms_add(&norms, sqrt(fl_update_norm2(&u)));
    }
    const double limit = gate.clip_factor * coord_norms_median(&norms);
    for (int i = 0; i < TRIES; i++) {
        const kind k = (kind)(i % KIND_COUNT);
        int64_t values[VALUES];
        fl_update u;
        uint32_t clip = 0;
        bool valid;
        const size_t size = hostile_payload(k, p, &valid);
        if (fl_update_open((fl_bytes){p, size}, &u, NULL) != FL_OK || !is_meant(&u)) continue;
        if (coord_gate_norm(&gate, &norms, sqrt(fl_update_norm2(&u)), &clip, NULL) != FL_OK)
            continue;
        per_kind[k]++;
        passed++;
        T_CHECK(valid, "a payload of kind %d passed at try %d", (int)k, i);
        coord_sum_reset(&sum);
        fl_update_fixed(&u, 0, VALUES, values);
        T_OK(coord_sum_fold(&sum, values, VALUES, COORD_ONE, clip, &err), err);
        double norm2 = 0.0;
        for (int v = 0; v < VALUES; v++) {
            // weight, clip and fixed point
            const double x = (double)coord_sum_at(&sum, (size_t)v) * 0x1p-64;
            norm2 += x * x;
        }
        T_CHECK(sqrt(norm2) <= limit * (1 + 1e-9), "try %d: norm %g above %g", i, sqrt(norm2),
                limit);
        if (t_failed) break;
    }
    for (int k = KIND_NAN; k <= KIND_LONG; k++) T_EQ(per_kind[k], 0);
    T_CHECK(passed > 0, "flipped bits now and then leave a payload that is one");
    coord_sum_done(&sum);
}

T_MAIN({"a_million_hostile_payloads", test_a_million_hostile_payloads})
