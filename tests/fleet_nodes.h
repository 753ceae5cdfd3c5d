// fleet_nodes.h: a coordinator process with its commands, and nodes made from proto/ alone, for one
// test or benchmark: bodies are here because the harness counts failures in the file that
// includes it. Before it may be defined: FLEET_LAYERS, FLEET_COUNT values of a layer, FLEET_SENT
// updates that are remembered.
#ifndef FL_TESTS_FLEET_NODES_H
#define FL_TESTS_FLEET_NODES_H

#include "common/clock.h"
#include "common/crypto.h"
#include "common/file.h"
#include "coordinator/aggregate.h"
#include "coordinator/store.h"
#include "proto/channel.h"
#include "proto/invite.h"
#include "proto/link.h"
#include "proto/seal.h"
#include "proto/update.h"
#include "tests/check.h"

#include <arpa/inet.h>
#include <ftw.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#ifndef FLEET_PATIENCE_MS
#define FLEET_PATIENCE_MS 30000
#endif
#ifndef FLEET_LAYERS
#define FLEET_LAYERS 6
#define FLEET_COUNT  300
#define FLEET_SENT   4096
#endif

enum {
    LAYERS = FLEET_LAYERS,
    COUNT = FLEET_COUNT,
    NODES = 3,
    SENT_MAX = FLEET_SENT,
    PATIENCE_MS = FLEET_PATIENCE_MS,
    PARCEL = 4 * COUNT + 4096,
};

static char root[200], dir[256], model[256], program[512];
static uint16_t port;
static pid_t coordinator;

typedef struct sent { // what a node remembers of an update
    int64_t node_id;
    bool unanswered; // not acknowledged yet: may be in the ledger, or not
    fl_update_key key;
    uint64_t tokens;
    int64_t values[COUNT];
} sent;
static sent memory[SENT_MAX];
static size_t remembered;

// ---- the program

static int remove_one(const char *path, const struct stat *s, int type, struct FTW *ftw) {
    (void)s, (void)type, (void)ftw;
    return remove(path);
}

