#include "node/tune/loss.h"

#include <math.h>
#include <string.h>

#include "common/rng.h"
#include "kernels/vec.h"
#include "node/model/resident.h"

enum { LOSS_GRAIN = 16 };

typedef struct loss_ctx {
    const node_engine *engine;
    node_head *head;
    const node_loss_job *job;
    size_t first, n; // vocabulary entries of the chunk
} loss_ctx;

// The chunk's logits become exp(z - m); what was summed before is brought to the new m.
static void take_chunk(void *ctx, size_t begin, size_t end, unsigned worker) {
    const loss_ctx *c = ctx;
    const size_t d = c->job->model->hidden;
    const fl_kern *kern = c->engine->kern;
    static const int32_t no_target = -1;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        float *z = c->head->logits + t * c->n;
        fl_lse *state = &c->head->state[t];
        const double before = state->max;
        const float on = c->job->target[t] < 0 ? 0.0f : 1.0f;
        fl_xent_pick(1, c->n, c->first, z, c->n, c->job->target + t, c->head->picked + t);
        kern->xent->update(1, c->n, 1.0f, z, c->n, state);
        if (c->first != 0 && state->max > before)
            fl_vec_scale(d, (float)exp(before - state->max), c->job->dnorm + t * d);
        const float top = (float)state->max;
        const uint32_t draw = (uint32_t)fl_rng_u64(c->job->draw, t);
        kern->xent->grad(1, c->n, c->first, z, c->n, &top, &no_target, &on, c->job->least, &draw, z,
                         c->n);
    }
}

// dnorm = weight * (sum / total - W_target). The head's copy of the normalised rows is spent by now
// and holds the rows of W.
static void finish_rows(void *ctx, size_t begin, size_t end, unsigned worker) {
    const loss_ctx *c = ctx;
    const node_loss_job *job = c->job;
    const size_t d = job->model->hidden;
    (void)worker;
    for (size_t t = begin; t < end; t++) {
        float *dn = job->dnorm + t * d, *row = c->head->norm + t * d;
        if (job->target[t] < 0) {
            memset(dn, 0, d * sizeof(float));
            continue;
        }
        node_resident_row(job->model, &job->model->head, (uint32_t)job->target[t], row);
        fl_vec_scale(d, job->weight * (float)(1.0 / c->head->state[t].sum), dn);
        fl_vec_axpy(d, -job->weight, row, dn);
    }
    memset(job->dx + begin * d, 0, (end - begin) * d * sizeof(float));
    c->engine->kern->rmsnorm->backward(end - begin, d, job->model->norm_epsilon, job->x + begin * d,
                                       job->gain, job->dnorm + begin * d, job->dx + begin * d,
                                       NULL);
}

// The gain's gradient is a sum over tokens in order: one caller, so that threads change no bit.
static void add_gain_gradient(const node_loss_job *job) {
    const size_t d = job->model->hidden;
    for (size_t t = 0; t < job->tokens; t++) {
        const float *x = job->x + t * d, *dn = job->dnorm + t * d;
        const double mean = fl_vec_sumsq(d, x) / (double)d;
        const float r = (float)(1.0 / sqrt(mean + (double)job->model->norm_epsilon));
        for (size_t i = 0; i < d; i++) job->dgain[i] += dn[i] * x[i] * r;
    }
}

double node_loss_step(const node_engine *engine, node_head *head, const node_loss_job *job,
                      node_scratch *scratch) {
    const size_t vocabulary = job->model->vocabulary;
    FL_ASSERT(job->tokens <= head->rows);
    loss_ctx c = {.engine = engine, .head = head, .job = job};
    node_head_norm(engine, job->model, job->gain, job->tokens, job->x, head->norm);
    fl_lse_init(job->tokens, head->state);
    for (c.first = 0; c.first < vocabulary; c.first += c.n) {
        c.n = vocabulary - c.first < head->chunk ? vocabulary - c.first : head->chunk;
        const uint32_t begin = (uint32_t)c.first, end = (uint32_t)(c.first + c.n);
        node_resident_head(job->model, begin, end);
        node_matmul_rows(engine, &job->model->head, begin, end, job->tokens, head->norm,
                         head->logits, scratch);
        fl_pool_run(engine->pool, job->tokens, LOSS_GRAIN, take_chunk, &c);
        node_matmul_rows_dx(engine, &job->model->head, begin, end, job->tokens, head->logits,
                            job->dnorm, c.first != 0, scratch);
    }
    double nll = 0;
    for (size_t t = 0; t < job->tokens; t++)
        if (job->target[t] >= 0)
            nll += (double)fl_lse_value(&head->state[t]) - (double)head->picked[t];
    fl_pool_run(engine->pool, job->tokens, LOSS_GRAIN, finish_rows, &c);
    add_gain_gradient(job);
    return nll;
}
