// seal.h: an update's own envelope. Inside the session's encryption, each layer update is sealed
// to the coordinator's update key and signed by the node, so that a relay, an aggregator in between
// or a stolen spool file can neither read it, nor move it to another run, round, layer or base, nor
// pass it off as another node's. Pure.
//
//   offset  size  field
//   0       32    ephemeral X25519 key
//   32      n+16  XChaCha20-Poly1305(payload), key = BLAKE2b(X25519 | ephemeral key | update key),
//                 nonce 0 (each key seals one message), associated data = the label
//   n+48    64    Ed25519 signature over "fleetune/1 update", the label and everything before
#ifndef FL_PROTO_SEAL_H
#define FL_PROTO_SEAL_H

#include "common/crypto.h"
#include "common/status.h"
#include "proto/codec.h"

enum { FL_SEAL_EXTRA = 32 + 16 + 64 };

// What an update is; never sent with it as such: both sides know it from UPDATE_BEGIN and session.
typedef struct fl_seal_label {
    uint8_t run_id[FL_ID_SIZE];
    uint64_t round;
    fl_update_key key;
    uint64_t tokens;
    uint8_t node_key[FL_KEY_SIZE]; // Ed25519 identity of the node
} fl_seal_label;

// out_size must be payload.size + FL_SEAL_EXTRA (FL_EARG otherwise); `random` is 32 fresh bytes.
// FL_EARG too when update_key is not a usable X25519 key. payload must not overlap out.
fl_status fl_seal_update(const fl_seal_label *label, fl_bytes payload, const fl_secret *identity,
                         const uint8_t update_key[FL_KEY_SIZE], const uint8_t random[FL_KEY_SIZE],
                         uint8_t *out, size_t out_size, fl_err *err) FL_NODISCARD;

// Checks the signature, then opens. out needs sealed.size - FL_SEAL_EXTRA bytes.
//   FL_EFORMAT  too short   FL_EAUTH  signature, label or key does not fit   FL_ELIMIT  out_size
fl_status fl_unseal_update(const fl_seal_label *label, fl_bytes sealed,
                           const fl_secret *update_secret, const uint8_t update_key[FL_KEY_SIZE],
                           uint8_t *out, size_t out_size, fl_bytes *ret, fl_err *err) FL_NODISCARD;

#endif
