// Goal: whatever an authenticated peer sends, it costs no more than its arena and never counts
// twice. Method: a million bodies made from legal ones by changes that know the format, through the
// decoder that the coordinator uses; and a million captured frames again: in their session, in the
// next one, in another node's, with another head. Nothing here needs a socket.
#include "common/checked.h"
#include "common/clock.h"
#include "common/rng.h"
#include "proto/channel.h"
#include "tests/check.h"
#include "tests/sample_msgs.h"

#include <sys/resource.h>

enum { TRIES = 1000000, KEPT = 256, RSS_MAX = 32 << 20, ROOM = 1 << 16 };

static uint64_t state = 20261122;

static uint32_t draw(uint32_t below) { // splitmix64: any sequence will do, but always the same
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) % below);
}

static size_t peak_rss(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (size_t)u.ru_maxrss * 1024;
}

// One change: of a bit, of a byte, a part left out, repeated, or a field of the largest length.
static size_t spoil(uint8_t *p, size_t size) {
    static const uint8_t huge[] = {0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f};
    const size_t at = size == 0 ? 0 : draw((uint32_t)size);
    const size_t n = 1 + draw(64), left = size - at, part = n < left ? n : left;
    switch (draw(6)) {
    case 0:
        if (size != 0) p[at] ^= (uint8_t)(1u << draw(8));
        return size;
    case 1:
        if (size != 0) p[at] = (uint8_t)draw(256);
        return size;
    case 2:
        return at;
    case 3:
        memmove(p + at, p + at + part, left - part);
        return size - part;
    case 4: // a part again, or all of it: repeated fields, and single ones twice
        if (size + size > ROOM) return size;
        if (draw(2) == 0) {
            memcpy(p + size, p, size);
            return size + size;
        }
        memmove(p + at + part, p + at, left);
        return size + part;
    default:
        if (size + sizeof(huge) > ROOM) return size;
        memmove(p + at + sizeof(huge), p + at, left);
        memcpy(p + at, huge, sizeof(huge));
        return size + sizeof(huge);
    }
}

static void test_a_million_malformed_bodies(void) {
    static uint8_t body[ROOM];
    fl_arena in, out;
    fl_arena_init(&in, malloc(FL_CODEC_ARENA), FL_CODEC_ARENA);
    fl_arena_init(&out, malloc(FL_CODEC_ARENA), FL_CODEC_ARENA);
    T_NEED(in.base != NULL && out.base != NULL, "memory");
    static uint8_t legal[FL_COUNT(sample_types)][4096];
    size_t legal_size[FL_COUNT(sample_types)], decoded = 0, refused = 0;
    for (size_t t = 0; t < FL_COUNT(sample_types); t++) {
        const fl_msg m = sample_msg(sample_types[t]);
        fl_bytes b;
        fl_arena_rewind(&out, 0);
        T_NEED(fl_msg_encode(&m, &out, &b, NULL) == FL_OK, "a sample");
        legal_size[t] = b.size < sizeof(legal[t]) ? b.size : sizeof(legal[t]);
        memcpy(legal[t], b.data, legal_size[t]);
    }
    const size_t before = peak_rss();
    for (uint32_t i = 0; i < TRIES; i++) {
        const size_t sample = i % FL_COUNT(sample_types);
        const fl_msg_type type = sample_types[sample];
        fl_bytes b;
        fl_msg got;
        size_t size = legal_size[sample];
        memcpy(body, legal[sample], size);
        for (uint32_t k = 1 + draw(3); k > 0; k--) size = spoil(body, size);
        fl_arena_rewind(&in, 0);
        fl_arena_rewind(&out, 0);
        if (fl_msg_decode(type, (fl_bytes){body, size}, &in, &got, NULL) != FL_OK) {
            refused++;
            continue;
        }
        decoded++; // then it is within every limit: it can be said again
        T_CHECK(fl_msg_encode(&got, &out, &b, NULL) == FL_OK, "try %u: %s of %zu bytes", i,
                fl_msg_name(type), size);
    }
    const size_t grown = peak_rss() - before;
    printf("%zu refused, %zu were still legal; %zu kB more memory\n", refused, decoded,
           grown / 1024);
    T_CHECK(refused > TRIES / 3, "only %zu of %d are refused: nothing is spoiled", refused, TRIES);
    T_CHECK(grown < RSS_MAX, "%zu bytes more", grown);
    free(in.base);
    free(out.base);
}

// ---- replays

typedef struct side {
    fl_secret *identity;
    uint8_t key[FL_KEY_SIZE];
} side;

