// crash_stages.h: the paths on which the coordinator commits, each from a state made before.
#ifndef TESTS_DURABILITY_CRASH_STAGES_H
#define TESTS_DURABILITY_CRASH_STAGES_H

#include "tests/durability/rig.h"

typedef struct stage {
    const char *name;
    void (*play)(void);
    bool adam;      // the server steps with moments, and keeps one version
    char from[256]; // the state that it starts from; empty: none
    sent *memory;   // of the updates in it
    size_t remembered;
    uint64_t sequence[NODES];
} stage;

static char auto_url[FL_INVITE_URL_MAX + 2], slow_url[FL_INVITE_URL_MAX + 2];

// Runs a command under the plan, and again without it when that ended it. Its last status.
static int planned_command(const char *const *args, bool again) {
    int status;
    set_disk(plan, dir);
    const int err_fd = dup(STDERR_FILENO);
    T_NEED(freopen(said_path, "w", stderr) != NULL, "a file for words");
    status = command(NULL, 0, args);
    fflush(stderr);
    dup2(err_fd, STDERR_FILENO);
    close(err_fd);
    clear_disk();
    if (status == 0) return 0;
    first_end = status;
    if (status != 128 + SIGKILL) {
        T_EQ(status, 1);
        T_CHECK(strstr(said(), "fleetune-coordinator: ") != NULL, "without a reason: %s", said());
    }
    return again ? command(NULL, 0, args) : status;
}
#define PLANNED(again, ...)                                                                        \
    planned_command((const char *const[]){program, __VA_ARGS__, NULL}, again)

// ---- init

static void play_init(void) {
    coord_store *s = NULL;
    uint8_t id[16];
    size_t size = 0;
    fl_err err;
    const int status =
        PLANNED(true, "init", dir, "--model", model, "--exits", "2", "--updates-per-round", "3");
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_get_value(s, "run_id", id, sizeof(id), &size, &err), err);
    coord_store_close(s);
    T_CHECK(status == 0 || (status == 1 && first_end != -1), "init again: %d", status);
    remembered = 0;
    start_whole();
}

// ---- enrolment: from one token a node joins, from the other one waits and is approved

static void play_join(void) {
    generation++;
    start_planned();
    node_dial(&nodes[0]);
    dialled[0] = generation;
    T_EQ(node_join(&nodes[0], auto_url).verdict, FL_VERDICT_ACCEPTED);
    node_dial(&nodes[1]);
    dialled[1] = generation;
    T_EQ(node_join(&nodes[1], slow_url).verdict, FL_VERDICT_PENDING);
    T_EQ(COMMAND(NULL, 0, "approve", dir, nodes[1].name), 0);
    for (int i = 0; i < 2; i++) T_EQ(request_task(&nodes[i]).type, FL_MSG_TASK);
    T_EQ(COMMAND(NULL, 0, "revoke", dir, nodes[1].name), 0);
    stop_asked();
    coord_store *s = NULL;
    coord_node_row row;
    coord_token_row t;
    fl_invite invite;
    fl_err err;
    uint8_t id[COORD_TOKEN_ID], key[FL_KEY_SIZE];
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_find_node(s, nodes[0].name, &row, &err), err); // FL_EARG: it is there twice
    T_CHECK(row.id == 1 && row.state == COORD_NODE_ACTIVE, "the first is active");
    T_OK(coord_store_find_node(s, nodes[1].name, &row, &err), err);
    T_CHECK(row.state == COORD_NODE_REVOKED, "the second is revoked");
    T_OK(fl_invite_parse(auto_url, &invite, &err), err);
    fl_invite_derive(invite.secret, id, key);
    T_OK(coord_store_find_token(s, id, &t, &err), err);
    T_EQ(t.uses, NODES - 1); // however often it asked, one use
    coord_store_close(s);
}

// ---- the owner's commands, beside a coordinator that runs

static void play_commands(void) {
    start_whole();
    T_EQ(PLANNED(true, "token", dir, "--uses", "2"), 0);
    T_EQ(PLANNED(true, "approve", dir, "waiting"), 0);
    T_EQ(PLANNED(true, "revoke", dir, nodes[2].name), 0);
    T_EQ(PLANNED(true, "status", dir), 0);
    T_EQ(PLANNED(true, "nodes", dir), 0);
    T_EQ(PLANNED(true, "rounds", dir), 0);
    T_EQ(PLANNED(true, "verify", dir), 0);
}

// ---- a round: updates are admitted, reports taken, the buffer becomes layers and a vote

static void play_round(void) {
    generation++;
    start_planned();
    dial_all();
    for (int i = 0; i < NODES; i++) {
        report(i);
        T_CHECK(work_through(i), "node %d has work", i);
    }
    T_CHECK(work_through(0), "and more in the next round");
}

