// Goal: rounding is as good as its contract says, its reported errors are the true ones, and what
// structured pruning removes is repaired as well as least squares can.
// Method: small random matrices and correlated inputs against plain double arithmetic.
#include "kernels/packed.h"
#include "node/luc/prune.h"
#include "tests/check.h"

enum { ROWS_MAX = 80, COLS_MAX = 200, TOKENS = 300 };

static fl_kern kern;
static float w[ROWS_MAX * COLS_MAX], x[TOKENS * COLS_MAX];
static double gram[COLS_MAX * COLS_MAX];

typedef struct rig {
    node_engine engine;
    node_factor factor;
    node_quantise q;
    void *block;
    uint8_t *packed;
} rig;

static rig rig_open(unsigned threads) {
    rig r = {.engine = {&kern, NULL}};
    fl_arena a;
    fl_err err;
    fl_kern_select(&kern, fl_cpu_detect());
    if (threads > 1) T_OK(fl_pool_open(threads, &r.engine.pool, &err), err);
    for (int pass = 0; pass < 2; pass++) {
        const size_t size = pass == 0 ? 0 : (a.peak + 127) / 64 * 64;
        if (pass == 0) fl_arena_init_counting(&a);
        if (pass == 1) fl_arena_init(&a, r.block = aligned_alloc(64, size), size);
        node_factor_bind(&r.factor, COLS_MAX, TOKENS, threads, &a);
        node_quantise_bind(&r.q, ROWS_MAX, COLS_MAX, threads, &a);
        r.packed = fl_arena_alloc(&a, ROWS_MAX * (COLS_MAX + 64) * 2, 1, 64);
    }
    T_NEED(r.packed != NULL, "memory");
    return r;
}

static void rig_close(rig *r) {
    fl_pool_close(r->engine.pool);
    free(r->block);
}

static void random_weights(uint32_t rows, uint32_t cols) {
    for (uint32_t i = 0; i < rows * cols; i++) w[i] = t_randf() * t_randf() + 0.02f;
}

// Inputs of few independent directions, so that columns can stand in for each other.
static void random_inputs(uint32_t cols) {
    static float mix[12 * COLS_MAX];
    for (uint32_t i = 0; i < 12 * cols; i++) mix[i] = t_randf();
    for (uint32_t t = 0; t < TOKENS; t++) {
        float part[12];
        for (int k = 0; k < 12; k++) part[k] = t_randf();
        for (uint32_t c = 0; c < cols; c++) {
            float v = 0.3f * t_randf();
            for (uint32_t k = 0; k < 12; k++) v += part[k] * mix[k * cols + c];
            x[t * cols + c] = v;
        }
    }
}

// The same Gram matrix in plain loops, damping included.
static void plain_gram(uint32_t cols, double damping) {
    double sum = 0;
    for (uint32_t i = 0; i < cols; i++)
        for (uint32_t k = 0; k < cols; k++) {
            double s = 0;
            for (uint32_t t = 0; t < TOKENS; t++)
                s += (double)x[t * cols + i] * (double)x[t * cols + k];
            gram[i * cols + k] = s;
            if (i == k) sum += s;
        }
    for (uint32_t i = 0; i < cols; i++) gram[i * cols + i] += damping * sum / cols;
}

static double plain_error(const float *lost, uint32_t rows, uint32_t cols) {
    double error = 0;
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t i = 0; i < cols; i++) {
            double s = 0;
            for (uint32_t k = 0; k < cols; k++)
                s += gram[i * cols + k] * (double)lost[r * cols + k];
            error += s * (double)lost[r * cols + i];
        }
    return error;
}

static void set_factor(rig *r, uint32_t cols) {
    fl_err err;
    T_OK(node_factor_gram(&r->engine, &r->factor, x, TOKENS, cols, NULL, cols, 0.01, &err), err);
    T_OK(node_factor_cholesky(&r->engine, &r->factor, &err), err);
    node_quantise_set_factor(&r->engine, &r->q, &r->factor);
}

static node_quantise_job job_of(const rig *r, uint32_t rows, uint32_t cols, uint32_t bits) {
    return (node_quantise_job){
        .w = w, .rows = rows, .cols = cols, .total = cols, .bits = bits, .packed = r->packed};
}

