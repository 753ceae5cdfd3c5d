// Goal: the power may go at any moment, and of what was not synced anything may be missing, torn or
// out of order: the state is whole, every acknowledged update is in it once, and it serves.
// Method: real runs write down every call to the disk (disk.c). Each run is one tape. From a tape
// and a moment drawn from a seed an image of the disk is made (tape.h); it must pass the judge, be
// served by the built program within two seconds, take another round, and pass the judge again.
// Some runs are killed on the way, and in some a sync fails: what a program saw in memory then was
// never on the disk.
//
//   test_power                   FLEETUNE_IMAGES images (600) of all tapes
//   test_power TAPE NUMBER       one of them, with what the program says
#include "tests/durability/crash_stages.h"
#include "tests/durability/tape.h"

enum { IMAGES = 600, SIDE_BY_SIDE = 10 };

typedef struct tally {
    uint64_t images[TAPE_MODES], failed, slowest_ms, lost; // lost: updates sent, not acknowledged
} tally;
static tally *all;

typedef struct recipe { // of a tape
    const char *name, *stage;
    int rounds, kill_every; // kill_every: tasks between two kills; 0: none
    const char *plan;       // of the first process
} recipe;
static const recipe recipes[] = {
    {"init", "init", 0, 0, NULL},        {"plain", "round", 9, 0, NULL},
    {"killed", "round", 4, 2, NULL},     {"adam", "adam", 3, 0, NULL},
    {"adam_kill", "adam", 3, 2, NULL},   {"sync_1", "round", 2, 0, "eio/sync:4"},
    {"sync_2", "adam", 2, 0, "eio/sync:9"}, {"sync_3", "round", 2, 0, "eio/sync:23"},
};
static tape *the_tape;
static size_t first_sent; // of those in memory when the tape began

static void play_tape(const recipe *r) {
    generation++;
    if (r->rounds == 0) {
        set_disk(NULL, root); // the folder's own name is in that one
        T_EQ(COMMAND(NULL, 0, "init", dir, "--model", model, "--exits", "2"), 0);
        clear_disk();
        note_ack(0);
        return;
    }
    plan = r->plan;
    start_planned();
    dial_all();
    for (int round = 0, tasks = 0; round < r->rounds; round++) {
        for (int i = 0; i < NODES; i++) {
            report(i);
            T_CHECK(work_through(i), "node %d has work", i);
            if (r->kill_every == 0 || ++tasks % r->kill_every != 0) continue;
            stop(SIGKILL);
            start_whole();
        }
    }
    hang_up();
    stop_asked();
}

// Everything of the tape up to the cut, then the loss. What was acknowledged by then must be there.
static size_t make_image(tape_mode *ret_mode) {
    tape *t = the_tape;
    const bool whole = t_rand() % 4 == 0; // right after the last acknowledgement
    const size_t cut = whole ? t->count : 1 + t_rand() % t->count;
    *ret_mode = (tape_mode)(t_rand() % TAPE_MODES);
    for (size_t i = first_sent; i < remembered; i++) memory[i].unanswered = true;
    for (size_t i = 0; i < cut; i++) {
        const tape_entry *e = &t->entries[i];
        tape_step(t, e);
        if (e->r.op == DISK_ACK && remembered > 0) memory[e->r.offset].unanswered = false;
    }
    tape_lose_power(t, *ret_mode);
    tape_write(t, dir);
    return cut;
}

static void judge_init(size_t cut) {
    coord_store *s = NULL;
    const bool done = the_tape->entries[cut - 1].r.op == DISK_ACK;
    const int status = COMMAND(NULL, 0, "init", dir, "--model", model, "--exits", "2");
    T_CHECK(status == 0 || status == 1, "init again: %d", status);
    T_CHECK(!done || status == 1, "the coordinator that init made is gone");
    fl_err err;
    T_OK(coord_store_open(dir, &s, &err), err);
    coord_store_close(s);
    judge();
    start_whole();
    T_EQ(stop(SIGTERM), 0);
}

static void judge_image(const recipe *r, uint64_t number) {
    tape_mode mode;
    t_seed = number * 1000003 + (uint64_t)(r - recipes) * 7919;
    settle(NULL);
    const size_t cut = make_image(&mode);
    __atomic_add_fetch(&all->images[mode], 1, __ATOMIC_SEQ_CST);
    if (r->rounds == 0) {
        judge_init(cut);
        leave();
        return;
    }
    for (size_t i = 0; i < remembered; i++) all->lost += memory[i].unanswered;
    const int64_t rounds = judge();
    forgetful = true;
    start_whole();
    dial_all();
    // Who is in the open round already waits for the others.
    for (int i = 0; i < 2 * NODES; i++) (void)work_through(i % NODES);
    hang_up();
    T_EQ(stop(SIGTERM), 0);
    T_CHECK(judge() > rounds, "another round is closed");
    leave();
}

