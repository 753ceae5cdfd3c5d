#include "bench/profile.h"

#include "common/clock.h"
#include "common/pool.h"
#include "kernels/adamw.h"
#include "kernels/rope.h"
#include "kernels/vec.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

enum { THREADS_MAX = 64 };

static const struct {
    const char *text;
    bool product;
} parts[] = {
#define X(part, text, product) {text, product},
    BENCH_PART_LIST(X)
#undef X
};

// What one thread has counted. Only its own thread writes it, while the others do not read.
typedef struct slot {
    _Alignas(128) uint64_t ticks[BENCH_PARTS];
    uint64_t busy;   // in pieces
    uint64_t inside; // of the parts, those in pieces
    double ops[BENCH_PARTS];
} slot;

static slot slots[THREADS_MAX];
static _Atomic unsigned slots_taken;
static _Thread_local slot *mine;
static _Thread_local bool in_piece;

static const fl_kern *real;
static const node_matrix *head_matrix;
static fl_gemm_f32_variant gemm_f32;
static fl_rmsnorm_variant rmsnorm;
static fl_attention_variant attention;
static fl_swiglu_variant swiglu;
static fl_xent_variant xent;
static double begun_s;
static uint64_t begun, pooled; // ticks; pooled: the caller's time in fl_pool_run

// Cheaper than a clock: many kernels run for less than a microsecond.
static uint64_t ticks(void) {
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#else
    uint64_t t;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(t));
    return t;
#endif
}

static slot *my_slot(void) {
    if (mine == NULL) {
        const unsigned i = atomic_fetch_add(&slots_taken, 1);
        FL_ASSERT(i < THREADS_MAX);
        mine = &slots[i];
    }
    return mine;
}

static void add(bench_part part, uint64_t start, double ops) {
    const uint64_t took = ticks() - start;
    slot *s = my_slot();
    s->ticks[part] += took;
    s->ops[part] += ops;
    if (in_piece) s->inside += took;
}

