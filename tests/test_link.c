// Goal: the link lets in exactly whom the owner admits, cuts whom it revokes, refuses to start as
// an open door, and drops what is too large. Method: real sockets on loopback, real CURVE and ZAP.
#include "common/clock.h"
#include "common/crypto.h"
#include "common/fault.h"
#include "proto/link.h"
#include "proto/link_keys.h"
#include "tests/check.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sys/socket.h>

typedef struct pair {
    fl_secret *secret;
    uint8_t key[FL_LINK_KEY];
} pair;

static pair pair_new(void) {
    pair p = {NULL, {0}};
    fl_err err;
    T_OK(fl_dh_new(&p.secret, p.key, &err), err);
    return p;
}

static const uint8_t *secret_of(const pair *p) {
    return fl_secret_view(p->secret).data;
}

static pair server_pair;

static fl_link *listen_new(bool skip_zap, fl_status want) {
    fl_link *link = NULL;
    fl_err err = {.text = ""};
    const fl_link_opts opts = {
        .endpoint = "tcp://127.0.0.1:*",
        .curve_secret = secret_of(&server_pair),
        .curve_key = server_pair.key,
        .handshake_ms = 1000,
        .skip_zap = skip_zap,
    };
    const fl_status st = fl_link_listen(&opts, &link, &err);
    T_CHECK(st == want, "%s: %s", fl_status_name(st), err.text);
    if (st != want) fail();
    return link;
}

static fl_link *dial_new(const fl_link *server, const pair *who, const uint8_t *server_key) {
    fl_link *link = NULL;
    fl_err err;
    const fl_link_opts opts = {
        .endpoint = fl_link_endpoint(server),
        .curve_secret = secret_of(who),
        .curve_key = who->key,
        .coordinator_key = server_key,
        .reconnect_max_ms = 400,
        .handshake_ms = 1000,
    };
    T_OK(fl_link_dial(&opts, &link, &err), err);
    return link;
}

// Both ends get to run until the dialled one has this state, or 6 s have gone.
static bool wait_state(fl_link *link, fl_link_status want) {
    const uint64_t deadline = fl_clock_ms() + 6000;
    fl_link_message m;
    while (fl_link_state(link) != want && fl_clock_ms() < deadline)
        if (fl_link_receive(link, 20, &m, NULL) == FL_OK) return false;
    return fl_link_state(link) == want;
}

static fl_status send_text(fl_link *link, fl_link_peer peer, const char *s) {
    return fl_link_send(link, peer, (fl_bytes){(const uint8_t *)s, strlen(s)}, NULL);
}

static bool text_is(fl_bytes b, const char *s) {
    return b.size == strlen(s) && memcmp(b.data, s, b.size) == 0;
}

static void test_canary_finds_a_missing_handler(void) {
    T_CHECK(listen_new(true, FL_EAUTH) == NULL, "an open door was opened");
}

static void test_unknown_key_is_refused(void) {
    fl_link *server = listen_new(false, FL_OK);
    const pair stranger = pair_new();
    fl_link *node = dial_new(server, &stranger, server_pair.key);
    T_CHECK(wait_state(node, FL_LINK_REFUSED), "state %d", fl_link_state(node));
    T_EQ(send_text(node, 0, "hello"), FL_ETIME);
    fl_link_message m;
    T_EQ(fl_link_receive(server, 200, &m, NULL), FL_ETIME);
    fl_link_stats s;
    fl_link_stats_get(server, &s);
    T_CHECK(s.zap_refused >= 2 && s.zap_admitted == 0, "canary and stranger were refused");
    fl_link_close(node);
    fl_link_close(server);
    fl_secret_close(stranger.secret);
}

