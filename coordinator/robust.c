#include "coordinator/robust.h"

#include "common/checked.h"
#include "common/fault.h"
#include "coordinator/robust_tile.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WEIGHT_MAX ((uint64_t)1 << 40)

const char *coord_rule_text(coord_rule rule) {
    static const char *const texts[COORD_RULE_COUNT] = {
#define X(name, text) text,
        COORD_RULE_LIST(X)
#undef X
    };
    return rule < COORD_RULE_COUNT ? texts[rule] : "?";
}

uint32_t coord_byzantine(double byzantine, uint32_t m) {
    if (!(byzantine > 0.0)) return 0;
    // 0.2 x 15 is a little more than 3 in double: that is 3, not 4.
    const double f = byzantine >= 1.0 ? floor(byzantine) : ceil(byzantine * m - 1e-9);
    return f >= (double)m ? m : (uint32_t)f;
}

// Does the rule work with m voices of which f are bad?
static bool allowed(coord_rule rule, uint32_t m, uint32_t f, bool has_root) {
    switch (rule) {
    case COORD_RULE_CLIPPED:
    case COORD_RULE_MEDIAN:
        return m >= 3;
    case COORD_RULE_TRIMMED:
        return f >= 1 && m >= 2 * f + 1;
    case COORD_RULE_KRUM:
    case COORD_RULE_MULTI_KRUM:
        return f >= 1 && m >= 2 * f + 3;
    case COORD_RULE_CENTRED:
        return m >= COORD_ROBUST_MIN;
    case COORD_RULE_FLTRUST:
        return has_root;
    default:
        return true;
    }
}

coord_rule coord_rule_for(coord_rule rule, uint32_t m, double byzantine, bool has_root,
                          char reason[COORD_RULE_REASON]) {
    static const coord_rule simpler[COORD_RULE_COUNT] = {
        [COORD_RULE_MEAN] = COORD_RULE_MEAN,          [COORD_RULE_CLIPPED] = COORD_RULE_MEAN,
        [COORD_RULE_MEDIAN] = COORD_RULE_CLIPPED,
        [COORD_RULE_TRIMMED] = COORD_RULE_MEDIAN,     [COORD_RULE_KRUM] = COORD_RULE_TRIMMED,
        [COORD_RULE_MULTI_KRUM] = COORD_RULE_TRIMMED, [COORD_RULE_CENTRED] = COORD_RULE_CLIPPED,
        [COORD_RULE_FLTRUST] = COORD_RULE_CENTRED,
    };
    const uint32_t f = coord_byzantine(byzantine, m);
    coord_rule used = rule;
    while (!allowed(used, m, f, has_root)) used = simpler[used];
    reason[0] = '\0';
    if (used == rule) return used;
    if (rule == COORD_RULE_FLTRUST)
        snprintf(reason, COORD_RULE_REASON, "fltrust needs the root node's update: %s",
                 coord_rule_text(used));
    else
        snprintf(reason, COORD_RULE_REASON, "%s cannot work with %u nodes, %u of them bad: %s",
                 coord_rule_text(rule), m, f, coord_rule_text(used));
    return used;
}

// The rule for the voices that are left when outliers were left out: f of them may still be bad. A
// rule that has nothing left to do is a mean of what is left.
static coord_rule left_over(coord_rule rule, uint32_t m, uint32_t f) {
    return allowed(rule, m, f, true) ? rule : COORD_RULE_CLIPPED;
}

typedef struct work {
    const coord_robust_opts *opts;
    coord_voice *voices; // [m] those that are not left out
    uint32_t *who;       // [m] what the caller calls them, ascending
    uint32_t m, bad, root;
    size_t count;
    coord_voice_read read;
    void *ctx;
    int64_t *fixed;    // [COORD_TILE]
    double *x;         // [m][COORD_TILE] the tile
    double *sorted;    // [m]
    double *norm2;     // [m]
    double *factor;    // [m] of each voice in the result
    double *distance2; // [m] to the centre
    double *kept;      // [m]
    double *dot;       // [m] with the result
    double *part;      // [m] of each voice in the result, as far as that is linear
    coord_pair *pairs; // [2 m]
    double *gram;      // [m][m], of the rules that need distances between voices
} work;

static void work_free(work *w) {
    free(w->voices);
    free(w->who);
    free(w->fixed);
    free(w->x);
    free(w->sorted);
    free(w->pairs);
    free(w->gram);
}

