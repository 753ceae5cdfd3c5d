// reference.h: the whole model, forward and backward, in double and in the plainest way: what the
// engine's gradients are compared with. Written from the formulas, sharing no code with the engine.
#ifndef FL_TESTS_REFERENCE_H
#define FL_TESTS_REFERENCE_H

#include "node/model/forward.h"
#include "tests/check.h"

typedef struct ref_block { // of one layer, or its gradients
    double *b[NODE_MODULES];
} ref_block;

typedef struct ref {
    const node_model *model;
    uint32_t rank;
    double scale;
    double *w[16][NODE_MODULES], *a[16][NODE_MODULES];
    ref_block layer[16];
    double *embedding, *head, *gain[NODE_EXITS_MAX];
    void *taken[4096];
    size_t count, mark;
} ref;

static inline double *ref_take(ref *r, size_t n) {
    double *p = calloc(n + 1, sizeof(*p));
    if (p == NULL || r->count == FL_COUNT(r->taken)) abort();
    r->taken[r->count++] = p;
    return p;
}

static inline void ref_drop(ref *r, size_t mark) {
    while (r->count > mark) free(r->taken[--r->count]);
}

static inline double *ref_floats(ref *r, const float *x, size_t n) {
    double *p = ref_take(r, n);
    for (size_t i = 0; i < n; i++) p[i] = (double)x[i];
    return p;
}

static inline double *ref_matrix(ref *r, const node_matrix *w) {
    double *p = ref_take(r, (size_t)w->rows * w->cols);
    float *row = malloc(w->cols * sizeof(float));
    if (row == NULL) abort();
    for (uint32_t i = 0; i < w->rows; i++) {
        node_matrix_row(w, i, row);
        for (uint32_t k = 0; k < w->cols; k++) p[(size_t)i * w->cols + k] = (double)row[k];
    }
    free(row);
    return p;
}

static inline ref *ref_open(const node_model *m, const node_lora *lora) {
    ref *r = calloc(1, sizeof(*r));
    if (r == NULL) abort();
    r->model = m, r->rank = lora->rank, r->scale = (double)lora->scale;
    for (uint32_t l = 0; l < m->layers; l++)
        for (int i = 0; i < NODE_MODULES; i++) {
            const node_matrix *w = &m->layer[l].linear[i];
            r->w[l][i] = ref_matrix(r, w);
            r->a[l][i] = ref_floats(r, lora->layer[l].a[i], (size_t)r->rank * w->cols);
            r->layer[l].b[i] = ref_floats(r, lora->layer[l].b[i], (size_t)r->rank * w->rows);
        }
    r->embedding = ref_matrix(r, &m->embedding);
    r->head = ref_matrix(r, &m->head);
    for (uint32_t t = 0; t < m->exits; t++)
        r->gain[t] = ref_floats(r, lora->exit_gain[t], m->hidden);
    r->mark = r->count;
    return r;
}

static inline void ref_close(ref *r) {
    ref_drop(r, 0);
    free(r);
}

// y = W x + bias + s B A x.
static inline void ref_linear(const ref *r, uint32_t l, int i, const double *x, double *y) {
    const node_matrix *w = &r->model->layer[l].linear[i];
    double low[64] = {0};
    for (uint32_t k = 0; k < r->rank; k++)
        for (uint32_t c = 0; c < w->cols; c++) low[k] += r->a[l][i][k * w->cols + c] * x[c];
    for (uint32_t j = 0; j < w->rows; j++) {
        const float *bias = i <= NODE_V ? r->model->layer[l].bias[i] : NULL;
        double s = 0;
        for (uint32_t k = 0; k < r->rank; k++) s += r->layer[l].b[i][j * r->rank + k] * low[k];
        y[j] = s * r->scale + (bias != NULL ? (double)bias[j] : 0);
        for (uint32_t c = 0; c < w->cols; c++) y[j] += r->w[l][i][(size_t)j * w->cols + c] * x[c];
    }
}

