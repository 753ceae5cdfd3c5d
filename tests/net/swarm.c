// Many honest nodes in one process: each with keys, a connection and a session of its own, and
// sealed updates. For tests of what many connections cost and of what networks do to them.
//
//   swarm URL NODES COUNT GAIN ROUNDS [NAME]
//
// URL of a token with NODES uses and automatic approval, COUNT the values of a layer's update, GAIN
// how many more those of a layer with an exit have, ROUNDS how many tasks each node carries out;
// then it only beats. Nodes are called NAME-0, NAME-1 ... (NAME "guesser": each with a token of its
// own making.) Prints a line whenever something changed, at most ten a second, until SIGTERM:
//
//   MS joined N up N sessions N acked N refused N
//
// MS is CLOCK_MONOTONIC; `up` counts connections, `sessions` those with a live session, `acked`
// acknowledged updates of all.
#include "common/clock.h"
#include "node/client/peer.h"
#include "proto/invite.h"
#include "proto/link.h"
#include "proto/seal.h"
#include "proto/update.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum {
    JOINING_MAX = 8, // at once; the coordinator lets in few strangers from one address
    AGAIN_MS = 3000, // a request without an answer is repeated
    BEAT_MS = 5000,
    PRINT_MS = 100,
    PASS_US = 2000, // between two looks at all nodes
};

typedef enum step { STEP_JOIN, STEP_SESSION, STEP_TASK, STEP_BEGIN, STEP_CHUNK, STEP_COMMIT } step;

typedef struct node {
    fl_secret *identity, *curve;
    uint8_t identity_key[FL_KEY_SIZE], curve_key[FL_KEY_SIZE], coordinator[FL_KEY_SIZE];
    fl_link *link;
    fl_link_status state;
    fl_channel *channel;
    node_peer peer;
    fl_join_request request;
    step step;
    uint64_t asked_ms, beat_ms;
    fl_task task; // bases below
    fl_layer_version bases[8];
    size_t base_count, base_next;
    uint32_t rounds;
    uint64_t sequence, sent;
    fl_update_begin begin;
    uint8_t *sealed; // [begin.size] or NULL
} node;

static struct {
    fl_invite invite;
    uint8_t token_key[FL_KEY_SIZE], token_id[FL_TOKEN_ID_SIZE];
    const char *name;
    node *nodes;
    size_t count, dialled;
    uint32_t values, gain, rounds;
    size_t joined, acked, refused, last_sum;
    uint64_t printed_ms;
    fl_arena scratch;
    uint8_t *plain, *frame;
} all;

static volatile sig_atomic_t stopping;

static void on_signal(int number) {
    (void)number;
    stopping = 1;
}

static void must(fl_status st, const char *what, const fl_err *err) {
    if (st == FL_OK) return;
    fprintf(stderr, "swarm: %s: %s\n", what, err->text);
    exit(1);
}

static void send_frame(node *n, size_t size) {
    // A full queue or a lost connection: asked again when no answer comes.
    if (size != 0 && fl_link_send(n->link, 0, (fl_bytes){all.frame, size}, NULL) != FL_OK) return;
}

static void say(node *n, const fl_msg *m) {
    size_t size;
    fl_err err;
    n->asked_ms = fl_clock_ms();
    if (!n->peer.up) return;
    must(node_peer_send(&n->peer, m, &all.scratch, all.frame, &size, &err), "seal", &err);
    send_frame(n, size);
}

// ---- joining