static int image_child(const recipe *r, uint64_t number) {
    plan = NULL;
    record_path[0] = '\0';
    t_failed = 0;
    if (setjmp(t_leave) == 0) judge_image(r, number);
    if (coordinator > 0) kill(coordinator, SIGKILL);
    if (slowest_ms > all->slowest_ms) all->slowest_ms = slowest_ms;
    if (t_failed == 0) return 0;
    __atomic_add_fetch(&all->failed, 1, __ATOMIC_SEQ_CST);
    fprintf(stderr, "FAILED: test_power %s %llu\n", r->name, (unsigned long long)number);
    return 1;
}

static const stage *stage_of(const recipe *r) {
    for (size_t i = 0; i < STAGES; i++)
        if (strcmp(stages[i].name, r->stage) == 0) return &stages[i];
    T_NEED(false, "stage %s", r->stage);
    return NULL;
}

// In a process of its own: makes the tape, then its images. images 0: only image `number`.
static int tape_child(const recipe *r, uint64_t images, uint64_t number) {
    t_failed = 0;
    if (setjmp(t_leave) != 0) return 1;
    enter_stage(stage_of(r));
    first_sent = remembered;
    the_tape = calloc(1, sizeof(*the_tape));
    T_NEED(the_tape != NULL, "memory");
    snprintf(the_tape->dir, sizeof(the_tape->dir), "%s", dir);
    tape_scan(the_tape, dir);
    snprintf(record_path, sizeof(record_path), "%s.log", dir);
    const int fd = open(record_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    close(fd);
    play_tape(r);
    tape_load(the_tape, record_path);
    unlink(record_path);
    remove_tree(dir);
    size_t syncs = 0, failed = 0;
    for (size_t i = 0; i < the_tape->count; i++) {
        syncs += the_tape->entries[i].r.op == DISK_SYNC;
        failed += the_tape->entries[i].r.failed;
    }
    printf("%-10s %zu records, %zu syncs, %zu failed, %zu updates\n", r->name, the_tape->count,
           syncs, failed, remembered - first_sent);
    fflush(stdout);
    if (images == 0) return image_child(r, number);
    for (uint64_t i = 0, running = 0; i < images || running > 0;) {
        if (i < images && running < SIDE_BY_SIDE) {
            const pid_t pid = fork();
            T_NEED(pid >= 0, "fork");
            if (pid == 0) _exit(image_child(r, t_first_seed * 100000 + i));
            running++, i++;
        } else if (wait(NULL) > 0) {
            running--;
        }
    }
    return t_failed;
}

static void test_every_tape(void) {
    static const char *const names[] = {
#define X(name) #name,
        TAPE_MODE_LIST(X)
#undef X
    };
    const char *text = getenv("FLEETUNE_IMAGES");
    const uint64_t images = text == NULL ? IMAGES : strtoull(text, NULL, 10);
    const uint64_t began_ms = fl_clock_ms();
    uint64_t sum = 0;
    for (size_t i = 0; i < FL_COUNT(recipes); i++) {
        const pid_t pid = fork();
        if (pid == 0) _exit(tape_child(&recipes[i], images / FL_COUNT(recipes), 0));
        int status = 1;
        waitpid(pid, &status, 0);
        T_EQ(status, 0);
    }
    for (size_t i = 0; i < TAPE_MODES; i++) {
        sum += all->images[i];
        printf("%s %llu  ", names[i], (unsigned long long)all->images[i]);
    }
    printf("\n%llu images in %.1f s, %llu failed; slowest restart to serving %llu ms\n",
           (unsigned long long)sum, (double)(fl_clock_ms() - began_ms) / 1e3,
           (unsigned long long)all->failed, (unsigned long long)all->slowest_ms);
    T_EQ(all->failed, 0);
    T_CHECK(sum >= images / 2, "only %llu images", (unsigned long long)sum);
    T_CHECK(all->slowest_ms <= SERVING_MS, "too slow");
}

int main(int argc, char **argv) {
    static const t_case cases[] = {{"every_tape", test_every_tape}};
    all = mmap(NULL, sizeof(*all), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return 1;
    choose_folder();
    if (setjmp(t_leave) != 0) return 1;
    find_preload();
    make_stages();
    if (argc != 3) return t_main(argc, argv, cases, FL_COUNT(cases));
    for (size_t i = 0; i < FL_COUNT(recipes); i++)
        if (strcmp(argv[1], recipes[i].name) == 0)
            return tape_child(&recipes[i], 0, strtoull(argv[2], NULL, 10));
    return 2;
}
