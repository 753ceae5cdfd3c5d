// vote.h: one prediction out of the predictions of all exits, and how its weights are learned.
//
//   mixture  p(y) = sum_t a_t p_t(y)^(1/tau_t) / Z_t, a on the simplex (architecture 1.4)
//   max      P(y) = max_t p_t(y) / sum_u max_t p_t(u), the rule of Edge-LLM's released code
//   last     the model's own exit alone
//
// The held-out log-likelihood of a mixture is concave in a, and one EM step needs only sums: the
// responsibilities R_t = sum_i a_t p_t(y_i) / sum_s a_s p_s(y_i) and the number of tokens N; the
// new weights are R_t / N. Sums here are integers in units of 2^-20 (as they travel), so the
// sums of several nodes added in any order are, bit for bit, the sums of their texts put together,
// and so is the step.
//   Source   EM for mixture weights: Dempster, Laird, Rubin 1977, section 4.3.
//   Threads  all functions are pure.
#ifndef NODE_EXITS_VOTE_H
#define NODE_EXITS_VOTE_H

#include "common/status.h"
#include "kernels/dispatch.h"
#include "node/model/model.h"

typedef enum node_vote_mode { NODE_VOTE_MIXTURE, NODE_VOTE_MAX, NODE_VOTE_LAST } node_vote_mode;
const char *node_vote_mode_name(node_vote_mode mode);
bool node_vote_mode_parse(const char *name, node_vote_mode *ret) FL_NODISCARD;

typedef struct node_vote {
    node_vote_mode mode;
    uint32_t exits;
    bool fell_back;               // a fit was tried and lost against the last exit: mode is `last`
    float weight[NODE_EXITS_MAX]; // sums to 1
    float tau[NODE_EXITS_MAX];    // temperature of each exit, > 0
} node_vote;

// A vote that is exactly the model's own output: mode last, all weight on the last exit, tau 1.
void node_vote_init(node_vote *vote, uint32_t exits);
// What bytes from elsewhere must pass: 1..NODE_EXITS_MAX exits, a known mode, weights in [0, 1]
// that sum to 1 within 1e-3, temperatures in [0.05, 20], all finite.
fl_status node_vote_check(const node_vote *vote, fl_err *err) FL_NODISCARD;

// Sums over held-out tokens; additive between nodes.
typedef struct node_vote_sums {
    uint32_t exits;
    uint64_t tokens;
    uint64_t responsibility[NODE_EXITS_MAX]; // units of 2^-20 token; they add up to tokens * 2^20
    uint64_t exit_nll[NODE_EXITS_MAX];       // units of 2^-20 nat
    uint64_t vote_nll;                       // units of 2^-20 nat
} node_vote_sums;

// logp[exits][count], exit after exit: log-probability of each token by each exit, at the vote's
// temperatures. Values are clamped to [-1000, 0]; a NaN counts as -1000.
void node_vote_sums_add(node_vote_sums *sums, const node_vote *vote, const float *logp,
                        size_t count);
void node_vote_sums_merge(node_vote_sums *sums, const node_vote_sums *other);
// One EM step: weight_t = R_t / sum R. Sums without tokens leave the weights alone.
void node_vote_em_step(node_vote *vote, const node_vote_sums *sums);

// Mean nats a token; 0 for no tokens. `exit_nll` of one exit, `vote_nll` of what was voted.
double node_vote_mean_nll(const node_vote_sums *sums);
double node_vote_mean_exit_nll(const node_vote_sums *sums, uint32_t exit);

// Nats of one token under a mixture (also right for `last`): logp[0], logp[stride], ...
double node_vote_token_nll(const node_vote *vote, const float *logp, size_t stride);

// Fits weights on logp[exits][count] by EM from equal weights until a step gains under 1e-7 nat a
// token, at most 500 steps. Keeps the temperatures. The mixture wins when its gain over the last
// exit is more than exits - 1 nats in all (what exits - 1 free numbers gain by luck alone, by
// Akaike's count, doubled) and 1e-4 a token; otherwise mode becomes `last` and fell_back is set.
// Returns the mean nats a token of what the vote now is.
double node_vote_fit(node_vote *vote, const float *logp, size_t count);

// Temperatures: the nats of every exit at each temperature of a grid are additive too.
enum { NODE_TAU_GRID = 7, NODE_TAU_ONE = 3 }; // NODE_TAU_ONE: the index of temperature 1
extern const float node_tau_grid[NODE_TAU_GRID];

typedef struct node_tau_sums {
    uint32_t exits;
    uint64_t tokens;
    uint64_t nll[NODE_EXITS_MAX][NODE_TAU_GRID]; // units of 2^-20 nat
} node_tau_sums;

// logp[exits][NODE_TAU_GRID][count].
void node_tau_sums_add(node_tau_sums *sums, const float *logp, size_t count);
void node_tau_sums_merge(node_tau_sums *sums, const node_tau_sums *other);
// Sets each exit's temperature to the grid's best; 1 when that gains under 0.001 nat a token.
void node_vote_set_tau(node_vote *vote, const node_tau_sums *sums);

// Next-token distribution of the vote. logits[exits][vocabulary] is overwritten;
// ret_p[vocabulary] sums to 1 within rounding.
void node_vote_distribution(const fl_kern *kern, const node_vote *vote, size_t vocabulary,
                            float *logits, float *ret_p);

#endif
