// Goal: no kernel reads or writes outside what it was given, at either end, whatever the size.
// Method: every operand, small arrays too, is a mapping of its own between two pages that are not
// there, and touches one of them: first the one behind it, then the one before. Sizes 0..33 and odd
// big ones. What comes out is compared with the reference's on the same operands; the bounds that
// each kernel promises are tested beside it (test_gemm_packed and so on).
#include "kernels/adamw.h"
#include "kernels/dispatch.h"
#include "kernels/packed.h"
#include "kernels/rope.h"
#include "kernels/vec.h"
#include "tests/check.h"

enum { ROOMS_MAX = 32, SAVED_MAX = 1 << 18 };

static struct {
    uint8_t *map;
    size_t size;
} rooms[ROOMS_MAX];
static size_t rooms_count;
static bool at_end; // which side of an operand touches what is not there

static void *take(size_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (size + page - 1) / page * page;
    uint8_t *p =
        mmap(NULL, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || rooms_count == ROOMS_MAX || mprotect(p, page, PROT_NONE) != 0 ||
        mprotect(p + page + body, page, PROT_NONE) != 0)
        abort();
    rooms[rooms_count].map = p;
    rooms[rooms_count++].size = body + 2 * page;
    return at_end ? p + page + body - size : p + page;
}

static float *floats(size_t n) {
    float *p = take(n * sizeof(*p));
    for (size_t i = 0; i < n; i++) p[i] = t_randf();
    return p;
}

static void release_all(void) {
    while (rooms_count > 0) {
        rooms_count--;
        munmap(rooms[rooms_count].map, rooms[rooms_count].size);
    }
}

static const size_t big[] = {63, 65, 97, 255, 257, 577, 1031};
enum { SIZES = 34 + FL_COUNT(big) };

static size_t size_of(size_t i) {
    return i < 34 ? i : big[i - 34];
}

// The reference's results, in the order in which the operands were written.
static float saved[SAVED_MAX];

// Keeps what the reference wrote (the first variant of every list), compares what others did.
static void same(const char *what, const char *tag, size_t n, const float *got, size_t at,
                 float share) {
    if (at + n > SAVED_MAX) abort();
    if (strcmp(tag, "ref") == 0) {
        memcpy(saved + at, got, n * sizeof(*got));
        return;
    }
    for (size_t i = 0; i < n; i++)
        T_NEAR((double)got[i], (double)saved[at + i],
               (double)share * (1 + fabs((double)saved[at + i])), "%s %s n=%zu i=%zu", what, tag, n,
               i);
}

