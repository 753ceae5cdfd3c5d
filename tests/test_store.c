// Goal: what the store says is durable is there after a kill at any instruction, and what is not
// whole is found.
// Method: every n-th fault in a whole life of a state; snapshots of the folder taken between the
// steps, opened as a restart would; every kind of altered byte shown to verify.
#include "common/crypto.h"
#include "common/fault.h"
#include "common/file.h"
#include "coordinator/store.h"
#include "tests/check.h"

#include <dirent.h>
#include <ftw.h>
#include <sys/stat.h>

static char root[256];
static unsigned folder_count;

static int remove_one(const char *path, const struct stat *s, int type, struct FTW *ftw) {
    (void)s, (void)type, (void)ftw;
    return remove(path);
}

static void remove_root(void) {
    nftw(root, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static const char *new_folder(void) {
    static char path[300];
    if (root[0] == '\0') {
        const char *base = getenv("TMPDIR");
        snprintf(root, sizeof(root), "%s/test_store.XXXXXX", base != NULL ? base : "/tmp");
        T_NEED(mkdtemp(root) != NULL, "a folder to work in");
        atexit(remove_root);
        T_NEED(fl_crypto_init(NULL) == FL_OK, "crypto");
    }
    snprintf(path, sizeof(path), "%s/%u", root, folder_count++);
    return path;
}

// What a kill leaves behind: the files as they are now (the page cache survives a kill).
static void copy_folder(const char *from, const char *to) {
    DIR *dir = opendir(from);
    T_NEED(dir != NULL && mkdir(to, 0700) == 0, "copy %s", from);
    for (const struct dirent *e; (e = readdir(dir)) != NULL;) {
        char a[600], b[600];
        uint8_t *data = NULL;
        size_t size = 0;
        if (e->d_name[0] == '.') continue;
        snprintf(a, sizeof(a), "%s/%s", from, e->d_name);
        snprintf(b, sizeof(b), "%s/%s", to, e->d_name);
        struct stat s;
        T_NEED(stat(a, &s) == 0, "%s", a);
        if (S_ISDIR(s.st_mode)) {
            copy_folder(a, b);
            continue;
        }
        T_NEED(fl_file_read(a, 1 << 26, &data, &size, NULL) == FL_OK, "read %s", a);
        FILE *f = fopen(b, "wb");
        T_NEED(f != NULL && fwrite(data, 1, size, f) == size, "write %s", b);
        fclose(f);
        free(data);
    }
    closedir(dir);
}

static coord_node_row a_node(uint8_t n) {
    coord_node_row row = {.state = COORD_NODE_PENDING, .joined_s = 100};
    snprintf(row.name, sizeof(row.name), "node-%u", n);
    memset(row.sign_key, n, sizeof(row.sign_key));
    memset(row.transport_key, 0x80 | n, sizeof(row.transport_key));
    return row;
}

static coord_update_row an_update(uint32_t layer, int64_t base, int64_t task) {
    return (coord_update_row){.task = task,
                              .node = 1,
                              .layer = layer,
                              .base = base,
                              .sequence = base * 10 + layer + 1,
                              .tokens = 1000,
                              .weight = 65536000,
                              .clip = 65536,
                              .norm = 1.25};
}

// One round of a life, every step of it fallible: join, task, two spooled updates, flush.
static fl_status live(coord_store *s, int64_t round, int64_t *acked, fl_err *err) {
    int64_t task = 0;
    uint8_t payload[300];
    memset(payload, (int)round, sizeof(payload));
    FL_TRY(coord_store_begin(s, err));
    if (round == 1) {
        const coord_node_row node = a_node(1);
        int64_t id = 0;
        FL_TRY(coord_store_add_node(s, &node, &id, err));
        FL_TRY(coord_store_set_node_state(s, id, COORD_NODE_ACTIVE, err));
        FL_TRY(coord_store_add_layers(s, 2, err));
    }
    FL_TRY(coord_store_open_round(s, round, 1000 + round, err));
    FL_TRY(coord_store_last_task(s, &task, err));
    const coord_task_row task_row = {.task = ++task, .node = 1, .round = round, .last = 1};
    FL_TRY(coord_store_add_task(s, &task_row, err));
    FL_TRY(coord_store_commit(s, err));
    for (uint32_t layer = 0; layer < 2; layer++) {
        coord_update_row u = an_update(layer, round - 1, task);
        FL_TRY(coord_store_begin(s, err));
        FL_TRY(coord_store_spool(s, round, (fl_bytes){payload, 100 + 50 * layer}, &u.at, err));
        FL_TRY(coord_store_pin_layer(s, layer, 40, err));
        FL_TRY(coord_store_add_update(s, &u, err));
        FL_TRY(coord_store_commit(s, err));
        (*acked)++;
    }
    coord_layer_row row = {.layer = 1, .version = round, .count = 40, .size = 300, .round = round};
    FL_TRY(coord_store_put_object(s, (fl_bytes){payload, sizeof(payload)}, row.digest, err));
    FL_TRY(coord_store_begin(s, err));
    FL_TRY(coord_store_set_layer(s, &row, 1, err));
    row.layer = 0;
    FL_TRY(coord_store_set_layer(s, &row, 1, err));
    FL_TRY(coord_store_fold_updates(s, round, err));
    FL_TRY(coord_store_close_task(s, task, round, err));
    const coord_round_row closed = {
        .round = round, .closed_s = 2000, .contributions = 1, .updates = 2, .loss = (double)NAN};
    FL_TRY(coord_store_close_round(s, &closed, err));
    FL_TRY(coord_store_commit(s, err));
    return coord_store_sweep(s, err);
}

static void print_problem(void *ctx, const char *text) {
    (void)ctx;
    fprintf(stderr, "problem: %s\n", text);
}

static int64_t problems(coord_store *s, bool print) {
    coord_verified v = {0};
    fl_err err;
    T_OK(coord_store_verify(s, print ? print_problem : NULL, NULL, &v, &err), err);
    return v.problems;
}

static void test_create_once(void) {
    fl_err err;
    coord_store *s = NULL;
    char dir[300];
    snprintf(dir, sizeof(dir), "%s", new_folder());
    T_EQ(coord_store_open(dir, &s, &err), FL_ENOENT);
    T_CHECK(s == NULL, "nothing opened");
    T_OK(coord_store_create(dir, &err), err);
    T_EQ(coord_store_create(dir, &err), FL_ESTATE);
    T_OK(coord_store_open(dir, &s, &err), err);
    T_EQ(problems(s, true), 0);
    coord_store_close(s);
    coord_store_close(NULL);
    T_EQ(coord_store_create("/nonexistent/deep/dir", &err), FL_ENOENT);
}

static void test_nodes_and_tokens(void) {
    fl_err err;
    coord_store *s = NULL;
    const char *dir = new_folder();
    T_OK(coord_store_create(dir, &err), err);
    T_OK(coord_store_open(dir, &s, &err), err);
    int64_t id = 0;
    for (uint8_t n = 1; n <= 3; n++) {
        const coord_node_row row = a_node(n);
        T_OK(coord_store_add_node(s, &row, &id, &err), err);
        T_EQ(id, n);
        T_EQ(coord_store_add_node(s, &row, &id, &err), FL_ESTATE);
    }
    coord_node_row found;
    T_OK(coord_store_find_node(s, "2", &found, &err), err);
    T_STR(found.name, "node-2");
    T_OK(coord_store_find_node(s, "node-3", &found, &err), err);
    T_EQ(found.id, 3);
    T_OK(coord_store_find_node(s, "0101010101", &found, &err), err);
    T_EQ(found.id, 1);
    T_EQ(coord_store_find_node(s, "0101", &found, &err), FL_ENOENT); // too short for a key
    T_EQ(coord_store_find_node(s, "", &found, &err), FL_ENOENT);
    T_EQ(coord_store_find_node(s, "4", &found, &err), FL_ENOENT);
    T_OK(coord_store_set_node_state(s, 1, COORD_NODE_ACTIVE, &err), err);
    T_OK(coord_store_set_node_state(s, 1, COORD_NODE_REVOKED, &err), err);
    T_OK(coord_store_set_node_state(s, 1, COORD_NODE_REVOKED, &err), err);
    T_EQ(coord_store_set_node_state(s, 1, COORD_NODE_ACTIVE, &err), FL_ESTATE);
    T_EQ(coord_store_set_node_state(s, 9, COORD_NODE_ACTIVE, &err), FL_ENOENT);

    const uint8_t token[COORD_TOKEN_ID] = {7}, key[COORD_KEY] = {9}, other[COORD_TOKEN_ID] = {8};
    coord_token_row t;
    bool open = false;
    T_OK(coord_store_add_token(s, token, key, 2, true, &err), err);
    T_EQ(coord_store_find_token(s, other, &t, &err), FL_ENOENT);
    T_OK(coord_store_use_token(s, token, &err), err);
    T_OK(coord_store_find_token(s, token, &t, &err), err);
    T_CHECK(t.uses == 1 && t.auto_approve && t.key[0] == 9, "uses %lld", (long long)t.uses);
    T_OK(coord_store_use_token(s, token, &err), err);
    T_EQ(coord_store_use_token(s, token, &err), FL_EAUTH);
    T_EQ(coord_store_use_token(s, other, &err), FL_EAUTH);
    T_OK(coord_store_enrolling(s, &open, &err), err);
    T_CHECK(open, "nodes 2 and 3 wait");
    for (int64_t n = 2; n <= 3; n++)
        T_OK(coord_store_set_node_state(s, n, COORD_NODE_ACTIVE, &err), err);
    T_OK(coord_store_enrolling(s, &open, &err), err);
    T_CHECK(!open, "nobody may join");
    coord_store_close(s);
}

static void test_ledger_counts_once(void) {
    fl_err err;
    coord_store *s = NULL;
    const char *dir = new_folder();
    int64_t acked = 0;
    T_OK(coord_store_create(dir, &err), err);
    T_OK(coord_store_open(dir, &s, &err), err);
    for (int64_t round = 1; round <= 3; round++) T_OK(live(s, round, &acked, &err), err);
    coord_seen seen;
    T_OK(coord_store_seen_update(s, 1, 1, 2, 22, &seen, &err), err);
    T_EQ(seen, COORD_SEEN_SAME);
    T_OK(coord_store_seen_update(s, 1, 1, 2, 23, &seen, &err), err);
    T_EQ(seen, COORD_SEEN_OTHER);
    T_OK(coord_store_seen_update(s, 1, 1, 3, 22, &seen, &err), err);
    T_EQ(seen, COORD_SEEN_NEW);
    const coord_update_row twice = an_update(1, 2, 1);
    T_EQ(coord_store_add_update(s, &twice, &err), FL_ESTATE);
    T_EQ(coord_store_pin_layer(s, 0, 41, &err), FL_ESTATE);
    const coord_round_row again = {.round = 3, .closed_s = 1};
    T_EQ(coord_store_close_round(s, &again, &err), FL_ESTATE);
    coord_layer_row row = {.layer = 0, .version = 3};
    T_EQ(coord_store_set_layer(s, &row, 1, &err), FL_ESTATE); // a version is never made twice
    row.version = 5;
    T_EQ(coord_store_set_layer(s, &row, 1, &err), FL_ESTATE);
    coord_layer_row rows[4];
    size_t count = 0;
    T_OK(coord_store_layers(s, rows, 4, &count, &err), err);
    T_EQ(count, 2);
    T_EQ(rows[1].version, 3);
    T_EQ(rows[1].count, 40);
    coord_round_row rounds[2];
    T_OK(coord_store_rounds(s, rounds, 2, &count, &err), err);
    T_EQ(count, 2);
    T_EQ(rounds[0].round, 2);
    T_CHECK(isnan(rounds[0].loss), "no loss was reported");
    T_EQ(problems(s, true), 0);
    coord_store_close(s);
}

// A round's loss is of what all its nodes reported, also after its end, each counted once.
static void test_loss_of_a_round(void) {
    fl_err err;
    coord_store *s = NULL;
    const char *dir = new_folder();
    T_OK(coord_store_create(dir, &err), err);
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_open_round(s, 1, 100, &err), err);
    coord_report_row report = {.node = 1, .sequence = 1, .round = 1, .tokens = 100};
    report.nll_voted = 400 << 20;
    T_OK(coord_store_add_report(s, &report, &err), err);
    const coord_round_row closed = {.round = 1, .closed_s = 200, .loss = 4.0};
    T_OK(coord_store_close_round(s, &closed, &err), err);
    T_OK(coord_store_open_round(s, 2, 200, &err), err);
    report = (coord_report_row){
        .node = 2, .sequence = 1, .round = 1, .tokens = 300, .nll_voted = 600 << 20};
    T_OK(coord_store_add_report(s, &report, &err), err);
    report = (coord_report_row){
        .node = 1, .sequence = 2, .round = 1, .tokens = 100, .nll_voted = 200 << 20};
    T_OK(coord_store_add_report(s, &report, &err), err);
    report.round = 3; // of no round here
    report.sequence = 3;
    T_OK(coord_store_add_report(s, &report, &err), err);
    coord_round_row rounds[2];
    size_t count = 0;
    T_OK(coord_store_rounds(s, rounds, 2, &count, &err), err);
    T_EQ(count, 2);
    T_CHECK(rounds[0].loss == 2.0, "(600 + 200) / (300 + 100) nats, not %g", rounds[0].loss);
    T_CHECK(isnan(rounds[1].loss), "nobody reported of round 2: %g", rounds[1].loss);
    coord_store_close(s);
}

static void test_votes_reports_values_events(void) {
    fl_err err;
    coord_store *s = NULL;
    const char *dir = new_folder();
    T_OK(coord_store_create(dir, &err), err);
    T_OK(coord_store_open(dir, &s, &err), err);
    coord_vote_row vote = {.version = 1, .exits = 2, .weights = {0.25, 0.75}, .loss = 3.5}, got;
    T_EQ(coord_store_last_vote(s, &got, &err), FL_ENOENT);
    T_OK(coord_store_add_vote(s, &vote, &err), err);
    T_OK(coord_store_last_vote(s, &got, &err), err);
    T_CHECK(got.exits == 2 && got.weights[1] == 0.75 && got.loss == 3.5, "%g", got.weights[1]);
    T_EQ(coord_store_add_vote(s, &vote, &err), FL_ESTATE);
    coord_report_row report = {.node = 1, .sequence = 5, .tokens = 10, .exits = 2, .nll = {1, -2}};
    T_OK(coord_store_add_report(s, &report, &err), err);
    T_EQ(coord_store_add_report(s, &report, &err), FL_ESTATE);
    report.sequence = 4;
    T_EQ(coord_store_add_report(s, &report, &err), FL_ESTATE);
    uint8_t value[8];
    size_t size = 0;
    T_EQ(coord_store_get_value(s, "x", value, 8, &size, &err), FL_ENOENT);
    T_OK(coord_store_put_value(s, "x", (fl_bytes){(const uint8_t *)"abc", 3}, &err), err);
    T_EQ(coord_store_get_value(s, "x", value, 2, &size, &err), FL_ELIMIT);
    T_OK(coord_store_get_value(s, "x", value, 8, &size, &err), err);
    T_CHECK(size == 3 && memcmp(value, "abc", 3) == 0, "size %zu", size);
    for (int i = 0; i < 20; i++) {
        char text[32];
        snprintf(text, sizeof(text), "event\n%d", i);
        T_OK(coord_store_add_event(s, i, "test", 0, text, &err), err);
    }
    T_OK(coord_store_trim_events(s, 5, &err), err);
    coord_event_row events[10];
    T_OK(coord_store_events(s, events, 10, &size, &err), err);
    T_EQ(size, 5);
    T_STR(events[4].text, "event?19");
    coord_store_close(s);
}

static void test_another_process_is_noticed(void) {
    fl_err err;
    coord_store *daemon = NULL, *command = NULL;
    const char *dir = new_folder();
    bool changed = true;
    T_OK(coord_store_create(dir, &err), err);
    T_OK(coord_store_open(dir, &daemon, &err), err);
    T_OK(coord_store_open(dir, &command, &err), err);
    T_OK(coord_store_changed(daemon, &changed, &err), err);
    T_CHECK(!changed, "nothing happened");
    const coord_node_row row = a_node(1);
    int64_t id = 0;
    T_OK(coord_store_add_node(command, &row, &id, &err), err);
    T_OK(coord_store_changed(daemon, &changed, &err), err);
    T_CHECK(changed, "the other one wrote");
    T_OK(coord_store_set_node_state(daemon, id, COORD_NODE_ACTIVE, &err), err);
    T_OK(coord_store_changed(daemon, &changed, &err), err);
    T_CHECK(!changed, "its own writes do not count");
    coord_store_close(command);
    coord_store_close(daemon);
}

// Everything acknowledged is there when the folder is opened as it lay on the disk.
static fl_status count_update(void *ctx, const coord_update_row *row, fl_err *err) {
    (void)row, (void)err;
    (*(int64_t *)ctx)++;
    return FL_OK;
}

static void check_restart(const char *dir, int64_t acked_in_open_round, unsigned n) {
    coord_store *s = NULL;
    fl_err err;
    int64_t open = 0;
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(coord_store_each_open_update(s, count_update, &open, &err), err);
    T_CHECK(open >= acked_in_open_round, "n=%u: %lld acknowledged, %lld there", n,
            (long long)acked_in_open_round, (long long)open);
    T_CHECK(problems(s, true) == 0, "n=%u", n);
    coord_store_close(s);
}

#ifdef FL_FAULTS
// Every fallible call of two rounds fails once. Nothing acknowledged may be lost, and after the
// fault the same life can be lived on.
static void test_every_failure_leaves_a_whole_state(void) {
    unsigned n = 0;
    bool fired;
    do {
        fl_err err;
        coord_store *s = NULL;
        char dir[300];
        int64_t acked = 0, open = 0;
        snprintf(dir, sizeof(dir), "%s", new_folder());
        T_OK(coord_store_create(dir, &err), err);
        T_OK(coord_store_open(dir, &s, &err), err);
        T_OK(live(s, 1, &acked, &err), err);
        acked = 0;
        fl_fault_arm(++n);
        const fl_status st = live(s, 2, &acked, &err);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st == FL_OK) != fired, "n=%u status %d", n, (int)st);
        coord_store_rollback(s);
        T_OK(coord_store_each_open_update(s, count_update, &open, &err), err);
        coord_layer_row rows[2];
        size_t count = 0;
        T_OK(coord_store_layers(s, rows, 2, &count, &err), err);
        const bool flushed = rows[0].version == 2;
        T_EQ(rows[0].version, rows[1].version);
        T_CHECK(flushed ? open == 0 : open >= acked, "n=%u: %lld of %lld", n, (long long)open,
                (long long)acked);
        coord_store_close(s);
        check_restart(dir, flushed ? 0 : acked, n);
        nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    } while (fired);
    T_CHECK(n > 40, "only %u fallible calls", n);
}