static void clean_up(void) {
    if (coordinator > 0) kill(coordinator, SIGKILL);
    nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

// Runs a command of the program; its standard output in out (may be NULL). Returns its status.
static int command(char *out, size_t size, const char *const *args) {
    int fds[2];
    T_NEED(pipe(fds) == 0, "pipe");
    const pid_t pid = fork();
    if (pid == 0) {
        dup2(fds[1], STDOUT_FILENO);
        close(fds[0]);
        close(fds[1]);
        execv(program, (char *const *)(uintptr_t)args);
        _exit(127);
    }
    close(fds[1]);
    size_t got = 0;
    char rest[256];
    for (;;) {
        const bool fits = out != NULL && got + 1 < size;
        const ssize_t n =
            fits ? read(fds[0], out + got, size - 1 - got) : read(fds[0], rest, sizeof(rest));
        if (n <= 0) break;
        if (fits) got += (size_t)n;
    }
    if (out != NULL) out[got] = '\0';
    close(fds[0]);
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

#define COMMAND(out, size, ...)                                                                    \
    command((out), (size), (const char *const[]){program, __VA_ARGS__, NULL})

static void start(void) {
    coordinator = fork();
    if (coordinator == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); // a test that is killed leaves nothing running
        FILE *log = freopen("/dev/null", "w", stderr);
        if (log == NULL) _exit(126);
        execl(program, program, "run", dir, (char *)NULL);
        _exit(127);
    }
}

static int stop(int number) {
    int status = 0;
    kill(coordinator, number);
    waitpid(coordinator, &status, 0);
    coordinator = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static uint16_t free_port(void) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof(a);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    T_NEED(fd >= 0 && bind(fd, (struct sockaddr *)&a, size) == 0 &&
               getsockname(fd, (struct sockaddr *)&a, &size) == 0,
           "a free port");
    close(fd);
    return ntohs(a.sin_port);
}

// The smallest file that says how many layers it has, and some bytes to fetch.
static void write_model(void) {
    static uint8_t bytes[700000];
    size_t n = 0;
    const char *arch = "general.architecture", *blocks = "llama.block_count";
    memcpy(bytes, "GGUF\3\0\0\0", 8);
    bytes[16] = 2, n = 24;
    bytes[n] = 20, n += 8;
    memcpy(bytes + n, arch, 20), n += 20;
    bytes[n] = 8, n += 4;
    bytes[n] = 5, n += 8;
    memcpy(bytes + n, "llama", 5), n += 5;
    bytes[n] = 17, n += 8;
    memcpy(bytes + n, blocks, 17), n += 17;
    bytes[n] = 4, n += 4;
    bytes[n] = LAYERS;
    for (size_t i = n + 4; i < sizeof(bytes); i++) bytes[i] = (uint8_t)(i * 7 >> 3);
    T_NEED(fl_file_replace(model, (fl_bytes){bytes, sizeof(bytes)}, NULL) == FL_OK, "model");
}

// A new folder, ready to run. rounds: as the option.
static void set_up(const char *updates, const char *windows) {
    static unsigned number;
    char listen_at[64];
    if (root[0] == '\0') {
        const char *base = getenv("TMPDIR");
        snprintf(root, sizeof(root), "%s/test_coordinator.XXXXXX", base != NULL ? base : "/tmp");
        T_NEED(mkdtemp(root) != NULL, "a folder to work in");
        atexit(clean_up);
        T_NEED(fl_crypto_init(NULL) == FL_OK, "crypto");
        const ssize_t size = readlink("/proc/self/exe", program, sizeof(program) - 64);
        T_NEED(size > 0, "own path");
        program[size] = '\0';
        snprintf(strrchr(program, '/'), 64, "/fleetune-coordinator");
        snprintf(model, sizeof(model), "%s/model.gguf", root);
        write_model();
    }
    remembered = 0;
    snprintf(dir, sizeof(dir), "%s/%u", root, number++);
    port = free_port();
    snprintf(listen_at, sizeof(listen_at), "tcp://127.0.0.1:%u", port);
    T_NEED(COMMAND(NULL, 0, "init", dir, "--model", model, "--listen", listen_at, "--exits", "2",
                   "--updates-per-round", updates, "--windows", windows, "--retry", "50",
                   "--rule", "mean", "--share-cap", "1", "--frames-per-second", "100000") == 0,
           "init");
}

// ---- a node

typedef struct node {
    fl_secret *identity, *curve;
    uint8_t identity_key[FL_KEY_SIZE], curve_key[FL_KEY_SIZE], coordinator_curve[FL_KEY_SIZE],
        coordinator_key[FL_KEY_SIZE];
    fl_link *link;
    fl_channel *channel;
    uint64_t sequence;
    uint8_t *arena_block, *frame, *plain;
    fl_arena arena;
    char name[24];
} node;

static void node_open(node *n, const char *name) {
    *n = (node){0};
    fl_err err;
    snprintf(n->name, sizeof(n->name), "%s", name);
    T_OK(fl_sign_new(&n->identity, n->identity_key, &err), err);
    T_OK(fl_dh_new(&n->curve, n->curve_key, &err), err);
    n->arena_block = malloc(2 * FL_CODEC_ARENA);
    n->frame = malloc(FL_FRAME_MAX);
    n->plain = malloc(FL_BODY_MAX);
    fl_arena_init(&n->arena, n->arena_block, 2 * FL_CODEC_ARENA);
}

static void node_close(node *n) {
    fl_link_close(n->link);
    fl_channel_close(n->channel);
    fl_secret_close(n->identity);
    fl_secret_close(n->curve);
    free(n->arena_block);
    free(n->frame);
    free(n->plain);
}

static void node_dial(node *n) {
    char endpoint[64];
    fl_err err;
    snprintf(endpoint, sizeof(endpoint), "tcp://127.0.0.1:%u", port);
    fl_link_close(n->link);
    const fl_link_opts opts = {.endpoint = endpoint,
                               .curve_secret = fl_secret_view(n->curve).data,
                               .curve_key = n->curve_key,
                               .coordinator_key = n->coordinator_curve,
                               .reconnect_max_ms = 200};
    T_OK(fl_link_dial(&opts, &n->link, &err), err);
}

static void send_clear(node *n, const fl_msg *m) {
    fl_bytes body;
    fl_err err;
    size_t size;
    const size_t mark = n->arena.used;
    T_OK(fl_msg_encode(m, &n->arena, &body, &err), err);
    const fl_frame f = {.type = m->type, .body = body};
    T_OK(fl_frame_encode(&f, n->frame, FL_FRAME_MAX, &size, &err), err);
    (void)!fl_link_send(n->link, 0, (fl_bytes){n->frame, size}, NULL);
    fl_arena_rewind(&n->arena, mark);
}

// A test that ends its coordinator may look after it here, and dial again.
static void (*look_after)(node *n);

// The next message within ms, of any kind; false when none came. *ret lives until the next call.
static bool receive(node *n, uint32_t ms, fl_msg *ret) {
    fl_link_message m;
    fl_frame f;
    fl_bytes body;
    if (look_after != NULL) look_after(n);
    if (fl_link_receive(n->link, ms, &m, NULL) != FL_OK) return false;
    if (fl_frame_decode(m.frame, FL_FROM_COORDINATOR, &f, NULL) != FL_OK) return false;
    body = f.body;
    if (f.session != 0 &&
        (n->channel == NULL ||
         fl_channel_unseal(n->channel, &f, n->plain, FL_BODY_MAX, &body, NULL) != FL_OK))
        return false;
    fl_arena_rewind(&n->arena, 0);
    return fl_msg_decode(f.type, body, &n->arena, ret, NULL) == FL_OK;
}

static fl_join_reply node_join(node *n, const char *url) {
    fl_invite invite;
    fl_err err;
    fl_msg m = {.type = FL_MSG_JOIN_REQUEST}, reply;
    fl_join_request *q = &m.join_request;
    uint8_t token_key[FL_KEY_SIZE];
    T_OK(fl_invite_parse(url, &invite, &err), err);
    memcpy(n->coordinator_curve, invite.curve_key, FL_KEY_SIZE);
    if (n->link == NULL) node_dial(n);
    fl_invite_derive(invite.secret, q->token_id, token_key);
    memcpy(q->identity_key, n->identity_key, FL_KEY_SIZE);
    memcpy(q->curve_key, n->curve_key, FL_KEY_SIZE);
    memcpy(q->name, n->name, sizeof(n->name));
    snprintf(q->software, sizeof(q->software), "test");
    q->protocol = FL_PROTOCOL;
    fl_random(q->nonce, sizeof(q->nonce));
    fl_invite_prove(token_key, invite.curve_key, q);
    for (uint64_t end = fl_clock_ms() + PATIENCE_MS; fl_clock_ms() < end;) {
        send_clear(n, &m);
        if (!receive(n, 300, &reply) || reply.type != FL_MSG_JOIN_REPLY) continue;
        T_CHECK(fl_invite_check_reply(token_key, q, &reply.join_reply), "the reply is proved");
        memcpy(n->coordinator_key, reply.join_reply.identity_key, FL_KEY_SIZE);
        return reply.join_reply;
    }
    T_NEED(false, "no answer to join");
    return (fl_join_reply){0};
}

// Shakes hands; false when no session came within ms.
static bool node_session(node *n, uint32_t ms) {
    const fl_channel_opts opts = {.role = FL_CHANNEL_NODE,
                                  .identity = n->identity,
                                  .identity_key = n->identity_key,
                                  .peer_key = n->coordinator_key};
    fl_err err;
    uint8_t random[FL_CHANNEL_RANDOM];
    if (n->channel == NULL) T_OK(fl_channel_open(&opts, &n->channel, &err), err);
    for (uint64_t end = fl_clock_ms() + ms; fl_clock_ms() < end;) {
        fl_msg m = {.type = FL_MSG_HELLO}, reply, finish = {.type = FL_MSG_HELLO_FINISH};
        fl_random(random, sizeof(random));
        T_OK(fl_channel_hello(n->channel, random, &m.hello, &err), err);
        snprintf(m.hello.software, sizeof(m.hello.software), "test");
        send_clear(n, &m);
        for (int tries = 0; tries < 4; tries++) {
            if (!receive(n, 50, &reply) || reply.type != FL_MSG_HELLO_REPLY) continue;
            if (fl_channel_on_reply(n->channel, &reply.hello_reply, &finish.hello_finish, NULL) !=
                FL_OK)
                continue;
            send_clear(n, &finish);
            return true;
        }
    }
    return false;
}

static void send_sealed(node *n, const fl_msg *m) {
    fl_bytes body;
    fl_err err;
    size_t size;
    const size_t mark = n->arena.used;
    T_OK(fl_msg_encode(m, &n->arena, &body, &err), err);
    if (fl_channel_seal(n->channel, m->type, body, n->frame, FL_FRAME_MAX, &size, NULL) == FL_OK)
        (void)!fl_link_send(n->link, 0, (fl_bytes){n->frame, size}, NULL);
    fl_arena_rewind(&n->arena, mark);
}

// Asks until an answer of one of two types comes, through restarts of the other side. Only for
// messages without pointers.
static fl_msg ask(node *n, const fl_msg *m, fl_msg_type a, fl_msg_type b) {
    fl_msg reply;
    for (uint64_t end = fl_clock_ms() + PATIENCE_MS; fl_clock_ms() < end;) {
        if ((n->channel == NULL || !fl_channel_live(n->channel)) && !node_session(n, 2000))
            continue;
        send_sealed(n, m);
        for (int tries = 0; tries < 5 && fl_channel_live(n->channel); tries++) {
            if (!receive(n, 80, &reply)) continue;
            if (reply.type == a || reply.type == b) return reply;
            if (reply.type == FL_MSG_ERROR && reply.error.code == FL_CODE_SESSION) {
                fl_channel_drop(n->channel);
                break;
            }
            if (reply.type == FL_MSG_ERROR) return reply;
        }
        if (fl_link_state(n->link) != FL_LINK_UP) fl_channel_drop(n->channel);
    }
    T_NEED(false, "no answer to %s", fl_msg_name(m->type));
    return (fl_msg){.type = FL_MSG_ERROR};
}

static fl_msg request_task(node *n) {
    const fl_msg m = {.type = FL_MSG_TASK_REQUEST, .task_request.capability.window_max = 99};
    return ask(n, &m, FL_MSG_TASK, FL_MSG_WAIT);
}

// ---- updates

typedef struct parcel {
    fl_update_begin begin;
    uint8_t payload[PARCEL], sealed[PARCEL];
    size_t payload_size;
    int64_t values[COUNT];
} parcel;

static void pack(node *n, const fl_task *t, uint32_t layer, uint64_t base, parcel *p) {
    float values[COUNT];
    fl_update u;
    fl_err err;
    for (int i = 0; i < COUNT; i++) values[i] = 0.1f * t_randf();
    const fl_update_info info = {.encoding = FL_UPDATE_INT16,
                                 .layer = layer,
                                 .count = COUNT,
                                 .base_version = base,
                                 .tokens = 100 + t_rand() % 1000};
    p->payload_size = fl_update_size(COUNT, FL_UPDATE_INT16);
    T_OK(fl_update_encode(&info, values, 1, p->payload, p->payload_size, NULL, &err), err);
    T_OK(fl_update_open((fl_bytes){p->payload, p->payload_size}, &u, &err), err);
    fl_update_fixed(&u, 0, COUNT, p->values);
    p->begin =
        (fl_update_begin){.key = {.layer = layer, .base_version = base, .sequence = ++n->sequence},
                          .round = t->round,
                          .task_id = t->task_id,
                          .tokens = info.tokens};
    memcpy(p->begin.run_id, t->run_id, FL_ID_SIZE);
}

static void seal(node *n, parcel *p) {
    fl_seal_label label = {.round = p->begin.round, .key = p->begin.key, .tokens = p->begin.tokens};
    uint8_t random[FL_KEY_SIZE];
    fl_err err;
    memcpy(label.run_id, p->begin.run_id, FL_ID_SIZE);
    memcpy(label.node_key, n->identity_key, FL_KEY_SIZE);
    fl_random(random, sizeof(random));
    while (!fl_channel_live(n->channel)) T_NEED(node_session(n, PATIENCE_MS), "session");
    p->begin.size = p->payload_size + FL_SEAL_EXTRA;
    T_OK(fl_seal_update(&label, (fl_bytes){p->payload, p->payload_size}, n->identity,
                        fl_channel_update_key(n->channel), random, p->sealed, (size_t)p->begin.size,
                        &err),
         err);
    fl_hash((fl_bytes){p->sealed, (size_t)p->begin.size}, p->begin.digest);
}

// The whole conversation; goes on through restarts. The acknowledgement.
static fl_update_ack deliver(node *n, const parcel *p) {
    for (int tries = 0; tries < 50; tries++) {
        const fl_msg begin = {.type = FL_MSG_UPDATE_BEGIN, .update_begin = p->begin};
        fl_msg r = ask(n, &begin, FL_MSG_UPDATE_WANT, FL_MSG_UPDATE_ACK);
        if (r.type == FL_MSG_UPDATE_ACK) return r.update_ack;
        if (r.type != FL_MSG_UPDATE_WANT) continue;
        while (r.type == FL_MSG_UPDATE_WANT && r.update_want.offset < p->begin.size) {
            const uint64_t at = r.update_want.offset, left = p->begin.size - at;
            const size_t size = left < FL_UPLOAD_CHUNK_MAX ? (size_t)left : FL_UPLOAD_CHUNK_MAX;
            const fl_msg chunk = {.type = FL_MSG_UPDATE_CHUNK,
                                  .update_chunk = {.key = p->begin.key,
                                                   .offset = at,
                                                   .data = {p->sealed + at, size}}};
            r = ask(n, &chunk, FL_MSG_UPDATE_WANT, FL_MSG_UPDATE_ACK);
            if (r.type == FL_MSG_UPDATE_WANT && r.update_want.offset <= at) break;
        }
        if (r.type != FL_MSG_UPDATE_WANT || r.update_want.offset != p->begin.size) continue;
        fl_msg commit = {.type = FL_MSG_UPDATE_COMMIT, .update_commit = {.key = p->begin.key}};
        memcpy(commit.update_commit.digest, p->begin.digest, FL_DIGEST_SIZE);
        r = ask(n, &commit, FL_MSG_UPDATE_ACK, FL_MSG_UPDATE_WANT);
        if (r.type == FL_MSG_UPDATE_ACK) return r.update_ack;
    }
    T_NEED(false, "the update was never answered");
    return (fl_update_ack){0};
}

static void remember(int64_t node_id, const parcel *p) {
    T_NEED(remembered < SENT_MAX, "room");
    sent *s = &memory[remembered++];
    *s = (sent){.node_id = node_id, .key = p->begin.key, .tokens = p->begin.tokens};
    memcpy(s->values, p->values, sizeof(s->values));
}

// One task, from request to the last acknowledgement; false when there was none to be had.
static bool work(node *n, int64_t id) {
    fl_msg m = request_task(n);
    if (m.type != FL_MSG_TASK || m.task.kind != FL_TASK_TRAIN) return false;
    fl_layer_version bases[LAYERS];
    fl_task t = m.task;
    memcpy(bases, t.bases, t.base_count * sizeof(bases[0]));
    for (size_t i = 0; i < t.base_count; i++) {
        static parcel p;
        pack(n, &t, bases[i].layer, bases[i].version, &p);
        seal(n, &p);
        const fl_update_ack ack = deliver(n, &p);
        if (ack.verdict == FL_VERDICT_ACCEPTED || ack.verdict == FL_VERDICT_DUPLICATE)
            remember(id, &p);
        else
            T_CHECK(ack.code == FL_CODE_NOT_ASSIGNED || ack.code == FL_CODE_LATE, "refused: %s",
                    ack.text);
    }
    return true;
}

static void token(char *url, size_t size, const char *uses, bool auto_approve) {
    const int status = auto_approve
                           ? COMMAND(url, size, "token", dir, "--uses", uses, "--auto-approve")
                           : COMMAND(url, size, "token", dir, "--uses", uses);
    T_EQ(status, 0);
    url[strcspn(url, "\n")] = '\0';
}

#endif
