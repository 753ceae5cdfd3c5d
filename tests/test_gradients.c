// Goal: the engine's gradients are the gradients of the loss it reports. Method: a small random
// model; every trained tensor against a double reference written from the formulas, the reference
// against central differences of itself, and the float engine against central differences of its
// own loss along the gradient of each tensor. Layers outside the window, packed weights, threads.
#include "node/tune/adapter.h"
#include "node/tune/backward.h"
#include "node/tune/loss.h"
#include "node/tune/window.h"
#include "tests/reference.h"
#include "tests/tiny_model.h"

enum { TOKENS = 17, RANK = 3 };

typedef struct rig {
    tiny_model *t;
    node_adapter *adapter;
    fl_kern kern;
    node_engine engine;
    void *block;
    node_scratch *scratch;
    node_acts acts;
    node_back back;
    node_head head;
    float *x, *saved, *dx, *dnorm, *logits;
    float *db[16], *dgain;
    int32_t id[TOKENS], target[TOKENS];
    uint32_t pos[TOKENS], kv_begin[TOKENS], kv_row[TOKENS];
    node_batch batch;
} rig;

static void bind(rig *r, fl_arena *arena) {
    const node_model *m = &r->t->model;
    const size_t d = m->hidden;
    r->scratch = node_scratch_bind(m, TOKENS, fl_pool_threads(r->engine.pool), arena);
    node_acts_bind(&r->acts, m, TOKENS, TOKENS, RANK, arena);
    node_back_bind(&r->back, m, TOKENS, RANK, arena);
    node_head_bind(&r->head, m, TOKENS, 1, 32, arena);
    r->x = FL_ARENA_NEW(arena, float, TOKENS *d);
    r->saved = FL_ARENA_NEW(arena, float, TOKENS *d * m->layers);
    r->dx = FL_ARENA_NEW(arena, float, TOKENS *d);
    r->dnorm = FL_ARENA_NEW(arena, float, TOKENS *d);
    r->dgain = FL_ARENA_NEW(arena, float, d);
    for (uint32_t l = 0; l < m->layers; l++)
        r->db[l] = FL_ARENA_NEW(arena, float, r->adapter->span_count[l]);
}

// Three documents packed into one batch; some tokens carry no loss.
static void fill_batch(rig *r) {
    static const uint32_t begins[] = {0, 5, 6, TOKENS};
    for (int piece = 0; piece < 3; piece++)
        for (uint32_t i = begins[piece]; i < begins[piece + 1]; i++) {
            r->id[i] = (int32_t)(t_rand() % r->t->model.vocabulary);
            r->target[i] = i % 6 == 3 ? -1 : (int32_t)(t_rand() % r->t->model.vocabulary);
            r->pos[i] = i - begins[piece];
            r->kv_begin[i] = begins[piece];
            r->kv_row[i] = i;
        }
    r->batch = (node_batch){TOKENS, r->id, r->pos, r->kv_begin, r->kv_row};
}

static rig *rig_open(const tiny_shape *shape, uint32_t cpu, fl_pool *pool) {
    rig *r = calloc(1, sizeof(*r));
    T_NEED(r != NULL, "memory");
    r->t = tiny_open(shape);
    fl_kern_select(&r->kern, cpu);
    r->engine = (node_engine){&r->kern, pool};
    node_adapter_opts opts = {.rank = RANK, .alpha = 6.0f, .seed = 5};
    fl_err err;
    T_OK(node_adapter_open(&r->t->model, &opts, &r->adapter, &err), err);
    for (uint32_t id = 0; id < node_adapter_spans(r->adapter); id++)
        for (uint32_t i = 0; i < r->adapter->span_count[id]; i++)
            r->adapter->span[id][i] += 0.1f * t_randf();
    fl_arena arena;
    fl_arena_init_counting(&arena);
    bind(r, &arena);
    const size_t size = arena.peak;
    r->block = aligned_alloc(64, (size + 63) / 64 * 64);
    T_NEED(r->block != NULL, "memory");
    fl_arena_init(&arena, r->block, size);
    bind(r, &arena);
    T_EQ(arena.peak, size);
    fill_batch(r);
    return r;
}

static void rig_close(rig *r) {
    free(r->block);
    node_adapter_close(r->adapter);
    tiny_close(r->t);
    free(r);
}

static uint32_t scored(const rig *r) {
    uint32_t n = 0;
    for (int i = 0; i < TOKENS; i++) n += r->target[i] >= 0;
    return n;
}

// Forward to the window's exit, inputs of all layers saved.
static void forward(rig *r, node_window w) {
    const node_model *m = &r->t->model;
    const size_t n = (size_t)TOKENS * m->hidden;
    node_embed(&r->engine, m, &r->batch, r->x);
    for (uint32_t l = 0; l <= w.last; l++) {
        memcpy(r->saved + l * n, r->x, n * sizeof(float));
        node_layer_forward(&r->engine, m, l, &r->adapter->lora, &r->batch, &r->acts, r->scratch,
                           r->x);
    }
}

