#include "proto/link.h"

#include "common/clock.h"
#include "common/fault.h"
#include "proto/link_keys.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <zmq.h>

enum {
    ENDPOINT_MAX = 384,
    LINGER_MS = 500,
    RECONNECT_MS = 200,
    CONNECT_MS = 10000,
    BACKLOG = 256,
    CANARY_MS = 8000,
    DROPS_PER_CALL = 256, // a flood of refused frames must not hold the caller for ever
    ROUTE_SIZE = 5,       // libzmq's own routing ids: a zero byte and a number
    HEX_KEY = 2 * FL_LINK_KEY + 1,
};
#define ZAP_ENDPOINT     "inproc://zeromq.zap.01"
#define MONITOR_ENDPOINT "inproc://fleetune.monitor"

struct fl_link {
    void *context, *socket, *zap, *monitor;
    bool listening;
    size_t frame_max;
    uint8_t coordinator_key[FL_LINK_KEY];
    char endpoint[ENDPOINT_MAX];
    int wake_fd;
    zmq_msg_t in;
    fl_link_status state;
    uint64_t redial_at_ms; // 0: no need, libzmq connects again by itself
    uint32_t redial_ms, redial_max_ms;

    pthread_t zap_thread;
    bool zap_running, lock_made;
    pthread_mutex_t lock; // for everything below
    bool canary_asked;
    uint8_t canary_key[FL_LINK_KEY];
    fl_link_keys keys;
    fl_link_stats stats;
};

// ---- ZAP

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

static void key_to_hex(const uint8_t key[FL_LINK_KEY], char out[HEX_KEY]) {
    for (size_t i = 0; i < FL_LINK_KEY; i++) snprintf(out + 2 * i, 3, "%02x", key[i]);
}

