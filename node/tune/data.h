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

// The micro-batches of a run. Documents, in an order drawn from `text_seed`, are laid end to end,
// and every `sequence` inputs of that line are one micro-batch: pieces of documents one after the
// other, each seeing only itself (block-diagonal mask) with positions from 0. A document is cut
// only where a micro-batch ends. The last one is filled up from the beginning of the line, so that
// all are full. What is in a micro-batch stays the same for the whole run, which is what the cache
// of prefix.h lives on; only their order is drawn anew for every epoch, from (seed, epoch).
typedef struct node_batches {
    const int32_t *ids;
    const uint64_t *begin;
    uint32_t *doc;         // [docs] the line: documents in their order
    uint32_t *start_place; // [count] where in the line each micro-batch begins,
    uint64_t *start_input; // [count] and at which input of that document
    uint32_t *order;       // [count] micro-batch of each turn of this epoch
    uint32_t docs, count, sequence;
    uint32_t at; // turns of this epoch that are over
    uint64_t seed, epoch;
} node_batches;

uint32_t node_batches_count(const node_docs *docs, uint32_t sequence);
// At epoch 0. `docs` outlives the batches and has at least one input.
void node_batches_bind(node_batches *batches, const node_docs *docs, uint32_t sequence,
                       uint64_t text_seed, uint64_t seed, fl_arena *arena);
// The micro-batch whose turn it is; after the last of an epoch the next epoch begins.
uint32_t node_batches_next(node_batches *batches);
// Goes to turn `at` (at most count) of an epoch: where another's fields say that it stands.
void node_batches_seek(node_batches *batches, uint64_t epoch, uint32_t at);
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
// Fills the micro-batch, whose tokens_max is the sequence.
void node_batches_fill(const node_batches *batches, uint32_t index, node_micro *micro);

#endif
