#include "proto/link.h"

#include "common/clock.h"
#include "common/fault.h"
#include "proto/link_internal.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

enum {
    LINGER_MS = 500,
    RECONNECT_MS = 200, // libzmq doubles it and adds up to as much by chance
    RECONNECT_QUICK_MS = 800,
    CONNECT_QUICK_MS = 1500, // with one repeated SYN after the first second
    CONNECT_MS = 10000,
    QUICK_FIRST_MS = 60000, // for so long after the start, and after a connection was lost, it
    QUICK_LOST_MS = 900000, // tries at least every 2.5 s; later at least every 40 s
    CURVE_EXTRA = 64,       // what CURVE adds to a frame, and some
    SOCKETS_MAX = 4096,
    BACKLOG = 256,
    CANARY_MS = 8000,
    DROPS_PER_CALL = 256, // a flood of refused frames must not hold the caller for ever
    ROUTE_SIZE = 5,       // libzmq's own routing ids: a zero byte and a number
};

#define DIAL_EVENTS                                                                                \
    (ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_HANDSHAKE_FAILED_AUTH |                             \
     ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL | ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL |                  \
     ZMQ_EVENT_DISCONNECTED)

// ---- sockets

bool fl_link_set_int(void *socket, int option, int value) {
    return !fl_fault() && zmq_setsockopt(socket, option, &value, sizeof(value)) == 0;
}

// How often a dialled socket tries, from its next zmq_connect on. A node that was here a moment ago
// must be back within 2 s of its network, and its tries cost a packet a second; one that finds
// nobody for long tries seldom, and waits for slow answers. max_ms: 0, or the owner's own bound.
static bool set_pace(void *socket, uint32_t max_ms, bool slow) {
    const uint32_t usual = slow ? 30000 : RECONNECT_QUICK_MS;
    const uint32_t most = max_ms != 0 && max_ms < usual ? max_ms : usual;
    return fl_link_set_int(socket, ZMQ_RECONNECT_IVL, RECONNECT_MS) &&
           fl_link_set_int(socket, ZMQ_RECONNECT_IVL_MAX, (int)most) &&
           fl_link_set_int(socket, ZMQ_CONNECT_TIMEOUT, slow ? CONNECT_MS : CONNECT_QUICK_MS);
}

// None of libzmq's defaults is right here: it would take messages of any size, wait half a minute
// for a handshake, never notice a cut cable, and hang on exit.
static bool set_limits(void *socket, const fl_link_opts *opts, bool listening) {
    const int64_t frame_max =
        (opts->frame_max == 0 ? FL_LINK_FRAME_MAX : (int64_t)opts->frame_max) + CURVE_EXTRA;
    const uint32_t queue = opts->queue_frames == 0 ? 64 : opts->queue_frames;
    const uint32_t beat = opts->heartbeat_ms != 0 ? opts->heartbeat_ms : 1000;
    // A stranger is gone within 3 s; a node waits for a slow coordinator a little longer.
    const uint32_t shake = opts->handshake_ms != 0 ? opts->handshake_ms : listening ? 2500 : 3000;
    if (queue > INT_MAX || beat > 400000 || shake > 1000000) return false;
    if (zmq_setsockopt(socket, ZMQ_MAXMSGSIZE, &frame_max, sizeof(frame_max)) != 0) return false;
    const bool common =
        fl_link_set_int(socket, ZMQ_LINGER, LINGER_MS) &&
        fl_link_set_int(socket, ZMQ_SNDTIMEO, 0) &&
        fl_link_set_int(socket, ZMQ_RCVHWM, (int)queue) &&
        fl_link_set_int(socket, ZMQ_SNDHWM, (int)queue) &&
        fl_link_set_int(socket, ZMQ_HANDSHAKE_IVL, (int)shake) &&
        fl_link_set_int(socket, ZMQ_HEARTBEAT_IVL, (int)beat) &&
        fl_link_set_int(socket, ZMQ_HEARTBEAT_TIMEOUT, (int)(beat * 5 / 2)) &&
        fl_link_set_int(socket, ZMQ_HEARTBEAT_TTL, (int)(beat * 5 / 2)) &&
        fl_link_set_int(socket, ZMQ_TCP_KEEPALIVE, 1) &&
        fl_link_set_int(socket, ZMQ_IPV6, strchr(opts->endpoint, '[') != NULL);
    if (!common) return false;
    if (listening)
        return fl_link_set_int(socket, ZMQ_ROUTER_MANDATORY, 1) &&
               fl_link_set_int(socket, ZMQ_ROUTER_HANDOVER, 0) &&
               fl_link_set_int(socket, ZMQ_BACKLOG, BACKLOG);
    return fl_link_set_int(socket, ZMQ_IMMEDIATE, 1) &&
           set_pace(socket, opts->reconnect_max_ms, false);
}