// Loss and gradients of a window, recomputing each layer from its input.
static double step(rig *r, node_window w) {
    const node_model *m = &r->t->model;
    const size_t n = (size_t)TOKENS * m->hidden;
    forward(r, w);
    memset(r->dgain, 0, m->hidden * sizeof(float));
    for (uint32_t l = 0; l < m->layers; l++)
        memset(r->db[l], 0, r->adapter->span_count[l] * sizeof(float));
    const node_loss_job loss = {.model = m,
                                .gain = node_exit_gain(m, &r->adapter->lora, w.exit),
                                .tokens = TOKENS,
                                .x = r->x,
                                .target = r->target,
                                .weight = 1.0f / (float)scored(r),
                                .dnorm = r->dnorm,
                                .dx = r->dx,
                                .dgain = r->dgain};
    const double nll = node_loss_step(&r->engine, &r->head, &loss, r->scratch) / scored(r);
    for (uint32_t l = w.last + 1; l-- > w.first;) {
        memcpy(r->x, r->saved + l * n, n * sizeof(float));
        node_layer_forward(&r->engine, m, l, &r->adapter->lora, &r->batch, &r->acts, r->scratch,
                           r->x);
        const node_layer_job job = {.model = m,
                                    .layer = l,
                                    .lora = &r->adapter->lora,
                                    .batch = &r->batch,
                                    .acts = &r->acts,
                                    .x = r->saved + l * n,
                                    .dy = r->dx,
                                    .db = r->db[l],
                                    .last = l == w.first};
        node_layer_backward(&r->engine, &job, &r->back, r->scratch);
    }
    return nll;
}

// The loss alone, in double from the engine's float rows.
static double loss_only(rig *r, node_window w) {
    forward(r, w);
    float logp[TOKENS], one = 1.0f;
    const uint32_t exits = 1;
    node_lora lora = r->adapter->lora;
    lora.exit_gain[0] = lora.exit_gain[w.exit];
    const node_head_job job = {.model = &r->t->model,
                               .lora = &lora,
                               .exits = exits,
                               .tokens = TOKENS,
                               .hidden = r->x,
                               .target = r->target,
                               .taus = 1,
                               .tau = &one,
                               .logp = logp,
                               .stride = TOKENS};
    node_head_logp(&r->engine, &r->head, &job, r->scratch);
    double nll = 0;
    for (int i = 0; i < TOKENS; i++) nll -= r->target[i] < 0 ? 0 : (double)logp[i];
    return nll / scored(r);
}

// Of a tensor: largest |got - want| (or its root mean square) over the root mean square of want.
static double distance(const float *got, const double *want, size_t n, bool mean) {
    double worst = 0, square = 0, off = 0;
    for (size_t i = 0; i < n; i++) {
        worst = fmax(worst, fabs((double)got[i] - want[i]));
        off += ((double)got[i] - want[i]) * ((double)got[i] - want[i]) / (double)n;
        square += want[i] * want[i] / (double)n;
        if (!isfinite(got[i])) return INFINITY;
    }
    return (mean ? sqrt(off) : worst) / (sqrt(square) + 1e-30);
}

typedef struct grads {
    ref *ref;
    ref_block layer[16];
    double *gain, nll;
} grads;

static void grads_open(grads *g, rig *r, node_window w) {
    const node_model *m = &r->t->model;
    g->ref = ref_open(m, &r->adapter->lora);
    for (uint32_t l = 0; l < m->layers; l++)
        for (int i = 0; i < NODE_MODULES; i++)
            g->layer[l].b[i] = ref_take(g->ref, (size_t)RANK * m->layer[l].linear[i].rows);
    g->gain = ref_take(g->ref, m->hidden);
    g->nll = ref_loss(g->ref, &r->batch, r->target, w.exit, w.first, g->layer, g->gain);
}

static double worst_distance(rig *r, const grads *g, node_window w, bool mean) {
    const node_model *m = &r->t->model;
    double worst = distance(r->dgain, g->gain, m->hidden, mean);
    for (uint32_t l = w.first; l <= w.last; l++) {
        const float *db = r->db[l];
        for (int i = 0; i < NODE_MODULES; i++) {
            const size_t n = (size_t)RANK * m->layer[l].linear[i].rows;
            const double here = distance(db, g->layer[l].b[i], n, mean);
            if (!(here <= worst)) worst = here;
            db += n;
        }
    }
    return worst;
}

