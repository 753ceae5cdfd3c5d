#include "node/luc/sensitivity.h"

#include <math.h>
#include <string.h>

#include "node/luc/policy.h"

void node_sense_bind(node_sense *s, const node_model *m, fl_arena *arena) {
    const size_t tokens = NODE_SENSE_HARM_TOKENS, layers = m->layers;
    *s = (node_sense){.layers = m->layers};
    s->quant = FL_ARENA_NEW(arena, double, layers *NODE_SENSE_BITS);
    s->curve = FL_ARENA_NEW(arena, double, layers *NODE_SENSE_BITS);
    s->share = FL_ARENA_NEW(arena, double, layers *NODE_MODULES);
    s->harm = FL_ARENA_NEW(arena, double, layers);
    s->prune = FL_ARENA_NEW(arena, double, layers *NODE_SENSE_LEVELS);
    s->shape = FL_ARENA_NEW(arena, node_layer_shape, layers * NODE_SENSE_LEVELS);
    s->weight = FL_ARENA_NEW(arena, double, layers);
    s->hidden = FL_ARENA_NEW(arena, float, (layers + 1) * tokens * m->hidden);
    for (int i = 0; i < 2; i++)
        s->logits[i] = FL_ARENA_NEW(arena, float, tokens *NODE_SENSE_VOCABULARY);
    s->costs = FL_ARENA_NEW(arena, double, (size_t)m->kv_heads + m->ffn / NODE_PRUNE_CHANNELS + 1);
}

static size_t row_floats(const node_luc_work *w) {
    return (size_t)w->batch.tokens * w->model->hidden;
}

double node_sense_loss(const node_sense *s, uint32_t layer, node_module module, uint32_t bits) {
    return s->harm[layer] * s->share[(size_t)layer * NODE_MODULES + module] *
           s->curve[(size_t)layer * NODE_SENSE_BITS + bits];
}

typedef struct gap {
    double sum;      // of |y' - y|^2
    double relative; // of |y' - y|^2 / |y|^2 token by token
} gap;

// y = layer of `model` on work->x, against work->y, the exact one.
static gap run_and_compare(node_luc_work *w, const node_model *model, uint32_t layer) {
    const size_t n = w->model->hidden;
    gap g = {0, 0};
    memcpy(w->other, w->x, row_floats(w) * sizeof(*w->other));
    node_luc_run(w, model, layer, w->other);
    for (size_t t = 0; t < w->batch.tokens; t++) {
        double error = 0, energy = 0;
        for (size_t i = t * n; i < (t + 1) * n; i++) {
            const double d = (double)w->other[i] - (double)w->y[i];
            error += d * d;
            energy += (double)w->y[i] * (double)w->y[i];
        }
        g.sum += error;
        g.relative += energy > 0 ? error / energy : 0;
    }
    return g;
}

static gap error_of_trial(node_luc_work *w, uint32_t layer, uint32_t bits, bool keep_zeros) {
    node_luc_pack(w, layer, bits, keep_zeros, w->layer_block, &w->trial->layer[layer]);
    const gap g = run_and_compare(w, w->trial, layer);
    w->trial->layer[layer] = w->model->layer[layer];
    return g;
}

// A measurement less what rounding of activations alone gives, which is there whatever the weights
// are. Where noise leaves nothing, a twentieth stands.
static double above(double measured, double floor) {
    const double rest = measured - floor;
    return rest > measured / 20 ? rest : measured / 20;
}

// Each matrix alone at few bits, the others as in the working copy.
static fl_status measure_shares(node_luc_work *w, uint32_t layer, const node_layer *few,
                                double floor, double *share, fl_err *err) {
    node_layer *trial = &w->trial->layer[layer];
    double all = 0;
    for (int m = 0; m < NODE_MODULES; m++) {
        *trial = w->copy->layer[layer];
        trial->linear[m] = few->linear[m];
        share[m] = above(run_and_compare(w, w->trial, layer).relative, floor);
        all += share[m];
    }
    *trial = w->model->layer[layer];
    for (int m = 0; m < NODE_MODULES; m++) share[m] /= all;
    return node_policy_check(share, 1, NODE_MODULES, "rounding of one matrix", err);
}

