// Goal: quantise_x8 and gemm_packed give the same bits in every variant, for any tokens, rows and
// cuts; gemm_packed_dx obeys its error bound; nobody touches memory that is not theirs.
// Method: walk the variant lists over odd sizes; every buffer ends at a guard page and outputs have
// a margin that must stay as it was; the definition recomputed here in double.
#include "kernels/dispatch.h"
#include "tests/check.h"

#include <float.h>

enum { MARGIN = 3 }; // floats between the rows of an output
static const float untouched = -12345.5f;

// A random matrix whose bytes end at a guard page.
typedef struct matrix {
    fl_packed w;
    uint8_t *data;
    size_t size;
} matrix;

static matrix matrix_make(uint32_t rows, uint32_t cols, uint32_t bits) {
    matrix m = {.w = {.rows = rows, .cols = cols, .bits = bits}};
    T_NEED(fl_packed_size(rows, cols, bits, &m.size), "size");
    m.w.data = m.data = t_guarded(m.size);
    const size_t groups = (cols + 63) / 64, tile_size = fl_packed_tile_size(bits);
    const bool extreme = t_rand() % 4 == 0; // all codes at their maximum: the sums' worst case
    for (size_t n = 0; n < m.size / tile_size; n++) {
        uint8_t codes[16 * 64] = {0};
        uint16_t scale[16] = {0}, minimum[16] = {0};
        for (uint32_t r = 0; r < 16 && n / groups * 16 + r < rows; r++) {
            scale[r] = fl_f16_from_f32(t_randf() * 0.1f);
            minimum[r] = fl_f16_from_f32(t_randf());
            for (uint32_t k = 0; k < 64 && n % groups * 64 + k < cols; k++) {
                codes[r * 64 + k] = (uint8_t)((1u << bits) - 1);
                if (!extreme) codes[r * 64 + k] = (uint8_t)(t_rand() >> (64 - bits));
            }
        }
        fl_packed_tile_write(m.data + n * tile_size, bits, codes, scale, minimum);
    }
    return m;
}

static void matrix_free(matrix *m) {
    t_guarded_free(m->data, m->size);
}

// A guarded view; the guard page begins where the sums end.
typedef struct rows8 {
    fl_x8 x;
    void *memory;
    size_t size;
} rows8;

static rows8 rows8_make(uint32_t tokens, uint32_t cols) {
    rows8 q = {0};
    T_NEED(fl_x8_size(tokens, cols, &q.size), "size");
    q.memory = t_guarded(q.size);
    memset(q.memory, 0x5a, q.size);
    q.x = fl_x8_bind(q.memory, tokens, cols);
    return q;
}

static void rows8_free(rows8 *q) {
    t_guarded_free(q->memory, q->size);
}

// A float array that ends at a guard page.
static float *floats(size_t count, float value) {
    float *p = t_guarded(count * sizeof(*p));
    for (size_t i = 0; i < count; i++) p[i] = value;
    return p;
}

static void floats_free(float *p, size_t count) {
    t_guarded_free(p, count * sizeof(*p));
}

static float *random_floats(size_t count) {
    float *p = floats(count, 0);
    const float size = ldexpf(1.0f, (int)(t_rand() % 9) - 4);
    for (size_t i = 0; i < count; i++) p[i] = t_randf() * size;
    return p;
}

static bool runs_here(uint32_t need, const char *kernel, const char *tag) {
    if ((need & fl_cpu_detect()) == need) return true;
    T_SKIP_PART("%s %s: not on this CPU", kernel, tag);
    return false;
}

static const uint32_t odd_cols[] = {1,  2,  3,  4,   5,   7,   8,   9,   31,  32,  33,
                                    63, 64, 65, 127, 128, 129, 172, 191, 192, 200, 576};

