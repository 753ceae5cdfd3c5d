// A node that does not keep to the rules, to see how the coordinator takes it. It speaks the real
// protocol with the real keys of an enrolled node's folder, and does one wrong thing a run.
//
//   hostile_client STATE COUNT KIND
//
// STATE is a node's folder, COUNT the values of the layer that is attacked (the first of the
// window), KIND one of the list below. Prints what came of it: "TASK_REQUEST: TASK", "ack: VERDICT
// CODE", "error: CODE", "refused" (the link did not let us in) or "silence".
#include "common/checked.h"
#include "common/clock.h"
#include "node/client/peer.h"
#include "node/state.h"
#include "proto/link.h"
#include "proto/seal.h"
#include "proto/update.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KIND_LIST(X)                                                                               \
    X(honest)            /* every layer of the window, nothing wrong: is accepted */               \
    X(honest_twice)      /* the first layer, then the same again: counts once */                   \
    X(replayed_frame)    /* sealed frames of this session, once more */                            \
    X(other_sequence)    /* the payload of one update under the number of another */               \
    X(other_session)     /* frames of a session that is over */                                    \
    X(truncated_sealed)  /* the last bytes of the envelope are missing */                          \
    X(truncated_payload) /* the last bytes of the delta inside are missing */                      \
    X(flipped)           /* one bit on the way: not what was announced */                          \
    X(flipped_digest)    /* one bit, and the digest of that is announced */                        \
    X(flipped_frame)     /* one bit of a sealed frame */                                           \
    X(oversized)         /* announces more than any update may have */                             \
    X(oversized_frame)   /* a frame of 2 MiB */                                                    \
    X(wrong_count)       /* a delta of one value more */                                           \
    X(nan)               /* a block whose scale is not a number */                                 \
    X(infinite)          /* a block whose scale is infinite */                                     \
    X(too_large)         /* values beyond what a delta may hold */                                 \
    X(far_norm)          /* a thousand times what others send */                                   \
    X(future_base)       /* based on a version that does not exist */                              \
    X(other_run)         /* of another run */                                                      \
    X(other_layer)       /* of a layer outside of its window */                                    \
    X(other_task)        /* for a task that it was not given */                                    \
    X(other_tokens)      /* the head inside claims other tokens than the announcement */           \
    X(other_identity)    /* the transport key of one node, the identity of nobody */               \
    X(other_signer)      /* an update that another key signed */                                   \
    X(garbage)           /* frames of random bytes */                                              \
    X(flood)             /* the same, a hundred of them: is shut out */                            \
    X(knock)             /* nothing but a connection and a greeting */

typedef enum kind {
#define X(name) KIND_##name,
    KIND_LIST(X) KINDS
#undef X
} kind;
static const char *const kind_name[KINDS] = {
#define X(name) #name,
    KIND_LIST(X)
#undef X
};

enum { WAIT_MS = 1500, SHAKE_MS = 2500, FRAME_ROOM = 4 << 20 };

typedef struct client {
    node_state state;
    fl_link *link;
    fl_channel *channel;
    node_peer peer;
    fl_arena scratch;
    uint8_t *plain, *frame, *kept; // an opened body, the frame sent last, one kept for later
    size_t frame_size, kept_size;
    fl_secret *stranger; // another identity
    fl_task task;
    fl_layer_version bases[FL_LAYERS_MAX];
    kind kind;
    uint32_t count;
} client;

static void stop(const char *what, const fl_err *err) {
    fprintf(stderr, "hostile_client: %s: %s\n", what, err == NULL ? "" : err->text);
    exit(1);
}

static void must(fl_status st, const char *what, const fl_err *err) {
    if (st != FL_OK) stop(what, err);
}

