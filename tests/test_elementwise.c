// Goal: every variant of the row kernels (norm, rotary positions, SwiGLU, cross entropy, AdamW,
// helpers) obeys the bound in its header, reads and writes nothing past its rows, keeps NaN, and
// every backward function is the derivative of its forward function.
// Method: the same formulas in double as the yardstick; derivatives by central differences of those
// doubles; sizes around every vector width; buffers that end at a guard page.
#include "kernels/adamw.h"
#include "kernels/dispatch.h"
#include "kernels/packed.h"
#include "kernels/rope.h"
#include "kernels/vec.h"
#include "tests/check.h"

#include <float.h>

#define EPS ((double)FLT_EPSILON)

static const size_t sizes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 576};

// Walks the variants of a group that this CPU can run.
#define EACH(v, group)                                                                             \
    for (const fl_##group##_variant *v = fl_##group##_variants; v->tag != NULL; v++)               \
        if (!runs(v->need, v->tag)) {                                                              \
        } else

static bool runs(uint32_t need, const char *tag) {
    if ((need & fl_cpu_detect()) == need) return true;
    T_SKIP_PART("%s: not on this CPU", tag);
    return false;
}

static float *guarded(size_t n) {
    float *p = t_guarded(n * sizeof(*p));
    for (size_t i = 0; i < n; i++) p[i] = t_randf();
    return p;
}

static void release(float *p, size_t n) {
    t_guarded_free(p, n * sizeof(*p));
}

// ---- rmsnorm

static void norm_double(size_t n, double epsilon, const double *x, const float *gain, double *y) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    const double r = 1 / sqrt(sum / (double)n + epsilon);
    for (size_t i = 0; i < n; i++) y[i] = x[i] * r * (double)gain[i];
}

// sum_i dy_i * norm(x)_i: what the backward pass differentiates.
static double norm_loss(size_t n, double epsilon, const double *x, const float *gain,
                        const float *dy) {
    double y[1024], sum = 0;
    norm_double(n, epsilon, x, gain, y);
    for (size_t i = 0; i < n; i++) sum += y[i] * (double)dy[i];
    return sum;
}

static void check_norm(const fl_rmsnorm_variant *v, size_t n) {
    enum { ROWS = 3 };
    const float epsilon = 1e-5f;
    float *x = guarded(ROWS * n), *gain = guarded(n), *y = guarded(ROWS * n);
    float *dy = guarded(ROWS * n), *dx = guarded(ROWS * n), *dgain = guarded(n);
    float before[ROWS * 576], gain_before[576];
    memcpy(before, dx, ROWS * n * sizeof(float));
    memcpy(gain_before, dgain, n * sizeof(float));
    v->forward(ROWS, n, epsilon, x, gain, y);
    v->backward(ROWS, n, epsilon, x, gain, dy, dx, dgain);
    double want_gain[576], mag_gain[576];
    for (size_t i = 0; i < n; i++) mag_gain[i] = fabs(want_gain[i] = (double)gain_before[i]);
    for (size_t t = 0; t < ROWS; t++) {
        double xd[576], want[576], size = 0, mag = 0, squares = 0;
        for (size_t i = 0; i < n; i++) {
            xd[i] = (double)x[t * n + i];
            squares += xd[i] * xd[i];
            mag += fabs((double)dy[t * n + i] * (double)gain[i]);
        }
        const double r = 1 / sqrt(squares / (double)n + (double)epsilon);
        norm_double(n, (double)epsilon, xd, gain, want);
        for (size_t i = 0; i < n; i++) size += fabs((double)dy[t * n + i] * want[i]);
        for (size_t i = 0; i < n; i++) {
            const double bound = ((double)n + 12) * EPS;
            T_NEAR((double)y[t * n + i], want[i], bound * fabs(want[i]), "%s n=%zu", v->tag, n);
            const double per_gain = (double)dy[t * n + i] * want[i] / (double)gain[i];
            want_gain[i] += per_gain;
            mag_gain[i] += fabs(per_gain);
            const double keep = xd[i], h = 1e-5;
            xd[i] = keep + h;
            const double up = norm_loss(n, (double)epsilon, xd, gain, dy + t * n);
            xd[i] = keep - h;
            const double down = norm_loss(n, (double)epsilon, xd, gain, dy + t * n);
            const double slope = (up - down) / (2 * h);
            xd[i] = keep;
            // The third derivative, which the difference neglects, is below 16 r^3 sum |dy gain|.
            T_NEAR((double)dx[t * n + i], slope + (double)before[t * n + i],
                   bound * 4 * (1 + fabs(slope) + size) + 16 * h * h * r * r * r * mag,
                   "%s backward n=%zu i=%zu", v->tag, n, i);
        }
    }
    for (size_t i = 0; i < n; i++)
        T_NEAR((double)dgain[i], want_gain[i], ((double)n + 16) * EPS * mag_gain[i], "%s gain",
               v->tag);
    memcpy(dx, before, ROWS * n * sizeof(float));
    v->backward(ROWS, n, epsilon, x, gain, dy, dx, NULL); // no gain wanted: must not be touched
    v->forward(ROWS, n, epsilon, x, gain, x);             // in place
    T_CHECK(memcmp(x, y, ROWS * n * sizeof(float)) == 0, "%s in place n=%zu", v->tag, n);
    release(x, ROWS * n), release(gain, n), release(y, ROWS * n);
    release(dy, ROWS * n), release(dx, ROWS * n), release(dgain, n);
}