#define TIMED(part, ops, call)                                                                     \
    do {                                                                                           \
        const uint64_t start_ = ticks();                                                           \
        call;                                                                                      \
        add(BENCH_PART_##part, start_, ops);                                                       \
    } while (0)

static void timed_gemm_packed(const fl_packed *w, uint32_t row_begin, uint32_t row_end,
                              const fl_x8 *x, float *y, size_t y_stride) {
    const double ops = 2.0 * (row_end - row_begin) * w->cols * x->tokens;
    const uint64_t start = ticks();
    real->gemm_packed(w, row_begin, row_end, x, y, y_stride);
    add(w->data == head_matrix->data ? BENCH_PART_HEAD : BENCH_PART_FORWARD, start, ops);
}

static void timed_gemm_packed_dx(const fl_packed *w, const fl_packed_range *range, uint32_t tokens,
                                 const float *dy, size_t dy_stride, float *dx, size_t dx_stride,
                                 bool accumulate, void *scratch) {
    const double ops =
        2.0 * tokens * (range->row_end - range->row_begin) * (range->col_end - range->col_begin);
    const uint64_t start = ticks();
    real->gemm_packed_dx(w, range, tokens, dy, dy_stride, dx, dx_stride, accumulate, scratch);
    add(w->data == head_matrix->data ? BENCH_PART_HEAD_DX : BENCH_PART_DX, start, ops);
}

static void timed_quantise(const float *x, uint32_t cols, const fl_x8 *ret, uint32_t token) {
    TIMED(QUANTISE, 0, real->quantise_x8(x, cols, ret, token));
}

static void timed_nt(size_t tokens, size_t n, size_t k, const float *x, size_t ldx, const float *w,
                     size_t ldw, float *y, size_t ldy) {
    TIMED(ADAPTERS, 2.0 * (double)(tokens * n * k),
          real->gemm_f32->nt(tokens, n, k, x, ldx, w, ldw, y, ldy));
}

static void timed_nn(size_t tokens, size_t n, size_t k, const float *dy, size_t lddy,
                     const float *w, size_t ldw, float *dx, size_t lddx, bool accumulate) {
    TIMED(ADAPTERS, 2.0 * (double)(tokens * n * k),
          real->gemm_f32->nn(tokens, n, k, dy, lddy, w, ldw, dx, lddx, accumulate));
}

static void timed_tn(size_t tokens, size_t n, size_t rank, const float *dy, size_t lddy,
                     const float *u, size_t ldu, float *db, size_t lddb) {
    TIMED(ADAPTERS, 2.0 * (double)(tokens * n * rank),
          real->gemm_f32->tn(tokens, n, rank, dy, lddy, u, ldu, db, lddb));
}

static void timed_rank_up(size_t tokens, size_t n, size_t rank, float s, const float *u, size_t ldu,
                          const float *b, size_t ldb, float *y, size_t ldy) {
    TIMED(ADAPTERS, 2.0 * (double)(tokens * n * rank),
          real->gemm_f32->rank_up(tokens, n, rank, s, u, ldu, b, ldb, y, ldy));
}

static void timed_norm(size_t rows, size_t n, float epsilon, const float *x, const float *gain,
                       float *y) {
    TIMED(NORM, 0, real->rmsnorm->forward(rows, n, epsilon, x, gain, y));
}

static void timed_norm_back(size_t rows, size_t n, float epsilon, const float *x, const float *gain,
                            const float *dy, float *dx, float *dgain) {
    TIMED(NORM, 0, real->rmsnorm->backward(rows, n, epsilon, x, gain, dy, dx, dgain));
}

static void timed_attention(const fl_attention *a, uint32_t token_begin, uint32_t token_end,
                            uint32_t head_begin, uint32_t head_end) {
    TIMED(ATTENTION, 0, real->attention->forward(a, token_begin, token_end, head_begin, head_end));
}

static void timed_attention_back(const fl_attention *a, const fl_attention_grad *g, uint32_t tokens,
                                 uint32_t kv_head_begin, uint32_t kv_head_end) {
    TIMED(ATTENTION_BACK, 0, real->attention->backward(a, g, tokens, kv_head_begin, kv_head_end));
}

static void timed_swiglu(size_t n, const float *gate, const float *up, float *act) {
    TIMED(SWIGLU, 0, real->swiglu->forward(n, gate, up, act));
}

static void timed_swiglu_back(size_t n, const float *gate, const float *up, const float *dact,
                              float *dgate, float *dup) {
    TIMED(SWIGLU, 0, real->swiglu->backward(n, gate, up, dact, dgate, dup));
}

static void timed_xent(size_t tokens, size_t n, float scale, const float *logits, size_t ld,
                       fl_lse *state) {
    TIMED(XENT, 0, real->xent->update(tokens, n, scale, logits, ld, state));
}

static void timed_xent_grad(size_t tokens, size_t n, size_t first, const float *logits, size_t ld,
                            const float *lse, const int32_t *target, const float *weight,
                            float least, const uint32_t *draw, float *dlogits, size_t ldd) {
    TIMED(XENT, 0,
          real->xent->grad(tokens, n, first, logits, ld, lse, target, weight, least, draw, dlogits,
                           ldd));
}

void bench_profile_kern(const fl_kern *from, const node_matrix *head, fl_kern *ret) {
    real = from, head_matrix = head;
    *ret = *from;
    ret->gemm_packed = timed_gemm_packed;
    ret->gemm_packed_dx = timed_gemm_packed_dx;
    ret->quantise_x8 = timed_quantise;
    gemm_f32 = *from->gemm_f32, rmsnorm = *from->rmsnorm, attention = *from->attention;
    swiglu = *from->swiglu, xent = *from->xent;
    gemm_f32.nt = timed_nt, gemm_f32.nn = timed_nn;
    gemm_f32.tn = timed_tn, gemm_f32.rank_up = timed_rank_up;
    rmsnorm.forward = timed_norm, rmsnorm.backward = timed_norm_back;
    attention.forward = timed_attention, attention.backward = timed_attention_back;
    swiglu.forward = timed_swiglu, swiglu.backward = timed_swiglu_back;
    xent.update = timed_xent, xent.grad = timed_xent_grad;
    ret->gemm_f32 = &gemm_f32, ret->rmsnorm = &rmsnorm, ret->attention = &attention;
    ret->swiglu = &swiglu, ret->xent = &xent;
}

// What the linker puts in the place of the engine's calls: __wrap_f is called for f, and __real_f
// is f itself.
#define WRAP(part, name, parameters, arguments)                                                    \
    void __real_##name parameters;                                                                 \
    void __wrap_##name parameters;                                                                 \
    void __wrap_##name parameters {                                                                \
        TIMED(part, 0, __real_##name arguments);                                                   \
    }
WRAP(ROPE, fl_rope_row, (uint32_t pos, uint32_t size, const double *freq, float *cos_sin),
     (pos, size, freq, cos_sin))
WRAP(ROPE, fl_rope_apply,
     (uint32_t heads, uint32_t head_size, uint32_t size, bool half, bool inverse,
      const float *cos_sin, float *x),
     (heads, head_size, size, half, inverse, cos_sin, x))
WRAP(ADAMW, fl_adamw_step,
     (const fl_adamw *opts, size_t n, float *param, const float *grad, float *m, float *v),
     (opts, n, param, grad, m, v))
WRAP(VECTORS, fl_vec_add, (size_t n, const float *x, float *y), (n, x, y))
WRAP(VECTORS, fl_vec_scale, (size_t n, float a, float *y), (n, a, y))
WRAP(VECTORS, fl_vec_axpy, (size_t n, float a, const float *x, float *y), (n, a, x, y))
WRAP(ROWS, node_matrix_row, (const node_matrix *w, uint32_t row, float *out), (w, row, out))

double __real_fl_vec_sumsq(size_t n, const float *x);
double __wrap_fl_vec_sumsq(size_t n, const float *x);
double __wrap_fl_vec_sumsq(size_t n, const float *x) {
    const uint64_t start = ticks();
    const double sum = __real_fl_vec_sumsq(n, x);
    add(BENCH_PART_VECTORS, start, 0);
    return sum;
}

typedef struct piece_ctx {
    fl_pool_fn fn;
    void *ctx;
} piece_ctx;

static void timed_piece(void *ctx, size_t begin, size_t end, unsigned worker) {
    const piece_ctx *c = ctx;
    const uint64_t start = ticks();
    in_piece = true;
    c->fn(c->ctx, begin, end, worker);
    in_piece = false;
    my_slot()->busy += ticks() - start;
}

void __real_fl_pool_run(fl_pool *p, size_t rows, size_t grain, fl_pool_fn fn, void *ctx);
void __wrap_fl_pool_run(fl_pool *p, size_t rows, size_t grain, fl_pool_fn fn, void *ctx);
void __wrap_fl_pool_run(fl_pool *p, size_t rows, size_t grain, fl_pool_fn fn, void *ctx) {
    piece_ctx c = {fn, ctx};
    const uint64_t start = ticks();
    __real_fl_pool_run(p, rows, grain, timed_piece, &c);
    pooled += ticks() - start;
}

void bench_profile_begin(void) {
    for (unsigned i = 0; i < THREADS_MAX; i++) {
        memset(slots[i].ticks, 0, sizeof(slots[i].ticks));
        memset(slots[i].ops, 0, sizeof(slots[i].ops));
        slots[i].busy = slots[i].inside = 0;
    }
    pooled = 0;
    begun_s = fl_clock_s(), begun = ticks();
}

bench_profile bench_profile_end(unsigned threads) {
    const double wall = (double)(ticks() - begun);
    bench_profile p = {.wall_s = fl_clock_s() - begun_s};
    const double unit = p.wall_s / wall;
    double busy = 0, inside = 0, counted = 0;
    for (unsigned i = 0; i < THREADS_MAX; i++) {
        for (unsigned k = 0; k < BENCH_PARTS; k++) {
            p.s[k] += unit * (double)slots[i].ticks[k];
            p.ops[k] += slots[i].ops[k];
            counted += unit * (double)slots[i].ticks[k];
        }
        busy += unit * (double)slots[i].busy;
        inside += unit * (double)slots[i].inside;
    }
    const double in_pool = unit * (double)pooled;
    p.s[BENCH_PART_PIECES] = busy - inside;
    p.s[BENCH_PART_BETWEEN] = p.wall_s - in_pool - (counted - inside);
    p.s[BENCH_PART_WAITING] = in_pool * threads - busy;
    p.s[BENCH_PART_IDLE] = (p.wall_s - in_pool) * (threads - 1);
    return p;
}

void bench_profile_print(const bench_profile *p, unsigned threads, unsigned times) {
    const double all = p->wall_s * threads;
    double products = 0;
    for (unsigned k = 0; k < BENCH_PARTS; k++) {
        if (parts[k].product) products += p->s[k];
        if (p->s[k] <= 0) continue;
        printf("  %-20s %10.1f us %5.1f %%", parts[k].text, p->s[k] * 1e6 / times,
               100 * p->s[k] / all);
        if (p->ops[k] > 0) printf("  %.1f GOP/s a thread", p->ops[k] / p->s[k] * 1e-9);
        printf("\n");
    }
    printf("  outside products of matrices %.1f %%, attention not counted as one; "
           "without attention %.1f %%\n",
           100 - 100 * products / all,
           100 - 100 * (products + p->s[BENCH_PART_ATTENTION] + p->s[BENCH_PART_ATTENTION_BACK]) /
                     all);
}
