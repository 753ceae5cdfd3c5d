#include "node/luc/decide.h"

#include <math.h>
#include <string.h>

void node_decide_range(node_policy_kind policy, double bits, uint32_t *ret_low,
                       uint32_t *ret_high) {
    const bool chooses = policy == NODE_POLICY_LUC;
    const double low = !chooses ? floor(bits) : bits < 4 ? 2 : NODE_SENSE_HARM_BITS;
    const double high = chooses                         ? ceil(bits) + 2
                        : policy == NODE_POLICY_UNIFORM ? ceil(bits)
                                                        : floor(bits) + 1;
    *ret_low = low < FL_PACKED_BITS_MIN ? FL_PACKED_BITS_MIN : (uint32_t)low;
    *ret_high = high > FL_PACKED_BITS_MAX ? FL_PACKED_BITS_MAX : (uint32_t)high;
}

typedef struct tables {
    double *loss;
    uint64_t *cost;
    void *rest;
} tables;

enum { CHOICES = NODE_MODULES * NODE_SENSE_BITS }; // of a layer; more than levels of sparsity

size_t node_decide_size(const node_model *m) {
    return (size_t)m->layers * CHOICES * (sizeof(double) + sizeof(uint64_t)) +
           node_policy_choose_size(m->layers * NODE_MODULES);
}

static tables split(const node_model *m, void *scratch) {
    tables t = {.loss = scratch};
    t.cost = (uint64_t *)(void *)(t.loss + (size_t)m->layers * CHOICES);
    t.rest = t.cost + (size_t)m->layers * CHOICES;
    return t;
}

static uint64_t weights_of(const node_model *m, uint32_t layer) {
    const node_layer *l = &m->layer[layer];
    return node_layer_weights(m, l->heads, l->kv_heads, l->ffn);
}

double node_decide_prune_error(const node_sense *s, uint32_t layer, double sparsity) {
    const double *loss = s->prune + (size_t)layer * NODE_SENSE_LEVELS;
    uint32_t i = 1;
    if (s->levels == 0) return 0;
    while (i + 1 < s->levels && s->level[i] < sparsity) i++;
    const double part = (sparsity - s->level[i - 1]) / (s->level[i] - s->level[i - 1]);
    return loss[i - 1] + part * (loss[i] - loss[i - 1]);
}

// luc: levels from the most sparse, which is the cheapest, to none at all.
static fl_status choose_sparsity(const node_model *m, double mean, bool structured,
                                 const node_sense *s, const tables *t, node_decision *d,
                                 fl_err *err) {
    uint64_t budget = 0;
    uint32_t pick[NODE_LAYERS_MAX];
    for (uint32_t l = 0; l < m->layers; l++) {
        const uint64_t all = weights_of(m, l);
        budget += all - (uint64_t)llround(mean * (double)all);
        for (uint32_t c = 0; c < s->levels; c++) {
            const uint32_t level = s->levels - 1 - c;
            const size_t from = (size_t)l * NODE_SENSE_LEVELS + level;
            const size_t to = (size_t)l * s->levels + c;
            t->loss[to] = s->prune[from] * s->weight[l];
            t->cost[to] = all - (structured ? node_shape_removed(m, l, s->shape[from])
                                            : (uint64_t)llround(s->level[level] * (double)all));
        }
    }
    FL_TRY(node_policy_choose(m->layers, s->levels, t->loss, t->cost, budget, false, t->rest, pick,
                              err));
    for (uint32_t l = 0; l < m->layers; l++) {
        const uint32_t level = s->levels - 1 - pick[l];
        d->sparsity[l] = s->level[level];
        if (structured) d->shape[l] = s->shape[(size_t)l * NODE_SENSE_LEVELS + level];
    }
    return FL_OK;
}

// uniform and paper, structured: shapes nearest to the wanted shares; what rounding to blocks
// leaves over goes to the next layer, so that the mean is met.
static void shapes_for(const node_model *m, const node_sense *s, node_decision *d) {
    double owed = 0;
    for (uint32_t l = 0; l < m->layers; l++) {
        const double all = (double)weights_of(m, l), want = d->sparsity[l] * all + owed;
        const node_layer_shape *shape = s->shape + (size_t)l * NODE_SENSE_LEVELS;
        uint32_t near = 0;
        for (uint32_t i = 0; i < s->levels; i++)
            if (fabs(s->level[i] * all - want) < fabs(s->level[near] * all - want)) near = i;
        d->shape[l] = shape[near];
        const double block = 3.0 * m->hidden * NODE_PRUNE_CHANNELS;
        const double lack = want - (double)node_shape_removed(m, l, d->shape[l]);
        const long more = lround(lack / block);
        const long left = ((long)d->shape[l].ffn - NODE_PRUNE_CHANNELS) / NODE_PRUNE_CHANNELS;
        const long back = ((long)m->layer[l].ffn - (long)d->shape[l].ffn) / NODE_PRUNE_CHANNELS;
        const long step = more > left ? left : more < -back ? -back : more;
        d->shape[l].ffn = (uint32_t)((long)d->shape[l].ffn - step * NODE_PRUNE_CHANNELS);
        owed = want - (double)node_shape_removed(m, l, d->shape[l]);
    }
}

