// Goal: only the two pinned identities can make a session, and in it each message is read once, by
// the other side, as it was sent. Method: both ends in one process, every field of the handshake
// and every bit of a frame altered, replays in and out of the window; the same for sealed updates
// and invitations.
#include "common/checked.h"
#include "common/crypto.h"
#include "common/fault.h"
#include "proto/channel.h"
#include "proto/invite.h"
#include "proto/seal.h"
#include "tests/check.h"

typedef struct party {
    fl_secret *secret;
    uint8_t key[FL_KEY_SIZE];
} party;

static party node_id, coord_id, other_id;
static fl_secret *update_secret;
static uint8_t update_key[FL_KEY_SIZE];

typedef struct ends {
    fl_channel *node, *coord;
} ends;

static void fresh(uint8_t random[FL_CHANNEL_RANDOM]) {
    for (size_t i = 0; i < FL_CHANNEL_RANDOM; i++) random[i] = (uint8_t)t_rand();
}

static fl_channel *open_one(fl_channel_role role, const party *self, const party *peer,
                            uint64_t max) {
    fl_channel *ch = NULL;
    fl_err err;
    const fl_channel_opts opts = {
        .role = role,
        .identity = self->secret,
        .identity_key = self->key,
        .peer_key = peer->key,
        .update_key = update_key,
        .counter_max = max,
    };
    T_OK(fl_channel_open(&opts, &ch, &err), err);
    return ch;
}

static ends open_both(uint64_t max) {
    return (ends){open_one(FL_CHANNEL_NODE, &node_id, &coord_id, max),
                  open_one(FL_CHANNEL_COORDINATOR, &coord_id, &node_id, max)};
}

static void shake(const ends *e) {
    uint8_t r[FL_CHANNEL_RANDOM];
    fl_hello hello;
    fl_hello_reply reply;
    fl_hello_finish finish;
    fl_err err;
    fresh(r);
    T_OK(fl_channel_hello(e->node, r, &hello, &err), err);
    fresh(r);
    T_OK(fl_channel_on_hello(e->coord, &hello, r, &reply, &err), err);
    T_OK(fl_channel_on_reply(e->node, &reply, &finish, &err), err);
    T_OK(fl_channel_on_finish(e->coord, &finish, &err), err);
    T_CHECK(fl_channel_live(e->node) && fl_channel_live(e->coord), "live");
    T_CHECK(fl_channel_session(e->node) == fl_channel_session(e->coord), "same session");
}

static void close_both(const ends *e) {
    fl_channel_close(e->node), fl_channel_close(e->coord);
}

typedef struct packet {
    uint8_t data[256];
    size_t size;
} packet;

static packet seal(fl_channel *ch, fl_msg_type type, const char *text) {
    packet p;
    fl_err err;
    T_OK(fl_channel_seal(ch, type, (fl_bytes){(const uint8_t *)text, strlen(text)}, p.data,
                         sizeof(p.data), &p.size, &err),
         err);
    return p;
}

// The status of opening; on FL_OK the text must be this.
static fl_status unseal(fl_channel *ch, const packet *p, const char *text) {
    const fl_msg_from from = p->data[5] == FL_MSG_TASK ? FL_FROM_COORDINATOR : FL_FROM_NODE;
    fl_frame f;
    fl_bytes body = {NULL, 0};
    uint8_t out[256];
    const fl_status head = fl_frame_decode((fl_bytes){p->data, p->size}, from, &f, NULL);
    if (head != FL_OK) return head;
    const fl_status st = fl_channel_unseal(ch, &f, out, sizeof(out), &body, NULL);
    if (st == FL_OK)
        T_CHECK(body.size == strlen(text) && memcmp(body.data, text, body.size) == 0, "%s", text);
    return st;
}

