// convert.h: the formats in which two very small published models come, made into GGUF files, so
// that conformance tests can run them. Readers trust their input: they are for known files only,
// and abort with a message when one is not what it should be.
#ifndef FL_TESTS_CONVERT_H
#define FL_TESTS_CONVERT_H

#include "common/base.h"

// llama2.c's version 0 checkpoint (seven int32, then floats) and its tokenizer file.
void t_convert_llama2c(const char *checkpoint, const char *tokenizer, const char *out);

// A folder with model.safetensors (llama, float32, half-split rotation, tied) and tokenizer.json
// (BPE over U+2581). Queries and keys are reordered for interleaved rotation.
void t_convert_safetensors(const char *folder, const char *out);

// Sizes of a llama model.
typedef struct t_llama_config {
    uint32_t dim, ffn, layers, heads, kv_heads, vocabulary, context;
    float epsilon;
} t_llama_config;

#endif