static const tiny_shape shapes[] = {
    {.layers = 4,
     .hidden = 24,
     .ffn = 40,
     .heads = 4,
     .kv_heads = 2,
     .head_size = 6,
     .vocabulary = 67,
     .exits = 2},
    {.layers = 3,
     .hidden = 17,
     .ffn = 19,
     .heads = 3,
     .kv_heads = 1,
     .head_size = 4,
     .vocabulary = 33,
     .exits = 3,
     .rope_half = true,
     .biased = true},
    {.layers = 2,
     .hidden = 64,
     .ffn = 96,
     .heads = 8,
     .kv_heads = 8,
     .head_size = 8,
     .vocabulary = 128,
     .exits = 1},
};

static void test_reference_is_its_own_derivative(void) {
    rig *r = rig_open(&shapes[0], 0, NULL);
    const node_model *m = &r->t->model;
    const node_window w = node_window_of_exit(m, 2, 1);
    grads g;
    grads_open(&g, r, w);
    for (uint32_t l = w.first; l <= w.last + 1; l++) // one past the last: the gain
        for (int i = 0; i < (l > w.last ? 1 : NODE_MODULES); i++)
            for (int k = 0; k < 4; k++) {
                const size_t n = l > w.last ? m->hidden : RANK * m->layer[l].linear[i].rows;
                const size_t at = t_rand() % n;
                double *p = (l > w.last ? g.ref->gain[w.exit] : g.ref->layer[l].b[i]) + at;
                const double got = l > w.last ? g.gain[at] : g.layer[l].b[i][at];
                const double was = *p, h = 1e-5;
                *p = was + h;
                const double up = ref_loss(g.ref, &r->batch, r->target, w.exit, 0, NULL, NULL);
                *p = was - h;
                const double down = ref_loss(g.ref, &r->batch, r->target, w.exit, 0, NULL, NULL);
                *p = was;
                const double want = (up - down) / (2 * h);
                T_NEAR(got, want, 1e-6 * fabs(want) + 1e-9, "layer %u module %d element %zu", l, i,
                       at);
            }
    ref_close(g.ref);
    rig_close(r);
}

static void check_against_reference(const tiny_shape *shape, uint32_t cpu, double tolerance) {
    rig *r = rig_open(shape, cpu, NULL);
    for (uint32_t exit = 0; exit < shape->exits; exit++)
        for (uint32_t size = 1; size <= r->t->model.exit_layer[exit]; size++) {
            const node_window w = node_window_of_exit(&r->t->model, size, exit);
            grads g;
            grads_open(&g, r, w);
            const double nll = step(r, w), worst = worst_distance(r, &g, w, shape->bits != 0);
            T_NEAR(nll, g.nll, 1e-5 * g.nll * (shape->bits == 0 ? 1 : 3000), "loss of exit %u",
                   exit);
            T_CHECK(worst < tolerance, "exit %u, %u layers: %.3g", exit, size, worst);
            ref_close(g.ref);
        }
    rig_close(r);
}

static void test_every_tensor_against_double(void) {
    for (size_t i = 0; i < FL_COUNT(shapes); i++) {
        check_against_reference(&shapes[i], 0, 1e-4);
        check_against_reference(&shapes[i], fl_cpu_detect(), 1e-4);
    }
}

// Packed products read 8-bit activations (relative rounding about 0.006 a product, a dozen of them
// in sequence): the gradient is that of the model without their rounding, within that.
static void test_packed_weights(void) {
    static const uint32_t bits[] = {2, 3, 4, 5, 6, 7, 8};
    for (size_t i = 0; i < FL_COUNT(bits); i++) {
        tiny_shape shape = shapes[2];
        shape.bits = bits[i];
        check_against_reference(&shape, fl_cpu_detect(), 0.08);
    }
}

// (loss(p + h u) - loss(p - h u)) / 2h against |gradient|, u the gradient's direction.
static void test_float_engine_against_its_own_loss(void) {
    for (size_t s = 0; s < FL_COUNT(shapes); s++) {
        rig *r = rig_open(&shapes[s], fl_cpu_detect(), NULL);
        const node_model *m = &r->t->model;
        const uint32_t exit = shapes[s].exits - 1;
        const node_window w = node_window_of_exit(m, 2, exit);
        step(r, w);
        float *grad[16] = {0};
        for (uint32_t l = w.first; l <= w.last; l++) {
            grad[l] = malloc(r->adapter->span_count[l] * sizeof(float));
            memcpy(grad[l], r->db[l], r->adapter->span_count[l] * sizeof(float));
        }
        float gain[64];
        memcpy(gain, r->dgain, m->hidden * sizeof(float));
        for (uint32_t l = w.first; l <= w.last + 1; l++) {
            size_t at = 0;
            for (int i = 0; i < (l > w.last ? 1 : NODE_MODULES); i++) {
                const size_t n = l > w.last ? m->hidden : RANK * m->layer[l].linear[i].rows;
                float *p =
                    l > w.last ? r->adapter->lora.exit_gain[exit] : r->adapter->lora.layer[l].b[i];
                const float *g = l > w.last ? gain : grad[l] + at;
                float *was = malloc((n + 1) * sizeof(float));
                double norm = 0, side[2];
                T_NEED(was != NULL, "memory");
                memcpy(was, p, n * sizeof(float));
                for (size_t k = 0; k < n; k++) norm += (double)g[k] * (double)g[k];
                norm = sqrt(norm);
                for (int sign = 0; sign < 2; sign++) {
                    const float h = (sign == 0 ? 0.03f : -0.03f) / (float)norm;
                    for (size_t k = 0; k < n; k++) p[k] = was[k] + h * g[k];
                    side[sign] = loss_only(r, w);
                }
                memcpy(p, was, n * sizeof(float));
                free(was);
                const double want = (side[0] - side[1]) / 0.06;
                T_NEAR(norm, want, 1e-2 * norm, "shape %zu, layer %u, module %d", s, l, i);
                at += n;
            }
        }
        for (uint32_t l = w.first; l <= w.last; l++) free(grad[l]);
        rig_close(r);
    }
}

