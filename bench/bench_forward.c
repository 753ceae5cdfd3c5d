// What a layer costs: prefill of 256 tokens and decode of one token after 256, for a model of
// SmolLM2-135M's shapes stored in several ways, with one thread and with all.
//   bench_forward             random models of 4 layers
//   bench_forward MODEL.gguf  that file's layers
// ns are per token and layer. GB/s of decode counts the bytes of the layers' matrices.
#include "bench/bench.h"
#include "common/clock.h"
#include "common/pool.h"
#include "kernels/ggml.h"
#include "node/model/generate.h"
#include "tests/model_fixtures.h"

#include <unistd.h>

enum { PROMPT = 256, RUNS = 5 };

static size_t layer_bytes(const node_model *m) {
    size_t size = 0;
    for (uint32_t l = 0; l < m->layers; l++)
        for (node_module i = 0; i < NODE_MODULES; i++) size += m->layer[l].linear[i].size;
    return size;
}

static double feed(node_session *s, const node_engine *e, const int32_t *ids, size_t count) {
    const float *hidden = NULL;
    const double start = fl_clock_s();
    if (node_session_feed(s, e, NULL, ids, count, &hidden, NULL) != FL_OK) abort();
    return fl_clock_s() - start;
}

static void measure(const char *name, const node_model *m, const fl_kern *kern, unsigned threads,
                    bool smoke) {
    const uint32_t prompt = smoke ? 9 : PROMPT;
    const node_session_opts opts = {prompt + 16, prompt, threads, 0};
    fl_pool *pool = NULL;
    size_t size;
    if (fl_pool_open(threads, &pool, NULL) != FL_OK) abort();
    if (node_session_plan(m, &opts, &size, NULL) != FL_OK) abort();
    fl_arena arena;
    void *block = bench_alloc(size);
    fl_arena_init(&arena, block, size);
    node_session *s = node_session_bind(m, &opts, &arena);
    const node_engine e = {kern, pool};
    int32_t ids[PROMPT];
    for (uint32_t i = 0; i < PROMPT; i++) ids[i] = (int32_t)((i * 7919) % m->vocabulary);
    double prefill = 1e9, decode = 1e9;
    for (int run = 0; run < (smoke ? 1 : RUNS); run++) {
        node_session_rewind(s, 0);
        const double a = feed(s, &e, ids, prompt);
        prefill = a < prefill ? a : prefill;
        for (int i = 0; i < 16; i++) {
            const double b = feed(s, &e, ids + i % 9, 1);
            decode = b < decode ? b : decode;
        }
    }
    printf("%s\t%u threads\tprefill %.0f ns, %.1f tokens/s of %u layers\tdecode %.0f ns, %.1f "
           "tokens/s, %.2f GB/s\n",
           name, threads, prefill * 1e9 / prompt / m->layers, prompt / prefill, m->layers,
           decode * 1e9 / m->layers, 1 / decode, (double)layer_bytes(m) / decode * 1e-9);
    fl_pool_close(pool);
    free(block);
}

static void measure_all(const char *name, const node_model *m, bool smoke) {
    fl_kern kern;
    fl_kern_select(&kern, fl_cpu_detect());
    const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    measure(name, m, &kern, 1, smoke);
    if (cpus > 1) measure(name, m, &kern, cpus > 64 ? 64 : (unsigned)cpus, smoke);
}

int main(int argc, char **argv) {
    const bool smoke = argc > 1 && strcmp(argv[1], "--smoke") == 0;
    node_model *m = NULL;
    if (argc > 1 && !smoke) {
        fl_err err;
        if (node_model_open(argv[1], &m, &err) != FL_OK) {
            fprintf(stderr, "%s\n", err.text);
            return 1;
        }
        measure_all(argv[1], m, false);
        node_model_close(m);
        return 0;
    }
    t_model_opts o = {.layers = 4,
                      .hidden = 576,
                      .heads = 9,
                      .kv_heads = 3,
                      .head_size = 64,
                      .ffn = 1536,
                      .vocabulary = 512,
                      .seed = 1};
    if (smoke) o.layers = 1, o.ffn = 160;
    static const uint32_t types[] = {FL_GGML_F32, FL_GGML_F16, FL_GGML_Q8_0, FL_GGML_Q4_1};
    for (size_t i = 0; i < FL_COUNT(types); i++) {
        o.type = types[i];
        m = t_model_make(&o);
        measure_all(fl_ggml_type_find(o.type)->name, m, smoke);
        node_model_close(m);
    }
    for (o.bits = 2; o.bits <= 8; o.bits += o.bits < 4 ? 1 : 2) {
        char name[16];
        snprintf(name, sizeof(name), "packed %u", o.bits);
        m = t_model_make(&o);
        measure_all(name, m, smoke);
        node_model_close(m);
    }
    return 0;
}
