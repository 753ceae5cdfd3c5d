#include "node/tune/tuner.h"

#include <math.h>
#include <string.h>

#include "common/clock.h"
#include "common/rng.h"
#include "kernels/adamw.h"
#include "kernels/vec.h"
#include "node/model/resident.h"

static uint32_t widest_span(const node_model *model, uint32_t rank) {
    uint32_t most = 0;
    for (uint32_t l = 0; l < model->layers; l++) {
        const uint32_t count = node_adapter_layer_count(model, l, rank);
        if (count > most) most = count;
    }
    return most;
}

// Moments of the active window only when it moves rarely (they start anew when it does), of all
// layers when every step may train others.
static uint32_t slots_of(const node_model *model, const node_window_opts *w, uint32_t window) {
    return node_window_is_fixed(w) || w->kind == NODE_WINDOW_ORDERED ? window : model->layers;
}

// Buffers of phases that never overlap, on the same bytes: what passes through a layer's forward
// run, the loss, a layer's backward run. Then the activations that outlive their phase.
static void bind_phases(node_tuner *t, const node_model *model, uint32_t n, uint32_t rank,
                        uint32_t chunk, fl_arena *arena) {
    const size_t mark = arena->used;
    node_acts passing = {0};
    node_acts_bind_passing(&passing, model, n, arena);
    size_t end = arena->used;
    fl_arena_rewind(arena, mark);
    node_head_bind(&t->head, model, n, 1, chunk, arena);
    t->dnorm = fl_arena_alloc(arena, (size_t)n * model->hidden, sizeof(float), 64);
    if (arena->used > end) end = arena->used;
    fl_arena_rewind(arena, mark);
    node_back_bind(&t->back, model, n, rank, arena);
    if (arena->used > end) end = arena->used;
    fl_arena_rewind(arena, mark);
    (void)fl_arena_alloc(arena, end - mark, 1, 1);
    t->acts = passing;
    if (t->opts.kept < t->window) node_acts_bind_lasting(&t->acts, model, n, n, rank, arena);
    t->kept = FL_ARENA_NEW(arena, node_acts, t->opts.kept);
    for (uint32_t i = 0; i < t->opts.kept; i++) {
        node_acts unused = passing, *acts = t->kept == NULL ? &unused : &t->kept[i];
        *acts = passing;
        node_acts_bind_lasting(acts, model, n, n, rank, arena);
    }
}

void node_tuner_bind(node_tuner *t, const node_engine *engine, const node_model *model,
                     node_adapter *adapter, const node_docs *docs, const node_tune_opts *planned,
                     fl_arena *arena) {
    const uint32_t rank = adapter->lora.rank, n = planned->sequence;
    const size_t row = model->hidden;
    *t = (node_tuner){.engine = engine, .model = model, .adapter = adapter, .opts = *planned};
    t->window = node_window_layers(model, &planned->window);
    t->slots = slots_of(model, &planned->window, t->window);
    t->span = widest_span(model, rank);
    t->slot_first = UINT32_MAX;
    node_batches_bind(&t->batches, docs, n, planned->text_seed, planned->seed, arena);
    node_micro_bind(&t->micro, n, arena);
    t->entry =
        fl_arena_alloc(arena, 1, node_prefix_entry_size(n, model->hidden) + NODE_PREFIX_ROOM, 64);
    t->scratch = node_scratch_bind(model, n, planned->threads, arena);
    bind_phases(t, model, n, rank, planned->chunk, arena);
    t->x = fl_arena_alloc(arena, n * row, sizeof(float), 64);
    t->dx = fl_arena_alloc(arena, n * row, sizeof(float), 64);
    t->inputs = fl_arena_alloc(arena, n * row * t->window, sizeof(float), 64);
    const size_t moments = (size_t)t->slots * t->span + (size_t)model->exits * row;
    t->grad = fl_arena_alloc(arena, (size_t)t->window * t->span + row, sizeof(float), 64);
    t->m = fl_arena_alloc(arena, moments, sizeof(float), 64);
    t->v = fl_arena_alloc(arena, moments, sizeof(float), 64);
    t->updates = FL_ARENA_NEW(arena, uint64_t, t->slots + model->exits);
}

