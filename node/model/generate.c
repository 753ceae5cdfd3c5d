#include "node/model/generate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "common/rng.h"
#include "node/model/resident.h"

struct node_session {
    const node_model *model;
    node_session_opts opts;
    uint32_t length;
    node_acts acts; // k, v point into the cache while a layer runs
    node_scratch *scratch;
    float *x;                   // [chunk][hidden]
    float *hidden;              // [exits max][hidden]
    uint32_t *pos, *zero, *row; // [chunk]
    float **k, **v;             // [layers] of [context][kv width of the layer]
};

fl_status node_session_plan(const node_model *model, const node_session_opts *opts,
                            size_t *ret_size, fl_err *err) {
    if (opts->context == 0 || opts->chunk == 0 || opts->threads == 0)
        return FL_FAIL(err, FL_EARG, "context, chunk and threads must be at least 1");
    if (opts->context > model->context)
        return FL_FAIL(err, FL_EARG, "a context of %u tokens; the model knows %u", opts->context,
                       model->context);
    if (opts->chunk > opts->context)
        return FL_FAIL(err, FL_EARG, "chunks of %u tokens in a context of %u", opts->chunk,
                       opts->context);
    fl_arena arena;
    fl_arena_init_counting(&arena);
    (void)node_session_bind(model, opts, &arena);
    if (arena.peak > SIZE_MAX / 2)
        return FL_FAIL(err, FL_ELIMIT, "a context of %u tokens is more than memory can hold",
                       opts->context);
    *ret_size = arena.peak;
    return FL_OK;
}

// A product that does not fit asks for more than there is, so that the plan sees it.
static float *floats(fl_arena *arena, size_t rows, size_t width) {
    size_t count;
    if (!fl_mul_size(rows, width, &count)) count = SIZE_MAX / 2 / sizeof(float);
    return fl_arena_alloc(arena, count, sizeof(float), 64);
}

node_session *node_session_bind(const node_model *model, const node_session_opts *opts,
                                fl_arena *arena) {
    const uint32_t n = opts->chunk;
    node_session *bound = fl_arena_alloc(arena, 1, sizeof(*bound), 64);
    FL_ASSERT((bound == NULL) == fl_arena_counting(arena)); // the plan was exact
    node_session s = {.model = model, .opts = *opts};
    node_acts_bind(&s.acts, model, n, 0, opts->rank, arena);
    s.scratch = node_scratch_bind(model, n, opts->threads, arena);
    s.x = floats(arena, n, model->hidden);
    s.hidden = floats(arena, NODE_EXITS_MAX, model->hidden);
    s.pos = FL_ARENA_NEW(arena, uint32_t, n);
    s.zero = FL_ARENA_NEW(arena, uint32_t, n);
    s.row = FL_ARENA_NEW(arena, uint32_t, n);
    s.k = FL_ARENA_NEW(arena, float *, model->layers);
    s.v = FL_ARENA_NEW(arena, float *, model->layers);
    for (uint32_t i = 0; i < model->layers; i++) {
        const size_t width = (size_t)model->layer[i].kv_heads * model->head_size;
        float *k = floats(arena, opts->context, width), *v = floats(arena, opts->context, width);
        if (bound == NULL) continue;
        FL_ASSERT(k != NULL && v != NULL);
        s.k[i] = k;
        s.v[i] = v;
    }
    if (bound != NULL) *bound = s;
    return bound;
}

uint32_t node_session_length(const node_session *s) {
    return s->length;
}

void node_session_rewind(node_session *s, uint32_t length) {
    FL_ASSERT(length <= s->length);
    s->length = length;
}

// Runs one chunk through all layers; keeps the hidden states of its last token.
static void feed_chunk(node_session *s, const node_engine *engine, const node_lora *lora,
                       const int32_t *ids, uint32_t count) {
    const node_model *m = s->model;
    for (uint32_t t = 0; t < count; t++) s->pos[t] = s->row[t] = s->length + t;
    const node_batch batch = {count, ids, s->pos, s->zero, s->row};
    const float *last = s->x + (size_t)(count - 1) * m->hidden;
    const node_resident_pass pass = {.last = m->layers - 1, .heads = 1};
    node_resident_begin(m, &pass);
    node_embed(engine, m, &batch, s->x);
    for (uint32_t layer = 0, exit = 0; layer < m->layers; layer++) {
        s->acts.k = s->k[layer];
        s->acts.v = s->v[layer];
        node_layer_forward(engine, m, layer, node_lora_at_work(lora, m, layer), &batch, &s->acts,
                           s->scratch, s->x);
        if (exit < m->exits && m->exit_layer[exit] == layer + 1)
            memcpy(s->hidden + (size_t)exit++ * m->hidden, last, m->hidden * sizeof(float));
    }
    s->length += count;
}

