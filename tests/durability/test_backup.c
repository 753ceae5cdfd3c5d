// Goal: a backup made at any moment of a coordinator at work is whole, and what is restored from it
// goes on as a new run of the same fleet.
// Method: three nodes work while `backup` runs again and again. Each copy is judged against what
// the nodes sent (rig.h): nothing else is in it, and its layers are bit for bit the steps of its
// updates. Then each is restored, served by the built program, and takes another round.
#include "tests/durability/crash_stages.h"

enum { BACKUPS = 8 };

static void copy_path(int number, char out[300]) {
    snprintf(out, 300, "%s/copy-%d", root, number);
}

static pid_t back_up(void) {
    const pid_t pid = fork();
    T_NEED(pid >= 0, "fork");
    for (int i = 0; pid == 0 && i < BACKUPS; i++) {
        char to[300];
        copy_path(i, to);
        if (COMMAND(NULL, 0, "backup", dir, to) != 0) _exit(1);
        usleep(30000);
    }
    if (pid == 0) _exit(0);
    return pid;
}

static void run_id_of(const char *folder, uint8_t ret[16]) {
    coord_store *s = NULL;
    size_t size = 0;
    fl_err err;
    T_OK(coord_store_open(folder, &s, &err), err);
    T_OK(coord_store_get_value(s, "run_id", ret, 16, &size, &err), err);
    coord_store_close(s);
}

static void test_while_it_runs(void) {
    const stage *from = &stages[0];
    uint8_t old_run[16], new_run[16];
    while (strcmp(from->name, "round") != 0) from++;
    enter_stage(from);
    start_whole();
    dial_all();
    const pid_t pid = back_up();
    int status = 1, tasks = 0;
    while (waitpid(pid, &status, WNOHANG) == 0)
        for (int i = 0; i < NODES; i++) tasks += work_through(i);
    T_EQ(status, 0);
    T_CHECK(tasks >= NODES, "only %d tasks were done meanwhile", tasks);
    hang_up();
    T_EQ(stop(SIGTERM), 0);
    run_id_of(dir, old_run);
    int64_t first = -1, last = -1;
    char home[sizeof(dir)];
    snprintf(home, sizeof(home), "%s", dir);
    const size_t sent_before = remembered;
    forgetful = true;
    for (int i = 0; i < BACKUPS; i++) {
        char copy[300];
        copy_path(i, copy);
        remembered = sent_before;
        for (size_t k = from->remembered; k < remembered; k++) memory[k].unanswered = true;
        snprintf(dir, sizeof(dir), "%.240s-again", copy);
        T_EQ(COMMAND(NULL, 0, "restore", copy, dir), 0);
        last = judge();
        if (first < 0) first = last;
        run_id_of(dir, new_run);
        T_CHECK(memcmp(old_run, new_run, sizeof(new_run)) != 0, "it is another run");
        start_whole();
        dial_all();
        for (int k = 0; k < 2 * NODES; k++) (void)work_through(k % NODES);
        hang_up();
        T_EQ(stop(SIGTERM), 0);
        T_CHECK(judge() > last, "a round after the restoration");
        remove_tree(dir);
        remove_tree(copy);
    }
    printf("%d backups during %d tasks, of rounds %d to %d\n", BACKUPS, tasks, (int)first,
           (int)last);
    snprintf(dir, sizeof(dir), "%s", home);
    leave();
}

static void test_what_is_refused(void) {
    char copy[300];
    enter_stage(&stages[1]);
    copy_path(99, copy);
    T_EQ(COMMAND(NULL, 0, "backup", root, copy), 1); // no coordinator
    T_EQ(COMMAND(NULL, 0, "backup", dir, dir), 1);   // there is one
    T_EQ(COMMAND(NULL, 0, "backup", dir), 2);
    T_EQ(COMMAND(NULL, 0, "backup", dir, copy), 0);
    char path[COORD_PATH_MAX];
    snprintf(path, sizeof(path), "%s/state.db", copy);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t byte = 0;
    T_NEED(fd >= 0 && pread(fd, &byte, 1, 9000) == 1, "a byte");
    byte ^= 1;
    T_NEED(pwrite(fd, &byte, 1, 9000) == 1, "a byte");
    close(fd);
    snprintf(path, sizeof(path), "%s-again", copy);
    T_EQ(COMMAND(NULL, 0, "restore", copy, path), 1);
    T_CHECK(!fl_file_exists(path), "nothing is made of a damaged backup");
    remove_tree(copy);
    leave();
}

int main(int argc, char **argv) {
    static const t_case cases[] = {{"while_it_runs", test_while_it_runs},
                                   {"what_is_refused", test_what_is_refused}};
    choose_folder();
    if (setjmp(t_leave) != 0) return 1;
    find_preload();
    make_stages();
    return t_main(argc, argv, cases, FL_COUNT(cases));
}
