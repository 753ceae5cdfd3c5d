#include "node/exits/head.h"

#include <math.h>
#include <string.h>

#include "node/model/resident.h"

enum { HEAD_GRAIN = 16 }; // rows a worker takes at once

void node_head_bind(node_head *head, const node_model *model, uint32_t rows, uint32_t taus,
                    uint32_t chunk, fl_arena *arena) {
    if (chunk == 0) chunk = NODE_HEAD_CHUNK;
    if (chunk > model->vocabulary) chunk = model->vocabulary;
    chunk = (chunk + 15) / 16 * 16;
    *head = (node_head){.rows = rows, .taus = taus, .chunk = chunk};
    head->norm = FL_ARENA_NEW(arena, float, (size_t)rows * model->hidden);
    head->logits = FL_ARENA_NEW(arena, float, (size_t)rows *chunk);
    head->picked = FL_ARENA_NEW(arena, float, rows);
    head->lse = FL_ARENA_NEW(arena, float, rows);
    head->target = FL_ARENA_NEW(arena, int32_t, rows);
    head->state = FL_ARENA_NEW(arena, fl_lse, (size_t)rows * taus);
}

const float *node_exit_gain(const node_model *model, const node_lora *lora, uint32_t exit) {
    return lora != NULL && lora->exit_gain[exit] != NULL ? lora->exit_gain[exit]
                                                         : model->final_norm;
}

typedef struct norm_ctx {
    const node_engine *engine;
    const node_model *model;
    const float *gain, *x;
    float *y;
} norm_ctx;

static void norm_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const norm_ctx *c = ctx;
    const size_t d = c->model->hidden;
    (void)worker;
    c->engine->kern->rmsnorm->forward(end - begin, d, c->model->norm_epsilon, c->x + begin * d,
                                      c->gain, c->y + begin * d);
}

void node_head_norm(const node_engine *engine, const node_model *model, const float *gain,
                    uint32_t rows, const float *x, float *y) {
    norm_ctx ctx = {engine, model, gain, x, y};
    fl_pool_run(engine->pool, rows, HEAD_GRAIN, norm_rows, &ctx);
}

// One chunk of logits, as its workers see it.
typedef struct chunk_ctx {
    const node_engine *engine;
    node_head *head;
    const node_head_job *job;
    size_t first, n; // vocabulary entries [first, first + n)
} chunk_ctx;

static void take_in_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const chunk_ctx *c = ctx;
    node_head *h = c->head;
    const float *logits = h->logits + begin * c->n;
    (void)worker;
    fl_xent_pick(end - begin, c->n, c->first, logits, c->n, h->target + begin, h->picked + begin);
    for (size_t row = begin; row < end; row++) {
        const size_t exit = row / c->job->tokens;
        for (size_t g = 0; g < c->job->taus; g++) {
            const float tau = c->job->tau[exit * c->job->taus + g];
            c->engine->kern->xent->update(1, c->n, 1.0f / tau, h->logits + row * c->n, c->n,
                                          &h->state[g * h->rows + row]);
        }
    }
}

static void logits_of_chunk(const chunk_ctx *c, node_scratch *scratch) {
    node_resident_head(c->job->model, (uint32_t)c->first, (uint32_t)(c->first + c->n));
    node_matmul_rows(c->engine, &c->job->model->head, (uint32_t)c->first,
                     (uint32_t)(c->first + c->n), c->job->exits * c->job->tokens, c->head->norm,
                     c->head->logits, scratch);
}

// Adds sum_u exp(max_t(logit - lse)) of a chunk to every token of the range.
static void add_max_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const chunk_ctx *c = ctx;
    node_head *h = c->head;
    const size_t tokens = c->job->tokens;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        double sum = 0;
        for (size_t v = 0; v < c->n; v++) {
            float top = -INFINITY;
            for (size_t t = 0; t < c->job->exits; t++) {
                const float lp = h->logits[(t * tokens + i) * c->n + v] - h->lse[t * tokens + i];
                top = lp > top ? lp : top;
            }
            sum += (double)expf(top);
        }
        h->state[i].sum += sum;
    }
}