static void test_messages_both_ways(void) {
    const ends e = open_both(0);
    uint8_t out[64];
    size_t size;
    T_EQ(fl_channel_seal(e.node, FL_MSG_HEARTBEAT, (fl_bytes){out, 1}, out, sizeof(out), &size,
                         NULL),
         FL_ESTATE);
    T_CHECK(fl_channel_update_key(e.node) == NULL, "no key yet");
    shake(&e);
    T_CHECK(memcmp(fl_channel_update_key(e.node), update_key, FL_KEY_SIZE) == 0, "update key");
    T_CHECK(fl_channel_update_key(e.coord) == NULL, "the coordinator has it anyway");
    const packet up = seal(e.node, FL_MSG_HEARTBEAT, "up"),
                 down = seal(e.coord, FL_MSG_TASK, "down");
    T_EQ(unseal(e.coord, &up, "up"), FL_OK);
    T_EQ(unseal(e.node, &down, "down"), FL_OK);
    T_CHECK(memmem(up.data, up.size, "up", 2) == NULL, "plain text on the wire");
    const packet empty = seal(e.node, FL_MSG_HEARTBEAT, "");
    T_EQ(unseal(e.coord, &empty, ""), FL_OK);
    const packet mirror = seal(e.node, FL_MSG_HEARTBEAT, "mirror");
    T_EQ(unseal(e.node, &mirror, ""), FL_EAUTH); // sent back to its sender
    T_EQ(unseal(e.coord, &mirror, "mirror"), FL_OK);
    fl_frame f;
    uint8_t tiny[3];
    fl_bytes body;
    const packet more = seal(e.node, FL_MSG_HEARTBEAT, "more");
    T_EQ(fl_frame_decode((fl_bytes){more.data, more.size}, FL_FROM_NODE, &f, NULL), FL_OK);
    T_EQ(fl_channel_unseal(e.coord, &f, tiny, sizeof(tiny), &body, NULL), FL_ELIMIT);
    T_EQ(unseal(e.coord, &more, "more"), FL_OK); // and was not marked as seen
    T_EQ(fl_channel_seal(e.node, FL_MSG_HEARTBEAT, (fl_bytes){out, 1}, out, 48, &size, NULL),
         FL_ELIMIT);
    close_both(&e);
}