static void send_bytes(client *c, const uint8_t *data, size_t size) {
    fl_err err;
    for (int tries = 0; tries < 100; tries++) {
        const fl_status st = fl_link_send(c->link, 0, (fl_bytes){data, size}, &err);
        fl_link_message in;
        if (st == FL_OK) return;
        if (st != FL_ETIME || fl_link_receive(c->link, 20, &in, NULL) == FL_OK) stop("send", &err);
    }
}

static void say(client *c, const fl_msg *m) {
    fl_err err;
    must(node_peer_send(&c->peer, m, &c->scratch, c->frame, &c->frame_size, &err), "seal", &err);
    send_bytes(c, c->frame, c->frame_size);
}

// The next message of the session; false when none came in time. Answers of the handshake go out.
static bool hear(client *c, uint32_t wait_ms, fl_msg *ret) {
    const uint64_t start = fl_clock_ms();
    while (fl_clock_ms() - start < wait_ms) {
        fl_link_message in;
        node_peer_got got;
        size_t size = 0;
        if (fl_link_receive(c->link, 50, &in, NULL) != FL_OK) continue;
        fl_arena_rewind(&c->scratch, 0);
        if (node_peer_receive(&c->peer, in.frame, &c->scratch, c->plain, c->frame, &size, ret, &got,
                              NULL) != FL_OK)
            continue;
        if (size != 0) send_bytes(c, c->frame, size);
        if (got == NODE_PEER_MESSAGE || got == NODE_PEER_HINT) return true;
        if (got == NODE_PEER_UP) return false;
    }
    return false;
}

static bool shake_hands(client *c) {
    const uint64_t start = fl_clock_ms();
    while (!c->peer.up && fl_clock_ms() - start < SHAKE_MS) {
        uint8_t random[FL_CHANNEL_RANDOM];
        size_t size = 0;
        fl_msg m;
        if (fl_link_state(c->link) == FL_LINK_REFUSED) return false;
        fl_random(random, sizeof(random));
        if (fl_link_state(c->link) == FL_LINK_UP &&
            node_peer_tick(&c->peer, fl_clock_ms(), random, &c->scratch, c->frame, &size, NULL) ==
                FL_OK &&
            size != 0)
            send_bytes(c, c->frame, size);
        (void)hear(c, 100, &m);
    }
    return c->peer.up;
}

static void print_answer(client *c, uint32_t wait_ms) {
    fl_msg m;
    if (!hear(c, wait_ms, &m)) {
        printf("%s\n", fl_link_state(c->link) == FL_LINK_REFUSED ? "refused" : "silence");
    } else if (m.type == FL_MSG_UPDATE_ACK) {
        static const char *const verdicts[] = {
            [FL_VERDICT_ACCEPTED] = "accepted",
            [FL_VERDICT_DUPLICATE] = "duplicate",
            [FL_VERDICT_REFUSED] = "refused",
        };
        printf("ack: %s %s\n", verdicts[m.update_ack.verdict], fl_code_name(m.update_ack.code));
    } else if (m.type == FL_MSG_ERROR) {
        printf("error: %s\n", fl_code_name(m.error.code));
    } else {
        printf("%s\n", fl_msg_name(m.type));
    }
    fflush(stdout);
}

// ---- one update, spoiled

typedef struct update {
    fl_update_begin begin;
    uint8_t *sealed; // [begin.size]
} update;

static float delta_value(const client *c, uint32_t i) {
    const float v = 0.01f * sinf((float)i + 1.0f);
    return c->kind == KIND_far_norm ? 1000.0f * v : v;
}

