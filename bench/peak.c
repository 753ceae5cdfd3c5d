#include "bench/peak.h"

#include "bench/peak_loops.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static const double SHARE_LEAST = 0.97;

static const struct {
    const char *name;
    uint32_t need;
} rates[] = {
#define X(name, need) {#name, need},
    BENCH_RATE_LIST(X)
#undef X
};

const char *bench_rate_name(bench_rate rate) {
    return rate == BENCH_NONE ? "-" : rates[rate].name;
}

bool bench_rate_here(bench_rate rate) {
    return rate < BENCH_RATES && (rates[rate].need & fl_cpu_detect()) == rates[rate].need;
}

bench_rate bench_rate_float(uint32_t need) {
#if defined(__x86_64__)
    if (need & FL_CPU_AVX512_BF16) return BENCH_vdpbf16ps_zmm;
    if (need & FL_CPU_AVX512_VNNI) return BENCH_fma_zmm;
    if (need & FL_CPU_AVX2) return BENCH_fma_ymm;
#elif defined(__aarch64__)
    if (need & FL_CPU_NEON) return BENCH_fmla;
#endif
    return BENCH_NONE;
}

bench_rate bench_rate_int8(uint32_t need) {
#if defined(__x86_64__)
    if (need & FL_CPU_AVX512_VNNI) return BENCH_vpdpbusd_zmm;
    if (need & FL_CPU_AVX2) return BENCH_maddubs_ymm;
#elif defined(__aarch64__)
    if (need & FL_CPU_DOTPROD) return BENCH_sdot;
    if (need & FL_CPU_NEON) return BENCH_smull;
#endif
    return BENCH_NONE;
}

typedef struct loop_ctx {
    bench_rate rate;
    size_t count;
} loop_ctx;

static void loop_piece(void *ctx, size_t piece, unsigned thread) {
    const loop_ctx *c = ctx;
    (void)piece, (void)thread;
    bench_loop(c->rate, c->count);
}

double bench_peak_sample(bench_team *team, bench_rate rate, double ms) {
    const unsigned threads = bench_team_threads(team);
    // A first guess of 100 GOP/s a thread; what is meant by `ms` need not be exact.
    loop_ctx c = {rate, (size_t)(ms * 1e8 / bench_loop_ops[rate]) + 1};
    const bench_job job = {.fn = loop_piece, .ctx = &c, .pieces = threads, .fixed = true};
    double share;
    const double s = bench_team_run(team, &job, 1, &share);
    if (share < SHARE_LEAST) return 0;
    return bench_loop_ops[rate] * (double)c.count * threads / s * 1e-9;
}

typedef struct read_ctx {
    const uint8_t *data;
    size_t part, passes;
} read_ctx;

static void read_piece(void *ctx, size_t piece, unsigned thread) {
    const read_ctx *c = ctx;
    (void)thread;
    for (size_t i = 0; i < c->passes; i++) bench_loop_read(c->data + piece * c->part, c->part);
}

double bench_read_sample(bench_team *team, const void *data, size_t size, size_t passes) {
    const unsigned threads = bench_team_threads(team);
    read_ctx c = {data, size / threads / 512 * 512, passes};
    const bench_job job = {.fn = read_piece, .ctx = &c, .pieces = threads, .fixed = true};
    double share;
    const double s = bench_team_run(team, &job, 1, &share);
    if (share < SHARE_LEAST) return 0;
    return (double)(c.part * threads * passes) / s * 1e-9;
}

static void *file_pages(size_t size) {
    char path[256];
    const char *folder = getenv("TMPDIR");
    snprintf(path, sizeof(path), "%s/fleetune-bench-XXXXXX", folder == NULL ? "/tmp" : folder);
    const int fd = mkstemp(path);
    if (fd < 0 || unlink(path) != 0 || ftruncate(fd, (off_t)size) != 0) {
        perror("a file to map");
        exit(1);
    }
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return p;
}

bench_memory bench_memory_open(bench_pages pages, size_t size) {
    bench_memory m = {.size = size};
    void *p = pages == BENCH_PAGES_FILE
                  ? file_pages(size)
                  : mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        perror("memory to read");
        exit(1);
    }
    if (pages == BENCH_PAGES_SMALL) (void)madvise(p, size, MADV_NOHUGEPAGE);
    if (pages == BENCH_PAGES_HUGE) (void)madvise(p, size, MADV_HUGEPAGE);
    m.data = memset(p, 1, size);
    return m;
}

