#include "proto/seal.h"

#include "common/checked.h"

#include <string.h>

enum { LABEL_SIZE = 17 + FL_ID_SIZE + 5 * 8 + FL_KEY_SIZE };

static void make_label(const fl_seal_label *l, uint8_t ret[LABEL_SIZE]) {
    uint8_t *p = ret;
    memcpy(p, "fleetune/1 update", 17);
    p += 17;
    memcpy(p, l->run_id, FL_ID_SIZE);
    p += FL_ID_SIZE;
    const uint64_t numbers[] = {l->round, l->key.layer, l->key.base_version, l->key.sequence,
                                l->tokens};
    for (size_t i = 0; i < FL_COUNT(numbers); i++, p += 8) fl_put_u64(p, numbers[i]);
    memcpy(p, l->node_key, FL_KEY_SIZE);
}

// The one key that seals this payload. It depends on both public keys, so that a sealed payload
// cannot be re-addressed to a related key.
static fl_status make_key(const fl_secret *mine, const uint8_t peer[FL_KEY_SIZE],
                          const uint8_t ephemeral[FL_KEY_SIZE], const uint8_t update[FL_KEY_SIZE],
                          uint8_t ret[FL_SEAL_KEY], fl_err *err) {
    fl_secret *shared = NULL;
    FL_TRY(fl_dh(mine, peer, &shared, err));
    fl_hasher h;
    fl_hash_init(&h, fl_secret_view(shared), FL_SEAL_KEY);
    fl_hash_add(&h, (fl_bytes){(const uint8_t *)"fleetune/1 update key", 21});
    fl_hash_add(&h, (fl_bytes){ephemeral, FL_KEY_SIZE});
    fl_hash_add(&h, (fl_bytes){update, FL_KEY_SIZE});
    fl_hash_done(&h, ret);
    fl_secret_close(shared);
    return FL_OK;
}

// The signature is over a digest, so that a large update is not held twice.
static void make_digest(const uint8_t label[LABEL_SIZE], fl_bytes sealed,
                        uint8_t ret[FL_HASH_SIZE]) {
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){NULL, 0}, FL_HASH_SIZE);
    fl_hash_add(&h, (fl_bytes){label, LABEL_SIZE});
    fl_hash_add_framed(&h, sealed);
    fl_hash_done(&h, ret);
}

static const uint8_t nonce_zero[FL_SEAL_NONCE];

fl_status fl_seal_update(const fl_seal_label *label, fl_bytes payload, const fl_secret *identity,
                         const uint8_t update_key[FL_KEY_SIZE], const uint8_t random[FL_KEY_SIZE],
                         uint8_t *out, size_t out_size, fl_err *err) {
    if (out_size < FL_SEAL_EXTRA || out_size - FL_SEAL_EXTRA != payload.size)
        return FL_FAIL(err, FL_EARG, "a payload of %zu bytes does not seal to %zu", payload.size,
                       out_size);
    uint8_t text[LABEL_SIZE], key[FL_SEAL_KEY], digest[FL_HASH_SIZE];
    fl_secret *mine = NULL;
    make_label(label, text);
    FL_TRY(fl_secret_copy((fl_bytes){random, FL_KEY_SIZE}, &mine, err));
    fl_status st = fl_dh_key(mine, out, err);
    if (st == FL_OK && make_key(mine, update_key, out, update_key, key, err) != FL_OK)
        st = FL_FAIL(err, FL_EARG, "the coordinator's update key is not usable");
    if (st != FL_OK) goto out;
    fl_seal(key, nonce_zero, (fl_bytes){text, LABEL_SIZE}, payload, out + FL_KEY_SIZE);
    const size_t sealed = out_size - FL_SIGNATURE_SIZE;
    make_digest(text, (fl_bytes){out, sealed}, digest);
    st = fl_sign(identity, (fl_bytes){digest, sizeof(digest)}, out + sealed, err);
out:
    fl_wipe(key, sizeof(key));
    fl_secret_close(mine);
    return st;
}

fl_status fl_unseal_update(const fl_seal_label *label, fl_bytes sealed,
                           const fl_secret *update_secret, const uint8_t update_key[FL_KEY_SIZE],
                           uint8_t *out, size_t out_size, fl_bytes *ret, fl_err *err) {
    if (sealed.size < FL_SEAL_EXTRA)
        return FL_FAIL(err, FL_EFORMAT, "a sealed update of %zu bytes", sealed.size);
    const size_t body = sealed.size - FL_SIGNATURE_SIZE, size = sealed.size - FL_SEAL_EXTRA;
    if (size > out_size) return FL_FAIL(err, FL_ELIMIT, "update of %zu bytes has no room", size);
    uint8_t text[LABEL_SIZE], key[FL_SEAL_KEY], digest[FL_HASH_SIZE];
    make_label(label, text);
    make_digest(text, (fl_bytes){sealed.data, body}, digest);
    if (!fl_sign_check(label->node_key, (fl_bytes){digest, sizeof(digest)}, sealed.data + body))
        return FL_FAIL(err, FL_EAUTH, "the update's signature does not hold");
    FL_TRY(make_key(update_secret, sealed.data, sealed.data, update_key, key, err));
    const fl_bytes box = {sealed.data + FL_KEY_SIZE, body - FL_KEY_SIZE};
    const fl_status st = fl_unseal(key, nonce_zero, (fl_bytes){text, LABEL_SIZE}, box, out, err);
    fl_wipe(key, sizeof(key));
    if (st == FL_OK) *ret = (fl_bytes){out, size};
    return st;
}