static side side_new(void) {
    side s = {0};
    fl_err err;
    T_OK(fl_sign_new(&s.identity, s.key, &err), err);
    return s;
}

static fl_channel *channel_new(const side *own, const side *peer, fl_channel_role role) {
    static const uint8_t update_key[FL_KEY_SIZE] = {9};
    fl_channel *ch = NULL;
    fl_err err;
    const fl_channel_opts opts = {.role = role,
                                  .identity = own->identity,
                                  .identity_key = own->key,
                                  .peer_key = peer->key,
                                  .update_key = update_key};
    T_OK(fl_channel_open(&opts, &ch, &err), err);
    return ch;
}

static void shake(fl_channel *node, fl_channel *home) {
    uint8_t a[FL_CHANNEL_RANDOM], b[FL_CHANNEL_RANDOM];
    fl_hello hello;
    fl_hello_reply reply;
    fl_hello_finish finish;
    fl_err err;
    fl_random(a, sizeof(a));
    fl_random(b, sizeof(b));
    T_OK(fl_channel_hello(node, a, &hello, &err), err);
    T_OK(fl_channel_on_hello(home, &hello, b, &reply, &err), err);
    T_OK(fl_channel_on_reply(node, &reply, &finish, &err), err);
    T_OK(fl_channel_on_finish(home, &finish, &err), err);
}

typedef struct kept {
    uint8_t bytes[256];
    size_t size;
} kept;

static bool accepts(fl_channel *ch, const kept *k) {
    uint8_t out[256];
    fl_frame f;
    fl_bytes body;
    return fl_frame_decode((fl_bytes){k->bytes, k->size}, FL_FROM_NODE, &f, NULL) == FL_OK &&
           fl_channel_unseal(ch, &f, out, sizeof(out), &body, NULL) == FL_OK;
}

static void test_a_million_replays(void) {
    static kept frames[KEPT];
    const side home = side_new(), ada = side_new(), bob = side_new();
    fl_channel *ada_end = channel_new(&ada, &home, FL_CHANNEL_NODE);
    fl_channel *bob_end = channel_new(&bob, &home, FL_CHANNEL_NODE);
    fl_channel *for_ada = channel_new(&home, &ada, FL_CHANNEL_COORDINATOR);
    fl_channel *for_bob = channel_new(&home, &bob, FL_CHANNEL_COORDINATOR);
    shake(ada_end, for_ada);
    shake(bob_end, for_bob);
    uint64_t first[KEPT];
    size_t honest = 0, counted = 0;
    for (size_t i = 0; i < KEPT; i++) {
        fl_err err;
        const uint8_t body[40] = {(uint8_t)i};
        T_OK(fl_channel_seal(ada_end, FL_MSG_HEARTBEAT, (fl_bytes){body, sizeof(body)},
                             frames[i].bytes, sizeof(frames[i].bytes), &frames[i].size, &err),
             err);
        honest += accepts(for_ada, &frames[i]);
        first[i] = fl_get_u64(frames[i].bytes + 8);
    }
    T_EQ(honest, KEPT);
    for (uint32_t i = 0; i < TRIES; i++) {
        kept k = frames[draw(KEPT)];
        fl_channel *to = for_ada;
        if (i == TRIES / 2) shake(ada_end, for_ada); // from here on all are of an old session
        if (draw(3) == 0) to = for_bob;
        if (draw(2) == 0) // as if of the session that is live now, under a counter not yet used
            memcpy(k.bytes + 8, (uint8_t[8]){(uint8_t)draw(256)}, 1);
        if (draw(2) == 0) fl_put_u64(k.bytes + 8, fl_channel_session(to));
        if (draw(2) == 0) fl_put_u64(k.bytes + 16, KEPT + 1 + draw(1000));
        counted += accepts(to, &k);
    }
    T_EQ(counted, 0);
    T_CHECK(first[0] != 0, "a session has a number");
    fl_channel_close(ada_end);
    fl_channel_close(bob_end);
    fl_channel_close(for_ada);
    fl_channel_close(for_bob);
    fl_secret_close(home.identity);
    fl_secret_close(ada.identity);
    fl_secret_close(bob.identity);
}

int main(int argc, char **argv) {
    if (fl_crypto_init(NULL) != FL_OK) return 2;
    static const t_case cases[] = {
        {"a_million_malformed_bodies", test_a_million_malformed_bodies},
        {"a_million_replays", test_a_million_replays},
    };
    return t_main(argc, argv, cases, FL_COUNT(cases));
}
