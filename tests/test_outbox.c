// Goal: what a node makes of its layers' changes reaches the coordinator or is kept, never both and
// never neither, wherever the node is killed. Method: a child makes and delivers updates until it
// is killed at a random moment; the parent plays the coordinator over what is on the disk, opens
// what is kept, and compares exact sums. With faults built in, every fallible call of making one
// fails once as well.
#include "common/checked.h"
#include "common/fault.h"
#include "node/outbox.h"
#include "proto/seal.h"
#include "tests/check.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

enum { COUNT = 3000, LAYER = 2, KILLS = 60, SEQUENCES = 4096, PAYLOAD_MAX = 16384 };

typedef struct world {
    char folder[64];
    fl_secret *update;
    uint8_t update_key[FL_KEY_SIZE];
    fl_task task;
    int64_t changed[COUNT], read[COUNT]; // of updates that were counted, or are kept whole
    bool counted[SEQUENCES];
} world;

static void remove_folder(const char *folder) {
    char command[128];
    const pid_t child = fork();
    snprintf(command, sizeof(command), "%s", folder);
    if (child == 0) {
        execlp("rm", "rm", "-rf", command, (char *)NULL);
        _exit(1);
    }
    int status;
    waitpid(child, &status, 0);
}

static world *world_new(void) {
    world *w = calloc(1, sizeof(*w));
    fl_err err;
    T_NEED(w != NULL, "memory");
    snprintf(w->folder, sizeof(w->folder), "/tmp/fleetune-outbox-XXXXXX");
    T_NEED(mkdtemp(w->folder) != NULL, "folder");
    T_OK(fl_crypto_init(&err), err);
    T_OK(fl_dh_new(&w->update, w->update_key, &err), err);
    w->task = (fl_task){.encoding = 2, .encoding_most = FL_UPDATE_SPARSE4, .keep_ppm = 50000,
                        .round = 1, .task_id = 1};
    return w;
}

static void world_free(world *w) {
    remove_folder(w->folder);
    fl_secret_close(w->update);
    free(w);
}

// The change of the update with this sequence: anybody can make it again.
static void change_of(uint64_t sequence, float *delta) {
    t_seed = 1000 + sequence;
    for (uint32_t i = 0; i < COUNT; i++) {
        const float x = t_randf();
        delta[i] = 0.05f * x * x * x;
    }
}

static node_outbox outbox_of(world *w, node_state *s) {
    static const uint32_t counts[] = {COUNT};
    const node_outbox_terms terms = {.work_s = 10, .left_s = 1000, .now_s = 1000000};
    return (node_outbox){s, &w->task, w->update_key,
                         node_outbox_choose(s, &w->task, &terms, counts, 1)};
}

static fl_status put(world *w, node_state *s, fl_update_begin *ret, fl_err *err) {
    static float delta[COUNT];
    node_outbox o = outbox_of(w, s);
    change_of((uint64_t)s->updates_made + 1, delta);
    return node_outbox_put(&o, LAYER, 7, delta, COUNT, 100, ret, err);
}

// A third of the updates is refused for coming late.
static node_residual_fate fate_of(uint64_t sequence) {
    return sequence % 3 == 0 ? NODE_RESIDUAL_RETURN : NODE_RESIDUAL_KEEP;
}

// The coordinator: opens a spooled update with its key and counts it, once.
static void receive(world *w, const node_state *s, const fl_update_begin *b,
                    const uint8_t *sealed) {
    static uint8_t plain[PAYLOAD_MAX];
    static int64_t values[COUNT];
    static float delta[COUNT];
    fl_bytes payload;
    fl_update u;
    fl_err err;
    T_NEED(b->size <= sizeof(plain) && b->key.sequence < SEQUENCES, "size");
    if (w->counted[b->key.sequence]) return; // DUPLICATE
    w->counted[b->key.sequence] = true;
    fl_seal_label label = {.round = b->round, .key = b->key, .tokens = b->tokens};
    memcpy(label.node_key, s->identity_key, FL_KEY_SIZE);
    T_OK(fl_unseal_update(&label, (fl_bytes){sealed, b->size}, w->update, w->update_key, plain,
                          sizeof(plain), &payload, &err),
         err);
    T_OK(fl_update_open(payload, &u, &err), err);
    fl_update_fixed(&u, 0, COUNT, values);
    change_of(b->key.sequence, delta);
    const bool whole = fate_of(b->key.sequence) == NODE_RESIDUAL_RETURN;
    for (uint32_t i = 0; i < COUNT; i++) {
        w->changed[i] += llrint((double)delta[i] * 0x1p32);
        if (!whole) w->read[i] += values[i];
    }
}