static void test_quantise_is_as_defined(void) {
    for (size_t c = 0; c < sizeof(odd_cols) / sizeof(odd_cols[0]); c++) {
        const uint32_t cols = odd_cols[c];
        float *x = random_floats(cols);
        rows8 q = rows8_make(2, cols);
        fl_quantise_x8_ref(x, cols, &q.x, 1);
        for (uint32_t g = 0; g < q.x.groups; g++) {
            const size_t at = q.x.groups + g;
            float max = 0;
            for (uint32_t k = g * 64; k < cols && k < g * 64 + 64; k++)
                max = fmaxf(max, fabsf(x[k]));
            T_CHECK(q.x.scales[at] == max / 127, "cols=%u", cols);
            int sum = 0;
            for (uint32_t k = 0; k < 64; k++) {
                const int code = q.x.codes[at * 64 + k];
                const double want = g * 64 + k < cols ? (double)x[g * 64 + k] / max * 127 : 0;
                T_NEAR(code, want, 0.5 + 127 * 2 * FLT_EPSILON, "cols=%u g=%u k=%u", cols, g, k);
                sum += code;
            }
            T_CHECK(q.x.sums[at] == q.x.scales[at] * (float)sum, "cols=%u", cols);
        }
        for (size_t i = 0; i < q.x.groups * 64; i++)
            T_EQ(q.x.codes[i], 0x5a); // token 0 is not ours
        rows8_free(&q);
        floats_free(x, cols);
    }
}

static void check_quantise_equal(const float *x, uint32_t cols, const char *what) {
    rows8 want = rows8_make(3, cols), got = rows8_make(3, cols);
    fl_quantise_x8_ref(x, cols, &want.x, 1);
    for (const fl_quantise_x8_variant *v = fl_quantise_x8_variants; v->fn != NULL; v++) {
        if ((v->need & fl_cpu_detect()) != v->need) continue;
        memset(got.memory, 0x5a, got.size);
        v->fn(x, cols, &got.x, 1);
        T_CHECK(memcmp(got.memory, want.memory, want.size) == 0, "%s %s cols=%u", v->tag, what,
                cols);
    }
    rows8_free(&want);
    rows8_free(&got);
}

static void test_quantise_variants_are_equal(void) {
    for (const fl_quantise_x8_variant *v = fl_quantise_x8_variants; v->fn != NULL; v++)
        (void)runs_here(v->need, "quantise_x8", v->tag);
    for (uint32_t cols = 1; cols <= 200; cols++) {
        float *x = random_floats(cols);
        check_quantise_equal(x, cols, "random");
        for (uint32_t k = 0; k < cols; k++) x[k] = 0.5f * (float)(int)(t_rand() % 255) - 63.5f;
        x[t_rand() % cols] = 63.5f; // the inverse is 2: every odd half is a tie
        check_quantise_equal(x, cols, "ties");
        for (uint32_t k = 0; k < cols; k++) x[k] = t_rand() % 2 ? 0x1p-99f * t_randf() : 0x1p-149f;
        check_quantise_equal(x, cols, "tiny");
        for (uint32_t k = 0; k < cols; k++) x[k] = FLT_MAX * t_randf();
        x[t_rand() % cols] = -FLT_MAX;
        check_quantise_equal(x, cols, "huge");
        x[t_rand() % cols] = t_rand() % 2 ? NAN : -INFINITY;
        check_quantise_equal(x, cols, "not finite");
        for (uint32_t k = 0; k < cols; k++) x[k] = k % 2 ? 0.0f : -0.0f;
        check_quantise_equal(x, cols, "zero");
        floats_free(x, cols);
    }
}

static void test_quantise_shows_what_is_not_finite(void) {
    float x[129] = {0};
    x[3] = 1, x[70] = NAN, x[71] = 1, x[128] = INFINITY;
    rows8 q = rows8_make(1, 129);
    fl_quantise_x8_ref(x, 129, &q.x, 0);
    T_CHECK(q.x.scales[0] == 1.0f / 127 && q.x.codes[3] == 127, "the first group is sound");
    T_CHECK(isnan(q.x.scales[1]) && isnan(q.x.sums[1]), "NaN");
    T_CHECK(isnan(q.x.scales[2]) && isnan(q.x.sums[2]), "infinity");
    for (size_t i = 64; i < 192; i++) T_EQ(q.x.codes[i], 0);
    matrix m = matrix_make(16, 129, 4);
    float y[16];
    for (const fl_gemm_packed_variant *v = fl_gemm_packed_variants; v->fn != NULL; v++) {
        if ((v->need & fl_cpu_detect()) != v->need) continue;
        v->fn(&m.w, 0, 16, &q.x, y, 16);
        for (int r = 0; r < 16; r++) T_CHECK(isnan(y[r]), "%s r=%d", v->tag, r);
    }
    rows8_free(&q);
    matrix_free(&m);
}