// dx += W^T dy + s A^T B^T dy; db += s dy (A x)^T.
static inline void ref_linear_back(const ref *r, uint32_t l, int i, const double *x,
                                   const double *dy, double *dx, ref_block *g) {
    const node_matrix *w = &r->model->layer[l].linear[i];
    for (uint32_t k = 0; k < r->rank; k++) {
        double low = 0, dlow = 0;
        for (uint32_t c = 0; c < w->cols; c++) low += r->a[l][i][k * w->cols + c] * x[c];
        for (uint32_t j = 0; j < w->rows; j++) {
            dlow += r->layer[l].b[i][j * r->rank + k] * dy[j];
            g->b[i][j * r->rank + k] += r->scale * dy[j] * low;
        }
        for (uint32_t c = 0; c < w->cols; c++)
            dx[c] += r->scale * dlow * r->a[l][i][k * w->cols + c];
    }
    for (uint32_t j = 0; j < w->rows; j++)
        for (uint32_t c = 0; c < w->cols; c++) dx[c] += dy[j] * r->w[l][i][(size_t)j * w->cols + c];
}

static inline double ref_norm(const ref *r, const double *x, const double *gain, double *y) {
    const uint32_t d = r->model->hidden;
    double mean = 0;
    for (uint32_t i = 0; i < d; i++) mean += x[i] * x[i] / d;
    const double s = 1 / sqrt(mean + (double)r->model->norm_epsilon);
    for (uint32_t i = 0; i < d; i++) y[i] = x[i] * s * gain[i];
    return s;
}

static inline void ref_norm_back(const ref *r, const double *x, const double *gain,
                                 const double *dy, double *dx, double *dgain) {
    const uint32_t d = r->model->hidden;
    double *y = calloc(d, sizeof(*y)), dot = 0;
    if (y == NULL) abort();
    const double s = ref_norm(r, x, gain, y);
    for (uint32_t i = 0; i < d; i++) dot += dy[i] * gain[i] * x[i];
    for (uint32_t i = 0; i < d; i++) {
        dx[i] += s * gain[i] * dy[i] - x[i] * s * s * s / d * dot;
        if (dgain != NULL) dgain[i] += dy[i] * x[i] * s;
    }
    free(y);
}

static inline void ref_rotate(const node_model *m, uint32_t heads, uint32_t pos, double sign,
                              double *x) {
    const uint32_t n = m->rope_size / 2;
    for (uint32_t h = 0; h < heads; h++)
        for (uint32_t i = 0; i < n; i++) {
            const double angle = sign * pos * pow((double)m->rope_base, -2.0 * i / m->rope_size);
            double *a = x + h * m->head_size + (m->rope_half ? i : 2 * i);
            double *b = m->rope_half ? a + n : a + 1;
            const double p = *a, q = *b;
            *a = p * cos(angle) - q * sin(angle);
            *b = p * sin(angle) + q * cos(angle);
        }
}

typedef struct ref_acts { // [T] rows each; prob [T][heads][T]
    double *x, *n1, *q, *k, *v, *prob, *attn, *mid, *n2, *gate, *up, *act;
} ref_acts;

static inline void ref_attention(const ref *r, uint32_t l, const node_batch *in, ref_acts *s) {
    const node_layer *y = &r->model->layer[l];
    const uint32_t n = in->tokens, hs = r->model->head_size, q = y->heads * hs;
    const uint32_t kv = y->kv_heads * hs, group = y->heads / y->kv_heads;
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t h = 0; h < y->heads; h++) {
            double *p = s->prob + ((size_t)t * y->heads + h) * n, sum = 0, top = -1e300;
            for (uint32_t u = in->kv_begin[t]; u <= t; u++) {
                p[u] = 0;
                for (uint32_t i = 0; i < hs; i++)
                    p[u] += s->q[t * q + h * hs + i] * s->k[u * kv + h / group * hs + i];
                p[u] /= sqrt(hs);
                top = fmax(top, p[u]);
            }
            for (uint32_t u = in->kv_begin[t]; u <= t; u++) sum += p[u] = exp(p[u] - top);
            for (uint32_t u = in->kv_begin[t]; u <= t; u++) {
                p[u] /= sum;
                for (uint32_t i = 0; i < hs; i++)
                    s->attn[t * q + h * hs + i] += p[u] * s->v[u * kv + h / group * hs + i];
            }
        }
}

