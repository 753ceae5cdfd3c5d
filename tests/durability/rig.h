// rig.h: a coordinator whose disk can be made to fail (disk.h), clients that see it through every
// restart, and the judge of what is left. For one test binary, like fleet.h, which it builds on.
#ifndef TESTS_DURABILITY_RIG_H
#define TESTS_DURABILITY_RIG_H

#define FLEET_PATIENCE_MS 150000 // the machine may hold a test for long; no point may fail for that

#include "tests/durability/disk.h"
#include "tests/fleet.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

enum { SERVING_MS = 2000, LOG_MAX = 16384, HELD_MS = 250 };

static node nodes[NODES];
static unsigned generation, dialled[NODES]; // restarts, and those that each node has noticed
static const char *plan;                    // of the first start; NULL: none
static int first_end = -1;                  // how the process with the plan ended; -1: not yet
static uint64_t slowest_ms;                 // restart until it serves
static char preload[512], said_path[300], count_path[300], record_path[300];
static bool forgetful; // the clients lost their updates: another one may be in the ledger
static coord_opt optimiser = {.kind = COORD_FEDAVG, .rate = 1.0};

// ---- files

static void copy_file(const char *from, const char *to) {
    uint8_t *data = NULL;
    size_t size = 0;
    fl_err err;
    T_OK(fl_file_read(from, FL_MIB(64), &data, &size, &err), err);
    const int fd = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    T_NEED(fd >= 0 && write(fd, data, size) == (ssize_t)size, "copy %s", from);
    close(fd);
    free(data);
}

// Objects never change, so their copies are links.
static void copy_tree(const char *from, const char *to, bool link_files) {
    char a[COORD_PATH_MAX], b[COORD_PATH_MAX];
    DIR *d = opendir(from);
    T_NEED(d != NULL && mkdir(to, 0700) == 0, "copy %s to %s", from, to);
    for (const struct dirent *e; (e = readdir(d)) != NULL;) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
        snprintf(a, sizeof(a), "%s/%s", from, e->d_name);
        snprintf(b, sizeof(b), "%s/%s", to, e->d_name);
        if (e->d_type == DT_DIR)
            copy_tree(a, b, strcmp(e->d_name, "objects") == 0);
        else if (link_files)
            T_NEED(link(a, b) == 0, "link %s", a);
        else
            copy_file(a, b);
    }
    closedir(d);
}

static void remove_tree(const char *path) {
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

// ---- the program under its plan

static void set_disk(const char *the_plan, const char *below) {
    setenv(DISK_ROOT, below, 1);
    setenv("LD_PRELOAD", preload, 1);
    if (the_plan != NULL) setenv(DISK_PLAN, the_plan, 1);
    if (count_path[0] != '\0') setenv(DISK_COUNT, count_path, 1);
    if (record_path[0] != '\0') setenv(DISK_LOG, record_path, 1);
}

static void clear_disk(void) {
    static const char *const names[] = {DISK_ROOT, DISK_PLAN, DISK_COUNT, DISK_LOG, "LD_PRELOAD"};
    for (size_t i = 0; i < FL_COUNT(names); i++) unsetenv(names[i]);
}

// What it said since its start, at most LOG_MAX - 1 bytes.
static const char *said(void) {
    static char text[LOG_MAX];
    const int fd = open(said_path, O_RDONLY | O_CLOEXEC);
    const ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0) close(fd);
    text[n < 0 ? 0 : n] = '\0';
    return text;
}

// An end that was not asked for must be the plan's SIGKILL, or status 1 with a reason.
static void check_end(int status, const char *the_plan) {
    const bool killed = strncmp(the_plan, "kill", 4) == 0 || strncmp(the_plan, "torn", 4) == 0;
    if (killed) {
        T_CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %x: %s", status,
                said());
        return;
    }
    T_CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 1, "status %x: %s", status, said());
    T_CHECK(strstr(said(), "fleetune-coordinator: ") != NULL, "it ended without a reason: %s",
            said());
}

// Waits until it listens; false when it ended instead, with *ret_status. *ret_ms: how long that
// took, without the time for which this very process did not run, because all were held.
static bool serving(int *ret_status, uint64_t *ret_ms) {
    uint64_t last = fl_clock_ms();
    *ret_ms = 0;
    for (const uint64_t end = last + PATIENCE_MS; fl_clock_ms() < end;) {
        const uint64_t passed = fl_clock_ms() - last;
        last += passed;
        if (passed < HELD_MS) *ret_ms += passed;
        if (strstr(said(), "coordinator.started") != NULL) return true;
        if (waitpid(coordinator, ret_status, WNOHANG) == coordinator) {
            coordinator = 0;
            return false;
        }
        usleep(1500);
    }
    T_NEED(false, "neither serving nor ended: %s", said());
    return false;
}