static void test_rmsnorm(void) {
    EACH(v, rmsnorm) {
        for (size_t i = 0; i < FL_COUNT(sizes); i++) check_norm(v, sizes[i]);
        float x[9] = {0}, gain[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, y[9];
        v->forward(1, 9, 1e-5f, x, gain, y);
        T_CHECK(y[0] == 0.0f && y[8] == 0.0f, "%s: a row of zeros", v->tag);
        x[8] = NAN;
        v->forward(1, 9, 1e-5f, x, gain, y);
        T_CHECK(isnan(y[0]) && isnan(y[8]), "%s: NaN reaches the whole row", v->tag);
    }
}

// ---- rope

static void test_rope_turns_pairs(void) {
    enum { SIZE = 10, HEAD = 12, HEADS = 3 };
    const float factors[SIZE / 2] = {1, 1, 2, 4, 8};
    double freq[SIZE / 2];
    float cos_sin[SIZE];
    fl_rope_freq(SIZE, 10000.0, factors, freq);
    fl_rope_row(777, SIZE, freq, cos_sin);
    for (int half = 0; half < 2; half++) {
        float *x = guarded(HEADS * HEAD), old[HEADS * HEAD];
        memcpy(old, x, sizeof(old));
        fl_rope_apply(HEADS, HEAD, SIZE, half == 1, false, cos_sin, x);
        for (size_t h = 0; h < HEADS; h++) {
            for (size_t i = 0; i < SIZE / 2; i++) {
                const size_t p = h * HEAD + (half ? i : 2 * i), q = half ? p + SIZE / 2 : p + 1;
                const double angle = 777 * pow(10000, -2.0 * (double)i / SIZE) / (double)factors[i];
                const double a = (double)old[p], b = (double)old[q];
                const double bound = 4 * EPS * (fabs(a) + fabs(b));
                T_NEAR((double)x[p], a * cos(angle) - b * sin(angle), bound, "half=%d", half);
                T_NEAR((double)x[q], a * sin(angle) + b * cos(angle), bound, "half=%d", half);
            }
            T_CHECK(memcmp(x + h * HEAD + SIZE, old + h * HEAD + SIZE, 2 * sizeof(float)) == 0,
                    "what does not rotate stays");
        }
        fl_rope_apply(HEADS, HEAD, SIZE, half == 1, true, cos_sin, x);
        for (size_t i = 0; i < HEADS * HEAD; i++)
            T_NEAR((double)x[i], (double)old[i], 12 * EPS, "inverse, half=%d", half);
        release(x, HEADS * HEAD);
    }
    fl_rope_freq(SIZE, 10000.0, NULL, freq);
    fl_rope_row(0, SIZE, freq, cos_sin);
    T_CHECK(cos_sin[0] == 1.0f && cos_sin[4] == 1.0f && cos_sin[5] == 0.0f, "position 0 is still");
}

// ---- swiglu

static double silu(double g) {
    return g / (1 + exp(-g));
}

static void check_swiglu(const fl_swiglu_variant *v, size_t n, float spread) {
    float *gate = guarded(n), *up = guarded(n), *act = guarded(n);
    float *dact = guarded(n), *dgate = guarded(n), *dup = guarded(n);
    for (size_t i = 0; i < n; i++) gate[i] *= spread;
    v->forward(n, gate, up, act);
    v->backward(n, gate, up, dact, dgate, dup);
    for (size_t i = 0; i < n; i++) {
        const double g = (double)gate[i], u = (double)up[i], d = (double)dact[i];
        const double s = 1 / (1 + exp(-g)), h = 1e-4;
        // exp of a float beyond 88.7 is infinite: the true value, below 3e-37, becomes zero.
        const double tiny = g < -88.7 ? 3e-37 : (double)FLT_MIN;
        T_NEAR((double)act[i], silu(g) * u, 10 * EPS * fabs(silu(g) * u) + tiny, "%s g=%g", v->tag,
               g);
        T_NEAR((double)dup[i], silu(g) * d, 10 * EPS * fabs(silu(g) * d) + tiny, "%s g=%g", v->tag,
               g);
        const double slope = (silu(g + h) - silu(g - h)) / (2 * h);
        T_NEAR((double)dgate[i], d * u * slope,
               fabs(d * u) * (16 * EPS * s * (1 + fabs(g)) + 1e-8) + tiny, "%s g=%g", v->tag, g);
    }
    v->forward(n, gate, up, up); // in place
    T_CHECK(memcmp(up, act, n * sizeof(float)) == 0, "%s in place n=%zu", v->tag, n);
    release(gate, n), release(up, n), release(act, n);
    release(dact, n), release(dgate, n), release(dup, n);
}

static void test_swiglu(void) {
    EACH(v, swiglu) {
        for (size_t i = 0; i < FL_COUNT(sizes); i++) {
            check_swiglu(v, sizes[i], 1.0f);
            check_swiglu(v, sizes[i], 20.0f);
            check_swiglu(v, sizes[i], 120.0f);
        }
        for (size_t n = 1; n < 20; n++) {
            float gate[20] = {0}, up[20] = {0}, act[20];
            gate[n - 1] = NAN;
            v->forward(n, gate, up, act);
            T_CHECK(isnan(act[n - 1]), "%s n=%zu: NaN is kept", v->tag, n);
            gate[n - 1] = -INFINITY, up[n - 1] = 1.0f;
            v->forward(n, gate, up, act);
            T_CHECK(n == 1 || act[0] == 0.0f, "%s: neighbours of an infinity", v->tag);
        }
    }
}

// ---- cross entropy

static double lse_double(size_t n, double scale, const float *l) {
    double max = -INFINITY, sum = 0;
    for (size_t i = 0; i < n; i++) max = fmax(max, scale * (double)l[i]);
    for (size_t i = 0; i < n; i++) sum += exp(scale * (double)l[i] - max);
    return max + log(sum);
}

static void check_xent(const fl_xent_variant *v, size_t n, size_t chunk, float scale) {
    enum { TOKENS = 3 };
    const size_t ld = n + 3;
    float *logits = guarded(TOKENS * ld - 3), *grad = guarded(TOKENS * chunk);
    for (size_t i = 0; i < TOKENS * ld - 3; i++) logits[i] = logits[i] * 12.0f + 30.0f;
    const int32_t target[TOKENS] = {0, (int32_t)(n - 1), -1};
    const float weight[TOKENS] = {0.25f, -1.5f, 1.0f};
    float lse[TOKENS], picked[TOKENS] = {0, 0, 77};
    fl_lse state[TOKENS];
    fl_lse_init(TOKENS, state);
    for (size_t at = 0; at < n; at += chunk) {
        const size_t count = n - at < chunk ? n - at : chunk;
        v->update(TOKENS, count, scale, logits + at, ld, state);
        fl_xent_pick(TOKENS, count, at, logits + at, ld, target, picked);
    }
    T_CHECK(picked[0] == logits[0] && picked[1] == logits[ld + n - 1] && picked[2] == 77, "pick");
    for (size_t t = 0; t < TOKENS; t++) {
        T_NEAR((double)fl_lse_value(&state[t]), lse_double(n, (double)scale, logits + t * ld),
               33 * EPS * 42, "%s n=%zu chunk=%zu", v->tag, n, chunk);
        lse[t] = (float)lse_double(n, 1, logits + t * ld);
    }
    for (size_t at = 0; at < n; at += chunk) {
        const size_t count = n - at < chunk ? n - at : chunk;
        v->grad(TOKENS, count, at, logits + at, ld, lse, target, weight, 0, NULL, grad, chunk);
        for (size_t t = 0; t < TOKENS; t++) {
            for (size_t j = 0; j < count; j++) {
                const double p = exp((double)logits[t * ld + at + j] - (double)lse[t]);
                const double hit = (int32_t)(at + j) == target[t] ? 1 : 0;
                T_NEAR((double)grad[t * chunk + j], (p - hit) * (double)weight[t],
                       fabs((double)weight[t]) * (p * 48 + 1) * EPS, "%s n=%zu", v->tag, n);
            }
        }
    }
    release(logits, TOKENS * ld - 3), release(grad, TOKENS * chunk);
}

static void test_xent(void) {
    EACH(v, xent) {
        for (size_t i = 0; i < FL_COUNT(sizes); i++) {
            const size_t n = sizes[i];
            for (size_t chunk = 1; chunk <= n; chunk = chunk * 3 + 1) {
                check_xent(v, n, chunk, 1.0f);
                check_xent(v, n, chunk, 0.7f);
            }
            check_xent(v, n, n, 1.0f);
        }
        for (size_t n = 1; n < 20; n++) {
            float logits[20], grad[20];
            const float lse = 1.0f, zero = 0.0f;
            const int32_t target = 0;
            for (size_t j = 0; j < n; j++) logits[j] = -INFINITY;
            fl_lse s;
            fl_lse_init(1, &s);
            v->update(1, n, 1.0f, logits, n, &s);
            T_CHECK(s.sum == 0.0 && isinf(fl_lse_value(&s)), "%s: nothing is possible", v->tag);
            logits[n - 1] = 2.0f;
            v->update(1, n, 1.0f, logits, n, &s);
            T_NEAR((double)fl_lse_value(&s), 2.0, 2 * EPS, "%s: one is certain", v->tag);
            v->grad(1, n, 0, logits, n, &lse, &(int32_t){-1}, &lse, 0, NULL, grad, n);
            for (size_t j = 0; j + 1 < n; j++)
                T_CHECK(grad[j] == 0.0f, "%s: what is impossible pulls nothing", v->tag);
            logits[n - 1] = NAN;
            v->grad(1, n, 0, logits, n, &lse, &(int32_t){-1}, &lse, 0, NULL, grad, n);
            T_CHECK(isnan(grad[n - 1]), "%s n=%zu: NaN is kept", v->tag, n);
            v->grad(1, n, 0, logits, n, &lse, &target, &zero, 0, NULL, grad, n);
            for (size_t j = 0; j < n; j++) T_CHECK(grad[j] == 0.0f, "%s: weight zero", v->tag);
            v->update(1, n, 1.0f, logits, n, &s);
            T_CHECK(isnan(fl_lse_value(&s)), "%s n=%zu: NaN is kept", v->tag, n);
        }
    }
}

static void test_pick_stays_in_its_chunk(void) {
    const float logits[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int32_t target = -1; target < 12; target++) {
        float picked = -1.0f;
        fl_xent_pick(1, 4, 3, logits, 8, &target, &picked); // ids 3 .. 6
        const float want = target >= 3 && target < 7 ? (float)(target - 3) : -1.0f;
        T_CHECK(picked == want, "target %d: %g", target, (double)picked);
    }
}

// The gradient is the slope of the loss, by central differences in double.
static void test_xent_is_a_gradient(void) {
    enum { N = 37 };
    EACH(v, xent) {
        float *l = guarded(N), grad[N];
        const float lse = (float)lse_double(N, 1, l), weight = 0.5f;
        const int32_t target = 11;
        v->grad(1, N, 0, l, N, &lse, &target, &weight, 0, NULL, grad, N);
        for (size_t j = 0; j < N; j++) {
            const float keep = l[j], h = 0x1p-8f; // exact in float
            l[j] = keep + h;
            const double up = lse_double(N, 1, l) - (double)l[target], high = (double)l[j];
            l[j] = keep - h;
            const double down = lse_double(N, 1, l) - (double)l[target], low = (double)l[j];
            l[j] = keep;
            T_NEAR((double)grad[j], 0.5 * (up - down) / (high - low), 1e-6, "%s j=%zu", v->tag, j);
        }
        release(l, N);
    }
}

// Thinned: small entries are 0 or `least` as fl_xent_chance says, on average what they were; the
// others and the target's are exact; cutting the row changes nothing.
static void test_xent_thinning(void) {
    enum { N = 203, CUT = 77, DRAWS = 2000 };
    const float weight = 0.5f, least = 0x1p-7f;
    float *l = guarded(N), exact[N], grad[N], part[N], chance[N];
    const float lse = (float)lse_double(N, 1, l);
    const int32_t target = 11;
    EACH(v, xent) {
        double sum[N] = {0};
        v->grad(1, N, 0, l, N, &lse, &target, &weight, 0, NULL, exact, N);
        for (uint32_t i = 0; i < DRAWS; i++) {
            const uint32_t draw = i * UINT32_C(2654435761);
            v->grad(1, N, 0, l, N, &lse, &target, &weight, least, &draw, grad, N);
            v->grad(1, CUT, 0, l, N, &lse, &target, &weight, least, &draw, part, N);
            v->grad(1, N - CUT, CUT, l + CUT, N, &lse, &target, &weight, least, &draw, part + CUT,
                    N);
            T_CHECK(memcmp(grad, part, sizeof(grad)) == 0, "%s: the cut is seen", v->tag);
            for (size_t j = 0; j < N; j++)
                sum[j] += (double)grad[j], chance[j] = fl_xent_chance(draw, j);
        }
        for (size_t j = 0; j < N; j++) {
            const float p = exact[j] / weight;
            const bool small = p < least && j != (size_t)target;
            // The last draw: away from a rounding of p the choice is the definition's.
            if (!small)
                T_CHECK(grad[j] == exact[j], "%s j=%zu is not small", v->tag, j);
            else if (fabsf(chance[j] * least - p) > 1e-6f)
                T_CHECK(grad[j] == (chance[j] * least < p ? least * weight : 0), "%s j=%zu", v->tag,
                        j);
            const double sigma = small ? sqrt((double)(p * least) / DRAWS) : 1e-6;
            T_NEAR(sum[j] / DRAWS, (double)exact[j], 5 * sigma * (double)weight, "%s j=%zu", v->tag,
                   j);
        }
    }
    release(l, N);
}

// ---- adamw and helpers

static void test_adamw(void) {
    enum { N = 33 };
    float *p = guarded(N), *g = guarded(N), *m = guarded(N), *s = guarded(N);
    double pd[N], md[N] = {0}, sd[N] = {0};
    for (size_t i = 0; i < N; i++) pd[i] = (double)p[i], m[i] = s[i] = 0.0f;
    fl_adamw o = {.lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f, .decay = 0.01f};
    for (o.step = 1; o.step <= 20; o.step++) {
        for (size_t i = 0; i < N; i++) g[i] = i == 0 ? 0.0f : t_randf();
        fl_adamw_step(&o, N, p, g, m, s);
        for (size_t i = 0; i < N; i++) {
            const double b1 = (double)o.beta1, b2 = (double)o.beta2, gd = (double)g[i];
            md[i] = b1 * md[i] + (1 - b1) * gd;
            sd[i] = b2 * sd[i] + (1 - b2) * gd * gd;
            const double mh = md[i] / (1 - pow(b1, (double)o.step));
            const double sh = sd[i] / (1 - pow(b2, (double)o.step));
            pd[i] -= (double)o.lr * (mh / (sqrt(sh) + (double)o.epsilon) + (double)o.decay * pd[i]);
            // A step moves by about lr; 1 - beta2 carries the rounding of beta2, EPS / (1 - beta2).
            T_NEAR((double)p[i], pd[i],
                   (double)o.step * (4 * EPS * (fabs(pd[i]) + 1e-3) + 1e-3 * EPS / 1e-3),
                   "step %d i=%zu", (int)o.step, i);
        }
    }
    float one = 2.0f, grad = 0.5f, m1 = 0, v1 = 0; // by hand: lr (sign(g) + decay p)
    o = (fl_adamw){.lr = 0.1f, .beta1 = 0.9f, .beta2 = 0.999f, .decay = 0.1f, .step = 1};
    fl_adamw_step(&o, 1, &one, &grad, &m1, &v1);
    T_NEAR((double)one, 2.0 - 0.1 * (1.0 + 0.1 * 2.0), 1e-5, "the first step");
    release(p, N), release(g, N), release(m, N), release(s, N);
}

static void test_vec(void) {
    for (size_t i = 0; i < FL_COUNT(sizes); i++) {
        const size_t n = sizes[i];
        float *x = guarded(n), *y = guarded(n), old[576];
        double dot = 0, mag = 0, sq = 0;
        for (size_t k = 0; k < n; k++) {
            dot += (double)x[k] * (double)y[k];
            mag += fabs((double)x[k] * (double)y[k]);
            sq += (double)x[k] * (double)x[k];
        }
        T_NEAR(fl_vec_dot(n, x, y), dot, (double)n * DBL_EPSILON * mag, "n=%zu", n);
        T_NEAR(fl_vec_sumsq(n, x), sq, (double)n * DBL_EPSILON * sq, "n=%zu", n);
        memcpy(old, y, n * sizeof(float));
        fl_vec_axpy(n, 0.5f, x, y);
        for (size_t k = 0; k < n; k++) T_CHECK(y[k] == old[k] + 0.5f * x[k], "axpy");
        memcpy(y, old, n * sizeof(float));
        fl_vec_add(n, x, y);
        for (size_t k = 0; k < n; k++) T_CHECK(y[k] == old[k] + x[k], "add");
        fl_vec_scale(n, -2.0f, x);
        fl_vec_fill(n, 3.0f, y);
        T_CHECK(y[0] == 3.0f && y[n - 1] == 3.0f && fl_vec_finite(n, x), "fill");
        x[n - 1] = INFINITY;
        T_CHECK(!fl_vec_finite(n, x), "infinity");
        x[n - 1] = NAN;
        T_CHECK(!fl_vec_finite(n, x), "NaN");
        release(x, n), release(y, n);
    }
    T_CHECK(fl_vec_finite(0, NULL) && fl_vec_sumsq(0, NULL) == 0.0, "nothing");
}

// Every half, and floats of every exponent with every pattern that rounding looks at.
static void test_f16_rows(void) {
    enum { N = 1 << 16 };
    uint16_t *h = malloc(N * sizeof(*h)), *back = malloc(N * sizeof(*back));
    float *x = malloc(N * sizeof(*x)), *y = malloc(N * sizeof(*y));
    uint32_t wrong = 0;
    for (uint32_t i = 0; i < N; i++) h[i] = (uint16_t)i;
    fl_vec_from_f16(N, 1.0f, h, y);
    fl_vec_to_f16(N, 1.0f, y, back);
    for (uint32_t i = 0; i < N; i++) {
        const float want = fl_f16_to_f32(h[i]);
        wrong += memcmp(&want, &y[i], sizeof(want)) != 0;
        wrong += back[i] != fl_f16_from_f32(want);
    }
    T_EQ(wrong, 0);
    for (uint32_t high = 0; high < 1 << 12; high++) { // sign, exponent, the mantissa's first 3 bits
        for (uint32_t i = 0; i < 1 << 10; i++) {
            // 13 bits are cut: about half a unit (7 values), or any.
            const uint32_t cut = (i & 7u) == 7 ? (uint32_t)t_rand() & 0x1fffu : 0xffdu + (i & 7u);
            const uint32_t bits = high << 20 | (i >> 3) << 13 | cut;
            memcpy(&x[i], &bits, sizeof(bits));
        }
        fl_vec_to_f16(1 << 10, 1.0f, x, back);
        for (uint32_t i = 0; i < 1 << 10; i++) wrong += back[i] != fl_f16_from_f32(x[i]);
    }
    T_EQ(wrong, 0);
    for (size_t k = 0; k < FL_COUNT(sizes); k++) { // ends of rows, and the factors
        const size_t n = sizes[k];
        float *row = guarded(n), *out = guarded(n);
        uint16_t *half = t_guarded(n * sizeof(*half));
        fl_vec_to_f16(n, 0.25f, row, half);
        fl_vec_from_f16(n, 4.0f, half, out);
        uint32_t most = 0;
        for (size_t i = 0; i < n; i++) {
            T_EQ(half[i], fl_f16_from_f32(0.25f * row[i]));
            T_NEAR((double)out[i], (double)row[i], 0x1p-11 * fabs((double)row[i]) + 0x1p-22,
                   "back");
            const float mag = fabsf(row[i]);
            uint32_t bits;
            memcpy(&bits, &mag, sizeof(bits));
            most = bits > most ? bits : most;
        }
        T_EQ(fl_vec_most_bits(n, row), most);
        release(row, n);
        release(out, n);
        t_guarded_free(half, n * sizeof(*half));
    }
    free(h), free(back), free(x), free(y);
}

T_MAIN({"rmsnorm", test_rmsnorm}, {"rope_turns_pairs", test_rope_turns_pairs},
       {"swiglu", test_swiglu}, {"xent", test_xent},
       {"pick_stays_in_its_chunk", test_pick_stays_in_its_chunk},
       {"xent_is_a_gradient", test_xent_is_a_gradient}, {"xent_thinning", test_xent_thinning},
       {"adamw", test_adamw}, {"vec", test_vec}, {"f16_rows", test_f16_rows})
