// policy.h: how many bits and how much sparsity each layer gets. Pure arithmetic.
//
//   uniform  the same everywhere; a fraction of a bit is spread evenly over the depth.
//   paper    bits: Eq. 1 of Edge-LLM (arXiv 2406.15758), b_j = B + 1 where the sensitivity is at
//            least the mean, else B. Sparsity: in proportion to 1 - (s_j - min s) / (max s - min
//            s), the form in which the authors' programs use Eq. 2, capped, with the cap's excess
//            given to the others (bisection). Eq. 1 has no budget: B is the whole part of the
//            request, and what comes out is what it is.
//   luc      the choice on a grid that makes the sum of the predicted losses smallest within an
//            exact budget: solved by dynamic programming over the lower convex hull of each layer.
//
// The loss of a layer with bits b and sparsity p is predicted as the sum of the losses of each
// alone: both errors are small and of independent direction, so their squares add. Losses of
// different layers add for the same reason.
#ifndef NODE_LUC_POLICY_H
#define NODE_LUC_POLICY_H

#include "common/arena.h"
#include "common/status.h"

typedef enum node_policy_kind {
    NODE_POLICY_LUC,
    NODE_POLICY_UNIFORM,
    NODE_POLICY_PAPER,
} node_policy_kind;

const char *node_policy_name(node_policy_kind kind);
bool node_policy_find(const char *name, node_policy_kind *ret_kind) FL_NODISCARD;

// Sensitivities must be finite and above zero: a zero is a broken measurement, not a robust layer.
// FL_EFORMAT names the layer (and `what` was measured).
fl_status node_policy_check(const double *loss, uint32_t layers, uint32_t choices, const char *what,
                            fl_err *err) FL_NODISCARD;

// Choose one of `choices` for each of `layers`, loss[layers][choices] and cost[layers][choices], so
// that the sum of losses is least among those with a sum of costs within `budget`. Costs do not
// fall along a row. Choices above a layer's lower convex hull are not taken when `hull` is set.
// Exact when budget / (common divisor of all costs) is at most NODE_POLICY_UNITS, else costs are
// rounded up to units of that size, and what is left of the budget is spent greedily. Ties: the
// cheaper choice, then the lower layer. FL_ELIMIT when even the cheapest choices exceed the budget.
enum { NODE_POLICY_UNITS = 1 << 15, NODE_POLICY_CHOICES_MAX = 64 };
size_t node_policy_choose_size(uint32_t layers); // bytes of scratch, 8-byte aligned
fl_status node_policy_choose(uint32_t layers, uint32_t choices, const double *loss,
                             const uint64_t *cost, uint64_t budget, bool hull, void *scratch,
                             uint32_t *ret_choice, fl_err *err) FL_NODISCARD;

// ret_on[i] for each choice of one layer: on the lower convex hull of (cost, loss), and loss falls
// along it. The cheapest choice is always on it.
void node_policy_hull(uint32_t choices, const double *loss, const uint64_t *cost, bool *ret_on);

// Whole numbers with the given mean (rounded to the nearest sum), spread evenly.
void node_policy_uniform(uint32_t layers, double mean, uint32_t *ret_bits);

// Eq. 1.
void node_policy_paper_bits(uint32_t layers, double bits, const double *sensitivity,
                            uint32_t *ret_bits);

// p_j in [0, cap] with mean exactly `mean` (to 1e-9): lambda * u_j, capped, u_j = 1 - normalised
// sensitivity. All the same when the sensitivities are. mean <= cap.
void node_policy_paper_sparsity(uint32_t layers, double mean, double cap, const double *sensitivity,
                                double *ret_sparsity);

#endif
