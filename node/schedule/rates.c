#include "node/schedule/probe.h"

#include "common/arena.h"
#include "common/checked.h"
#include "common/clock.h"
#include "common/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// One shape stands for all: rows and columns of a small model's widest layer, a micro-batch of
// tokens. The product is cut by rows, as the layers cut it.
enum {
    ROWS = 1536,
    COLS = 576,
    TOKENS = 64,
    BITS = 4,
    READ_BYTES = 16 << 20, // past the caches of the machines we aim at
    ROW_GRAIN = 64,
    COL_GRAIN = 64,
};
static const double SECONDS_EACH = 0.04;

typedef struct bench_ctx {
    const fl_kern *kern;
    fl_packed w;
    fl_x8 x;
    float *y;         // [TOKENS][ROWS]
    float *dx;        // [TOKENS][COLS]
    uint8_t *scratch; // one dx panel a thread
    size_t scratch_size;
    const uint8_t *bytes; // [READ_BYTES]
    uint64_t sums[NODE_THREADS_MAX];
} bench_ctx;

static void run_packed(void *ctx, size_t begin, size_t end, unsigned worker) {
    bench_ctx *c = ctx;
    (void)worker;
    c->kern->gemm_packed(&c->w, (uint32_t)begin, (uint32_t)end, &c->x, c->y + begin, ROWS);
}

static void run_dx(void *ctx, size_t begin, size_t end, unsigned worker) {
    bench_ctx *c = ctx;
    const fl_packed_range range = {0, ROWS, (uint32_t)begin, (uint32_t)end};
    c->kern->gemm_packed_dx(&c->w, &range, TOKENS, c->y, ROWS, c->dx + begin, COLS, false,
                            c->scratch + worker * c->scratch_size);
}

static void run_read(void *ctx, size_t begin, size_t end, unsigned worker) {
    bench_ctx *c = ctx;
    uint64_t sum = 0;
    for (size_t i = begin; i < end; i += 8) sum += fl_get_u64(c->bytes + i);
    c->sums[worker] += sum;
}

// Work units a second: repeats until the time is up, at least once after one warm-up.
static double rate_of(fl_pool *pool, size_t rows, size_t grain, fl_pool_fn fn, bench_ctx *c,
                      double units) {
    fl_pool_run(pool, rows, grain, fn, c);
    const double start = fl_clock_s();
    double seconds = 0;
    uint64_t runs = 0;
    while (seconds < SECONDS_EACH) {
        fl_pool_run(pool, rows, grain, fn, c);
        runs++;
        seconds = fl_clock_s() - start;
    }
    return units * (double)runs / seconds;
}

static void bind(bench_ctx *c, uint32_t threads, fl_arena *a) {
    size_t packed = 0, x8 = 0;
    const bool ok = fl_packed_size(ROWS, COLS, BITS, &packed) && fl_x8_size(TOKENS, COLS, &x8);
    FL_ASSERT(ok);
    uint8_t *w = fl_arena_alloc(a, packed, 1, 64);
    void *x = fl_arena_alloc(a, x8, 1, 64);
    c->scratch_size = FL_GEMM_PACKED_DX_SCRATCH;
    c->y = fl_arena_alloc(a, (size_t)TOKENS * ROWS, sizeof(float), 64);
    c->dx = fl_arena_alloc(a, (size_t)TOKENS * COLS, sizeof(float), 64);
    c->scratch = fl_arena_alloc(a, c->scratch_size, threads, 64);
    c->bytes = fl_arena_alloc(a, READ_BYTES, 1, 64);
    c->w = (fl_packed){w, ROWS, COLS, BITS};
    if (fl_arena_counting(a)) return;
    c->x = fl_x8_bind(x, TOKENS, COLS);
    memset(w, 0x2d, packed); // scales of 0.08: a gradient of zeros would not be multiplied
}

static void fill(bench_ctx *c) {
    float row[COLS];
    for (uint32_t t = 0; t < TOKENS; t++) {
        for (uint32_t k = 0; k < COLS; k++) row[k] = (float)((t * 31 + k * 17) % 13) - 6.0f;
        c->kern->quantise_x8(row, COLS, &c->x, t);
    }
}