static void dial(node *n, size_t index) {
    fl_err err;
    char endpoint[FL_INVITE_HOST_MAX + 32];
    must(fl_sign_new(&n->identity, n->identity_key, &err), "key", &err);
    must(fl_dh_new(&n->curve, n->curve_key, &err), "key", &err);
    snprintf(endpoint, sizeof(endpoint), "tcp://%s:%u", all.invite.host, all.invite.port);
    const fl_link_opts opts = {.endpoint = endpoint,
                               .curve_secret = fl_secret_view(n->curve).data,
                               .curve_key = n->curve_key,
                               .coordinator_key = all.invite.curve_key,
                               .share = index == 0 ? NULL : all.nodes[0].link};
    must(fl_link_dial(&opts, &n->link, &err), "dial", &err);
    fl_join_request *r = &n->request;
    memcpy(r->token_id, all.token_id, FL_TOKEN_ID_SIZE);
    if (strcmp(all.name, "guesser") == 0) fl_random(r->token_id, sizeof(r->token_id));
    memcpy(r->identity_key, n->identity_key, FL_KEY_SIZE);
    memcpy(r->curve_key, n->curve_key, FL_KEY_SIZE);
    snprintf(r->name, sizeof(r->name), "%.40s-%zu", all.name, index);
    r->protocol = FL_PROTOCOL;
    snprintf(r->software, sizeof(r->software), "swarm");
    fl_random(r->nonce, sizeof(r->nonce));
    fl_invite_prove(all.token_key, all.invite.curve_key, r);
}

static void ask_to_join(node *n) {
    const fl_msg m = {.type = FL_MSG_JOIN_REQUEST, .join_request = n->request};
    fl_bytes body;
    size_t size;
    fl_err err;
    n->asked_ms = fl_clock_ms();
    must(fl_msg_encode(&m, &all.scratch, &body, &err), "encode", &err);
    const fl_frame f = {.type = m.type, .body = body};
    must(fl_frame_encode(&f, all.frame, FL_FRAME_MAX, &size, &err), "encode", &err);
    send_frame(n, size);
}

static void on_join_reply(node *n, fl_bytes frame) {
    fl_frame f;
    fl_msg m;
    fl_err err;
    if (fl_frame_decode(frame, FL_FROM_COORDINATOR, &f, NULL) != FL_OK ||
        f.type != FL_MSG_JOIN_REPLY ||
        fl_msg_decode(f.type, f.body, &all.scratch, &m, NULL) != FL_OK ||
        !fl_invite_check_reply(all.token_key, &n->request, &m.join_reply) ||
        m.join_reply.verdict != FL_VERDICT_ACCEPTED)
        return;
    memcpy(n->coordinator, m.join_reply.identity_key, FL_KEY_SIZE);
    const fl_channel_opts channel = {.role = FL_CHANNEL_NODE,
                                     .identity = n->identity,
                                     .identity_key = n->identity_key,
                                     .peer_key = n->coordinator};
    must(fl_channel_open(&channel, &n->channel, &err), "channel", &err);
    node_peer_init(&n->peer, n->channel);
    n->step = STEP_SESSION;
    all.joined++;
}

// ---- work

static void ask_task(node *n) {
    const fl_msg m = {.type = FL_MSG_TASK_REQUEST,
                      .task_request = {.capability = {.memory_bytes = 1 << 30, .window_max = 8}}};
    n->step = STEP_TASK;
    say(n, &m);
}

// The next layer of the task, sealed. The values are small and differ between nodes.
static void make_update(node *n) {
    const fl_layer_version base = n->bases[n->base_next];
    fl_update_begin *b = &n->begin;
    fl_err err;
    uint8_t random[FL_KEY_SIZE];
    const uint32_t count = all.values + (base.layer == n->task.exit_layer ? all.gain : 0);
    *b = (fl_update_begin){.round = n->task.round,
                           .task_id = n->task.task_id,
                           .tokens = 64,
                           .key = {base.layer, base.version, ++n->sequence}};
    memcpy(b->run_id, n->task.run_id, FL_ID_SIZE);
    const fl_update_info info = {.encoding = FL_UPDATE_INT16,
                                 .layer = base.layer,
                                 .count = count,
                                 .base_version = base.version,
                                 .tokens = b->tokens};
    const size_t size = fl_update_size(count, FL_UPDATE_INT16);
    float *values = malloc(count * sizeof(*values));
    uint8_t *payload = malloc(size);
    b->size = size + FL_SEAL_EXTRA;
    n->sealed = malloc(b->size);
    if (values == NULL || payload == NULL || n->sealed == NULL) exit(1);
    fl_random(random, sizeof(random));
    for (uint32_t i = 0; i < count; i++)
        values[i] = 0.01f * sinf((float)(i + 1) + (float)random[0]);
    must(fl_update_encode(&info, values, 0, payload, size, NULL, &err), "encode", &err);
    fl_seal_label label = {.round = b->round, .key = b->key, .tokens = b->tokens};
    memcpy(label.run_id, b->run_id, FL_ID_SIZE);
    memcpy(label.node_key, n->identity_key, FL_KEY_SIZE);
    must(fl_seal_update(&label, (fl_bytes){payload, size}, n->identity,
                        fl_channel_update_key(n->channel), random, n->sealed, b->size, &err),
         "seal the update", &err);
    fl_hash((fl_bytes){n->sealed, b->size}, b->digest);
    free(values);
    free(payload);
}

