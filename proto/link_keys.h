// link_keys.h: the link's books: which CURVE key may do what, and where it was last heard. Plain
// data under the link's lock; knows nothing of sockets. For link.c only.
#ifndef FL_PROTO_LINK_KEYS_H
#define FL_PROTO_LINK_KEYS_H

#include "proto/link.h"
#include "proto/link_guard.h"

// One key that ZAP has seen or the owner admitted. Slots are stable, so that a peer's number, which
// is (slot + 1) << 32 | route, keeps its meaning when a key is admitted in mid-conversation.
typedef struct fl_link_entry {
    bool used;
    uint8_t key[FL_LINK_KEY];
    uint8_t class;  // fl_link_class; 0: revoked, kept only while its slot is not needed
    uint32_t route; // of the connection that spoke last
    bool routed;
    fl_guard_id connection; // it spoke on last
    uint64_t shut_ms;   // refused until then
    uint64_t address;   // ENROL: hash of where it came from
    uint64_t seen_ms;   // ENROL
    uint64_t window_ms; // ENROL: start of the minute that frames_window counts in
    uint32_t frames_window;
} fl_link_entry;

typedef struct fl_link_keys {
    bool enrolment; // unknown keys may come in, as FL_LINK_ENROL
    fl_link_entry *entries;
    size_t entry_count, enrol_count;
    uint32_t *buckets; // open addressing: slot + 1, 0 is empty; bucket_count is a power of two
    size_t bucket_count;
} fl_link_keys; // all zeros is an empty, closed book

void fl_link_keys_done(fl_link_keys *k);
bool fl_link_keys_admit(fl_link_keys *k, const uint8_t key[FL_LINK_KEY]); // false: no memory
void fl_link_keys_revoke(fl_link_keys *k, const uint8_t key[FL_LINK_KEY]);

// A connection with this key asks to come in: its class, or 0 to refuse. `address` is a hash of
// where it comes from: one address cannot take all the room there is for unknown keys.
int fl_link_keys_ask(fl_link_keys *k, const uint8_t key[FL_LINK_KEY], uint64_t address,
                     uint64_t now_ms);

// A frame of this key arrived on connection `route`: the peer's number, or 0 to drop the frame.
// frame_max is the limit of admitted keys; unknown ones have their own, in size and in rate.
fl_link_peer fl_link_keys_frame(fl_link_keys *k, const uint8_t key[FL_LINK_KEY], size_t size,
                                size_t frame_max, uint32_t route, uint64_t now_ms,
                                fl_link_class *ret_class);

// Is that peer's connection the last one its key spoke on, and the key not revoked?
bool fl_link_keys_reachable(const fl_link_keys *k, fl_link_peer peer);

// The connection that the key spoke on last, or none. Then `now` takes its place unless it is none.
fl_guard_id fl_link_keys_connection(fl_link_keys *k, const uint8_t key[FL_LINK_KEY],
                                    fl_guard_id now);
// Neither let in nor heard until then, and what it is stays.
void fl_link_keys_shut(fl_link_keys *k, const uint8_t key[FL_LINK_KEY], uint64_t until_ms);

uint64_t fl_link_hash(const uint8_t *p, size_t size);

#endif
