// link.h: delivers frames over ZeroMQ with CURVE, and nothing else. The only door to libzmq.
//
// The coordinator listens (ROUTER), a node dials (DEALER). Every listener runs its own ZAP handler,
// started before the port is bound, because libzmq without one lets anybody in; and before listen
// returns, a canary with a random key tries to connect and must be refused, with the handler's
// books showing that it was asked. A key has one connection, the one that spoke last; who never
// speaks, or sends and sends without finishing a frame, is cut. Keys here are raw CURVE (X25519)
// keys of 32 bytes.
//
// Threads: one thread owns a link. Only fl_link_admit, fl_link_revoke, fl_link_shut,
// fl_link_enrolment and fl_link_wake may be called from others. Each call here takes bounded time.
#ifndef FL_PROTO_LINK_H
#define FL_PROTO_LINK_H

#include "common/status.h"

enum {
    FL_LINK_KEY = 32,
    FL_LINK_FRAME_MAX = (1 << 20) + 4096, // ZMQ_MAXMSGSIZE; the default of frame_max
    FL_LINK_ENROL_FRAME_MAX = 2048,       // for keys that are not admitted
    FL_LINK_ENROL_MAX = 64,               // such keys known at one time
    FL_LINK_ENROL_FRAMES = 120,           // frames from one of them in a minute
};

typedef struct fl_link fl_link;
typedef uint64_t fl_link_peer; // one connection of a peer, as long as it lasts; 0 is none

typedef struct fl_link_opts {
    const char *endpoint;           // "tcp://HOST:PORT"; listening: "tcp://*:PORT", PORT may be *
    const uint8_t *curve_secret;    // own key pair [32] each; only read during the call (libzmq
    const uint8_t *curve_key;       // keeps its own copy of the secret)
    const uint8_t *coordinator_key; // dial: the CURVE key that must answer [32]
    uint32_t frame_max;             // received, dialled also sent; 0: FL_LINK_FRAME_MAX
    uint32_t queue_frames;          // messages queued a peer and direction; 0: 64
    uint32_t heartbeat_ms;     // 0: 1000; given up after 2.5 times that
    uint32_t handshake_ms;     // 0: 2500 listening, 3000 dialling
    uint32_t reconnect_max_ms; // dial, most between two tries; 0: 1 s for 15 minutes after a
                               // connection was lost (1 minute after the start), then 30 s
    const fl_link *share;      // dial: uses that dialled link's threads, and is closed before it
    bool skip_zap;             // tests only: proves that the canary finds a missing handler
} fl_link_opts;

// Binds and starts to serve. FL_EAUTH: the canary was let in or ZAP was not asked, nothing is
// bound any more. FL_EARG: endpoint or keys. FL_EIO: the port is taken, or no resources.
// At first no key is admitted and enrolment is closed.
fl_status fl_link_listen(const fl_link_opts *opts, fl_link **ret, fl_err *err) FL_NODISCARD;
// Starts to connect, in the background and for ever, as long as the owner keeps calling
// fl_link_receive; fl_link_state tells how it goes.
fl_status fl_link_dial(const fl_link_opts *opts, fl_link **ret, fl_err *err) FL_NODISCARD;
void fl_link_close(fl_link *link); // NULL is fine; drops what is not sent within 500 ms

// The endpoint bound to, with the real port ("tcp://0.0.0.0:40123").
const char *fl_link_endpoint(const fl_link *link);

// Who may connect. A revoked key's frames are dropped from the next one on, sends to it fail, its
// connection is closed within a second or so (what was sent before arrives), and it cannot connect
// again. FL_ENOMEM from admit only.
fl_status fl_link_admit(fl_link *link, const uint8_t key[FL_LINK_KEY], fl_err *err) FL_NODISCARD;
void fl_link_revoke(fl_link *link, const uint8_t key[FL_LINK_KEY]);
// The same for a while, for a key that misbehaves; closes its connection at once.
void fl_link_shut(fl_link *link, const uint8_t key[FL_LINK_KEY], uint32_t shut_ms);
// Open while a join token is live or a join waits for approval: unknown keys may connect, bounded
// in number, size and rate, and are marked FL_LINK_ENROL on every frame.
void fl_link_enrolment(fl_link *link, bool open);

typedef enum fl_link_class { FL_LINK_ENROL = 1, FL_LINK_ADMITTED = 2 } fl_link_class;

typedef struct fl_link_message {
    fl_link_peer peer;
    fl_link_class from;       // dial: always FL_LINK_ADMITTED
    uint8_t key[FL_LINK_KEY]; // the peer's CURVE key, as ZAP saw it; dial: the coordinator's
    fl_bytes frame;           // valid until the next receive or close on this link
} fl_link_message;

// The next frame. timeout_ms: 0 polls. FL_ETIME: nothing came in time, or fl_link_wake was called.
// What is oversized, in several parts, revoked or over its rate is dropped and counted, never
// delivered.
fl_status fl_link_receive(fl_link *link, uint32_t timeout_ms, fl_link_message *ret,
                          fl_err *err) FL_NODISCARD;

// Queues one frame (copied). peer is ignored on a dialled link. Never waits.
//   FL_ETIME   the queue is full, or a dialled link is not up: try again later
//   FL_ENOENT  that peer has gone, or was revoked
//   FL_ELIMIT  above frame_max
fl_status fl_link_send(fl_link *link, fl_link_peer peer, fl_bytes frame, fl_err *err) FL_NODISCARD;

// For a loop with more to wait for: readable (edge-triggered!) when something happened. After each
// wake-up, and after each send, call fl_link_receive(.., 0, ..) until FL_ETIME.
int fl_link_fd(const fl_link *link);
void fl_link_wake(fl_link *link); // makes a waiting receive return FL_ETIME; any thread

typedef enum fl_link_status {
    FL_LINK_CONNECTING = 1, // nobody answers (yet)
    FL_LINK_UP = 2,
    FL_LINK_REFUSED = 3,  // the coordinator's ZAP handler does not admit our key
    FL_LINK_MISMATCH = 4, // something answers that is not our coordinator: wrong key or no CURVE
} fl_link_status;
// Dial: how it goes, as of the last receive. Listen: always FL_LINK_UP.
fl_link_status fl_link_state(const fl_link *link);

typedef struct fl_link_stats {
    uint64_t frames_in, frames_out, bytes_in, bytes_out;
    uint64_t dropped; // revoked, in several parts, too large for its class, over its rate
    uint64_t zap_admitted, zap_enrol, zap_refused;
    uint64_t cut; // connections closed: silent, or more bytes than frames, revoked or shut keys
    uint8_t refused_key[FL_LINK_KEY]; // of the newest refused connection or dropped frame
} fl_link_stats;
void fl_link_stats_get(const fl_link *link, fl_link_stats *ret);

#endif