static bool set_keys(void *socket, const uint8_t *server, const uint8_t *key,
                     const uint8_t *secret) {
    if (server == NULL)
        return fl_link_set_int(socket, ZMQ_CURVE_SERVER, 1) &&
               zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, secret, FL_LINK_KEY) == 0 &&
               zmq_setsockopt(socket, ZMQ_ZAP_DOMAIN, "fleetune", 8) == 0;
    return zmq_setsockopt(socket, ZMQ_CURVE_SERVERKEY, server, FL_LINK_KEY) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_PUBLICKEY, key, FL_LINK_KEY) == 0 &&
           zmq_setsockopt(socket, ZMQ_CURVE_SECRETKEY, secret, FL_LINK_KEY) == 0;
}

void *fl_link_monitor_open(void *context, void *socket, int events) {
    char endpoint[64];
    snprintf(endpoint, sizeof(endpoint), "inproc://fleetune.monitor.%p", socket);
    if (fl_fault() || zmq_socket_monitor(socket, endpoint, events) != 0) return NULL;
    void *pair = zmq_socket(context, ZMQ_PAIR);
    if (pair == NULL) return NULL;
    if (!fl_link_set_int(pair, ZMQ_LINGER, 0) || zmq_connect(pair, endpoint) != 0) {
        zmq_close(pair);
        return NULL;
    }
    return pair;
}

