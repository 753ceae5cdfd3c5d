// The thread of a listening link: who may come in (ZAP, RFC 27), and who must go.
#include "common/clock.h"
#include "common/fault.h"
#include "proto/link_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

enum {
    SCAN_MS = 40,      // between looks at the connections: a fast one pours 20 MB in it
    SILENT_MS = 10000, // a node speaks at once; who says nothing for so long has no business here
};
#define ZAP_ENDPOINT "inproc://zeromq.zap.01"

// The decision: 0 refuse, else the class. Every question and its answer is counted.
static int zap_decide(fl_link *link, const uint8_t key[FL_LINK_KEY], uint64_t address) {
    pthread_mutex_lock(&link->lock);
    if (memcmp(key, link->canary_key, FL_LINK_KEY) == 0) link->canary_asked = true;
    const int class = fl_link_keys_ask(&link->keys, key, address, fl_clock_ms());
    link->stats.zap_admitted += class == FL_LINK_ADMITTED;
    link->stats.zap_enrol += class == FL_LINK_ENROL;
    link->stats.zap_refused += class == 0;
    if (class == 0) memcpy(link->stats.refused_key, key, FL_LINK_KEY);
    pthread_mutex_unlock(&link->lock);
    return class;
}

static void key_to_hex(const uint8_t key[FL_LINK_KEY], char out[FL_LINK_HEX_KEY]) {
    for (size_t i = 0; i < FL_LINK_KEY; i++) snprintf(out + 2 * i, 3, "%02x", key[i]);
}

bool fl_link_hex_to_key(const char *hex, uint8_t key[FL_LINK_KEY]) {
    if (strlen(hex) != FL_LINK_HEX_KEY - 1) return false;
    for (size_t i = 0; i < FL_LINK_KEY; i++) {
        unsigned v = 0;
        for (size_t k = 0; k < 2; k++) {
            const char c = hex[2 * i + k];
            if (c >= '0' && c <= '9')
                v = v * 16 + (unsigned)(c - '0');
            else if (c >= 'a' && c <= 'f')
                v = v * 16 + (unsigned)(c - 'a') + 10;
            else
                return false;
        }
        key[i] = (uint8_t)v;
    }
    return true;
}

// The parts of a ZAP request (RFC 27): version, id, domain, address, identity, mechanism, key.
enum {
    ZAP_VERSION,
    ZAP_ID,
    ZAP_DOMAIN,
    ZAP_ADDRESS,
    ZAP_IDENTITY,
    ZAP_MECHANISM,
    ZAP_KEY,
    ZAP_PARTS
};
typedef struct zap_request {
    uint8_t data[ZAP_PARTS][256];
    size_t size[ZAP_PARTS];
    size_t count;
} zap_request;

// false when the context is going down.
static bool zap_receive(void *zap, zap_request *r) {
    r->count = 0;
    for (bool more = true; more;) {
        zmq_msg_t part;
        zmq_msg_init(&part);
        if (zmq_msg_recv(&part, zap, 0) < 0) {
            const bool again = errno == EINTR;
            zmq_msg_close(&part);
            if (!again) return false;
            continue;
        }
        const size_t size = zmq_msg_size(&part);
        if (r->count < ZAP_PARTS && size <= sizeof(r->data[0])) {
            memcpy(r->data[r->count], zmq_msg_data(&part), size);
            r->size[r->count] = size;
        }
        r->count++;
        more = zmq_msg_more(&part) != 0;
        zmq_msg_close(&part);
    }
    return true;
}

static bool zap_part_is(const zap_request *r, size_t part, const char *want) {
    return r->size[part] == strlen(want) && memcmp(r->data[part], want, r->size[part]) == 0;
}