void node_tuner_use_prefix(node_tuner *t, node_prefix *prefix) {
    FL_ASSERT(prefix->shape.batches == t->batches.count &&
              prefix->shape.entry_size ==
                  node_prefix_entry_size(t->opts.sequence, t->model->hidden));
    t->prefix = prefix;
}

// Activations of a window's layer: kept ones belong to the layers nearest the exit.
static node_acts *acts_of(node_tuner *t, node_window w, uint32_t layer) {
    const uint32_t from_top = w.last - layer;
    return from_top < t->opts.kept ? &t->kept[from_top] : &t->acts;
}

static void run_layer(node_tuner *t, const node_batch *batch, uint32_t layer, node_acts *acts) {
    node_layer_forward(t->engine, t->model, layer, &t->adapter->lora, batch, acts, t->scratch,
                       t->x);
}

static void run_below(node_tuner *t, const node_batch *batch, uint32_t layer, node_acts *acts) {
    const node_lora *lora = node_lora_at_work(&t->adapter->lora, t->model, layer);
    node_layer_forward(t->engine, t->model, layer, lora, batch, acts, t->scratch, t->x);
}

// Adds the time since *at to a sum, and goes on from now.
static void lap(double *at, double *sum) {
    const double now = fl_clock_s();
    *sum += now - *at;
    *at = now;
}

static void begin_pass(const node_tuner *t, node_window w, uint32_t first) {
    const node_resident_pass pass = {
        .first = first, .last = w.last, .heads = 1, .low = w.first, .back = true};
    node_resident_begin(t->model, &pass);
}

// x = the state that enters the window. Above the embedding it always goes through the form in
// which it is kept, so that it has the same bits whether it was found or computed.
static void enter_window(node_tuner *t, const node_batch *batch, node_window w, uint32_t index) {
    const uint32_t hidden = t->model->hidden;
    if (w.first == 0) {
        begin_pass(t, w, 0);
        node_embed(t->engine, t->model, batch, t->x);
        return;
    }
    node_prefix_key key = {{0, 0}};
    if (t->prefix != NULL) {
        key = node_prefix_key_of(t->prefix->base, &t->micro);
        if (node_prefix_get(t->prefix, index, key, t->entry)) {
            begin_pass(t, w, w.first);
            node_prefix_decode(batch->tokens, hidden, t->entry, t->x);
            return;
        }
    }
    begin_pass(t, w, 0);
    node_embed(t->engine, t->model, batch, t->x);
    // Nothing is kept here, so any activations will do; the lowest is written last.
    for (uint32_t l = 0; l < w.first; l++)
        run_below(t, batch, l, t->opts.kept < t->window ? &t->acts : &t->kept[t->window - 1]);
    node_prefix_encode(batch->tokens, hidden, t->x, t->entry);
    node_prefix_decode(batch->tokens, hidden, t->entry, t->x);
    if (t->prefix != NULL) node_prefix_put(t->prefix, index, key, t->entry);
}

static void forward(node_tuner *t, const node_batch *batch, node_window w, uint32_t index,
                    double *at, node_tune_report *ret) {
    const size_t size = (size_t)t->opts.sequence * t->model->hidden;
    enter_window(t, batch, w, index);
    lap(at, &ret->below_s);
    for (uint32_t l = w.first; l <= w.last; l++) {
        memcpy(t->inputs + (l - w.first) * size, t->x,
               (size_t)batch->tokens * t->model->hidden * sizeof(float));
        run_layer(t, batch, l, acts_of(t, w, l));
    }
    lap(at, &ret->window_s);
}

