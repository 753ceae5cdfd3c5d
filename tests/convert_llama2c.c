// Layout of the checkpoint and of the tokenizer file: as llama2.c writes them (version 0 export).
#include "tests/convert.h"
#include "tests/convert_common.h"

// After the header, in this order; per-layer tensors follow each other layer by layer.
static void take_weights(t_convert *c, const float *w) {
    const t_llama_config *k = &c->config;
    const uint32_t kv = k->dim / k->heads * k->kv_heads, dim = k->dim;
    static const char *const attention[] = {"attn_q", "attn_k", "attn_v", "attn_output"};
    const uint32_t rows[] = {dim, kv, kv, dim};
    w = t_convert_take(c, w, "token_embd.weight", k->vocabulary, dim);
    w = t_convert_take_layers(c, w, "attn_norm", 0, dim);
    for (int i = 0; i < 4; i++) w = t_convert_take_layers(c, w, attention[i], rows[i], dim);
    w = t_convert_take_layers(c, w, "ffn_norm", 0, dim);
    w = t_convert_take_layers(c, w, "ffn_gate", k->ffn, dim);
    w = t_convert_take_layers(c, w, "ffn_down", dim, k->ffn);
    w = t_convert_take_layers(c, w, "ffn_up", k->ffn, dim);
    t_convert_take(c, w, "output_norm.weight", 0, dim);
}

// int32 longest, then for every token: float score, int32 length, bytes.
static void take_tokens(t_convert *c, fl_bytes file) {
    fl_reader r = {.in = file};
    fl_read_u32(&r);
    for (uint32_t i = 0; i < c->config.vocabulary; i++) {
        const fl_bytes score = fl_read_bytes(&r, 4);
        const fl_bytes text = fl_read_bytes(&r, fl_read_u32(&r));
        if (r.bad) t_convert_die("the tokenizer file is cut short");
        const int32_t type = i == 0 ? 2 : i < 3 ? 3 : i < 3 + 256 ? 6 : 1; // unknown control byte
        t_convert_token(c, text, fl_get_f32(score.data), type);
    }
}

void t_convert_llama2c(const char *checkpoint, const char *tokenizer, const char *out) {
    const fl_bytes file = t_convert_read(checkpoint), tokens = t_convert_read(tokenizer);
    if (file.size < 28) t_convert_die(checkpoint);
    const uint8_t *p = file.data;
    t_convert c = {.config = {.dim = fl_get_u32(p),
                              .ffn = fl_get_u32(p + 4),
                              .layers = fl_get_u32(p + 8),
                              .heads = fl_get_u32(p + 12),
                              .kv_heads = fl_get_u32(p + 16),
                              .vocabulary = fl_get_u32(p + 20),
                              .context = fl_get_u32(p + 24),
                              .epsilon = 1e-5f}};
    c.end = (const float *)(const void *)(file.data + file.size / 4 * 4);
    take_weights(&c, (const float *)(const void *)(p + 28));
    take_tokens(&c, tokens);
    t_convert_write(&c, out);
    free((void *)(uintptr_t)file.data);
    free((void *)(uintptr_t)tokens.data);
}
