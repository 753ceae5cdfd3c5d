// data.h: private text made ready for tuning: documents, a held-out part, tokens, micro-batches.
//
//   Input      a file, or a folder of which every *.txt, *.md, *.text, *.raw and *.tokens file is
//              read, in order of name, no deeper. Text must be UTF-8: FL_EFORMAT names the file and
//              the byte. Nothing to learn from is FL_EARG.
//   Documents  are separated by lines `<|endoftext|>` (or that mark anywhere in a line). A text
//              without one is cut at blank lines into documents of about 2000 bytes; without blank
//              lines, at ends of lines, or at last between characters.
//   Held out   a document whose hash falls in the lowest tenth is never trained on: the same
//              documents whatever the order of files, the seed or the run. At least one is held out
//              and at least one is not, when there are two.
//   Tokens     each document once, as begin token, its ids, and the end token as what its last
//              token should predict. Tokens of the file's own text are not read as control tokens.
//   Memory     4 bytes a token, once, at most opts.tokens_max (the rest of the text is left out,
//              which `truncated` says).
#ifndef NODE_TUNE_DATA_H
#define NODE_TUNE_DATA_H

#include "common/arena.h"
#include "common/status.h"
#include "node/model/forward.h"
#include "node/model/tokenizer.h"

enum { NODE_CORPUS_TOKENS_MAX = 1 << 26, NODE_CORPUS_BYTES_MAX = 1 << 30 };

typedef struct node_corpus_opts {
    uint32_t tokens_max; // 0: NODE_CORPUS_TOKENS_MAX
    bool no_split;       // everything is one part: no document is held out
    bool whole;          // a file is one document as it stands: no cutting, no begin token
} node_corpus_opts;

// Documents [0, count): tokens begin[i] .. begin[i + 1] of ids; the last of each is the end token,
// which is only ever a target (or, in a `whole` text, simply the last token).
typedef struct node_docs {
    const int32_t *ids;
    const uint64_t *begin; // [count + 1]
    uint32_t count;
} node_docs;

typedef struct node_corpus {
    node_docs train, held;
    uint64_t bytes;  // of text that was read
    size_t memory;   // bytes this corpus keeps
    bool truncated;  // text was left out because of tokens_max
    int32_t *ids;    // owned: both parts
    uint64_t *begin; // owned: both parts
} node_corpus;

fl_status node_corpus_open(const char *path, const node_tokenizer *tokenizer,
                           const node_corpus_opts *opts, node_corpus **ret,
                           fl_err *err) FL_NODISCARD;
// The same from one text in memory; `name` is for messages.
fl_status node_corpus_from_text(fl_bytes text, const char *name, const node_tokenizer *tokenizer,
                                const node_corpus_opts *opts, node_corpus **ret,
                                fl_err *err) FL_NODISCARD;
void node_corpus_close(node_corpus *corpus); // NULL is fine

// Tokens that documents give as inputs: all but the last of each.
uint64_t node_docs_inputs(const node_docs *docs);

// FL_EARG when a token is not one of the model's: a tokenizer may know more than the embedding has.
fl_status node_docs_check(const node_docs *docs, uint32_t vocabulary, fl_err *err) FL_NODISCARD;

// Packs documents into micro-batches of at most `tokens` inputs: pieces of documents one after the
// other, each seeing only itself (block-diagonal mask) with positions from 0. A document longer
// than `sequence` is cut into pieces of that length. Pieces come in an order that is a function of
// (seed, epoch), each once an epoch; every piece of one document may land anywhere.
typedef struct node_piece {
    uint64_t at;     // index in ids of the first input
    uint32_t length; // inputs
} node_piece;

typedef struct node_packer {
    const int32_t *ids;
    node_piece *piece; // [pieces]
    uint32_t *order;   // [pieces]
    uint32_t pieces, sequence, next;
    uint64_t seed, epoch;
    bool shuffled;
} node_packer;

uint32_t node_packer_pieces(const node_docs *docs, uint32_t sequence);
// shuffled false: pieces in the order of the text, for evaluation.
void node_packer_bind(node_packer *packer, const node_docs *docs, uint32_t sequence, bool shuffled,
                      uint64_t seed, fl_arena *arena);
// Goes back to the beginning of an epoch.
void node_packer_rewind(node_packer *packer, uint64_t epoch);

// Arrays of one micro-batch, bound once.
typedef struct node_micro {
    uint32_t tokens_max, tokens;
    uint64_t scored;                   // targets that are not negative
    int32_t *id;                       // [tokens_max]
    int32_t *target;                   // [tokens_max], negative: none
    uint32_t *pos, *kv_begin, *kv_row; // [tokens_max]
} node_micro;

void node_micro_bind(node_micro *micro, uint32_t tokens_max, fl_arena *arena);
node_batch node_micro_batch(const node_micro *micro);
// Fills the micro-batch with whole pieces; in training (`wrap`) the next epoch begins when the
// pieces are spent and a piece that does not fit is cut short to fill the batch, its rest left out
// this epoch. false when there is nothing left (never with wrap).
bool node_packer_fill(node_packer *packer, node_micro *micro, bool wrap);

#endif