static void spawn(const char *the_plan) {
    const int fd = open(said_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    T_NEED(fd >= 0, "%s", said_path); // empty before it starts: what it said before is not read
    if (the_plan != NULL || record_path[0] != '\0') set_disk(the_plan, dir);
    coordinator = fork();
    if (coordinator == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (dup2(fd, STDERR_FILENO) < 0) _exit(126);
        execl(program, program, "run", dir, (char *)NULL);
        _exit(127);
    }
    close(fd);
    clear_disk();
}

// Starts it without a plan; it must serve, soon.
static void start_whole(void) {
    uint64_t took;
    int status = 0;
    spawn(NULL);
    T_NEED(serving(&status, &took), "it does not start again: status %x: %s", status, said());
    if (took > slowest_ms) slowest_ms = took;
    generation++;
}

// A full disk is still full for the first who comes back: it ends with a reason, or serves.
static void start_while_full(void) {
    uint64_t took;
    int status = 0;
    spawn("full:1");
    if (serving(&status, &took))
        stop(SIGKILL);
    else
        check_end(status, "full");
}

static void after_end(int status) {
    coordinator = 0;
    T_NEED(plan != NULL && first_end == -1, "it ended without a plan: %x: %s", status, said());
    check_end(status, plan);
    first_end = status;
    if (strncmp(plan, "full", 4) == 0) start_while_full();
    start_whole();
}

static void start_planned(void) {
    uint64_t took;
    int status = 0;
    spawn(plan);
    if (!serving(&status, &took)) after_end(status);
}

static void tend(node *n) {
    int status;
    const size_t i = (size_t)(n - nodes);
    if (coordinator > 0 && waitpid(coordinator, &status, WNOHANG) == coordinator) after_end(status);
    if (i >= NODES || dialled[i] == generation) return;
    dialled[i] = generation;
    if (n->link != NULL) node_dial(n);
    if (n->channel != NULL) fl_channel_drop(n->channel);
}

// Told to stop; a plan may still strike on the way out.
static void stop_asked(void) {
    int status = 0;
    kill(coordinator, SIGTERM);
    waitpid(coordinator, &status, 0);
    coordinator = 0;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
    T_NEED(plan != NULL && first_end == -1, "told to stop it ends with %x: %s", status, said());
    check_end(status, plan);
    first_end = status;
}

// ---- clients

static void note_ack(size_t number) {
    const disk_record r = {.op = DISK_ACK, .offset = number};
    if (record_path[0] == '\0') return;
    const int fd = open(record_path, O_WRONLY | O_APPEND | O_CLOEXEC);
    T_NEED(fd >= 0 && write(fd, &r, sizeof(r)) == sizeof(r), "the log");
    close(fd);
}

// One task, from request to the last acknowledgement; false when there was none to be had.
static bool work_through(int i) {
    node *n = &nodes[i];
    fl_msg m = request_task(n);
    if (m.type != FL_MSG_TASK || m.task.kind != FL_TASK_TRAIN) return false;
    fl_layer_version bases[LAYERS];
    fl_task t = m.task;
    memcpy(bases, t.bases, t.base_count * sizeof(bases[0]));
    for (size_t k = 0; k < t.base_count; k++) {
        static parcel p;
        pack(n, &t, bases[k].layer, bases[k].version, &p);
        seal(n, &p);
        const size_t number = remembered;
        remember(i + 1, &p);
        memory[number].unanswered = true;
        const fl_update_ack ack = deliver(n, &p);
        if (ack.verdict == FL_VERDICT_REFUSED) {
            T_CHECK(ack.code == FL_CODE_NOT_ASSIGNED || ack.code == FL_CODE_LATE ||
                        (forgetful && ack.code == FL_CODE_BASE),
                    "refused: %s", ack.text);
            continue;
        }
        memory[number].unanswered = false;
        note_ack(number);
    }
    return true;
}

// A report whose sums ask for another vote.
static void report(int i) {
    node *n = &nodes[i];
    fl_msg m = request_task(n);
    if (m.type != FL_MSG_TASK) return;
    fl_msg r = {.type = FL_MSG_REPORT,
                .report = {.round = m.task.round,
                           .task_id = m.task.task_id,
                           .sequence = ++n->sequence,
                           .vote_version = m.task.vote.version,
                           .tokens = 1000,
                           .nll_base_q20 = 4000ll << 20,
                           .nll_local_q20 = 3500ll << 20,
                           .nll_voted_q20 = 3000ll << 20,
                           .exit_count = 2,
                           .exits = {{.responsibility_q20 = 250ull << 20},
                                     {.responsibility_q20 = 750ull << 20}}}};
    memcpy(r.report.run_id, m.task.run_id, FL_ID_SIZE);
    const fl_msg a = ask(n, &r, FL_MSG_REPORT_ACK, FL_MSG_REPORT_ACK);
    T_CHECK(a.report_ack.verdict != FL_VERDICT_REFUSED, "the report is taken");
}

// Links cannot be shared by processes: each process that forks from here dials for itself.
static void hang_up(void) {
    for (int i = 0; i < NODES; i++) {
        fl_link_close(nodes[i].link);
        nodes[i].link = NULL;
        if (nodes[i].channel != NULL) fl_channel_drop(nodes[i].channel);
    }
}

static void dial_all(void) {
    for (int i = 0; i < NODES; i++) {
        node_dial(&nodes[i]);
        dialled[i] = generation;
    }
}

// ---- the judge

typedef struct steps { // what the layers must be, from the ledger and the nodes' memory
    float theta[COUNT];
    double moments[2 * COUNT];
} steps;

static void step_once(uint32_t layer, int64_t round, steps *s) {
    coord_wide sum[COUNT] = {0};
    double mean[COUNT];
    uint64_t weight = 0;
    fl_err err;
    for (size_t i = 0; i < book.count; i++) {
        const coord_update_row *r = &book.rows[i];
        if (r->layer != layer || r->round != round) continue;
        const sent *u = recall(r);
        T_NEED(u != NULL, "the ledger has an update that nobody sent");
        T_EQ(r->weight, coord_weight(u->tokens, version_before(layer, round) - (uint64_t)r->base));
        for (int k = 0; k < COUNT; k++) sum[k] += (coord_wide)u->values[k] * r->weight * r->clip;
        weight += (uint64_t)r->weight;
    }
    if (weight == 0) return;
    for (int k = 0; k < COUNT; k++)
        mean[k] = (double)sum[k] / (double)weight * (ldexp(1.0, -FL_UPDATE_FIXED_BITS) / 65536.0);
    T_OK(coord_opt_step(&optimiser, COUNT, mean, s->theta, s->moments, &err), err);
}

static void judge_layer(coord_store *s, const coord_layer_row *row, const coord_round_row *rounds,
                        size_t round_count) {
    static steps want;
    float got[COUNT];
    uint8_t *data = NULL;
    size_t size = 0;
    fl_layer layer;
    fl_err err;
    memset(&want, 0, sizeof(want));
    coord_opt_start(&optimiser, COUNT, want.moments);
    for (size_t r = 0; r + 1 < round_count; r++) step_once(row->layer, rounds[r].round, &want);
    if (row->version == 0) return;
    T_OK(coord_store_get_object(s, row->digest, 1 << 20, &data, &size, &err), err);
    T_OK(fl_layer_open((fl_bytes){data, size}, &layer, &err), err);
    fl_layer_values(&layer, 0, COUNT, got);
    T_CHECK(memcmp(got, want.theta, sizeof(got)) == 0, "layer %u is not the step of its updates",
            row->layer);
    free(data);
}

static void print_problem(void *ctx, const char *text) {
    (void)ctx;
    fprintf(stderr, "problem: %s\n", text);
}

// What is on the disk is whole, has every acknowledged update once and no other, and its layers are
// bit for bit what these updates make. Returns the number of closed rounds.
static int64_t judge(void) {
    coord_store *s = NULL;
    coord_layer_row layers[LAYERS];
    static coord_round_row rounds[1000];
    coord_verified v = {0};
    size_t count = 0, round_count = 0;
    fl_err err;
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_verify(s, print_problem, NULL, &v, &err), err);
    T_EQ(v.problems, 0);
    T_OK(coord_store_layers(s, layers, LAYERS, &count, &err), err);
    T_OK(coord_store_rounds(s, rounds, 1000, &round_count, &err), err);
    book.count = 0;
    for (uint32_t l = 0; l < LAYERS; l++)
        T_OK(coord_store_each_recent_update(s, l, SENT_MAX, collect, &book, &err), err);
    check_ledger();
    for (size_t l = 0; l < count; l++) judge_layer(s, &layers[l], rounds, round_count);
    coord_store_close(s);
    return round_count == 0 ? 0 : rounds[round_count - 1].round - 1;
}