static void test_admitted_key_is_served_until_revoked(void) {
    fl_link *server = listen_new(false, FL_OK);
    const pair who = pair_new();
    fl_err err;
    T_OK(fl_link_admit(server, who.key, &err), err);
    fl_link *node = dial_new(server, &who, server_pair.key);
    T_CHECK(wait_state(node, FL_LINK_UP), "state %d", fl_link_state(node));
    T_EQ(send_text(node, 0, "ping"), FL_OK);
    fl_link_message m;
    T_OK(fl_link_receive(server, 3000, &m, &err), err);
    T_CHECK(text_is(m.frame, "ping"), "frame of %zu bytes", m.frame.size);
    T_EQ(m.from, FL_LINK_ADMITTED);
    T_CHECK(memcmp(m.key, who.key, FL_LINK_KEY) == 0, "the key is the one ZAP saw");
    const fl_link_peer peer = m.peer;
    T_EQ(send_text(server, peer, "pong"), FL_OK);
    T_OK(fl_link_receive(node, 3000, &m, &err), err);
    T_CHECK(text_is(m.frame, "pong"), "frame of %zu bytes", m.frame.size);
    T_CHECK(memcmp(m.key, server_pair.key, FL_LINK_KEY) == 0, "the coordinator's key");

    fl_link_revoke(server, who.key);
    T_EQ(send_text(node, 0, "after"), FL_OK); // the connection is still there
    T_EQ(fl_link_receive(server, 400, &m, NULL), FL_ETIME);
    T_EQ(send_text(server, peer, "secret"), FL_ENOENT);
    fl_link_stats s;
    fl_link_stats_get(server, &s);
    T_EQ(s.dropped, 1);
    fl_link_close(node);
    node = dial_new(server, &who, server_pair.key);
    T_CHECK(wait_state(node, FL_LINK_REFUSED), "a revoked key came back: %d", fl_link_state(node));
    T_OK(fl_link_admit(server, who.key, &err), err); // and approved again
    T_CHECK(wait_state(node, FL_LINK_UP), "state %d", fl_link_state(node));
    fl_link_close(node);
    fl_link_close(server);
    fl_secret_close(who.secret);
}

static void test_enrolment_is_a_class_of_its_own(void) {
    fl_link *server = listen_new(false, FL_OK);
    const pair who = pair_new();
    fl_err err;
    fl_link_enrolment(server, true);
    fl_link *node = dial_new(server, &who, server_pair.key);
    T_CHECK(wait_state(node, FL_LINK_UP), "state %d", fl_link_state(node));
    T_EQ(send_text(node, 0, "join"), FL_OK);
    fl_link_message m;
    T_OK(fl_link_receive(server, 3000, &m, &err), err);
    T_EQ(m.from, FL_LINK_ENROL);
    const fl_link_peer peer = m.peer;
    static const uint8_t large[FL_LINK_ENROL_FRAME_MAX + 1];
    T_EQ(fl_link_send(node, 0, (fl_bytes){large, sizeof(large)}, NULL), FL_OK);
    T_EQ(fl_link_receive(server, 300, &m, NULL), FL_ETIME);
    T_OK(fl_link_admit(server, who.key, &err), err);
    T_EQ(send_text(server, peer, "welcome"), FL_OK); // the peer's number outlives its class
    T_OK(fl_link_receive(node, 3000, &m, &err), err);
    T_EQ(fl_link_send(node, 0, (fl_bytes){large, sizeof(large)}, NULL), FL_OK);
    T_OK(fl_link_receive(server, 3000, &m, &err), err);
    T_EQ(m.from, FL_LINK_ADMITTED);

    const pair late = pair_new();
    fl_link *other = dial_new(server, &late, server_pair.key);
    T_CHECK(wait_state(other, FL_LINK_UP), "state %d", fl_link_state(other));
    fl_link_enrolment(server, false);
    T_EQ(send_text(other, 0, "join"), FL_OK);
    T_EQ(fl_link_receive(server, 300, &m, NULL), FL_ETIME);
    fl_link_close(other);
    fl_link_close(node);
    fl_link_close(server);
    fl_secret_close(late.secret);
    fl_secret_close(who.secret);
}

static void test_wrong_coordinator_is_noticed(void) {
    fl_link *server = listen_new(false, FL_OK);
    const pair who = pair_new(), wrong = pair_new();
    fl_err err;
    T_OK(fl_link_admit(server, who.key, &err), err);
    fl_link *node = dial_new(server, &who, wrong.key);
    T_CHECK(wait_state(node, FL_LINK_MISMATCH), "state %d", fl_link_state(node));
    fl_link_close(node);
    fl_link_close(server);
    fl_secret_close(who.secret);
    fl_secret_close(wrong.secret);
}

