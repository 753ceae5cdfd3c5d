// tokenizer.h: text to token ids and back, from the vocabulary that a GGUF file carries.
//
// Two families. Byte-level BPE (`tokenizer.ggml.model` = "gpt2"): Sennrich, Haddow, Birch 2016,
// algorithm 1, on bytes (Radford et al. 2019, section 2.2). SentencePiece BPE ("llama"): Kudo and
// Richardson 2018; the pair whose union scores best merges first, what stays unknown becomes bytes.
// In both, ties go to the leftmost pair.
//
// A tokenizer is one block of memory, never changed after it is opened: any number of threads may
// use it. Encoding n bytes takes O(n log n) whatever the text: merges come from a heap over a
// linked list, and words longer than NODE_WORD_MAX bytes are cut there, which bounds the scratch
// memory.
//
// Text need not be UTF-8. Each byte that is not part of a character is one of its own; it encodes
// to the token of that byte. A byte without any token is dropped by BPE and gives the unknown token
// in SentencePiece (nothing, where the vocabulary has no unknown token).
#ifndef NODE_MODEL_TOKENIZER_H
#define NODE_MODEL_TOKENIZER_H

#include "common/status.h"
#include "node/model/gguf.h"

enum {
    NODE_TOKENS_MAX = 1 << 20,  // tokens, and half the merges
    NODE_TOKEN_SIZE_MAX = 4096, // bytes of one token's text
    NODE_TEXTS_MAX = 1 << 28,   // bytes of all tokens' texts
    NODE_WORD_MAX = 1 << 16,    // bytes
};

// GGUF's tokenizer.ggml.token_type.
typedef enum node_token_type {
    NODE_TOKEN_NORMAL = 1,
    NODE_TOKEN_UNKNOWN = 2,
    NODE_TOKEN_CONTROL = 3,
    NODE_TOKEN_USER = 4,
    NODE_TOKEN_UNUSED = 5,
    NODE_TOKEN_BYTE = 6,
} node_token_type;

// What a tokenizer is made from: borrowed views, needed only during open. Arrays whose length is
// not said have `count` elements.
typedef struct node_vocabulary {
    const char *model; // "gpt2" or "llama"
    const char *pre;   // "gpt-2", "smollm", ...: see pretoken.h; not looked at for "llama"
    uint32_t count;
    const fl_bytes *token;     // as GGUF writes them: byte-level alphabet, or U+2581 for spaces
    const float *score;        // "llama" only
    const int32_t *type;       // NULL: all normal
    uint32_t merge_count;      // "gpt2" only
    const fl_bytes *merge;     // [merge_count] "left right", most urgent first
    int32_t bos, eos, unknown; // ids; -1 for none
    bool add_bos, add_eos, add_space_prefix;
} node_vocabulary;

typedef struct node_tokenizer node_tokenizer;

// FL_EFORMAT names the token or merge that is wrong; FL_EUNSUPPORTED a model or pre-tokenizer that
// is not known; FL_ELIMIT a vocabulary above the limits; FL_ENOMEM.
fl_status node_tokenizer_open(const node_vocabulary *vocabulary, node_tokenizer **ret,
                              fl_err *err) FL_NODISCARD;
// The same from a file's metadata (tokenizer.ggml.*). FL_ENOENT when it carries no tokenizer. What
// it leaves out is what the family does by default: SentencePiece begins with bos and a space.
fl_status node_tokenizer_open_gguf(const node_gguf *file, node_tokenizer **ret,
                                   fl_err *err) FL_NODISCARD;
void node_tokenizer_close(node_tokenizer *tokenizer); // NULL is fine

enum {
    NODE_ENCODE_SPECIAL = 1, // "<|im_start|>" in the text means that token, not its letters
    NODE_ENCODE_ENDS = 2, // first and last tokens that the model was trained with, where it has any
};

// Never more ids than this come from `size` bytes.
size_t node_tokenizer_ids_max(size_t size);

// ids[ids_max]. FL_ELIMIT when they do not suffice, FL_ENOMEM for the scratch (at most 5 MiB).
fl_status node_tokenizer_encode(const node_tokenizer *tokenizer, fl_bytes text, unsigned flags,
                                int32_t *ids, size_t ids_max, size_t *ret_count,
                                fl_err *err) FL_NODISCARD;

// The bytes that a token stands for, which may be part of a character; empty for control tokens
// unless `special`, and for ids that do not exist.
fl_bytes node_tokenizer_piece(const node_tokenizer *tokenizer, int32_t id, bool special);

// All pieces, less the space that encoding put before the text. FL_ELIMIT above out_max bytes.
fl_status node_tokenizer_decode(const node_tokenizer *tokenizer, const int32_t *ids, size_t count,
                                bool special, uint8_t *out, size_t out_max, size_t *ret_size,
                                fl_err *err) FL_NODISCARD;

uint32_t node_tokenizer_count(const node_tokenizer *tokenizer);
int32_t node_tokenizer_bos(const node_tokenizer *tokenizer); // -1 for none
int32_t node_tokenizer_eos(const node_tokenizer *tokenizer); // -1 for none
// The special token with exactly this text, -1 when there is none.
int32_t node_tokenizer_special(const node_tokenizer *tokenizer, const char *text);
// Does this token end a turn or a text (eos, or one of the usual names)? Generation stops there.
bool node_tokenizer_is_end(const node_tokenizer *tokenizer, int32_t id);

#endif