static void test_create_survives_every_failure(void) {
    unsigned n = 0;
    bool fired;
    do {
        fl_err err;
        coord_store *s = NULL;
        char dir[300];
        snprintf(dir, sizeof(dir), "%s", new_folder());
        fl_fault_arm(++n);
        fl_status st = coord_store_create(dir, &err);
        if (st == FL_OK) st = coord_store_open(dir, &s, &err);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st == FL_OK) != fired, "n=%u status %d", n, (int)st);
        coord_store_close(s);
        s = NULL;
        st = coord_store_create(dir, &err); // half-made is made whole, whole is refused
        T_CHECK(st == FL_OK || st == FL_ESTATE, "n=%u: %s", n, err.text);
        T_OK(coord_store_open(dir, &s, &err), err);
        T_EQ(problems(s, true), 0);
        coord_store_close(s);
    } while (fired);
}
#endif

// The folder as a kill -9 would leave it, in the middle of a batch and between batches.
static void test_kill_in_the_middle(void) {
    fl_err err;
    coord_store *s = NULL;
    char dir[300], copy[320];
    int64_t acked = 0, task = 2;
    uint8_t payload[64] = {1, 2, 3};
    snprintf(dir, sizeof(dir), "%s", new_folder());
    T_OK(coord_store_create(dir, &err), err);
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(live(s, 1, &acked, &err), err);
    T_OK(coord_store_open_round(s, 2, 5, &err), err);
    const coord_task_row row = {.task = task, .node = 1, .round = 2, .last = 1};
    T_OK(coord_store_add_task(s, &row, &err), err);
    for (unsigned k = 0; k < 2; k++) {
        coord_update_row u = an_update(k, 1, task);
        T_OK(coord_store_begin(s, &err), err);
        T_OK(coord_store_spool(s, 2, (fl_bytes){payload, sizeof(payload)}, &u.at, &err), err);
        T_OK(coord_store_add_update(s, &u, &err), err);
        snprintf(copy, sizeof(copy), "%s-%u-before", dir, k);
        copy_folder(dir, copy); // spooled, not committed
        check_restart(copy, k, k);
        T_OK(coord_store_commit(s, &err), err);
        snprintf(copy, sizeof(copy), "%s-%u-after", dir, k);
        copy_folder(dir, copy);
        check_restart(copy, k + 1, k);
    }
    coord_store_close(s);
    // The tail that no row names is cut off, and its place is used again.
    snprintf(copy, sizeof(copy), "%s-1-before", dir);
    T_OK(coord_store_open(copy, &s, &err), err);
    coord_update_row u = an_update(1, 1, task);
    payload[0] = 77;
    T_OK(coord_store_begin(s, &err), err);
    T_OK(coord_store_spool(s, 2, (fl_bytes){payload, sizeof(payload)}, &u.at, &err), err);
    T_EQ(u.at.offset, sizeof(payload));
    T_OK(coord_store_add_update(s, &u, &err), err);
    T_OK(coord_store_commit(s, &err), err);
    T_EQ(problems(s, true), 0);
    coord_store_close(s);
}

