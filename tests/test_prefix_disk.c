// Goal: what the prefix cache keeps on disk is unreadable without this process, nameless, and never
// trusted: a flipped bit, a cut file, an old or a moved entry, a full disk are misses. Method: the
// nameless file is read and damaged through /proc; limits and faults make writes fall short;
// training over a store that is damaged at every step has the bits of training without one.
#include "common/fault.h"
#include "node/prefix_disk.h"
#include "tests/tune_rig.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define FOLDER "test_prefix_disk.tmp"
#define LEFT   FOLDER "/fleetune-prefix.tmp"
enum { SIZE = 5000, SEALED = SIZE + 16, PLACES = 6 };

static const node_prefix_shape shape = {
    .batches = PLACES, .store_places = PLACES, .entry_size = SIZE};

// The store's file, which has no name any more, opened once more by number. -1: there is none.
static int reopen(void) {
    for (int fd = 3; fd < 64; fd++) {
        char link[64], target[512];
        snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
        const ssize_t n = readlink(link, target, sizeof(target) - 1);
        if (n < 0) continue;
        target[n] = '\0';
        if (strstr(target, "fleetune-prefix.tmp (deleted)") != NULL) return open(link, O_RDWR);
    }
    return -1;
}

static node_prefix_disk *open_disk(void) {
    node_prefix_disk *d = NULL;
    fl_err err;
    mkdir(FOLDER, 0700);
    T_OK(node_prefix_disk_open(FOLDER, &shape, &d, &err), err);
    return d;
}

static void fill(uint8_t *entry, uint32_t what) {
    for (uint32_t i = 0; i < SIZE; i++) entry[i] = (uint8_t)(i * 37 + what * 101 + i / 256);
}

static bool put(node_prefix_disk *d, uint32_t place, uint32_t what) {
    uint8_t entry[SEALED];
    const node_prefix_store s = node_prefix_disk_store(d);
    fill(entry, what);
    return s.put(s.self, place, entry, SIZE);
}

// Given back, and then exactly as it was.
static bool get(node_prefix_disk *d, uint32_t place, uint32_t what) {
    uint8_t entry[SEALED], want[SEALED];
    const node_prefix_store s = node_prefix_disk_store(d);
    fill(want, what);
    memset(entry, 0xaa, sizeof(entry));
    if (!s.get(s.self, place, entry, SIZE)) return false;
    T_CHECK(memcmp(entry, want, SIZE) == 0, "place %u", place);
    return true;
}

static void test_entries_come_back(void) {
    node_prefix_disk *d = open_disk();
    for (uint32_t i = 0; i < PLACES; i++) T_CHECK(!get(d, i, i), "nothing is there yet");
    for (uint32_t i = PLACES; i-- > 0;) T_CHECK(put(d, i, i), "%u", i);
    for (uint32_t round = 0; round < 2; round++)
        for (uint32_t i = 0; i < PLACES; i++) T_CHECK(get(d, i, i), "%u", i);
    T_EQ(node_prefix_disk_written(d), PLACES * SEALED);
    T_CHECK(put(d, 3, 77) && get(d, 3, 77), "over an older one");
    T_EQ(node_prefix_disk_written(d), (PLACES + 1) * SEALED);
    node_prefix_disk_close(d);
}

static void test_nothing_has_a_name(void) {
    mkdir(FOLDER, 0700);
    const int left = open(LEFT, O_CREAT | O_WRONLY, 0600); // of a process that died just then
    T_CHECK(left >= 0 && write(left, "old", 3) == 3, "a file");
    close(left);
    node_prefix_disk *d = open_disk(), *other = open_disk();
    T_CHECK(access(LEFT, F_OK) != 0, "removed");
    T_CHECK(put(d, 0, 1) && put(other, 0, 2), "two at a time");
    T_CHECK(get(d, 0, 1) && get(other, 0, 2), "each its own");
    T_CHECK(rmdir(FOLDER) == 0, "the folder is empty while they run");
    node_prefix_disk_close(d);
    node_prefix_disk_close(other);
    T_EQ(reopen(), -1);
    // A link of that name is removed, not followed.
    mkdir(FOLDER, 0700);
    const int target = open(FOLDER "/precious", O_CREAT | O_WRONLY, 0600);
    close(target);
    T_EQ(symlink("precious", LEFT), 0);
    d = open_disk();
    T_CHECK(access(FOLDER "/precious", F_OK) == 0 && access(LEFT, F_OK) != 0, "not followed");
    node_prefix_disk_close(d);
    unlink(FOLDER "/precious");
    fl_err err;
    T_EQ(node_prefix_disk_open("no-such-folder", &shape, &d, &err), FL_EIO);
    T_CHECK(strstr(err.text, "no-such-folder") != NULL, "%s", err.text);
}