static void unpack(const node_quantise_job *j, float *out) {
    const fl_packed p = {j->packed, j->rows, j->cols, j->bits};
    for (uint32_t i = 0; i < j->rows; i++) fl_packed_row(&p, i, out + (size_t)i * j->cols);
}

static void test_factor(void) {
    const uint32_t sizes[] = {1, 5, 63, 64, 65, 130, 200};
    rig r = rig_open(3);
    for (size_t s = 0; s < FL_COUNT(sizes); s++) {
        const uint32_t n = sizes[s];
        random_inputs(n);
        plain_gram(n, 0.01);
        set_factor(&r, n);
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t k = 0; k <= i; k++) {
                double sum = 0;
                for (uint32_t c = 0; c <= k; c++)
                    sum += r.factor.h[i * n + c] * r.factor.h[k * n + c];
                const double scale = sqrt(gram[i * n + i] * gram[k * n + k]);
                T_NEAR(sum, gram[i * n + k], TOKENS * 1.2e-7 * scale, "n %u (%u, %u)", n, i, k);
            }
    }
    x[3] = NAN;
    T_EQ(node_factor_gram(&r.engine, &r.factor, x, TOKENS, 8, NULL, 8, 0.01, NULL), FL_EFORMAT);
    memset(x, 0, sizeof(x));
    T_EQ(node_factor_gram(&r.engine, &r.factor, x, TOKENS, 8, NULL, 8, 0.01, NULL), FL_EFORMAT);
    r.factor.n = 2;
    const double bad[] = {1, 0, 2, 1}; // not positive definite
    memcpy(r.factor.h, bad, sizeof(bad));
    T_EQ(node_factor_cholesky(&r.engine, &r.factor, NULL), FL_EFORMAT);
    rig_close(&r);
}

// Never worse than rounding on the whole range of each group, whose error is known.
static void test_nearest_is_at_least_the_plain_grid(void) {
    static float got[ROWS_MAX * COLS_MAX];
    const uint32_t shapes[][2] = {{1, 1}, {5, 24}, {16, 64}, {17, 65}, {33, 130}, {80, 200}};
    rig r = rig_open(1);
    for (size_t s = 0; s < FL_COUNT(shapes); s++)
        for (uint32_t bits = 2; bits <= 8; bits++) {
            const uint32_t rows = shapes[s][0], cols = shapes[s][1];
            random_weights(rows, cols);
            const node_quantise_job j = job_of(&r, rows, cols, bits);
            node_quantise_nearest(&r.engine, &r.q, &j);
            unpack(&j, got);
            for (uint32_t i = 0; i < rows; i++)
                for (uint32_t c = 0; c < cols; c += 64) {
                    const uint32_t end = c + 64 < cols ? c + 64 : cols;
                    float low = w[i * cols + c], high = low;
                    double error = 0, count = end - c;
                    for (uint32_t k = c; k < end; k++) {
                        const float v = w[i * cols + k];
                        low = fminf(low, v), high = fmaxf(high, v);
                        error += pow((double)v - (double)got[i * cols + k], 2);
                    }
                    // Half a step, and what halves lose of scale and minimum.
                    const double step = (double)(high - low) / ((1 << bits) - 1);
                    const double half = 0.5 * step + 0x1p-10 * (double)(fabsf(high) + fabsf(low));
                    T_CHECK(error <= count * half * half + 1e-12, "%u x %u, %u bits: %g above %g",
                            rows, cols, bits, error, count * half * half);
                }
        }
    rig_close(&r);
}

