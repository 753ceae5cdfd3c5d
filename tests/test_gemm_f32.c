// Goal: every variant of the float products obeys the bound and the promises of bits in its header
// and touches nothing outside its rows.
// Method: compare with sums in double over shapes around every block size, with row distances that
// are longer than rows and gaps that must stay; last rows end at a guard page; then the same
// product cut into pieces must give the same bits.
#include "kernels/dispatch.h"
#include "tests/check.h"

#include <float.h>

#define EPS ((double)FLT_EPSILON)

#define EACH(v)                                                                                    \
    for (const fl_gemm_f32_variant *v = fl_gemm_f32_variants; v->tag != NULL; v++)                 \
        if (!runs(v)) {                                                                            \
        } else

static bool runs(const fl_gemm_f32_variant *v) {
    if ((v->need & fl_cpu_detect()) == v->need) return true;
    T_SKIP_PART("gemm_f32 %s: not on this CPU", v->tag);
    return false;
}

// rows x cols with a row distance of ld, the last row ending at a guard page. Gaps hold GAP.
#define GAP 12345.0f
typedef struct mat {
    size_t rows, cols, ld, count;
    float *at;
} mat;

static mat mat_new(size_t rows, size_t cols, size_t gap) {
    mat m = {rows, cols, cols + gap, rows == 0 ? 0 : (rows - 1) * (cols + gap) + cols, NULL};
    m.at = t_guarded(m.count * sizeof(float));
    for (size_t i = 0; i < m.count; i++) m.at[i] = i % m.ld < cols ? t_randf() : GAP;
    return m;
}

static mat mat_copy(const mat *from) {
    mat m = *from;
    m.at = t_guarded(m.count * sizeof(float));
    memcpy(m.at, from->at, m.count * sizeof(float));
    return m;
}

static void mat_free(mat *m) {
    t_guarded_free(m->at, m->count * sizeof(float));
}

static double el(const mat *m, size_t r, size_t c) {
    return (double)m->at[r * m->ld + c];
}

static bool same(const mat *a, const mat *b) {
    return memcmp(a->at, b->at, a->count * sizeof(float)) == 0;
}

static bool gaps_are_whole(const mat *m) {
    for (size_t i = 0; i < m->count; i++)
        if (i % m->ld >= m->cols && m->at[i] != GAP) return false;
    return true;
}

typedef struct shape {
    size_t tokens, n, k, gap;
} shape;

static const shape shapes[] = {
    {1, 1, 1, 0},    {1, 1, 7, 1},    {2, 3, 8, 0},    {3, 2, 9, 2},   {4, 3, 16, 0},
    {5, 4, 17, 3},   {6, 5, 15, 0},   {7, 7, 24, 1},   {8, 8, 25, 0},  {9, 13, 31, 5},
    {13, 16, 33, 0}, {12, 64, 64, 0}, {5, 63, 100, 1}, {3, 64, 47, 0}, {17, 12, 192, 7},
    {4, 6, 576, 0},  {65, 70, 50, 1}, {0, 3, 4, 0},    {3, 0, 4, 0},   {3, 4, 0, 1},
};

static void check_nt(const fl_gemm_f32_variant *v, const shape *s) {
    mat x = mat_new(s->tokens, s->k, s->gap), w = mat_new(s->n, s->k, s->gap);
    mat y = mat_new(s->tokens, s->n, s->gap);
    v->nt(s->tokens, s->n, s->k, x.at, x.ld, w.at, w.ld, y.at, y.ld);
    for (size_t t = 0; t < s->tokens; t++) {
        for (size_t j = 0; j < s->n; j++) {
            double want = 0, mag = 0;
            for (size_t i = 0; i < s->k; i++) {
                want += el(&x, t, i) * el(&w, j, i);
                mag += fabs(el(&x, t, i) * el(&w, j, i));
            }
            T_NEAR(el(&y, t, j), want, ((double)s->k + 8) * EPS * mag, "%s t=%zu n=%zu k=%zu",
                   v->tag, s->tokens, s->n, s->k);
        }
    }
    T_CHECK(gaps_are_whole(&y), "%s: wrote between rows", v->tag);
    // One element at a time: the bits may not depend on the neighbours.
    mat one = mat_copy(&y);
    for (size_t t = 0; t < s->tokens; t++)
        for (size_t j = 0; j < s->n; j++)
            v->nt(1, 1, s->k, x.at + t * x.ld, x.ld, w.at + j * w.ld, w.ld, one.at + t * one.ld + j,
                  one.ld);
    T_CHECK(same(&one, &y), "%s t=%zu n=%zu k=%zu: bits depend on the place", v->tag, s->tokens,
            s->n, s->k);
    mat_free(&x), mat_free(&w), mat_free(&y), mat_free(&one);
}

