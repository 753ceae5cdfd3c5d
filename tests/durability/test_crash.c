// Goal: whatever call to the disk the coordinator dies at, and whichever fails, nothing that was
// acknowledged is lost or counted twice, it ends with a reason or goes on, and it serves again
// within two seconds.
// Method: the built programs under disk.c, which ends them at, or fails, the K-th call of a path.
// The paths are stages: each starts from a state made before, and is played by clients with real
// keys and sockets that see it through. After each point the judge (rig.h) compares what is on the
// disk with what the clients were told, bit for bit. Points run side by side, each in a process.
//
//   test_crash                       FLEETUNE_POINTS points (600), spread over all there are
//   test_crash STAGE ACTION:K        one point, with what the programs say
#include "tests/durability/rig.h"

#include "tests/durability/crash_stages.h"

enum { POINTS = 600, SIDE_BY_SIDE = 10, POINTS_MAX = 200000 };

typedef struct tally { // shared by all processes
    uint64_t points[DISK_ACTIONS], ended[DISK_ACTIONS], failed, slowest_ms;
} tally;
static tally *all;

typedef struct point {
    const stage *stage;
    char plan[40];
} point;
static point points[POINTS_MAX];
static size_t point_count;

static disk_action action_of(const char *text) {
    static const char *const names[] = {
#define X(name, word) word,
        DISK_ACTION_LIST(X)
#undef X
    };
    for (unsigned i = 0; i < DISK_ACTIONS; i++)
        if (strncmp(text, names[i], strlen(names[i])) == 0) return (disk_action)i;
    return DISK_ACTIONS;
}

// In a process of its own: plays one stage under a plan.
static void run_point(const stage *s, const char *the_plan) {
    plan = the_plan;
    enter_stage(s);
    s->play();
    if (coordinator > 0) stop_asked();
    judge();
    leave();
}

static int in_child(const stage *s, const char *the_plan) {
    t_failed = 0;
    if (setjmp(t_leave) == 0) run_point(s, the_plan);
    if (coordinator > 0) kill(coordinator, SIGKILL);
    const disk_action a = the_plan == NULL ? DISK_ACTIONS : action_of(the_plan);
    if (a < DISK_ACTIONS) {
        __atomic_add_fetch(&all->points[a], 1, __ATOMIC_SEQ_CST);
        if (first_end != -1) __atomic_add_fetch(&all->ended[a], 1, __ATOMIC_SEQ_CST);
    }
    if (slowest_ms > all->slowest_ms) all->slowest_ms = slowest_ms; // two at once: either is true
    if (t_failed == 0) return 0;
    __atomic_add_fetch(&all->failed, 1, __ATOMIC_SEQ_CST);
    fprintf(stderr, "FAILED: test_crash %s %s\n", s->name, the_plan == NULL ? "-" : the_plan);
    return 1;
}

// How many calls a stage makes, and what they are.
static uint64_t count_calls(const stage *s) {
    uint64_t counts[DISK_OPS + 1] = {0};
    snprintf(count_path, sizeof(count_path), "%s/count", root);
    const int fd = open(count_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    T_NEED(fd >= 0 && write(fd, counts, sizeof(counts)) == sizeof(counts), "a file for counts");
    const pid_t pid = fork();
    if (pid == 0) _exit(in_child(s, "kill:0"));
    int status = 0;
    waitpid(pid, &status, 0);
    T_NEED(status == 0, "stage %s without faults", s->name);
    T_NEED(pread(fd, counts, sizeof(counts), 0) == sizeof(counts), "counts");
    close(fd);
    count_path[0] = '\0';
    all->points[DISK_DO_KILL]--;
    static const char *const names[] = {
#define X(name, text) text,
        DISK_OP_LIST(X)
#undef X
    };
    printf("%-10s %4llu calls:", s->name, (unsigned long long)counts[DISK_OPS]);
    for (unsigned i = 0; i < DISK_ACK; i++)
        printf(" %llu %s", (unsigned long long)counts[i], names[i]);
    printf("\n");
    fflush(stdout);
    return counts[DISK_OPS];
}

static void add_points(const stage *s, uint64_t calls) {
    static const char *const names[] = {
#define X(name, text) text,
        DISK_ACTION_LIST(X)
#undef X
    };
    for (unsigned a = 0; a < DISK_ACTIONS; a++)
        for (uint64_t k = 1; k <= calls && point_count < POINTS_MAX; k++) {
            point *p = &points[point_count++];
            p->stage = s;
            snprintf(p->plan, sizeof(p->plan), "%s:%llu", names[a], (unsigned long long)k);
        }
}

// `wanted` of all points, evenly spread, beginning somewhere else each time the seed changes.
static void run_points(size_t wanted) {
    size_t running = 0, ran = 0;
    if (wanted > point_count) wanted = point_count;
    const size_t shift = (size_t)(t_seed % (point_count / wanted));
    for (size_t i = 0; i < wanted || running > 0;) {
        if (i < wanted && running < SIDE_BY_SIDE) {
            const point *p = &points[(i * point_count / wanted + shift) % point_count];
            const pid_t pid = fork();
            T_NEED(pid >= 0, "fork");
            if (pid == 0) _exit(in_child(p->stage, p->plan));
            running++;
            i++;
            continue;
        }
        if (wait(NULL) > 0) running--, ran++;
        if (all->failed > 20) wanted = i; // enough to look at
    }
    (void)ran;
}

static void report_points(uint64_t began_ms) {
    uint64_t sum = 0;
    printf("%zu points in all:", point_count);
#define X(name, text)                                                                              \
    printf(" %s %llu (%llu ended the program)", text,                                              \
           (unsigned long long)all->points[DISK_DO_##name],                                        \
           (unsigned long long)all->ended[DISK_DO_##name]);                                        \
    sum += all->points[DISK_DO_##name];
    DISK_ACTION_LIST(X)
#undef X
    printf("\n%llu points run in %.1f s, %llu failed; slowest restart to serving %llu ms\n",
           (unsigned long long)sum, (double)(fl_clock_ms() - began_ms) / 1e3,
           (unsigned long long)all->failed, (unsigned long long)all->slowest_ms);
    T_EQ(all->failed, 0);
    T_CHECK(all->slowest_ms <= SERVING_MS, "a restart took %llu ms",
            (unsigned long long)all->slowest_ms);
}

static void test_every_call(void) {
    const char *text = getenv("FLEETUNE_POINTS");
    const size_t wanted = text == NULL ? POINTS : strtoull(text, NULL, 10);
    const uint64_t began_ms = fl_clock_ms();
    for (size_t i = 0; i < STAGES; i++) add_points(&stages[i], count_calls(&stages[i]));
    T_NEED(wanted > 0 && point_count > 0, "points");
    run_points(wanted);
    report_points(began_ms);
}

int main(int argc, char **argv) {
    static const t_case cases[] = {{"every_call", test_every_call}};
    all = mmap(NULL, sizeof(*all), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return 1;
    choose_folder();
    if (setjmp(t_leave) != 0) return 1;
    find_preload();
    make_stages();
    if (argc != 3) return t_main(argc, argv, cases, FL_COUNT(cases));
    for (size_t i = 0; i < STAGES; i++)
        if (strcmp(argv[1], stages[i].name) == 0)
            return in_child(&stages[i], argv[2]);
    return 2;
}
