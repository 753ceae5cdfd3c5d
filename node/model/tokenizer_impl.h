// tokenizer_impl.h: the inside of a tokenizer, shared by the file that builds it and the one that
// uses it.
#ifndef NODE_MODEL_TOKENIZER_IMPL_H
#define NODE_MODEL_TOKENIZER_IMPL_H

#include "node/model/pretoken.h"
#include "node/model/tokenizer.h"

enum { NODE_SPECIAL_SIZE_MAX = 127 }; // longer control tokens are not looked for in text

// Two neighbours that may merge. Empty: rank is UINT32_MAX.
typedef struct node_pair {
    uint32_t left, right, rank, id;
} node_pair;

// Open addressing over token texts: a slot holds id + 1, 0 when empty; at most half full.
typedef struct node_text_hash {
    uint32_t *slot;
    uint32_t mask;
} node_text_hash;

struct node_tokenizer {
    bool sentencepiece, whole_words_merge, words_split;
    bool add_bos, add_eos, add_space_prefix;
    node_pretoken pre;
    uint32_t count;
    int32_t bos, eos, unknown;
    uint32_t text_size_max; // of normal tokens
    const uint8_t *texts;
    const uint32_t *offset; // [count + 1] token i is texts[offset[i] .. offset[i + 1])
    const uint8_t *type;    // [count] node_token_type
    const uint32_t *rank;   // [count] SentencePiece: order in which unions merge, lowest first
    int32_t byte_id[256];   // token of a single byte, -1 for none
    int32_t end_id[8];      // tokens that end a turn
    uint32_t end_count;
    node_text_hash normal, special;
    uint64_t special_size[2];  // bit n: some special token has n bytes
    uint64_t special_first[4]; // bit b: some special token begins with byte b
    uint32_t pair_mask;
    const node_pair *pair; // [pair_mask + 1]
};

fl_bytes node_tokenizer_text(const node_tokenizer *t, uint32_t id);
// Id of a token with this text in one of the two hashes, -1 for none.
int32_t node_tokenizer_find(const node_tokenizer *t, const node_text_hash *hash, fl_bytes text);
uint32_t node_pair_hash(uint32_t left, uint32_t right);

#endif