static void test_reported_errors_are_the_true_ones(void) {
    static float got[ROWS_MAX * COLS_MAX];
    rig r = rig_open(1);
    const uint32_t shapes[][2] = {{7, 40}, {64, 128}, {70, 200}};
    for (size_t s = 0; s < FL_COUNT(shapes); s++)
        for (uint32_t bits = 2; bits <= 6; bits += 2) {
            const uint32_t rows = shapes[s][0], cols = shapes[s][1];
            random_weights(rows, cols);
            random_inputs(cols);
            plain_gram(cols, 0.01);
            set_factor(&r, cols);
            const node_quantise_job j = job_of(&r, rows, cols, bits);
            double reported[2], truth[2];
            for (int fed = 0; fed < 2; fed++) {
                if (fed == 0) node_quantise_nearest(&r.engine, &r.q, &j);
                const double told = fed == 1 ? node_quantise_feedback(&r.engine, &r.q, &j) : 0;
                unpack(&j, got);
                for (uint32_t i = 0; i < rows * cols; i++) got[i] = w[i] - got[i];
                truth[fed] = plain_error(got, rows, cols);
                reported[fed] = node_quantise_error(&r.engine, &r.q, &j);
                T_NEAR(reported[fed], truth[fed], 1e-3 * truth[fed], "error %d", fed);
                if (fed == 1) T_NEAR(told, truth[1], 1e-3 * truth[1], "feedback's own");
            }
            T_CHECK(truth[1] < 0.8 * truth[0], "feedback %g, nearest %g", truth[1], truth[0]);
            node_quantise_best(&r.engine, &r.q, &j);
            T_NEAR(node_quantise_error(&r.engine, &r.q, &j), fmin(reported[0], reported[1]),
                   1e-9 * truth[0], "the better of the two");
        }
    rig_close(&r);
}

static void test_threads_do_not_change_a_bit(void) {
    static uint8_t first[ROWS_MAX * COLS_MAX * 2];
    double error[2] = {0, 0};
    for (int k = 0; k < 2; k++) {
        rig r = rig_open(k == 0 ? 1 : 3);
        size_t size = 0;
        t_seed = 7;
        random_weights(80, 200);
        random_inputs(200);
        set_factor(&r, 200);
        const node_quantise_job j = job_of(&r, 80, 200, 3);
        error[k] = node_quantise_feedback(&r.engine, &r.q, &j);
        T_CHECK(fl_packed_size(80, 200, 3, &size), "size");
        if (k == 0) memcpy(first, r.packed, size);
        T_CHECK(memcmp(first, r.packed, size) == 0, "other bytes with threads");
        rig_close(&r);
    }
    T_CHECK(error[0] == error[1], "%.17g and %.17g", error[0], error[1]);
}

static void test_masked_weights_are_exactly_zero(void) {
    static float got[ROWS_MAX * COLS_MAX], full[ROWS_MAX * COLS_MAX];
    float norm[COLS_MAX];
    const uint32_t rows = 40, cols = 130;
    rig r = rig_open(1);
    random_weights(rows, cols);
    random_inputs(cols);
    set_factor(&r, cols);
    memcpy(full, w, sizeof(full));
    for (uint32_t c = 0; c < cols; c++) norm[c] = 0.5f + fabsf(t_randf());
    node_prune_mask(&r.engine, w, rows, cols, 0.4, norm);
    for (uint32_t i = 0; i < rows; i++) {
        float least_kept = INFINITY, most_gone = 0;
        uint32_t gone = 0;
        for (uint32_t c = 0; c < cols; c++) {
            const float score = fabsf(full[i * cols + c]) * norm[c];
            if (w[i * cols + c] == 0.0f)
                gone++, most_gone = fmaxf(most_gone, score);
            else
                least_kept = fminf(least_kept, score);
        }
        T_EQ(gone, 52);
        T_CHECK(most_gone <= least_kept, "row %u: %g above %g", i, (double)most_gone,
                (double)least_kept);
    }
    for (uint32_t bits = 2; bits <= 8; bits++)
        for (int fed = 0; fed < 2; fed++) {
            node_quantise_job j = job_of(&r, rows, cols, bits);
            j.keep_zeros = true;
            j.full = full;
            if (fed == 1)
                (void)node_quantise_feedback(&r.engine, &r.q, &j);
            else
                node_quantise_nearest(&r.engine, &r.q, &j);
            unpack(&j, got);
            for (uint32_t i = 0; i < rows * cols; i++)
                if (w[i] == 0.0f) T_CHECK(got[i] == 0.0f, "%u bits: %g", bits, (double)got[i]);
        }
    rig_close(&r);
}