// One question and its answer. false when the context is going down.
static bool answer(fl_link *link) {
    zap_request r = {.count = 0};
    char user[FL_LINK_HEX_KEY] = "";
    bool let_in = false;
    if (!zap_receive(link->zap, &r)) return false;
    if (r.count == ZAP_PARTS && zap_part_is(&r, ZAP_VERSION, "1.0") &&
        zap_part_is(&r, ZAP_MECHANISM, "CURVE") && r.size[ZAP_KEY] == FL_LINK_KEY) {
        const uint64_t address = fl_link_hash(r.data[ZAP_ADDRESS], r.size[ZAP_ADDRESS]);
        let_in = zap_decide(link, r.data[ZAP_KEY], address) != 0;
        key_to_hex(r.data[ZAP_KEY], user);
    }
    zmq_send(link->zap, "1.0", 3, ZMQ_SNDMORE);
    zmq_send(link->zap, r.data[ZAP_ID], r.count > ZAP_ID ? r.size[ZAP_ID] : 0, ZMQ_SNDMORE);
    zmq_send(link->zap, let_in ? "200" : "400", 3, ZMQ_SNDMORE);
    zmq_send(link->zap, "", 0, ZMQ_SNDMORE);
    zmq_send(link->zap, user, let_in ? FL_LINK_HEX_KEY - 1 : 0, ZMQ_SNDMORE);
    zmq_send(link->zap, "", 0, 0);
    return true;
}

// Connections that came and went.
static void note_connections(fl_link *link) {
    int32_t fd = -1;
    for (unsigned e = fl_link_monitor_next(link->monitor, ZMQ_DONTWAIT, &fd); e != 0;
         e = fl_link_monitor_next(link->monitor, ZMQ_DONTWAIT, &fd)) {
        pthread_mutex_lock(&link->lock);
        if (e == ZMQ_EVENT_ACCEPTED)
            fl_guard_opened(&link->guard, fd, fl_clock_ms());
        else
            fl_guard_closed(&link->guard, fd);
        pthread_mutex_unlock(&link->lock);
    }
}

static void scan(fl_link *link) {
    pthread_mutex_lock(&link->lock);
    const fl_guard_limits limits = {
        .held_max = link->held_max,
        .silent_ms = SILENT_MS,
        .now_ms = fl_clock_ms(),
        .drained_ms = link->drained_ms,
    };
    fl_guard_scan(&link->guard, &limits);
    pthread_mutex_unlock(&link->lock);
}

// Answers and watches until the context goes down. It must never stop reading the monitor: libzmq
// waits when that is full.
static void *zap_run(void *arg) {
    fl_link *link = arg;
    uint64_t scanned_ms = fl_clock_ms();
    for (bool up = true; up;) {
        zmq_pollitem_t items[] = {{.socket = link->zap, .events = ZMQ_POLLIN},
                                  {.socket = link->monitor, .events = ZMQ_POLLIN}};
        const int n = zmq_poll(items, 2, SCAN_MS);
        if (n < 0 && errno != EINTR) break;
        if (n > 0 && (items[1].revents & ZMQ_POLLIN) != 0) note_connections(link);
        if (n > 0 && (items[0].revents & ZMQ_POLLIN) != 0) up = answer(link);
        if (fl_clock_ms() - scanned_ms < SCAN_MS) continue;
        scan(link);
        scanned_ms = fl_clock_ms();
    }
    zmq_close(link->monitor);
    zmq_close(link->zap);
    return NULL;
}

fl_status fl_link_zap_start(fl_link *link, fl_err *err) {
    link->zap = fl_fault() ? NULL : zmq_socket(link->context, ZMQ_REP);
    if (link->zap == NULL || !fl_link_set_int(link->zap, ZMQ_LINGER, 0) || fl_fault() ||
        zmq_bind(link->zap, ZAP_ENDPOINT) != 0)
        return FL_FAIL(err, FL_EIO, "no socket for ZAP: %s", zmq_strerror(errno));
    const int events = ZMQ_EVENT_ACCEPTED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_CLOSED;
    link->monitor = fl_link_monitor_open(link->context, link->socket, events);
    if (link->monitor == NULL)
        return FL_FAIL(err, FL_EIO, "no socket to watch the connections with");
    if (fl_fault() || pthread_create(&link->zap_thread, NULL, zap_run, link) != 0)
        return FL_FAIL(err, FL_EIO, "no thread for ZAP");
    link->zap_running = true;
    return FL_OK;
}