static void begin_update(node *n) {
    if (n->sealed == NULL) make_update(n);
    const fl_msg m = {.type = FL_MSG_UPDATE_BEGIN, .update_begin = n->begin};
    n->step = STEP_BEGIN;
    say(n, &m);
}

static void on_want(node *n, uint64_t offset) {
    fl_msg m = {.type = FL_MSG_UPDATE_COMMIT, .update_commit = {.key = n->begin.key}};
    const uint64_t left = n->begin.size - offset;
    n->step = STEP_COMMIT;
    memcpy(m.update_commit.digest, n->begin.digest, FL_DIGEST_SIZE);
    if (left != 0) {
        n->step = STEP_CHUNK;
        const size_t size = left < FL_UPLOAD_CHUNK_MAX ? left : FL_UPLOAD_CHUNK_MAX;
        m = (fl_msg){.type = FL_MSG_UPDATE_CHUNK,
                     .update_chunk = {n->begin.key, offset, {n->sealed + offset, size}}};
    }
    say(n, &m);
}

static void end_update(node *n, fl_verdict verdict) {
    all.acked += verdict != FL_VERDICT_REFUSED;
    all.refused += verdict == FL_VERDICT_REFUSED;
    free(n->sealed);
    n->sealed = NULL;
    if (++n->base_next < n->base_count) {
        begin_update(n);
        return;
    }
    n->base_count = 0;
    n->step = STEP_SESSION;
    n->asked_ms = fl_clock_ms();
    n->rounds++;
}

static void on_message(node *n, const fl_msg *m) {
    if (m->type == FL_MSG_TASK && n->step == STEP_TASK && m->task.kind == FL_TASK_TRAIN &&
        m->task.task_id != n->task.task_id) { // else a late answer to what was asked twice
        n->task = m->task;
        n->base_count = m->task.base_count < FL_COUNT(n->bases) ? m->task.base_count : 0;
        n->base_next = 0;
        memcpy(n->bases, m->task.bases, n->base_count * sizeof(n->bases[0]));
        if (n->base_count != 0) begin_update(n);
    } else if (m->type == FL_MSG_UPDATE_WANT && n->sealed != NULL &&
               m->update_want.offset <= n->begin.size) {
        on_want(n, m->update_want.offset);
    } else if (m->type == FL_MSG_UPDATE_ACK && n->sealed != NULL) {
        end_update(n, m->update_ack.verdict);
    }
}

// ---- one look at a node

static void receive(node *n) {
    fl_link_message in;
    while (fl_link_receive(n->link, 0, &in, NULL) == FL_OK) {
        fl_msg m;
        node_peer_got got;
        size_t size = 0;
        fl_arena_rewind(&all.scratch, 0);
        if (n->step == STEP_JOIN) {
            on_join_reply(n, in.frame);
            continue;
        }
        if (node_peer_receive(&n->peer, in.frame, &all.scratch, all.plain, all.frame, &size, &m,
                              &got, NULL) != FL_OK)
            continue;
        send_frame(n, size);
        if (got == NODE_PEER_MESSAGE) on_message(n, &m);
        if (got == NODE_PEER_HINT && m.error.code == FL_CODE_SESSION) node_peer_drop(&n->peer);
    }
}

