// Goal: a bit that turns on the coordinator's disk is found by verify or at the start; nothing is
// ever trained on that is not, bit for bit, what was stored.
// Method: states with closed rounds, moments, a vote and an open buffer, one of a coordinator that
// was stopped and one of one that was killed, whose log of the database is still there. In each
// copy one bit of one file is turned: any file, any place. Then the state is opened and verified.
// Where that finds nothing, the judge (rig.h) computes every layer again from what the nodes sent,
// and every row of the database is compared with the undamaged one's: there must be no difference,
// but for one: the log of a killed coordinator may lose its end, as if the power had gone
// (docs/TESTING.md).
#include "tests/durability/crash_stages.h"

#include <sqlite3.h>

enum { FLIPS = 2000, FILES_MAX = 256 };

typedef struct victim {
    char path[300]; // from the folder on
    uint64_t size;
} victim;
static victim victims[FILES_MAX];
static size_t victim_count;

static void list_files(const char *folder, const char *name) {
    char path[COORD_PATH_MAX];
    struct stat s;
    DIR *d = opendir(folder);
    T_NEED(d != NULL, "%s", folder);
    for (const struct dirent *e; (e = readdir(d)) != NULL;) {
        const size_t n = strlen(e->d_name);
        if (e->d_name[0] == '.' || (n > 4 && strcmp(e->d_name + n - 4, "-shm") == 0)) continue;
        snprintf(path, sizeof(path), "%s/%s", folder, e->d_name);
        T_NEED(stat(path, &s) == 0 && victim_count < FILES_MAX, "%s", path);
        if (S_ISDIR(s.st_mode)) {
            if (strcmp(e->d_name, "keys") != 0) list_files(path, e->d_name); // owner's, with sums
            continue;
        }
        // Settings are the owner's text, and the lock is empty.
        if (s.st_size == 0 || strcmp(e->d_name, "coordinator.ini") == 0) continue;
        victim *v = &victims[victim_count++];
        snprintf(v->path, sizeof(v->path), "%s%s%s", name, name[0] == '\0' ? "" : "/", e->d_name);
        v->size = (uint64_t)s.st_size;
    }
    closedir(d);
}

// All rows of all tables, as one digest.
static void digest_rows(const char *folder, uint8_t ret[FL_HASH_SIZE]) {
    static const char *const tables[] = {"facts",  "nodes",   "tokens", "layers",  "layer_history",
                                         "rounds", "tasks",   "updates", "votes",  "reports",
                                         "events"};
    char path[300], sql[64];
    sqlite3 *db = NULL;
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){0}, FL_HASH_SIZE);
    snprintf(path, sizeof(path), "%s/state.db", folder);
    T_NEED(sqlite3_open_v2(path, &db, SQLITE_OPEN_READONLY, NULL) == SQLITE_OK, "%s", path);
    for (size_t t = 0; t < FL_COUNT(tables); t++) {
        sqlite3_stmt *st = NULL;
        snprintf(sql, sizeof(sql), "SELECT * FROM %s ORDER BY 1, 2", tables[t]);
        T_NEED(sqlite3_prepare_v2(db, sql, -1, &st, NULL) == SQLITE_OK, "%s", sql);
        while (sqlite3_step(st) == SQLITE_ROW) {
            for (int c = 0; c < sqlite3_column_count(st); c++) {
                const void *data = sqlite3_column_blob(st, c);
                fl_hash_add_framed(&h, (fl_bytes){data, (size_t)sqlite3_column_bytes(st, c)});
            }
        }
        sqlite3_finalize(st);
    }
    sqlite3_close(db);
    fl_hash_done(&h, ret);
}

