// How much a tuning run takes, and what to choose so that it fits.
#include "node/tune/tuner.h"

#include <math.h>
#include <stdio.h>

#include "kernels/gemm_f32.h"
#include "node/tune/evaluate.h"

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
                            .seed = 1,
                            .text_seed = 1,
                            .prefix_bytes = NODE_TUNE_PREFIX};
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
    if (o->window.still > 0 && o->window.still >= o->window.size)
        return FL_FAIL(err, FL_EARG, "a window of %u layers of which %u are not trained",
                       o->window.size, o->window.still);
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
static bool place_weights(const node_model *model, const node_tune_opts *opts, uint64_t limit,
                          node_tune_plan *ret) {
    const node_resident_use use = {.layers = node_window_depth(model, &opts->window) + 1,
                                   .window = ret->window,
                                   .head_rows = opts->chunk};
    return node_resident_make_plan(model, &use, limit, &ret->resident);
}

// Windows for the vote at the end, which takes the arena's place: the widest that fits.
static void place_vote(const node_model *model, const node_lora *lora, uint64_t room,
                       node_tune_plan *ret) {
    const node_tune_opts *o = &ret->opts;
    if (node_window_is_fixed(&o->window)) return;
    for (uint32_t w = NODE_EVAL_WINDOW; w >= 64; w /= 2) {
        ret->vote_window = w;
        ret->vote_bytes = node_eval_settle_size(model, lora, w, o->threads);
        if (ret->vote_bytes <= ret->arena_bytes || ret->vote_bytes <= room) return;
    }
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
    *ret = (node_tune_plan){.opts = *opts, .window = tuner.window, .arena_bytes = arena.peak};
    ret->resident_bytes = opts->resident_bytes != 0
                              ? opts->resident_bytes
                              : NODE_TUNE_RESIDENT + node_adapter_size(model, rank) +
                                    docs->begin[docs->count] * sizeof(int32_t);
    const uint64_t limit = opts->memory_bytes == 0 ? UINT64_MAX : opts->memory_bytes;
    const uint64_t rest = ret->resident_bytes + ret->arena_bytes;
    (void)place_weights(model, opts, !opts->stream ? 0 : limit > rest ? limit - rest : 1, ret);
    ret->weight_bytes = ret->resident.bytes;
    if (ret->weight_bytes == 0)
        ret->weight_bytes = ret->resident.least; // even the ring is too much
    const uint64_t without = ret->resident_bytes + ret->weight_bytes;
    place_vote(model, &adapter.lora, limit > without ? limit - without : 0, ret);
    ret->peak_bytes =
        without + (ret->vote_bytes > ret->arena_bytes ? ret->vote_bytes : ret->arena_bytes);
}

// A prefix cache in what the plan leaves of the limit, if states come again in this run at all.
// Less than was asked for is a slower run, not a failure.
static void add_prefix(const node_model *model, node_tune_plan *p) {
    const node_tune_opts *o = &p->opts;
    const uint64_t left = o->memory_bytes == 0 ? UINT64_MAX : o->memory_bytes - p->peak_bytes;
    node_prefix_shape s = {.batches = p->batches,
                           .entry_size = node_prefix_entry_size(o->sequence, model->hidden)};
    const uint64_t held = node_window_held(model, &o->window);
    if (held == 0 || (held != UINT64_MAX && held * o->micro <= s.batches)) return;
    const uint64_t on_disk = o->prefix_disk / (s.entry_size + NODE_PREFIX_ROOM);
    s.store_places = on_disk < s.batches ? (uint32_t)on_disk : s.batches;
    node_prefix_fit(&s, o->prefix_bytes < left ? o->prefix_bytes : left);
    const uint64_t size = node_prefix_size(&s);
    if (s.places + s.store_places == 0 || size > left) return;
    p->prefix = s;
    p->prefix_bytes = size;
    p->peak_bytes += size;
}

void node_tune_compare(const node_model *model, const node_tune_plan *best, node_tune_plan *plan) {
    const node_tune_opts *b = &best->opts, *p = &plan->opts;
    const node_resident_plan *r = &plan->resident;
    plan->gave_up_count = 0;
    if (p->memory_bytes == 0 || best->peak_bytes <= p->memory_bytes) return;
#define GAVE_UP(...)                                                                               \
    snprintf(plan->gave_up[plan->gave_up_count++], NODE_TUNE_GAVE_UP_SIZE, __VA_ARGS__)
    if (plan->window < best->window)
        GAVE_UP("a window of %u layers instead of %u", plan->window, best->window);
    if (p->sequence < b->sequence)
        GAVE_UP("sequences of %u tokens instead of %u", p->sequence, b->sequence);
    if (p->kept < plan->window && p->kept < b->kept)
        GAVE_UP("%u layers of the window are computed twice", plan->window - p->kept);
    if (p->chunk < b->chunk)
        GAVE_UP("the vocabulary %u at a time instead of %u", p->chunk, b->chunk);
    if (r->ring != 0)
        GAVE_UP("%u of %u layers%s are read again for every micro-batch (%.1f MB)",
                r->layers_streamed, model->layers, r->head_streamed ? " and some of the head" : "",
                (double)r->streamed / 1e6);
    if (plan->vote_window < best->vote_window)
        GAVE_UP("the vote is settled on windows of %u tokens instead of %u", plan->vote_window,
                best->vote_window);
#undef GAVE_UP
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
    const uint32_t batches = node_batches_count(docs, opts.sequence);
    opts.window.epoch_steps = (batches + opts.micro - 1) / opts.micro;
    node_tune_plan plan;
    node_tune_measure(model, rank, docs, &opts, &plan);
    if (opts.memory_bytes != 0 && plan.peak_bytes > opts.memory_bytes)
        return FL_FAIL(
            err, FL_ENOMEM,
            "that does not fit %.0f MB: a window of %u layers, %u x %u tokens and chunks "
            "of %u need %.0f MB, %.0f of them weights",
            (double)opts.memory_bytes / 1e6, plan.window, opts.micro, opts.sequence, opts.chunk,
            ceil((double)plan.peak_bytes / 1e6), (double)plan.weight_bytes / 1e6);
    plan.batches = batches;
    add_prefix(model, &plan);
    *ret = plan;
    return FL_OK;
}
