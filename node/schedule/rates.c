#include "node/schedule/probe.h"

#include "common/arena.h"
#include "common/checked.h"
#include "common/clock.h"
#include "common/file.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// One shape stands for all: rows and columns of a small model's widest layer, a micro-batch of
// tokens. The product is cut by rows, as the layers cut it.
enum {
    ROWS = 1536,
    COLS = 576,
    TOKENS = 64,
    BITS = 4,
    BIG_MAX = 64 << 20, // past the caches of the machines we aim at
    BIG_MIN = 4 << 20,
    BIG_GRAIN_ROWS = 512, // of the same matrix, one token
    ROW_GRAIN = 64,
    COL_GRAIN = 64,
    ATTENTION_TOKENS = 256,
    ATTENTION_BLOCK = 8,
    HEADS = 8,
    KV_HEADS = 4,
    HEAD_SIZE = 64,
};
static const double SECONDS_EACH = 0.04;

typedef struct bench_ctx {
    const fl_kern *kern;
    fl_packed w;
    fl_packed big; // the buffer that is too large for the caches, as a matrix
    size_t big_size;
    fl_x8 x;
    float *y;         // [TOKENS][ROWS]
    float *dx;        // [TOKENS][COLS]
    float *one;       // [big.rows] product of one token
    uint8_t *scratch; // one dx panel a thread
    size_t scratch_size;
    fl_attention attention;
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

static void run_one_token(void *ctx, size_t begin, size_t end, unsigned worker) {
    bench_ctx *c = ctx;
    const fl_x8 one = fl_x8_slice(&c->x, 0, 1);
    (void)worker;
    c->kern->gemm_packed(&c->big, (uint32_t)begin, (uint32_t)end, &one, c->one + begin, 0);
}

static void run_attention(void *ctx, size_t begin, size_t end, unsigned worker) {
    bench_ctx *c = ctx;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const uint32_t head = (uint32_t)(i % KV_HEADS) * (HEADS / KV_HEADS);
        const uint32_t t = (uint32_t)(i / KV_HEADS) * ATTENTION_BLOCK;
        c->kern->attention->forward(&c->attention, t, t + ATTENTION_BLOCK, head,
                                    head + HEADS / KV_HEADS);
    }
}

// Eight chains of additions, or the adder and not the memory would be measured.
static void run_read(void *ctx, size_t begin, size_t end, unsigned worker) {
    bench_ctx *c = ctx;
    uint64_t sum[8] = {0};
    for (const uint8_t *p = c->big.data + begin, *last = c->big.data + end; p < last; p += 64) {
        uint64_t v[8];
        memcpy(v, p, sizeof(v));
        for (int i = 0; i < 8; i++) sum[i] += v[i];
    }
    for (int i = 0; i < 8; i++) c->sums[worker] += sum[i];
}

// Work units a second, of the fastest run: whatever else the machine does makes a run slower.
// Repeats until the time is up, at least once after one warm-up.
static double rate_of(fl_pool *pool, size_t rows, size_t grain, fl_pool_fn fn, bench_ctx *c,
                      double units) {
    double best = 0, spent = 0;
    fl_pool_run(pool, rows, grain, fn, c);
    while (spent < SECONDS_EACH) {
        const double start = fl_clock_s();
        fl_pool_run(pool, rows, grain, fn, c);
        const double seconds = fl_clock_s() - start;
        spent += seconds > 1e-9 ? seconds : 1e-9;
        if (best == 0 || seconds < best) best = seconds;
    }
    return units / (best > 1e-9 ? best : 1e-9);
}