static void turn_bit(const victim *v) {
    char path[COORD_PATH_MAX];
    uint8_t byte = 0;
    const uint64_t at = t_rand() % v->size;
    snprintf(path, sizeof(path), "%s/%s", dir, v->path);
    if (strncmp(v->path, "objects/", 8) == 0) { // a link: its bytes are others' too
        char copy[COORD_PATH_MAX + 8];
        snprintf(copy, sizeof(copy), "%s.copy", path);
        copy_file(path, copy);
        T_NEED(rename(copy, path) == 0, "copy");
    }
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    T_NEED(fd >= 0 && pread(fd, &byte, 1, (off_t)at) == 1, "%s", path);
    byte ^= (uint8_t)(1u << t_rand() % 8);
    T_NEED(pwrite(fd, &byte, 1, (off_t)at) == 1, "%s", path);
    close(fd);
}

static bool found(void) {
    coord_store *s = NULL;
    coord_verified v = {0};
    if (coord_store_open(dir, &s, NULL) != FL_OK) return true;
    const bool sick = coord_store_verify(s, NULL, NULL, &v, NULL) != FL_OK || v.problems != 0;
    coord_store_close(s);
    return sick;
}

// Did the log of the database only lose its end? Then every row that is left was stored so.
static bool only_shorter(const victim *v) {
    return strcmp(v->path, "state.db-wal") == 0;
}

static void flip_copies(const char *from, uint64_t copies, const char *what) {
    uint8_t want[FL_HASH_SIZE], got[FL_HASH_SIZE];
    char calm[300];
    uint64_t detected = 0, harmless = 0, shorter = 0, changed = 0;
    victim_count = 0;
    list_files(from, "");
    // Reading with another program must not move the log into the database: on a copy.
    snprintf(calm, sizeof(calm), "%s.calm", dir);
    copy_tree(from, calm, false);
    digest_rows(calm, want);
    remove_tree(calm);
    for (uint64_t i = 0; i < copies; i++) {
        const victim *v = &victims[t_rand() % victim_count];
        copy_tree(from, dir, false);
        turn_bit(v);
        if (found()) {
            detected++;
        } else {
            digest_rows(dir, got);
            const bool same = memcmp(got, want, sizeof(got)) == 0;
            if (same) {
                judge();
                harmless++;
            } else if (only_shorter(v)) {
                shorter++;
            } else {
                changed++;
                T_CHECK(false, "a bit of %s was not noticed", v->path);
            }
        }
        remove_tree(dir);
    }
    printf("%s: %llu bits turned: %llu found, %llu where nothing is stored, %llu ended the log of "
           "the database, %llu changed something unnoticed\n",
           what, (unsigned long long)copies, (unsigned long long)detected,
           (unsigned long long)harmless, (unsigned long long)shorter, (unsigned long long)changed);
    T_CHECK(detected > copies / 4, "the test turns bits that matter");
    T_EQ(changed, 0);
}

static const stage *stage_named(const char *name) {
    const stage *s = &stages[0];
    while (strcmp(s->name, name) != 0) s++;
    return s;
}

static uint64_t flips(void) {
    const char *text = getenv("FLEETUNE_FLIPS");
    return (text == NULL ? FLIPS : strtoull(text, NULL, 10)) / 2;
}

static void test_of_one_that_was_stopped(void) {
    const stage *s = stage_named("adam");
    enter_stage(s);
    remove_tree(dir);
    flip_copies(s->from, flips(), "stopped");
    leave();
}

static void test_of_one_that_was_killed(void) {
    char killed[300];
    enter_stage(stage_named("round"));
    start_whole();
    dial_all();
    for (int i = 0; i < NODES; i++) T_CHECK(work_through(i), "node %d has work", i);
    hang_up();
    stop(SIGKILL);
    snprintf(killed, sizeof(killed), "%s.killed", dir);
    copy_tree(dir, killed, false);
    remove_tree(dir);
    flip_copies(killed, flips(), "killed");
    remove_tree(killed);
    leave();
}

int main(int argc, char **argv) {
    static const t_case cases[] = {{"of_one_that_was_stopped", test_of_one_that_was_stopped},
                                   {"of_one_that_was_killed", test_of_one_that_was_killed}};
    choose_folder();
    if (setjmp(t_leave) != 0) return 1;
    find_preload();
    make_stages();
    return t_main(argc, argv, cases, FL_COUNT(cases));
}
