// model_fixtures.h: small random models as GGUF files, for every test that needs one.
//
// Weights are a function of (seed, tensor, element) alone, so that the same options with another
// `type` or `bits` give the same model, stored differently.
#ifndef FL_TESTS_MODEL_FIXTURES_H
#define FL_TESTS_MODEL_FIXTURES_H

#include "common/status.h"
#include "node/model/model.h"

typedef struct t_model_opts {
    const char *architecture; // NULL: "llama"
    uint32_t layers, hidden, heads, kv_heads, head_size, ffn, vocabulary;
    uint32_t type;     // ggml type of the matrices: F32, F16, BF16, Q8_0 or Q4_1
    uint32_t bits;     // 2..8: a compressed model, its matrices packed; 0: `type`
    bool untied;       // a head of its own
    bool biases;       // of q, k, v
    bool rope_factors; // llama3's
    bool pruned;       // compressed only: odd layers lose a key/value group and some ffn channels
    uint64_t seed;
} t_model_opts;

// Odd sizes that no vector width divides: 3 layers, hidden 72, 6 heads on 3, head size 12, ffn 100,
// vocabulary 131, F32.
t_model_opts t_model_odd(void);
// Sizes that ggml's 32-blocks fit: 4 layers, hidden 64, 4 heads on 2, head size 16, ffn 96,
// vocabulary 160, F32.
t_model_opts t_model_even(void);

fl_status t_model_write(const char *path, const t_model_opts *opts, fl_err *err) FL_NODISCARD;

// Writes, opens and unlinks (the mapping stays). Aborts with a message when that fails.
node_model *t_model_make(const t_model_opts *opts);

// Packs w[rows][cols] into out[fl_packed_size] by the range of each group: no rounding cleverness.
void t_pack(const float *w, uint32_t rows, uint32_t cols, uint32_t bits, uint8_t *out);

#endif
