// Input: a GGUF file, plain or a compressed model.
// Property: no crash and no read outside, whatever the bytes; all that was accepted lies inside the
// bytes; a model that opens can be run: one layer over two tokens touches every matrix as the
// kernels would.
#include "node/model/forward.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { RUN_MAX = 1 << 22 }; // bytes of scratch that a run may ask for: a fuzzer's patience

static void walk(const node_gguf *g) {
    const fl_bytes all = node_gguf_bytes(g);
    for (size_t i = 0; i < node_gguf_key_count(g); i++) {
        const node_gguf_value *v = &node_gguf_key_at(g, i)->value;
        FL_ASSERT(v->bytes.size <= all.size);
        if (v->type != NODE_GGUF_ARRAY || v->item != NODE_GGUF_STRING) continue;
        fl_reader r = {.in = v->bytes};
        for (uint64_t n = 0; n < v->count; n++) (void)node_gguf_next_string(&r);
        FL_ASSERT(!r.bad && fl_reader_left(&r) == 0);
    }
    for (size_t i = 0; i < node_gguf_tensor_count(g); i++) {
        const node_gguf_tensor *t = node_gguf_tensor_at(g, i);
        FL_ASSERT(t->data.data >= all.data && t->data.size <= all.size);
        FL_ASSERT((size_t)(t->data.data - all.data) <= all.size - t->data.size);
        char name[NODE_GGUF_NAME_MAX + 1] = {0};
        memcpy(name, t->name.data, t->name.size);
        FL_ASSERT(strlen(name) != t->name.size || node_gguf_find_tensor(g, name) == t);
    }
}

static void take(const node_model *m, fl_arena *arena, node_acts *acts, node_scratch **scratch,
                 float **x) {
    node_acts_bind(acts, m, 2, 2, 0, arena);
    *scratch = node_scratch_bind(m, 2, 1, arena);
    *x = FL_ARENA_NEW(arena, float, 2 * (size_t)m->hidden);
}

static void run(const node_model *m) {
    static const uint32_t pos[2] = {0, 1}, zero[2] = {0, 0};
    static const int32_t id[2] = {0, 0};
    const node_batch batch = {2, id, pos, zero, pos};
    fl_kern kern;
    fl_kern_select(&kern, fl_cpu_detect());
    const node_engine engine = {&kern, NULL};
    fl_arena arena;
    node_acts acts;
    node_scratch *scratch;
    float *x;
    fl_arena_init_counting(&arena);
    take(m, &arena, &acts, &scratch, &x);
    const size_t size = arena.peak;
    if (size > RUN_MAX) return;
    void *block = aligned_alloc(64, (size + 63) / 64 * 64);
    FL_ASSERT(block != NULL);
    fl_arena_init(&arena, block, size);
    take(m, &arena, &acts, &scratch, &x);
    node_embed(&engine, m, &batch, x);
    for (uint32_t l = 0; l < m->layers && l < 3; l++)
        node_layer_forward(&engine, m, l, NULL, &batch, &acts, scratch, x);
    free(block);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    // Aligned as a mapping is, and of exactly the size, so that a sanitizer sees one byte too many.
    uint8_t *copy = NULL;
    if (posix_memalign((void **)&copy, 64, size + (size == 0)) != 0) return 0;
    if (size != 0) memcpy(copy, data, size);
    const fl_bytes bytes = {copy, size};
    node_gguf *g = NULL;
    if (node_gguf_open_bytes(bytes, &g, NULL) == FL_OK) walk(g);
    node_gguf_close(g);
    node_model *m = NULL;
    if (node_model_open_bytes(bytes, &m, NULL) == FL_OK) run(m);
    node_model_close(m);
    free(copy);
    return 0;
}
