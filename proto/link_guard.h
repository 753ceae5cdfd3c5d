// link_guard.h: the connections under a listening link, as the kernel sees them. libzmq cannot
// close one peer's connection, holds a message of many parts until its last part comes however many
// there are, and keeps whoever finished the handshake for ever. So the link remembers the
// descriptor of each connection it accepted and shuts down those that ought to go. For link*.c
// only, under the link's lock; no libzmq.
//
// A descriptor belongs to libzmq, which may close it at any moment, and the system may give its
// number to another connection: each is shut down only while it has the cookie (SO_COOKIE, never
// used twice) that it was accepted with.
#ifndef FL_PROTO_LINK_GUARD_H
#define FL_PROTO_LINK_GUARD_H

#include "common/status.h"

typedef struct fl_guard_id { // of one connection, for ever
    int fd;
    uint64_t cookie; // 0: of none
} fl_guard_id;

typedef struct fl_guard_conn { // by descriptor
    uint64_t cookie;           // 0: none
    uint64_t since_ms;
    uint64_t frames;      // delivered from it
    uint64_t frames_then; // at the scan before
    uint64_t bytes_then;  // received by the kernel when a frame was last seen to be delivered
    uint64_t end_ms;      // to be cut then; 0: not
    bool cut;
} fl_guard_conn;

typedef struct fl_guard {
    fl_guard_conn *conns;
    size_t count; // slots
    size_t live;
    uint64_t cuts;
} fl_guard; // all zeros knows no connection

void fl_guard_done(fl_guard *g);
// Without memory for it, a connection is not watched.
void fl_guard_opened(fl_guard *g, int fd, uint64_t now_ms);
void fl_guard_closed(fl_guard *g, int fd);
// A whole frame came out of it.
fl_guard_id fl_guard_heard(fl_guard *g, int fd, uint64_t now_ms);
void fl_guard_cut(fl_guard *g, fl_guard_id id); // nothing when it is gone
// Cuts it at a scan a second later: what we said last still gets there.
void fl_guard_end(fl_guard *g, fl_guard_id id, uint64_t now_ms);

typedef struct fl_guard_limits {
    uint64_t held_max;   // bytes received and not delivered as frames
    uint64_t silent_ms;  // from accepting to the first frame
    uint64_t now_ms;
    uint64_t drained_ms; // when the owner last found that no frame waits
} fl_guard_limits;
// Shuts down who is over the limits.
void fl_guard_scan(fl_guard *g, const fl_guard_limits *limits);

#endif