static void use_adam(bool adam) {
    optimiser = (coord_opt){.kind = COORD_FEDAVG, .rate = 1.0};
    if (!adam) {
        unsetenv("FLEETUNE_COORDINATOR_SERVER_SERVER_OPTIMISER");
        unsetenv("FLEETUNE_COORDINATOR_SERVER_SERVER_LR");
        unsetenv("FLEETUNE_COORDINATOR_SERVER_VERSIONS_KEPT");
        return;
    }
    setenv("FLEETUNE_COORDINATOR_SERVER_SERVER_OPTIMISER", "fedadam", 1);
    setenv("FLEETUNE_COORDINATOR_SERVER_SERVER_LR", "0.01", 1);
    setenv("FLEETUNE_COORDINATOR_SERVER_VERSIONS_KEPT", "1", 1);
    optimiser =
        (coord_opt){.kind = COORD_FEDADAM, .rate = 0.01, .beta1 = 0.9, .beta2 = 0.99, .tau = 0.001};
}

// ---- backup of a coordinator that runs, and what is restored from it

static void play_backup(void) {
    char copy[300], again[300];
    snprintf(copy, sizeof(copy), "%s.backup", dir); // also below the folder that disk.c looks at
    snprintf(again, sizeof(again), "%s.restored", dir);
    start_whole();
    const int made = PLANNED(true, "backup", dir, copy);
    const bool is_made = made == 0 || (made == 1 && first_end != -1 && fl_file_exists(copy));
    T_CHECK(is_made, "backup again: %d", made);
    const int back = PLANNED(true, "restore", copy, again);
    T_CHECK(back == 0 || (back == 1 && first_end != -1 && fl_file_exists(again)), "restore: %d",
            back);
    T_EQ(stop(SIGTERM), 0);
    char home[sizeof(dir)];
    snprintf(home, sizeof(home), "%s", dir);
    snprintf(dir, sizeof(dir), "%.255s", copy);
    judge();
    snprintf(dir, sizeof(dir), "%.255s", again);
    judge();
    start_whole();
    stop_asked();
    remove_tree(copy);
    remove_tree(again);
    snprintf(dir, sizeof(dir), "%s", home);
}

// ----

static stage stages[] = {
    {.name = "init", .play = play_init},
    {.name = "join", .play = play_join},
    {.name = "commands", .play = play_commands},
    {.name = "round", .play = play_round},
    {.name = "adam", .play = play_round, .adam = true},
    {.name = "backup", .play = play_backup},
};
enum { STAGES = sizeof(stages) / sizeof(stages[0]) };

static void keep_stage(const char *name) {
    for (size_t i = 0; i < STAGES; i++) {
        stage *s = &stages[i];
        if (strcmp(s->name, name) != 0) continue;
        snprintf(s->from, sizeof(s->from), "%s/from-%s", root, name);
        copy_tree(dir, s->from, false);
        s->remembered = remembered;
        s->memory = malloc(remembered * sizeof(memory[0]) + 1);
        T_NEED(s->memory != NULL, "memory");
        memcpy(s->memory, memory, remembered * sizeof(memory[0]));
        for (int n = 0; n < NODES; n++) s->sequence[n] = nodes[n].sequence;
    }
}

// The same in reverse, in a process of its own.
static void enter_stage(const stage *s) {
    use_adam(s->adam);
    remembered = s->remembered;
    if (remembered > 0) memcpy(memory, s->memory, remembered * sizeof(memory[0]));
    for (int n = 0; n < NODES; n++) nodes[n].sequence = s->sequence[n];
    settle(s->from[0] == '\0' ? NULL : s->from);
}

// Two rounds and a piece of the third: layers, moments, a vote and an open buffer are there.
static void fill_state(const char *from, bool adam) {
    remove_tree(dir);
    copy_tree(from, dir, false);
    remembered = 0;
    use_adam(adam);
    start_whole();
    dial_all();
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < NODES; i++) {
            report(i);
            T_CHECK(work_through(i), "node %d has work", i);
        }
    }
    T_CHECK(work_through(0), "a piece of the third");
    hang_up();
    T_EQ(stop(SIGTERM), 0);
    T_EQ(judge(), 2);
}

static void make_stages(void) {
    char enrolled[256];
    set_up("3", "even");
    snprintf(said_path, sizeof(said_path), "%s/said", root);
    for (int i = 0; i < NODES; i++) {
        char name[24];
        snprintf(name, sizeof(name), "node-%d", i + 1);
        node_open(&nodes[i], name);
    }
    start_whole();
    token(auto_url, sizeof(auto_url), "3", true);
    token(slow_url, sizeof(slow_url), "1", false);
    T_EQ(stop(SIGTERM), 0);
    keep_stage("join");
    start_whole();
    for (int i = 0; i < NODES; i++)
        T_EQ(node_join(&nodes[i], auto_url).verdict, FL_VERDICT_ACCEPTED);
    node waiting;
    node_open(&waiting, "waiting");
    T_EQ(node_join(&waiting, slow_url).verdict, FL_VERDICT_PENDING);
    node_close(&waiting);
    hang_up();
    T_EQ(stop(SIGTERM), 0);
    keep_stage("commands");
    snprintf(enrolled, sizeof(enrolled), "%s/enrolled", root);
    copy_tree(dir, enrolled, false);
    fill_state(enrolled, true);
    keep_stage("adam");
    fill_state(enrolled, false);
    keep_stage("round");
    keep_stage("backup");
}

#endif