static double micro_step(node_tuner *t, node_window w, float weight, uint64_t draw, double *at,
                         node_tune_report *ret) {
    const uint32_t index = node_batches_next(&t->batches);
    const size_t row = t->model->hidden, size = t->opts.sequence * row;
    node_batches_fill(&t->batches, index, &t->micro);
    const node_batch batch = node_micro_batch(&t->micro);
    forward(t, &batch, w, index, at, ret);
    const node_loss_job loss = {.model = t->model,
                                .gain = t->adapter->lora.exit_gain[w.exit],
                                .tokens = batch.tokens,
                                .x = t->x,
                                .target = t->micro.target,
                                .least = NODE_LOSS_LEAST,
                                .draw = draw,
                                .weight = weight,
                                .dnorm = t->dnorm,
                                .dx = t->dx,
                                .dgain = t->grad + (size_t)t->window * t->span};
    const double nll = node_loss_step(t->engine, &t->head, &loss, t->scratch);
    lap(at, &ret->head_s);
    for (uint32_t l = w.last + 1; l-- > w.first;) {
        float *input = t->inputs + (l - w.first) * size;
        node_acts *acts = acts_of(t, w, l);
        if (acts == &t->acts) {
            memcpy(t->x, input, batch.tokens * row * sizeof(float));
            run_layer(t, &batch, l, acts);
        }
        const node_layer_job job = {.model = t->model,
                                    .layer = l,
                                    .lora = &t->adapter->lora,
                                    .batch = &batch,
                                    .acts = acts,
                                    .x = input,
                                    .dy = t->dx,
                                    .db = t->grad + (size_t)(l - w.first) * t->span,
                                    .last = l == w.first};
        node_layer_backward(t->engine, &job, &t->back, t->scratch);
    }
    lap(at, &ret->back_s);
    return nll;
}

// The last layer of the window that is trained; with layers above it that are not, the exit's gain
// stays as well, which belongs to the last of them.
static uint32_t last_trained(const node_tuner *t, node_window w) {
    return w.last - t->opts.window.still;
}

static double grad_square(const node_tuner *t, node_window w) {
    const float *gain = t->grad + (size_t)t->window * t->span;
    double sum = t->opts.window.still == 0 ? fl_vec_sumsq(t->model->hidden, gain) : 0.0;
    for (uint32_t l = w.first; l <= last_trained(t, w); l++)
        sum += fl_vec_sumsq(t->adapter->span_count[l], t->grad + (size_t)(l - w.first) * t->span);
    return sum;
}

static void clip(node_tuner *t, node_window w, float scale) {
    fl_vec_scale(t->model->hidden, scale, t->grad + (size_t)t->window * t->span);
    for (uint32_t l = w.first; l <= last_trained(t, w); l++)
        fl_vec_scale(t->adapter->span_count[l], scale, t->grad + (size_t)(l - w.first) * t->span);
}

// Points slots at this window; where they belonged to another, their moments start anew.
static void claim_slots(node_tuner *t, node_window w) {
    if (t->slots == t->model->layers) {
        t->slot_first = 0;
        return;
    }
    if (t->slot_first == w.first) return;
    t->slot_first = w.first;
    memset(t->m, 0, (size_t)t->slots * t->span * sizeof(float));
    memset(t->v, 0, (size_t)t->slots * t->span * sizeof(float));
    memset(t->updates, 0, t->slots * sizeof(*t->updates));
}

static void update(node_tuner *t, node_window w) {
    const node_tune_opts *o = &t->opts;
    const float rise = t->step < o->warmup ? (float)(t->step + 1) / (float)(o->warmup + 1) : 1.0f;
    fl_adamw adam = {.lr = o->lr * rise,
                     .beta1 = o->beta1,
                     .beta2 = o->beta2,
                     .epsilon = o->epsilon,
                     .decay = o->decay};
    claim_slots(t, w);
    for (uint32_t l = w.first; l <= last_trained(t, w); l++) {
        const uint32_t slot = l - t->slot_first;
        const size_t at = (size_t)slot * t->span;
        adam.step = ++t->updates[slot];
        fl_adamw_step(&adam, t->adapter->span_count[l], t->adapter->span[l],
                      t->grad + (size_t)(l - w.first) * t->span, t->m + at, t->v + at);
    }
    if (o->window.still > 0) return;
    const size_t at = (size_t)t->slots * t->span + (size_t)w.exit * t->model->hidden;
    adam.lr = o->gain_lr * rise;
    adam.decay = 0; // a gain decays towards nothing useful
    adam.step = ++t->updates[t->slots + w.exit];
    fl_adamw_step(&adam, t->model->hidden, t->adapter->lora.exit_gain[w.exit],
                  t->grad + (size_t)t->window * t->span, t->m + at, t->v + at);
}

