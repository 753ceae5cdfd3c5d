// Exactly N repetitions of one thing with one thread, and no clock: for counting instructions, or
// for a profiler. What a repetition costs is (count of 2 N - count of N) / N.
//   bench_repeat product VARIANT ROWS COLS BITS TOKENS N    gemm_packed, its x quantised before
//   bench_repeat dx VARIANT ROWS COLS BITS TOKENS N         gemm_packed_dx
//   bench_repeat layer VARIANT BITS TOKENS N                the seven products of a SmolLM2-135M
//   layer bench_repeat prefill MODEL.gguf TOKENS N                all layers, the last token's
//   logits bench_repeat decode MODEL.gguf TOKENS N                 one token after so many, and its
//   logits bench_repeat --smoke                                    all of them, small
#include "bench/bench.h"
#include "common/pool.h"
#include "node/exits/head.h"
#include "node/model/generate.h"
#include "tests/model_fixtures.h"

typedef struct work {
    fl_packed w;
    fl_x8 x8;
    float *x, *y; // [tokens][cols], [tokens][rows]
    void *data, *memory, *scratch;
} work;

static work work_make(uint32_t rows, uint32_t cols, uint32_t bits, uint32_t tokens) {
    work k = {.w = {.rows = rows, .cols = cols, .bits = bits}};
    size_t size, x8_size;
    if (!fl_packed_size(rows, cols, bits, &size) || !fl_x8_size(tokens, cols, &x8_size)) abort();
    uint8_t *data = k.data = bench_alloc(size);
    for (size_t i = 0; i < size; i++) // heads of zeros and small halves: nothing overflows
        data[i] = (uint8_t)(i % fl_packed_tile_size(bits) < FL_PACKED_HEAD ? i % 2 * 16 : i * 37);
    k.w.data = data;
    k.x = bench_alloc((size_t)tokens * cols * sizeof(float));
    k.y = bench_alloc((size_t)tokens * rows * sizeof(float));
    for (size_t i = 0; i < (size_t)tokens * cols; i++) k.x[i] = bench_randf();
    for (size_t i = 0; i < (size_t)tokens * rows; i++) k.y[i] = bench_randf();
    k.memory = bench_alloc(x8_size);
    k.scratch = bench_alloc(FL_GEMM_PACKED_DX_SCRATCH);
    k.x8 = fl_x8_bind(k.memory, tokens, cols);
    for (uint32_t t = 0; t < tokens; t++)
        fl_quantise_x8_ref(k.x + (size_t)t * cols, cols, &k.x8, t);
    return k;
}

static void work_done(work *k) {
    free(k->data);
    free(k->x);
    free(k->y);
    free(k->memory);
    free(k->scratch);
}

static bool runs_here(const char *tag, const char *wanted, uint32_t need) {
    return strcmp(tag, wanted) == 0 && (need & fl_cpu_detect()) == need;
}

static const fl_gemm_packed_variant *product_variant(const char *tag) {
    const fl_gemm_packed_variant *v = fl_gemm_packed_variants;
    while (v->fn != NULL && !runs_here(v->tag, tag, v->need)) v++;
    return v->fn != NULL ? v : NULL;
}

static int product(const char *tag, uint32_t rows, uint32_t cols, uint32_t bits, uint32_t tokens,
                   long n) {
    const fl_gemm_packed_variant *v = product_variant(tag);
    if (v == NULL) return 1;
    work k = work_make(rows, cols, bits, tokens);
    for (long i = 0; i < n; i++) v->fn(&k.w, 0, rows, &k.x8, k.y, rows);
    printf("product %s %ux%u bits=%u tokens=%u n=%ld check=%.6g\n", tag, rows, cols, bits, tokens,
           n, (double)k.y[rows / 2]);
    work_done(&k);
    return 0;
}

static int layer(const char *tag, uint32_t bits, uint32_t tokens, long n) {
    static const uint32_t shapes[][2] = {{576, 576},  {192, 576},  {192, 576}, {576, 576},
                                         {1536, 576}, {1536, 576}, {576, 1536}};
    for (size_t i = 0; i < FL_COUNT(shapes); i++)
        if (product(tag, shapes[i][0], shapes[i][1], bits, tokens, n) != 0) return 1;
    return 0;
}

static int dx(const char *tag, uint32_t rows, uint32_t cols, uint32_t bits, uint32_t tokens,
              long n) {
    const fl_gemm_packed_dx_variant *v = fl_gemm_packed_dx_variants;
    while (v->fn != NULL && !runs_here(v->tag, tag, v->need)) v++;
    if (v->fn == NULL) return 1;
    work k = work_make(rows, cols, bits, tokens);
    const fl_packed_range all = {0, rows, 0, cols};
    for (long i = 0; i < n; i++) v->fn(&k.w, &all, tokens, k.y, rows, k.x, cols, false, k.scratch);
    printf("dx %s %ux%u bits=%u tokens=%u n=%ld check=%.6g\n", tag, rows, cols, bits, tokens, n,
           (double)k.x[cols / 2]);
    work_done(&k);
    return 0;
}