static void test_large_frames_and_gone_peers(void) {
    fl_link *server = listen_new(false, FL_OK);
    const pair who = pair_new();
    fl_err err;
    T_OK(fl_link_admit(server, who.key, &err), err);
    fl_link *node = NULL;
    const fl_link_opts opts = {
        .endpoint = fl_link_endpoint(server),
        .curve_secret = secret_of(&who),
        .curve_key = who.key,
        .coordinator_key = server_pair.key,
        .frame_max = 4 * FL_LINK_FRAME_MAX, // a peer that does not keep the limit
        .reconnect_max_ms = 400,
    };
    T_OK(fl_link_dial(&opts, &node, &err), err);
    T_CHECK(wait_state(node, FL_LINK_UP), "state %d", fl_link_state(node));
    uint8_t *big = calloc(1, 2 * FL_LINK_FRAME_MAX);
    T_NEED(big != NULL, "memory");
    T_EQ(fl_link_send(node, 0, (fl_bytes){big, 2 * FL_LINK_FRAME_MAX}, NULL), FL_OK);
    fl_link_message m;
    T_EQ(fl_link_receive(server, 500, &m, NULL), FL_ETIME); // libzmq cut the connection
    T_CHECK(wait_state(node, FL_LINK_UP), "it comes back");
    fl_link_stats stats;
    fl_link_stats_get(server, &stats);
    T_EQ(stats.dropped, 0); // it never came as far as our own check
    T_EQ(fl_link_send(node, 0, (fl_bytes){big, 1 << 20}, NULL), FL_OK);
    T_OK(fl_link_receive(server, 5000, &m, &err), err);
    T_EQ(m.frame.size, 1 << 20);
    T_EQ(fl_link_send(server, m.peer, (fl_bytes){big, FL_LINK_FRAME_MAX + 1}, NULL), FL_ELIMIT);
    T_EQ(send_text(server, 0, "x"), FL_ENOENT);
    T_EQ(send_text(server, m.peer + 1, "x"), FL_ENOENT);
    T_EQ(send_text(server, m.peer + ((uint64_t)1 << 50), "x"), FL_ENOENT);
    const fl_link_peer peer = m.peer;
    fl_link_close(node);
    fl_status st = FL_OK;
    const uint64_t deadline = fl_clock_ms() + 5000;
    while (st == FL_OK && fl_clock_ms() < deadline) {
        st = send_text(server, peer, "x");
        usleep(10000);
    }
    T_EQ(st, FL_ENOENT);
    free(big);
    fl_link_close(server);
    fl_secret_close(who.secret);
}

static int raw_connect(const fl_link *server) {
    const char *port = strrchr(fl_link_endpoint(server), ':') + 1;
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)strtoul(port, NULL, 10))};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    const struct timeval wait = {.tv_sec = 5};
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait)) != 0 ||
        connect(fd, (struct sockaddr *)&to, sizeof(to)) != 0)
        abort();
    return fd;
}

// Whoever connects and says nothing, half a greeting, or asks for no encryption, is soon gone.
static void test_idlers_and_other_mechanisms_are_cut(void) {
    fl_link *server = listen_new(false, FL_OK);
    uint8_t greeting[64] = {0xff, [8] = 1, [9] = 0x7f, [10] = 3};
    memcpy(greeting + 12, "NULL", 4);
    const size_t sizes[] = {0, 7, 64};
    for (size_t i = 0; i < FL_COUNT(sizes); i++) {
        const int fd = raw_connect(server);
        const uint64_t start = fl_clock_ms();
        T_EQ(send(fd, greeting, sizes[i], MSG_NOSIGNAL), sizes[i]);
        uint8_t in[4096];
        ssize_t n;
        do {
            n = recv(fd, in, sizeof(in), 0);
        } while (n > 0);
        T_CHECK(fl_clock_ms() - start < 3500, "%zu bytes of greeting held the connection",
                sizes[i]);
        close(fd);
    }
    fl_link_close(server);
}