unsigned fl_link_monitor_next(void *monitor, int flags, int32_t *ret_value) {
    unsigned event = 0;
    for (bool first = true, more = true; more; first = false) {
        zmq_msg_t part;
        zmq_msg_init(&part);
        if (zmq_msg_recv(&part, monitor, first ? flags : 0) < 0) {
            zmq_msg_close(&part);
            return 0;
        }
        if (first && zmq_msg_size(&part) >= 6) { // in the machine's own order
            uint16_t v;
            const uint8_t *bytes = zmq_msg_data(&part);
            memcpy(&v, bytes, sizeof(v));
            memcpy(ret_value, bytes + 2, sizeof(*ret_value));
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
    int32_t value;
    void *monitor = NULL, *socket = zmq_socket(context, ZMQ_DEALER);
    if (socket == NULL || !set_limits(socket, &opts, false) ||
        !fl_link_set_int(socket, ZMQ_LINGER, 0) ||
        !set_keys(socket, server, key, secret))
        goto out;
    monitor = fl_link_monitor_open(context, socket, DIAL_EVENTS);
    if (monitor == NULL || !fl_link_set_int(monitor, ZMQ_RCVTIMEO, CANARY_MS) ||
        zmq_connect(socket, endpoint) != 0)
        goto out;
    const uint64_t deadline = fl_clock_ms() + CANARY_MS;
    do {
        event = fl_link_monitor_next(monitor, 0, &value);
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
    char endpoint[FL_LINK_ENDPOINT_MAX], z85[2][41];
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
    if (s == NULL || strncmp(s, "tcp://", 6) != 0 || strlen(s) >= FL_LINK_ENDPOINT_MAX)
        return false;
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
    link->reconnect_max_ms = opts->reconnect_max_ms;
    link->quick_until_ms = fl_clock_ms() + QUICK_FIRST_MS;
    link->shared = opts->share != NULL;
    link->drained_ms = fl_clock_ms();
    link->held_max = 2 * link->frame_max * (opts->queue_frames == 0 ? 64 : opts->queue_frames);
    if (!listening) memcpy(link->coordinator_key, opts->coordinator_key, FL_LINK_KEY);
    memcpy(link->endpoint, opts->endpoint, strlen(opts->endpoint) + 1);
    link->wake_fd = fl_fault() ? -1 : eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    link->lock_made = pthread_mutex_init(&link->lock, NULL) == 0;
    link->context = fl_fault() ? NULL : opts->share != NULL ? opts->share->context : zmq_ctx_new();
    if (link->wake_fd < 0 || !link->lock_made || link->context == NULL) {
        fl_link_close(link);
        return FL_FAIL(err, FL_EIO, "no resources for a link: too many open files?");
    }
    if (!link->shared) zmq_ctx_set(link->context, ZMQ_MAX_SOCKETS, SOCKETS_MAX);
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
    if (link->monitor != NULL && !link->zap_running) zmq_close(link->monitor);
    if (link->context != NULL && !link->shared) {
        zmq_ctx_shutdown(link->context); // ends the ZAP thread, which closes its sockets
        if (link->zap_running)
            pthread_join(link->zap_thread, NULL);
        else if (link->zap != NULL)
            zmq_close(link->zap);
        zmq_ctx_term(link->context);
    }
    if (link->wake_fd >= 0) close(link->wake_fd);
    if (link->lock_made) pthread_mutex_destroy(&link->lock);
    fl_link_keys_done(&link->keys);
    fl_guard_done(&link->guard);
    free(link);
}

// A connection is a descriptor, and 1,024 of them are soon gone: as many as we may have.
static void raise_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit);
}

static fl_status listen_on(fl_link *link, const fl_link_opts *opts, fl_err *err) {
    raise_descriptors();
    link->socket = fl_fault() ? NULL : zmq_socket(link->context, ZMQ_ROUTER);
    if (link->socket == NULL) return FL_FAIL(err, FL_EIO, "no socket: %s", zmq_strerror(errno));
    if (!opts->skip_zap) FL_TRY(fl_link_zap_start(link, err));
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
    link->monitor = fl_link_monitor_open(link->context, link->socket, DIAL_EVENTS);
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
    const fl_guard_id last = fl_link_keys_connection(&link->keys, key, (fl_guard_id){.fd = -1});
    fl_link_keys_revoke(&link->keys, key);
    fl_guard_end(&link->guard, last, fl_clock_ms());
    pthread_mutex_unlock(&link->lock);
}

void fl_link_shut(fl_link *link, const uint8_t key[FL_LINK_KEY], uint32_t shut_ms) {
    pthread_mutex_lock(&link->lock);
    fl_link_keys_shut(&link->keys, key, fl_clock_ms() + shut_ms);
    fl_guard_cut(&link->guard,
                 fl_link_keys_connection(&link->keys, key, (fl_guard_id){.fd = -1}));
    pthread_mutex_unlock(&link->lock);
}

void fl_link_enrolment(fl_link *link, bool open) {
    pthread_mutex_lock(&link->lock);
    link->keys.enrolment = open;
    pthread_mutex_unlock(&link->lock);
}

// ---- receiving

// libzmq reads these options when it connects, so it has to dial anew.
static void change_pace(fl_link *link, bool slow) {
    if (!set_pace(link->socket, link->reconnect_max_ms, slow)) return;
    link->slow = slow;
    link->redial_at_ms = fl_clock_ms() + 1;
}

static void watch_event(fl_link *link, unsigned event) {
    switch (event) {
    case ZMQ_EVENT_HANDSHAKE_SUCCEEDED:
        link->state = FL_LINK_UP;
        link->redial_at_ms = 0;
        link->redial_ms = RECONNECT_MS;
        link->quick_until_ms = UINT64_MAX;
        return;
    case ZMQ_EVENT_DISCONNECTED:
        if (link->state != FL_LINK_UP) return;
        link->state = FL_LINK_CONNECTING;
        link->quick_until_ms = fl_clock_ms() + QUICK_LOST_MS;
        if (link->slow) change_pace(link, false);
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
    int32_t value;
    if (link->listening) return; // the ZAP thread's
    for (unsigned e = fl_link_monitor_next(link->monitor, ZMQ_DONTWAIT, &value); e != 0;
         e = fl_link_monitor_next(link->monitor, ZMQ_DONTWAIT, &value))
        watch_event(link, e);
    if (!link->slow && fl_clock_ms() >= link->quick_until_ms) change_pace(link, true);
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
    const int fd = zmq_msg_get(&link->in, ZMQ_SRCFD);
    const char *user = zmq_msg_gets(&link->in, "User-Id");
    if (route_size != ROUTE_SIZE || route[0] != 0 || user == NULL ||
        !fl_link_hex_to_key(user, ret->key))
        return false;
    const uint32_t number =
        (uint32_t)route[1] << 24 | (uint32_t)route[2] << 16 | (uint32_t)route[3] << 8 | route[4];
    pthread_mutex_lock(&link->lock);
    const size_t limit = link->frame_max;
    ret->peer =
        fl_link_keys_frame(&link->keys, ret->key, size, limit, number, fl_clock_ms(), &ret->from);
    if (ret->peer == 0) memcpy(link->stats.refused_key, ret->key, FL_LINK_KEY);
    const fl_guard_id id = fl_guard_heard(&link->guard, fd, fl_clock_ms());
    if (ret->peer != 0) { // a key has one connection: the one that spoke last
        const fl_guard_id before = fl_link_keys_connection(&link->keys, ret->key, id);
        if (before.cookie != id.cookie) fl_guard_end(&link->guard, before, fl_clock_ms());
    }
    pthread_mutex_unlock(&link->lock);
    return ret->peer != 0;
}

static bool receive_now(fl_link *link, fl_link_message *ret, bool *ret_empty) {
    uint8_t route[ROUTE_SIZE] = {0};
    size_t route_size = 0;
    fl_link_message m = {.from = FL_LINK_ADMITTED};
    const int got = take(link, route, &route_size);
    *ret_empty = got == 0;
    if (got == 0) {
        pthread_mutex_lock(&link->lock);
        link->drained_ms = fl_clock_ms();
        pthread_mutex_unlock(&link->lock);
        return false;
    }
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
        const int count = link->listening ? 2 : 3;
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
    // What a coordinator takes from strangers is less than what it sends.
    const size_t most = link->listening && link->frame_max < FL_LINK_FRAME_MAX
                            ? (size_t)FL_LINK_FRAME_MAX
                            : link->frame_max;
    if (frame.size > most)
        return FL_FAIL(err, FL_ELIMIT, "a frame of %zu bytes; %zu are allowed", frame.size, most);
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
    ret->cut = l->guard.cuts;
    pthread_mutex_unlock(&l->lock);
}
