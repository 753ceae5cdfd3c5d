// Rates of the packed kernels: every variant over widths, token counts and the models' matrices.
//   bench_gemm_packed             the 1536 x 576 matrix at every width, the other ones at 4 bits
//   bench_gemm_packed --smoke     one small matrix, once
#include "bench/bench.h"
#include "bench/shapes.h"
#include "kernels/dispatch.h"

typedef struct inputs {
    fl_packed w;
    size_t w_size;
    uint32_t tokens;
    float *x;      // [tokens][cols]
    float *y;      // [tokens][rows]
    void *memory;  // of x8
    void *scratch; // of gemm_packed_dx
    fl_x8 x8;
} inputs;

static inputs inputs_make(bench_shape shape, uint32_t bits, uint32_t tokens) {
    inputs in = {.w = {.rows = shape.rows, .cols = shape.cols, .bits = bits}, .tokens = tokens};
    size_t x8_size;
    if (!fl_packed_size(shape.rows, shape.cols, bits, &in.w_size) ||
        !fl_x8_size(tokens, shape.cols, &x8_size))
        abort();
    uint8_t *data = bench_alloc(in.w_size);
    uint8_t codes[FL_PACKED_CODES];
    uint16_t scale[FL_PACKED_ROWS], minimum[FL_PACKED_ROWS];
    for (size_t i = 0; i < FL_PACKED_CODES; i++) codes[i] = (uint8_t)(i * 37 % (1u << bits));
    for (size_t r = 0; r < FL_PACKED_ROWS; r++) {
        scale[r] = fl_f16_from_f32(0.01f * (float)(r + 1));
        minimum[r] = fl_f16_from_f32(bench_randf());
    }
    const size_t tile = fl_packed_tile_size(bits);
    fl_packed_tile_write(data, bits, codes, scale, minimum);
    for (size_t at = tile; at < in.w_size; at += tile) memcpy(data + at, data, tile);
    in.w.data = data;
    in.x = bench_alloc((size_t)tokens * shape.cols * sizeof(float));
    in.y = bench_alloc((size_t)tokens * shape.rows * sizeof(float));
    for (size_t i = 0; i < (size_t)tokens * shape.cols; i++) in.x[i] = bench_randf();
    in.memory = bench_alloc(x8_size);
    in.x8 = fl_x8_bind(in.memory, tokens, shape.cols);
    in.scratch = bench_alloc(FL_GEMM_PACKED_DX_SCRATCH);
    for (uint32_t t = 0; t < tokens; t++)
        fl_quantise_x8_ref(in.x + (size_t)t * shape.cols, shape.cols, &in.x8, t);
    return in;
}

static void inputs_done(inputs *in) {
    free((void *)(uintptr_t)in->w.data);
    free(in->x);
    free(in->y);
    free(in->memory);
    free(in->scratch);
}

static void describe(char *text, size_t size, const inputs *in) {
    snprintf(text, size, "%ux%u bits=%u tokens=%u", in->w.rows, in->w.cols, in->w.bits, in->tokens);
}

static void bench_forward(const fl_gemm_packed_variant *v, inputs *in, bool smoke) {
    const double ops = 2.0 * in->w.rows * in->w.cols * in->tokens;
    double runs[BENCH_RUNS];
    const double start = bench_now_s();
    v->fn(&in->w, 0, in->w.rows, &in->x8, in->y, in->w.rows);
    const size_t calls = bench_calls(bench_now_s() - start, smoke);
    for (int r = 0; r < BENCH_RUNS; r++) {
        const double t0 = bench_now_s();
        for (size_t c = 0; c < calls; c++) v->fn(&in->w, 0, in->w.rows, &in->x8, in->y, in->w.rows);
        runs[r] = bench_now_s() - t0;
    }
    char shape[64];
    describe(shape, sizeof(shape), in);
    const double bytes = (double)in->w_size + 4.0 * in->tokens * in->w.rows;
    bench_report("gemm_packed", v->tag, shape, runs, calls, ops, bytes, (double)in->y[1]);
}