static void check_nn(const fl_gemm_f32_variant *v, const shape *s, bool accumulate) {
    mat dy = mat_new(s->tokens, s->n, s->gap), w = mat_new(s->n, s->k, s->gap);
    mat dx = mat_new(s->tokens, s->k, s->gap), old = mat_copy(&dx), cut = mat_copy(&dx);
    v->nn(s->tokens, s->n, s->k, dy.at, dy.ld, w.at, w.ld, dx.at, dx.ld, accumulate);
    for (size_t t = 0; t < s->tokens; t++) {
        for (size_t i = 0; i < s->k; i++) {
            double want = accumulate ? el(&old, t, i) : 0, mag = fabs(want);
            for (size_t j = 0; j < s->n; j++) {
                want += el(&dy, t, j) * el(&w, j, i);
                mag += fabs(el(&dy, t, j) * el(&w, j, i));
            }
            T_NEAR(el(&dx, t, i), want, ((double)s->n + 8) * EPS * mag, "%s t=%zu n=%zu k=%zu",
                   v->tag, s->tokens, s->n, s->k);
        }
    }
    T_CHECK(gaps_are_whole(&dx), "%s: wrote between rows", v->tag);
    // Token by token, columns in two parts, rows of w in two calls.
    const size_t split = s->n / 3, left = s->k / 2;
    for (size_t t = 0; t < s->tokens; t++) {
        const float *g = dy.at + t * dy.ld;
        for (int part = 0; part < 2; part++) {
            const size_t from = part == 0 ? 0 : left, cols = part == 0 ? left : s->k - left;
            float *to = cut.at + t * cut.ld + from;
            v->nn(1, split, cols, g, dy.ld, w.at + from, w.ld, to, cut.ld, accumulate);
            v->nn(1, s->n - split, cols, g + split, dy.ld, w.at + split * w.ld + from, w.ld, to,
                  cut.ld, true);
        }
    }
    T_CHECK(same(&cut, &dx), "%s t=%zu n=%zu k=%zu: bits depend on the cut", v->tag, s->tokens,
            s->n, s->k);
    mat_free(&dy), mat_free(&w), mat_free(&dx), mat_free(&old), mat_free(&cut);
}

static void check_tn(const fl_gemm_f32_variant *v, const shape *s) {
    const size_t rank = s->k > FL_RANK_MAX ? FL_RANK_MAX : s->k;
    mat dy = mat_new(s->tokens, s->n, s->gap), u = mat_new(s->tokens, rank, s->gap);
    mat db = mat_new(s->n, rank, s->gap), old = mat_copy(&db), cut = mat_copy(&db);
    v->tn(s->tokens, s->n, rank, dy.at, dy.ld, u.at, u.ld, db.at, db.ld);
    for (size_t j = 0; j < s->n; j++) {
        for (size_t r = 0; r < rank; r++) {
            double want = el(&old, j, r), mag = fabs(want);
            for (size_t t = 0; t < s->tokens; t++) {
                want += el(&dy, t, j) * el(&u, t, r);
                mag += fabs(el(&dy, t, j) * el(&u, t, r));
            }
            T_NEAR(el(&db, j, r), want, ((double)s->tokens + 8) * EPS * mag, "%s n=%zu rank=%zu",
                   v->tag, s->n, rank);
        }
    }
    T_CHECK(gaps_are_whole(&db), "%s: wrote between rows", v->tag);
    for (size_t t = 0; t < s->tokens; t++) // tokens one by one, outputs in two parts
        for (size_t j = 0; j < s->n; j += s->n / 2 + 1)
            v->tn(1, s->n - j < s->n / 2 + 1 ? s->n - j : s->n / 2 + 1, rank, dy.at + t * dy.ld + j,
                  dy.ld, u.at + t * u.ld, u.ld, cut.at + j * cut.ld, cut.ld);
    T_CHECK(same(&cut, &db), "%s n=%zu rank=%zu: bits depend on the cut", v->tag, s->n, rank);
    mat_free(&dy), mat_free(&u), mat_free(&db), mat_free(&old), mat_free(&cut);
}