static void flip(const char *path, size_t at) {
    FILE *f = fopen(path, "r+b");
    T_NEED(f != NULL, "open %s", path);
    fseek(f, (long)at, SEEK_SET);
    const int c = fgetc(f);
    fseek(f, (long)at, SEEK_SET);
    fputc(c ^ 0x10, f);
    fclose(f);
}

// Every byte of every object and of the spool, flipped: verify must find each.
static void test_verify_finds_every_flipped_byte(void) {
    fl_err err;
    coord_store *s = NULL;
    char dir[300], path[COORD_PATH_MAX];
    int64_t acked = 0, task = 2;
    uint8_t payload[40] = {4};
    snprintf(dir, sizeof(dir), "%s", new_folder());
    T_OK(coord_store_create(dir, &err), err);
    T_OK(coord_store_open(dir, &s, &err), err);
    T_OK(live(s, 1, &acked, &err), err);
    T_OK(coord_store_open_round(s, 2, 5, &err), err);
    const coord_task_row row = {.task = task, .node = 1, .round = 2, .last = 1};
    T_OK(coord_store_add_task(s, &row, &err), err);
    coord_update_row u = an_update(0, 1, task);
    T_OK(coord_store_begin(s, &err), err);
    T_OK(coord_store_spool(s, 2, (fl_bytes){payload, sizeof(payload)}, &u.at, &err), err);
    T_OK(coord_store_add_update(s, &u, &err), err);
    T_OK(coord_store_commit(s, &err), err);
    T_EQ(problems(s, true), 0);
    coord_layer_row rows[2];
    size_t count = 0;
    T_OK(coord_store_layers(s, rows, 2, &count, &err), err);
    coord_store_object_path(s, rows[0].digest, path);
    for (size_t at = 0; at < 300; at++) {
        flip(path, at);
        T_CHECK(problems(s, false) > 0, "byte %zu of an object", at);
        uint8_t *data = NULL;
        size_t size = 0;
        T_EQ(coord_store_get_object(s, rows[0].digest, 1000, &data, &size, &err), FL_EFORMAT);
        flip(path, at);
    }
    T_EQ(truncate(path, 299), 0);
    T_CHECK(problems(s, false) > 0, "an object cut short");
    T_EQ(unlink(path), 0);
    T_CHECK(problems(s, false) > 0, "an object gone");
    char spool[400];
    snprintf(spool, sizeof(spool), "%s/spool/2", dir);
    const int64_t before = problems(s, false);
    for (size_t at = 0; at < sizeof(payload); at++) {
        flip(spool, at);
        T_CHECK(problems(s, false) > before, "byte %zu of the spool", at);
        flip(spool, at);
    }
    coord_store_close(s);
}