static inline void ref_attention_back(const ref *r, uint32_t l, const node_batch *in,
                                      const ref_acts *s, const double *dattn, double *dq,
                                      double *dk, double *dv) {
    const node_layer *y = &r->model->layer[l];
    const uint32_t n = in->tokens, hs = r->model->head_size, q = y->heads * hs;
    const uint32_t kv = y->kv_heads * hs, group = y->heads / y->kv_heads;
    for (uint32_t t = 0; t < n; t++)
        for (uint32_t h = 0; h < y->heads; h++) {
            const double *p = s->prob + ((size_t)t * y->heads + h) * n;
            const double *go = dattn + t * q + h * hs;
            double dp[64], dot = 0;
            for (uint32_t u = in->kv_begin[t]; u <= t; u++) {
                dp[u] = 0;
                for (uint32_t i = 0; i < hs; i++)
                    dp[u] += go[i] * s->v[u * kv + h / group * hs + i];
                dot += p[u] * dp[u];
            }
            for (uint32_t u = in->kv_begin[t]; u <= t; u++)
                for (uint32_t i = 0; i < hs; i++) {
                    const uint32_t at = u * kv + h / group * hs + i;
                    const double ds = p[u] * (dp[u] - dot) / sqrt(hs);
                    dv[at] += p[u] * go[i];
                    dq[t * q + h * hs + i] += ds * s->k[at];
                    dk[at] += ds * s->q[t * q + h * hs + i];
                }
        }
}

static inline void ref_layer_forward(ref *r, uint32_t l, const node_batch *in, double *x,
                                     ref_acts *s) {
    const node_model *m = r->model;
    const node_layer *y = &m->layer[l];
    const uint32_t n = in->tokens, d = m->hidden, f = y->ffn;
    const uint32_t q = y->heads * m->head_size, kv = y->kv_heads * m->head_size;
    const double *g1 = ref_floats(r, y->attn_norm, d), *g2 = ref_floats(r, y->ffn_norm, d);
    *s = (ref_acts){ref_take(r, n * d),  ref_take(r, n * d),  ref_take(r, n * q),
                    ref_take(r, n * kv), ref_take(r, n * kv), ref_take(r, n * y->heads * n),
                    ref_take(r, n * q),  ref_take(r, n * d),  ref_take(r, n * d),
                    ref_take(r, n * f),  ref_take(r, n * f),  ref_take(r, n * f)};
    memcpy(s->x, x, n * d * sizeof(double));
    for (uint32_t t = 0; t < n; t++) {
        ref_norm(r, x + t * d, g1, s->n1 + t * d);
        ref_linear(r, l, NODE_Q, s->n1 + t * d, s->q + t * q);
        ref_linear(r, l, NODE_K, s->n1 + t * d, s->k + t * kv);
        ref_linear(r, l, NODE_V, s->n1 + t * d, s->v + t * kv);
        ref_rotate(m, y->heads, in->pos[t], 1, s->q + t * q);
        ref_rotate(m, y->kv_heads, in->pos[t], 1, s->k + t * kv);
    }
    ref_attention(r, l, in, s);
    for (uint32_t t = 0; t < n; t++) {
        double *mid = s->mid + t * d, *out = x + t * d;
        ref_linear(r, l, NODE_O, s->attn + t * q, mid);
        for (uint32_t i = 0; i < d; i++) mid[i] += s->x[t * d + i];
        ref_norm(r, mid, g2, s->n2 + t * d);
        ref_linear(r, l, NODE_GATE, s->n2 + t * d, s->gate + t * f);
        ref_linear(r, l, NODE_UP, s->n2 + t * d, s->up + t * f);
        for (uint32_t i = t * f; i < (t + 1) * f; i++)
            s->act[i] = s->gate[i] / (1 + exp(-s->gate[i])) * s->up[i];
        ref_linear(r, l, NODE_DOWN, s->act + t * f, out);
        for (uint32_t i = 0; i < d; i++) out[i] += mid[i];
    }
}