static void bind_attention(bench_ctx *c, fl_arena *a) {
    enum { N = ATTENTION_TOKENS, Q = HEADS * HEAD_SIZE, KV = KV_HEADS * HEAD_SIZE };
    float *q = fl_arena_alloc(a, (size_t)N * Q, sizeof(float), 64);
    float *out = fl_arena_alloc(a, (size_t)N * Q, sizeof(float), 64);
    float *kv = fl_arena_alloc(a, (size_t)N * KV * 2, sizeof(float), 64);
    uint32_t *begin = fl_arena_alloc(a, (size_t)N * 2, sizeof(uint32_t), 64);
    if (fl_arena_counting(a)) return;
    for (size_t i = 0; i < (size_t)N * Q; i++) q[i] = (float)(i % 7) * 0.1f;
    for (size_t i = 0; i < (size_t)N * KV * 2; i++) kv[i] = (float)(i % 5) * 0.1f;
    for (uint32_t t = 0; t < N; t++) begin[t] = 0, begin[N + t] = t;
    c->attention = (fl_attention){.heads = HEADS,
                                  .kv_heads = KV_HEADS,
                                  .head_size = HEAD_SIZE,
                                  .kv_begin = begin,
                                  .kv_row = begin + N,
                                  .q = q,
                                  .k = kv,
                                  .v = kv + (size_t)N * KV,
                                  .out = out,
                                  .q_stride = Q,
                                  .kv_stride = KV};
}

static void bind(bench_ctx *c, uint32_t threads, size_t memory_max, fl_arena *a) {
    size_t packed = 0, x8 = 0, panel = 0;
    const bool ok = fl_packed_size(ROWS, COLS, BITS, &packed) && fl_x8_size(TOKENS, COLS, &x8) &&
                    fl_packed_size(BIG_GRAIN_ROWS, COLS, BITS, &panel);
    FL_ASSERT(ok);
    size_t big = memory_max == 0 || memory_max / 2 > BIG_MAX ? BIG_MAX : memory_max / 2;
    big = (big < BIG_MIN ? BIG_MIN : big) / panel * panel;
    uint8_t *w = fl_arena_alloc(a, packed, 1, 64);
    void *x = fl_arena_alloc(a, x8, 1, 64);
    c->scratch_size = FL_GEMM_PACKED_DX_SCRATCH;
    c->y = fl_arena_alloc(a, (size_t)TOKENS * ROWS, sizeof(float), 64);
    c->dx = fl_arena_alloc(a, (size_t)TOKENS * COLS, sizeof(float), 64);
    c->scratch = fl_arena_alloc(a, c->scratch_size, threads, 64);
    uint8_t *bytes = fl_arena_alloc(a, big, 1, 64);
    c->w = (fl_packed){w, ROWS, COLS, BITS};
    c->big = (fl_packed){bytes, (uint32_t)(big / panel) * BIG_GRAIN_ROWS, COLS, BITS};
    c->big_size = big;
    c->one = fl_arena_alloc(a, c->big.rows, sizeof(float), 64);
    bind_attention(c, a);
    if (fl_arena_counting(a)) return;
    c->x = fl_x8_bind(x, TOKENS, COLS);
    memset(w, 0x2d, packed);  // scales of 0.08: a gradient of zeros would not be multiplied
    memset(bytes, 0x2d, big); // pages never written are all one page, and that is in the cache
}

static void fill(bench_ctx *c) {
    float row[COLS];
    for (uint32_t t = 0; t < TOKENS; t++) {
        for (uint32_t k = 0; k < COLS; k++) row[k] = (float)((t * 31 + k * 17) % 13) - 6.0f;
        c->kern->quantise_x8(row, COLS, &c->x, t);
    }
}