void bench_memory_close(bench_memory *m) {
    if (m->data != NULL) munmap(m->data, m->size);
    m->data = NULL;
}

// sysconf may count the caches of processors that a virtual machine does not have.
size_t bench_cache_size(int level) {
    for (int i = 0; i < 8; i++) {
        char path[96];
        int found = 0;
        unsigned long size = 0;
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/level", i);
        FILE *f = fopen(path, "r");
        if (f == NULL) break;
        if (fscanf(f, "%d", &found) != 1) found = 0;
        fclose(f);
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        f = fopen(path, "r");
        if (f == NULL) break;
        if (fscanf(f, "%luK", &size) != 1) size = 0;
        fclose(f);
        if (found == level) return (size_t)size << 10;
    }
    return 0;
}

double bench_foreign_s(void) {
    // user, nice, system, idle, waiting, interrupts of two kinds, stolen
    unsigned long long t[8] = {0};
    struct timespec own;
    FILE *f = fopen("/proc/stat", "r");
    if (f == NULL) return 0;
    const int got = fscanf(f, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &t[0], &t[1], &t[2],
                           &t[3], &t[4], &t[5], &t[6], &t[7]);
    fclose(f);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &own);
    if (got != 8) return 0;
    const double busy = (double)(t[0] + t[1] + t[2] + t[5] + t[6] + t[7]);
    return busy / (double)sysconf(_SC_CLK_TCK) - (double)own.tv_sec - (double)own.tv_nsec * 1e-9;
}

// Two threads take turns at writing one line.
enum { TURNS = 4000 };

typedef struct ping_ctx {
    _Alignas(64) _Atomic unsigned turn;
} ping_ctx;

static void ping_piece(void *ctx, size_t piece, unsigned thread) {
    ping_ctx *c = ctx;
    (void)thread;
    for (unsigned i = (unsigned)piece; i < 2 * TURNS; i += 2) {
        while (atomic_load_explicit(&c->turn, memory_order_acquire) != i) continue;
        atomic_store_explicit(&c->turn, i + 1, memory_order_release);
    }
}

static double ping_ns(bench_team *two) {
    ping_ctx c = {0};
    const bench_job job = {.fn = ping_piece, .ctx = &c, .pieces = 2, .fixed = true};
    double share;
    const double s = bench_team_run(two, &job, 1, &share);
    return s / TURNS * 1e9;
}

static double most(double a, double b) {
    return a > b ? a : b;
}

bench_state bench_state_probe(void) {
    bench_state s = {.word = "single"};
    bench_rate rate = BENCH_NONE;
    for (unsigned r = 0; r < BENCH_RATES; r++) {
        const char *name = rates[r].name;
        if ((strncmp(name, "fma_ymm", 7) == 0 || strcmp(name, "fmla") == 0) && bench_rate_here(r))
            rate = (bench_rate)r;
    }
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2 || rate == BENCH_NONE) return s;
    enum { SIZE = 128 << 20, TRIES = 7 };
    bench_memory m = bench_memory_open(BENCH_PAGES_HUGE, SIZE);
    bench_team *one = bench_team_open(1), *two;
    for (int i = 0; i < TRIES; i++) {
        s.fma_one = most(s.fma_one, bench_peak_sample(one, rate, 1));
        s.read_one = most(s.read_one, bench_read_sample(one, m.data, SIZE / 2, 1));
    }
    bench_team_close(one);
    two = bench_team_open(2);
    s.ping_ns = 1e9;
    for (int i = 0; i < TRIES; i++) {
        s.fma_two = most(s.fma_two, bench_peak_sample(two, rate, 1));
        s.read_two = most(s.read_two, bench_read_sample(two, m.data, SIZE, 1));
        const double ns = ping_ns(two);
        s.ping_ns = ns < s.ping_ns ? ns : s.ping_ns;
    }
    bench_team_close(two);
    bench_memory_close(&m);
    s.word = s.fma_two < 1.6 * s.fma_one ? "smt" : s.ping_ns < 300 ? "near" : "far";
    return s;
}

void bench_state_print(const char *when) {
    const bench_state s = bench_state_probe();
    printf("# %s: state %s, FMA %.0f and %.0f GFLOP/s, RAM %.1f and %.1f GB/s, line to and fro "
           "%.0f ns\n",
           when, s.word, s.fma_one, s.fma_two, s.read_one, s.read_two, s.ping_ns);
}
