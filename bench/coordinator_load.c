// Admitted updates a second, end to end: real processes, sockets and keys on loopback. Clients
// join, take a task, make and seal their updates; then all deliver at once: offer, bytes, commit,
// and wait for the acknowledgement, which says that the update was opened, verified and is durable.
// Each client has one update under way. Clients and coordinator share the machine.
//
//   coordinator_load [--smoke] [--clients=N] [--updates=N]
#pragma GCC diagnostic ignored "-Wunused-function"
#define FLEET_LAYERS 120
#define FLEET_COUNT  32400 // 64 KiB and a little less as int16
#define FLEET_SENT   1
#include "tests/fleet_nodes.h"

#include <sys/resource.h>

enum { CLIENTS_MAX = 64, TASK_LAYERS = LAYERS / 2 };

typedef struct client_result {
    double began_s, ended_s;
    uint32_t accepted;
} client_result;

static parcel *prepare(node *n, uint32_t updates) {
    fl_msg m = request_task(n);
    T_NEED(m.type == FL_MSG_TASK && m.task.kind == FL_TASK_TRAIN, "a task");
    const fl_task t = m.task;
    fl_layer_version bases[LAYERS];
    T_NEED(t.base_count >= updates, "a task of %zu layers", t.base_count);
    memcpy(bases, t.bases, t.base_count * sizeof(bases[0]));
    parcel *p = calloc(updates, sizeof(*p));
    T_NEED(p != NULL, "memory");
    for (uint32_t i = 0; i < updates; i++) {
        pack(n, &t, bases[i].layer, bases[i].version, &p[i]);
        seal(n, &p[i]);
    }
    return p;
}

// A client's process: says when it is ready, waits for the start, reports what came of it.
static void client(const char *url, uint32_t number, uint32_t updates, int ready, int go,
                   int done) {
    char name[24];
    node n;
    client_result r = {0};
    snprintf(name, sizeof(name), "client%u", number);
    t_seed = number + 1;
    node_open(&n, name);
    T_EQ(node_join(&n, url).verdict, FL_VERDICT_ACCEPTED);
    T_NEED(node_session(&n, PATIENCE_MS), "a session");
    parcel *p = prepare(&n, updates);
    char byte = 1;
    if (write(ready, &byte, 1) != 1 || read(go, &byte, 1) != 1) _exit(1);
    r.began_s = fl_clock_s();
    for (uint32_t i = 0; i < updates; i++)
        r.accepted += deliver(&n, &p[i]).verdict == FL_VERDICT_ACCEPTED;
    r.ended_s = fl_clock_s();
    if (write(done, &r, sizeof(r)) != sizeof(r)) _exit(1);
    node_close(&n);
    _exit(0);
}

static double cpu_s(pid_t pid) {
    char path[64], text[1024];
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "r");
    const size_t size = f == NULL ? 0 : fread(text, 1, sizeof(text) - 1, f);
    if (f != NULL) fclose(f);
    text[size] = '\0';
    unsigned long user = 0, system = 0;
    const char *at = strrchr(text, ')');
    if (at == NULL || sscanf(at + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user,
                             &system) != 2)
        return 0;
    return (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
}

static void verify(void) {
    char out[4096] = "";
    T_EQ(stop(SIGTERM), 0);
    T_EQ(COMMAND(out, sizeof(out), "verify", dir), 0);
    fputs(out, stdout);
}

static void load(uint32_t clients, uint32_t updates) {
    int ready[2], go[2], done[2];
    char url[512], many[16], byte = 0;
    snprintf(many, sizeof(many), "%u", clients + 1);
    set_up(many, "last"); // one contribution more than come: the round stays open
    start();
    token(url, sizeof(url), many, true);
    T_NEED(pipe(ready) == 0 && pipe(go) == 0 && pipe(done) == 0, "pipes");
    for (uint32_t c = 0; c < clients; c++) {
        const pid_t pid = fork();
        if (pid == 0) {
            coordinator = 0;
            root[0] = '\0'; // what is there is the parent's
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            client(url, c, updates, ready[1], go[0], done[1]);
        }
        T_NEED(pid > 0, "a process");
    }
    for (uint32_t c = 0; c < clients; c++) T_NEED(read(ready[0], &byte, 1) == 1, "a client");
    const double cpu = cpu_s(coordinator);
    for (uint32_t c = 0; c < clients; c++) T_NEED(write(go[1], &byte, 1) == 1, "start");
    double began = 0, ended = 0;
    uint32_t accepted = 0;
    for (uint32_t c = 0; c < clients; c++) {
        client_result r;
        T_NEED(read(done[0], &r, sizeof(r)) == sizeof(r), "a result");
        began = c == 0 || r.began_s < began ? r.began_s : began;
        ended = r.ended_s > ended ? r.ended_s : ended;
        accepted += r.accepted;
    }
    const double seconds = ended - began, used = cpu_s(coordinator) - cpu;
    T_EQ(accepted, clients * updates);
    printf("%u clients, %u updates of %d bytes: %.3f s, %.0f updates/s, %.1f MB/s; coordinator's "
           "processor time %.0f us an update\n",
           clients, accepted, (int)(fl_update_size(COUNT, FL_UPDATE_INT16) + FL_SEAL_EXTRA),
           seconds, accepted / seconds,
           accepted / seconds * (double)fl_update_size(COUNT, FL_UPDATE_INT16) * 1e-6,
           used / accepted * 1e6);
    verify();
}

static unsigned clients_wanted = 16, updates_wanted = TASK_LAYERS;

static void test_load(void) {
    load(clients_wanted, updates_wanted);
}

int main(int argc, char **argv) {
    static const t_case cases[] = {{"load", test_load}};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--smoke") == 0)
            clients_wanted = 2, updates_wanted = 3;
        else if (strncmp(argv[i], "--clients=", 10) == 0)
            clients_wanted = (unsigned)strtoul(argv[i] + 10, NULL, 10);
        else if (strncmp(argv[i], "--updates=", 10) == 0)
            updates_wanted = (unsigned)strtoul(argv[i] + 10, NULL, 10);
        else
            return 2;
    }
    if (clients_wanted < 1 || clients_wanted > CLIENTS_MAX || updates_wanted < 1 ||
        updates_wanted > TASK_LAYERS)
        return 2;
    return t_main(1, argv, cases, 1);
}
