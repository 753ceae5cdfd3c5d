// Goal: files are old or new, never between; every piece of a pool's job runs exactly once; random
// numbers are the documented function. Method: every n-th system call fails in turn; counted
// pieces.
#include "common/fault.h"
#include "common/file.h"
#include "common/pool.h"
#include "common/rng.h"
#include "tests/check.h"

#include <dirent.h>
#include <stdatomic.h>
#include <sys/stat.h>

static char folder[64];

static void make_folder(void) {
    snprintf(folder, sizeof(folder), "/tmp/fleetune_test_XXXXXX");
    T_NEED(mkdtemp(folder) != NULL, "a temporary folder");
}

static fl_bytes text(const char *s) {
    return (fl_bytes){(const uint8_t *)s, strlen(s)};
}

static void test_file_round_trip(void) {
    make_folder();
    char path[128];
    snprintf(path, sizeof(path), "%s/x", folder);
    fl_err err;
    uint8_t *data = NULL;
    size_t size = 0;
    T_EQ(fl_file_read(path, 100, &data, &size, &err), FL_ENOENT);
    T_OK(fl_file_replace(path, text("hello"), &err), err);
    T_OK(fl_file_read(path, 5, &data, &size, &err), err);
    T_STR((const char *)data, "hello");
    free(data);
    T_EQ(fl_file_read(path, 4, &data, &size, &err), FL_ELIMIT);
    T_EQ(fl_file_read(folder, 4, &data, &size, &err), FL_EIO);
    fl_map map;
    T_OK(fl_map_open(path, &map, &err), err);
    T_EQ(map.bytes.size, 5);
    fl_map_close(&map);
    T_OK(fl_file_replace(path, text(""), &err), err);
    T_EQ(fl_map_open(path, &map, &err), FL_EFORMAT);
    unlink(path);
    rmdir(folder);
}

#ifdef FL_FAULTS
static int files_in_folder(void) {
    int n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *e = readdir(d); e != NULL; e = readdir(d)) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

static void test_replace_survives_every_failure(void) {
    make_folder();
    char path[128];
    snprintf(path, sizeof(path), "%s/state", folder);
    unsigned n = 0;
    do {
        fl_fault_arm(0);
        T_EQ(fl_file_replace(path, text("old"), NULL), FL_OK);
        fl_fault_arm(++n);
        const fl_status st = fl_file_replace(path, text("new and longer"), NULL);
        const bool fired = fl_fault_fired();
        fl_fault_arm(0);
        T_EQ(st != FL_OK, fired);
        uint8_t *data = NULL;
        size_t size = 0;
        T_EQ(fl_file_read(path, 100, &data, &size, NULL), FL_OK);
        const bool old = strcmp((const char *)data, "old") == 0;
        const bool fresh = strcmp((const char *)data, "new and longer") == 0;
        T_CHECK(old || fresh, "n=%u leaves \"%s\"", n, (const char *)data);
        T_CHECK(fresh || st != FL_OK, "n=%u: success but old content", n);
        free(data);
        T_EQ(files_in_folder(), 1);
        if (!fired) break;
    } while (n < 100);
    T_CHECK(n > 5 && n < 100, "%u fallible calls", n);
    unlink(path);
    rmdir(folder);
}
#endif

typedef struct counts {
    _Atomic int hits[1000];
    _Atomic unsigned worker_max;
} counts;

static void count(void *ctx, size_t begin, size_t end, unsigned worker) {
    counts *c = ctx;
    for (size_t i = begin; i < end; i++) atomic_fetch_add(&c->hits[i], 1);
    unsigned max = atomic_load(&c->worker_max);
    while (worker > max && !atomic_compare_exchange_weak(&c->worker_max, &max, worker)) {
    }
}

static void test_pool_runs_every_piece_once(void) {
    for (unsigned threads = 1; threads <= 4; threads++) {
        fl_pool *pool = NULL;
        fl_err err;
        T_OK(fl_pool_open(threads, &pool, &err), err);
        for (size_t rows = 0; rows <= 1000; rows += 37) {
            for (size_t grain = 1; grain < 70; grain += 16) {
                static counts c;
                memset(&c, 0, sizeof(c));
                fl_pool_run(pool, rows, grain, count, &c);
                for (size_t i = 0; i < 1000; i++) {
                    if (atomic_load(&c.hits[i]) != (i < rows))
                        T_CHECK(false, "threads=%u rows=%zu grain=%zu row=%zu", threads, rows,
                                grain, i);
                }
                T_CHECK(atomic_load(&c.worker_max) < threads, "%u", atomic_load(&c.worker_max));
            }
        }
        fl_pool_close(pool);
    }
    fl_pool_run(NULL, 0, 1, count, NULL);
    fl_pool *pool = NULL;
    T_EQ(fl_pool_open(0, &pool, NULL), FL_EARG);
    T_EQ(fl_pool_open(1000, &pool, NULL), FL_EARG);
}

static void test_rng_is_a_function(void) {
    T_CHECK(fl_rng_u64(1, 2) == fl_rng_u64(1, 2), "repeats");
    T_CHECK(fl_rng_u64(1, 2) != fl_rng_u64(2, 1), "key and counter differ in role");
    double sum = 0, squares = 0;
    enum { N = 100000 };
    for (uint64_t i = 0; i < N; i++) {
        const float u = fl_rng_unit(7, i);
        T_NEED(u >= 0.0f && u < 1.0f, "%f", (double)u);
        sum += (double)u;
        squares += (double)u * (double)u;
    }
    // Five standard errors of a uniform mean and of its second moment.
    T_NEAR(sum / N, 0.5, 5 * 0.2887 / sqrt(N), "mean");
    T_NEAR(squares / N, 1.0 / 3, 5 * 0.2981 / sqrt(N), "second moment");
    for (uint64_t i = 0; i < 1000; i++) T_NEED(fl_rng_below(3, i, 7) < 7, "below");
}

T_MAIN({"file_round_trip", test_file_round_trip},
#ifdef FL_FAULTS
       {"replace_survives_every_failure", test_replace_survives_every_failure},
#endif
       {"pool_runs_every_piece_once", test_pool_runs_every_piece_once},
       {"rng_is_a_function", test_rng_is_a_function})
