#include "bench/robust_fleet.h"

#include "common/rng.h"
#include "coordinator/validate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TRAIN = 160, HELD = 100, STEPS = 12, BATCH = 16, LAYERS = 2 };

typedef struct example {
    float x[FLEET_IN];
    uint32_t label;
} example;

typedef struct fleet {
    const fleet_run *run;
    uint64_t draws;
    example train[FLEET_NODES][TRAIN], held[FLEET_NODES][HELD];
    double theta[FLEET_VALUES];
    double residual[FLEET_NODES][FLEET_VALUES];
    int64_t fixed[FLEET_NODES][FLEET_VALUES];
    double norm[FLEET_NODES][LAYERS];
    uint32_t clip[FLEET_NODES][LAYERS]; // 0: refused
    coord_norms norms[LAYERS];
    coord_conduct rows[COORD_CONDUCT_MAX];
    coord_conducts conducts;
    uint32_t *quarantined;
} fleet;

static double uniform(fleet *f) {
    return (double)(fl_rng_u64(f->run->seed, f->draws++) >> 11) * 0x1p-53;
}

static double normal(fleet *f) {
    const double u = 1.0 - uniform(f), v = uniform(f);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

static void make_examples(fleet *f, uint32_t node, const double centres[][FLEET_IN],
                          const double *shift, example *out, size_t n) {
    for (size_t k = 0; k < n; k++) {
        const bool own = uniform(f) < f->run->skew;
        out[k].label = own ? (node * 2 + (uniform(f) < 0.5)) % FLEET_CLASSES
                           : (uint32_t)(uniform(f) * FLEET_CLASSES);
        for (int i = 0; i < FLEET_IN; i++)
            out[k].x[i] =
                (float)(centres[out[k].label][i] + 0.3 * shift[i] + 1.1 * normal(f));
    }
}

static void make_data(fleet *f) {
    double centres[FLEET_CLASSES][FLEET_IN];
    for (int c = 0; c < FLEET_CLASSES; c++)
        for (int i = 0; i < FLEET_IN; i++) centres[c][i] = 0.8 * normal(f);
    for (uint32_t node = 0; node < FLEET_NODES; node++) {
        double shift[FLEET_IN];
        for (int i = 0; i < FLEET_IN; i++) shift[i] = normal(f);
        make_examples(f, node, (const double(*)[FLEET_IN])centres, shift, f->train[node], TRAIN);
        make_examples(f, node, (const double(*)[FLEET_IN])centres, shift, f->held[node], HELD);
    }
    for (int i = 0; i < FLEET_VALUES; i++) f->theta[i] = 0.15 * normal(f);
}

// Loss of one example; adds its gradient when there is room for it.
static double learn(const double *theta, const example *e, uint32_t label, double *grad) {
    double h[FLEET_HIDDEN], z[FLEET_CLASSES], most = -INFINITY, sum = 0.0;
    const double *w2 = theta + FLEET_W1;
    for (int k = 0; k < FLEET_HIDDEN; k++) {
        const double *w = theta + k * (FLEET_IN + 1);
        double a = w[FLEET_IN];
        for (int i = 0; i < FLEET_IN; i++) a += w[i] * (double)e->x[i];
        h[k] = tanh(a);
    }
    for (int c = 0; c < FLEET_CLASSES; c++) {
        const double *w = w2 + c * (FLEET_HIDDEN + 1);
        z[c] = w[FLEET_HIDDEN];
        for (int k = 0; k < FLEET_HIDDEN; k++) z[c] += w[k] * h[k];
        most = z[c] > most ? z[c] : most;
    }
    for (int c = 0; c < FLEET_CLASSES; c++) sum += exp(z[c] - most);
    const double loss = most + log(sum) - z[label];
    if (grad == NULL) return loss;
    double dh[FLEET_HIDDEN] = {0};
    for (uint32_t c = 0; c < FLEET_CLASSES; c++) {
        const double d = exp(z[c] - most) / sum - (c == label);
        double *g = grad + FLEET_W1 + c * (FLEET_HIDDEN + 1);
        for (int k = 0; k < FLEET_HIDDEN; k++) {
            g[k] += d * h[k];
            dh[k] += d * w2[c * (FLEET_HIDDEN + 1) + (uint32_t)k];
        }
        g[FLEET_HIDDEN] += d;
    }
    for (int k = 0; k < FLEET_HIDDEN; k++) {
        const double d = dh[k] * (1.0 - h[k] * h[k]);
        double *g = grad + k * (FLEET_IN + 1);
        for (int i = 0; i < FLEET_IN; i++) g[i] += d * (double)e->x[i];
        g[FLEET_IN] += d;
    }
    return loss;
}

static void train(fleet *f, uint32_t node, bool wrong, double *delta) {
    double local[FLEET_VALUES];
    memcpy(local, f->theta, sizeof(local));
    for (int s = 0; s < STEPS; s++) {
        double grad[FLEET_VALUES] = {0};
        for (int b = 0; b < BATCH; b++) {
            const example *e = &f->train[node][(size_t)(uniform(f) * TRAIN)];
            learn(local, e, wrong ? (e->label + 1) % FLEET_CLASSES : e->label, grad);
        }
        for (int i = 0; i < FLEET_VALUES; i++) local[i] -= 0.1 * grad[i] / BATCH;
    }
    for (int i = 0; i < FLEET_VALUES; i++) delta[i] = local[i] - f->theta[i];
}

static void attack(fleet *f, double *delta) {
    double norm = 0.0, noise = 0.0;
    double drawn[FLEET_VALUES];
    static const double factor[FLEET_ATTACK_COUNT] = {
        [FLEET_FLIP] = -1, [FLEET_FLIP3] = -3, [FLEET_HUNDRED] = 100, [FLEET_AWAY] = -100};
    for (int i = 0; i < FLEET_VALUES; i++) {
        norm += delta[i] * delta[i];
        drawn[i] = normal(f);
        noise += drawn[i] * drawn[i];
    }
    for (int i = 0; i < FLEET_VALUES; i++) {
        if (f->run->attack == FLEET_NOISE)
            delta[i] = 3.0 * drawn[i] * sqrt(norm / noise);
        else if (f->run->attack != FLEET_TARGETED)
            delta[i] *= factor[f->run->attack];
    }
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

// Only the largest values travel; the rest waits for the next time.
static void sparsify(fleet *f, uint32_t node, double *delta) {
    double sizes[FLEET_VALUES];
    if (f->run->sparse >= 1.0) return;
    for (int i = 0; i < FLEET_VALUES; i++) {
        delta[i] += f->residual[node][i];
        sizes[i] = fabs(delta[i]);
    }
    qsort(sizes, FLEET_VALUES, sizeof(double), by_size);
    const double least = sizes[(size_t)(f->run->sparse * FLEET_VALUES)];
    for (int i = 0; i < FLEET_VALUES; i++) {
        f->residual[node][i] = fabs(delta[i]) > least ? 0.0 : delta[i];
        delta[i] -= f->residual[node][i];
    }
}

static const size_t begins[LAYERS + 1] = {0, FLEET_W1, FLEET_VALUES};

static void send(fleet *f, uint32_t node, const double *delta, bool gated) {
    static const coord_gate gate = {.clip_factor = 4, .refuse_factor = 20, .norms_min = 6};
    for (int i = 0; i < FLEET_VALUES; i++)
        f->fixed[node][i] = llrint(fmax(-64.0, fmin(64.0, delta[i])) * 0x1p32);
    for (int l = 0; l < LAYERS; l++) {
        const double norm = coord_norm(f->fixed[node] + begins[l], begins[l + 1] - begins[l],
                                       0x1p-32);
        f->clip[node][l] = COORD_ONE;
        if (!gated) continue;
        if (coord_gate_norm(&gate, &f->norms[l], norm, &f->clip[node][l], NULL) == FL_OK) {
            coord_norms_add(&f->norms[l], norm);
        } else {
            f->clip[node][l] = 0;
            coord_conduct_note(&f->conducts, node + 1, -1.0);
        }
    }
}

static fl_status read_row(void *ctx, uint32_t source, size_t first, size_t n, int64_t *out,
                          fl_err *err) {
    const fleet *f = ctx;
    (void)err;
    memcpy(out, f->fixed[source / LAYERS] + begins[source % LAYERS] + first, n * sizeof(*out));
    return FL_OK;
}

static bool fold(fleet *f, uint32_t layer, uint32_t round) {
    coord_ballot_row rows[FLEET_NODES];
    coord_voice voices[FLEET_NODES];
    uint32_t first[FLEET_NODES + 1];
    coord_opinion opinions[FLEET_NODES];
    coord_robust_result r;
    double mean[FLEET_VALUES] = {0};
    coord_ballot b = {.rows = rows, .voices = voices, .first = first, .read = read_row, .ctx = f};
    for (uint32_t node = 0; node < FLEET_NODES; node++) {
        if (f->clip[node][layer] == 0) continue;
        rows[b.row_count++] = (coord_ballot_row){.node = node + 1,
                                                 .weight = 3072 * (uint64_t)COORD_ONE,
                                                 .clip = f->clip[node][layer],
                                                 .source = node * LAYERS + layer};
    }
    coord_ballot_sort(&b);
    uint32_t heard = 0;
    for (uint32_t v = 0; v < b.voice_count; v++) {
        if (coord_is_quarantined(&f->conducts, rows[first[v]].node, round)) voices[v].weight = 0;
        heard += voices[v].weight > 0;
    }
    if (heard == 0) return true;
    coord_robust_opts opts = f->run->opts;
    opts.unit = 0x1p-32;
    if (opts.root != COORD_NO_ROOT) opts.root = coord_ballot_voice(&b, 1);
    const size_t count = begins[layer + 1] - begins[layer];
    if (coord_robust_run(&opts, voices, b.voice_count, count, coord_ballot_read, &b, mean, opinions,
                         &r, NULL) != FL_OK)
        return false;
    for (size_t i = 0; i < count; i++) f->theta[begins[layer] + i] += mean[i];
    for (uint32_t v = 0; v < b.voice_count; v++) {
        coord_conduct_note(&f->conducts, rows[first[v]].node, opinions[v].cosine);
    }
    return true;
}

static void count_quarantined(void *ctx, const coord_conduct *row, coord_conduct_change change) {
    fleet *f = ctx;
    if (change == COORD_CONDUCT_QUARANTINED && row->times == 1)
        f->quarantined[row->node <= FLEET_NODES - FLEET_BAD]++;
}

double fleet_loss(const fleet_run *run, uint32_t ret_quarantined[2]) {
    fleet *f = calloc(1, sizeof(*f));
    double sum = 0.0;
    if (f == NULL) return (double)NAN;
    *f = (fleet){.run = run, .quarantined = ret_quarantined};
    f->conducts.rows = f->rows;
    ret_quarantined[0] = ret_quarantined[1] = 0;
    make_data(f);
    for (uint32_t round = 1; round <= run->rounds; round++) {
        for (uint32_t node = 0; node < FLEET_NODES; node++) {
            double delta[FLEET_VALUES];
            const bool bad = run->attack != FLEET_NONE && node >= FLEET_NODES - FLEET_BAD;
            train(f, node, bad && run->attack == FLEET_TARGETED, delta);
            sparsify(f, node, delta);
            if (bad) attack(f, delta);
            send(f, node, delta, run->gated);
        }
        for (uint32_t l = 0; l < LAYERS; l++)
            if (!fold(f, l, round)) goto out;
        coord_conducts_close(&f->conducts, round, run->quarantine ? FLEET_BAD : 0,
                             count_quarantined, f);
    }
    for (uint32_t node = 0; node < FLEET_NODES - FLEET_BAD; node++)
        for (int k = 0; k < HELD; k++)
            sum += learn(f->theta, &f->held[node][k], f->held[node][k].label, NULL);
out:
    free(f);
    return sum / ((FLEET_NODES - FLEET_BAD) * HELD);
}