static bool hex_to_key(const char *hex, uint8_t key[FL_LINK_KEY]) {
    if (strlen(hex) != HEX_KEY - 1) return false;
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

static void *zap_run(void *arg) {
    fl_link *link = arg;
    zap_request r = {.count = 0};
    while (zap_receive(link->zap, &r)) {
        char user[HEX_KEY] = "";
        const bool legal = r.count == ZAP_PARTS && zap_part_is(&r, ZAP_VERSION, "1.0") &&
                           zap_part_is(&r, ZAP_MECHANISM, "CURVE") &&
                           r.size[ZAP_KEY] == FL_LINK_KEY;
        bool let_in = false;
        if (legal) {
            const uint64_t address = fl_link_hash(r.data[ZAP_ADDRESS], r.size[ZAP_ADDRESS]);
            let_in = zap_decide(link, r.data[ZAP_KEY], address) != 0;
            key_to_hex(r.data[ZAP_KEY], user);
        }
        zmq_send(link->zap, "1.0", 3, ZMQ_SNDMORE);
        zmq_send(link->zap, r.data[ZAP_ID], r.count > ZAP_ID ? r.size[ZAP_ID] : 0, ZMQ_SNDMORE);
        zmq_send(link->zap, let_in ? "200" : "400", 3, ZMQ_SNDMORE);
        zmq_send(link->zap, "", 0, ZMQ_SNDMORE);
        zmq_send(link->zap, user, let_in ? HEX_KEY - 1 : 0, ZMQ_SNDMORE);
        zmq_send(link->zap, "", 0, 0);
    }
    zmq_close(link->zap);
    return NULL;
}

static fl_status zap_start(fl_link *link, fl_err *err) {
    const int linger = 0;
    link->zap = fl_fault() ? NULL : zmq_socket(link->context, ZMQ_REP);
    if (link->zap == NULL || zmq_setsockopt(link->zap, ZMQ_LINGER, &linger, sizeof(linger)) != 0 ||
        fl_fault() || zmq_bind(link->zap, ZAP_ENDPOINT) != 0)
        return FL_FAIL(err, FL_EIO, "no socket for ZAP: %s", zmq_strerror(errno));
    if (fl_fault() || pthread_create(&link->zap_thread, NULL, zap_run, link) != 0)
        return FL_FAIL(err, FL_EIO, "no thread for ZAP");
    link->zap_running = true;
    return FL_OK;
}

// ---- sockets

static bool set_int(void *socket, int option, int value) {
    return !fl_fault() && zmq_setsockopt(socket, option, &value, sizeof(value)) == 0;
}

// None of libzmq's defaults is right here: it would take messages of any size, wait half a minute
// for a handshake, never notice a cut cable, and hang on exit.
static bool set_limits(void *socket, const fl_link_opts *opts, bool listening) {
    const int64_t frame_max = opts->frame_max == 0 ? FL_LINK_FRAME_MAX : opts->frame_max;
    const uint32_t queue = opts->queue_frames == 0 ? 64 : opts->queue_frames;
    const uint32_t beat = opts->heartbeat_ms != 0 ? opts->heartbeat_ms : listening ? 1000 : 15000;
    const uint32_t shake = opts->handshake_ms == 0 ? 3000 : opts->handshake_ms;
    const uint32_t back = opts->reconnect_max_ms == 0 ? 30000 : opts->reconnect_max_ms;
    if (queue > INT_MAX || beat > 1000000 || shake > 1000000 || back > INT_MAX) return false;
    if (zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &frame_max, sizeof(frame_max)) != 0) return false;
    const bool common =
        set_int(socket, ZMQ_LINGER, LINGER_MS) && set_int(socket, ZMQ_SNDTIMEO, 0) &&
        set_int(socket, ZMQ_RCVHWM, (int)queue) && set_int(socket, ZMQ_SNDHWM, (int)queue) &&
        set_int(socket, ZMQ_HANDSHAKE_IVL, (int)shake) &&
        set_int(socket, ZMQ_HEARTBEAT_IVL, (int)beat) &&
        set_int(socket, ZMQ_HEARTBEAT_TIMEOUT, (int)beat * 3) &&
        set_int(socket, ZMQ_HEARTBEAT_TTL, (int)beat * 3) &&
        set_int(socket, ZMQ_TCP_KEEPALIVE, 1) &&
        set_int(socket, ZMQ_IPV6, strchr(opts->endpoint, '[') != NULL);
    if (!common) return false;
    if (listening)
        return set_int(socket, ZMQ_ROUTER_MANDATORY, 1) &&
               set_int(socket, ZMQ_ROUTER_HANDOVER, 0) && set_int(socket, ZMQ_BACKLOG, BACKLOG);
    return set_int(socket, ZMQ_IMMEDIATE, 1) && set_int(socket, ZMQ_RECONNECT_IVL, RECONNECT_MS) &&
           set_int(socket, ZMQ_RECONNECT_IVL_MAX, (int)back) &&
           set_int(socket, ZMQ_CONNECT_TIMEOUT, CONNECT_MS);
}

static bool set_keys(void *socket, const uint8_t *server, const uint8_t *key,
                     const uint8_t *secret) {
    if (server == NULL)
        return set_int(socket, ZMQ_CURVE_SERVER, 1) &&
               zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, secret, FL_LINK_KEY) == 0 &&
               zmq_setsockopt(socket, ZMQ_ZAP_DOMAIN, "fleetune", 8) == 0;
    return zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, server, FL_LINK_KEY) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, key, FL_LINK_KEY) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, secret, FL_LINK_KEY) == 0;
}

// A PAIR on which libzmq tells how connecting goes.
static void *monitor_open(void *context, void *socket) {
    const int events = ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH |
                       ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |
                       ZMQ_EVENT_DISCONNECTED;
    if (fl_fault() || zmq_socket_monitor(socket, MONITOR_ENDPOINT, events) != 0) return NULL;
    void *pair = zmq_socket(context, ZMQ_PAIR);
    if (pair == NULL) return NULL;
    if (!set_int(pair, ZMQ_LINGER, 0) || zmq_connect(pair, MONITOR_ENDPOINT) != 0) {
        zmq_close(pair);
        return NULL;
    }
    return pair;
}

// The next event, or 0 when none came in time.
static unsigned monitor_next(void *monitor, int flags) {
    unsigned event = 0;
    for (bool first = true, more = true; more; first = false) {
        zmq_msg_t part;
        zmq_msg_init(&part);
        if (zmq_msg_recv(&part, monitor, first ? flags : 0) < 0) {
            zmq_msg_close(&part);
            return 0;
        }
        if (first && zmq_msg_size(&part) >= 2) {
            uint16_t v; // libzmq writes it in the machine's own order
            memcpy(&v, zmq_msg_data(&part), sizeof(v));
            event = v;
        }
        more = zmq_msg_more(&part) != 0;
        zmq_msg_close(&part);
    }
    return event;
}