static void test_x8_size_is_checked(void) {
    size_t size = 7;
    T_CHECK(fl_x8_size(1, 1, &size), "one");
    T_EQ(size, 64 + 64 + 64);
    T_CHECK(fl_x8_size(3, 576, &size), "three rows");
    T_EQ(size, 3 * 576 + 2 * 128);
    T_CHECK(fl_x8_size(UINT32_MAX, 64, &size), "fits 64 bits");
    // The codes alone fit in 64 bits, with the scales they do not.
    size = 7;
    T_CHECK(!fl_x8_size(UINT32_MAX, UINT32_MAX - 63, &size), "must not wrap");
    T_EQ(size, 7);
    rows8 q = rows8_make(5, 130);
    const fl_x8 s = fl_x8_slice(&q.x, 2, 4);
    T_EQ(s.tokens, 2);
    T_EQ(s.codes - q.x.codes, 2 * 192);
    T_EQ(s.scales - q.x.scales, 2 * 3);
    T_EQ(s.sums - q.x.sums, 2 * 3);
    rows8_free(&q);
}

static void fill_rows8(rows8 *q, uint32_t cols) {
    for (uint32_t t = 0; t < q->x.tokens; t++) {
        float *x = random_floats(cols);
        if (t_rand() % 4 == 0) { // all codes 127 or -127: the sums' worst case
            for (uint32_t k = 0; k < cols; k++) x[k] = t_rand() % 2 && t % 2 ? -1.0f : 1.0f;
        }
        fl_quantise_x8_ref(x, cols, &q->x, t);
        floats_free(x, cols);
    }
}

// The definition once more, in double, from the floats that the codes stand for.
static void check_against_double(const matrix *m, const rows8 *q, const float *y, size_t stride) {
    float *row = floats(m->w.cols, 0);
    const double largest = 0.1 * (1u << m->w.bits) + 1; // scale * code and minimum together
    for (uint32_t r = 0; r < m->w.rows; r++) {
        fl_packed_row(&m->w, r, row);
        for (uint32_t t = 0; t < q->x.tokens; t++) {
            double want = 0, size = 0;
            for (uint32_t k = 0; k < m->w.cols; k++) {
                const size_t g = (size_t)t * q->x.groups + k / 64;
                const double x = (double)q->x.scales[g] * q->x.codes[g * 64 + k % 64];
                want += x * (double)row[k];
                size += fabs(x) * largest;
            }
            T_NEAR(y[t * stride + r], want, (2.0 * q->x.groups + 4) * (double)FLT_EPSILON * size,
                   "rows=%u cols=%u r=%u t=%u", m->w.rows, m->w.cols, r, t);
        }
    }
    floats_free(row, m->w.cols);
}

static void check_gemm(uint32_t rows, uint32_t cols, uint32_t bits, uint32_t tokens) {
    matrix m = matrix_make(rows, cols, bits);
    rows8 q = rows8_make(tokens, cols);
    fill_rows8(&q, cols);
    const size_t stride = rows + MARGIN, count = (tokens - 1) * stride + rows;
    float *want = floats(count, untouched), *got = floats(count, untouched);
    fl_gemm_packed_ref(&m.w, 0, rows, &q.x, want, stride);
    check_against_double(&m, &q, want, stride);
    for (const fl_gemm_packed_variant *v = fl_gemm_packed_variants; v->fn != NULL; v++) {
        if ((v->need & fl_cpu_detect()) != v->need) continue;
        for (size_t i = 0; i < count; i++) got[i] = untouched;
        v->fn(&m.w, 0, rows, &q.x, got, stride);
        T_CHECK(memcmp(got, want, count * sizeof(*got)) == 0,
                "%s rows=%u cols=%u bits=%u tokens=%u", v->tag, rows, cols, bits, tokens);
        // The same in two row ranges and two token slices.
        for (size_t i = 0; i < count; i++) got[i] = untouched;
        const uint32_t cut = rows / 32 * 16, cut_t = tokens / 2;
        const fl_x8 part[2] = {fl_x8_slice(&q.x, 0, cut_t), fl_x8_slice(&q.x, cut_t, tokens)};
        for (int n = cut_t == 0; n < 2; n++) {
            float *y = got + (n == 0 ? 0 : cut_t * stride);
            v->fn(&m.w, 0, cut, &part[n], y, stride);
            v->fn(&m.w, cut, rows, &part[n], y + cut, stride);
        }
        T_CHECK(memcmp(got, want, count * sizeof(*got)) == 0,
                "%s in pieces rows=%u cols=%u bits=%u tokens=%u", v->tag, rows, cols, bits, tokens);
    }
    floats_free(want, count);
    floats_free(got, count);
    rows8_free(&q);
    matrix_free(&m);
}

