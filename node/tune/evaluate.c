#include "node/tune/evaluate.h"

#include <stdlib.h>
#include <string.h>

#include "common/fault.h"
#include "node/exits/head.h"
#include "node/model/resident.h"

enum { BLOCK_ALIGN = 64, HEAD_TOKENS = 128 }; // tokens of one pass over the head

struct node_eval {
    const node_engine *engine;
    const node_model *model;
    const node_lora *lora;
    node_eval_opts opts;
    uint32_t exits; // looked at
    void *block;
    node_scratch *scratch;
    node_acts acts;
    node_head head;
    node_micro micro;
    float *x;         // [window][hidden]
    float *hidden;    // [exits][window][hidden]
    float *part;      // [exits][HEAD_TOKENS][hidden]
    float *logp;      // [exits][taus][window]
    float *log_max;   // [window]
    uint8_t *correct; // [exits][window]
};

static uint32_t window_of(const node_eval_opts *opts) {
    return opts->window == 0 ? NODE_EVAL_WINDOW : opts->window;
}

static void bind(node_eval *e, fl_arena *arena) {
    const uint32_t n = window_of(&e->opts), part = n < HEAD_TOKENS ? n : HEAD_TOKENS;
    const size_t row = e->model->hidden, exits = e->exits;
    const uint32_t stacked = part * e->exits, most = stacked > n ? stacked : n;
    e->scratch = node_scratch_bind(e->model, most, e->opts.threads, arena);
    node_acts_bind(&e->acts, e->model, n, n, e->lora == NULL ? 0 : e->lora->rank, arena);
    node_head_bind(&e->head, e->model, stacked, NODE_TAU_GRID, 0, arena);
    node_micro_bind(&e->micro, n, arena);
    e->x = fl_arena_alloc(arena, n * row, sizeof(float), 64);
    e->hidden = fl_arena_alloc(arena, exits * n * row, sizeof(float), 64);
    e->part = fl_arena_alloc(arena, stacked * row, sizeof(float), 64);
    e->logp = FL_ARENA_NEW(arena, float, exits *NODE_TAU_GRID *n);
    e->log_max = FL_ARENA_NEW(arena, float, n);
    e->correct = FL_ARENA_NEW(arena, uint8_t, exits * n);
}

static node_eval prepare(const node_engine *engine, const node_model *model, const node_lora *lora,
                         const node_eval_opts *opts) {
    return (node_eval){.engine = engine,
                       .model = model,
                       .lora = lora,
                       .opts = *opts,
                       .exits = opts->all_exits ? model->exits : 1};
}

size_t node_eval_size(const node_model *model, const node_lora *lora, const node_eval_opts *opts) {
    node_eval e = prepare(NULL, model, lora, opts);
    fl_arena arena;
    fl_arena_init_counting(&arena);
    bind(&e, &arena);
    return arena.peak;
}

fl_status node_eval_open(const node_engine *engine, const node_model *model, const node_lora *lora,
                         const node_eval_opts *opts, node_eval **ret, fl_err *err) {
    if (opts->window == 1 || opts->window > 1 << 16)
        return FL_FAIL(err, FL_EARG, "a window of %u tokens is not between 2 and 65536",
                       opts->window);
    const size_t size = node_eval_size(model, lora, opts);
    node_eval *e = fl_fault() ? NULL : malloc(sizeof(*e));
    void *block =
        e == NULL || fl_fault() ? NULL : aligned_alloc(BLOCK_ALIGN, (size + 63) / 64 * 64);
    if (block == NULL) {
        free(e);
        return FL_FAIL(err, FL_ENOMEM, "no memory: an evaluation takes %zu bytes", size);
    }
    *e = prepare(engine, model, lora, opts);
    e->block = block;
    fl_arena arena;
    fl_arena_init(&arena, block, size);
    bind(e, &arena);
    *ret = e;
    return FL_OK;
}

void node_eval_close(node_eval *e) {
    if (e == NULL) return;
    free(e->block);
    free(e);
}

// Layers up to the last exit, hidden rows taken on the way.
static void forward(node_eval *e) {
    const node_model *m = e->model;
    const node_batch batch = node_micro_batch(&e->micro);
    const size_t n = (size_t)batch.tokens * m->hidden;
    uint32_t exit = e->opts.all_exits ? 0 : m->exits - 1, taken = 0;
    const uint32_t heads = (batch.tokens + HEAD_TOKENS - 1) / HEAD_TOKENS;
    const node_resident_pass pass = {.last = m->exit_layer[m->exits - 1] - 1, .heads = heads};
    node_resident_begin(m, &pass);
    node_embed(e->engine, m, &batch, e->x);
    for (uint32_t l = 0; l < m->exit_layer[m->exits - 1]; l++) {
        node_layer_forward(e->engine, m, l, node_lora_at_work(e->lora, m, l), &batch, &e->acts,
                           e->scratch, e->x);
        if (l + 1 != m->exit_layer[exit]) continue;
        memcpy(e->hidden + taken++ * n, e->x, n * sizeof(float));
        if (exit + 1 < m->exits) exit++;
    }
    FL_ASSERT(taken == e->exits);
}

