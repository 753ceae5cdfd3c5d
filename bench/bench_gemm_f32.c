// Float products: a layer's panels of float weights (forward, gradient of the input) and the
// low-rank products of an adapter, and rows of every ggml type, which such panels are made of.
// Threads take 8 tokens a piece, as the engine does with adapters; panels of float weights by rows,
// gradients of B by rows of B. Limit: the peak of float multiply-adds.
#include "bench/bench.h"
#include "kernels/dispatch.h"

enum { GRAIN = 8, ROWS = 64 };

typedef struct shape {
    size_t tokens, n, k; // k: the adapter's rank where there is one
} shape;

typedef struct product {
    shape s;
    const fl_gemm_f32_variant *v;
    float *x, *w, *y; // [tokens][k], [n][k], [tokens][n]
} product;

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

static void nt_piece(void *ctx, size_t piece, unsigned thread) {
    const product *p = ctx;
    const size_t t = piece * GRAIN, count = least(GRAIN, p->s.tokens - t);
    (void)thread;
    p->v->nt(count, p->s.n, p->s.k, p->x + t * p->s.k, p->s.k, p->w, p->s.k, p->y + t * p->s.n,
             p->s.n);
}

static void nn_piece(void *ctx, size_t piece, unsigned thread) {
    const product *p = ctx;
    const size_t t = piece * GRAIN, count = least(GRAIN, p->s.tokens - t);
    (void)thread;
    p->v->nn(count, p->s.n, p->s.k, p->y + t * p->s.n, p->s.n, p->w, p->s.k, p->x + t * p->s.k,
             p->s.k, false);
}

static void panel_piece(void *ctx, size_t piece, unsigned thread) {
    const product *p = ctx;
    const size_t n = piece * ROWS, count = least(ROWS, p->s.n - n);
    (void)thread;
    p->v->nt(p->s.tokens, count, p->s.k, p->x, p->s.k, p->w + n * p->s.k, p->s.k, p->y + n, p->s.n);
}

static void tn_piece(void *ctx, size_t piece, unsigned thread) {
    const product *p = ctx;
    const size_t n = piece * ROWS, count = least(ROWS, p->s.n - n);
    (void)thread;
    p->v->tn(p->s.tokens, count, p->s.k, p->y + n, p->s.n, p->x, p->s.k, p->w + n * p->s.k, p->s.k);
}

static void rank_up_piece(void *ctx, size_t piece, unsigned thread) {
    const product *p = ctx;
    const size_t t = piece * GRAIN, count = least(GRAIN, p->s.tokens - t);
    (void)thread;
    p->v->rank_up(count, p->s.n, p->s.k, 1e-9f, p->x + t * p->s.k, p->s.k, p->w, p->s.k,
                  p->y + t * p->s.n, p->s.n);
}

// by_rows: pieces are rows of w, else tokens.
static void bench_product(const bench_args *args, bench_team *team, const char *name,
                          bench_piece_fn fn, bool by_rows, shape s) {
    product p = {.s = s};
    p.x = bench_floats(s.tokens * s.k), p.w = bench_floats(s.n * s.k);
    p.y = bench_floats(s.tokens * s.n);
    const uint32_t cpu = fl_cpu_detect();
    char text[64];
    snprintf(text, sizeof(text), "t=%zu n=%zu k=%zu", s.tokens, s.n, s.k);
    for (const fl_gemm_f32_variant *v = fl_gemm_f32_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need || (v->need == 0 && !args->smoke)) continue;
        p.v = v;
        const size_t count = by_rows ? (s.n + ROWS - 1) / ROWS : (s.tokens + GRAIN - 1) / GRAIN;
        const bench_case c = {.kernel = name,
                              .tag = v->tag,
                              .shape = text,
                              .job = {fn, &p, count, NULL, false},
                              .ops = 2.0 * (double)(s.tokens * s.n * s.k),
                              .bytes = 4.0 * (double)(s.tokens * (s.n + s.k) + s.n * s.k),
                              .rate = bench_rate_float(v->need),
                              .check = fn == nn_piece   ? p.x
                                       : fn == tn_piece ? p.w
                                                        : p.y};
        bench_run(args, team, &c);
    }
    free(p.x), free(p.w), free(p.y);
}

