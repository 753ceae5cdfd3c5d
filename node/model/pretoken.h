// pretoken.h: cuts text into the words inside which byte pairs may merge.
//
// Each kind is the regular expression that the models of that family were trained with, written out
// as a scanner without backtracking, so time is linear in the text. A character that is not
// well-formed UTF-8 counts as one that is no letter, number or space.
#ifndef NODE_MODEL_PRETOKEN_H
#define NODE_MODEL_PRETOKEN_H

#include "common/base.h"

typedef enum node_pretoken {
    // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    NODE_PRETOKEN_GPT2,
    // every \p{N} is a piece of its own, then GPT2 on what lies between
    NODE_PRETOKEN_SMOLLM,
    // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|
    // \s*[\r\n]+|\s+(?!\S)|\s+
    NODE_PRETOKEN_LLAMA3,
    // as LLAMA3, with \p{N} in place of \p{N}{1,3}
    NODE_PRETOKEN_QWEN2,
} node_pretoken;

// The kind for a value of GGUF's `tokenizer.ggml.pre`; false when the name is not known.
bool node_pretoken_find(const char *name, node_pretoken *ret_kind) FL_NODISCARD;

// The end of the word that begins at `at` < text.size; always above `at`.
size_t node_pretoken_next(node_pretoken kind, fl_bytes text, size_t at);

#endif