// A gigabyte announced before the key is even known: cut, not collected.
static void test_giant_frame_before_authentication(void) {
    enum { POURED_MAX = 32 << 20 }; // far above what the sockets' buffers take by themselves
    fl_link *server = listen_new(false, FL_OK);
    uint8_t greeting[64] = {0xff, [8] = 1, [9] = 0x7f, [10] = 3};
    memcpy(greeting + 12, "CURVE", 5);
    const uint8_t giant[9] = {0x06, 0, 0, 0, 0, 0x40, 0, 0, 0}; // a long command of 2^30 bytes
    static const uint8_t junk[1 << 16];
    const int fd = raw_connect(server);
    T_EQ(send(fd, greeting, sizeof(greeting), MSG_NOSIGNAL), sizeof(greeting));
    T_EQ(recv(fd, greeting, sizeof(greeting), MSG_WAITALL), sizeof(greeting));
    T_EQ(send(fd, giant, sizeof(giant), MSG_NOSIGNAL), sizeof(giant));
    const struct timeval wait = {.tv_sec = 5};
    T_EQ(setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait)), 0);
    size_t poured = 0;
    ssize_t n = 1;
    while (n > 0 && poured < POURED_MAX) {
        n = send(fd, junk, sizeof(junk), MSG_NOSIGNAL);
        poured += n > 0 ? (size_t)n : 0;
    }
    T_CHECK(poured < POURED_MAX, "%zu bytes were taken from a stranger", poured);
    close(fd);
    fl_link_close(server);
}

static void *wake_later(void *arg) {
    usleep(50000);
    fl_link_wake(arg);
    return NULL;
}

static void test_wake(void) {
    fl_link *server = listen_new(false, FL_OK);
    pthread_t thread;
    T_EQ(pthread_create(&thread, NULL, wake_later, server), 0);
    const uint64_t start = fl_clock_ms();
    fl_link_message m;
    T_EQ(fl_link_receive(server, 5000, &m, NULL), FL_ETIME);
    T_CHECK(fl_clock_ms() - start < 3000, "woken");
    pthread_join(thread, NULL);
    T_CHECK(fl_link_fd(server) >= 0, "fd");
    fl_link_close(server);
}

static void test_bad_options(void) {
    fl_link *link = NULL;
    const uint8_t key[FL_LINK_KEY] = {1}, none[FL_LINK_KEY] = {0};
    fl_link_opts opts = {.endpoint = "ipc:///tmp/x", .curve_secret = key, .curve_key = key};
    T_EQ(fl_link_listen(&opts, &link, NULL), FL_EARG);
    opts.endpoint = NULL;
    T_EQ(fl_link_listen(&opts, &link, NULL), FL_EARG);
    opts.endpoint = "tcp://127.0.0.1:*";
    opts.curve_secret = none;
    T_EQ(fl_link_listen(&opts, &link, NULL), FL_EARG);
    opts.curve_secret = NULL;
    T_EQ(fl_link_listen(&opts, &link, NULL), FL_EARG);
    opts.curve_secret = key;
    T_EQ(fl_link_dial(&opts, &link, NULL), FL_EARG); // no coordinator's key
    opts.coordinator_key = key;
    opts.endpoint = "tcp://nothing";
    T_EQ(fl_link_dial(&opts, &link, NULL), FL_EARG);
    opts.endpoint = "tcp://127.0.0.1:1x";
    T_EQ(fl_link_listen(&opts, &link, NULL), FL_EARG);
    fl_link *server = listen_new(false, FL_OK);
    opts.endpoint = fl_link_endpoint(server);
    T_EQ(fl_link_listen(&opts, &link, NULL), FL_EIO); // the port is taken
    T_CHECK(link == NULL, "written on failure");
    fl_link_close(server);
    fl_link_close(NULL);
}