// Every variant of a list that runs here, from the same seed.
#define EACH(v, name)                                                                              \
    for (const fl_##name##_variant *v = fl_##name##_variants; v->tag != NULL; v++)                 \
        if ((v->need & fl_cpu_detect()) != v->need)                                                \
            T_SKIP_PART(#name " %s: not on this CPU", v->tag);                                     \
        else

static void begin(size_t seed) {
    release_all();
    t_seed = seed;
}

static void norm_of(size_t n) {
    EACH(v, rmsnorm) {
        enum { ROWS = 3 };
        begin(n);
        float *x = floats(ROWS * n), *gain = floats(n), *y = floats(ROWS * n);
        float *dy = floats(ROWS * n), *dx = floats(ROWS * n), *dgain = floats(n);
        v->forward(ROWS, n, 1e-5f, x, gain, y);
        v->backward(ROWS, n, 1e-5f, x, gain, dy, dx, dgain);
        same("rmsnorm", v->tag, ROWS * n, y, 0, 1e-4f);
        same("rmsnorm dx", v->tag, ROWS * n, dx, ROWS * n, 1e-3f);
        same("rmsnorm dgain", v->tag, n, dgain, 2 * ROWS * n, 1e-4f);
    }
}

static void swiglu_of(size_t n) {
    EACH(v, swiglu) {
        begin(n);
        float *gate = floats(n), *up = floats(n), *act = floats(n);
        float *dact = floats(n), *dgate = floats(n), *dup = floats(n);
        v->forward(n, gate, up, act);
        v->backward(n, gate, up, dact, dgate, dup);
        same("swiglu", v->tag, n, act, 0, 1e-5f);
        same("swiglu dgate", v->tag, n, dgate, n, 1e-5f);
        same("swiglu dup", v->tag, n, dup, 2 * n, 1e-5f);
    }
}

static void xent_of(size_t n) {
    enum { TOKENS = 3 };
    EACH(v, xent) {
        begin(n);
        float *logits = floats(TOKENS * n), *grad = floats(TOKENS * n);
        float *lse = floats(TOKENS), *weight = floats(TOKENS);
        fl_lse *state = take(TOKENS * sizeof(*state));
        int32_t *target = take(TOKENS * sizeof(*target));
        uint32_t *draw = take(TOKENS * sizeof(*draw));
        fl_lse_init(TOKENS, state);
        v->update(TOKENS, n, 1.0f, logits, n, state);
        for (int t = 0; t < TOKENS; t++) {
            target[t] = t == 0 || n == 0 ? -1 : (int32_t)(n - 1);
            draw[t] = (uint32_t)t;
            lse[t] = n == 0 ? 0 : fl_lse_value(&state[t]);
        }
        same("lse", v->tag, TOKENS, lse, 0, 1e-5f);
        fl_xent_pick(TOKENS, n, 0, logits, n, target, weight);
        v->grad(TOKENS, n, 0, logits, n, lse, target, weight, 0, NULL, grad, n);
        same("xent grad", v->tag, TOKENS * n, grad, TOKENS, 1e-5f);
        v->grad(TOKENS, n, 0, logits, n, lse, target, weight, 0x1p-5f, draw, grad, n);
    }
}

static void f32_of(size_t tokens, size_t n, size_t k) {
    EACH(v, gemm_f32) {
        begin(n * 64 + k);
        const size_t rank = k % 64 + 1;
        float *x = floats(tokens * k), *w = floats(n * k), *y = floats(tokens * n);
        float *u = floats(tokens * rank), *b = floats(n * rank);
        v->nt(tokens, n, k, x, k, w, k, y, n);
        same("nt", v->tag, tokens * n, y, 0, 1e-4f);
        v->rank_up(tokens, n, rank, 0.5f, u, rank, b, rank, y, n);
        same("rank_up", v->tag, tokens * n, y, tokens * n, 1e-4f);
        v->tn(tokens, n, rank, y, n, u, rank, b, rank);
        same("tn", v->tag, n * rank, b, 2 * tokens * n, 1e-3f);
        v->nn(tokens, n, k, y, n, w, k, x, k, k % 2 == 0);
        same("nn", v->tag, tokens * k, x, 2 * tokens * n + n * rank, 1e-3f);
    }
}

static void attention_of(uint32_t tokens, uint32_t head_size, uint32_t heads, uint32_t kv_heads) {
    EACH(v, attention) {
        begin(tokens * 1000 + head_size);
        const size_t q = (size_t)tokens * heads * head_size;
        const size_t kv = (size_t)tokens * kv_heads * head_size;
        uint32_t *first = take(tokens * sizeof(*first)), *row = take(tokens * sizeof(*row));
        for (uint32_t t = 0; t < tokens; t++) first[t] = t < 20 ? 0 : 20, row[t] = t;
        const fl_attention a = {heads,
                                kv_heads,
                                head_size,
                                first,
                                row,
                                floats(q),
                                floats(kv),
                                floats(kv),
                                floats(q),
                                floats((size_t)tokens * heads),
                                (size_t)heads * head_size,
                                (size_t)kv_heads * head_size};
        const fl_attention_grad g = {floats(q), floats(q), floats(kv), floats(kv)};
        v->forward(&a, 0, tokens, 0, heads);
        v->backward(&a, &g, tokens, 0, kv_heads);
        same("attention", v->tag, q, a.out, 0, 1e-4f);
        same("attention dq", v->tag, q, g.dq, q, 1e-3f);
        same("attention dk", v->tag, kv, g.dk, 2 * q, 1e-3f);
        same("attention dv", v->tag, kv, g.dv, 2 * q + kv, 1e-3f);
    }
}

static void ggml_of(size_t blocks) {
    EACH(v, ggml) {
        for (const fl_ggml_type *t = fl_ggml_types; t->name != NULL; t++) {
            begin(blocks);
            const size_t n = blocks * t->block_elements, size = blocks * t->block_bytes;
            uint8_t *src = take(size);
            for (size_t i = 0; i < size; i++) src[i] = (uint8_t)(t_rand() & 0x3b); // finite halves
            float *out = floats(n), *want = floats(n);
            v->row_to_f32(t->id, src, n, out);
            t->to_f32(src, blocks, want);
            T_CHECK(memcmp(out, want, n * sizeof(*out)) == 0, "%s %s, %zu blocks", t->name, v->tag,
                    blocks);
        }
    }
}

// Random codes and scales that are numbers.
static fl_packed packed(uint32_t rows, uint32_t cols, uint32_t bits) {
    size_t size;
    T_NEED(fl_packed_size(rows, cols, bits, &size), "%u x %u", rows, cols);
    uint8_t *data = take(size);
    for (size_t i = 0; i < size; i++) data[i] = (uint8_t)t_rand();
    for (size_t tile = 0; tile < size; tile += fl_packed_tile_size(bits)) {
        for (size_t i = 0; i < FL_PACKED_HEAD; i += 2) {
            const uint16_t half = fl_f16_from_f32(0.125f * t_randf());
            memcpy(data + tile + i, &half, sizeof(half));
        }
    }
    return (fl_packed){data, rows, cols, bits};
}

static fl_x8 rows8(uint32_t tokens, uint32_t cols, fl_quantise_x8_fn fn) {
    size_t size;
    T_NEED(fl_x8_size(tokens, cols, &size), "%u x %u", tokens, cols);
    const fl_x8 x = fl_x8_bind(take(size), tokens, cols);
    const float *in = floats((size_t)tokens * cols);
    for (uint32_t t = 0; t < tokens; t++) fn(in + (size_t)t * cols, cols, &x, t);
    return x;
}

#define EACH_FN(v, name)                                                                           \
    for (const fl_##name##_variant *v = fl_##name##_variants; v->fn != NULL; v++)                  \
        if ((v->need & fl_cpu_detect()) != v->need)                                                \
            T_SKIP_PART(#name " %s: not on this CPU", v->tag);                                     \
        else

static void packed_of(uint32_t tokens, uint32_t rows, uint32_t cols, uint32_t bits) {
    EACH_FN(v, gemm_packed) {
        begin(rows * 64 + cols);
        const fl_packed w = packed(rows, cols, bits);
        const fl_x8 x = rows8(tokens, cols, fl_quantise_x8_ref);
        float *y = floats((size_t)tokens * rows);
        v->fn(&w, 0, rows, &x, y, rows);
        same("gemm_packed", v->tag, (size_t)tokens * rows, y, 0, 0); // the same bits
    }
    EACH_FN(v, gemm_packed_dx) {
        begin(rows * 64 + cols);
        const fl_packed w = packed(rows, cols, bits);
        const fl_packed_range all = {0, rows, 0, cols};
        const float *dy = floats((size_t)tokens * rows);
        float *dx = floats((size_t)tokens * cols);
        v->fn(&w, &all, tokens, dy, rows, dx, cols, bits % 2 == 0, take(FL_GEMM_PACKED_DX_SCRATCH));
        // |w| is below 0.125 * 256; so many terms at most, each rounded twice.
        same("gemm_packed_dx", v->tag, (size_t)tokens * cols, dx, 0,
             1e-2f + v->rounding * (float)rows * 32);
    }
    EACH_FN(v, quantise_x8) {
        begin(rows * 64 + cols);
        const fl_x8 x = rows8(tokens, cols, v->fn);
        same("quantise_x8", v->tag, (size_t)tokens * x.groups, x.sums, 0, 0);
    }
    begin(cols);
    const fl_packed w = packed(rows, cols, bits);
    fl_packed_row(&w, rows - 1, floats(cols));
}

// Kernels of one definition.
static void plain_of(size_t n) {
    begin(n);
    const uint32_t pairs = (uint32_t)n, size = 2 * pairs;
    double *freq = take(pairs * sizeof(*freq));
    float *turn = floats(size), *x = floats((size_t)3 * (size + 1)), *y = floats(n), *z = floats(n);
    fl_rope_freq(size, 1e4, y, freq);
    fl_rope_row(7, size, freq, turn);
    fl_rope_apply(3, size + 1, size, n % 2 == 0, false, turn, x);
    fl_vec_fill(n, 1, y);
    fl_vec_add(n, z, y), fl_vec_scale(n, 2, y), fl_vec_axpy(n, 3, z, y);
    T_CHECK(fl_vec_finite(n, y) && fl_vec_sumsq(n, z) >= fl_vec_dot(n, z, z) * 0.5, "n=%zu", n);
    float *m = floats(n), *v = floats(n);
    fl_vec_fill(n, 0, m), fl_vec_fill(n, 0, v);
    fl_adamw_step(&(fl_adamw){1e-3f, 0.9f, 0.99f, 1e-8f, 0, 1}, n, y, z, m, v);
    T_CHECK(fl_vec_finite(n, y), "adamw n=%zu", n);
}

#define BOTH_ENDS                                                                                  \
    for (int end_ = 0; end_ < 2; end_++)                                                           \
        if (at_end = end_ == 1, true)

static void test_rows_of_floats(void) {
    BOTH_ENDS {
        for (size_t i = 0; i < SIZES; i++) {
            if (size_of(i) > 0) norm_of(size_of(i));
            swiglu_of(size_of(i));
            xent_of(size_of(i));
            plain_of(size_of(i));
        }
    }
    release_all();
}

static void test_float_products(void) {
    BOTH_ENDS {
        for (size_t i = 0; i < SIZES; i++) {
            const size_t n = size_of(i);
            f32_of(n % 7 + 1, 5, n);
            f32_of(n % 7 + 1, n, 19);
            f32_of(n, 3, 17);
        }
        f32_of(33, 97, 65);
    }
    release_all();
}

static void test_attention(void) {
    BOTH_ENDS {
        for (uint32_t n = 1; n <= 66; n++) attention_of(n % 9 + 1, 2 * n, 3, 1);
        for (uint32_t tokens = 1; tokens <= 33; tokens++) attention_of(tokens, 16, 2, 2);
        attention_of(67, 34, 4, 2);
        attention_of(129, 64, 2, 1);
    }
    release_all();
}

static void test_ggml_rows(void) {
    BOTH_ENDS {
        for (size_t blocks = 0; blocks <= 33; blocks++) ggml_of(blocks);
    }
    release_all();
}

static void test_packed_products(void) {
    BOTH_ENDS {
        for (uint32_t n = 1; n <= 33; n++) {
            packed_of(n, n % 5 * 16 + n, 65, n % 7 + 2);
            packed_of(3, n, 2 * n + 1, n % 7 + 2);
        }
        for (uint32_t bits = FL_PACKED_BITS_MIN; bits <= FL_PACKED_BITS_MAX; bits++) {
            packed_of(1, 97, 577, bits);
            packed_of(65, 257, 129, bits);
        }
    }
    release_all();
}

T_MAIN({"rows_of_floats", test_rows_of_floats}, {"float_products", test_float_products},
       {"attention", test_attention}, {"ggml_rows", test_ggml_rows},
       {"packed_products", test_packed_products})