static void logits_of(const node_engine *engine, const node_model *m, const float *hidden,
                      float *norm, float *logits, node_scratch *scratch) {
    node_head_norm(engine, m, m->final_norm, 1, hidden + (size_t)(m->exits - 1) * m->hidden, norm);
    node_matmul(engine, &m->head, 1, norm, logits, scratch);
}

static int forward(const node_model *m, bool decode, uint32_t tokens, long n) {
    fl_kern kern;
    fl_pool *pool = NULL;
    fl_kern_select(&kern, fl_cpu_detect());
    const node_session_opts opts = {tokens + 1, tokens, 1, 0};
    size_t size;
    fl_arena arena;
    fl_arena_init_counting(&arena);
    node_scratch_bind(m, 1, 1, &arena);
    if (fl_pool_open(1, &pool, NULL) != FL_OK) abort();
    if (node_session_plan(m, &opts, &size, NULL) != FL_OK) abort();
    size += arena.peak + 64;
    void *block = bench_alloc(size);
    fl_arena_init(&arena, block, size);
    node_session *s = node_session_bind(m, &opts, &arena);
    node_scratch *scratch = node_scratch_bind(m, 1, 1, &arena);
    float *norm = bench_alloc(m->hidden * sizeof(*norm));
    float *logits = bench_alloc(m->vocabulary * sizeof(*logits));
    int32_t *ids = bench_alloc(tokens * sizeof(*ids));
    const node_engine e = {&kern, pool};
    const float *hidden = NULL;
    for (uint32_t i = 0; i < tokens; i++) ids[i] = (int32_t)((uint64_t)i * 7919 % m->vocabulary);
    if (decode && node_session_feed(s, &e, NULL, ids, tokens, &hidden, NULL) != FL_OK) abort();
    for (long i = 0; i < n; i++) {
        node_session_rewind(s, decode ? tokens : 0);
        if (node_session_feed(s, &e, NULL, ids, decode ? 1 : tokens, &hidden, NULL) != FL_OK)
            abort();
        logits_of(&e, m, hidden, norm, logits, scratch);
    }
    printf("%s %s tokens=%u n=%ld check=%.6g\n", decode ? "decode" : "prefill",
           kern.gemm_packed_tag, tokens, n, (double)logits[0]);
    fl_pool_close(pool);
    free(ids);
    free(logits);
    free(norm);
    free(block);
    return 0;
}

static int forward_file(const char *path, bool decode, uint32_t tokens, long n) {
    node_model *m = NULL;
    fl_err err;
    if (node_model_open(path, &m, &err) != FL_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    const int status = forward(m, decode, tokens, n);
    node_model_close(m);
    return status;
}

static int smoke(void) {
    t_model_opts o = t_model_even();
    o.bits = 4;
    node_model *m = t_model_make(&o);
    const int failed = product("ref", 17, 70, 3, 2, 1) + dx("ref", 17, 70, 3, 2, 1) +
                       layer("ref", 2, 1, 1) + forward(m, false, 5, 2) + forward(m, true, 5, 2);
    node_model_close(m);
    return failed;
}

static uint32_t number(const char *text) {
    char *end;
    const unsigned long v = strtoul(text, &end, 10);
    if (*end != 0 || v == 0 || v > UINT32_MAX) {
        fprintf(stderr, "not a number above 0: %s\n", text);
        exit(2);
    }
    return (uint32_t)v;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    uint32_t v[5] = {0};
    for (int i = 3; i < argc && i < 8; i++) v[i - 3] = number(argv[i]);
    int status = 2;
    if (argc == 2 && strcmp(what, "--smoke") == 0) status = smoke();
    if (argc == 8 && strcmp(what, "product") == 0)
        status = product(argv[2], v[0], v[1], v[2], v[3], v[4]);
    if (argc == 8 && strcmp(what, "dx") == 0) status = dx(argv[2], v[0], v[1], v[2], v[3], v[4]);
    if (argc == 6 && strcmp(what, "layer") == 0) status = layer(argv[2], v[0], v[1], v[2]);
    if (argc == 5 && strcmp(what, "prefill") == 0)
        status = forward_file(argv[2], false, v[0], v[1]);
    if (argc == 5 && strcmp(what, "decode") == 0) status = forward_file(argv[2], true, v[0], v[1]);
    if (status == 1) fprintf(stderr, "no such variant here, or no such model\n");
    if (status == 2) fprintf(stderr, "usage: see the head of bench/bench_repeat.c\n");
    return status;
}