// ---- places

static void find_preload(void) {
    const ssize_t size = readlink("/proc/self/exe", preload, sizeof(preload) - 64);
    T_NEED(size > 0, "own path");
    preload[size] = '\0';
    snprintf(strrchr(preload, '/'), 64, "/libdisk_faults.so");
    T_NEED(access(preload, R_OK) == 0, "%s", preload);
}

// Memory is a disk on which a sync costs nothing: these tests are about its order, not its time.
static void choose_folder(void) {
    if (getenv("TMPDIR") == NULL && access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 1);
}

// A folder and a port of this process alone.
static void settle(const char *from) {
    char at[64];
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    for (unsigned i = 0;; i++) { // below the ports that the system hands out
        port = (uint16_t)(20000 + ((unsigned)getpid() * 7 + i) % 12000);
        a.sin_port = htons(port);
        if (bind(fd, (struct sockaddr *)&a, sizeof(a)) == 0) break;
        T_NEED(i < 12000, "no port");
    }
    close(fd);
    snprintf(dir, sizeof(dir), "%s/p%d", root, (int)getpid());
    snprintf(said_path, sizeof(said_path), "%s.said", dir);
    snprintf(at, sizeof(at), "tcp://127.0.0.1:%u", port);
    setenv("FLEETUNE_COORDINATOR_NETWORK_LISTEN", at, 1);
    remove_tree(dir); // of a process of the same number that failed
    if (from != NULL) copy_tree(from, dir, false);
    look_after = tend;
}

static void leave(void) {
    if (coordinator > 0) stop(SIGKILL);
    hang_up();
    remove_tree(dir);
    unlink(said_path);
}

#endif