static void test_a_foreign_file_is_refused(void) {
    fl_err err;
    coord_store *s = NULL;
    char dir[300], path[320];
    snprintf(dir, sizeof(dir), "%s", new_folder());
    T_OK(coord_store_create(dir, &err), err);
    snprintf(path, sizeof(path), "%s/state.db", dir);
    T_OK(fl_file_replace(path, (fl_bytes){(const uint8_t *)"not a database, not at all", 26}, &err),
         err);
    T_EQ(coord_store_open(dir, &s, &err), FL_EFORMAT);
}

T_MAIN({"create_once", test_create_once}, {"nodes_and_tokens", test_nodes_and_tokens},
       {"ledger_counts_once", test_ledger_counts_once}, {"loss_of_a_round", test_loss_of_a_round},
       {"votes_reports_values_events", test_votes_reports_values_events},
       {"another_process_is_noticed", test_another_process_is_noticed},
#ifdef FL_FAULTS
       {"every_failure_leaves_a_whole_state", test_every_failure_leaves_a_whole_state},
       {"create_survives_every_failure", test_create_survives_every_failure},
#endif
       {"kill_in_the_middle", test_kill_in_the_middle},
       {"verify_finds_every_flipped_byte", test_verify_finds_every_flipped_byte},
       {"a_foreign_file_is_refused", test_a_foreign_file_is_refused})