static fl_status work_alloc(work *w, bool pairwise, fl_err *err) {
    const size_t m = w->m;
    if (fl_fault()) return FL_FAIL(err, FL_ENOMEM, "no memory for %zu updates", m);
    w->voices = malloc(m * sizeof(*w->voices));
    w->who = malloc(m * sizeof(*w->who));
    w->fixed = malloc(COORD_TILE * sizeof(*w->fixed));
    w->x = malloc(m * COORD_TILE * sizeof(*w->x));
    w->sorted = calloc(7 * m, sizeof(double));
    w->pairs = malloc(2 * m * sizeof(*w->pairs));
    w->gram = pairwise ? calloc(m * m, sizeof(double)) : NULL;
    if (w->voices == NULL || w->who == NULL || w->fixed == NULL || w->x == NULL ||
        w->sorted == NULL || w->pairs == NULL || (pairwise && w->gram == NULL))
        return FL_FAIL(err, FL_ENOMEM, "no memory for a tile of %zu updates", m);
    w->norm2 = w->sorted + m;
    w->factor = w->norm2 + m;
    w->distance2 = w->factor + m;
    w->kept = w->distance2 + m;
    w->dot = w->kept + m;
    w->part = w->dot + m;
    return FL_OK;
}

static size_t tile_size(const work *w, size_t first) {
    return w->count - first < COORD_TILE ? w->count - first : COORD_TILE;
}

static fl_status load(work *w, size_t first, fl_err *err) {
    const size_t n = tile_size(w, first);
    for (uint32_t v = 0; v < w->m; v++) {
        double *row = w->x + (size_t)v * COORD_TILE;
        FL_TRY(w->read(w->ctx, w->who[v], first, n, w->fixed, err));
        for (size_t i = 0; i < n; i++) row[i] = (double)w->fixed[i]; // exact
    }
    return FL_OK;
}

// Norms, and all inner products when they are needed.
static fl_status survey(work *w, fl_err *err) {
    const uint32_t m = w->m;
    for (size_t first = 0; first < w->count; first += COORD_TILE) {
        const size_t n = tile_size(w, first);
        FL_TRY(load(w, first, err));
        for (uint32_t a = 0; a < m; a++) {
            const double *x = w->x + (size_t)a * COORD_TILE;
            w->norm2[a] += coord_tile_dot(x, x, n);
            for (uint32_t b = 0; w->gram != NULL && b < a; b++)
                w->gram[(size_t)a * m + b] += coord_tile_dot(x, w->x + (size_t)b * COORD_TILE, n);
        }
    }
    return FL_OK;
}

// What norm clipping leaves of each voice.
static void clip_norms(work *w, coord_rule rule) {
    for (uint32_t v = 0; v < w->m; v++) {
        w->factor[v] = 1.0;
        w->sorted[v] = sqrt(w->norm2[v]);
    }
    if (w->opts->clip <= 0.0 || w->m < 3 || rule == COORD_RULE_MEAN) return;
    const double limit = w->opts->clip * coord_lower_median(w->sorted, w->m);
    for (uint32_t v = 0; v < w->m && limit > 0.0; v++) {
        const double norm = sqrt(w->norm2[v]);
        if (norm > limit) w->factor[v] = limit / norm;
    }
}

static void weigh(work *w, const bool *chosen) {
    double total = 0.0;
    for (uint32_t v = 0; v < w->m; v++)
        if (chosen == NULL || chosen[v]) total += (double)w->voices[v].weight;
    for (uint32_t v = 0; v < w->m; v++) {
        const bool in = chosen == NULL || chosen[v];
        w->kept[v] = in ? w->factor[v] : 0.0;
        w->factor[v] = in ? w->factor[v] * ((double)w->voices[v].weight / total) : 0.0;
    }
}

static double product(const work *w, uint32_t a, uint32_t b) {
    return a == b ? w->norm2[a]
           : a > b ? w->gram[(size_t)a * w->m + b]
                   : w->gram[(size_t)b * w->m + a];
}

// Krum's score: the sum of the m - f - 2 smallest squared distances to the others.
static double score(work *w, uint32_t v) {
    uint32_t n = 0;
    for (uint32_t u = 0; u < w->m; u++) {
        const double d2 = w->norm2[v] + w->norm2[u] - 2.0 * product(w, v, u);
        if (u != v) w->pairs[n++] = (coord_pair){.value = d2 > 0.0 ? d2 : 0.0, .voice = u};
    }
    coord_pairs_sort(w->pairs, w->pairs + w->m, n);
    double sum = 0.0;
    for (uint32_t k = 0; k + w->bad + 2 < w->m; k++) sum += w->pairs[k].value;
    return sum;
}