// What is due again, or for the first time.
static void ask(node *n, uint64_t now) {
    const uint64_t wait = n->step == STEP_SESSION ? 500 : AGAIN_MS;
    if (n->asked_ms != 0 && now - n->asked_ms < wait) return;
    if (n->step == STEP_JOIN)
        ask_to_join(n);
    else if (n->sealed != NULL)
        begin_update(n);
    else if (n->rounds < all.rounds)
        ask_task(n);
}

static void look(node *n) {
    fl_err err;
    receive(n);
    const uint64_t now = fl_clock_ms();
    const fl_link_status state = fl_link_state(n->link);
    if (state != n->state && state != FL_LINK_UP && n->step != STEP_JOIN) node_peer_drop(&n->peer);
    n->state = state;
    if (state != FL_LINK_UP) return;
    fl_arena_rewind(&all.scratch, 0);
    if (n->step != STEP_JOIN && !n->peer.up) {
        uint8_t random[FL_CHANNEL_RANDOM];
        size_t size;
        fl_random(random, sizeof(random));
        must(node_peer_tick(&n->peer, now, random, &all.scratch, all.frame, &size, &err), "hello",
             &err);
        send_frame(n, size);
        return;
    }
    ask(n, now);
    if (n->step == STEP_JOIN || now - n->beat_ms < BEAT_MS) return;
    const uint64_t asked = n->asked_ms;
    const fl_msg beat = {.type = FL_MSG_HEARTBEAT, .heartbeat = {.state = FL_NODE_IDLE}};
    say(n, &beat);
    n->beat_ms = now;
    n->asked_ms = asked;
}

static void print(void) {
    size_t up = 0, sessions = 0;
    for (size_t i = 0; i < all.dialled; i++) {
        up += all.nodes[i].state == FL_LINK_UP;
        sessions += all.nodes[i].state == FL_LINK_UP && all.nodes[i].peer.up;
    }
    const size_t sum = up * 7919 + sessions * 104729 + all.acked * 31 + all.joined + all.refused;
    const uint64_t now = fl_clock_ms();
    if (sum == all.last_sum || now - all.printed_ms < PRINT_MS) return;
    all.last_sum = sum;
    all.printed_ms = now;
    printf("%llu joined %zu up %zu sessions %zu acked %zu refused %zu\n", (unsigned long long)now,
           all.joined, up, sessions, all.acked, all.refused);
    fflush(stdout);
}

int main(int argc, char **argv) {
    fl_err err;
    if (argc != 6 && argc != 7) {
        fprintf(stderr, "usage: swarm URL NODES COUNT GAIN ROUNDS [NAME]\n");
        return 2;
    }
    signal(SIGTERM, on_signal);
    struct rlimit files; // a connection takes several
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &files);
    }
    must(fl_crypto_init(&err), "crypto", &err);
    must(fl_invite_parse(argv[1], &all.invite, &err), "URL", &err);
    fl_invite_derive(all.invite.secret, all.token_id, all.token_key);
    all.count = strtoul(argv[2], NULL, 10);
    all.values = (uint32_t)strtoul(argv[3], NULL, 10);
    all.gain = (uint32_t)strtoul(argv[4], NULL, 10);
    all.rounds = (uint32_t)strtoul(argv[5], NULL, 10);
    all.name = argc == 7 ? argv[6] : "swarm";
    all.nodes = calloc(all.count, sizeof(*all.nodes));
    all.plain = malloc(FL_BODY_MAX);
    all.frame = malloc(FL_FRAME_MAX);
    fl_arena_init(&all.scratch, malloc(2 * FL_CODEC_ARENA), 2 * FL_CODEC_ARENA);
    if (all.nodes == NULL || all.plain == NULL || all.frame == NULL || all.scratch.base == NULL)
        return 1;
    while (!stopping) {
        while (all.dialled < all.count && all.dialled - all.joined < JOINING_MAX) {
            dial(&all.nodes[all.dialled], all.dialled);
            all.dialled++;
        }
        for (size_t i = 0; i < all.dialled; i++) look(&all.nodes[i]);
        print();
        usleep(PASS_US);
    }
    return 0; // connections are closed with the process, as a crash would
}