// A delta as the kind wants it, in clear.
static uint8_t *make_payload(const client *c, const fl_update_begin *b, size_t *ret_size) {
    const uint32_t count = c->count + (c->kind == KIND_wrong_count);
    const fl_update_info info = {.encoding = FL_UPDATE_INT16,
                                 .layer = b->key.layer,
                                 .count = count,
                                 .base_version = b->key.base_version,
                                 .tokens = b->tokens + (c->kind == KIND_other_tokens)};
    size_t size = fl_update_size(count, FL_UPDATE_INT16);
    uint8_t *out = malloc(size);
    float *values = malloc(count * sizeof(*values));
    fl_err err;
    if (out == NULL || values == NULL) stop("no memory", NULL);
    for (uint32_t i = 0; i < count; i++) values[i] = delta_value(c, i);
    must(fl_update_encode(&info, values, 0, out, size, NULL, &err), "encode", &err);
    free(values);
    if (c->kind == KIND_nan) fl_put_f32(out + FL_UPDATE_HEAD, nanf(""));
    if (c->kind == KIND_infinite) fl_put_f32(out + FL_UPDATE_HEAD, INFINITY);
    if (c->kind == KIND_too_large) fl_put_f32(out + FL_UPDATE_HEAD, 1e30f);
    if (c->kind == KIND_truncated_payload) size -= 2;
    *ret_size = size;
    return out;
}

static update make_update(client *c, uint32_t index) {
    const fl_layer_version base = c->bases[index];
    update u = {.begin = {.round = c->task.round,
                          .task_id = c->task.task_id + (c->kind == KIND_other_task),
                          .tokens = 32, // as many as a task of 2 steps of 16 has
                          .key = {base.layer + (c->kind == KIND_other_layer ? 100U : 0U),
                                  base.version + (c->kind == KIND_future_base),
                                  (uint64_t)++c->state.updates_made}}};
    fl_err err;
    uint8_t random[FL_KEY_SIZE];
    size_t size;
    memcpy(u.begin.run_id, c->task.run_id, FL_ID_SIZE);
    if (c->kind == KIND_other_run) u.begin.run_id[0] ^= 1;
    uint8_t *payload = make_payload(c, &u.begin, &size);
    u.begin.size = size + FL_SEAL_EXTRA;
    fl_seal_label label = {.round = u.begin.round, .key = u.begin.key, .tokens = u.begin.tokens};
    memcpy(label.run_id, u.begin.run_id, FL_ID_SIZE);
    memcpy(label.node_key, c->state.identity_key, FL_KEY_SIZE);
    if (c->kind == KIND_other_sequence) label.key.sequence += 1000;
    fl_random(random, sizeof(random));
    u.sealed = malloc(u.begin.size);
    if (u.sealed == NULL) stop("no memory", NULL);
    must(fl_seal_update(&label, (fl_bytes){payload, size},
                        c->kind == KIND_other_signer ? c->stranger : c->state.identity,
                        fl_channel_update_key(c->channel), random, u.sealed, u.begin.size, &err),
         "seal the update", &err);
    free(payload);
    if (c->kind == KIND_flipped_digest) u.sealed[u.begin.size / 2] ^= 4;
    if (c->kind == KIND_truncated_sealed) u.begin.size -= 7;
    fl_hash((fl_bytes){u.sealed, u.begin.size}, u.begin.digest);
    if (c->kind == KIND_flipped) u.sealed[u.begin.size / 2] ^= 4;
    must(node_state_save_run(&c->state, &err), "save the count", &err);
    return u;
}

static void upload(client *c, const update *u) {
    fl_msg m = {.type = FL_MSG_UPDATE_BEGIN, .update_begin = u->begin};
    say(c, &m);
    if (!hear(c, WAIT_MS, &m) || m.type != FL_MSG_UPDATE_WANT) {
        if (m.type == FL_MSG_UPDATE_ACK)
            printf("ack: %s %s\n",
                   m.update_ack.verdict == FL_VERDICT_REFUSED ? "refused" : "duplicate",
                   fl_code_name(m.update_ack.code));
        else
            printf("error: %s\n", m.type == FL_MSG_ERROR ? fl_code_name(m.error.code) : "none");
        return;
    }
    for (uint64_t at = 0; at < u->begin.size;) {
        const uint64_t left = u->begin.size - at, n = left < 1000 ? left : 1000;
        m = (fl_msg){.type = FL_MSG_UPDATE_CHUNK,
                     .update_chunk = {u->begin.key, at, {u->sealed + at, (size_t)n}}};
        say(c, &m);
        if (!hear(c, WAIT_MS, &m)) break;
        at += n;
    }
    m = (fl_msg){.type = FL_MSG_UPDATE_COMMIT, .update_commit = {.key = u->begin.key}};
    memcpy(m.update_commit.digest, u->begin.digest, FL_DIGEST_SIZE);
    say(c, &m);
    print_answer(c, WAIT_MS);
}

