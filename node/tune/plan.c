// How much a tuning run takes, and what to choose so that it fits.
#include "node/tune/tuner.h"

#include <math.h>

#include "kernels/gemm_f32.h"

node_tune_opts node_tune_defaults(void) {
    return (node_tune_opts){.window = {.kind = NODE_WINDOW_LAST},
                            .kept = NODE_TUNE_KEEP_AUTO,
                            .threads = 1,
                            .lr = 5e-3f,
                            .gain_lr = 5e-3f,
                            .beta1 = 0.8f,
                            .beta2 = 0.95f,
                            .epsilon = 1e-8f,
                            .clip = 1.0f,
                            .warmup = 5,
                            .seed = 1};
}

static bool is_rate(float v, float max) {
    return v >= 0.0f && v <= max; // false for NaN
}

static fl_status check(const node_model *model, uint32_t rank, const node_docs *docs,
                       const node_tune_opts *o, fl_err *err) {
    if (rank < 1 || rank > FL_RANK_MAX)
        return FL_FAIL(err, FL_EARG, "rank %u is not between 1 and %d", rank, FL_RANK_MAX);
    if (o->window.size > model->layers)
        return FL_FAIL(err, FL_EARG, "a window of %u layers is larger than the model's %u",
                       o->window.size, model->layers);
    if (o->window.kind == NODE_WINDOW_FIXED && o->window.exit >= model->exits)
        return FL_FAIL(err, FL_EARG, "there is no exit %u: the model has %u", o->window.exit,
                       model->exits);
    if (o->sequence != 0 &&
        (o->sequence < NODE_TUNE_SEQUENCE_MIN || o->sequence > NODE_TUNE_SEQUENCE_MAX))
        return FL_FAIL(err, FL_EARG, "a sequence of %u tokens is not between %d and %d",
                       o->sequence, NODE_TUNE_SEQUENCE_MIN, NODE_TUNE_SEQUENCE_MAX);
    if (o->micro > NODE_TUNE_MICRO_MAX)
        return FL_FAIL(err, FL_EARG, "%u micro-batches a step are more than %d", o->micro,
                       NODE_TUNE_MICRO_MAX);
    if (!is_rate(o->lr, 1.0f) || !is_rate(o->gain_lr, 1.0f) || !is_rate(o->beta1, 0.9999f) ||
        !is_rate(o->beta2, 0.99999f) || !is_rate(o->decay, 1.0f) || !is_rate(o->clip, 1e9f) ||
        !(o->epsilon > 0.0f && o->epsilon < 1.0f))
        return FL_FAIL(err, FL_EARG, "a rate of the optimiser is out of range");
    if (node_docs_inputs(docs) == 0) return FL_FAIL(err, FL_EARG, "there is no text to tune on");
    return node_docs_check(docs, model->vocabulary, err);
}

// Weights that steps read: layers up to the deepest exit, the head, and embedding rows.
static uint64_t weights_of(const node_model *model, const node_docs *docs,
                           const node_tune_opts *opts) {
    const uint32_t depth = node_window_depth(model, &opts->window);
    uint64_t bytes = model->head.size;
    for (uint32_t l = 0; l <= depth; l++)
        for (int m = 0; m < NODE_MODULES; m++) bytes += model->layer[l].linear[m].size;
    if (!model->tied) {
        const uint64_t page = 4096, row = model->embedding.size / model->embedding.rows;
        const uint64_t rows = node_docs_inputs(docs) * (row + page);
        bytes += rows < model->embedding.size ? rows : model->embedding.size;
    }
    return bytes;
}

void node_tune_measure(const node_model *model, uint32_t rank, const node_docs *docs,
                       const node_tune_opts *opts, node_tune_plan *ret) {
    node_adapter adapter; // only its rank is looked at when counting
    node_tuner tuner;
    fl_arena arena;
    adapter.lora.rank = rank;
    adapter.opts.rank = rank;
    fl_arena_init_counting(&arena);
    node_tuner_bind(&tuner, NULL, model, &adapter, docs, opts, &arena);
    *ret = (node_tune_plan){.opts = *opts,
                            .window = tuner.window,
                            .arena_bytes = arena.peak,
                            .weight_bytes = weights_of(model, docs, opts)};
    ret->resident_bytes = opts->resident_bytes != 0
                              ? opts->resident_bytes
                              : NODE_TUNE_RESIDENT + node_adapter_size(model, rank) +
                                    docs->begin[docs->count] * sizeof(int32_t);
    ret->peak_bytes = ret->arena_bytes + ret->weight_bytes + ret->resident_bytes;
}

fl_status node_tune_make_plan(const node_model *model, uint32_t rank, const node_docs *docs,
                              const node_tune_opts *asked, node_tune_plan *ret, fl_err *err) {
    FL_TRY(check(model, rank, docs, asked, err));
    node_tune_opts opts = *asked;
    const uint32_t layers = node_window_layers(model, &opts.window);
    if (opts.micro == 0) opts.micro = 1;
    if (opts.sequence == 0) opts.sequence = NODE_TUNE_SEQUENCE;
    if (opts.chunk == 0) opts.chunk = NODE_TUNE_CHUNK;
    if (opts.kept > layers) opts.kept = layers;
    node_tune_plan plan;
    node_tune_measure(model, rank, docs, &opts, &plan);
    if (opts.memory_bytes != 0 && plan.peak_bytes > opts.memory_bytes)
        return FL_FAIL(
            err, FL_ENOMEM,
            "that does not fit %.0f MB: a window of %u layers, %u x %u tokens and chunks "
            "of %u need %.0f MB, %.0f of them weights",
            (double)opts.memory_bytes / 1e6, plan.window, opts.micro, opts.sequence, opts.chunk,
            ceil((double)plan.peak_bytes / 1e6), (double)plan.weight_bytes / 1e6);
    *ret = plan;
    return FL_OK;
}