fl_status node_session_feed(node_session *s, const node_engine *engine, const node_lora *lora,
                            const int32_t *ids, size_t count, const float **ret_hidden,
                            fl_err *err) {
    FL_ASSERT(lora == NULL || lora->rank <= s->opts.rank);
    if (count == 0) return FL_FAIL(err, FL_EARG, "no tokens to feed");
    if (count > s->opts.context - s->length)
        return FL_FAIL(err, FL_ELIMIT, "%zu tokens after %u do not fit into a context of %u", count,
                       s->length, s->opts.context);
    for (size_t i = 0; i < count; i++)
        if (ids[i] < 0 || (uint32_t)ids[i] >= s->model->vocabulary)
            return FL_FAIL(err, FL_EARG, "token %d is outside the vocabulary of %u", ids[i],
                           s->model->vocabulary);
    for (size_t i = 0; i < count; i += s->opts.chunk) {
        const size_t left = count - i;
        feed_chunk(s, engine, lora, ids + i, left < s->opts.chunk ? (uint32_t)left : s->opts.chunk);
    }
    *ret_hidden = s->hidden;
    return FL_OK;
}

static int32_t most_probable(const float *p, uint32_t count) {
    int32_t best = -1;
    for (uint32_t i = 0; i < count; i++)
        if (isfinite(p[i]) && p[i] > 0 && (best < 0 || p[i] > p[best])) best = (int32_t)i;
    return best;
}

// Most probable first, lower ids first among equals: one order on every machine.
static int compare(const void *a, const void *b) {
    const node_candidate *x = a, *y = b;
    if (x->p != y->p) return x->p < y->p ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

// Puts the k first in order to the front, in any order among themselves (Hoare's selection).
static void select_first(node_candidate *c, uint32_t count, uint32_t k) {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
        const node_candidate pivot = c[low + (high - low) / 2];
        uint32_t i = low, j = high - 1;
        for (;;) {
            while (compare(&c[i], &pivot) < 0) i++;
            while (compare(&c[j], &pivot) > 0) j--;
            if (i >= j) break;
            const node_candidate swap = c[i];
            c[i++] = c[j];
            c[j--] = swap;
        }
        // All before i are at or before the pivot, all from i on at or after it. The pivot lies
        // above low and stops both walks, so low < i < high: both sides shrink.
        if (k <= i)
            high = i;
        else
            low = i;
    }
}

// The candidates that top_p may keep lie at or above (1 - top_p) / count of the whole: the rest
// together weigh no more than what it leaves out. So only these are sorted.
static uint32_t keep_top_p(node_candidate *c, uint32_t count, double total, float top_p) {
    const double least = (1.0 - (double)top_p) * total / count;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < count; i++)
        if ((double)c[i].p >= least) c[kept++] = c[i];
    qsort(c, kept, sizeof(*c), compare);
    double sum = 0;
    for (uint32_t i = 0; i < kept; i++) {
        sum += (double)c[i].p;
        if (sum >= (double)top_p * total) return i + 1;
    }
    return kept;
}

static double sum_of(const node_candidate *c, uint32_t count) {
    double sum = 0;
    for (uint32_t i = 0; i < count; i++) sum += (double)c[i].p;
    return sum;
}

int32_t node_sample(const node_sample_opts *opts, uint64_t counter, const float *p, uint32_t count,
                    node_candidate *scratch) {
    const int32_t best = most_probable(p, count);
    if (best < 0 || !(opts->temperature > 0)) return best;
    const float power = 1.0f / opts->temperature, largest = p[best];
    uint32_t n = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (!(isfinite(p[i]) && p[i] > 0)) continue;
        const float q = power == 1.0f ? p[i] / largest : powf(p[i] / largest, power);
        if (q > 0) scratch[n++] = (node_candidate){q, i};
    }
    if (opts->top_k != 0 && opts->top_k < n) {
        select_first(scratch, n, opts->top_k);
        n = opts->top_k;
        qsort(scratch, n, sizeof(*scratch), compare); // sums and draws in one order
    }
    if (opts->top_p < 1.0f) n = keep_top_p(scratch, n, sum_of(scratch, n), opts->top_p);
    const double total = sum_of(scratch, n);
    const uint64_t key = fl_rng_key(opts->seed, 0x73616d706c65u, 0); // "sample"
    double left = (double)fl_rng_unit(key, counter) * total;
    for (uint32_t i = 0; i + 1 < n; i++) {
        left -= (double)scratch[i].p;
        if (left < 0) return (int32_t)scratch[i].id;
    }
    return (int32_t)scratch[n - 1].id;
}
