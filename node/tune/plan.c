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

static bool measure(const node_model *model, uint32_t rank, const node_docs *docs,
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
    return opts->memory_bytes == 0 || ret->peak_bytes <= opts->memory_bytes;
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

// Candidates from the fastest to the smallest. Later ones take strictly less.
typedef struct candidate {
    uint32_t sequence, chunk;
    uint32_t window_part; // window = default / part
    bool keep;
} candidate;

static const candidate candidates[] = {
    {NODE_TUNE_SEQUENCE, 2048, 1, true},
    {NODE_TUNE_SEQUENCE, 1024, 1, false},
    {64, 1024, 1, true},
    {64, 512, 1, false},
    {32, 512, 1, true},
    {32, 256, 1, false},
    {32, 256, 2, false},
    {16, 256, 1, false},
    {16, 128, 2, false},
    {16, 64, 4, false},
    {16, 64, 64, false},
};

static void apply(const node_model *model, const node_docs *docs, const node_tune_opts *asked,
                  const candidate *c, node_tune_opts *opts) {
    *opts = *asked;
    if (opts->micro == 0) opts->micro = 1;
    if (opts->sequence == 0) opts->sequence = c->sequence;
    if (opts->chunk == 0) opts->chunk = c->chunk;
    if (opts->window.size == 0 && c->window_part > 1) {
        opts->window.size = node_window_layers(model, &asked->window) / c->window_part;
        if (opts->window.size == 0) opts->window.size = 1;
    }
    const uint32_t layers = node_window_layers(model, &opts->window);
    if (opts->kept == NODE_TUNE_KEEP_AUTO) opts->kept = c->keep ? layers : 0;
    if (opts->kept > layers) opts->kept = layers;
    opts->window.epoch_steps =
        (node_batches_count(docs, opts->sequence) + opts->micro - 1) / opts->micro;
}

static fl_status refuse(const node_model *model, uint32_t rank, const node_docs *docs,
                        const node_tune_opts *asked, const node_tune_plan *smallest, fl_err *err) {
    const double mb = 1e6;
    node_tune_opts freed = *asked;
    node_tune_plan other;
    freed.window.size = freed.sequence = freed.chunk = 0;
    freed.kept = NODE_TUNE_KEEP_AUTO;
    for (size_t i = 0; i < FL_COUNT(candidates); i++) {
        node_tune_opts opts;
        apply(model, docs, &freed, &candidates[i], &opts);
        if (!measure(model, rank, docs, &opts, &other)) continue;
        return FL_FAIL(err, FL_ENOMEM,
                       "that does not fit %.0f MB: it needs %.0f MB; a window of %u layers, "
                       "1 x %u tokens and chunks of %u need %.0f MB",
                       (double)asked->memory_bytes / mb, (double)smallest->peak_bytes / mb,
                       other.window, opts.sequence, opts.chunk, (double)other.peak_bytes / mb);
    }
    return FL_FAIL(
        err, FL_ENOMEM,
        "nothing fits %.0f MB: the smallest plan (a window of %u layers, %u tokens) needs "
        "%.0f MB, %.0f of them weights",
        (double)asked->memory_bytes / mb, smallest->window, smallest->opts.sequence,
        ceil((double)smallest->peak_bytes / mb), (double)smallest->weight_bytes / mb);
}

fl_status node_tune_make_plan(const node_model *model, uint32_t rank, const node_docs *docs,
                              const node_tune_opts *asked, node_tune_plan *ret, fl_err *err) {
    FL_TRY(check(model, rank, docs, asked, err));
    node_tune_plan plan;
    for (size_t i = 0; i < FL_COUNT(candidates); i++) {
        node_tune_opts opts;
        apply(model, docs, asked, &candidates[i], &opts);
        if (!measure(model, rank, docs, &opts, &plan)) continue;
        plan.batches = node_batches_count(docs, opts.sequence);
        add_prefix(model, &plan);
        *ret = plan;
        return FL_OK;
    }
    return refuse(model, rank, docs, asked, &plan, err);
}