static void test_gemm_variants_are_equal(void) {
    for (const fl_gemm_packed_variant *v = fl_gemm_packed_variants; v->fn != NULL; v++)
        (void)runs_here(v->need, "gemm_packed", v->tag);
    static const uint32_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 67};
    for (uint32_t bits = 2; bits <= 8; bits++) {
        for (size_t i = 0; i < sizeof(tokens) / sizeof(tokens[0]); i++) {
            check_gemm(33, 172, bits, tokens[i]);
            check_gemm(17, 64, bits, tokens[i]);
        }
        check_gemm(48, 576, bits, 1);
        check_gemm(20, 576, bits, 5);
    }
}

// The hash of products whose inputs are integer code: equal on every machine, compiler and variant.
static void test_gemm_bits_on_every_machine(void) {
    enum { ROWS = 19, COLS = 200, TOKENS = 5 };
    static const uint32_t want[] = {0xbadc327f, 0x4ea73fae, 0x71605106, 0x8aea854c,
                                    0x74dbb4f4, 0x674770aa, 0xc89f2f0a};
    t_seed = 1; // the hashes belong to these inputs
    for (uint32_t bits = 2; bits <= 8; bits++) {
        matrix m = matrix_make(ROWS, COLS, bits);
        rows8 q = rows8_make(TOKENS, COLS);
        for (uint32_t t = 0; t < TOKENS; t++) {
            float x[COLS];
            for (uint32_t k = 0; k < COLS; k++) x[k] = (float)(t_rand() % 2001) * 0x1p-7f - 7.25f;
            fl_quantise_x8_ref(x, COLS, &q.x, t);
        }
        for (const fl_gemm_packed_variant *v = fl_gemm_packed_variants; v->fn != NULL; v++) {
            if ((v->need & fl_cpu_detect()) != v->need) continue;
            float y[TOKENS * ROWS];
            v->fn(&m.w, 0, ROWS, &q.x, y, ROWS);
            uint32_t hash = 2166136261u;
            for (size_t i = 0; i < TOKENS * ROWS; i++) {
                uint32_t u;
                memcpy(&u, y + i, sizeof(u));
                hash = (hash ^ u) * 16777619u;
            }
            T_CHECK(hash == want[bits - 2], "%s bits=%u hash=0x%08x", v->tag, bits, hash);
        }
        rows8_free(&q);
        matrix_free(&m);
    }
}

static void test_gemm_odd_sizes(void) {
    for (uint32_t rows = 1; rows <= 33; rows++) check_gemm(rows, 65, 2 + rows % 7, 1 + rows % 5);
    for (uint32_t cols = 1; cols <= 200; cols += cols < 70 ? 1 : 13)
        check_gemm(18, cols, 2 + cols % 7, 1 + cols % 6);
}

// dx in double, and the sum of magnitudes that its error bound scales with.
static void dx_double(const matrix *m, const fl_packed_range *range, const float *dy, double *want,
                      double *size) {
    float *row = floats(m->w.cols, 0);
    for (uint32_t r = range->row_begin; r < range->row_end; r++) {
        fl_packed_row(&m->w, r, row);
        for (uint32_t k = range->col_begin; k < range->col_end; k++) {
            const double p = (double)dy[r - range->row_begin] * row[k];
            want[k - range->col_begin] += p;
            size[k - range->col_begin] += fabs(p);
        }
    }
    floats_free(row, m->w.cols);
}

typedef struct dx_case {
    matrix m;
    fl_packed_range range;
    uint32_t tokens;
    size_t dy_stride, dx_stride, dy_count, dx_count;
    float *dy, *old, *dx;
} dx_case;