static void test_every_bit_counts(void) {
    const ends e = open_both(0);
    shake(&e);
    packet p = seal(e.node, FL_MSG_HEARTBEAT, "every bit of this counts");
    for (size_t bit = 0; bit < 8 * p.size; bit++) {
        p.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        T_CHECK(unseal(e.coord, &p, "") != FL_OK, "bit %zu", bit);
        p.data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    T_EQ(unseal(e.coord, &p, "every bit of this counts"), FL_OK);
    T_EQ(unseal(e.coord, &p, ""), FL_EAUTH);
    close_both(&e);
}

// A random order of delivery with duplicates, against a list of what was delivered before.
static void test_window(void) {
    enum { COUNT = 3000 };
    static packet sent[COUNT];
    static bool got[COUNT];
    const ends e = open_both(0);
    shake(&e);
    memset(got, 0, sizeof(got));
    for (int i = 0; i < COUNT; i++) sent[i] = seal(e.node, FL_MSG_HEARTBEAT, "m");
    int newest = -1;
    for (int step = 0; step < 20000; step++) {
        const int spread = (int)(t_rand() % 700) - 450;
        int i = newest + spread;
        if (i < 0) i = 0;
        if (i >= COUNT) i = COUNT - 1;
        const bool want = !got[i] && newest - i < FL_CHANNEL_WINDOW;
        const fl_status st = unseal(e.coord, &sent[i], "m");
        T_CHECK(st == (want ? FL_OK : FL_EAUTH), "message %d, newest %d: %s", i, newest,
                fl_status_name(st));
        if (st == FL_OK) got[i] = true;
        if (st == FL_OK && i > newest) newest = i;
    }
    close_both(&e);
}

static void test_restarts(void) {
    ends e = open_both(0);
    shake(&e);
    const packet old = seal(e.node, FL_MSG_HEARTBEAT, "old");
    const packet unread = seal(e.node, FL_MSG_HEARTBEAT, "unread");
    T_EQ(unseal(e.coord, &old, "old"), FL_OK);
    fl_channel_close(e.node); // the node restarts
    e.node = open_one(FL_CHANNEL_NODE, &node_id, &coord_id, 0);
    const uint64_t before = fl_channel_session(e.coord);
    shake(&e);
    T_CHECK(fl_channel_session(e.coord) != before, "a new session");
    T_EQ(unseal(e.coord, &unread, ""), FL_ESTATE);
    packet moved = unread; // the old frame under the new session's number
    fl_put_u64(moved.data + 8, fl_channel_session(e.coord));
    T_EQ(unseal(e.coord, &moved, ""), FL_EAUTH);
    fl_channel_close(e.coord); // the coordinator restarts
    e.coord = open_one(FL_CHANNEL_COORDINATOR, &coord_id, &node_id, 0);
    const packet lost = seal(e.node, FL_MSG_HEARTBEAT, "lost");
    T_EQ(unseal(e.coord, &lost, ""), FL_ESTATE);
    shake(&e);
    fl_channel_drop(e.coord); // revoked
    T_CHECK(!fl_channel_live(e.coord) && fl_channel_session(e.coord) == 0, "dropped");
    const packet late = seal(e.node, FL_MSG_HEARTBEAT, "late");
    T_EQ(unseal(e.coord, &late, ""), FL_ESTATE);
    close_both(&e);
}

// HELLO alone changes nothing for the live session; only HELLO_FINISH does.
static void test_forged_hello(void) {
    const ends e = open_both(0);
    shake(&e);
    const uint64_t session = fl_channel_session(e.coord);
    const ends f = open_both(0);
    uint8_t r[FL_CHANNEL_RANDOM];
    fl_hello hello;
    fl_hello_reply reply;
    fl_hello_finish finish = {.session = 1};
    fresh(r);
    T_EQ(fl_channel_hello(f.node, r, &hello, NULL), FL_OK);
    fresh(r);
    T_EQ(fl_channel_on_hello(e.coord, &hello, r, &reply, NULL), FL_OK);
    T_EQ(fl_channel_session(e.coord), session);
    const packet p = seal(e.node, FL_MSG_HEARTBEAT, "still");
    T_EQ(unseal(e.coord, &p, "still"), FL_OK);
    T_EQ(fl_channel_on_finish(e.coord, &finish, NULL), FL_ESTATE);
    finish.session = reply.session;
    T_EQ(fl_channel_on_finish(e.coord, &finish, NULL), FL_EAUTH);
    const packet q = seal(e.node, FL_MSG_HEARTBEAT, "and still");
    T_EQ(unseal(e.coord, &q, "and still"), FL_OK);
    T_EQ(fl_channel_on_reply(f.node, &reply, &finish, NULL), FL_OK);
    T_EQ(fl_channel_on_finish(e.coord, &finish, NULL), FL_OK); // the right end, after wrong ones
    T_EQ(fl_channel_on_finish(e.coord, &finish, NULL), FL_ESTATE); // but once
    close_both(&e), close_both(&f);
}

static void test_wrong_identities(void) {
    fl_channel *impostor = open_one(FL_CHANNEL_COORDINATOR, &other_id, &node_id, 0);
    fl_channel *thief = open_one(FL_CHANNEL_NODE, &other_id, &coord_id, 0);
    const ends e = open_both(0);
    uint8_t r[FL_CHANNEL_RANDOM];
    fl_hello hello;
    fl_hello_reply reply;
    fl_hello_finish finish;
    fresh(r);
    T_EQ(fl_channel_hello(e.node, r, &hello, NULL), FL_OK);
    T_EQ(fl_channel_on_hello(impostor, &hello, r, &reply, NULL), FL_OK);
    T_EQ(fl_channel_on_reply(e.node, &reply, &finish, NULL), FL_EAUTH); // signed by somebody else
    T_EQ(fl_channel_on_hello(e.coord, &hello, r, &reply, NULL), FL_OK);
    T_EQ(fl_channel_on_reply(e.node, &reply, &finish, NULL), FL_OK); // the handshake still waits
    T_EQ(fl_channel_on_reply(e.node, &reply, &finish, NULL), FL_ESTATE); // but once

    fresh(r);
    T_EQ(fl_channel_hello(thief, r, &hello, NULL), FL_OK);
    T_EQ(fl_channel_on_hello(e.coord, &hello, r, &reply, NULL), FL_EAUTH);
    memcpy(hello.identity_key, node_id.key, FL_KEY_SIZE); // claims to be the node
    T_EQ(fl_channel_on_hello(e.coord, &hello, r, &reply, NULL), FL_OK);
    if (fl_channel_on_reply(thief, &reply, &finish, NULL) == FL_OK)
        T_CHECK(false, "wrong transcript");
    finish.session = reply.session;
    T_EQ(fl_sign(other_id.secret, (fl_bytes){r, 64}, finish.signature, NULL), FL_OK);
    T_EQ(fl_channel_on_finish(e.coord, &finish, NULL), FL_EAUTH);
    hello.protocol = 2;
    T_EQ(fl_channel_on_hello(e.coord, &hello, r, &reply, NULL), FL_EUNSUPPORTED);
    hello.protocol = 1;
    memset(hello.ephemeral_key, 0, FL_KEY_SIZE); // no secret comes of this key
    T_EQ(fl_channel_on_hello(e.coord, &hello, r, &reply, NULL), FL_EAUTH);
    fl_channel_close(impostor), fl_channel_close(thief);
    close_both(&e);
}

// Any altered byte of either handshake message ends in a refusal, never in two different sessions.
static void test_every_byte_of_the_handshake(void) {
    uint8_t r[FL_CHANNEL_RANDOM], r2[FL_CHANNEL_RANDOM];
    fresh(r), fresh(r2);
    const size_t key_end = offsetof(fl_hello, software);
    for (size_t i = 0; i < key_end + sizeof(fl_hello_reply); i++) {
        const ends e = open_both(0);
        fl_hello hello;
        fl_hello_reply reply;
        fl_hello_finish finish;
        T_EQ(fl_channel_hello(e.node, r, &hello, NULL), FL_OK);
        if (i < key_end) ((uint8_t *)&hello)[i] ^= 4;
        if (fl_channel_on_hello(e.coord, &hello, r2, &reply, NULL) == FL_OK) {
            fl_hello_reply sent = reply;
            if (i >= key_end) ((uint8_t *)&sent)[i - key_end] ^= 4;
            const bool same = sent.protocol == reply.protocol && sent.session == reply.session &&
                              memcmp(sent.ephemeral_key, reply.ephemeral_key, FL_KEY_SIZE) == 0 &&
                              memcmp(sent.nonce, reply.nonce, FL_KEY_SIZE) == 0 &&
                              memcmp(sent.update_key, reply.update_key, FL_KEY_SIZE) == 0 &&
                              memcmp(sent.signature, reply.signature, FL_SIGNATURE_SIZE) == 0;
            const fl_status st = fl_channel_on_reply(e.node, &sent, &finish, NULL);
            T_CHECK(st != FL_OK || (same && i >= key_end), "byte %zu of the handshake", i);
        }
        close_both(&e);
    }
}

static void test_counters_end(void) {
    const ends e = open_both(5);
    shake(&e);
    packet p;
    for (int i = 0; i < 5; i++) {
        p = seal(e.node, FL_MSG_HEARTBEAT, "x");
        T_EQ(unseal(e.coord, &p, "x"), FL_OK);
    }
    uint8_t out[128];
    size_t size;
    T_EQ(fl_channel_seal(e.node, FL_MSG_HEARTBEAT, (fl_bytes){out, 0}, out, sizeof(out), &size,
                         NULL),
         FL_ESTATE);
    fl_put_u64(p.data + 16, 6);
    T_EQ(unseal(e.coord, &p, ""), FL_EAUTH);
    fl_put_u64(p.data + 16, UINT64_MAX);
    T_EQ(unseal(e.coord, &p, ""), FL_EAUTH);
    shake(&e);
    p = seal(e.node, FL_MSG_HEARTBEAT, "again");
    T_EQ(unseal(e.coord, &p, "again"), FL_OK);
    close_both(&e);
}

static void test_session_numbers(void) {
    const ends e = open_both(0);
    uint8_t r[FL_CHANNEL_RANDOM];
    fl_hello hello;
    fl_hello_reply reply;
    fl_hello_finish finish;
    for (int i = 0; i < 4; i++) { // zeros again and again: never session 0, never the live one
        const uint64_t live = fl_channel_session(e.coord);
        fresh(r);
        T_EQ(fl_channel_hello(e.node, r, &hello, NULL), FL_OK);
        memset(r + 64, 0, 8);
        if (i == 3) fl_put_u64(r + 64, 1);
        T_EQ(fl_channel_on_hello(e.coord, &hello, r, &reply, NULL), FL_OK);
        T_CHECK(reply.session != 0 && reply.session != live, "session %llu",
                (unsigned long long)reply.session);
        T_EQ(fl_channel_on_reply(e.node, &reply, &finish, NULL), FL_OK);
        T_EQ(fl_channel_on_finish(e.coord, &finish, NULL), FL_OK);
    }
    close_both(&e);
}

static void test_no_memory(void) {
#ifdef FL_FAULTS
    bool fired = true;
    for (unsigned n = 1; fired && n < 50; n++) {
        const ends e = open_both(0);
        uint8_t r[FL_CHANNEL_RANDOM];
        fl_hello hello;
        fl_hello_reply reply;
        fl_hello_finish finish;
        fresh(r);
        fl_fault_arm(n);
        fl_status st = fl_channel_hello(e.node, r, &hello, NULL);
        if (st == FL_OK) st = fl_channel_on_hello(e.coord, &hello, r, &reply, NULL);
        if (st == FL_OK) st = fl_channel_on_reply(e.node, &reply, &finish, NULL);
        if (st == FL_OK) st = fl_channel_on_finish(e.coord, &finish, NULL);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK(st == (fired ? FL_ENOMEM : FL_OK), "fault %u: %s", n, fl_status_name(st));
        shake(&e); // and nothing is left that hinders the next attempt
        close_both(&e);
    }
#else
    T_SKIP("built without fault injection");
#endif
}

// ---- sealed updates

static void test_sealed_updates(void) {
    enum { SIZE = 500 };
    uint8_t plain[SIZE], sealed[SIZE + FL_SEAL_EXTRA], out[SIZE], r[FL_CHANNEL_RANDOM];
    fl_seal_label label = {.round = 3, .key = {4, 5, 6}, .tokens = 7};
    fl_bytes got;
    fl_err err;
    fresh(r);
    memcpy(label.node_key, node_id.key, FL_KEY_SIZE);
    for (int i = 0; i < SIZE; i++) plain[i] = (uint8_t)t_rand();
    const fl_bytes payload = {plain, SIZE}, whole = {sealed, sizeof(sealed)};
    T_OK(fl_seal_update(&label, payload, node_id.secret, update_key, r, sealed, sizeof(sealed),
                        &err),
         err);
    T_OK(fl_unseal_update(&label, whole, update_secret, update_key, out, SIZE, &got, &err), err);
    T_CHECK(got.size == SIZE && memcmp(out, plain, SIZE) == 0, "same payload");
    for (size_t i = 0; i < sizeof(label); i++) { // moved to any other place
        fl_seal_label moved = label;
        ((uint8_t *)&moved)[i] ^= 1;
        const bool padding = moved.round == label.round && moved.tokens == label.tokens &&
                             memcmp(moved.run_id, label.run_id, FL_ID_SIZE) == 0 &&
                             memcmp(moved.node_key, label.node_key, FL_KEY_SIZE) == 0 &&
                             moved.key.layer == label.key.layer &&
                             moved.key.base_version == label.key.base_version &&
                             moved.key.sequence == label.key.sequence;
        T_EQ(fl_unseal_update(&moved, whole, update_secret, update_key, out, SIZE, &got, NULL),
             padding ? FL_OK : FL_EAUTH);
    }
    for (size_t i = 0; i < sizeof(sealed); i++) {
        sealed[i] ^= 0x40;
        T_EQ(fl_unseal_update(&label, whole, update_secret, update_key, out, SIZE, &got, NULL),
             FL_EAUTH);
        sealed[i] ^= 0x40;
        const fl_status st = fl_unseal_update(&label, (fl_bytes){sealed, i}, update_secret,
                                              update_key, out, SIZE, &got, NULL);
        T_EQ(st, i < FL_SEAL_EXTRA ? FL_EFORMAT : FL_EAUTH);
    }
    T_EQ(fl_unseal_update(&label, whole, update_secret, update_key, out, SIZE - 1, &got, NULL),
         FL_ELIMIT);
    T_EQ(fl_unseal_update(&label, whole, other_id.secret, update_key, out, SIZE, &got, NULL),
         FL_EAUTH);
    static const uint8_t zero[FL_KEY_SIZE];
    T_EQ(fl_seal_update(&label, payload, node_id.secret, zero, r, sealed, sizeof(sealed), NULL),
         FL_EARG);
    T_EQ(fl_seal_update(&label, payload, node_id.secret, update_key, r, sealed, 100, NULL),
         FL_EARG);
}

// ---- invitations

static fl_invite sample_invite(const char *host) {
    fl_invite in = {.port = 7447};
    memcpy(in.host, host, strlen(host) + 1);
    for (size_t i = 0; i < FL_KEY_SIZE; i++) in.curve_key[i] = (uint8_t)t_rand();
    for (size_t i = 0; i < FL_INVITE_SECRET; i++) in.secret[i] = (uint8_t)t_rand();
    return in;
}

static void test_invite_urls(void) {
    static const char *const hosts[] = {"10.0.0.7", "coordinator.local", "fe80::1%eth0", "::1",
                                        "a"};
    for (size_t i = 0; i < FL_COUNT(hosts); i++) {
        const fl_invite in = sample_invite(hosts[i]);
        fl_invite back;
        char url[FL_INVITE_URL_MAX], loud[FL_INVITE_URL_MAX + 8];
        fl_err err;
        T_OK(fl_invite_format(&in, url, &err), err);
        T_OK(fl_invite_parse(url, &back, &err), err);
        T_STR(back.host, hosts[i]);
        T_CHECK(back.port == 7447 && memcmp(back.curve_key, in.curve_key, FL_KEY_SIZE) == 0 &&
                    memcmp(back.secret, in.secret, FL_INVITE_SECRET) == 0,
                "%s", url);
        snprintf(loud, sizeof(loud), " \t%s\r\n", url);
        for (char *c = loud; *c != '\0'; c++)
            if (*c >= 'a' && *c <= 'z') *c = (char)(*c - 'a' + 'A');
        T_OK(fl_invite_parse(loud, &back, &err), err);
        const size_t n = strlen(url);
        for (size_t k = 0; k < n; k++) { // every mistyped character, every missing end
            const char was = url[k];
            url[k] = was >= '0' && was <= '9' ? (char)(was ^ 1) : was == 'q' ? 'r' : 'q';
            T_CHECK(fl_invite_parse(url, &back, NULL) != FL_OK, "mistyped at %zu of %s", k, url);
            url[k] = '\0';
            T_CHECK(fl_invite_parse(url, &back, NULL) != FL_OK, "cut at %zu", k);
            url[k] = was;
        }
    }
    fl_invite in = sample_invite("x");
    char url[FL_INVITE_URL_MAX];
    in.port = 0;
    T_EQ(fl_invite_format(&in, url, NULL), FL_EARG);
    in = sample_invite("bad host");
    T_EQ(fl_invite_format(&in, url, NULL), FL_EARG);
    in = sample_invite("");
    T_EQ(fl_invite_format(&in, url, NULL), FL_EARG);
    memset(in.host, 'a', sizeof(in.host) - 1);
    in.host[sizeof(in.host) - 1] = '\0';
    T_EQ(fl_invite_format(&in, url, NULL), FL_OK); // the longest host still fits
    T_EQ(fl_invite_parse(url, &in, NULL), FL_OK);
    static const char *const bad[] = {"",
                                      "fleetune://",
                                      "fleetune:///x",
                                      "http://a:1/b",
                                      "fleetune://a/b",
                                      "fleetune://a:0/b",
                                      "fleetune://a:99999/b",
                                      "fleetune://[a:1/b",
                                      "fleetune://:1/b",
                                      "fleetune://]:1/b"};
    for (size_t i = 0; i < FL_COUNT(bad); i++) T_EQ(fl_invite_parse(bad[i], &in, NULL), FL_EFORMAT);
    char *huge = malloc(100001);
    T_NEED(huge != NULL, "memory");
    memset(huge, 'f', 100000);
    huge[100000] = '\0';
    T_EQ(fl_invite_parse(huge, &in, NULL), FL_EFORMAT);
    free(huge);
}

static void test_join_proofs(void) {
    const fl_invite in = sample_invite("h");
    uint8_t id[FL_TOKEN_ID_SIZE], key[FL_KEY_SIZE], id2[FL_TOKEN_ID_SIZE], key2[FL_KEY_SIZE];
    fl_invite_derive(in.secret, id, key);
    const fl_invite other = sample_invite("h");
    fl_invite_derive(other.secret, id2, key2);
    fl_join_request rq;
    memset(&rq, 0, sizeof(rq));
    memcpy(rq.name, "pi", 3), memcpy(rq.software, "s", 2), memcpy(rq.token_id, id, sizeof(id));
    fl_invite_prove(key, in.curve_key, &rq);
    T_CHECK(fl_invite_check(key, in.curve_key, &rq), "own proof");
    T_CHECK(!fl_invite_check(key2, in.curve_key, &rq), "another token");
    T_CHECK(!fl_invite_check(key, other.curve_key, &rq), "another coordinator");
    for (size_t i = 0; i < offsetof(fl_join_request, software) + 2; i++) {
        const bool after_name = i > offsetof(fl_join_request, name) + 2 &&
                                i < offsetof(fl_join_request, name) + sizeof(rq.name);
        if (after_name) continue; // what follows a text's end is not sent
        fl_join_request altered = rq;
        ((uint8_t *)&altered)[i] ^= 2;
        const bool gap = (i >= offsetof(fl_join_request, name) + sizeof(rq.name) &&
                          i < offsetof(fl_join_request, capability)) ||
                         (i >= offsetof(fl_join_request, capability.window_max) + 4 &&
                          i < offsetof(fl_join_request, nonce));
        if (!gap) T_CHECK(!fl_invite_check(key, in.curve_key, &altered), "byte %zu altered", i);
    }
    fl_join_reply rp;
    memset(&rp, 0, sizeof(rp));
    rp.verdict = FL_VERDICT_ACCEPTED;
    memcpy(rp.identity_key, coord_id.key, FL_KEY_SIZE);
    fl_invite_prove_reply(key, &rq, &rp);
    T_CHECK(fl_invite_check_reply(key, &rq, &rp), "own proof");
    T_CHECK(!fl_invite_check_reply(key2, &rq, &rp), "another token");
    fl_join_reply altered = rp;
    altered.identity_key[3] ^= 1;
    T_CHECK(!fl_invite_check_reply(key, &rq, &altered), "another coordinator's identity");
    altered = rp;
    altered.verdict = FL_VERDICT_PENDING;
    T_CHECK(!fl_invite_check_reply(key, &rq, &altered), "another verdict");
    fl_join_request later = rq;
    later.nonce[0] ^= 1;
    T_CHECK(!fl_invite_check_reply(key, &later, &rp), "an old reply to a new request");
}

static party party_new(void) {
    party p = {NULL, {0}};
    if (fl_sign_new(&p.secret, p.key, NULL) != FL_OK) abort();
    return p;
}

int main(int argc, char **argv) {
    if (fl_crypto_init(NULL) != FL_OK) return 2;
    node_id = party_new(), coord_id = party_new(), other_id = party_new();
    if (fl_dh_new(&update_secret, update_key, NULL) != FL_OK) return 2;
    static const t_case cases[] = {
        {"messages_both_ways", test_messages_both_ways},
        {"every_bit_counts", test_every_bit_counts},
        {"window", test_window},
        {"restarts", test_restarts},
        {"forged_hello", test_forged_hello},
        {"wrong_identities", test_wrong_identities},
        {"every_byte_of_the_handshake", test_every_byte_of_the_handshake},
        {"counters_end", test_counters_end},
        {"session_numbers", test_session_numbers},
        {"no_memory", test_no_memory},
        {"sealed_updates", test_sealed_updates},
        {"invite_urls", test_invite_urls},
        {"join_proofs", test_join_proofs},
    };
    const int status = t_main(argc, argv, cases, FL_COUNT(cases));
    fl_secret_close(node_id.secret), fl_secret_close(coord_id.secret);
    fl_secret_close(other_id.secret), fl_secret_close(update_secret);
    return status;
}
