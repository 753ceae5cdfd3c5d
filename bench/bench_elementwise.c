// What a layer does besides products: norms, SwiGLU, softmax and loss, rotation, AdamW, rows to
// bytes, embedding rows; every variant where there are variants. Threads take pieces of 8 tokens
// (loss: 16, AdamW: a share of the parameters). There is no peak to hold them against but reading;
// GB/s counts what goes in and out once. "ops" are elements.
#include "bench/bench.h"
#include "kernels/adamw.h"
#include "kernels/dispatch.h"
#include "kernels/packed.h"
#include "kernels/rope.h"

enum { TOKENS = 256, GRAIN = 8, HIDDEN = 576, FFN = 1536, CHUNK = 1024, HEADS = 9, SIZE = 64 };

typedef struct work {
    const fl_rmsnorm_variant *norm;
    const fl_swiglu_variant *swiglu;
    const fl_xent_variant *xent;
    fl_quantise_x8_fn quantise;
    size_t tokens;
    float *a, *b, *c, *d, *e; // [TOKENS][FFN] each
    float *turn;              // [TOKENS][SIZE]
    fl_lse *state;
    fl_x8 x8;
    void *x8_memory;
    fl_packed table;
    uint32_t *draw;
    int32_t *target;
} work;

typedef struct span {
    size_t begin, count;
} span;

static span tokens_of(const work *w, size_t piece) {
    const size_t begin = piece * GRAIN, left = w->tokens - begin;
    return (span){begin, left < GRAIN ? left : GRAIN};
}

static void norm_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    (void)thread;
    w->norm->forward(s.count, HIDDEN, 1e-5f, w->a + s.begin * HIDDEN, w->b,
                     w->c + s.begin * HIDDEN);
}

static void norm_back_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    const size_t at = s.begin * HIDDEN;
    (void)thread;
    w->norm->backward(s.count, HIDDEN, 1e-5f, w->a + at, w->b, w->c + at, w->d + at, NULL);
}

static void swiglu_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    const size_t at = s.begin * FFN;
    (void)thread;
    w->swiglu->forward(s.count * FFN, w->a + at, w->b + at, w->c + at);
}

static void swiglu_back_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    const size_t at = s.begin * FFN;
    (void)thread;
    w->swiglu->backward(s.count * FFN, w->a + at, w->b + at, w->c + at, w->d + at, w->e + at);
}

static void xent_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    (void)thread;
    fl_lse_init(s.count, w->state + s.begin);
    w->xent->update(s.count, CHUNK, 1.0f, w->a + s.begin * CHUNK, CHUNK, w->state + s.begin);
}

static void xent_grad_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    const size_t at = s.begin * CHUNK;
    (void)thread;
    // lse 8 makes most probabilities small enough to be thinned.
    w->xent->grad(s.count, CHUNK, 0, w->a + at, CHUNK, w->e + s.begin, w->target + s.begin,
                  w->d + s.begin, 0x1p-10f, w->draw + s.begin, w->c + at, CHUNK);
}

static void quantise_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    (void)thread;
    for (size_t t = s.begin; t < s.begin + s.count; t++)
        w->quantise(w->a + t * FFN, FFN, &w->x8, (uint32_t)t);
}

static void rope_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    (void)thread;
    for (size_t t = s.begin; t < s.begin + s.count; t++)
        fl_rope_apply(HEADS, SIZE, SIZE, false, false, w->turn + t * SIZE, w->c + t * HEADS * SIZE);
}

static void adamw_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    const fl_adamw opts = {1e-3f, 0.9f, 0.95f, 1e-8f, 0, 7};
    const size_t at = s.begin * FFN;
    (void)thread;
    fl_adamw_step(&opts, s.count * FFN, w->c + at, w->a + at, w->d + at, w->e + at);
}

static void embed_piece(void *ctx, size_t piece, unsigned thread) {
    const work *w = ctx;
    const span s = tokens_of(w, piece);
    (void)thread;
    for (size_t t = s.begin; t < s.begin + s.count; t++)
        fl_packed_row(&w->table, (uint32_t)(t * 7919 % w->table.rows), w->c + t * HIDDEN);
}

static void one(const bench_args *args, bench_team *team, work *w, const char *name,
                const char *tag, bench_piece_fn fn, size_t width, double bytes) {
    char text[64];
    const double count = (double)w->tokens * (double)width;
    snprintf(text, sizeof(text), "%zux%zu", w->tokens, width);
    const bench_case c = {.kernel = name,
                          .tag = tag,
                          .shape = text,
                          .job = {fn, w, (w->tokens + GRAIN - 1) / GRAIN, NULL, false},
                          .ops = count,
                          .bytes = bytes * count,
                          .rate = BENCH_NONE,
                          .check = &w->c[1]};
    bench_run(args, team, &c);
}