static void set_levels(node_sense *s, const node_sense_opts *o) {
    static const double parts[] = {0.0, 0.5, 0.75, 1.0, 1.25, 1.5};
    s->levels = 0;
    if (o->sparsity <= 0) return;
    if (o->prune == NODE_PRUNE_STRUCTURED) {
        for (uint32_t i = 0; i < NODE_SENSE_LEVELS; i++)
            s->level[s->levels++] = NODE_PRUNE_MOST * i / (NODE_SENSE_LEVELS - 1);
        return;
    }
    for (size_t i = 0; i < FL_COUNT(parts); i++)
        if (parts[i] * o->sparsity <= 0.95) s->level[s->levels++] = parts[i] * o->sparsity;
}

// Closed form; the layer's exact activations are in work->acts.
static fl_status prune_structured(node_luc_work *w, uint32_t layer, double energy, node_sense *s,
                                  fl_err *err) {
    const node_layer *l = &w->model->layer[layer];
    node_prune_costs costs = {s->costs, s->costs + l->kv_heads};
    const double all = (double)node_layer_weights(w->model, l->heads, l->kv_heads, l->ffn);
    FL_TRY(node_luc_prune_costs(w, layer, &costs, err));
    for (uint32_t i = 0; i < s->levels; i++) {
        const size_t at = (size_t)layer * NODE_SENSE_LEVELS + i;
        double cost = 0;
        s->shape[at] =
            node_prune_shape(w->model, layer, (uint64_t)llround(s->level[i] * all), &costs, &cost);
        s->prune[at] = cost / energy;
    }
    return FL_OK;
}

static void prune_unstructured(node_luc_work *w, uint32_t layer, double energy, node_sense *s) {
    float *norms = w->moved; // the norms of all modules' inputs fit in the largest matrix
    size_t at = 0, begin[NODE_MODULES];
    const node_matrix *linear = w->model->layer[layer].linear;
    for (node_module m = NODE_Q; m < NODE_MODULES; m++) {
        begin[m] = at;
        node_luc_norms(w, layer, m, norms + at);
        at += linear[m].cols;
    }
    for (uint32_t i = 1; i < s->levels; i++) {
        if (i > 1) node_luc_load(w, layer);
        for (node_module m = NODE_Q; m < NODE_MODULES; m++)
            node_prune_mask(w->engine, w->w[m], linear[m].rows, linear[m].cols, s->level[i],
                            norms + begin[m]);
        s->prune[(size_t)layer * NODE_SENSE_LEVELS + i] =
            error_of_trial(w, layer, NODE_LUC_WORK_BITS, true).sum / energy;
    }
    node_luc_load(w, layer);
}

static double energy_of(const node_luc_work *w) {
    double sum = 0;
    for (size_t i = 0; i < row_floats(w); i++) sum += (double)w->y[i] * (double)w->y[i];
    return sum;
}

static uint32_t head_rows(const node_model *m) {
    return m->vocabulary < NODE_SENSE_VOCABULARY ? m->vocabulary : NODE_SENSE_VOCABULARY;
}

// Logits of the final rows x, each row less its log-sum-exp.
static void log_probabilities(node_luc_work *w, const float *x, float *out) {
    const node_model *m = w->model;
    float *norm = w->acts.norm1;
    const uint32_t n = head_rows(m), tokens = w->batch.tokens;
    w->engine->kern->rmsnorm->forward(tokens, m->hidden, m->norm_epsilon, x, m->final_norm, norm);
    node_matmul_rows(w->engine, &m->head, 0, n, tokens, norm, out, w->scratch);
    for (size_t t = 0; t < tokens; t++) {
        float *row = out + t * n, high = row[0];
        double sum = 0;
        for (size_t i = 0; i < n; i++) high = row[i] > high ? row[i] : high;
        for (size_t i = 0; i < n; i++) sum += (double)expf(row[i] - high);
        const float lse = high + (float)log(sum);
        for (size_t i = 0; i < n; i++) row[i] -= lse;
    }
}