fl_status node_rates_measure(const fl_kern *kern, uint32_t threads_max, node_rates *ret,
                             fl_err *err) {
    if (threads_max > NODE_THREADS_MAX) threads_max = NODE_THREADS_MAX;
    node_rates r = {.threads = threads_max, .threads_compute = 1, .threads_stream = 1};
    bench_ctx c = {.kern = kern};
    fl_arena arena;
    fl_arena_init_counting(&arena);
    bind(&c, threads_max, &arena);
    const size_t size = (arena.peak + 63) & ~(size_t)63;
    void *block = aligned_alloc(64, size);
    if (block == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory (%zu bytes) to measure with", size);
    fl_arena_init(&arena, block, size);
    bind(&c, threads_max, &arena);
    fill(&c);
    fl_status st = FL_OK;
    for (uint32_t n = 1; n <= threads_max; n++) {
        fl_pool *pool = NULL;
        st = fl_pool_open(n, &pool, err);
        if (st != FL_OK) break;
        const double ops = 2.0 * ROWS * COLS * TOKENS;
        r.packed_ops[n] = rate_of(pool, ROWS, ROW_GRAIN, run_packed, &c, ops);
        r.float_ops[n] = rate_of(pool, COLS, COL_GRAIN, run_dx, &c, ops);
        r.read_bytes[n] = rate_of(pool, READ_BYTES, 1 << 20, run_read, &c, READ_BYTES);
        fl_pool_close(pool);
        if (r.packed_ops[n] > 1.03 * r.packed_ops[r.threads_compute]) r.threads_compute = n;
        if (r.read_bytes[n] > 1.05 * r.read_bytes[r.threads_stream]) r.threads_stream = n;
    }
    free(block);
    if (st == FL_OK) *ret = r;
    return st;
}

fl_status node_rates_read(const char *path, const node_facts *facts, node_rates *ret, fl_err *err) {
    enum { FILE_MAX = 1 << 14 };
    uint8_t *data = NULL;
    size_t size = 0;
    FL_TRY(fl_file_read(path, FILE_MAX, &data, &size, err));
    node_rates r = {0};
    unsigned long long fingerprint = 0;
    int used = 0;
    const char *at = (const char *)data;
    fl_status st = FL_OK;
    if (sscanf(at, "fleetune-rates 1 %llx %u %u %u%n", &fingerprint, &r.threads, &r.threads_compute,
               &r.threads_stream, &used) != 4 ||
        r.threads == 0 || r.threads > NODE_THREADS_MAX || r.threads_compute == 0 ||
        r.threads_compute > r.threads || r.threads_stream == 0 || r.threads_stream > r.threads) {
        st = FL_FAIL(err, FL_EFORMAT, "%s is not a cache of measured rates", path);
        goto out;
    }
    if (fingerprint != facts->fingerprint) {
        st = FL_FAIL(err, FL_ENOENT, "%s is of another machine", path);
        goto out;
    }
    for (uint32_t n = 1; n <= r.threads; n++) {
        at += used;
        if (sscanf(at, " %lf %lf %lf%n", &r.packed_ops[n], &r.float_ops[n], &r.read_bytes[n],
                   &used) != 3 ||
            !(r.packed_ops[n] > 0) || !(r.float_ops[n] > 0) || !(r.read_bytes[n] > 0)) {
            st = FL_FAIL(err, FL_EFORMAT, "%s lacks the rates of %u threads", path, n);
            goto out;
        }
    }
    at += used;
    if (strcmp(at, "\nend\n") != 0) {
        st = FL_FAIL(err, FL_EFORMAT, "%s is cut short", path);
        goto out;
    }
    *ret = r;
out:
    free(data);
    return st;
}

fl_status node_rates_write(const char *path, const node_facts *facts, const node_rates *r,
                           fl_err *err) {
    char text[4096];
    int n = snprintf(text, sizeof(text), "fleetune-rates 1 %llx %u %u %u\n",
                     (unsigned long long)facts->fingerprint, r->threads, r->threads_compute,
                     r->threads_stream);
    for (uint32_t i = 1; i <= r->threads; i++)
        n += snprintf(text + n, sizeof(text) - (size_t)n, "%.6e %.6e %.6e\n", r->packed_ops[i],
                      r->float_ops[i], r->read_bytes[i]);
    n += snprintf(text + n, sizeof(text) - (size_t)n, "end\n");
    return fl_file_replace(path, (fl_bytes){(const uint8_t *)text, (size_t)n}, err);
}