static void kept(const node_state *s, int64_t *values) {
    uint8_t *bytes = NULL;
    size_t size;
    bool whole;
    node_residual r;
    fl_err err;
    memset(values, 0, COUNT * sizeof(*values));
    const fl_status st = node_state_rest(s, LAYER, &bytes, &size, &whole, &err);
    if (st == FL_ENOENT) return;
    T_OK(st, err);
    T_OK(node_residual_read(bytes, size, LAYER, COUNT, whole, s->identity, s->run_id, &r, values,
                            &err),
         err);
    free(bytes);
}

// After a restart: what is in the spool is sent, answered and ended; then the sums must close.
static void settle_and_check(world *w, node_state *s, const char *when, unsigned n) {
    static node_spooled list[FL_LAYERS_MAX];
    static int64_t left[COUNT];
    static uint8_t sealed[PAYLOAD_MAX];
    size_t count;
    fl_err err;
    T_OK(node_state_spool_list(s, list, &count, &err), err);
    for (size_t i = 0; i < count; i++) {
        const fl_update_begin *b = &list[i].begin;
        T_NEED(b->size <= sizeof(sealed), "size");
        T_OK(node_state_spool_read(s, b->key.sequence, 0, (uint32_t)b->size, sealed, &err), err);
        receive(w, s, b, sealed);
        node_state_spool_end(s, &list[i].begin.key, fate_of(list[i].begin.key.sequence));
    }
    kept(s, left);
    for (uint32_t i = 0; i < COUNT; i++) {
        if (w->read[i] + left[i] == w->changed[i]) continue;
        T_CHECK(false, "%s %u: value %u: read %lld + kept %lld, changed %lld", when, n, i,
                (long long)w->read[i], (long long)left[i], (long long)w->changed[i]);
        break;
    }
}

// What travels to the coordinator: a file that survives the child. It is written before the node
// acts on the answer, as an acknowledgement is.
typedef struct record {
    fl_update_begin begin;
    uint8_t sealed[PAYLOAD_MAX];
} record;

static void run_child(world *w, const char *wire) {
    static record r;
    node_state s = {0};
    const int fd = open(wire, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0 || node_state_open(w->folder, &s, NULL) != FL_OK) _exit(2);
    for (;;) {
        if (put(w, &s, &r.begin, NULL) != FL_OK) _exit(3);
        if (node_state_spool_read(&s, r.begin.key.sequence, 0, (uint32_t)r.begin.size, r.sealed,
                                  NULL) != FL_OK)
            _exit(4);
        if (write(fd, &r, sizeof(r)) != (ssize_t)sizeof(r)) _exit(5);
        node_state_spool_end(&s, &r.begin.key, fate_of(r.begin.key.sequence));
    }
}

static void receive_all(world *w, const node_state *s, const char *wire) {
    static record r;
    FILE *f = fopen(wire, "rb");
    T_NEED(f != NULL, "the child sent nothing");
    while (fread(&r, sizeof(r), 1, f) == 1) receive(w, s, &r.begin, r.sealed); // not a cut last one
    fclose(f);
    unlink(wire);
}

static void test_killed_anywhere(void) {
    world *w = world_new();
    char wire[96];
    fl_err err;
    snprintf(wire, sizeof(wire), "%s.wire", w->folder);
    for (unsigned n = 0; n < KILLS; n++) {
        const uint64_t seed = t_seed;
        const struct timespec wait = {.tv_nsec = 10000000 + (long)(t_rand() % 30000000)};
        const pid_t child = fork();
        if (child == 0) run_child(w, wire);
        T_NEED(child > 0, "fork");
        nanosleep(&wait, NULL);
        kill(child, SIGKILL);
        int status = 0;
        waitpid(child, &status, 0);
        T_CHECK(WIFSIGNALED(status), "the child ended by itself: %d", WEXITSTATUS(status));
        node_state s = {0};
        T_OK(node_state_open(w->folder, &s, &err), err);
        if (access(wire, F_OK) == 0) receive_all(w, &s, wire);
        settle_and_check(w, &s, "kill", n);
        node_state_close(&s);
        t_seed = seed + 1;
    }
    unsigned made = 0;
    for (unsigned i = 0; i < SEQUENCES; i++) made += w->counted[i];
    T_CHECK(made > KILLS / 4, "%u updates in %d lives", made, KILLS);
    world_free(w);
}