static void check_rank_up(const fl_gemm_f32_variant *v, const shape *s) {
    const size_t rank = s->k > FL_RANK_MAX ? FL_RANK_MAX : s->k;
    const float scale = 1.75f;
    mat u = mat_new(s->tokens, rank, s->gap), b = mat_new(s->n, rank, s->gap);
    mat y = mat_new(s->tokens, s->n, s->gap), old = mat_copy(&y), cut = mat_copy(&y);
    v->rank_up(s->tokens, s->n, rank, scale, u.at, u.ld, b.at, b.ld, y.at, y.ld);
    for (size_t t = 0; t < s->tokens; t++) {
        for (size_t j = 0; j < s->n; j++) {
            double want = el(&old, t, j), mag = fabs(want);
            for (size_t r = 0; r < rank; r++) {
                const double term = (double)scale * el(&u, t, r) * el(&b, j, r);
                want += term;
                mag += fabs(term);
            }
            T_NEAR(el(&y, t, j), want, ((double)rank + 8) * EPS * mag, "%s n=%zu rank=%zu", v->tag,
                   s->n, rank);
        }
    }
    T_CHECK(gaps_are_whole(&y), "%s: wrote between rows", v->tag);
    for (size_t t = 0; t < s->tokens; t++)
        for (size_t j = 0; j < s->n; j++)
            v->rank_up(1, 1, rank, scale, u.at + t * u.ld, u.ld, b.at + j * b.ld, b.ld,
                       cut.at + t * cut.ld + j, cut.ld);
    T_CHECK(same(&cut, &y), "%s n=%zu rank=%zu: bits depend on the place", v->tag, s->n, rank);
    mat_free(&u), mat_free(&b), mat_free(&y), mat_free(&old), mat_free(&cut);
}

static void test_nt(void) {
    EACH(v) {
        for (size_t i = 0; i < FL_COUNT(shapes); i++) check_nt(v, &shapes[i]);
        for (size_t k = 0; k <= 33; k++) check_nt(v, &(shape){3, 5, k, k % 2});
    }
}

static void test_nn(void) {
    EACH(v) {
        for (size_t i = 0; i < FL_COUNT(shapes); i++) {
            check_nn(v, &shapes[i], false);
            check_nn(v, &shapes[i], true);
        }
        for (size_t k = 0; k <= 33; k++) check_nn(v, &(shape){5, 7, k, k % 2}, k % 3 == 0);
    }
}

static void test_tn(void) {
    EACH(v) {
        for (size_t i = 0; i < FL_COUNT(shapes); i++) check_tn(v, &shapes[i]);
        for (size_t k = 0; k <= 33; k++) check_tn(v, &(shape){6, 11, k, k % 2});
    }
}

static void test_rank_up(void) {
    EACH(v) {
        for (size_t i = 0; i < FL_COUNT(shapes); i++) check_rank_up(v, &shapes[i]);
        for (size_t k = 0; k <= 33; k++) check_rank_up(v, &(shape){6, 11, k, k % 2});
    }
}

static void test_nan_is_not_lost(void) {
    EACH(v) {
        for (size_t at = 0; at < 33; at++) {
            float x[33] = {0}, w[33] = {0}, y = 0, dx[33] = {0}, db[33] = {0}, zero = 0;
            x[at] = NAN;
            v->nt(1, 1, 33, x, 33, w, 33, &y, 1);
            T_CHECK(isnan(y), "%s nt at=%zu", v->tag, at);
            v->nn(1, 1, 33, &zero, 1, x, 33, dx, 33, false);
            T_CHECK(isnan(dx[at]), "%s nn at=%zu", v->tag, at);
            v->tn(1, 1, 33, &zero, 1, x, 33, db, 33);
            T_CHECK(isnan(db[at]), "%s tn at=%zu", v->tag, at);
            y = 0;
            v->rank_up(1, 1, 33, 1.0f, w, 33, x, 33, &y, 1);
            T_CHECK(isnan(y), "%s rank_up at=%zu", v->tag, at);
        }
    }
}

static void test_select_zero_is_reference(void) {
    fl_kern k;
    fl_kern_select(&k, 0);
    T_STR(k.gemm_f32->tag, "ref");
    T_STR(k.attention->tag, "ref");
    T_STR(k.rmsnorm->tag, "ref");
    T_STR(k.swiglu->tag, "ref");
    T_STR(k.xent->tag, "ref");
    T_STR(k.ggml->tag, "ref");
}

T_MAIN({"nt", test_nt}, {"nn", test_nn}, {"tn", test_tn}, {"rank_up", test_rank_up},
       {"nan_is_not_lost", test_nan_is_not_lost},
       {"select_zero_is_reference", test_select_zero_is_reference})