// min over Z of |(W_K - Z) on kept columns, W_R on removed|: normal equations, Gaussian
// elimination.
static double least_squares(uint32_t rows, uint32_t kept, uint32_t cols) {
    static double a[COLS_MAX * COLS_MAX];
    static float lost[ROWS_MAX * COLS_MAX];
    for (uint32_t r = 0; r < rows; r++) {
        double b[COLS_MAX];
        for (uint32_t i = 0; i < kept; i++) {
            b[i] = 0;
            for (uint32_t k = kept; k < cols; k++)
                b[i] -= gram[i * cols + k] * (double)w[r * cols + k];
            memcpy(a + i * kept, gram + i * cols, kept * sizeof(*a));
        }
        for (uint32_t i = 0; i < kept; i++)
            for (uint32_t k = i + 1; k < kept; k++) {
                const double f = a[k * kept + i] / a[i * kept + i];
                for (uint32_t c = i; c < kept; c++) a[k * kept + c] -= f * a[i * kept + c];
                b[k] -= f * b[i];
            }
        for (uint32_t i = kept; i-- > 0;) {
            for (uint32_t c = i + 1; c < kept; c++) b[i] -= a[i * kept + c] * b[c];
            b[i] /= a[i * kept + i];
        }
        for (uint32_t c = 0; c < cols; c++)
            lost[r * cols + c] = c < kept ? (float)b[c] : w[r * cols + c];
    }
    return plain_error(lost, rows, cols);
}

static void test_removed_columns_are_made_good(void) {
    static float got[ROWS_MAX * COLS_MAX], lost[ROWS_MAX * COLS_MAX];
    double cost[COLS_MAX];
    const uint32_t rows = 24, cols = 80;
    rig r = rig_open(1);
    random_weights(rows, cols);
    random_inputs(cols);
    plain_gram(cols, 0.01);
    set_factor(&r, cols);
    node_quantise_removal(&r.engine, &r.q, w, rows, cols, cost);
    for (uint32_t kept = 16; kept < cols; kept += 16) {
        double sum = 0;
        for (uint32_t c = kept; c < cols; c++) sum += cost[c];
        const double best = least_squares(rows, kept, cols);
        T_NEAR(sum, best, 1e-3 * best, "predicted cost of keeping %u", kept);
        node_quantise_job j = job_of(&r, rows, kept, 8);
        j.total = cols;
        const double rounding = node_quantise_feedback(&r.engine, &r.q, &j);
        unpack(&j, got);
        for (uint32_t i = 0; i < rows; i++)
            for (uint32_t c = 0; c < cols; c++)
                lost[i * cols + c] = w[i * cols + c] - (c < kept ? got[i * kept + c] : 0.0f);
        T_NEAR(plain_error(lost, rows, cols), best + rounding, 2e-3 * best, "kept %u", kept);
        T_CHECK(rounding < 0.05 * best, "8 bits lose %g of %g", rounding, best);
    }
    rig_close(&r);
}

static void test_order(void) {
    const float row[] = {1, 5, 2, 0.5f, 3, 4};
    const float in[] = {1, 1, 1, 1, 1, 1};
    uint32_t order[6];
    double score[6];
    node_prune_order(row, 1, 6, 1, in, 1, score, order);
    const uint32_t want[] = {1, 5, 4, 2, 0, 3};
    for (int i = 0; i < 6; i++) T_EQ(order[i], want[i]);
    node_prune_order(row, 1, 6, 2, in, 1, score, order); // blocks 26, 4.25, 25
    const uint32_t blocks[] = {0, 1, 4, 5, 2, 3};
    for (int i = 0; i < 6; i++) T_EQ(order[i], blocks[i]);
}

T_MAIN({"factor", test_factor},
       {"nearest_is_at_least_the_plain_grid", test_nearest_is_at_least_the_plain_grid},
       {"reported_errors_are_the_true_ones", test_reported_errors_are_the_true_ones},
       {"threads_do_not_change_a_bit", test_threads_do_not_change_a_bit},
       {"masked_weights_are_exactly_zero", test_masked_weights_are_exactly_zero},
       {"removed_columns_are_made_good", test_removed_columns_are_made_good}, {"order", test_order})