// Log-probabilities of the micro-batch's targets, at `taus` temperatures an exit.
static void score(node_eval *e, uint32_t taus, const float *tau, bool want_max, bool want_correct) {
    const size_t d = e->model->hidden, n = e->micro.tokens;
    const size_t stride = window_of(&e->opts);
    node_lora last_only;
    const node_lora *lora = e->lora;
    if (lora != NULL && !e->opts.all_exits) { // exit 0 of the job is the model's last
        last_only = *lora;
        last_only.exit_gain[0] = lora->exit_gain[e->model->exits - 1];
        lora = &last_only;
    }
    for (size_t at = 0; at < n; at += HEAD_TOKENS) {
        const size_t count = n - at < HEAD_TOKENS ? n - at : HEAD_TOKENS;
        for (size_t t = 0; t < e->exits; t++)
            memcpy(e->part + t * count * d, e->hidden + (t * n + at) * d,
                   count * d * sizeof(float));
        const node_head_job job = {.model = e->model,
                                   .lora = lora,
                                   .exits = e->exits,
                                   .tokens = (uint32_t)count,
                                   .hidden = e->part,
                                   .target = e->micro.target + at,
                                   .taus = taus,
                                   .tau = tau,
                                   .logp = e->logp + at,
                                   .stride = stride,
                                   .correct = want_correct ? e->correct + at : NULL,
                                   .log_max = want_max ? e->log_max + at : NULL};
        node_head_logp(e->engine, &e->head, &job, e->scratch);
    }
}

// Where an evaluation stands in its documents.
typedef struct cursor {
    const node_docs *docs;
    uint32_t doc;
    uint64_t at; // in the document
} cursor;

static void add_window(node_micro *m, const int32_t *ids, uint32_t length) {
    const uint32_t first = m->tokens;
    for (uint32_t i = 0; i < length; i++) {
        m->id[first + i] = ids[i];
        m->target[first + i] = ids[i + 1];
        m->pos[first + i] = i;
        m->kv_begin[first + i] = first;
        m->kv_row[first + i] = first + i;
    }
    m->tokens += length;
    m->scored += length;
}

// Fills the micro-batch with whole windows; false when nothing is left.
static bool fill(node_eval *e, cursor *c, uint64_t tokens_max) {
    const uint32_t window = window_of(&e->opts);
    e->micro.tokens = 0;
    e->micro.scored = 0;
    while (c->doc < c->docs->count && tokens_max > e->micro.scored) {
        const uint64_t begin = c->docs->begin[c->doc] + c->at, end = c->docs->begin[c->doc + 1];
        const uint64_t left = end - begin, length = left < window ? left : window;
        if (length < 2 || (length < window && e->opts.full_windows)) {
            c->doc++;
            c->at = 0;
            continue;
        }
        uint64_t inputs = length - 1;
        if (inputs > window - 1 - e->micro.tokens) break;
        if (inputs > tokens_max - e->micro.scored) inputs = tokens_max - e->micro.scored;
        add_window(&e->micro, c->docs->ids + begin, (uint32_t)inputs);
        c->at += length;
    }
    return e->micro.tokens > 0;
}

// Brings the exits' rows together: [exits][count] in place of [exits][taus][window].
static void gather(node_eval *e, uint32_t taus, float *out, size_t stride, size_t at) {
    const size_t window = window_of(&e->opts);
    for (size_t row = 0; row < (size_t)e->exits * taus; row++)
        memcpy(out + row * stride + at, e->logp + row * window, e->micro.tokens * sizeof(float));
}

static void add_result(node_eval *e, const node_vote *vote, float *joined, double *max_nll,
                       node_eval_result *ret) {
    const size_t n = e->micro.tokens, window = window_of(&e->opts);
    gather(e, 1, joined, n, 0);
    node_vote_sums_add(&ret->sums, vote, joined, n);
    for (size_t i = 0; i < n && vote->mode == NODE_VOTE_MAX; i++) {
        float top = joined[i];
        for (uint32_t t = 1; t < e->exits; t++)
            top = joined[t * n + i] > top ? joined[t * n + i] : top;
        *max_nll += (double)e->log_max[i] - (double)top;
    }
    for (uint32_t t = 0; t < e->exits; t++)
        for (size_t i = 0; i < n; i++) ret->correct[t] += e->correct[t * window + i];
}

