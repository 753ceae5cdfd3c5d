// evaluate.h: held-out loss of every exit and of the vote, and the fit of the vote.
//
// Scoring. A document goes through in windows of `window` tokens (512) that do not overlap: the
// first token of a window is only read, every other token of it is scored given the tokens of its
// window before it. (Documents of a corpus begin with a token that only opens them, so all their
// own tokens of the first window are scored, and so is the end token.) In a `whole` text (data.h)
// windows that are not full are left out, as perplexities of long texts are usually given. Several
// short windows share one pass; what a token scores does not depend on that. Everything is
// deterministic.
#ifndef NODE_TUNE_EVALUATE_H
#define NODE_TUNE_EVALUATE_H

#include "node/tune/adapter.h"
#include "node/tune/data.h"

enum { NODE_EVAL_WINDOW = 512, NODE_EVAL_FIT_TOKENS = 2048 };

typedef struct node_eval node_eval; // opaque: one block of memory

typedef struct node_eval_opts {
    uint32_t window;          // tokens; 0: NODE_EVAL_WINDOW
    uint32_t threads;         // of the engine's pool
    bool all_exits;           // false: only the last exit is looked at
    bool full_windows;        // windows that are not full are left out
    uint64_t tokens_max;      // stop after so many scored tokens; 0: no limit
    const _Atomic bool *stop; // another thread's wish to end, looked at between windows; or NULL
} node_eval_opts;

typedef struct node_eval_result {
    uint64_t tokens; // scored
    uint32_t exits;  // looked at: all, or the last alone
    double nll;      // mean nats a token of the voted output: the number that counts
    double last_exit_nll;
    double exit_nll[NODE_EXITS_MAX];
    uint64_t correct[NODE_EXITS_MAX]; // tokens that were an exit's first choice
    node_vote vote;                   // that was scored
    node_vote_sums sums;              // one EM step's sums under it, for a coordinator
} node_eval_result;

// Bytes that an evaluation takes, exactly.
size_t node_eval_size(const node_model *model, const node_lora *lora, const node_eval_opts *opts);
fl_status node_eval_open(const node_engine *engine, const node_model *model, const node_lora *lora,
                         const node_eval_opts *opts, node_eval **ret, fl_err *err) FL_NODISCARD;
void node_eval_close(node_eval *eval); // NULL is fine

// Scores documents under a vote (NULL: the last exit). lora is the one of open, whose values may
// have changed since, or NULL. FL_EARG when there is nothing to score or the vote's exits are not
// the model's; FL_ESTATE when it was stopped.
fl_status node_eval_run(node_eval *eval, const node_vote *vote, const node_docs *docs,
                        node_eval_result *ret, fl_err *err) FL_NODISCARD;

// Fits weights and temperatures of a vote on at most `tokens_max` tokens (0: NODE_EVAL_FIT_TOKENS).
// Score it on other documents. all_exits must be set. Falls back to `last` when the vote does not
// win here (ret->fell_back). Takes memory for the log-probabilities while it runs.
fl_status node_eval_fit(node_eval *eval, const node_docs *docs, uint64_t tokens_max, node_vote *ret,
                        fl_err *err) FL_NODISCARD;

// Bytes that settling a vote takes with windows of so many tokens.
size_t node_eval_settle_size(const node_model *model, const node_lora *lora, uint32_t window,
                             uint32_t threads);
// What a run of tuning ends with: fits the adapter's vote on one half of the held-out documents,
// scores it on the other half (ret), and falls back to the last exit where it loses there. window:
// as in node_eval_opts.
fl_status node_eval_settle_vote(const node_engine *engine, const node_model *model,
                                node_adapter *adapter, const node_docs *held, uint32_t window,
                                uint32_t threads, node_eval_result *ret, fl_err *err) FL_NODISCARD;

// Cuts documents in two by their order: one part to fit on, one to score. A single document is cut
// in the middle of its tokens. `begin` holds the borders of both: [docs->count + 3].
void node_docs_halve(const node_docs *docs, uint64_t *begin, node_docs *ret_first,
                     node_docs *ret_second);

#endif
