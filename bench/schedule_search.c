// The scheduler's choice beside an exhaustive search, and its predictions beside measurements, on
// one profile of a machine: a number of threads and a limit of memory.
//   schedule_search MODEL [--data=PATH] [--threads=N] [--memory=MIB] [--folder=CACHE] [--predict]
//                   [--coarse]
// Without --predict: measures every (threads, chunk, kept layers) that fits with the choice's
// window and sequence, then the best few, the choice and a fixed default in turn. With it: steps of
// windows 1 to half of the layers, sequences of 32 to 256, 1 and 4 a step, predicted and measured.
// --coarse: fewer of both, where the machine is not one's own for long. --smoke: a small model.
// Without --data the tokens are random.
#include "common/clock.h"
#include "node/commands/choose.h"
#include "node/model/tokenizer.h"
#include "tests/tiny_model.h"

enum { GRID_MAX = 4096, FINAL = 4, TURNS = 3, TOKENS = 8192 };

typedef struct args {
    const char *model, *data, *folder;
    uint32_t threads;
    uint64_t memory;
    bool smoke, predict, coarse;
} args;

static args parse(int argc, char **argv) {
    args a = {.folder = "", .threads = 2};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--smoke") == 0) a.smoke = true;
        if (strcmp(argv[i], "--coarse") == 0) a.coarse = true;
        if (strcmp(argv[i], "--predict") == 0) a.predict = true;
        if (strncmp(argv[i], "--data=", 7) == 0) a.data = argv[i] + 7;
        if (strncmp(argv[i], "--folder=", 9) == 0) a.folder = argv[i] + 9;
        if (strncmp(argv[i], "--threads=", 10) == 0)
            a.threads = (uint32_t)strtoul(argv[i] + 10, NULL, 10);
        if (strncmp(argv[i], "--memory=", 9) == 0) a.memory = strtoull(argv[i] + 9, NULL, 10) << 20;
        if (argv[i][0] != '-') a.model = argv[i];
    }
    return a;
}

static void need(fl_status st, const fl_err *err) {
    if (st == FL_OK) return;
    fprintf(stderr, "schedule_search: %s\n", err->text);
    exit(1);
}

static uint32_t disturbed; // measurements that others took part of the machine from

// The median of `runs` steps; again, a few times, while other processes are busy.
static double step_s(const node_job *job, const node_choice *c, uint32_t runs) {
    enum { TRIES = 2 };
    const double foreign_max = 0.06; // processors, on average
    fl_err err;
    double best = 0;
    for (int i = 0; i < TRIES; i++) {
        double seconds = 0;
        const double busy = node_busy_s(""), own = node_busy_own_s(), start = fl_clock_s();
        need(node_job_time(job, c, runs, &seconds, &err), &err);
        const double foreign = (node_busy_s("") - busy) - (node_busy_own_s() - own);
        if (best == 0 || seconds < best) best = seconds;
        if (foreign < foreign_max * (fl_clock_s() - start) + 0.02) return best;
    }
    disturbed++;
    return best;
}

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int faster(const void *a, const void *b) {
    const node_choice *x = a, *y = b;
    return (x->measured > y->measured) - (x->measured < y->measured);
}

static double rate(const node_choice *c, double seconds) {
    return (double)c->micro_batch * c->sequence / seconds;
}

static void print_choice(const char *name, const node_choice *c, double predicted_s) {
    printf("%-10s %u threads, window %2u, %u x %3u tokens, chunk %4u, %2u kept, %6.1f MB: "
           "%7.1f tokens/s",
           name, c->threads, c->window, c->micro_batch, c->sequence, c->chunk, c->kept,
           (double)c->peak_bytes / 1e6, rate(c, c->measured));
    if (predicted_s > 0)
        printf(", predicted %7.1f (%+.1f %%)", rate(c, predicted_s),
               100 * (c->measured / predicted_s - 1));
    printf("\n");
}