static fl_status decide_sparsity(const node_model *m, const node_compress_opts *o,
                                 const node_sense *s, const tables *t, node_decision *d,
                                 fl_err *err) {
    const bool structured = o->prune == NODE_PRUNE_STRUCTURED;
    for (uint32_t l = 0; l < m->layers; l++) {
        d->shape[l] = (node_layer_shape){m->layer[l].kv_heads, m->layer[l].ffn};
        d->sparsity[l] = o->sparsity;
    }
    if (s->levels == 0) return FL_OK;
    if (o->policy == NODE_POLICY_LUC) {
        FL_TRY(choose_sparsity(m, o->sparsity, structured, s, t, d, err));
    } else if (o->policy == NODE_POLICY_PAPER) {
        for (uint32_t l = 0; l < m->layers; l++)
            t->loss[l] = node_decide_prune_error(s, l, o->sparsity);
        node_policy_paper_sparsity(m->layers, o->sparsity, NODE_PRUNE_MOST, t->loss, d->sparsity);
    }
    if (!structured) return FL_OK;
    if (o->policy != NODE_POLICY_LUC) shapes_for(m, s, d);
    for (uint32_t l = 0; l < m->layers; l++)
        d->sparsity[l] = (double)node_shape_removed(m, l, d->shape[l]) / (double)weights_of(m, l);
    return FL_OK;
}

static uint64_t matrix_bytes(const node_model *m, uint32_t layer, node_layer_shape shape,
                             node_module module, uint32_t bits) {
    uint32_t rows[NODE_MODULES], cols[NODE_MODULES];
    size_t size = 0;
    node_luc_dims(m, layer, shape, rows, cols);
    FL_ASSERT(fl_packed_size(rows[module], cols[module], bits, &size));
    return size;
}

// luc: every matrix on its own, under the bytes that the bits in d take.
static fl_status choose_bits(const node_model *m, const node_sense *s, const tables *t,
                             node_decision *d, fl_err *err) {
    const uint32_t low = s->bits_low, choices = s->bits_high - low + 1;
    uint64_t budget = 0;
    uint32_t pick[NODE_LAYERS_MAX * NODE_MODULES];
    for (uint32_t l = 0; l < m->layers; l++)
        for (node_module k = NODE_Q; k < NODE_MODULES; k++) {
            const size_t at = ((size_t)l * NODE_MODULES + k) * choices;
            budget += matrix_bytes(m, l, d->shape[l], k, d->bits[l][k]);
            for (uint32_t c = 0; c < choices; c++) {
                t->loss[at + c] = node_sense_loss(s, l, k, low + c);
                t->cost[at + c] = matrix_bytes(m, l, d->shape[l], k, low + c);
            }
        }
    FL_TRY(node_policy_choose(m->layers * NODE_MODULES, choices, t->loss, t->cost, budget, false,
                              t->rest, pick, err));
    for (uint32_t l = 0; l < m->layers; l++)
        for (int k = 0; k < NODE_MODULES; k++)
            d->bits[l][k] = (uint8_t)(low + pick[l * NODE_MODULES + (uint32_t)k]);
    return FL_OK;
}

static fl_status decide_bits(const node_model *m, const node_compress_opts *o, const node_sense *s,
                             const tables *t, node_decision *d, fl_err *err) {
    uint32_t bits[NODE_LAYERS_MAX];
    node_policy_uniform(m->layers, o->bits, bits);
    if (o->policy == NODE_POLICY_PAPER) {
        const uint32_t base = (uint32_t)floor(o->bits);
        for (uint32_t l = 0; l < m->layers; l++)
            t->loss[l] = s->quant[(size_t)l * NODE_SENSE_BITS + base];
        node_policy_paper_bits(m->layers, o->bits, t->loss, bits);
    }
    for (uint32_t l = 0; l < m->layers; l++)
        memset(d->bits[l], (int)(bits[l] > FL_PACKED_BITS_MAX ? FL_PACKED_BITS_MAX : bits[l]),
               sizeof(d->bits[l]));
    return o->policy == NODE_POLICY_LUC ? choose_bits(m, s, t, d, err) : FL_OK;
}

fl_status node_decide(const node_model *m, const node_compress_opts *o, const node_sense *s,
                      void *scratch, node_decision *ret, fl_err *err) {
    const tables t = split(m, scratch);
    FL_TRY(decide_sparsity(m, o, s, &t, ret, err));
    return decide_bits(m, o, s, &t, ret, err);
}