static void bench_backward(const fl_gemm_packed_dx_variant *v, inputs *in, bool smoke) {
    const double ops = 2.0 * in->w.rows * in->w.cols * in->tokens;
    const fl_packed_range all = {0, in->w.rows, 0, in->w.cols};
    for (size_t i = 0; i < (size_t)in->tokens * in->w.rows; i++)
        in->y[i] = (float)(i % 5 + 1) * 0.25f;
    float *dx = bench_alloc((size_t)in->tokens * in->w.cols * sizeof(*dx));
    double runs[BENCH_RUNS];
    const double start = bench_now_s();
    v->fn(&in->w, &all, in->tokens, in->y, in->w.rows, dx, in->w.cols, false, in->scratch);
    const size_t calls = bench_calls(bench_now_s() - start, smoke);
    for (int r = 0; r < BENCH_RUNS; r++) {
        const double t0 = bench_now_s();
        for (size_t c = 0; c < calls; c++)
            v->fn(&in->w, &all, in->tokens, in->y, in->w.rows, dx, in->w.cols, false, in->scratch);
        runs[r] = bench_now_s() - t0;
    }
    char shape[64];
    describe(shape, sizeof(shape), in);
    const double bytes = (double)in->w_size + 4.0 * in->tokens * (in->w.rows + in->w.cols);
    bench_report("gemm_packed_dx", v->tag, shape, runs, calls, ops, bytes, (double)dx[1]);
    free(dx);
}

static void bench_quantise(const fl_quantise_x8_variant *v, inputs *in, bool smoke) {
    double runs[BENCH_RUNS];
    const double start = bench_now_s();
    v->fn(in->x, in->w.cols, &in->x8, 0);
    const size_t calls = bench_calls(bench_now_s() - start, smoke);
    for (int r = 0; r < BENCH_RUNS; r++) {
        const double t0 = bench_now_s();
        for (size_t c = 0; c < calls; c++) v->fn(in->x, in->w.cols, &in->x8, 0);
        runs[r] = bench_now_s() - t0;
    }
    char shape[64];
    snprintf(shape, sizeof(shape), "cols=%u", in->w.cols);
    bench_report("quantise_x8", v->tag, shape, runs, calls, 2.0 * in->w.cols, 5.0 * in->w.cols,
                 (double)in->x8.sums[0]);
}

static void bench_inputs(bench_shape shape, uint32_t bits, uint32_t tokens, bool smoke) {
    inputs in = inputs_make(shape, bits, tokens);
    const uint32_t cpu = fl_cpu_detect();
    // The references are there to be read; they are timed on the smallest work only.
    const bool small = (double)shape.rows * shape.cols * tokens < 2e5;
    for (const fl_gemm_packed_variant *v = fl_gemm_packed_variants; v->fn != NULL; v++) {
        if ((v->need & cpu) == v->need && (v->need != 0 || small)) bench_forward(v, &in, smoke);
    }
    for (const fl_gemm_packed_dx_variant *v = fl_gemm_packed_dx_variants; v->fn != NULL; v++) {
        if ((v->need & cpu) == v->need && (v->need != 0 || small)) bench_backward(v, &in, smoke);
    }
    for (const fl_quantise_x8_variant *v = fl_quantise_x8_variants; tokens == 1 && v->fn; v++) {
        if ((v->need & cpu) == v->need) bench_quantise(v, &in, smoke);
    }
    inputs_done(&in);
}

int main(int argc, char **argv) {
    if (bench_smoke(argc, argv)) {
        for (uint32_t bits = 2; bits <= 8; bits++)
            bench_inputs((bench_shape){17, 70}, bits, bits - 1, true);
        return 0;
    }
    static const uint32_t tokens[] = {1, 32, 256};
    for (uint32_t bits = 2; bits <= 8; bits++) {
        for (size_t i = 0; i < FL_COUNT(tokens); i++)
            bench_inputs((bench_shape){1536, 576}, bits, tokens[i], false);
    }
    for (size_t n = 0; n < FL_COUNT(bench_shapes); n++) {
        for (size_t i = 0; i < FL_COUNT(tokens); i++) {
            const bool head = bench_shapes[n].rows > 10000;
            if (!head || tokens[i] < 256) bench_inputs(bench_shapes[n], 4, tokens[i], false);
        }
    }
    return 0;
}