void node_tuner_step(node_tuner *t, node_tune_report *ret) {
    const node_window w = node_window_at(t->model, &t->opts.window, t->step);
    double nll = 0, at = fl_clock_s();
    uint64_t scored = 0, tokens = 0;
    *ret = (node_tune_report){.window = w, .exit_layer = t->model->exit_layer[w.exit]};
    memset(t->grad, 0, ((size_t)t->window * t->span + t->model->hidden) * sizeof(float));
    if (t->prefix != NULL && w.first > 0)
        node_prefix_begin(t->prefix, node_prefix_base(t->model, t->adapter, w.first));
    // Micro-batches are full (the line of documents wraps around): a token's weight is known.
    const float weight = 1.0f / (float)((uint64_t)t->opts.micro * t->opts.sequence);
    for (uint32_t i = 0; i < t->opts.micro; i++) {
        lap(&at, &ret->rest_s);
        nll += micro_step(t, w, weight, fl_rng_key(t->opts.seed, t->step, i), &at, ret);
        scored += t->micro.scored;
        tokens += t->micro.tokens;
    }
    const double norm = sqrt(grad_square(t, w));
    ret->loss = scored == 0 ? 0 : nll / (double)scored;
    ret->tokens = tokens;
    ret->grad_norm = (float)norm;
    ret->skipped = !isfinite(norm) || !isfinite(nll);
    if (!ret->skipped) {
        if (t->opts.clip > 0 && norm > (double)t->opts.clip)
            clip(t, w, (float)((double)t->opts.clip / norm));
        update(t, w);
        float *seen = &t->opts.window.importance[w.exit];
        *seen = *seen == 0 ? (float)norm : 0.9f * *seen + 0.1f * (float)norm;
    }
    t->tokens += tokens;
    ret->step = ++t->step;
    lap(&at, &ret->rest_s);
}

typedef struct run_state {
    uint64_t step, tokens, epoch;
    uint32_t turn, slot_first;
    float importance[NODE_EXITS_MAX];
} run_state;

// The three arrays that follow it.
static size_t moments_size(const node_tuner *t) {
    return ((size_t)t->slots * t->span + (size_t)t->model->exits * t->model->hidden) *
           sizeof(float);
}

static size_t updates_size(const node_tuner *t) {
    return (t->slots + t->model->exits) * sizeof(*t->updates);
}

size_t node_tuner_state_size(const node_tuner *t) {
    return sizeof(run_state) + updates_size(t) + 2 * moments_size(t);
}

void node_tuner_state_get(const node_tuner *t, void *state) {
    run_state s = {.step = t->step,
                   .tokens = t->tokens,
                   .epoch = t->batches.epoch,
                   .turn = t->batches.at,
                   .slot_first = t->slot_first};
    uint8_t *p = state;
    memcpy(s.importance, t->opts.window.importance, sizeof(s.importance));
    memcpy(p, &s, sizeof(s));
    memcpy(p += sizeof(s), t->updates, updates_size(t));
    memcpy(p += updates_size(t), t->m, moments_size(t));
    memcpy(p += moments_size(t), t->v, moments_size(t));
}

void node_tuner_state_set(node_tuner *t, const void *state) {
    run_state s;
    const uint8_t *p = state;
    memcpy(&s, p, sizeof(s));
    t->step = s.step;
    t->tokens = s.tokens;
    t->slot_first = s.slot_first;
    memcpy(t->opts.window.importance, s.importance, sizeof(s.importance));
    node_batches_seek(&t->batches, s.epoch, s.turn);
    memcpy(t->updates, p += sizeof(s), updates_size(t));
    memcpy(t->m, p += updates_size(t), moments_size(t));
    memcpy(t->v, p += moments_size(t), moments_size(t));
}