static bool get_task(client *c) {
    fl_msg m = {.type = FL_MSG_TASK_REQUEST,
                .task_request = {.capability = {.memory_bytes = 1 << 30, .window_max = 256}}};
    say(c, &m);
    if (!hear(c, WAIT_MS, &m) || m.type != FL_MSG_TASK || m.task.kind != FL_TASK_TRAIN) {
        printf("no task: %s\n", fl_msg_name(m.type));
        return false;
    }
    c->task = m.task;
    memcpy(c->bases, m.task.bases, m.task.base_count * sizeof(c->bases[0]));
    return true;
}

static void one_update(client *c, uint32_t index, int times) {
    update u = make_update(c, index);
    for (int i = 0; i < times; i++) upload(c, &u);
    free(u.sealed);
}

// ---- wrong frames

static void keep_frame(client *c) {
    memcpy(c->kept, c->frame, c->frame_size);
    c->kept_size = c->frame_size;
}

static const fl_msg beat = {.type = FL_MSG_HEARTBEAT,
                            .heartbeat = {.state = FL_NODE_IDLE, .capability = {.cores = 1}}};

static void heartbeat(client *c) {
    fl_msg answer;
    say(c, &beat);
    keep_frame(c);
    if (!hear(c, WAIT_MS, &answer)) stop("no answer to an honest heartbeat", NULL);
}

// Announces 2^40 bytes: a field once more, behind the legal one; the last one counts.
static void oversized(client *c) {
    static const uint8_t size_field[] = {6 << 3, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20};
    const update u = make_update(c, 0);
    const fl_msg m = {.type = FL_MSG_UPDATE_BEGIN, .update_begin = u.begin};
    fl_bytes body;
    fl_err err;
    uint8_t joined[1024];
    must(fl_msg_encode(&m, &c->scratch, &body, &err), "encode", &err);
    memcpy(joined, body.data, body.size);
    memcpy(joined + body.size, size_field, sizeof(size_field));
    must(fl_channel_seal(c->channel, m.type, (fl_bytes){joined, body.size + sizeof(size_field)},
                         c->frame, FL_FRAME_MAX, &c->frame_size, &err),
         "seal", &err);
    send_bytes(c, c->frame, c->frame_size);
    free(u.sealed);
    print_answer(c, WAIT_MS);
}

static void spoiled_frame(client *c) {
    static uint8_t big[2 << 20];
    fl_err err;
    switch (c->kind) {
    case KIND_replayed_frame:
        heartbeat(c);
        send_bytes(c, c->kept, c->kept_size);
        break;
    case KIND_other_session:
        heartbeat(c);
        node_peer_drop(&c->peer);
        if (!shake_hands(c)) stop("no second session", NULL);
        send_bytes(c, c->kept, c->kept_size);
        break;
    case KIND_flipped_frame:
        must(node_peer_send(&c->peer, &beat, &c->scratch, c->frame, &c->frame_size, &err), "seal",
             &err);
        c->frame[FL_FRAME_HEAD + 3] ^= 16;
        send_bytes(c, c->frame, c->frame_size);
        break;
    case KIND_garbage:
        fl_random(big, 4096);
        for (size_t n = 1; n < 4096; n += n) send_bytes(c, big, n);
        break;
    case KIND_flood: // they stop going out when the connection is closed
        fl_random(big, 4096);
        for (size_t n = 0; n < 100; n++)
            (void)!fl_link_send(c->link, 0, (fl_bytes){big, 200}, NULL);
        break;
    default:
        send_bytes(c, big, sizeof(big));
        break;
    }
    print_answer(c, WAIT_MS);
}