static fl_status choose_krum(work *w, uint32_t take, fl_err *err) {
    bool *chosen = fl_fault() ? NULL : calloc(w->m, sizeof(*chosen));
    if (chosen == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory to choose among %u", w->m);
    for (uint32_t v = 0; v < w->m; v++) w->sorted[v] = score(w, v);
    for (uint32_t v = 0; v < w->m; v++)
        w->pairs[v] = (coord_pair){.value = w->sorted[v], .voice = v};
    coord_pairs_sort(w->pairs, w->pairs + w->m, w->m);
    for (uint32_t k = 0; k < take; k++) chosen[w->pairs[k].voice] = true;
    weigh(w, chosen);
    free(chosen);
    return FL_OK;
}

static void trust(work *w) {
    const uint32_t root = w->root;
    const double g = sqrt(w->norm2[root]);
    double total = 0.0;
    for (uint32_t v = 0; v < w->m; v++) {
        const double norm = sqrt(w->norm2[v]);
        const double cosine =
            v == root ? 1.0 : norm > 0.0 && g > 0.0 ? product(w, v, root) / (norm * g) : 0.0;
        w->kept[v] = cosine > 0.0 ? (cosine < 1.0 ? cosine : 1.0) : 0.0;
        w->factor[v] = norm > 0.0 ? w->kept[v] * (g / norm) : 0.0;
        total += w->kept[v];
    }
    for (uint32_t v = 0; v < w->m; v++) w->factor[v] /= total;
}

// The centre moves towards every voice by what of its distance lies within the radius.
static fl_status clip_around(work *w, double *centre, fl_err *err) {
    const uint32_t m = w->m;
    double total = 0.0;
    for (uint32_t v = 0; v < m; v++) total += (double)w->voices[v].weight;
    for (uint32_t round = 0; round < w->opts->iterations; round++) {
        memset(w->distance2, 0, m * sizeof(double));
        for (size_t first = 0; first < w->count; first += COORD_TILE) {
            FL_TRY(load(w, first, err));
            for (uint32_t v = 0; v < m; v++)
                w->distance2[v] += coord_tile_distance2(w->x + (size_t)v * COORD_TILE,
                                                        centre + first, tile_size(w, first));
        }
        for (uint32_t v = 0; v < m; v++) w->sorted[v] = sqrt(w->distance2[v]);
        const double radius = w->opts->radius > 0.0 ? w->opts->radius / w->opts->unit
                                                    : coord_lower_median(w->sorted, m);
        double stay = 1.0; // of the centre itself
        for (uint32_t v = 0; v < m; v++) {
            const double d = sqrt(w->distance2[v]);
            w->kept[v] = d > radius ? radius / d : 1.0;
            w->factor[v] = w->kept[v] * ((double)w->voices[v].weight / total);
            stay -= w->factor[v];
        }
        for (uint32_t v = 0; v < m; v++) w->part[v] = stay * w->part[v] + w->factor[v];
        for (size_t first = 0; first < w->count; first += COORD_TILE) {
            double moved[COORD_TILE];
            const size_t n = tile_size(w, first);
            FL_TRY(load(w, first, err));
            coord_tile_combine(w->x, w->factor, m, n, moved);
            for (size_t i = 0; i < n; i++) centre[first + i] = stay * centre[first + i] + moved[i];
        }
    }
    return FL_OK;
}

// The result's tiles from the voices' tiles, and each voice's inner product with it.
static fl_status combine(work *w, coord_rule rule, double *mean, double *ret_norm2, fl_err *err) {
    for (size_t first = 0; first < w->count; first += COORD_TILE) {
        const size_t n = tile_size(w, first);
        double *out = mean + first;
        FL_TRY(load(w, first, err));
        if (rule == COORD_RULE_MEDIAN)
            coord_tile_median(w->x, w->factor, w->m, n, w->pairs, w->kept, out);
        else if (rule == COORD_RULE_TRIMMED)
            coord_tile_trimmed(w->x, w->factor, w->voices, w->m, w->bad, n, w->pairs, w->kept, out);
        else if (rule != COORD_RULE_CENTRED) // which is done already
            coord_tile_combine(w->x, w->factor, w->m, n, out);
        *ret_norm2 += coord_tile_dot(out, out, n);
        for (uint32_t v = 0; v < w->m; v++)
            w->dot[v] += coord_tile_dot(w->x + (size_t)v * COORD_TILE, out, n);
    }
    return FL_OK;
}

// n / (n + kappa) with n = W^2 / Q, as aggregate.h has it.
static double shrinkage(const work *w) {
    double sum = 0.0, squares = 0.0;
    for (uint32_t v = 0; v < w->m; v++) {
        const double weight = (double)w->voices[v].weight;
        sum += weight;
        squares += weight * weight;
    }
    const double n = sum * sum / squares;
    return n / (n + w->opts->kappa);
}

// Its cosine to the result without its own part: a voice always agrees with itself, and among few
// that differ much that alone would make an enemy look like a friend.
static coord_opinion opinion_of(const work *w, uint32_t v, double norm2) {
    const double part = w->part[v], own2 = w->norm2[v];
    const double dot = w->dot[v] - part * own2;
    const double rest2 = norm2 - 2.0 * part * w->dot[v] + part * part * own2;
    const double norms = rest2 > 0.0 ? sqrt(own2) * sqrt(rest2) : 0.0;
    const double cosine = norms > 0.0 ? dot / norms : 0.0;
    return (coord_opinion){.norm = sqrt(own2) * w->opts->unit,
                           .cosine = cosine > 1.0 ? 1.0 : cosine < -1.0 ? -1.0 : cosine,
                           .kept = w->kept[v]};
}

static fl_status apply(work *w, coord_rule rule, double *mean, coord_opinion *opinions,
                       double *ret_norm2, fl_err *err) {
    double norm2 = 0.0;
    memset(w->sorted, 0, 7 * (size_t)w->m * sizeof(double));
    if (w->gram != NULL) memset(w->gram, 0, (size_t)w->m * w->m * sizeof(double));
    FL_TRY(survey(w, err));
    clip_norms(w, rule);
    switch (rule) {
    case COORD_RULE_MEAN:
    case COORD_RULE_CLIPPED:
        weigh(w, NULL);
        break;
    case COORD_RULE_KRUM:
        FL_TRY(choose_krum(w, 1, err));
        break;
    case COORD_RULE_MULTI_KRUM:
        FL_TRY(choose_krum(w, w->m - w->bad, err));
        break;
    case COORD_RULE_CENTRED:
        FL_TRY(clip_around(w, mean, err));
        break;
    case COORD_RULE_FLTRUST:
        trust(w);
        break;
    default:
        break;
    }
    FL_TRY(combine(w, rule, mean, &norm2, err));
    const bool counted = rule == COORD_RULE_MEDIAN || rule == COORD_RULE_TRIMMED;
    for (uint32_t v = 0; v < w->m; v++) {
        if (counted) w->kept[v] /= (double)w->count;
        if (counted)
            w->part[v] = w->factor[v] * w->kept[v] / w->m; // about
        else if (rule != COORD_RULE_CENTRED)
            w->part[v] = w->factor[v];
        opinions[w->who[v]] = opinion_of(w, v, norm2);
    }
    *ret_norm2 = norm2;
    return FL_OK;
}

// What the voices that do not count would have thought of the result.
static fl_status judge_rest(work *w, const coord_voice *voices, uint32_t m, double norm2,
                            const double *mean, coord_opinion *opinions, fl_err *err) {
    uint32_t next = 0;
    for (uint32_t v = 0; v < m; v++) {
        double dot = 0.0, own = 0.0;
        if (next < w->m && w->who[next] == v) {
            next++;
            continue;
        }
        for (size_t first = 0; first < w->count; first += COORD_TILE) {
            const size_t n = tile_size(w, first);
            FL_TRY(w->read(w->ctx, v, first, n, w->fixed, err));
            for (size_t i = 0; i < n; i++) w->x[i] = (double)w->fixed[i];
            own += coord_tile_dot(w->x, w->x, n);
            dot += coord_tile_dot(w->x, mean + first, n);
        }
        const double norms = sqrt(own) * sqrt(norm2);
        opinions[v] = (coord_opinion){.norm = sqrt(own) * w->opts->unit,
                                      .cosine = norms > 0.0 ? dot / norms : 0.0,
                                      .outlier = voices[v].weight > 0};
    }
    return FL_OK;
}

// Marks the outliers among the voices that are left, but never the root; how many.
static uint32_t accuse(work *w, coord_opinion *opinions) {
    uint32_t found = 0;
    if (w->m < COORD_ROBUST_MIN) return 0;
    for (uint32_t v = 0; v < w->m; v++) w->sorted[v] = opinions[w->who[v]].cosine;
    const double median = coord_lower_median(w->sorted, w->m);
    for (uint32_t v = 0; v < w->m; v++)
        w->sorted[v] = fabs(opinions[w->who[v]].cosine - median);
    const double limit = median - 3.0 * 1.4826 * coord_lower_median(w->sorted, w->m);
    for (uint32_t v = 0; v < w->m; v++) {
        coord_opinion *o = &opinions[w->who[v]];
        o->outlier = o->cosine < 0.0 && o->cosine < limit && v != w->root;
        found += o->outlier;
    }
    return found;
}

// Closes the gaps that voices without weight leave.
static void pack(work *w) {
    uint32_t root = COORD_NO_ROOT, left = 0;
    for (uint32_t v = 0; v < w->m; v++) {
        if (w->voices[v].weight == 0) continue;
        if (v == w->root) root = left;
        w->voices[left] = w->voices[v];
        w->who[left++] = w->who[v];
    }
    w->root = root;
    w->m = left;
}

// Leaves the outliers out, those that point away furthest first, while more may be bad.
static void dismiss(work *w, coord_opinion *opinions) {
    uint32_t n = 0;
    for (uint32_t v = 0; v < w->m; v++)
        if (opinions[w->who[v]].outlier)
            w->pairs[n++] = (coord_pair){.value = opinions[w->who[v]].cosine, .voice = v};
    coord_pairs_sort(w->pairs, w->pairs + w->m, n);
    if (n > w->bad) n = w->bad;
    for (uint32_t k = 0; k < n; k++) w->voices[w->pairs[k].voice].weight = 0;
    w->bad -= n;
    pack(w);
}

static fl_status run(work *w, const coord_voice *voices, uint32_t m, double *mean,
                     coord_opinion *opinions, coord_robust_result *r, fl_err *err) {
    const coord_robust_opts *opts = w->opts;
    enum { PASSES = 3 };
    double norm2 = 0.0;
    for (int pass = 0;; pass++) {
        FL_TRY(apply(w, r->used, mean, opinions, &norm2, err));
        if (accuse(w, opinions) == 0 || !opts->filter || w->bad == 0 || pass == PASSES - 1) break;
        dismiss(w, opinions);
        r->used = left_over(r->used, w->m, w->bad);
    }
    FL_TRY(judge_rest(w, voices, m, norm2, mean, opinions, err));
    const double scale = shrinkage(w) * opts->unit;
    for (size_t i = 0; i < w->count; i++) mean[i] *= scale;
    return FL_OK;
}

fl_status coord_robust_run(const coord_robust_opts *opts, const coord_voice *voices, uint32_t m,
                           size_t count, coord_voice_read read, void *ctx, double *mean,
                           coord_opinion *opinions, coord_robust_result *ret, fl_err *err) {
    uint32_t heard = 0;
    if (m > COORD_VOICES_MAX || count == 0)
        return FL_FAIL(err, FL_EARG, "%u voices on %zu values", m, count);
    for (uint32_t v = 0; v < m; v++) {
        if (voices[v].weight > WEIGHT_MAX)
            return FL_FAIL(err, FL_EARG, "the weight of voice %u is out of range", v);
        heard += voices[v].weight > 0;
    }
    if (heard == 0) return FL_FAIL(err, FL_EARG, "no voice counts");
    const bool has_root = opts->root < m && voices[opts->root].weight > 0;
    coord_robust_result r = {.bad = coord_byzantine(opts->byzantine, heard)};
    r.used = coord_rule_for(opts->rule, heard, opts->byzantine, has_root, r.reason);
    work w = {.opts = opts,
              .m = m,
              .bad = r.bad,
              .root = has_root ? opts->root : COORD_NO_ROOT,
              .count = count,
              .read = read,
              .ctx = ctx};
    const bool pairwise = r.used == COORD_RULE_KRUM || r.used == COORD_RULE_MULTI_KRUM ||
                          r.used == COORD_RULE_FLTRUST;
    fl_status st = work_alloc(&w, pairwise, err);
    for (uint32_t v = 0; v < m && st == FL_OK; v++) {
        w.voices[v] = voices[v];
        w.who[v] = v;
    }
    if (st == FL_OK) pack(&w);
    for (size_t i = 0; i < count && st == FL_OK && r.used == COORD_RULE_CENTRED; i++)
        mean[i] /= opts->unit;
    if (st == FL_OK) st = run(&w, voices, m, mean, opinions, &r, err);
    work_free(&w);
    if (st == FL_OK) *ret = r;
    return st;
}