static void test_what_lies_there_is_noise(void) {
    node_prefix_disk *d = open_disk();
    static uint8_t bytes[PLACES * SEALED + 1], plain[SEALED];
    for (uint32_t i = 0; i < PLACES; i++) put(d, i, 5); // the same text everywhere
    const int fd = reopen();
    T_NEED(fd >= 0, "the file");
    struct stat st;
    T_EQ(fstat(fd, &st), 0);
    T_EQ(st.st_mode & 0777, 0600);
    T_EQ(st.st_nlink, 0);
    T_EQ(pread(fd, bytes, sizeof(bytes), 0), PLACES * SEALED);
    fill(plain, 5);
    uint32_t count[256] = {0};
    for (size_t i = 0; i < PLACES * SEALED; i++) count[bytes[i]]++;
    for (size_t i = 0; i + 8 <= SIZE; i += 8)
        T_CHECK(memmem(bytes, PLACES * SEALED, plain + i, 8) == NULL, "plain at %zu", i);
    for (size_t i = 0; i + 8 <= SEALED; i += 8) // and no two places look alike
        T_CHECK(memmem(bytes + SEALED, (PLACES - 1) * SEALED, bytes + i, 8) == NULL, "again");
    const double mean = PLACES * SEALED / 256.0; // every byte about equally often: 7 sigma
    for (int b = 0; b < 256; b++) T_NEAR(count[b], mean, 7 * sqrt(mean), "byte %d", b);
    close(fd);
    node_prefix_disk_close(d);
}

static void test_damage_is_a_miss(void) {
    node_prefix_disk *d = open_disk();
    uint8_t byte, old[SEALED], one[SEALED];
    for (uint32_t i = 0; i < PLACES; i++) put(d, i, i);
    const int fd = reopen();
    T_NEED(fd >= 0, "the file");
    for (uint32_t bit = 0; bit < SEALED * 8; bit += bit < 64 || bit > SIZE * 8 ? 1 : 613) {
        const off_t at = 2 * SEALED + bit / 8;
        T_EQ(pread(fd, &byte, 1, at), 1);
        byte ^= (uint8_t)(1 << bit % 8);
        T_EQ(pwrite(fd, &byte, 1, at), 1);
        T_CHECK(!get(d, 2, 2), "bit %u", bit);
        byte ^= (uint8_t)(1 << bit % 8);
        T_EQ(pwrite(fd, &byte, 1, at), 1);
    }
    T_CHECK(get(d, 2, 2) && get(d, 1, 1) && get(d, 3, 3), "whole again, and the others were");
    // Moved to another place; an older one of the same place put back.
    T_EQ(pread(fd, one, SEALED, 1 * SEALED), SEALED);
    T_EQ(pwrite(fd, one, SEALED, 4 * SEALED), SEALED);
    T_CHECK(!get(d, 4, 4) && !get(d, 4, 1), "moved");
    T_EQ(pread(fd, old, SEALED, 2 * SEALED), SEALED);
    T_CHECK(put(d, 2, 50) && get(d, 2, 50), "a newer one");
    T_EQ(pwrite(fd, old, SEALED, 2 * SEALED), SEALED);
    T_CHECK(!get(d, 2, 2) && !get(d, 2, 50), "old");
    for (off_t size = PLACES * SEALED - 1; size >= 5 * SEALED; size -= 701) {
        T_EQ(ftruncate(fd, size), 0);
        T_CHECK(!get(d, 5, 5), "cut to %lld", (long long)size);
    }
    T_CHECK(put(d, 5, 6) && get(d, 5, 6), "kept anew");
    close(fd);
    node_prefix_disk_close(d);
}

static void with_file_limit(node_prefix_disk *d, rlim_t size) {
    struct rlimit was, limit;
    getrlimit(RLIMIT_FSIZE, &was);
    limit = was;
    limit.rlim_cur = size;
    T_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
    for (uint32_t i = 0; i < PLACES; i++)
        T_CHECK(put(d, i, i) == ((i + 1) * SEALED <= size), "place %u, limit %u", i,
                (unsigned)size);
    setrlimit(RLIMIT_FSIZE, &was);
    for (uint32_t i = 0; i < PLACES; i++)
        T_CHECK(get(d, i, i) == ((i + 1) * SEALED <= size), "place %u, limit %u", i,
                (unsigned)size);
}

