// link_internal.h: what link.c and link_zap.c share. Not for others: include link.h.
#ifndef FL_PROTO_LINK_INTERNAL_H
#define FL_PROTO_LINK_INTERNAL_H

#include "proto/link_guard.h"
#include "proto/link_keys.h"

#include <pthread.h>
#include <zmq.h>

enum {
    FL_LINK_ENDPOINT_MAX = 384,
    FL_LINK_HEX_KEY = 2 * FL_LINK_KEY + 1,
};

struct fl_link {
    void *context, *socket, *zap, *monitor; // monitor: of the ZAP thread when listening
    bool listening, shared; // shared: the context is another link's
    size_t frame_max;
    uint8_t coordinator_key[FL_LINK_KEY];
    char endpoint[FL_LINK_ENDPOINT_MAX];
    int wake_fd;
    zmq_msg_t in;
    fl_link_status state;
    uint64_t redial_at_ms; // 0: no need, libzmq connects again by itself
    uint32_t redial_ms, redial_max_ms;
    uint32_t reconnect_max_ms; // as opened
    uint64_t quick_until_ms; // dial: from then on it tries seldom
    bool slow;

    pthread_t zap_thread;
    bool zap_running, lock_made;
    pthread_mutex_t lock; // for everything below
    bool canary_asked;
    uint8_t canary_key[FL_LINK_KEY];
    fl_link_keys keys;
    fl_guard guard;
    uint64_t held_max;   // of the guard's limits
    uint64_t drained_ms; // when no frame waited
    fl_link_stats stats;
};

// Starts the thread that answers ZAP's questions and watches the connections of link->socket, which
// must not be bound yet. FL_EIO.
fl_status fl_link_zap_start(fl_link *link, fl_err *err) FL_NODISCARD;
bool fl_link_hex_to_key(const char *hex, uint8_t key[FL_LINK_KEY]);

// ---- link.c
bool fl_link_set_int(void *socket, int option, int value);
// A PAIR on which libzmq tells of these events (ZMQ_EVENT_*) of a socket; NULL: no resources.
void *fl_link_monitor_open(void *context, void *socket, int events);
// The next event of it and the event's value, or 0 when none came in time.
unsigned fl_link_monitor_next(void *monitor, int flags, int32_t *ret_value);

#endif