static void all(const bench_args *args, bench_team *team, work *w) {
    const uint32_t cpu = fl_cpu_detect();
    for (w->norm = fl_rmsnorm_variants; w->norm->tag != NULL; w->norm++) {
        if ((w->norm->need & cpu) != w->norm->need) continue;
        one(args, team, w, "rmsnorm", w->norm->tag, norm_piece, HIDDEN, 8);
        one(args, team, w, "rmsnorm_grad", w->norm->tag, norm_back_piece, HIDDEN, 16);
    }
    for (w->swiglu = fl_swiglu_variants; w->swiglu->tag != NULL; w->swiglu++) {
        if ((w->swiglu->need & cpu) != w->swiglu->need) continue;
        one(args, team, w, "swiglu", w->swiglu->tag, swiglu_piece, FFN, 12);
        one(args, team, w, "swiglu_grad", w->swiglu->tag, swiglu_back_piece, FFN, 20);
    }
    for (w->xent = fl_xent_variants; w->xent->tag != NULL; w->xent++) {
        if ((w->xent->need & cpu) != w->xent->need) continue;
        one(args, team, w, "xent_update", w->xent->tag, xent_piece, CHUNK, 4);
        one(args, team, w, "xent_grad", w->xent->tag, xent_grad_piece, CHUNK, 8);
    }
    for (const fl_quantise_x8_variant *v = fl_quantise_x8_variants; v->fn != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        w->quantise = v->fn;
        one(args, team, w, "quantise_x8", v->tag, quantise_piece, FFN, 5);
    }
    one(args, team, w, "rope", "ref", rope_piece, (size_t)HEADS * SIZE, 8);
    one(args, team, w, "adamw", "ref", adamw_piece, FFN, 28);
    one(args, team, w, "embedding", "ref", embed_piece, HIDDEN, 5);
}

static work work_make(size_t tokens) {
    enum { ROWS = 4096 };
    const size_t most = TOKENS * FFN;
    size_t size;
    work w = {.tokens = tokens, .table = {.rows = ROWS, .cols = HIDDEN, .bits = 8}};
    w.a = bench_floats(most), w.b = bench_floats(most), w.c = bench_floats(most);
    w.d = bench_floats(most), w.e = bench_floats(most);
    for (size_t i = 0; i < most; i++) w.d[i] += 1, w.e[i] += 8; // moments are not negative
    double freq[SIZE / 2];
    fl_rope_freq(SIZE, 1e4, NULL, freq);
    w.turn = bench_alloc((size_t)TOKENS * SIZE * sizeof(float));
    for (uint32_t t = 0; t < TOKENS; t++) fl_rope_row(t, SIZE, freq, w.turn + (size_t)t * SIZE);
    w.state = bench_alloc(TOKENS * sizeof(*w.state));
    w.draw = bench_alloc(TOKENS * sizeof(*w.draw));
    w.target = bench_alloc(TOKENS * sizeof(*w.target));
    for (uint32_t t = 0; t < TOKENS; t++) w.draw[t] = t * 77, w.target[t] = (int32_t)t;
    if (!fl_x8_size(TOKENS, FFN, &size)) abort();
    w.x8_memory = bench_alloc(size);
    w.x8 = fl_x8_bind(w.x8_memory, TOKENS, FFN);
    if (!fl_packed_size(ROWS, HIDDEN, 8, &size)) abort();
    w.table.data = bench_alloc(size);
    return w;
}

static void work_free(work *w) {
    float *const floats[] = {w->a, w->b, w->c, w->d, w->e, w->turn};
    for (size_t i = 0; i < FL_COUNT(floats); i++) free(floats[i]);
    free(w->state), free(w->draw), free(w->target), free(w->x8_memory);
    free((void *)(uintptr_t)w->table.data);
}

int main(int argc, char **argv) {
    const bench_args args = bench_args_parse(argc, argv);
    if (!args.smoke) bench_state_print("before");
    for (unsigned threads = 0; bench_next_threads(&args, &threads);) {
        bench_team *team = bench_team_open(threads);
        work w = work_make(args.smoke ? 9 : TOKENS);
        all(&args, team, &w);
        work_free(&w);
        bench_team_close(team);
    }
    if (!args.smoke) bench_state_print("after");
    return 0;
}
