// Goal: each robust rule is what its paper says, to the same bits for the same set of updates, and
// f liars among enough nodes cannot move it further than it promises.
// Method: golden numbers from numpy, plain references of each definition in long double over random
// sizes around the tile's edges, liars that say the worst they can, shuffled ledgers, every failure
// of a read and of memory, and the table of what falls back to what.
#include "common/fault.h"
#include "coordinator/aggregate.h"
#include "coordinator/robust.h"
#include "coordinator/robust_tile.h"
#include "tests/check.h"

enum { M_MAX = 40, COUNT_MAX = 2 * COORD_TILE + 700 };

typedef struct table { // voices by rows
    uint32_t m;
    size_t count;
    int64_t *x; // [m][count]
    coord_voice voices[M_MAX];
    size_t reads_left; // SIZE_MAX: reading never fails
} table;

static fl_status read_row(void *ctx, uint32_t v, size_t first, size_t n, int64_t *out,
                          fl_err *err) {
    table *t = ctx;
    if (t->reads_left != SIZE_MAX && t->reads_left-- == 0)
        return FL_FAIL(err, FL_EIO, "the disk is gone");
    T_NEED(v < t->m && first % COORD_TILE == 0 && n <= COORD_TILE && first + n <= t->count,
           "a read of what is there");
    memcpy(out, t->x + v * t->count + first, n * sizeof(*out));
    return FL_OK;
}

static void table_open(table *t, uint32_t m, size_t count) {
    *t = (table){.m = m, .count = count, .reads_left = SIZE_MAX};
    t->x = malloc(m * count * sizeof(*t->x));
    for (size_t i = 0; i < m * count; i++) t->x[i] = (int64_t)(t_rand() >> 26) - (1ll << 37);
    for (uint32_t v = 0; v < m; v++) t->voices[v].weight = 1 + t_rand() % 1000000;
}

static coord_robust_opts options(coord_rule rule, double byzantine) {
    return (coord_robust_opts){.rule = rule,
                               .byzantine = byzantine,
                               .iterations = 3,
                               .root = rule == COORD_RULE_FLTRUST ? 2 : COORD_NO_ROOT,
                               .unit = 1.0};
}

// The seven voices that tests/golden's numbers were made from with numpy 2:
//   X = ((37 i + 23 j + 11 i i j) % 41) - 20, row 6 times 50; w = 1..7.
static void golden_table(table *t) {
    table_open(t, 7, 5);
    for (int i = 0; i < 7; i++) {
        for (int j = 0; j < 5; j++)
            t->x[i * 5 + j] = ((i * 37 + j * 23 + i * i * j * 11) % 41 - 20) * (i == 6 ? 50 : 1);
        t->voices[i].weight = (uint64_t)i + 1;
    }
}

static void test_golden_numbers(void) {
    static const struct {
        coord_robust_opts opts;
        double want[5];
        const char *numpy;
    } cases[] = {
        {{.rule = COORD_RULE_MEDIAN, .root = COORD_NO_ROOT},
         {5, 8, -7, -4, -10},
         "median(X, 0)"},
        {{.rule = COORD_RULE_TRIMMED, .byzantine = 1, .root = COORD_NO_ROOT},
         {4.52631578947368, 6.77777777777778, -4.46666666666667, -4.61111111111111,
          -7.11764705882353},
         "argsort of each column, [1:6], average with w"},
        {{.rule = COORD_RULE_KRUM, .byzantine = 1, .root = COORD_NO_ROOT},
         {17, 10, 3, -4, -11},
         "scores 4893 2639 3091 3367 3426 3378 6199229: row 1"},
        {{.rule = COORD_RULE_MULTI_KRUM, .byzantine = 1, .root = COORD_NO_ROOT},
         {5.71428571428571, 5.52380952380952, -8.33333333333333, -2.66666666666667,
          -4.80952380952381},
         "average of rows 0 to 5 with w"},
        {{.rule = COORD_RULE_CENTRED, .radius = 30, .iterations = 3, .root = COORD_NO_ROOT},
         {4.50021296385096, 7.80912244395004, -2.14202881172354, -9.29316859264856,
          -7.75680344014503},
         "from (1, 2, 3, 4, 5), 3 times v += p * minimum(1, 30 / d) @ (X - v)"},
        {{.rule = COORD_RULE_FLTRUST, .root = 2},
         {8.09011848602176, 2.89927517276537, -12.3750977266575, 1.06784862700555,
          -6.94841893399176},
         "g = X[2]"},
        {{.rule = COORD_RULE_CLIPPED, .clip = 2, .root = COORD_NO_ROOT},
         {2.83965360483783, 7.03497850461006, 0.98030340438229, -10.1943438582999,
          -7.46330467281341},
         "rows times minimum(1, 2 sort(n)[3] / n), average with w"},
    };
    table t;
    golden_table(&t);
    for (size_t k = 0; k < FL_COUNT(cases); k++) {
        double got[5] = {1, 2, 3, 4, 5};
        coord_opinion opinions[7];
        coord_robust_result r;
        coord_robust_opts opts = cases[k].opts;
        fl_err err;
        opts.unit = 1.0;
        T_OK(coord_robust_run(&opts, t.voices, 7, 5, read_row, &t, got, opinions, &r, &err), err);
        T_EQ(r.used, opts.rule);
        T_STR(r.reason, "");
        for (int i = 0; i < 5; i++)
            T_NEAR(got[i], cases[k].want[i], 1e-12 * fabs(cases[k].want[i]), "%s, value %d (%s)",
                   coord_rule_text(opts.rule), i, cases[k].numpy);
    }
    free(t.x);
}

