// One tuning step on the shapes of SmolLM2-135M (last window, 128 tokens), packed at 4 bits with an
// 8-bit head, weights random: tokens a second of the whole step. --smoke: a small model, two steps.
// Arguments: [--smoke] [--threads=N] [--steps=N].
#include "common/clock.h"
#include "node/tune/tuner.h"
#include "tests/tiny_model.h"

typedef struct args {
    bool smoke;
    uint32_t threads;
    int steps;
} args;

static args parse(int argc, char **argv) {
    args a = {.threads = 2, .steps = 5};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--smoke") == 0) a.smoke = true, a.steps = 2;
        if (strncmp(argv[i], "--threads=", 10) == 0)
            a.threads = (uint32_t)strtoul(argv[i] + 10, NULL, 10);
        if (strncmp(argv[i], "--steps=", 8) == 0) a.steps = (int)strtol(argv[i] + 8, NULL, 10);
    }
    return a;
}

static tiny_shape shape_of(bool smoke) {
    tiny_shape s = {.layers = 30,
                    .hidden = 576,
                    .ffn = 1536,
                    .heads = 9,
                    .kv_heads = 3,
                    .head_size = 64,
                    .vocabulary = 49152,
                    .exits = 4,
                    .bits = 4};
    if (!smoke) return s;
    s.layers = 4, s.hidden = 64, s.ffn = 128, s.heads = 4, s.kv_heads = 2, s.head_size = 16;
    s.vocabulary = 512;
    return s;
}

int main(int argc, char **argv) {
    const args a = parse(argc, argv);
    const tiny_shape shape = shape_of(a.smoke);
    tiny_model *t = tiny_open(&shape);
    int32_t *ids = malloc(4096 * sizeof(*ids));
    const uint64_t begin[] = {0, 1000, 2000, 4096};
    fl_err err = {0};
    fl_kern kern;
    fl_pool *pool = NULL;
    node_adapter *adapter = NULL;
    node_adapter_opts adapter_opts = node_adapter_defaults();
    node_tune_opts opts = node_tune_defaults();
    node_tune_plan plan;
    for (int i = 0; i < 4096; i++) ids[i] = (int32_t)(t_rand() % shape.vocabulary);
    const node_docs docs = {ids, begin, 3};
    opts.threads = a.threads;
    fl_kern_select(&kern, fl_cpu_detect());
    if (fl_pool_open(a.threads, &pool, &err) != FL_OK ||
        node_adapter_open(&t->model, &adapter_opts, &adapter, &err) != FL_OK ||
        node_tune_make_plan(&t->model, adapter->lora.rank, &docs, &opts, &plan, &err) != FL_OK) {
        fprintf(stderr, "bench_tune: %s\n", err.text);
        return 1;
    }
    void *block = aligned_alloc(64, (plan.arena_bytes + 63) / 64 * 64);
    node_tuner *tuner = malloc(sizeof(*tuner));
    if (block == NULL || tuner == NULL) return 1;
    const node_engine engine = {&kern, pool};
    fl_arena arena;
    fl_arena_init(&arena, block, plan.arena_bytes);
    node_tuner_bind(tuner, &engine, &t->model, adapter, &docs, &plan.opts, &arena);
    double best = 0, loss = 0;
    for (int i = 0; i < a.steps; i++) {
        node_tune_report report;
        const double start = fl_clock_s();
        node_tuner_step(tuner, &report);
        const double rate = (double)report.tokens / (fl_clock_s() - start);
        best = rate > best ? rate : best;
        loss = report.loss;
    }
    printf("tune  %u layers of %u, window %u, %u tokens, %u kept, %u threads: %.1f tokens/s, "
           "arena %.1f MB, check %.6f\n",
           shape.layers, shape.hidden, plan.window, plan.opts.sequence, plan.opts.kept, a.threads,
           best, (double)plan.arena_bytes / 1e6, loss);
    free(tuner);
    free(block);
    node_adapter_close(adapter);
    fl_pool_close(pool);
    free(ids);
    tiny_close(t);
    return 0;
}