static void measure_with(fl_pool *pool, uint32_t n, bench_ctx *c, node_rates *r) {
    const double ops = 2.0 * ROWS * COLS * TOKENS;
    const double pairs = ATTENTION_TOKENS * (ATTENTION_TOKENS + 1) / 2.0;
    r->packed_ops[n] = rate_of(pool, ROWS, ROW_GRAIN, run_packed, c, ops);
    r->float_ops[n] = rate_of(pool, COLS, COL_GRAIN, run_dx, c, ops);
    r->attention_ops[n] = rate_of(pool, ATTENTION_TOKENS / ATTENTION_BLOCK * KV_HEADS, 1,
                                  run_attention, c, 4.0 * HEADS * HEAD_SIZE * pairs);
    r->stream_bytes[n] =
        rate_of(pool, c->big.rows, BIG_GRAIN_ROWS, run_one_token, c, (double)c->big_size);
    r->read_bytes[n] = rate_of(pool, c->big_size, 1 << 18, run_read, c, (double)c->big_size);
    if (r->packed_ops[n] > 1.03 * r->packed_ops[r->threads_compute]) r->threads_compute = n;
    if (r->stream_bytes[n] > 1.05 * r->stream_bytes[r->threads_stream]) r->threads_stream = n;
}

fl_status node_rates_measure(const fl_kern *kern, uint32_t threads_max, uint64_t memory_max,
                             node_rates *ret, fl_err *err) {
    if (threads_max > NODE_THREADS_MAX) threads_max = NODE_THREADS_MAX;
    const size_t most = memory_max > SIZE_MAX ? SIZE_MAX : (size_t)memory_max;
    node_rates r = {.threads = threads_max, .threads_compute = 1, .threads_stream = 1};
    bench_ctx c = {.kern = kern};
    fl_arena arena;
    fl_arena_init_counting(&arena);
    bind(&c, threads_max, most, &arena);
    const size_t size = (arena.peak + 63) & ~(size_t)63;
    void *block = aligned_alloc(64, size);
    if (block == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory (%zu bytes) to measure with", size);
    fl_arena_init(&arena, block, size);
    bind(&c, threads_max, most, &arena);
    fill(&c);
    fl_status st = FL_OK;
    for (uint32_t n = 1; n <= threads_max; n++) {
        fl_pool *pool = NULL;
        st = fl_pool_open(n, &pool, err);
        if (st != FL_OK) break;
        measure_with(pool, n, &c, &r);
        fl_pool_close(pool);
    }
    free(block);
    if (st == FL_OK) *ret = r;
    return st;
}

node_rates node_rates_assumed(uint32_t threads) {
    node_rates r = {.threads = threads > NODE_THREADS_MAX ? NODE_THREADS_MAX : threads};
    if (r.threads == 0) r.threads = 1;
    r.threads_compute = r.threads_stream = r.threads;
    for (uint32_t n = 1; n <= r.threads; n++) {
        r.packed_ops[n] = 60e9 * n;
        r.float_ops[n] = 30e9 * n;
        r.attention_ops[n] = 15e9 * n;
        r.stream_bytes[n] = r.read_bytes[n] = n == 1 ? 4e9 : 6e9;
    }
    return r;
}

fl_status node_rates_storage(const char *path, double *ret, fl_err *err) {
    enum { PIECE = 1 << 20, PIECES_MAX = 32 };
    const double seconds_max = 0.5;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return FL_FAIL(err, FL_ENOENT, "%s cannot be read", path);
    uint8_t *piece = malloc(PIECE);
    uint64_t bytes = 0;
    const double start = fl_clock_s();
    // What the page cache holds is dropped first, where no process has it mapped and touched.
    posix_fadvise(fd, 0, (off_t)PIECE * PIECES_MAX, POSIX_FADV_DONTNEED);
    double seconds = 0;
    for (int i = 0; piece != NULL && i < PIECES_MAX && seconds < seconds_max; i++) {
        const ssize_t n = pread(fd, piece, PIECE, (off_t)i * PIECE);
        if (n <= 0) break;
        bytes += (uint64_t)n;
        seconds = fl_clock_s() - start;
    }
    free(piece);
    close(fd);
    if (bytes == 0 || seconds <= 0)
        return FL_FAIL(err, FL_EIO, "no byte of %s could be read to measure the storage", path);
    *ret = (double)bytes / seconds;
    return FL_OK;
}