static int by_double(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double norm_of(const table *t, uint32_t v) {
    long double sum = 0;
    for (size_t i = 0; i < t->count; i++) {
        const long double x = (long double)t->x[v * t->count + i];
        sum += x * x;
    }
    return (double)sqrtl(sum);
}

static double distance2_of(const table *t, uint32_t a, uint32_t b) {
    long double sum = 0;
    for (size_t i = 0; i < t->count; i++) {
        const long double d =
            (long double)t->x[a * t->count + i] - (long double)t->x[b * t->count + i];
        sum += d * d;
    }
    return (double)sum;
}

// ---- the definitions, one coordinate or one voice at a time

static double plain_coordinate(const table *t, coord_rule rule, uint32_t f, size_t i) {
    double column[M_MAX];
    long double sum = 0, weights = 0;
    for (uint32_t v = 0; v < t->m; v++) column[v] = (double)t->x[v * t->count + i];
    qsort(column, t->m, sizeof(double), by_double);
    if (rule == COORD_RULE_MEDIAN) return (column[(t->m - 1) / 2] + column[t->m / 2]) / 2;
    // A voice is trimmed when f others are below it, or above; ties go by place.
    for (uint32_t v = 0; v < t->m; v++) {
        uint32_t below = 0;
        const int64_t mine = t->x[v * t->count + i];
        for (uint32_t u = 0; u < t->m; u++) {
            const int64_t x = t->x[u * t->count + i];
            below += x < mine || (x == mine && u < v);
        }
        if (below < f || below >= t->m - f) continue;
        sum += (long double)t->voices[v].weight * mine;
        weights += (long double)t->voices[v].weight;
    }
    return (double)(sum / weights);
}

static void plain_krum(const table *t, uint32_t f, uint32_t take, bool *chosen) {
    double scores[M_MAX];
    for (uint32_t v = 0; v < t->m; v++) {
        double d[M_MAX];
        uint32_t n = 0;
        for (uint32_t u = 0; u < t->m; u++)
            if (u != v) d[n++] = distance2_of(t, u, v);
        qsort(d, n, sizeof(double), by_double);
        scores[v] = 0;
        for (uint32_t k = 0; k < t->m - f - 2; k++) scores[v] += d[k];
        chosen[v] = false;
    }
    for (uint32_t k = 0; k < take; k++) {
        uint32_t best = M_MAX;
        for (uint32_t v = 0; v < t->m; v++)
            if (!chosen[v] && (best == M_MAX || scores[v] < scores[best])) best = v;
        chosen[best] = true;
    }
}

static void plain_factors(const table *t, coord_rule rule, uint32_t f, double *factor) {
    bool chosen[M_MAX];
    double total = 0;
    if (rule != COORD_RULE_FLTRUST)
        plain_krum(t, f, rule == COORD_RULE_KRUM ? 1 : t->m - f, chosen);
    for (uint32_t v = 0; v < t->m; v++) {
        if (rule == COORD_RULE_FLTRUST) {
            long double dot = 0;
            for (size_t i = 0; i < t->count; i++)
                dot += (long double)t->x[v * t->count + i] * t->x[2 * t->count + i];
            const double g = norm_of(t, 2), n = norm_of(t, v);
            const double trust = (double)dot / (g * n);
            factor[v] = trust > 0 ? trust * g / n : 0;
            total += trust > 0 ? trust : 0;
        } else {
            factor[v] = chosen[v] ? (double)t->voices[v].weight : 0;
            total += factor[v];
        }
    }
    for (uint32_t v = 0; v < t->m; v++) factor[v] /= total;
}

static void plain_centred(const table *t, uint32_t iterations, double *v) {
    double total = 0;
    for (uint32_t k = 0; k < t->m; k++) total += (double)t->voices[k].weight;
    for (uint32_t n = 0; n < iterations; n++) {
        double d[M_MAX], sorted[M_MAX];
        for (uint32_t k = 0; k < t->m; k++) {
            long double sum = 0;
            for (size_t i = 0; i < t->count; i++) {
                const long double e = (long double)t->x[k * t->count + i] - (long double)v[i];
                sum += e * e;
            }
            d[k] = sorted[k] = (double)sqrtl(sum);
        }
        qsort(sorted, t->m, sizeof(double), by_double);
        const double radius = sorted[(t->m - 1) / 2];
        for (size_t i = 0; i < t->count; i++) {
            long double step = 0;
            for (uint32_t k = 0; k < t->m; k++)
                step += (long double)t->voices[k].weight / total *
                        (d[k] > radius ? radius / d[k] : 1) *
                        ((long double)t->x[k * t->count + i] - (long double)v[i]);
            v[i] += (double)step;
        }
    }
}

static void check_against_plain(const table *t, coord_rule rule, uint32_t f, const double *got) {
    static double centre[COUNT_MAX];
    double factor[M_MAX] = {0};
    const bool by_coordinate = rule == COORD_RULE_MEDIAN || rule == COORD_RULE_TRIMMED;
    memset(centre, 0, sizeof(centre));
    if (rule == COORD_RULE_CENTRED)
        plain_centred(t, 3, centre);
    else if (!by_coordinate)
        plain_factors(t, rule, f, factor);
    for (size_t i = 0; i < t->count; i++) {
        long double want = 0;
        if (by_coordinate)
            want = plain_coordinate(t, rule, f, i);
        else if (rule == COORD_RULE_CENTRED)
            want = centre[i];
        else
            for (uint32_t v = 0; v < t->m; v++)
                want += (long double)factor[v] * t->x[v * t->count + i];
        // Values reach 2^37; what sums of m of them round away is far below 2^-40 of that.
        T_NEAR(got[i], (double)want, 0x1p-3, "%s of %u at %zu of %zu", coord_rule_text(rule), t->m,
               i, t->count);
        if (t_failed) return;
    }
}

static void test_each_rule_is_its_definition(void) {
    static const size_t counts[] = {1, 7, COORD_TILE - 1, COORD_TILE, COORD_TILE + 1, COUNT_MAX};
    static const uint32_t sizes[] = {5, 6, 15, 17, M_MAX};
    static double got[COUNT_MAX];
    for (size_t s = 0; s < FL_COUNT(sizes); s++) {
        for (size_t c = 0; c < FL_COUNT(counts); c++) {
            table t;
            table_open(&t, sizes[s], counts[c]);
            for (int rule = COORD_RULE_MEDIAN; rule < COORD_RULE_COUNT; rule++) {
                const coord_robust_opts opts = options((coord_rule)rule, 0.2);
                coord_opinion opinions[M_MAX];
                coord_robust_result r;
                fl_err err;
                memset(got, 0, sizeof(got));
                T_OK(coord_robust_run(&opts, t.voices, t.m, t.count, read_row, &t, got, opinions,
                                      &r, &err),
                     err);
                T_EQ(r.bad, (t.m + 4) / 5);
                if (r.used != opts.rule) continue;
                check_against_plain(&t, r.used, r.bad, got);
            }
            free(t.x);
        }
    }
}

// Ties: a column of few different values, where the sort's order decides which weights count.
static void test_ties_go_by_place(void) {
    static double got[300];
    table t;
    table_open(&t, 21, 300);
    for (size_t i = 0; i < 21u * 300; i++) t.x[i] = (int64_t)(t_rand() % 3);
    const coord_robust_opts opts = options(COORD_RULE_TRIMMED, 5);
    coord_opinion opinions[M_MAX];
    coord_robust_result r;
    fl_err err;
    T_OK(coord_robust_run(&opts, t.voices, 21, 300, read_row, &t, got, opinions, &r, &err), err);
    for (size_t i = 0; i < 300; i++)
        T_NEAR(got[i], plain_coordinate(&t, COORD_RULE_TRIMMED, 5, i), 1e-14, "value %zu", i);
    free(t.x);
}

static void test_the_sort_is_stable_at_every_size(void) {
    static coord_pair pairs[600], scratch[600];
    for (uint32_t m = 0; m < 300; m++) {
        for (uint32_t i = 0; i < m; i++)
            pairs[i] = (coord_pair){.value = (double)(t_rand() % (1 + m / 3)), .voice = i};
        coord_pairs_sort(pairs, scratch, m);
        for (uint32_t i = 1; i < m; i++)
            T_CHECK(pairs[i - 1].value < pairs[i].value ||
                        (pairs[i - 1].value == pairs[i].value &&
                         pairs[i - 1].voice < pairs[i].voice),
                    "m=%u at %u", m, i);
    }
}

// ---- liars

enum { HONEST = 12, LIARS = 3, ALL = HONEST + LIARS, VALUES = 5000 };

// Honest nodes agree on a direction and differ around it; liars are the last three.
static void plant(table *t, int attack) {
    table_open(t, ALL, VALUES);
    for (size_t i = 0; i < VALUES; i++) {
        const double truth = (double)t_randf() * 1e9;
        for (uint32_t v = 0; v < HONEST; v++)
            t->x[v * VALUES + i] = (int64_t)(truth + (double)t_randf() * 1e9);
        for (uint32_t v = HONEST; v < ALL; v++) {
            const double own = truth + (double)t_randf() * 1e9;
            const double lies[] = {-own, 100 * own, (double)t_randf() * 1e10, 0x1p40};
            t->x[v * VALUES + i] = (int64_t)lies[attack];
        }
    }
    for (uint32_t v = 0; v < ALL; v++) t->voices[v].weight = 1000;
}

static double cosine_to_honest(const table *t, const double *got, double *ret_ratio) {
    double dot = 0, gg = 0, hh = 0;
    for (size_t i = 0; i < VALUES; i++) {
        double honest = 0;
        for (uint32_t v = 0; v < HONEST; v++) honest += (double)t->x[v * VALUES + i] / HONEST;
        dot += honest * got[i];
        gg += got[i] * got[i];
        hh += honest * honest;
    }
    *ret_ratio = sqrt(gg / hh);
    return dot / sqrt(gg * hh);
}

static void test_three_liars_of_fifteen_change_little(void) {
    static double got[VALUES];
    for (int attack = 0; attack < 4; attack++) {
        table t;
        plant(&t, attack);
        for (int rule = 0; rule < COORD_RULE_COUNT; rule++) {
            coord_robust_opts opts = options((coord_rule)rule, 0.2);
            coord_opinion o[M_MAX];
            coord_robust_result r;
            fl_err err;
            double ratio;
            opts.clip = rule == COORD_RULE_MEAN ? 0 : 1;
            memset(got, 0, sizeof(got));
            T_OK(coord_robust_run(&opts, t.voices, ALL, VALUES, read_row, &t, got, o, &r, &err),
                 err);
            T_EQ(r.used, rule);
            const double cosine = cosine_to_honest(&t, got, &ratio);
            const bool undefended = rule == COORD_RULE_MEAN && attack > 0;
            // One honest node alone (krum) has a cosine of 1 / sqrt(2) to the truth.
            if (undefended)
                T_CHECK(ratio > 2 || cosine < 0.8, "attack %d does nothing to the mean", attack);
            else
                T_CHECK(cosine > (rule == COORD_RULE_KRUM ? 0.6 : 0.9) && ratio < 1.5 &&
                            ratio > 0.4,
                        "%s under attack %d: cosine %.3f, %.3f times as long",
                        coord_rule_text((coord_rule)rule), attack, cosine, ratio);
            for (uint32_t v = HONEST; v < ALL && attack == 0; v++)
                T_CHECK(o[v].cosine < -0.3, "%s: a flipped voice agrees: %.3f",
                        coord_rule_text((coord_rule)rule), o[v].cosine);
            for (uint32_t v = HONEST; v < ALL && rule == COORD_RULE_MULTI_KRUM; v++)
                T_CHECK(o[v].kept == 0.0, "multi-krum took liar %u under attack %d", v, attack);
        }
        free(t.x);
    }
}

// Whatever f liars say, median and trimmed mean stay within what the honest said, everywhere.
static void test_coordinates_stay_among_the_honest(void) {
    static double got[VALUES];
    for (int attack = 0; attack < 4; attack++) {
        table t;
        plant(&t, attack);
        for (int rule = COORD_RULE_MEDIAN; rule <= COORD_RULE_TRIMMED; rule++) {
            const coord_robust_opts opts = options((coord_rule)rule, 3);
            coord_opinion o[M_MAX];
            coord_robust_result r;
            fl_err err;
            T_OK(coord_robust_run(&opts, t.voices, ALL, VALUES, read_row, &t, got, o, &r, &err),
                 err);
            for (size_t i = 0; i < VALUES; i++) {
                int64_t low = INT64_MAX, high = INT64_MIN;
                for (uint32_t v = 0; v < HONEST; v++) {
                    const int64_t x = t.x[v * VALUES + i];
                    low = x < low ? x : low;
                    high = x > high ? x : high;
                }
                T_CHECK(got[i] >= (double)low && got[i] <= (double)high, "%s at %zu",
                        coord_rule_text((coord_rule)rule), i);
            }
        }
        free(t.x);
    }
}

// ---- what is too few, and what is refused

static void test_too_few_fall_back_and_say_so(void) {
    static const struct {
        coord_rule rule;
        uint32_t m;
        double byzantine;
        bool root;
        coord_rule used;
    } cases[] = {
        {COORD_RULE_MEAN, 1, 0.2, false, COORD_RULE_MEAN},
        {COORD_RULE_MEDIAN, 2, 0.2, false, COORD_RULE_MEAN},
        {COORD_RULE_CLIPPED, 2, 0.2, false, COORD_RULE_MEAN},
        {COORD_RULE_CLIPPED, 3, 0.2, false, COORD_RULE_CLIPPED},
        {COORD_RULE_MEDIAN, 3, 0.2, false, COORD_RULE_MEDIAN},
        {COORD_RULE_TRIMMED, 3, 1, false, COORD_RULE_TRIMMED},
        {COORD_RULE_TRIMMED, 4, 2, false, COORD_RULE_MEDIAN},
        {COORD_RULE_TRIMMED, 2, 1, false, COORD_RULE_MEAN},
        {COORD_RULE_TRIMMED, 9, 0, false, COORD_RULE_MEDIAN}, // nobody is bad: nothing to trim
        {COORD_RULE_KRUM, 5, 1, false, COORD_RULE_KRUM},
        {COORD_RULE_KRUM, 4, 1, false, COORD_RULE_TRIMMED},
        {COORD_RULE_KRUM, 8, 3, false, COORD_RULE_TRIMMED},
        {COORD_RULE_MULTI_KRUM, 9, 3, false, COORD_RULE_MULTI_KRUM},
        {COORD_RULE_MULTI_KRUM, 6, 3, false, COORD_RULE_MEDIAN},
        {COORD_RULE_CENTRED, 5, 0.2, false, COORD_RULE_CENTRED},
        {COORD_RULE_CENTRED, 4, 0.2, false, COORD_RULE_CLIPPED},
        {COORD_RULE_FLTRUST, 2, 0.2, true, COORD_RULE_FLTRUST},
        {COORD_RULE_FLTRUST, 7, 0.2, false, COORD_RULE_CENTRED},
        {COORD_RULE_FLTRUST, 3, 0.2, false, COORD_RULE_CLIPPED},
    };
    char reason[COORD_RULE_REASON];
    for (size_t k = 0; k < FL_COUNT(cases); k++) {
        T_EQ(coord_rule_for(cases[k].rule, cases[k].m, cases[k].byzantine, cases[k].root, reason),
             cases[k].used);
        if (cases[k].rule == cases[k].used) {
            T_STR(reason, "");
        } else {
            T_CHECK(strstr(reason, coord_rule_text(cases[k].rule)) != NULL &&
                        strstr(reason, coord_rule_text(cases[k].used)) != NULL,
                    "case %zu: \"%s\" names both", k, reason);
        }
    }
    T_EQ(coord_byzantine(0.2, 15), 3); // not 4, although 0.2 is a little more than a fifth
    T_EQ(coord_byzantine(0.2, 16), 4);
    T_EQ(coord_byzantine(2, 15), 2);
    T_EQ(coord_byzantine(99, 15), 15);
    T_EQ(coord_byzantine(0, 15), 0);
    T_EQ(coord_byzantine((double)NAN, 15), 0);
}

static void test_failures_are_told(void) {
    static double got[COUNT_MAX];
    coord_opinion o[M_MAX];
    coord_robust_result r;
    fl_err err;
    table t;
    table_open(&t, 9, COUNT_MAX);
    for (int rule = 0; rule < COORD_RULE_COUNT; rule++) {
        const coord_robust_opts opts = options((coord_rule)rule, 0.2);
        size_t reads = 0;
        fl_status st;
        do { // the k-th read fails, until there is no k-th
            t.reads_left = reads;
            st = coord_robust_run(&opts, t.voices, 9, COUNT_MAX, read_row, &t, got, o, &r, &err);
            T_CHECK(st == FL_OK || st == FL_EIO, "%d", (int)st);
            reads += 7;
        } while (st != FL_OK);
        T_CHECK(reads > 9, "%s read nothing", coord_rule_text((coord_rule)rule));
        t.reads_left = SIZE_MAX;
#ifdef FL_FAULTS
        unsigned n = 0;
        do {
            fl_fault_arm(++n);
            st = coord_robust_run(&opts, t.voices, 9, COUNT_MAX, read_row, &t, got, o, &r, &err);
            T_EQ(st, fl_fault_fired() ? FL_ENOMEM : FL_OK);
        } while (fl_fault_fired());
        fl_fault_arm(0);
#endif
    }
    const coord_robust_opts opts = options(COORD_RULE_MEDIAN, 0.2);
    T_EQ(coord_robust_run(&opts, t.voices, 0, 5, read_row, &t, got, o, &r, &err), FL_EARG);
    T_EQ(coord_robust_run(&opts, t.voices, 9, 0, read_row, &t, got, o, &r, &err), FL_EARG);
    t.voices[3].weight = (1ull << 40) + 1;
    T_EQ(coord_robust_run(&opts, t.voices, 9, 5, read_row, &t, got, o, &r, &err), FL_EARG);
    free(t.x);
}

// All zeros: nothing to divide by anywhere.
static void test_silence_is_zero(void) {
    static double got[100];
    table t;
    table_open(&t, 9, 100);
    memset(t.x, 0, 9u * 100 * sizeof(*t.x));
    for (int rule = 0; rule < COORD_RULE_COUNT; rule++) {
        coord_robust_opts opts = options((coord_rule)rule, 0.2);
        coord_opinion o[M_MAX];
        coord_robust_result r;
        fl_err err;
        opts.clip = 1;
        memset(got, 0, sizeof(got));
        T_OK(coord_robust_run(&opts, t.voices, 9, 100, read_row, &t, got, o, &r, &err), err);
        for (int i = 0; i < 100; i++) T_CHECK(got[i] == 0.0, "%s", coord_rule_text(opts.rule));
        T_CHECK(o[3].cosine == 0.0 && o[3].norm == 0.0, "nothing to agree with");
    }
    free(t.x);
}

// ---- ballots

enum { ROWS = 24 };

static void make_rows(coord_ballot_row *rows, const table *t) {
    for (uint32_t k = 0; k < ROWS; k++)
        rows[k] = (coord_ballot_row){.node = 1 + (k * 7) % 15,
                                     .base = k / 15,
                                     .weight = t->voices[k].weight,
                                     .clip = k % 5 == 0 ? COORD_ONE / 3 : COORD_ONE,
                                     .source = k};
}

static void test_order_of_arrival_changes_no_bit(void) {
    static double first[COUNT_MAX], again[COUNT_MAX];
    coord_ballot_row rows[ROWS];
    coord_voice voices[ROWS];
    uint32_t starts[ROWS + 1];
    table t;
    table_open(&t, ROWS, COUNT_MAX);
    for (int rule = 0; rule < COORD_RULE_COUNT; rule++) {
        for (int shuffles = 0; shuffles < 6; shuffles++) {
            coord_ballot b = {.rows = rows,
                              .row_count = ROWS,
                              .voices = voices,
                              .first = starts,
                              .read = read_row,
                              .ctx = &t};
            coord_robust_opts opts = options((coord_rule)rule, 0.2);
            coord_opinion o[ROWS];
            coord_robust_result r;
            fl_err err;
            make_rows(rows, &t);
            for (size_t i = ROWS; i > 1 && shuffles > 0; i--) {
                const size_t j = t_rand() % i;
                const coord_ballot_row kept = rows[i - 1];
                rows[i - 1] = rows[j];
                rows[j] = kept;
            }
            coord_ballot_sort(&b);
            T_EQ(b.voice_count, 15);
            T_EQ(coord_ballot_voice(&b, 3), 2);
            T_EQ(coord_ballot_voice(&b, 99), COORD_NO_ROOT);
            opts.clip = 1.5;
            double *out = shuffles == 0 ? first : again;
            memset(out, 0, sizeof(first));
            T_OK(coord_robust_run(&opts, b.voices, b.voice_count, COUNT_MAX, coord_ballot_read, &b,
                                  out, o, &r, &err),
                 err);
            T_CHECK(shuffles == 0 || memcmp(first, again, sizeof(first)) == 0,
                    "%s depends on the order", coord_rule_text(opts.rule));
        }
    }
    free(t.x);
}

// A node that sent twice is one voice: the weighted mean of what it sent, as exact as integers are.
static void test_a_node_is_one_voice(void) {
    coord_ballot_row rows[3] = {{.node = 4, .base = 1, .weight = 3, .clip = COORD_ONE, .source = 0},
                                {.node = 9, .base = 1, .weight = 5, .clip = COORD_ONE, .source = 1},
                                {.node = 4, .base = 0, .weight = 1, .clip = COORD_ONE / 2,
                                 .source = 2}};
    coord_voice voices[3];
    uint32_t starts[4];
    int64_t out[10];
    table t;
    fl_err err;
    table_open(&t, 3, 10);
    coord_ballot b = {.rows = rows,
                      .row_count = 3,
                      .voices = voices,
                      .first = starts,
                      .read = read_row,
                      .ctx = &t};
    coord_ballot_sort(&b);
    T_EQ(b.voice_count, 2);
    T_EQ(voices[0].weight, 4);
    T_EQ(voices[1].weight, 5);
    T_OK(coord_ballot_read(&b, 0, 0, 10, out, &err), err);
    for (int i = 0; i < 10; i++) {
        const double want = ((double)t.x[i] * 3 + (double)t.x[20 + i] / 2) / 4;
        T_NEAR((double)out[i], want, 0.5, "value %d", i); // 2^37: doubles are exact to 2^-15
    }
    T_OK(coord_ballot_read(&b, 1, 0, 10, out, &err), err);
    T_CHECK(memcmp(out, t.x + 10, sizeof(out)) == 0, "a single update is read as it is");
    free(t.x);
}

T_MAIN({"golden_numbers", test_golden_numbers},
       {"each_rule_is_its_definition", test_each_rule_is_its_definition},
       {"ties_go_by_place", test_ties_go_by_place},
       {"the_sort_is_stable_at_every_size", test_the_sort_is_stable_at_every_size},
       {"three_liars_of_fifteen_change_little", test_three_liars_of_fifteen_change_little},
       {"coordinates_stay_among_the_honest", test_coordinates_stay_among_the_honest},
       {"too_few_fall_back_and_say_so", test_too_few_fall_back_and_say_so},
       {"failures_are_told", test_failures_are_told},
       {"silence_is_zero", test_silence_is_zero},
       {"order_of_arrival_changes_no_bit", test_order_of_arrival_changes_no_bit},
       {"a_node_is_one_voice", test_a_node_is_one_voice})
