// make_vocabulary.h: made-up vocabularies of the size and kind of published ones, as keys of a GGUF
// file. Every byte has a token, so any text has tokens; the other tokens join letters, so that
// ordinary text takes about two to three bytes a token.
#ifndef FL_TESTS_MAKE_VOCABULARY_H
#define FL_TESTS_MAKE_VOCABULARY_H

#include "node/model/gguf_write.h"

// SentencePiece, as Llama 2 and TinyLlama have it: <unk>, <s>, </s>, 256 byte tokens, pieces with
// falling scores. count >= 400.
void t_vocabulary_pieces(node_gguf_writer *w, uint32_t count);

// Byte-level BPE with merges, as Qwen2.5 has it: 256 bytes, joined pairs, pairs and a letter; the
// last 293 of `count` are special, three of them with names, the others unused. count >= 700.
void t_vocabulary_merges(node_gguf_writer *w, uint32_t count);

#endif
