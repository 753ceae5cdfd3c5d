// Attention forward and backward over packed sequences, and the element-wise kernels of a layer.
#include "bench/bench.h"
#include "kernels/dispatch.h"

enum { TOKENS_MAX = 512, HEADS = 9, KV_HEADS = 3, SIZE = 64, FFN = 1536 };

static uint32_t begin[TOKENS_MAX], row[TOKENS_MAX];

static float *taken[16]; // given back by release_all
static size_t taken_count;

static float *filled(size_t count) {
    if (taken_count == FL_COUNT(taken)) abort();
    float *p = bench_alloc(count * sizeof(*p));
    for (size_t i = 0; i < count; i++) p[i] = bench_randf();
    taken[taken_count++] = p;
    return p;
}

static void release_all(void) {
    while (taken_count > 0) free(taken[--taken_count]);
}

static void bench_lengths(uint32_t tokens, bool smoke) {
    const size_t q = (size_t)tokens * HEADS * SIZE, kv = (size_t)tokens * KV_HEADS * SIZE;
    for (uint32_t t = 0; t < tokens; t++) begin[t] = 0, row[t] = t;
    const fl_attention a = {.heads = HEADS, .kv_heads = KV_HEADS, .head_size = SIZE,
                            .kv_begin = begin, .kv_row = row, .q = filled(q), .k = filled(kv),
                            .v = filled(kv), .out = filled(q),
                            .lse = filled((size_t)tokens * HEADS),
                            .q_stride = HEADS * SIZE, .kv_stride = KV_HEADS * SIZE};
    const fl_attention_grad g = {filled(q), filled(q), filled(kv), filled(kv)};
    const double ops = 4.0 * SIZE * HEADS * tokens * (tokens + 1) / 2;
    const uint32_t cpu = fl_cpu_detect();
    char shape[64];
    snprintf(shape, sizeof(shape), "t=%u heads=%d/%d size=%d", tokens, HEADS, KV_HEADS, SIZE);
    for (const fl_attention_variant *v = fl_attention_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        const size_t calls = bench_calls(ops, smoke);
        double runs[BENCH_RUNS], back[BENCH_RUNS];
        for (int r = 0; r < BENCH_RUNS; r++) {
            const double t0 = bench_now_s();
            for (size_t c = 0; c < calls; c++) v->forward(&a, 0, tokens, 0, HEADS);
            const double t1 = bench_now_s();
            for (size_t c = 0; c < calls; c++) v->backward(&a, &g, tokens, 0, KV_HEADS);
            runs[r] = t1 - t0;
            back[r] = bench_now_s() - t1;
        }
        const double bytes = 4.0 * (double)(2 * q + 2 * kv);
        bench_report("attention", v->tag, shape, runs, calls, ops, bytes, (double)a.out[q - 1]);
        bench_report("attention_grad", v->tag, shape, back, calls, 2.5 * ops, 2 * bytes,
                     (double)g.dk[0]);
    }
    release_all();
}

static void bench_rows(bool smoke) {
    const size_t n = smoke ? FFN : (size_t)64 * FFN;
    float *x = filled(n), *y = filled(n), *z = filled(n), *out = filled(n);
    const uint32_t cpu = fl_cpu_detect();
    const size_t calls = bench_calls(10.0 * (double)n, smoke);
    double runs[BENCH_RUNS];
    for (const fl_swiglu_variant *v = fl_swiglu_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        for (int r = 0; r < BENCH_RUNS; r++) {
            const double t0 = bench_now_s();
            for (size_t c = 0; c < calls; c++) v->forward(n, x, y, out);
            runs[r] = bench_now_s() - t0;
        }
        bench_report("swiglu", v->tag, "64x1536", runs, calls, 10.0 * (double)n, 12.0 * (double)n,
                     (double)out[1]);
    }
    for (const fl_rmsnorm_variant *v = fl_rmsnorm_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        for (int r = 0; r < BENCH_RUNS; r++) {
            const double t0 = bench_now_s();
            for (size_t c = 0; c < calls; c++) v->forward(n / 512, 512, 1e-5f, x, z, out);
            runs[r] = bench_now_s() - t0;
        }
        bench_report("rmsnorm", v->tag, "192x512", runs, calls, 4.0 * (double)n, 8.0 * (double)n,
                     (double)out[1]);
    }
    for (const fl_xent_variant *v = fl_xent_variants; v->tag != NULL; v++) {
        if ((v->need & cpu) != v->need) continue;
        fl_lse state;
        fl_lse_init(1, &state);
        for (int r = 0; r < BENCH_RUNS; r++) {
            const double t0 = bench_now_s();
            for (size_t c = 0; c < calls; c++) v->update(1, n, 1.0f, x, n, &state);
            runs[r] = bench_now_s() - t0;
        }
        bench_report("xent_update", v->tag, "1x98304", runs, calls, 10.0 * (double)n,
                     4.0 * (double)n, (double)fl_lse_value(&state));
    }
    release_all();
}

int main(int argc, char **argv) {
    const bool smoke = bench_smoke(argc, argv);
    static const uint32_t lengths[] = {32, 128, 512};
    for (size_t i = 0; i < (smoke ? 1 : FL_COUNT(lengths)); i++) bench_lengths(lengths[i], smoke);
    bench_rows(smoke);
    return 0;
}