static double divergence(const float *p, const float *q, size_t rows, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < rows * n; i++) sum += (double)expf(p[i]) * ((double)p[i] - (double)q[i]);
    return sum / (double)rows;
}

// Packs the whole working copy and runs it: hidden rows before every layer, and the distribution.
static void run_copy(node_luc_work *w, node_sense *s) {
    const uint32_t layers = w->model->layers, all = w->batch.tokens;
    w->batch.tokens = all < NODE_SENSE_HARM_TOKENS ? all : NODE_SENSE_HARM_TOKENS;
    const size_t rows = row_floats(w);
    node_embed(w->engine, w->model, &w->batch, w->x);
    for (uint32_t i = 0; i < layers; i++) {
        node_luc_load(w, i);
        node_luc_pack(w, i, NODE_LUC_WORK_BITS, false, w->copy_block + i * w->layer_size,
                      &w->copy->layer[i]);
        memcpy(s->hidden + i * rows, w->x, rows * sizeof(*w->x));
        node_luc_run(w, w->copy, i, w->x);
    }
    log_probabilities(w, w->x, s->logits[0]);
    w->batch.tokens = all;
}

// KL of the model with this layer in place of its own.
static double harm_of(node_luc_work *w, uint32_t layer, const node_layer *packed, node_sense *s) {
    const uint32_t all = w->batch.tokens;
    w->batch.tokens = all < NODE_SENSE_HARM_TOKENS ? all : NODE_SENSE_HARM_TOKENS;
    const size_t rows = row_floats(w);
    w->trial->layer[layer] = *packed;
    memcpy(w->other, s->hidden + layer * rows, rows * sizeof(*w->other));
    node_luc_run(w, w->trial, layer, w->other);
    w->trial->layer[layer] = w->model->layer[layer];
    for (uint32_t i = layer + 1; i < w->model->layers; i++) node_luc_run(w, w->copy, i, w->other);
    log_probabilities(w, w->other, s->logits[1]);
    const double kl = divergence(s->logits[0], s->logits[1], w->batch.tokens, head_rows(w->model));
    w->batch.tokens = all;
    return kl;
}

// Errors of all widths; with opts->predict also what they do to the model.
static fl_status measure_widths(node_luc_work *w, uint32_t layer, double energy,
                                const node_sense_opts *o, node_sense *s, fl_err *err) {
    double *quant = s->quant + (size_t)layer * NODE_SENSE_BITS;
    double *curve = s->curve + (size_t)layer * NODE_SENSE_BITS;
    const uint32_t low = o->bits_low, harm = NODE_SENSE_HARM_BITS;
    for (uint32_t b = low; b <= o->bits_high; b++) {
        w->trial->layer[layer] = w->width[b - low];
        const gap g = run_and_compare(w, w->trial, layer);
        w->trial->layer[layer] = w->model->layer[layer];
        quant[b] = g.sum / energy;
        curve[b] = g.relative;
    }
    FL_TRY(node_policy_check(quant + low, 1, o->bits_high - low + 1, "rounding", err));
    if (!o->predict) return FL_OK;
    const double floor = run_and_compare(w, w->copy, layer).relative;
    const double unit = above(curve[harm], floor);
    for (uint32_t b = low; b <= o->bits_high; b++) curve[b] = above(curve[b], floor) / unit;
    FL_TRY(measure_shares(w, layer, &w->width[harm - low], floor,
                          s->share + (size_t)layer * NODE_MODULES, err));
    const double noise = harm_of(w, layer, &w->model->layer[layer], s);
    s->harm[layer] = above(harm_of(w, layer, &w->width[harm - low], s), noise);
    s->weight[layer] = s->harm[layer] / quant[harm];
    if (harm > low) {
        const double less = above(harm_of(w, layer, &w->width[harm - 1 - low], s), noise);
        const double steeper = less / s->harm[layer] / curve[harm - 1];
        for (uint32_t b = low; b < harm; b++) curve[b] *= steeper > 1 ? steeper : 1;
    }
    return node_policy_check(&s->weight[layer], 1, 1, "a change of its output", err);
}