// The books alone: room for unknown keys is bounded, in all and by address, and idlers make room.
static void test_keys_bounds(void) {
    fl_link_keys k = {.enrolment = true};
    uint8_t key[FL_LINK_KEY] = {0};
    size_t in = 0;
    for (uint32_t i = 0; i < 1000; i++) {
        memcpy(key, &i, sizeof(i));
        in += fl_link_keys_ask(&k, key, i % 3, 1000) != 0;
    }
    T_EQ(in, 3 * FL_LINK_ENROL_MAX / 4); // three addresses, a quarter each
    for (uint32_t i = 1000; i < 2000; i++) {
        memcpy(key, &i, sizeof(i));
        in += fl_link_keys_ask(&k, key, i, 1000) != 0;
    }
    T_EQ(in, FL_LINK_ENROL_MAX);
    T_EQ(k.enrol_count, FL_LINK_ENROL_MAX);
    fl_link_class class = 0;
    const uint32_t first = 1000;
    memcpy(key, &first, sizeof(first));
    T_CHECK(fl_link_keys_frame(&k, key, 10, 100, 7, 61500, &class) != 0, "still there");
    for (uint32_t i = 5000; i < 5200; i++) { // everybody else idled for more than a minute
        memcpy(key, &i, sizeof(i));
        in += fl_link_keys_ask(&k, key, i, 62000) != 0;
    }
    T_EQ(in, 2 * FL_LINK_ENROL_MAX - 1);
    memcpy(key, &first, sizeof(first));
    unsigned frames = 1;
    while (frames < 1000 && fl_link_keys_frame(&k, key, 10, 100, 7, 62000, &class) != 0) frames++;
    T_EQ(frames, FL_LINK_ENROL_FRAMES);
    T_CHECK(fl_link_keys_frame(&k, key, 10, 100, 7, 130000, &class) != 0, "next minute");
    T_EQ(class, FL_LINK_ENROL);
    for (uint32_t i = 0; i < 3000; i++) { // a large fleet, all found again
        memcpy(key, &i, sizeof(i));
        key[31] = 9;
        T_CHECK(fl_link_keys_admit(&k, key), "admit %u", i);
    }
    for (uint32_t i = 0; i < 3000; i++) {
        memcpy(key, &i, sizeof(i));
        T_EQ(fl_link_keys_ask(&k, key, 0, 130000), FL_LINK_ADMITTED);
        const fl_link_peer peer = fl_link_keys_frame(&k, key, 10, 100, i, 130000, &class);
        T_CHECK(fl_link_keys_reachable(&k, peer), "peer %u", i);
        T_EQ(fl_link_keys_frame(&k, key, 101, 100, i, 130000, &class), 0);
        if (i % 2 == 0) continue;
        fl_link_keys_revoke(&k, key);
        T_CHECK(!fl_link_keys_reachable(&k, peer), "revoked %u", i);
        T_EQ(fl_link_keys_ask(&k, key, 0, 130000), 0);
    }
    fl_link_keys_done(&k);
}

static void test_every_failure_of_the_system(void) {
#ifdef FL_FAULTS
    for (unsigned n = 1; n < 200; n++) {
        fl_link *link = NULL;
        const fl_link_opts opts = {
            .endpoint = "tcp://127.0.0.1:*",
            .curve_secret = secret_of(&server_pair),
            .curve_key = server_pair.key,
            .coordinator_key = server_pair.key,
        };
        fl_fault_arm(n);
        const fl_status st = fl_link_listen(&opts, &link, NULL);
        const bool fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st == FL_OK) == !fired && (link != NULL) == (st == FL_OK), "listen, fault %u: %s",
                n, fl_status_name(st));
        fl_link_close(link);
        if (!fired) {
            T_CHECK(n > 10, "only %u fallible calls", n);
            return;
        }
    }
    T_CHECK(false, "no end of faults");
#else
    T_SKIP("built without fault injection");
#endif
}

int main(int argc, char **argv) {
    if (fl_crypto_init(NULL) != FL_OK) return 2;
    server_pair = pair_new();
    static const t_case cases[] = {
        {"canary_finds_a_missing_handler", test_canary_finds_a_missing_handler},
        {"unknown_key_is_refused", test_unknown_key_is_refused},
        {"admitted_key_is_served_until_revoked", test_admitted_key_is_served_until_revoked},
        {"enrolment_is_a_class_of_its_own", test_enrolment_is_a_class_of_its_own},
        {"wrong_coordinator_is_noticed", test_wrong_coordinator_is_noticed},
        {"large_frames_and_gone_peers", test_large_frames_and_gone_peers},
        {"idlers_and_other_mechanisms_are_cut", test_idlers_and_other_mechanisms_are_cut},
        {"giant_frame_before_authentication", test_giant_frame_before_authentication},
        {"wake", test_wake},
        {"bad_options", test_bad_options},
        {"keys_bounds", test_keys_bounds},
        {"every_failure_of_the_system", test_every_failure_of_the_system},
    };
    const int status = t_main(argc, argv, cases, FL_COUNT(cases));
    fl_secret_close(server_pair.secret);
    return status;
}
