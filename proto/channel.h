// channel.h: one authenticated, encrypted session between a node and the coordinator. No sockets,
// no clock, no randomness of its own: bytes and random numbers come in, bytes go out.
//
// Handshake (three messages, all clear, all protobuf):
//   node -> HELLO         protocol, identity N, ephemeral key E, nonce
//        <- HELLO_REPLY   protocol, session id, ephemeral key F, nonce, update key, signature by C
//   node -> HELLO_FINISH  session id, signature by N; sealed messages may follow at once
// Both sign T = BLAKE2b-256("fleetune/1 handshake", protocol, N, C, E, F, both nonces, session id,
// update key), each with its own prefix, so that neither signature can be used for the other, for
// another session or for another pair. Keys: BLAKE2b-512(key = X25519(E, F), "fleetune/1 keys", T),
// one half for each direction. Freshness comes from the nonces: no clock is read, and a device that
// believes it is 1970 works.
//
// A sealed frame: XChaCha20-Poly1305, nonce = counter, associated data = the frame's head. A replay
// window of FL_CHANNEL_WINDOW counters accepts late frames once.
//
// The coordinator keeps a live session while a new handshake is under way: HELLO alone, which
// anyone who holds the transport key can send, changes nothing until HELLO_FINISH proves who it is.
// After a restart of either side there is no session, and a new handshake is the only way on.
#ifndef FL_PROTO_CHANNEL_H
#define FL_PROTO_CHANNEL_H

#include "common/crypto.h"
#include "common/status.h"
#include "proto/codec.h"
#include "proto/frame.h"

enum {
    FL_CHANNEL_RANDOM = 72,  // bytes of randomness a handshake message takes; never twice the same
    FL_CHANNEL_WINDOW = 256, // counters behind the newest one that are still accepted, once each
};
#define FL_CHANNEL_COUNTER_MAX ((uint64_t)1 << 40) // then FL_ESTATE: shake hands again

typedef enum fl_channel_role { FL_CHANNEL_NODE, FL_CHANNEL_COORDINATOR } fl_channel_role;

typedef struct fl_channel_opts {
    fl_channel_role role;
    const fl_secret *identity;   // own Ed25519 secret; must outlive the channel
    const uint8_t *identity_key; // own Ed25519 public key [32], copied
    const uint8_t *peer_key;     // the peer's, pinned at enrolment [32], copied
    const uint8_t *update_key;   // coordinator only: what HELLO_REPLY announces [32]
    const fl_pk *pk;             // NULL: fl_pk_real
    uint64_t counter_max;        // 0: FL_CHANNEL_COUNTER_MAX; tests set it small
} fl_channel_opts;

typedef struct fl_channel fl_channel; // opaque: holds session keys in locked memory

fl_status fl_channel_open(const fl_channel_opts *opts, fl_channel **ret, fl_err *err) FL_NODISCARD;
void fl_channel_close(fl_channel *ch); // NULL is fine; wipes the keys

// Node: starts a handshake (again); drops the session there was. `random` must be fresh.
fl_status fl_channel_hello(fl_channel *ch, const uint8_t random[FL_CHANNEL_RANDOM], fl_hello *ret,
                           fl_err *err) FL_NODISCARD;
// Coordinator: answers. Replaces an unfinished handshake, keeps the live session.
//   FL_EUNSUPPORTED  another protocol version   FL_EAUTH  not the identity this channel is for
fl_status fl_channel_on_hello(fl_channel *ch, const fl_hello *hello,
                              const uint8_t random[FL_CHANNEL_RANDOM], fl_hello_reply *ret,
                              fl_err *err) FL_NODISCARD;
// Node: checks the coordinator's signature. On FL_OK the session is live and *ret is to be sent
// before anything sealed. FL_EAUTH: not the pinned coordinator. FL_ESTATE: no HELLO is waiting.
// After a failure the HELLO still waits: one forged reply does not end a handshake.
fl_status fl_channel_on_reply(fl_channel *ch, const fl_hello_reply *reply, fl_hello_finish *ret,
                              fl_err *err) FL_NODISCARD;
// Coordinator: on FL_OK the new session is live and replaces the old one.
fl_status fl_channel_on_finish(fl_channel *ch, const fl_hello_finish *finish,
                               fl_err *err) FL_NODISCARD;

bool fl_channel_live(const fl_channel *ch);
uint64_t fl_channel_session(const fl_channel *ch);          // 0 when there is no live session
const uint8_t *fl_channel_update_key(const fl_channel *ch); // node, live: [32]; else NULL
void fl_channel_drop(fl_channel *ch);                       // ends the session: revoked, timed out

// A whole sealed frame into out[out_size], which needs FL_FRAME_HEAD + body.size + FL_FRAME_TAG.
// body must not overlap out.
//   FL_ESTATE  no live session, or its counters are used up     FL_ELIMIT  too large
fl_status fl_channel_seal(fl_channel *ch, fl_msg_type type, fl_bytes body, uint8_t *out,
                          size_t out_size, size_t *ret_size, fl_err *err) FL_NODISCARD;

// Opens a sealed frame that fl_frame_decode accepted. out needs frame->body.size - FL_FRAME_TAG
// bytes and must not overlap the frame. Nothing is marked as seen unless the seal holds.
//   FL_ESTATE  no such session      FL_EAUTH  altered, replayed or too old       FL_ELIMIT out_size
fl_status fl_channel_unseal(fl_channel *ch, const fl_frame *frame, uint8_t *out, size_t out_size,
                            fl_bytes *ret, fl_err *err) FL_NODISCARD;

#endif
