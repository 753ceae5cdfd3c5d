// Float products at the shapes of one panel of a layer: forward, gradient of the input, and the
// low-rank products of an adapter; and the rows of every ggml type, which such panels are made of.
#include "bench/bench.h"
#include "kernels/dispatch.h"

typedef struct shape {
    size_t tokens, n, k;
} shape;

enum { TOKENS_MAX = 256, WIDTH_MAX = 2048 };

static float *x, *w, *y;

static float *filled(size_t count) {
    float *p = bench_alloc(count * sizeof(*p));
    for (size_t i = 0; i < count; i++) p[i] = bench_randf();
    return p;
}

typedef void (*run_fn)(const fl_gemm_f32_variant *v, const shape *s);

static void run_nt(const fl_gemm_f32_variant *v, const shape *s) {
    v->nt(s->tokens, s->n, s->k, x, s->k, w, s->k, y, s->n);
}

static void run_nn(const fl_gemm_f32_variant *v, const shape *s) {
    v->nn(s->tokens, s->n, s->k, y, s->n, w, s->k, x, s->k, false);
}

static void run_tn(const fl_gemm_f32_variant *v, const shape *s) {
    v->tn(s->tokens, s->n, s->k, x, s->n, y, s->k, w, s->k);
}

static void run_rank_up(const fl_gemm_f32_variant *v, const shape *s) {
    v->rank_up(s->tokens, s->n, s->k, 1e-9f, y, s->k, w, s->k, x, s->n);
}

static void bench(const char *name, run_fn run, const shape *shapes, size_t count, bool smoke) {
    const uint32_t cpu = fl_cpu_detect();
    for (const fl_gemm_f32_variant *v = fl_gemm_f32_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        for (size_t i = 0; i < (smoke ? 1 : count); i++) {
            const shape *s = &shapes[i];
            const double ops = 2.0 * (double)s->tokens * (double)s->n * (double)s->k;
            const size_t calls = bench_calls(ops, smoke);
            double runs[BENCH_RUNS];
            for (int r = 0; r < BENCH_RUNS; r++) {
                const double t0 = bench_now_s();
                for (size_t c = 0; c < calls; c++) run(v, s);
                runs[r] = bench_now_s() - t0;
            }
            char text[64];
            snprintf(text, sizeof(text), "t=%zu n=%zu k=%zu", s->tokens, s->n, s->k);
            const double moved = (double)(s->tokens * (s->n + s->k) + s->n * s->k);
            bench_report(name, v->tag, text, runs, calls, ops, 4.0 * moved, (double)(x[0] + y[0]));
        }
    }
}

// A row of 8192 weights of every type to floats.
static void bench_rows(bool smoke) {
    enum { N = 8192 };
    const uint32_t cpu = fl_cpu_detect();
    uint8_t *src = (uint8_t *)w;
    memset(src, 0x21, N * sizeof(float));
    for (const fl_ggml_variant *v = fl_ggml_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        for (const fl_ggml_type *t = fl_ggml_types; t->name != NULL; t++) {
            const size_t calls = bench_calls(N, smoke);
            double runs[BENCH_RUNS];
            for (int r = 0; r < BENCH_RUNS; r++) {
                const double t0 = bench_now_s();
                for (size_t c = 0; c < calls; c++) v->row_to_f32(t->id, src, N, x);
                runs[r] = bench_now_s() - t0;
            }
            const double size = (double)N / t->block_elements * t->block_bytes;
            bench_report("ggml_row", v->tag, t->name, runs, calls, N, size + 4.0 * N, (double)x[1]);
        }
    }
}

int main(int argc, char **argv) {
    const bool smoke = bench_smoke(argc, argv);
    static const shape panels[] = {{256, 64, 576}, {256, 64, 1536}, {256, 64, 2048}, {32, 64, 576},
                                   {1, 64, 576},   {256, 8, 576}};
    static const shape ranks[] = {{256, 576, 8}, {256, 1536, 8}, {256, 1536, 32}, {1, 1536, 8}};
    x = filled((size_t)TOKENS_MAX * WIDTH_MAX);
    w = filled((size_t)64 * WIDTH_MAX);
    y = filled((size_t)TOKENS_MAX * WIDTH_MAX);
    bench("gemm_f32_nt", run_nt, panels, FL_COUNT(panels), smoke);
    bench("gemm_f32_nn", run_nn, panels, FL_COUNT(panels), smoke);
    bench("gemm_f32_tn", run_tn, ranks, FL_COUNT(ranks), smoke);
    bench("gemm_f32_rank_up", run_rank_up, ranks, FL_COUNT(ranks), smoke);
    bench_rows(smoke);
    free(x), free(w), free(y);
    return 0;
}
