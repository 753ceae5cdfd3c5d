// invite.h: the join URL, and the proof that both sides know its secret. Pure.
//
//   fleetune://HOST:PORT/XXXX      XXXX = base32 of: version (1), coordinator's CURVE key (32),
//                                  one-time secret (16), checksum (4)
// The node learns the coordinator's transport key before it says anything; the secret itself never
// travels: each side proves that it knows it with a keyed hash over what it sends, so the pinned
// identities do not rest on the transport. The coordinator stores the token key, not the secret.
#ifndef FL_PROTO_INVITE_H
#define FL_PROTO_INVITE_H

#include "common/crypto.h"
#include "common/status.h"
#include "proto/codec.h"

enum {
    FL_INVITE_SECRET = 16,
    FL_INVITE_HOST_MAX = 255,
    FL_INVITE_URL_MAX = 384, // with the NUL
};

typedef struct fl_invite {
    char host[FL_INVITE_HOST_MAX + 1]; // name or address; an IPv6 address without its brackets
    uint16_t port;
    uint8_t curve_key[FL_KEY_SIZE];
    uint8_t secret[FL_INVITE_SECRET]; // wipe with fl_wipe when done
} fl_invite;

// FL_EARG: host is empty, too long or has characters that no host has, or port is 0.
fl_status fl_invite_format(const fl_invite *invite, char ret[FL_INVITE_URL_MAX],
                           fl_err *err) FL_NODISCARD;
// FL_EFORMAT says which part is wrong; a mistyped character is found by the checksum. Case, and
// spaces around it, do not matter.
fl_status fl_invite_parse(const char *url, fl_invite *ret, fl_err *err) FL_NODISCARD;

// What both sides derive from the secret: a public name for the token and the key of the proofs.
void fl_invite_derive(const uint8_t secret[FL_INVITE_SECRET], uint8_t ret_id[FL_TOKEN_ID_SIZE],
                      uint8_t ret_key[FL_KEY_SIZE]);

// Fills request->proof over every other field of it. curve_key: the coordinator's.
void fl_invite_prove(const uint8_t token_key[FL_KEY_SIZE], const uint8_t curve_key[FL_KEY_SIZE],
                     fl_join_request *request);
bool fl_invite_check(const uint8_t token_key[FL_KEY_SIZE], const uint8_t curve_key[FL_KEY_SIZE],
                     const fl_join_request *request);
// The same for the reply: over every field of it and the request's nonce and identity.
void fl_invite_prove_reply(const uint8_t token_key[FL_KEY_SIZE], const fl_join_request *request,
                           fl_join_reply *reply);
bool fl_invite_check_reply(const uint8_t token_key[FL_KEY_SIZE], const fl_join_request *request,
                           const fl_join_reply *reply);

// A node's short id: the first 16 bytes of BLAKE2b-256("fleetune/1 node", identity key).
void fl_node_id(const uint8_t identity_key[FL_KEY_SIZE], uint8_t ret[FL_ID_SIZE]);

#endif