// Every way to run what is learned by `like` that fits the memory; coarse: every other power of two
// of the chunk, nothing, half or everything kept.
static uint32_t grid(const node_job *job, const node_choice *like, bool coarse, node_choice *ret) {
    const uint32_t step = coarse ? (like->window + 1) / 2 : 1;
    uint32_t count = 0;
    for (uint32_t t = 1; t <= job->threads_max; t++)
        for (uint32_t chunk = 2048; chunk >= 64; chunk /= coarse ? 4 : 2)
            for (uint32_t k = 0; k < like->window + step && count < GRID_MAX; k += step) {
                node_choice c = *like;
                node_tune_opts opts;
                node_tune_plan plan;
                c.threads = t, c.chunk = chunk, c.kept = k < like->window ? k : like->window;
                node_job_opts(job, &c, &opts);
                node_tune_measure(job->model, job->adapter->opts.rank, job->docs, &opts, &plan);
                c.peak_bytes = plan.peak_bytes;
                if (opts.memory_bytes != 0 && c.peak_bytes > opts.memory_bytes) continue;
                ret[count++] = c;
            }
    return count;
}

// What is done without a scheduler: all threads, and everything kept with large chunks where that
// fits, else nothing kept with smaller ones.
static node_choice fixed_default(const node_job *job, const node_choice *like,
                                 const node_choice *all, uint32_t count) {
    node_choice c = *like;
    c.threads = job->threads_max;
    c.chunk = 2048, c.kept = like->window;
    for (uint32_t i = 0; i < count; i++)
        if (all[i].threads == c.threads && all[i].chunk == c.chunk && all[i].kept == c.kept)
            return all[i];
    c.chunk = 1024, c.kept = 0;
    return c;
}

static void search(const node_job *job, const node_schedule *s, const args *a) {
    const uint32_t runs = a->smoke ? 1 : 2;
    static node_choice all[GRID_MAX];
    const uint32_t count = grid(job, &s->choice, a->coarse, all);
    for (uint32_t i = 0; i < count; i++) all[i].measured = step_s(job, &all[i], 1);
    qsort(all, count, sizeof(*all), faster);
    // The best of many noisy numbers is too good: the first few, the choice and the fixed default
    // again, in turn.
    const uint32_t few = count < FINAL ? count : FINAL;
    node_choice last[FINAL + 2];
    double times[FINAL + 2][TURNS];
    memcpy(last, all, few * sizeof(*last));
    last[few] = s->choice;
    last[few + 1] = fixed_default(job, &s->choice, all, count);
    for (uint32_t k = 0; k < TURNS; k++)
        for (uint32_t i = 0; i < few + 2; i++) times[i][k] = step_s(job, &last[i], runs);
    node_choice best = {.measured = 0};
    for (uint32_t i = 0; i < few + 2; i++) {
        qsort(times[i], TURNS, sizeof(double), compare);
        last[i].measured = times[i][TURNS / 2];
        if (best.measured == 0 || last[i].measured < best.measured) best = last[i];
    }
    const node_choice *choice = &last[few], *fixed = &last[few + 1];
    print_choice("choice", choice, node_cost_step(&s->cost, choice, job->model->layers));
    print_choice("best", &best, 0);
    print_choice("fixed", fixed, 0);
    print_choice("worst", &all[count - 1], 0);
    printf("choice / best %.3f, choice / fixed default %.3f, of %u measured candidates (%u peaks "
           "asked for, %u measurements disturbed)\n",
           best.measured / choice->measured, fixed->measured / choice->measured, count, s->seen,
           disturbed);
}

static void predict(const node_job *job, const node_schedule *s, const args *a) {
    const uint32_t runs = a->coarse ? 1 : 3;
    const uint32_t half = job->model->layers / 2;
    const uint32_t windows[] = {1, half > 8 ? 4 : half, half > 8 ? 8 : half, half};
    double worst = 0, sum = 0;
    int count = 0, within = 0;
    for (uint32_t n = 32; n <= 256; n *= 2)
        for (uint32_t micro = 1; micro <= 4; micro += 3)
            for (size_t w = 0; w < FL_COUNT(windows); w++) {
                if (w > 0 && windows[w] == windows[w - 1]) continue;
                node_choice c = {.threads = job->threads_max,
                                 .window = windows[w],
                                 .micro_batch = micro,
                                 .sequence = n,
                                 .chunk = w % 2 == 0 ? 1024 : 512,
                                 .kept = w % 2 == 0 ? 0 : windows[w]};
                node_job fixed = *job;
                fixed.opts.window.size = c.window;
                fixed.opts.memory_bytes = 0;
                c.measured = step_s(&fixed, &c, runs);
                const double p = node_cost_step(&s->cost, &c, job->model->layers);
                const double off = fabs(c.measured / p - 1);
                print_choice("", &c, p);
                worst = off > worst ? off : worst;
                sum += off;
                count++;
                within += off <= 0.15;
            }
    printf("%d steps: mean error %.1f %%, largest %.1f %%, %d within 15 %% (%u disturbed)\n", count,
           100 * sum / count, 100 * worst, within, disturbed);
}