static fl_status measure_layer(node_luc_work *w, uint32_t layer, const node_sense_opts *o,
                               node_sense *s, fl_err *err) {
    const uint32_t all = w->batch.tokens;
    node_luc_load(w, layer);
    memcpy(w->y, w->x, row_floats(w) * sizeof(*w->y));
    node_luc_run(w, w->model, layer, w->y);
    double energy = energy_of(w);
    if (!isfinite(energy) || energy <= 0)
        return FL_FAIL(err, FL_EFORMAT, "the output of layer %u is %s: the model is damaged", layer,
                       energy == 0 ? "all zero" : "not finite");
    if (s->levels != 0 && o->prune == NODE_PRUNE_STRUCTURED)
        FL_TRY(prune_structured(w, layer, energy, s, err));
    FL_TRY(node_luc_pack_widths(w, layer, o->bits_low, o->bits_high, o->nearest, err));
    w->batch.tokens = all < NODE_SENSE_TOKENS ? all : NODE_SENSE_TOKENS;
    energy = energy_of(w);
    if (s->levels != 0 && o->prune == NODE_PRUNE_UNSTRUCTURED)
        prune_unstructured(w, layer, energy, s);
    FL_TRY(measure_widths(w, layer, energy, o, s, err));
    w->batch.tokens = all;
    float *swap = w->x;
    w->x = w->y;
    w->y = swap;
    return FL_OK;
}

// Structured pruning is measured in closed form: zero is what a level below one block costs.
static fl_status check_errors(const node_model *model, const node_sense *s,
                              const node_sense_opts *o, fl_err *err) {
    for (uint32_t i = 0; i < s->layers; i++)
        for (uint32_t k = 1; k < s->levels; k++) {
            const size_t at = (size_t)i * NODE_SENSE_LEVELS + k;
            const bool same = o->prune == NODE_PRUNE_STRUCTURED &&
                              node_shape_removed(model, i, s->shape[at]) == 0;
            if (same && s->prune[at] == 0) continue; // a level below one block: nothing goes
            FL_TRY(node_policy_check(s->prune + at, 1, 1, "pruning", err));
        }
    return FL_OK;
}

fl_status node_sense_measure(node_luc_work *w, const node_sense_opts *o, node_sense *s,
                             fl_err *err) {
    const uint32_t all = w->batch.tokens, layers = w->model->layers;
    FL_ASSERT(!o->predict ||
              (o->bits_low <= NODE_SENSE_HARM_BITS && o->bits_high >= NODE_SENSE_HARM_BITS));
    s->bits_low = o->bits_low, s->bits_high = o->bits_high;
    set_levels(s, o);
    run_copy(w, s);
    if (s->levels == 0 || o->prune != NODE_PRUNE_STRUCTURED)
        w->batch.tokens = all < NODE_SENSE_FIT_TOKENS ? all : NODE_SENSE_FIT_TOKENS;
    node_embed(w->engine, w->model, &w->batch, w->x);
    fl_status st = FL_OK;
    for (uint32_t i = 0; i < layers && st == FL_OK; i++) {
        st = measure_layer(w, i, o, s, err);
        if (o->progress != NULL) o->progress(o->ctx, i + 1, layers);
    }
    w->batch.tokens = all;
    return st == FL_OK ? check_errors(w->model, s, o, err) : st;
}