static void test_a_full_disk_keeps_what_fits(void) {
    signal(SIGXFSZ, SIG_IGN);
    for (rlim_t size = 0; size <= 3 * SEALED; size += SEALED / 2 - 3) { // short writes too
        node_prefix_disk *d = open_disk();
        with_file_limit(d, size);
        T_CHECK(node_prefix_disk_written(d) <= size, "%llu",
                (unsigned long long)node_prefix_disk_written(d));
        for (uint32_t i = 0; i < PLACES; i++) T_CHECK(put(d, i, 9) && get(d, i, 9), "room again");
        node_prefix_disk_close(d);
    }
    if (mount("none", FOLDER, "tmpfs", 0, "size=12k") != 0) // three pages: two entries and a half
        T_SKIP("no right to mount a small file system");
    node_prefix_disk *d = open_disk();
    uint32_t kept = 0;
    for (uint32_t i = 0; i < PLACES; i++) {
        const bool ok = put(d, i, i);
        kept += ok;
        T_CHECK(get(d, i, i) == ok, "place %u", i);
    }
    T_EQ(kept, 2);
    node_prefix_disk_close(d);
    T_EQ(umount(FOLDER), 0);
}

static void test_every_failure(void) {
#ifdef FL_FAULTS
    unsigned n = 0;
    bool fired;
    do {
        node_prefix_disk *d = NULL;
        fl_fault_arm(++n);
        const fl_status st = node_prefix_disk_open(FOLDER, &shape, &d, NULL);
        bool stored = st == FL_OK, back = false;
        if (st == FL_OK) {
            stored = put(d, 1, 1);
            back = get(d, 1, 1);
        }
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st == FL_OK && stored && back) == !fired, "fault %u: %s", n, fl_status_name(st));
        T_CHECK(st == FL_OK || d == NULL, "fault %u", n);
        node_prefix_disk_close(d);
    } while (fired && n < 100);
    T_CHECK(n >= 4, "%u", n);
#else
    T_SKIP("built without faults");
#endif
}

// Flips a bit somewhere in the file, or cuts it short.
static void damage(void) {
    const int fd = reopen();
    struct stat st;
    if (fd < 0) return;
    uint8_t byte;
    if (fstat(fd, &st) == 0 && st.st_size > 0) {
        const off_t at = (off_t)(t_rand() % (uint64_t)st.st_size);
        if (t_rand() % 5 == 0) {
            T_EQ(ftruncate(fd, at), 0);
        } else if (pread(fd, &byte, 1, at) == 1) {
            byte ^= (uint8_t)(1 << t_rand() % 8);
            T_EQ(pwrite(fd, &byte, 1, at), 1);
        }
    }
    close(fd);
}

static uint8_t *train(bool with, bool harm, uint64_t *ret_hits, size_t *ret_size) {
    t_seed = 77;
    rig *r = rig_open(&tiny_default);
    node_tune_opts o = small_opts();
    node_prefix_home home = {0};
    node_tune_report report;
    fl_err err;
    o.prefix_bytes = with ? 5000 : 0; // a few in memory, the rest on disk
    o.prefix_disk = with ? 1 << 30 : 0;
    rig_bind(r, &o);
    if (with) {
        T_EQ(r->plan.prefix.store_places, r->plan.batches);
        T_OK(node_prefix_home_open(&r->plan.prefix, FOLDER, &home, &err), err);
        node_tuner_use_prefix(&r->tuner, &home.prefix);
    }
    t_seed = 5;
    for (uint32_t i = 0; i < 4 * r->plan.batches; i++) {
        node_tuner_step(&r->tuner, &report);
        if (harm) damage();
    }
    *ret_hits = home.prefix.hits;
    if (with && !harm) {
        T_EQ(home.prefix.hits, 3 * r->plan.batches);
        T_EQ(node_prefix_disk_written(home.disk),
             (r->plan.batches - r->plan.prefix.places) *
                 (r->plan.prefix.entry_size + NODE_PREFIX_ROOM));
    }
    uint8_t *bytes = bytes_of(r->adapter, ret_size);
    node_prefix_home_close(&home);
    rig_close(r);
    return bytes;
}

static void test_training_over_a_damaged_file(void) {
    uint64_t none, whole, hurt;
    size_t size, other;
    mkdir(FOLDER, 0700);
    uint8_t *want = train(false, false, &none, &size);
    uint8_t *got = train(true, false, &whole, &other);
    T_CHECK(other == size && memcmp(want, got, size) == 0, "the same bits");
    free(got);
    got = train(true, true, &hurt, &other);
    T_CHECK(other == size && memcmp(want, got, size) == 0, "the same bits, damaged");
    T_CHECK(none == 0 && hurt > 0 && hurt < whole, "%llu of %llu", (unsigned long long)hurt,
            (unsigned long long)whole);
    free(got);
    free(want);
    rmdir(FOLDER);
}

T_MAIN({"entries_come_back", test_entries_come_back},
       {"nothing_has_a_name", test_nothing_has_a_name},
       {"what_lies_there_is_noise", test_what_lies_there_is_noise},
       {"damage_is_a_miss", test_damage_is_a_miss},
       {"a_full_disk_keeps_what_fits", test_a_full_disk_keeps_what_fits},
       {"every_failure", test_every_failure},
       {"training_over_a_damaged_file", test_training_over_a_damaged_file})