static void act(client *c) {
    switch (c->kind) {
    case KIND_replayed_frame:
    case KIND_other_session:
    case KIND_flipped_frame:
    case KIND_garbage:
    case KIND_flood:
    case KIND_oversized_frame:
        spoiled_frame(c);
        return;
    case KIND_knock:
    case KIND_other_identity:
        printf("session\n");
        return;
    default:
        break;
    }
    if (!get_task(c)) return;
    if (c->kind == KIND_oversized)
        oversized(c);
    else if (c->kind == KIND_honest)
        for (uint32_t i = 0; i < c->task.base_count; i++) one_update(c, i, 1);
    else
        one_update(c, 0, c->kind == KIND_honest_twice ? 2 : 1);
}

static void open_client(client *c, const char *folder) {
    fl_err err;
    char endpoint[600];
    uint8_t key[FL_KEY_SIZE];
    must(fl_crypto_init(&err), "crypto", &err);
    must(node_state_open(folder, &c->state, &err), folder, &err);
    must(fl_sign_new(&c->stranger, key, &err), "key", &err);
    const bool other = c->kind == KIND_other_identity;
    const fl_channel_opts channel = {.role = FL_CHANNEL_NODE,
                                     .identity = other ? c->stranger : c->state.identity,
                                     .identity_key = other ? key : c->state.identity_key,
                                     .peer_key = c->state.coordinator_identity};
    must(fl_channel_open(&channel, &c->channel, &err), "channel", &err);
    node_peer_init(&c->peer, c->channel);
    snprintf(endpoint, sizeof(endpoint), "tcp://%s:%lld", c->state.host, (long long)c->state.port);
    const fl_link_opts link = {.endpoint = endpoint,
                               .curve_secret = fl_secret_view(c->state.curve).data,
                               .curve_key = c->state.curve_key,
                               .coordinator_key = c->state.coordinator_curve,
                               .frame_max = FRAME_ROOM};
    must(fl_link_dial(&link, &c->link, &err), "dial", &err);
    c->plain = malloc(FL_BODY_MAX);
    c->frame = malloc(FL_FRAME_MAX);
    c->kept = malloc(FL_FRAME_MAX);
    fl_arena_init(&c->scratch, malloc(2 * FL_CODEC_ARENA), 2 * FL_CODEC_ARENA);
    if (c->plain == NULL || c->frame == NULL || c->kept == NULL || c->scratch.base == NULL)
        stop("no memory", NULL);
}

static void close_client(client *c) {
    fl_link_close(c->link);
    fl_channel_close(c->channel);
    fl_secret_close(c->stranger);
    node_state_close(&c->state);
    free(c->plain);
    free(c->frame);
    free(c->kept);
    free(c->scratch.base);
}

int main(int argc, char **argv) {
    static client c;
    c.kind = KINDS;
    for (int k = 0; argc == 4 && k < KINDS; k++)
        if (strcmp(argv[3], kind_name[k]) == 0) c.kind = (kind)k;
    if (c.kind == KINDS) {
        fprintf(stderr, "usage: hostile_client STATE COUNT KIND; kinds:\n");
        for (int k = 0; k < KINDS; k++) fprintf(stderr, " %s", kind_name[k]);
        fprintf(stderr, "\n");
        return 2;
    }
    c.count = (uint32_t)strtoul(argv[2], NULL, 10);
    open_client(&c, argv[1]);
    if (shake_hands(&c))
        act(&c);
    else
        printf("%s\n", fl_link_state(c.link) == FL_LINK_REFUSED ? "refused" : "no session");
    close_client(&c);
    return 0;
}