// ---- canary

// Where a client on this machine reaches what was bound.
static bool canary_endpoint(const char *bound, char *out, size_t out_size) {
    static const struct {
        const char *any, *local;
    } map[] = {{"tcp://0.0.0.0:", "tcp://127.0.0.1:"}, {"tcp://[::]:", "tcp://[::1]:"}};
    const char *head = "", *tail = bound;
    for (size_t i = 0; i < FL_COUNT(map); i++) {
        if (strncmp(bound, map[i].any, strlen(map[i].any)) == 0) {
            head = map[i].local;
            tail = bound + strlen(map[i].any);
        }
    }
    const int n = snprintf(out, out_size, "%s%s", head, tail);
    return n > 0 && (size_t)n < out_size;
}

static unsigned canary_try(void *context, const char *endpoint, const uint8_t *server,
                           const uint8_t key[FL_LINK_KEY], const uint8_t secret[FL_LINK_KEY]) {
    const fl_link_opts opts = {.endpoint = endpoint, .reconnect_max_ms = 400};
    unsigned event = 0;
    void *monitor = NULL, *socket = zmq_socket(context, ZMQ_DEALER);
    if (socket == NULL || !set_limits(socket, &opts, false) || !set_int(socket, ZMQ_LINGER, 0) ||
        !set_keys(socket, server, key, secret))
        goto out;
    monitor = monitor_open(context, socket);
    if (monitor == NULL || !set_int(monitor, ZMQ_RCVTIMEO, CANARY_MS) ||
        zmq_connect(socket, endpoint) != 0)
        goto out;
    const uint64_t deadline = fl_clock_ms() + CANARY_MS;
    do {
        event = monitor_next(monitor, 0);
    } while (event != ZMQ_EVENT_HANDSHAKE_SUCCEEDED && event != ZMQ_EVENT_HANDSHAKE_FAILED_AUTH &&
             fl_clock_ms() < deadline);
out:
    if (monitor != NULL) zmq_close(monitor);
    if (socket != NULL) zmq_close(socket);
    return event;
}

// A stranger must be refused, and by our handler: otherwise this is an open door, and we do not
// start. Runs before anybody is admitted, in a context of its own.
static fl_status canary(fl_link *link, const uint8_t *server_key, fl_err *err) {
    char endpoint[ENDPOINT_MAX], z85[2][41];
    uint8_t key[FL_LINK_KEY], secret[FL_LINK_KEY];
    if (!canary_endpoint(link->endpoint, endpoint, sizeof(endpoint)) ||
        zmq_curve_keypair(z85[0], z85[1]) != 0 || zmq_z85_decode(key, z85[0]) == NULL ||
        zmq_z85_decode(secret, z85[1]) == NULL)
        return FL_FAIL(err, FL_EIO, "no key for the canary; is libzmq built with CURVE?");
    pthread_mutex_lock(&link->lock);
    memcpy(link->canary_key, key, FL_LINK_KEY);
    pthread_mutex_unlock(&link->lock);
    void *context = fl_fault() ? NULL : zmq_ctx_new();
    if (context == NULL) return FL_FAIL(err, FL_EIO, "no context for the canary");
    const unsigned event = canary_try(context, endpoint, server_key, key, secret);
    zmq_ctx_term(context);
    pthread_mutex_lock(&link->lock);
    const bool asked = link->canary_asked;
    memset(link->canary_key, 0, FL_LINK_KEY);
    pthread_mutex_unlock(&link->lock);
    if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED)
        return FL_FAIL(err, FL_EAUTH, "a stranger's key was let in at start: ZAP does not work");
    if (event != ZMQ_EVENT_HANDSHAKE_FAILED_AUTH)
        return FL_FAIL(err, FL_EIO, "the canary got no answer at %s; is a firewall on loopback?",
                       endpoint);
    if (!asked) return FL_FAIL(err, FL_EAUTH, "a stranger was refused, but ZAP was not asked");
    return FL_OK;
}

// ---- opening and closing