static fl_status run(node_eval *e, const node_vote *vote, const node_docs *docs, float *joined,
                     node_eval_result *ret, fl_err *err) {
    cursor c = {.docs = docs};
    const uint64_t limit = e->opts.tokens_max == 0 ? UINT64_MAX : e->opts.tokens_max;
    const bool max = vote->mode == NODE_VOTE_MAX;
    float tau[NODE_EXITS_MAX];
    bool plain = true; // all temperatures are 1
    double max_nll = 0;
    *ret = (node_eval_result){.exits = e->exits, .vote = *vote};
    for (uint32_t t = 0; t < e->exits; t++) {
        tau[t] = max || vote->mode == NODE_VOTE_LAST ? 1.0f : vote->tau[t];
        plain = plain && tau[t] == 1.0f;
    }
    while (ret->tokens < limit && fill(e, &c, limit - ret->tokens)) {
        if (e->opts.stop != NULL && *e->opts.stop)
            return FL_FAIL(err, FL_ESTATE, "the scoring was given up");
        forward(e);
        score(e, 1, tau, max, plain);
        add_result(e, vote, joined, &max_nll, ret);
        ret->tokens += e->micro.tokens;
    }
    if (ret->tokens == 0)
        return FL_FAIL(err, FL_EARG, "there is too little text to score: %s",
                       e->opts.full_windows ? "not one full window" : "not two tokens");
    for (uint32_t t = 0; t < e->exits; t++)
        ret->exit_nll[t] = node_vote_mean_exit_nll(&ret->sums, t);
    ret->last_exit_nll = ret->exit_nll[e->exits - 1];
    ret->nll = max ? max_nll / (double)ret->tokens : node_vote_mean_nll(&ret->sums);
    return FL_OK;
}

