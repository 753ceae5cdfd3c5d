#include "sim/crypto.h"

#include "common/plant.h"
#include "sim/rng.h"

#include <stdlib.h>
#include <string.h>

void sim_fill(sim_rng *r, void *out, size_t size) {
    uint8_t *p = out;
    for (size_t at = 0; at < size; at += 8) {
        const uint64_t v = sim_draw(r);
        memcpy(p + at, &v, size - at < 8 ? size - at : 8);
    }
}

static void hash2(const char *label, fl_bytes a, fl_bytes b, uint8_t ret[FL_HASH_SIZE]) {
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){NULL, 0}, FL_HASH_SIZE);
    fl_hash_add(&h, (fl_bytes){(const uint8_t *)label, strlen(label)});
    fl_hash_add(&h, a);
    fl_hash_add(&h, b);
    fl_hash_done(&h, ret);
}

void sim_public(const uint8_t secret[FL_SEED_SIZE], uint8_t ret_key[FL_DH_KEY]) {
    hash2("public", (fl_bytes){secret, FL_SEED_SIZE}, (fl_bytes){NULL, 0}, ret_key);
}

static void signature(const uint8_t key[FL_SIGN_KEY], fl_bytes message,
                      uint8_t ret[FL_SIGN_SIZE]) {
    hash2("sign", (fl_bytes){key, FL_SIGN_KEY}, message, ret);
    memset(ret + FL_HASH_SIZE, 0, FL_SIGN_SIZE - FL_HASH_SIZE);
}

static fl_status pk_sign(const fl_secret *seed, fl_bytes message, uint8_t ret[FL_SIGN_SIZE],
                         fl_err *err) {
    uint8_t key[FL_SIGN_KEY];
    (void)err;
    sim_public(fl_secret_view(seed).data, key);
    signature(key, message, ret);
    return FL_OK;
}

static bool pk_check(const uint8_t key[FL_SIGN_KEY], fl_bytes message,
                     const uint8_t sig[FL_SIGN_SIZE]) {
    uint8_t want[FL_SIGN_SIZE];
    signature(key, message, want);
    return memcmp(want, sig, sizeof(want)) == 0;
}

// The same for both sides: of the two public keys in order.
static fl_status pk_dh(const uint8_t secret[FL_DH_KEY], const uint8_t peer[FL_DH_KEY],
                       uint8_t ret_shared[FL_DH_KEY], fl_err *err) {
    uint8_t mine[FL_DH_KEY];
    (void)err;
    sim_public(secret, mine);
    const bool first = memcmp(mine, peer, FL_DH_KEY) < 0;
    hash2("shared", (fl_bytes){first ? mine : peer, FL_DH_KEY},
          (fl_bytes){first ? peer : mine, FL_DH_KEY}, ret_shared);
    return FL_OK;
}

// Ordinary memory: a large fleet has more sessions than the system has locked pages.
static void *pk_take(size_t size) {
    return calloc(1, size);
}

const fl_pk sim_pk = {.sign = pk_sign,
                      .sign_check = pk_check,
                      .dh_key = sim_public,
                      .dh = pk_dh,
                      .take = pk_take,
                      .give = free};

// ---- the envelope of an update: 32 bytes of key, payload, 16 bytes of tag, 64 of signature

static void seal_digest(const fl_seal_label *l, fl_bytes payload, uint8_t ret[FL_HASH_SIZE]) {
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){NULL, 0}, FL_HASH_SIZE);
    fl_hash_add(&h, (fl_bytes){l->run_id, FL_ID_SIZE});
    fl_hash_add(&h, (fl_bytes){l->node_key, FL_KEY_SIZE});
    fl_hash_add_u64(&h, l->round);
    fl_hash_add_u64(&h, l->key.layer);
    fl_hash_add_u64(&h, l->key.base_version);
    fl_hash_add_u64(&h, l->key.sequence);
    fl_hash_add_u64(&h, l->tokens);
    fl_hash_add(&h, payload);
    fl_hash_done(&h, ret);
}

void sim_seal(const fl_seal_label *label, fl_bytes payload, uint8_t *out) {
    memset(out, 0, FL_SEAL_EXTRA + payload.size);
    memcpy(out + FL_KEY_SIZE, payload.data, payload.size);
    seal_digest(label, payload, out + FL_KEY_SIZE + payload.size + 16);
}

fl_status sim_unseal(const fl_seal_label *label, fl_bytes sealed, const fl_secret *update_secret,
                     const uint8_t update_key[FL_KEY_SIZE], uint8_t *out, size_t out_size,
                     fl_bytes *ret, fl_err *err) {
    uint8_t digest[FL_HASH_SIZE];
    (void)update_secret, (void)update_key;
    if (sealed.size < FL_SEAL_EXTRA)
        return FL_FAIL(err, FL_EFORMAT, "a sealed update of %zu bytes", sealed.size);
    const size_t size = sealed.size - FL_SEAL_EXTRA;
    if (size > out_size) return FL_FAIL(err, FL_ELIMIT, "update of %zu bytes has no room", size);
    const fl_bytes payload = {sealed.data + FL_KEY_SIZE, size};
    seal_digest(label, payload, digest);
    if (memcmp(digest, payload.data + size + 16, sizeof(digest)) != 0 && !fl_plant(NO_SIGNATURE))
        return FL_FAIL(err, FL_EAUTH, "the update's signature does not hold");
    memcpy(out, payload.data, size);
    *ret = (fl_bytes){out, size};
    return FL_OK;
}