typedef struct row {
    const fl_ggml_variant *v;
    const fl_ggml_type *type;
    uint8_t *src;
    float *out;
} row;

enum { ROW = 8192 };

static void row_piece(void *ctx, size_t piece, unsigned thread) {
    const row *r = ctx;
    (void)piece;
    r->v->row_to_f32(r->type->id, r->src, ROW, r->out + (size_t)thread * ROW);
}

static void bench_rows(const bench_args *args, bench_team *team) {
    row r = {.src = bench_alloc(ROW * sizeof(float))};
    r.out = bench_alloc(ROW * sizeof(float) * bench_team_threads(team));
    const uint32_t cpu = fl_cpu_detect();
    memset(r.src, 0x21, ROW * sizeof(float));
    for (r.v = fl_ggml_variants; r.v->tag != NULL; r.v++) {
        if ((r.v->need & cpu) != r.v->need) continue;
        for (r.type = fl_ggml_types; r.type->name != NULL; r.type++) {
            const bench_case c = {
                .kernel = "ggml_row",
                .tag = r.v->tag,
                .shape = r.type->name,
                .job = {row_piece, &r, bench_team_threads(team), NULL, true},
                .ops = (double)ROW * bench_team_threads(team),
                .bytes = bench_team_threads(team) *
                         ((double)ROW / r.type->block_elements * r.type->block_bytes + 4.0 * ROW),
                .rate = BENCH_NONE,
                .check = &r.out[1]};
            bench_run(args, team, &c);
        }
    }
    free(r.src);
    free(r.out);
}

int main(int argc, char **argv) {
    const bench_args args = bench_args_parse(argc, argv);
    static const shape panels[] = {
        {256, 576, 576}, {1024, 1536, 576}, {256, 576, 1536}, {1, 1536, 576}};
    static const shape ranks[] = {{256, 576, 8}, {1024, 1536, 8}, {256, 1536, 32}, {1, 1536, 8}};
    static const shape small = {9, 70, 8};
    if (!args.smoke) bench_state_print("before");
    for (unsigned threads = 0; bench_next_threads(&args, &threads);) {
        bench_team *team = bench_team_open(threads);
        if (args.smoke) {
            bench_product(&args, team, "gemm_f32_nt", panel_piece, true, small);
            bench_product(&args, team, "gemm_f32_nn", nn_piece, false, small);
            bench_product(&args, team, "adapter_up", rank_up_piece, false, small);
            bench_product(&args, team, "adapter_db", tn_piece, true, small);
        }
        for (size_t i = 0; i < (args.smoke ? 0 : FL_COUNT(panels)); i++) {
            bench_product(&args, team, "gemm_f32_nt", panel_piece, true, panels[i]);
            bench_product(&args, team, "gemm_f32_nn", nn_piece, false, panels[i]);
        }
        for (size_t i = 0; i < (args.smoke ? 0 : FL_COUNT(ranks)); i++) {
            const shape s = ranks[i], down = {s.tokens, s.k, s.n};
            bench_product(&args, team, "adapter_down", nt_piece, false, down);
            bench_product(&args, team, "adapter_up", rank_up_piece, false, s);
            bench_product(&args, team, "adapter_dlow", nn_piece, false, s);
            bench_product(&args, team, "adapter_dx", nn_piece, false, down);
            bench_product(&args, team, "adapter_db", tn_piece, true, s);
        }
        bench_rows(&args, team);
        bench_team_close(team);
    }
    if (!args.smoke) bench_state_print("after");
    return 0;
}
