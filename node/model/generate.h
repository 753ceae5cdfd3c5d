// generate.h: one conversation with a model: keys and values of the tokens so far, and sampling.
//
// plan / bind / step: the session lives in memory that the caller bound once; feeding tokens
// allocates nothing. What comes out is the hidden state at every exit; heads and voting are the
// caller's (node/exits). A session is one caller's at a time; several may share model and engine.
#ifndef NODE_MODEL_GENERATE_H
#define NODE_MODEL_GENERATE_H

#include "node/model/forward.h"

typedef struct node_session_opts {
    uint32_t context; // most tokens of the conversation
    uint32_t chunk;   // tokens of a prompt that go through the layers together
    uint32_t threads; // most threads of an engine that is used
    uint32_t rank;    // of the adapter; 0 for none
} node_session_opts;

typedef struct node_session node_session;

// Exact bytes that bind will take. FL_EARG for a zero, a context above the model's or a chunk above
// the context; FL_ELIMIT when it is more than memory can address.
fl_status node_session_plan(const node_model *model, const node_session_opts *opts,
                            size_t *ret_size, fl_err *err) FL_NODISCARD;
// The arena has what the plan said. The model outlives the session.
node_session *node_session_bind(const node_model *model, const node_session_opts *opts,
                                fl_arena *arena);

uint32_t node_session_length(const node_session *s); // tokens so far
// Forgets all tokens after the first `length`, 0 for a new conversation. length <= what is there.
void node_session_rewind(node_session *s, uint32_t length);

// Appends ids[count] (count >= 1) and gives the hidden states of the last one:
// *ret_hidden[exits][hidden], residual stream after each exit's layer, valid until the next call.
// How ids are cut into calls changes no bit of it. FL_EARG for an id outside the vocabulary,
// FL_ELIMIT when they do not fit into the context; then nothing has happened.
fl_status node_session_feed(node_session *s, const node_engine *engine, const node_lora *lora,
                            const int32_t *ids, size_t count, const float **ret_hidden,
                            fl_err *err) FL_NODISCARD;

typedef struct node_sample_opts {
    float temperature; // 0: the most probable token, the lowest id of equals
    uint32_t top_k;    // only the k most probable; 0: all
    float top_p;       // only the fewest whose sum reaches this; 1: all
    uint64_t seed;
} node_sample_opts;

typedef struct node_candidate {
    float p;
    uint32_t id;
} node_candidate;

// Draws a token from p[count], probabilities of any positive sum; scratch[count]. The draw is a
// function of (seed, counter, p). First temperature (p^(1/T)), then top_k, then top_p. Values that
// are not finite and positive are never drawn; when none is, the answer is -1.
int32_t node_sample(const node_sample_opts *opts, uint64_t counter, const float *p, uint32_t count,
                    node_candidate *scratch);

#endif