static inline void ref_layer_back(ref *r, uint32_t l, const node_batch *in, const ref_acts *s,
                                  double *dy, ref_block *g) {
    const node_model *m = r->model;
    const node_layer *y = &m->layer[l];
    const uint32_t n = in->tokens, d = m->hidden, f = y->ffn;
    const uint32_t q = y->heads * m->head_size, kv = y->kv_heads * m->head_size;
    const double *g1 = ref_floats(r, y->attn_norm, d), *g2 = ref_floats(r, y->ffn_norm, d);
    double *dattn = ref_take(r, n * q), *dq = ref_take(r, n * q);
    double *dk = ref_take(r, n * kv), *dv = ref_take(r, n * kv);
    for (uint32_t t = 0; t < n; t++) {
        double *dact = ref_take(r, f), *dgate = ref_take(r, f), *dup = ref_take(r, f);
        double *dn = ref_take(r, d);
        ref_linear_back(r, l, NODE_DOWN, s->act + t * f, dy + t * d, dact, g);
        for (uint32_t i = 0; i < f; i++) {
            const double z = s->gate[t * f + i], sig = 1 / (1 + exp(-z));
            dgate[i] = dact[i] * s->up[t * f + i] * sig * (1 + z * (1 - sig));
            dup[i] = dact[i] * z * sig;
        }
        ref_linear_back(r, l, NODE_GATE, s->n2 + t * d, dgate, dn, g);
        ref_linear_back(r, l, NODE_UP, s->n2 + t * d, dup, dn, g);
        ref_norm_back(r, s->mid + t * d, g2, dn, dy + t * d, NULL);
        ref_linear_back(r, l, NODE_O, s->attn + t * q, dy + t * d, dattn + t * q, g);
    }
    ref_attention_back(r, l, in, s, dattn, dq, dk, dv);
    for (uint32_t t = 0; t < n; t++) {
        double *dn = ref_take(r, d);
        ref_rotate(m, y->heads, in->pos[t], -1, dq + t * q);
        ref_rotate(m, y->kv_heads, in->pos[t], -1, dk + t * kv);
        ref_linear_back(r, l, NODE_Q, s->n1 + t * d, dq + t * q, dn, g);
        ref_linear_back(r, l, NODE_K, s->n1 + t * d, dk + t * kv, dn, g);
        ref_linear_back(r, l, NODE_V, s->n1 + t * d, dv + t * kv, dn, g);
        ref_norm_back(r, s->x + t * d, g1, dn, dy + t * d, NULL);
    }
}

// Mean nats over the targets at exit `exit`; gradients of layers first.. and of the gain when g is
// not NULL (g[layer], all zero before).
static inline double ref_loss(ref *r, const node_batch *in, const int32_t *target, uint32_t exit,
                              uint32_t first, ref_block *g, double *dgain) {
    const node_model *m = r->model;
    const uint32_t n = in->tokens, d = m->hidden, v = m->vocabulary, end = m->exit_layer[exit];
    const size_t mark = r->count;
    ref_acts *acts = calloc(end, sizeof(*acts));
    if (acts == NULL) abort();
    double *x = ref_take(r, n * d), *dy = ref_take(r, n * d), nll = 0, scored = 0;
    for (uint32_t t = 0; t < n; t++) {
        memcpy(x + t * d, r->embedding + (size_t)in->id[t] * d, d * sizeof(double));
        scored += target[t] >= 0;
    }
    for (uint32_t l = 0; l < end; l++) ref_layer_forward(r, l, in, x, &acts[l]);
    for (uint32_t t = 0; t < n; t++) {
        if (target[t] < 0) continue;
        double *h = ref_take(r, d), *dh = ref_take(r, d), *z = ref_take(r, v), sum = 0;
        ref_norm(r, x + t * d, r->gain[exit], h);
        for (uint32_t j = 0; j < v; j++) {
            for (uint32_t i = 0; i < d; i++) z[j] += r->head[(size_t)j * d + i] * h[i];
            sum += exp(z[j]);
        }
        nll += (log(sum) - z[target[t]]) / scored;
        for (uint32_t j = 0; j < v; j++) {
            const double dz = (exp(z[j]) / sum - (j == (uint32_t)target[t])) / scored;
            for (uint32_t i = 0; i < d; i++) dh[i] += dz * r->head[(size_t)j * d + i];
        }
        if (g != NULL) ref_norm_back(r, x + t * d, r->gain[exit], dh, dy + t * d, dgain);
    }
    for (uint32_t l = end; g != NULL && l-- > first;) ref_layer_back(r, l, in, &acts[l], dy, &g[l]);
    free(acts);
    ref_drop(r, mark);
    return nll;
}

#endif