// libzmq reads a port as far as it has digits; what follows would be ignored silently.
static bool endpoint_ok(const char *s) {
    if (s == NULL || strncmp(s, "tcp://", 6) != 0 || strlen(s) >= ENDPOINT_MAX) return false;
    const char *port = strrchr(s + 6, ':');
    if (port == NULL || port == s + 6) return false;
    port++;
    if (strcmp(port, "*") == 0) return true;
    const size_t n = strlen(port);
    return n >= 1 && n <= 5 && strspn(port, "0123456789") == n;
}

static bool all_zero(const uint8_t *p, size_t size) {
    uint8_t any = 0;
    for (size_t i = 0; i < size; i++) any |= p[i];
    return any == 0;
}

static fl_status link_new(const fl_link_opts *opts, bool listening, fl_link **ret, fl_err *err) {
    if (!endpoint_ok(opts->endpoint))
        return FL_FAIL(err, FL_EARG, "an address must be like tcp://HOST:PORT");
    if (opts->curve_secret == NULL || all_zero(opts->curve_secret, FL_LINK_KEY) ||
        opts->curve_key == NULL || (!listening && opts->coordinator_key == NULL))
        return FL_FAIL(err, FL_EARG, "CURVE keys are missing");
    fl_link *link = fl_fault() ? NULL : calloc(1, sizeof(*link));
    if (link == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for a link");
    zmq_msg_init(&link->in);
    link->listening = listening;
    link->frame_max = opts->frame_max == 0 ? FL_LINK_FRAME_MAX : opts->frame_max;
    link->state = listening ? FL_LINK_UP : FL_LINK_CONNECTING;
    link->redial_ms = RECONNECT_MS;
    link->redial_max_ms = opts->reconnect_max_ms == 0 ? 30000 : opts->reconnect_max_ms;
    if (!listening) memcpy(link->coordinator_key, opts->coordinator_key, FL_LINK_KEY);
    memcpy(link->endpoint, opts->endpoint, strlen(opts->endpoint) + 1);
    link->wake_fd = fl_fault() ? -1 : eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    link->lock_made = pthread_mutex_init(&link->lock, NULL) == 0;
    link->context = fl_fault() ? NULL : zmq_ctx_new();
    if (link->wake_fd < 0 || !link->lock_made || link->context == NULL) {
        fl_link_close(link);
        return FL_FAIL(err, FL_EIO, "no resources for a link: too many open files?");
    }
    *ret = link;
    return FL_OK;
}

void fl_link_close(fl_link *link) {
    if (link == NULL) return;
    zmq_msg_close(&link->in);
    if (link->socket != NULL) {
        if (link->monitor != NULL) zmq_socket_monitor(link->socket, NULL, 0);
        zmq_close(link->socket);
    }
    if (link->monitor != NULL) zmq_close(link->monitor);
    if (link->context != NULL) {
        zmq_ctx_shutdown(link->context); // makes the ZAP thread's receive return
        if (link->zap_running)
            pthread_join(link->zap_thread, NULL);
        else if (link->zap != NULL)
            zmq_close(link->zap);
        zmq_ctx_term(link->context);
    }
    if (link->wake_fd >= 0) close(link->wake_fd);
    if (link->lock_made) pthread_mutex_destroy(&link->lock);
    fl_link_keys_done(&link->keys);
    free(link);
}

static fl_status listen_on(fl_link *link, const fl_link_opts *opts, fl_err *err) {
    if (!opts->skip_zap) FL_TRY(zap_start(link, err));
    link->socket = fl_fault() ? NULL : zmq_socket(link->context, ZMQ_ROUTER);
    if (link->socket == NULL) return FL_FAIL(err, FL_EIO, "no socket: %s", zmq_strerror(errno));
    if (!set_limits(link->socket, opts, true) ||
        !set_keys(link->socket, NULL, opts->curve_key, opts->curve_secret))
        return FL_FAIL(err, FL_EARG, "the link's limits or keys are not accepted");
    if (fl_fault() || zmq_bind(link->socket, opts->endpoint) != 0) {
        const bool ours = errno == EINVAL || errno == ENODEV;
        return FL_FAIL(err, ours ? FL_EARG : FL_EIO, "cannot listen on %s: %s", opts->endpoint,
                       zmq_strerror(errno));
    }
    size_t size = sizeof(link->endpoint);
    if (zmq_getsockopt(link->socket, ZMQ_LAST_ENDPOINT, link->endpoint, &size) != 0)
        return FL_FAIL(err, FL_EIO, "cannot learn the port that was bound");
    return canary(link, opts->curve_key, err);
}

fl_status fl_link_listen(const fl_link_opts *opts, fl_link **ret, fl_err *err) {
    fl_link *link = NULL;
    FL_TRY(link_new(opts, true, &link, err));
    const fl_status st = listen_on(link, opts, err);
    if (st != FL_OK) {
        fl_link_close(link);
        return st;
    }
    *ret = link;
    return FL_OK;
}

static fl_status dial_to(fl_link *link, const fl_link_opts *opts, fl_err *err) {
    link->socket = fl_fault() ? NULL : zmq_socket(link->context, ZMQ_DEALER);
    if (link->socket == NULL) return FL_FAIL(err, FL_EIO, "no socket: %s", zmq_strerror(errno));
    if (!set_limits(link->socket, opts, false) ||
        !set_keys(link->socket, opts->coordinator_key, opts->curve_key, opts->curve_secret))
        return FL_FAIL(err, FL_EARG, "the link's limits or keys are not accepted");
    link->monitor = monitor_open(link->context, link->socket);
    if (link->monitor == NULL)
        return FL_FAIL(err, FL_EIO, "no socket to watch the connection with");
    if (fl_fault() || zmq_connect(link->socket, opts->endpoint) != 0)
        return FL_FAIL(err, FL_EARG, "cannot dial %s: %s", opts->endpoint, zmq_strerror(errno));
    return FL_OK;
}

fl_status fl_link_dial(const fl_link_opts *opts, fl_link **ret, fl_err *err) {
    fl_link *link = NULL;
    FL_TRY(link_new(opts, false, &link, err));
    const fl_status st = dial_to(link, opts, err);
    if (st != FL_OK) {
        fl_link_close(link);
        return st;
    }
    *ret = link;
    return FL_OK;
}

const char *fl_link_endpoint(const fl_link *link) {
    return link->endpoint;
}

// ---- who may connect

fl_status fl_link_admit(fl_link *link, const uint8_t key[FL_LINK_KEY], fl_err *err) {
    pthread_mutex_lock(&link->lock);
    const bool ok = !fl_fault() && fl_link_keys_admit(&link->keys, key);
    pthread_mutex_unlock(&link->lock);
    return ok ? FL_OK : FL_FAIL(err, FL_ENOMEM, "no memory for one more node's key");
}

void fl_link_revoke(fl_link *link, const uint8_t key[FL_LINK_KEY]) {
    pthread_mutex_lock(&link->lock);
    fl_link_keys_revoke(&link->keys, key);
    pthread_mutex_unlock(&link->lock);
}

void fl_link_enrolment(fl_link *link, bool open) {
    pthread_mutex_lock(&link->lock);
    link->keys.enrolment = open;
    pthread_mutex_unlock(&link->lock);
}

// ---- receiving

static void watch_event(fl_link *link, unsigned event) {
    switch (event) {
    case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
        link->state = FL_LINK_UP;
        link->redial_at_ms = 0;
        link->redial_ms = RECONNECT_MS;
        return;
    case ZMQ_EVENT_DISCONNECTED:
        if (link->state == FL_LINK_UP) link->state = FL_LINK_CONNECTING;
        return;
    case ZMQ_EVENT_HANDSHAKE_FAILED_AUTH:
        link->state = FL_LINK_REFUSED;
        break;
    default:
        if (link->state != FL_LINK_REFUSED) link->state = FL_LINK_MISMATCH;
        if (event == ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL) return; // libzmq tries again by itself
    }
    // libzmq (4.3) gives up for good on a peer that refused it; an owner may approve any minute.
    link->redial_at_ms = fl_clock_ms() + link->redial_ms;
    link->redial_ms =
        link->redial_ms < link->redial_max_ms / 2 ? link->redial_ms * 2 : link->redial_max_ms;
}

static void watch(fl_link *link) {
    if (link->monitor == NULL) return;
    for (unsigned e = monitor_next(link->monitor, ZMQ_DONTWAIT); e != 0;
         e = monitor_next(link->monitor, ZMQ_DONTWAIT))
        watch_event(link, e);
    if (link->redial_at_ms != 0 && fl_clock_ms() >= link->redial_at_ms) {
        link->redial_at_ms = 0;
        zmq_disconnect(link->socket, link->endpoint); // what is left of the old one, if anything
        if (zmq_connect(link->socket, link->endpoint) != 0)
            link->redial_at_ms = fl_clock_ms() + link->redial_ms;
    }
}

// Until when to sleep at most: a dialled link may have to try again before the caller's deadline.
static uint64_t sleep_until(const fl_link *link, uint64_t deadline) {
    return link->redial_at_ms != 0 && link->redial_at_ms < deadline ? link->redial_at_ms : deadline;
}

// One message of the socket into link->in, its routing id before it. 1: got one whole; 0: there is
// none; -1: got one that has another shape, and it is gone.
static int take(fl_link *link, uint8_t *route, size_t *route_size) {
    zmq_msg_t part;
    bool more = true;
    int parts = 0;
    *route_size = 0;
    while (more) {
        zmq_msg_init(&part);
        if (zmq_msg_recv(&part, link->socket, ZMQ_DONTWAIT) < 0) {
            zmq_msg_close(&part);
            return parts == 0 ? 0 : -1;
        }
        more = zmq_msg_more(&part) != 0;
        if (link->listening && parts == 0) {
            *route_size = zmq_msg_size(&part);
            if (*route_size == ROUTE_SIZE) memcpy(route, zmq_msg_data(&part), ROUTE_SIZE);
        } else if (parts == (link->listening ? 1 : 0)) {
            zmq_msg_move(&link->in, &part);
        }
        zmq_msg_close(&part);
        parts++;
    }
    return parts == (link->listening ? 2 : 1) ? 1 : -1;
}

// Whose frame is it, and may it be delivered? The routing id proves nothing: the key is the one
// that ZAP wrote on the message, and the books are asked on every frame, so a revocation works at
// once.
static bool identify(fl_link *link, const uint8_t *route, size_t route_size, fl_link_message *ret) {
    const size_t size = zmq_msg_size(&link->in);
    const char *user = zmq_msg_gets(&link->in, "User-Id");
    if (route_size != ROUTE_SIZE || route[0] != 0 || user == NULL || !hex_to_key(user, ret->key))
        return false;
    const uint32_t number =
        (uint32_t)route[1] << 24 | (uint32_t)route[2] << 16 | (uint32_t)route[3] << 8 | route[4];
    pthread_mutex_lock(&link->lock);
    const size_t limit = link->frame_max;
    ret->peer =
        fl_link_keys_frame(&link->keys, ret->key, size, limit, number, fl_clock_ms(), &ret->from);
    if (ret->peer == 0) memcpy(link->stats.refused_key, ret->key, FL_LINK_KEY);
    pthread_mutex_unlock(&link->lock);
    return ret->peer != 0;
}

static bool receive_now(fl_link *link, fl_link_message *ret, bool *ret_empty) {
    uint8_t route[ROUTE_SIZE] = {0};
    size_t route_size = 0;
    fl_link_message m = {.from = FL_LINK_ADMITTED};
    const int got = take(link, route, &route_size);
    *ret_empty = got == 0;
    if (got == 0) return false;
    bool ok = got == 1;
    if (ok && link->listening)
        ok = identify(link, route, route_size, &m);
    else
        memcpy(m.key, link->coordinator_key, FL_LINK_KEY);
    pthread_mutex_lock(&link->lock);
    link->stats.dropped += !ok;
    link->stats.frames_in += ok;
    link->stats.bytes_in += ok ? zmq_msg_size(&link->in) : 0;
    pthread_mutex_unlock(&link->lock);
    if (!ok) return false;
    m.frame = (fl_bytes){zmq_msg_data(&link->in), zmq_msg_size(&link->in)};
    *ret = m;
    return true;
}

fl_status fl_link_receive(fl_link *link, uint32_t timeout_ms, fl_link_message *ret, fl_err *err) {
    const uint64_t deadline = fl_clock_ms() + timeout_ms;
    for (unsigned drops = 0; drops < DROPS_PER_CALL;) {
        bool empty = false;
        watch(link);
        if (receive_now(link, ret, &empty)) return FL_OK;
        if (!empty) {
            drops++;
            continue;
        }
        const uint64_t now = fl_clock_ms();
        zmq_pollitem_t items[] = {
            {.socket = link->socket, .events = ZMQ_POLLIN},
            {.fd = link->wake_fd, .events = ZMQ_POLLIN},
            {.socket = link->monitor, .events = ZMQ_POLLIN},
        };
        const int count = link->monitor == NULL ? 2 : 3;
        const uint64_t until = sleep_until(link, deadline);
        const int n = zmq_poll(items, count, now < until ? (long)(until - now) : 0);
        if (n < 0 && errno != EINTR)
            return FL_FAIL(err, FL_EIO, "waiting for frames failed: %s", zmq_strerror(errno));
        if (n < 0) break; // a signal: let the caller look at it
        if ((items[1].revents & ZMQ_POLLIN) != 0) {
            uint64_t ignored;
            if (read(link->wake_fd, &ignored, sizeof(ignored)) > 0) break;
        }
        if (n == 0 && fl_clock_ms() >= deadline) break;
    }
    watch(link);
    return FL_FAIL(err, FL_ETIME, "no frame");
}

// ---- sending

static bool route_of(fl_link *link, fl_link_peer peer, uint8_t route[ROUTE_SIZE]) {
    const uint32_t number = (uint32_t)peer;
    pthread_mutex_lock(&link->lock);
    const bool ok = fl_link_keys_reachable(&link->keys, peer);
    pthread_mutex_unlock(&link->lock);
    route[0] = 0;
    for (int i = 0; i < 4; i++) route[1 + i] = (uint8_t)(number >> (24 - 8 * i));
    return ok;
}

fl_status fl_link_send(fl_link *link, fl_link_peer peer, fl_bytes frame, fl_err *err) {
    if (frame.size > link->frame_max)
        return FL_FAIL(err, FL_ELIMIT, "a frame of %zu bytes; %zu are allowed", frame.size,
                       link->frame_max);
    if (link->listening) {
        uint8_t route[ROUTE_SIZE];
        if (!route_of(link, peer, route)) return FL_FAIL(err, FL_ENOENT, "that peer has gone");
        if (zmq_send(link->socket, route, ROUTE_SIZE, ZMQ_DONTWAIT | ZMQ_SNDMORE) < 0) {
            if (errno == EAGAIN) return FL_FAIL(err, FL_ETIME, "the peer's queue is full");
            if (errno == EHOSTUNREACH) return FL_FAIL(err, FL_ENOENT, "that peer has gone");
            return FL_FAIL(err, FL_EIO, "cannot send: %s", zmq_strerror(errno));
        }
    }
    if (zmq_send(link->socket, frame.data, frame.size, ZMQ_DONTWAIT) < 0) {
        if (errno == EAGAIN)
            return FL_FAIL(err, FL_ETIME, "the coordinator is not connected, or busy");
        return FL_FAIL(err, FL_EIO, "cannot send: %s", zmq_strerror(errno));
    }
    pthread_mutex_lock(&link->lock);
    link->stats.frames_out++;
    link->stats.bytes_out += frame.size;
    pthread_mutex_unlock(&link->lock);
    return FL_OK;
}

int fl_link_fd(const fl_link *link) {
    int fd = -1;
    size_t size = sizeof(fd);
    return zmq_getsockopt(link->socket, ZMQ_FD, &fd, &size) == 0 ? fd : -1;
}

void fl_link_wake(fl_link *link) {
    const uint64_t one = 1;
    // A full counter is a wake-up that was not read yet; nothing is lost.
    if (write(link->wake_fd, &one, sizeof(one)) < 0) return;
}

fl_link_status fl_link_state(const fl_link *link) {
    return link->state;
}

void fl_link_stats_get(const fl_link *link, fl_link_stats *ret) {
    fl_link *l = (fl_link *)(uintptr_t)link; // the lock is the only thing that is written to
    pthread_mutex_lock(&l->lock);
    *ret = l->stats;
    pthread_mutex_unlock(&l->lock);
}