fl_status node_eval_run(node_eval *e, const node_vote *vote, const node_docs *docs,
                        node_eval_result *ret, fl_err *err) {
    node_vote last;
    node_vote_init(&last, e->exits);
    if (vote == NULL || !e->opts.all_exits) vote = &last;
    FL_TRY(node_vote_check(vote, err));
    FL_TRY(node_docs_check(docs, e->model->vocabulary, err));
    if (vote->exits != e->exits)
        return FL_FAIL(err, FL_EARG, "the vote has %u exits, the model %u", vote->exits, e->exits);
    float *joined =
        fl_fault() ? NULL : malloc((size_t)e->exits * window_of(&e->opts) * sizeof(*joined));
    if (joined == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to score");
    const fl_status st = run(e, vote, docs, joined, ret, err);
    free(joined);
    return st;
}

// All log-probabilities on the grid of temperatures: logp[exits][NODE_TAU_GRID][count].
static size_t collect(node_eval *e, const node_docs *docs, size_t room, float *logp) {
    cursor c = {.docs = docs};
    float tau[NODE_EXITS_MAX * NODE_TAU_GRID];
    size_t count = 0;
    for (uint32_t t = 0; t < e->exits; t++)
        memcpy(tau + (size_t)t * NODE_TAU_GRID, node_tau_grid, sizeof(node_tau_grid));
    while (count < room && fill(e, &c, room - count)) {
        forward(e);
        score(e, NODE_TAU_GRID, tau, false, false);
        gather(e, NODE_TAU_GRID, logp, room, count);
        count += e->micro.tokens;
    }
    return count;
}

// The rows of each exit at its chosen temperature, [exits][count].
static void choose_rows(const node_vote *vote, const float *logp, size_t room, size_t count,
                        float *out) {
    for (uint32_t t = 0; t < vote->exits; t++) {
        uint32_t g = NODE_TAU_ONE;
        for (uint32_t k = 0; k < NODE_TAU_GRID; k++)
            if (node_tau_grid[k] == vote->tau[t]) g = k;
        memcpy(out + t * count, logp + ((size_t)t * NODE_TAU_GRID + g) * room,
               count * sizeof(float));
    }
}

static void fit(node_eval *e, float *logp, size_t room, size_t count, float *rows, node_vote *ret) {
    node_vote plain, warm;
    node_tau_sums sums = {.exits = e->exits};
    node_vote_init(&plain, e->exits);
    node_vote_init(&warm, e->exits);
    choose_rows(&plain, logp, room, count, rows);
    const double plain_nll = node_vote_fit(&plain, rows, count);
    for (uint32_t row = 0; row < e->exits * NODE_TAU_GRID; row++) // close the gaps between rows
        memmove(logp + row * count, logp + row * room, count * sizeof(float));
    node_tau_sums_add(&sums, logp, count);
    node_vote_set_tau(&warm, &sums);
    choose_rows(&warm, logp, count, count, rows);
    const double warm_nll = node_vote_fit(&warm, rows, count);
    // node_vote_fit compares with the last exit at its own temperature; a vote that is not the
    // mixture goes without any.
    *ret = warm.mode == NODE_VOTE_MIXTURE && warm_nll < plain_nll - 1e-3 ? warm : plain;
}

fl_status node_eval_fit(node_eval *e, const node_docs *docs, uint64_t tokens_max, node_vote *ret,
                        fl_err *err) {
    FL_ASSERT(e->opts.all_exits);
    FL_TRY(node_docs_check(docs, e->model->vocabulary, err));
    uint64_t room = node_docs_inputs(docs);
    if (tokens_max == 0) tokens_max = NODE_EVAL_FIT_TOKENS;
    if (room > tokens_max) room = tokens_max;
    if (room == 0) return FL_FAIL(err, FL_EARG, "there is no text to fit the vote on");
    const size_t rows = (size_t)e->exits * room;
    float *logp = fl_fault() ? NULL : malloc(rows * (NODE_TAU_GRID + 1) * sizeof(*logp));
    if (logp == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to fit the vote");
    const size_t count = collect(e, docs, room, logp);
    fit(e, logp, room, count, logp + rows * NODE_TAU_GRID, ret);
    free(logp);
    return FL_OK;
}

void node_docs_halve(const node_docs *docs, uint64_t *begin, node_docs *ret_first,
                     node_docs *ret_second) {
    const uint32_t half = docs->count / 2;
    memcpy(begin, docs->begin, (docs->count + 1) * sizeof(*begin));
    if (docs->count == 1) {
        const uint64_t middle = begin[0] + (begin[1] - begin[0]) / 2;
        begin[2] = begin[1];
        begin[1] = middle;
        *ret_first = (node_docs){docs->ids, begin, 1};
        *ret_second = (node_docs){docs->ids, begin + 1, 1};
        return;
    }
    *ret_first = (node_docs){docs->ids, begin, half};
    *ret_second = (node_docs){docs->ids, begin + half, docs->count - half};
}

static fl_status settle(node_eval *e, node_adapter *adapter, const node_docs *held, uint64_t *begin,
                        node_eval_result *ret, fl_err *err) {
    node_docs fit_on, score_on;
    node_vote vote;
    node_docs_halve(held, begin, &fit_on, &score_on);
    FL_TRY(node_eval_fit(e, &fit_on, 0, &vote, err));
    FL_TRY(node_eval_run(e, &vote, &score_on, ret, err));
    if (vote.mode != NODE_VOTE_LAST && ret->nll >= ret->last_exit_nll) {
        node_vote_init(&vote, vote.exits);
        vote.fell_back = true;
        FL_TRY(node_eval_run(e, &vote, &score_on, ret, err));
    }
    adapter->vote = vote;
    return FL_OK;
}

static node_eval_opts settle_opts(uint32_t window, uint32_t threads) {
    return (node_eval_opts){.window = window,
                            .threads = threads,
                            .all_exits = true,
                            .tokens_max = NODE_EVAL_FIT_TOKENS};
}

size_t node_eval_settle_size(const node_model *model, const node_lora *lora, uint32_t window,
                             uint32_t threads) {
    const node_eval_opts opts = settle_opts(window, threads);
    const size_t fit = (size_t)NODE_EVAL_FIT_TOKENS * (NODE_TAU_GRID + 1) * sizeof(float);
    return node_eval_size(model, lora, &opts) + model->exits * fit;
}

fl_status node_eval_settle_vote(const node_engine *engine, const node_model *model,
                                node_adapter *adapter, const node_docs *held, uint32_t window,
                                uint32_t threads, node_eval_result *ret, fl_err *err) {
    const node_eval_opts opts = settle_opts(window, threads);
    node_eval *e = NULL;
    uint64_t *begin = fl_fault() ? NULL : malloc((held->count + 3) * sizeof(*begin));
    fl_status st =
        begin == NULL ? FL_FAIL(err, FL_ENOMEM, "no memory for %u documents", held->count) : FL_OK;
    if (st == FL_OK) st = node_eval_open(engine, model, &adapter->lora, &opts, &e, err);
    if (st == FL_OK) st = settle(e, adapter, held, begin, ret, err);
    node_eval_close(e);
    free(begin);
    return st;
}