// An update whose content was refused takes what was kept of the layer with it; one of another
// layer is left alone.
static void test_refused_for_good(void) {
    world *w = world_new();
    static int64_t left[COUNT];
    node_state s = {0};
    fl_update_begin b;
    fl_err err;
    T_OK(node_state_open(w->folder, &s, &err), err);
    for (int i = 0; i < 2; i++) {
        T_OK(put(w, &s, &b, &err), err);
        node_state_spool_end(&s, &b.key, NODE_RESIDUAL_KEEP);
    }
    fl_update_key other = b.key;
    other.layer = LAYER + 1;
    other.sequence = b.key.sequence + 1;
    node_state_spool_end(&s, &other, NODE_RESIDUAL_DROP);
    kept(&s, left);
    int64_t all = 0;
    for (uint32_t i = 0; i < COUNT; i++) all += llabs(left[i]);
    T_CHECK(all > 0, "another layer's refusal took this one's");
    T_OK(put(w, &s, &b, &err), err);
    node_state_spool_end(&s, &b.key, NODE_RESIDUAL_DROP);
    kept(&s, left);
    for (uint32_t i = 0; i < COUNT; i++) T_EQ(left[i], 0);
    static const uint8_t run[FL_ID_SIZE] = {1}, model[FL_DIGEST_SIZE] = {2};
    T_OK(put(w, &s, &b, &err), err);
    node_state_spool_end(&s, &b.key, NODE_RESIDUAL_KEEP);
    T_OK(node_state_begin_run(&s, run, model, &err), err); // another run: nothing of the old one's
    uint8_t *bytes;
    size_t size;
    bool whole;
    T_EQ(node_state_rest(&s, LAYER, &bytes, &size, &whole, NULL), FL_ENOENT);
    node_state_close(&s);
    world_free(w);
}

// What is damaged on the disk is not used, and does not stop the node.
static void test_damaged(void) {
    world *w = world_new();
    char path[NODE_PATH_MAX];
    node_state s = {0};
    fl_update_begin b;
    fl_err err;
    T_OK(node_state_open(w->folder, &s, &err), err);
    T_OK(put(w, &s, &b, &err), err);
    node_state_spool_end(&s, &b.key, NODE_RESIDUAL_KEEP);
    snprintf(path, sizeof(path), "%s/kept/%03u", w->folder, LAYER);
    uint8_t *data = NULL;
    size_t size = 0;
    T_OK(fl_file_read(path, 1 << 20, &data, &size, &err), err);
    for (size_t at = 0; at < size; at += size / 97 + 1) {
        data[at] ^= 0x10;
        T_OK(fl_file_replace(path, (fl_bytes){data, size}, &err), err);
        T_OK(put(w, &s, &b, &err), err);
        node_state_spool_end(&s, &b.key, NODE_RESIDUAL_DROP);
        data[at] ^= 0x10;
        T_OK(fl_file_replace(path, (fl_bytes){data, at}, &err), err);
        T_OK(put(w, &s, &b, &err), err);
        node_state_spool_end(&s, &b.key, NODE_RESIDUAL_DROP);
    }
    free(data);
    node_state_close(&s);
    world_free(w);
}

// Every fallible call fails once: then there is no update, or a whole one, and the sums close.
static void test_every_fault(void) {
#ifdef FL_FAULTS
    world *w = world_new();
    node_state s = {0};
    fl_update_begin b;
    fl_err err;
    T_OK(node_state_open(w->folder, &s, &err), err);
    for (unsigned n = 1, fired = 1; fired; n++) {
        fl_fault_arm(n);
        const fl_status st = put(w, &s, &b, NULL);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK(fired || st == FL_OK, "call %u: %s", n, fl_status_name(st));
        settle_and_check(w, &s, "fault", n);
    }
    node_state_close(&s);
    world_free(w);
#else
    T_SKIP("faults are not built in");
#endif
}

T_MAIN({"killed_anywhere", test_killed_anywhere}, {"refused_for_good", test_refused_for_good},
       {"damaged", test_damaged}, {"every_fault", test_every_fault})