static void fill_log_max(chunk_ctx *c, node_scratch *scratch) {
    const size_t vocabulary = c->job->model->vocabulary;
    for (size_t i = 0; i < c->job->tokens; i++) c->head->state[i].sum = 0;
    for (c->first = 0; c->first < vocabulary; c->first += c->n) {
        c->n = vocabulary - c->first < c->head->chunk ? vocabulary - c->first : c->head->chunk;
        logits_of_chunk(c, scratch);
        fl_pool_run(c->engine->pool, c->job->tokens, HEAD_GRAIN, add_max_rows, c);
    }
    for (size_t i = 0; i < c->job->tokens; i++)
        c->job->log_max[i] = (float)log(c->head->state[i].sum);
}

void node_head_logp(const node_engine *engine, node_head *head, const node_head_job *job,
                    node_scratch *scratch) {
    const size_t rows = (size_t)job->exits * job->tokens, vocabulary = job->model->vocabulary;
    const size_t d = job->model->hidden;
    FL_ASSERT(rows <= head->rows && job->taus >= 1 && job->taus <= head->taus);
    for (uint32_t t = 0; t < job->exits && (job->log_max != NULL || job->correct != NULL); t++)
        FL_ASSERT(job->tau[t * job->taus] == 1.0f);
    for (uint32_t t = 0; t < job->exits; t++) {
        const size_t at = (size_t)t * job->tokens;
        node_head_norm(engine, job->model, node_exit_gain(job->model, job->lora, t), job->tokens,
                       job->hidden + at * d, head->norm + at * d);
        memcpy(head->target + at, job->target, job->tokens * sizeof(int32_t));
    }
    for (uint32_t g = 0; g < job->taus; g++)
        fl_lse_init(rows, head->state + (size_t)g * head->rows);
    chunk_ctx c = {.engine = engine, .head = head, .job = job};
    for (c.first = 0; c.first < vocabulary; c.first += c.n) {
        c.n = vocabulary - c.first < head->chunk ? vocabulary - c.first : head->chunk;
        logits_of_chunk(&c, scratch);
        fl_pool_run(engine->pool, rows, HEAD_GRAIN, take_in_rows, &c);
    }
    for (size_t row = 0; row < rows; row++) {
        const size_t t = row / job->tokens, i = row % job->tokens;
        for (size_t g = 0; g < job->taus; g++) {
            const fl_lse *state = &head->state[g * head->rows + row];
            const float tau = job->tau[t * job->taus + g];
            job->logp[(t * job->taus + g) * job->stride + i] =
                job->target[i] < 0 ? 0.0f : head->picked[row] / tau - fl_lse_value(state);
        }
        head->lse[row] = fl_lse_value(&head->state[row]);
        if (job->correct != NULL)
            job->correct[t * job->stride + i] =
                job->target[i] >= 0 && (double)head->picked[row] >= head->state[row].max;
    }
    if (job->log_max != NULL) fill_log_max(&c, scratch);
}

// At once, or in chunks where the head passes through memory.
static void vote_logits(const node_engine *engine, node_head *head, const node_model *model,
                        uint32_t rows, const float *norm, float *logits, node_scratch *scratch) {
    const uint32_t vocabulary = model->vocabulary;
    if (!node_resident_head_passes(model)) {
        node_resident_head(model, 0, vocabulary);
        node_matmul(engine, &model->head, rows, norm, logits, scratch);
        return;
    }
    for (uint32_t first = 0, n; first < vocabulary; first += n) {
        n = vocabulary - first < head->chunk ? vocabulary - first : head->chunk;
        node_resident_head(model, first, first + n);
        node_matmul_rows(engine, &model->head, first, first + n, rows, norm, head->logits, scratch);
        for (uint32_t t = 0; t < rows; t++)
            memcpy(logits + (size_t)t * vocabulary + first, head->logits + (size_t)t * n,
                   n * sizeof(float));
    }
}

void node_head_vote(const node_engine *engine, node_head *head, const node_model *model,
                    const node_lora *lora, const node_vote *vote, const float *hidden,
                    float *logits, float *ret_p, node_scratch *scratch) {
    const uint32_t exits = vote->exits, from = vote->mode == NODE_VOTE_LAST ? exits - 1 : 0;
    const size_t d = model->hidden;
    FL_ASSERT(exits <= head->rows);
    for (uint32_t t = from; t < exits; t++)
        node_head_norm(engine, model, node_exit_gain(model, lora, t), 1, hidden + t * d,
                       head->norm + t * d);
    vote_logits(engine, head, model, exits - from, head->norm + from * d,
                logits + (size_t)from * model->vocabulary, scratch);
    node_vote_distribution(engine->kern, vote, model->vocabulary, logits, ret_p);
}