static dx_case dx_make(uint32_t rows, uint32_t cols, uint32_t bits, uint32_t tokens) {
    dx_case c = {.m = matrix_make(rows, cols, bits), .range = {0, rows, 0, cols}, .tokens = tokens};
    c.dy_stride = rows + MARGIN, c.dx_stride = cols + MARGIN;
    c.dy_count = (tokens - 1) * c.dy_stride + rows;
    c.dx_count = (tokens - 1) * c.dx_stride + cols;
    c.dy = random_floats(c.dy_count), c.old = random_floats(c.dx_count);
    for (uint32_t t = 0; t + 1 < tokens; t++) {
        for (size_t k = cols; k < c.dx_stride; k++) c.old[t * c.dx_stride + k] = untouched;
        for (size_t r = rows; r < c.dy_stride; r++) c.dy[t * c.dy_stride + r] = NAN; // never read
    }
    // Sometimes sparse, as the head's gradient is: rows that no token, some or all have.
    const bool sparse = t_rand() % 3 == 0;
    for (uint32_t r = 0; sparse && r < rows; r += 1 + (uint32_t)(t_rand() % 3))
        for (uint32_t t = 0; t < tokens; t++)
            if (t_rand() % 8 != 0) c.dy[t * c.dy_stride + r] = 0;
    c.dx = floats(c.dx_count, 0);
    return c;
}

static void dx_free(dx_case *c) {
    floats_free(c->dy, c->dy_count);
    floats_free(c->old, c->dx_count);
    floats_free(c->dx, c->dx_count);
    matrix_free(&c->m);
}

static void dx_check_bound(const dx_case *c, const fl_gemm_packed_dx_variant *v, bool accumulate) {
    const size_t cols = c->m.w.cols;
    double *want = calloc(cols, sizeof(*want)), *size = calloc(cols, sizeof(*size));
    T_NEED(want != NULL && size != NULL, "memory");
    for (uint32_t t = 0; t < c->tokens; t++) {
        memset(want, 0, cols * sizeof(*want));
        memset(size, 0, cols * sizeof(*size));
        dx_double(&c->m, &c->range, c->dy + t * c->dy_stride, want, size);
        for (size_t k = 0; k < cols; k++) {
            const double n = c->m.w.rows;
            double old = accumulate ? (double)c->old[t * c->dx_stride + k] : 0;
            T_NEAR(c->dx[t * c->dx_stride + k], want[k] + old,
                   FLT_EPSILON * ((n + 2) * size[k] + n * fabs(old)) +
                       (double)v->rounding * size[k],
                   "%s rows=%u cols=%zu bits=%u t=%u k=%zu", v->tag, c->m.w.rows, cols,
                   c->m.w.bits, t, k);
        }
        for (size_t k = cols; t + 1 < c->tokens && k < c->dx_stride; k++)
            T_CHECK(c->dx[t * c->dx_stride + k] == untouched, "%s wrote a margin", v->tag);
    }
    free(want);
    free(size);
}

// The whole in pieces: columns cut in two, rows cut in two with the second added, each token alone.
static void dx_check_pieces(dx_case *c, const fl_gemm_packed_dx_variant *v, void *scratch) {
    float *whole = floats(c->dx_count, 0);
    memcpy(whole, c->dx, c->dx_count * sizeof(*whole));
    memcpy(c->dx, c->old, c->dx_count * sizeof(*c->dx));
    const uint32_t row = c->range.row_end / 32 * 16, col = c->range.col_end / 128 * 64;
    for (uint32_t t = 0; t < c->tokens; t++) {
        const float *dy = c->dy + t * c->dy_stride;
        float *dx = c->dx + t * c->dx_stride;
        for (int n = 0; n < 4; n++) {
            const fl_packed_range r = {n & 1 ? row : 0, n & 1 ? c->range.row_end : row,
                                       n & 2 ? col : 0, n & 2 ? c->range.col_end : col};
            v->fn(&c->m.w, &r, 1, dy + r.row_begin, c->dy_stride, dx + r.col_begin, c->dx_stride,
                  true, scratch);
        }
    }
    T_CHECK(memcmp(whole, c->dx, c->dx_count * sizeof(*whole)) == 0, "%s in pieces", v->tag);
    floats_free(whole, c->dx_count);
}