static void test_nothing_outside_the_window(void) {
    rig *r = rig_open(&shapes[0], fl_cpu_detect(), NULL);
    const node_window w = {.exit = 1, .first = 1, .last = 3};
    step(r, w);
    for (uint32_t i = 0; i < r->adapter->span_count[0]; i++)
        T_CHECK(r->db[0][i] == 0.0f, "layer 0, element %u", i);
    for (uint32_t l = 1; l < 4; l++) {
        float sum = 0;
        for (uint32_t i = 0; i < r->adapter->span_count[l]; i++) sum += fabsf(r->db[l][i]);
        T_CHECK(sum > 0, "layer %u is trained", l);
    }
    rig_close(r);
}

// What tuning sees as logits is, bit for bit, what evaluation sees: same nats, any chunk.
static void test_train_and_eval_agree(void) {
    for (uint32_t bits = 0; bits <= 4; bits += 4) {
        tiny_shape shape = shapes[2];
        shape.bits = bits;
        rig *r = rig_open(&shape, fl_cpu_detect(), NULL);
        const node_model *m = &r->t->model;
        const node_window w = node_window_of_exit(m, 1, 0);
        float whole[TOKENS * 128], parts[TOKENS * 32];
        forward(r, w);
        node_head_norm(&r->engine, m, node_exit_gain(m, &r->adapter->lora, 0), TOKENS, r->x,
                       r->head.norm);
        node_matmul(&r->engine, &m->head, TOKENS, r->head.norm, whole, r->scratch);
        for (uint32_t at = 0; at < 128; at += 32) {
            node_matmul_rows(&r->engine, &m->head, at, at + 32, TOKENS, r->head.norm, parts,
                             r->scratch);
            for (size_t t = 0; t < TOKENS; t++)
                T_CHECK(memcmp(parts + t * 32, whole + t * 128 + at, 32 * sizeof(float)) == 0,
                        "%u bits, token %zu", bits, t);
        }
        const double eval = loss_only(r, w), train = step(r, w);
        T_NEAR(train, eval, 1e-6, "%u bits", bits);
        rig_close(r);
    }
}

static void test_threads_change_no_bit(void) {
    fl_pool *pool = NULL;
    fl_err err;
    T_OK(fl_pool_open(3, &pool, &err), err);
    for (uint32_t bits = 0; bits <= 4; bits += 4) {
        tiny_shape shape = shapes[2];
        shape.bits = bits;
        t_seed = 9;
        rig *a = rig_open(&shape, fl_cpu_detect(), NULL);
        t_seed = 9;
        rig *b = rig_open(&shape, fl_cpu_detect(), pool);
        const node_window w = node_window_of_exit(&a->t->model, 2, 0);
        const double one = step(a, w), three = step(b, w);
        T_CHECK(one == three, "%.17g and %.17g", one, three);
        for (uint32_t l = 0; l < 2; l++)
            T_CHECK(memcmp(a->db[l], b->db[l], a->adapter->span_count[l] * sizeof(float)) == 0,
                    "%u bits, layer %u", bits, l);
        T_CHECK(memcmp(a->dgain, b->dgain, shape.hidden * sizeof(float)) == 0, "gain");
        rig_close(a);
        rig_close(b);
    }
    fl_pool_close(pool);
}

T_MAIN({"reference_is_its_own_derivative", test_reference_is_its_own_derivative},
       {"every_tensor_against_double", test_every_tensor_against_double},
       {"packed_weights", test_packed_weights},
       {"float_engine_against_its_own_loss", test_float_engine_against_its_own_loss},
       {"nothing_outside_the_window", test_nothing_outside_the_window},
       {"train_and_eval_agree", test_train_and_eval_agree},
       {"threads_change_no_bit", test_threads_change_no_bit})