static void open_docs(const args *a, const node_model *m, node_docs *ret) {
    fl_err err = {0};
    if (a->data != NULL) {
        node_tokenizer *tokenizer = NULL;
        node_corpus *corpus = NULL; // ends with the program
        const node_corpus_opts opts = {0};
        need(node_tokenizer_open_gguf(m->file, &tokenizer, &err), &err);
        need(node_corpus_open(a->data, tokenizer, &opts, &corpus, &err), &err);
        *ret = corpus->train;
        node_tokenizer_close(tokenizer);
        return;
    }
    static int32_t ids[TOKENS];
    static const uint64_t begin[] = {0, TOKENS};
    for (int i = 0; i < TOKENS; i++) ids[i] = (int32_t)(t_rand() % m->vocabulary);
    *ret = (node_docs){ids, begin, 1};
}

static void show(const node_schedule *s) {
    const node_rates *r = &s->cost.rates;
    for (uint32_t n = 1; n <= r->threads; n++)
        printf(
            "%u threads: %.0f Gop/s products, %.0f gradients, %.0f attention; %.1f GB/s of packed "
            "weights, %.1f of memory; prefill %.0f, decode %.0f tokens/s predicted\n",
            n, r->packed_ops[n] / 1e9, r->float_ops[n] / 1e9, r->attention_ops[n] / 1e9,
            r->stream_bytes[n] / 1e9, r->read_bytes[n] / 1e9, node_cost_prefill(&s->cost, n, 512),
            node_cost_decode(&s->cost, n));
    printf("storage %.2f GB/s\n", r->storage_bytes / 1e9);
}

int main(int argc, char **argv) {
    const args a = parse(argc, argv);
    const tiny_shape shape = {.layers = 4,
                              .hidden = 64,
                              .ffn = 128,
                              .heads = 4,
                              .kv_heads = 2,
                              .head_size = 16,
                              .vocabulary = 512,
                              .exits = 2,
                              .bits = 4};
    tiny_model *tiny = a.model == NULL ? tiny_open(&shape) : NULL;
    node_model *model = tiny == NULL ? NULL : &tiny->model;
    fl_err err = {0};
    if (tiny == NULL) need(node_model_open(a.model, &model, &err), &err);
    const node_adapter_opts adapter_opts = node_adapter_defaults();
    node_adapter *adapter = NULL;
    need(node_adapter_open(model, &adapter_opts, &adapter, &err), &err);
    node_facts facts;
    fl_kern kern;
    node_docs docs;
    node_facts_read("", &facts);
    fl_kern_select(&kern, facts.cpu);
    open_docs(&a, model, &docs);
    node_job job = {.kern = &kern,
                    .facts = &facts,
                    .model = model,
                    .adapter = adapter,
                    .docs = &docs,
                    .opts = node_tune_defaults(),
                    .threads_max = a.threads,
                    .steps = UINT64_MAX,
                    .folder = a.folder,
                    .path = a.model == NULL ? "" : a.model};
    job.opts.threads = 0;
    if (a.smoke) job.opts.window.size = 2; // short under emulation too
    job.opts.memory_bytes = a.memory;
    static node_schedule s;
    setvbuf(stdout, NULL, _IOLBF, 0);
    const double start = fl_clock_s(), own = node_busy_own_s(), busy = node_busy_s("");
    need(node_schedule_make(&job, &s, &err), &err);
    printf("chosen in %.2f s, %.2f processor seconds of others meanwhile\n", fl_clock_s() - start,
           node_busy_s("") - busy - (node_busy_own_s() - own));
    show(&s);
    (a.predict ? predict : search)(&job, &s, &a);
    node_adapter_close(adapter);
    if (tiny == NULL) node_model_close(model);
    if (tiny != NULL) tiny_close(tiny);
    return 0;
}