static void check_dx(uint32_t rows, uint32_t cols, uint32_t bits, uint32_t tokens) {
    dx_case c = dx_make(rows, cols, bits, tokens);
    void *scratch = t_guarded(FL_GEMM_PACKED_DX_SCRATCH);
    for (const fl_gemm_packed_dx_variant *v = fl_gemm_packed_dx_variants; v->fn != NULL; v++) {
        if ((v->need & fl_cpu_detect()) != v->need) continue;
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            memcpy(c.dx, c.old, c.dx_count * sizeof(*c.dx));
            for (uint32_t t = 0; t < tokens && !accumulate; t++) // what was there is not used
                for (uint32_t k = 0; k < cols; k++) c.dx[t * c.dx_stride + k] = NAN;
            v->fn(&c.m.w, &c.range, tokens, c.dy, c.dy_stride, c.dx, c.dx_stride, accumulate != 0,
                  scratch);
            dx_check_bound(&c, v, accumulate != 0);
        }
        dx_check_pieces(&c, v, scratch);
    }
    t_guarded_free(scratch, FL_GEMM_PACKED_DX_SCRATCH);
    dx_free(&c);
}

static void test_dx_obeys_bound(void) {
    for (const fl_gemm_packed_dx_variant *v = fl_gemm_packed_dx_variants; v->fn != NULL; v++)
        (void)runs_here(v->need, "gemm_packed_dx", v->tag);
    static const uint32_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 33};
    for (uint32_t bits = 2; bits <= 8; bits++) {
        check_dx(33, 172, bits, tokens[bits]);
        check_dx(300, 130, bits, 7); // three panels of rows
    }
    for (size_t i = 0; i < sizeof(tokens) / sizeof(tokens[0]); i++) check_dx(40, 172, 4, tokens[i]);
    for (uint32_t rows = 1; rows <= 33; rows++) check_dx(rows, 65, 2 + rows % 7, 1 + rows % 7);
    for (uint32_t cols = 1; cols <= 200; cols += cols < 70 ? 3 : 13)
        check_dx(18, cols, 2 + cols % 7, 1 + cols % 7);
}

static void test_select(void) {
    fl_kern k;
    fl_kern_select(&k, 0);
    T_CHECK(k.quantise_x8 == fl_quantise_x8_ref, "%s", k.quantise_x8_tag);
    T_CHECK(k.gemm_packed == fl_gemm_packed_ref, "%s", k.gemm_packed_tag);
    T_CHECK(k.gemm_packed_dx == fl_gemm_packed_dx_ref, "%s", k.gemm_packed_dx_tag);
    fl_kern_select(&k, UINT32_MAX);
    size_t last = 0;
    while (fl_gemm_packed_variants[last + 1].fn != NULL) last++;
    T_STR(k.gemm_packed_tag, fl_gemm_packed_variants[last].tag);
    T_STR(fl_cpu_feature(FL_CPU_AVX2 | FL_CPU_DOTPROD, 1), "DOTPROD");
    T_CHECK(fl_cpu_feature(FL_CPU_AVX2 | FL_CPU_DOTPROD, 2) == NULL, "two features");
    T_STR(fl_cpu_feature(FL_CPU_NEON | FL_CPU_I8MM | FL_CPU_BF16, 1), "I8MM");
    T_STR(fl_cpu_feature(FL_CPU_NEON | FL_CPU_I8MM | FL_CPU_BF16, 2), "BF16");
}

T_MAIN({"quantise_is_as_defined", test_quantise_is_as_defined},
       {"quantise_variants_are_equal", test_quantise_variants_are_equal},
       {"quantise_shows_what_is_not_finite", test_quantise_shows_what_is_not_finite},
       {"x8_size_is_checked", test_x8_size_is_checked},
       {"gemm_variants_are_equal", test_gemm_variants_are_equal},
       {"gemm_bits_on_every_machine", test_gemm_bits_on_every_machine},
       {"gemm_odd_sizes", test_gemm_odd_sizes}, {"dx_obeys_bound", test_dx_obeys_bound},
       {"select", test_select})
