// Goal: the same logits and the same losses as independent engines, on real models.
// Method: two very small published models, converted on the fly, against the golden numbers that
// come with them (llama2.c's run.c, float32): logits within 1e-3, losses within 1e-4. SmolLM2-135M
// from the GGUF file in FLEETUNE_SMOLLM2 against transformers (tests/golden/smollm2_wiki.txt):
// perplexity over windows of WikiText-2 within 0.5 %; all 39 windows with FL_TEST_LONG=1, else 3.
// Data: the folder in FLEETUNE_DATA, else ../shared/data beside the sources; exit status 77 when it
// is not there.
#include "common/file.h"
#include "node/model/generate.h"
#include "node/model/tokenizer.h"
#include "tests/check.h"
#include "tests/convert.h"

enum { TOKENS_MAX = 512, STORIES = 24, WINDOW = 512 };

static char folder[512];

static const char *path_of(const char *name) {
    static char path[2][1024];
    static int turn;
    turn = !turn;
    snprintf(path[turn], sizeof(path[turn]), "%s/%s", folder, name);
    return path[turn];
}

static char *read_text(const char *path, size_t *ret_size) {
    uint8_t *data = NULL;
    fl_err err;
    T_OK(fl_file_read(path, (size_t)1 << 28, &data, ret_size, &err), err);
    return (char *)data;
}

// A model and everything it runs on.
typedef struct bench {
    node_model *model;
    node_tokenizer *tokenizer;
    fl_kern kern;
    node_engine engine;
    void *block;
    node_acts acts;
    node_scratch *scratch;
    float *x, *norm, *logits; // [TOKENS_MAX][hidden] twice, [TOKENS_MAX][vocabulary]
    uint32_t rows;            // of logits at a time
    int32_t id[TOKENS_MAX];
    uint32_t pos[TOKENS_MAX], zero[TOKENS_MAX];
} bench;

static void bench_take(bench *b, fl_arena *arena) {
    const node_model *m = b->model;
    node_acts_bind(&b->acts, m, TOKENS_MAX, TOKENS_MAX, 0, arena);
    b->scratch = node_scratch_bind(m, TOKENS_MAX, 2, arena);
    b->x = FL_ARENA_NEW(arena, float, (size_t)TOKENS_MAX * m->hidden);
    b->norm = FL_ARENA_NEW(arena, float, (size_t)TOKENS_MAX * m->hidden);
    b->logits = FL_ARENA_NEW(arena, float, (size_t)b->rows * m->vocabulary);
}

static void bench_open(bench *b, const char *path) {
    fl_err err;
    *b = (bench){.rows = 64};
    T_OK(node_model_open(path, &b->model, &err), err);
    T_OK(node_tokenizer_open_gguf(b->model->file, &b->tokenizer, &err), err);
    fl_kern_select(&b->kern, fl_cpu_detect());
    fl_pool *pool = NULL;
    T_OK(fl_pool_open(2, &pool, &err), err);
    b->engine = (node_engine){&b->kern, pool};
    fl_arena arena;
    fl_arena_init_counting(&arena);
    bench_take(b, &arena);
    const size_t size = arena.peak;
    b->block = aligned_alloc(64, (size + 63) / 64 * 64);
    T_NEED(b->block != NULL, "memory");
    fl_arena_init(&arena, b->block, size);
    bench_take(b, &arena);
    for (uint32_t t = 0; t < TOKENS_MAX; t++) b->pos[t] = t;
}

static void bench_close(bench *b) {
    fl_pool_close(b->engine.pool);
    node_tokenizer_close(b->tokenizer);
    node_model_close(b->model);
    free(b->block);
}

// Final norm of the last hidden states of id[0..tokens) into b->norm.
static void run_layers(bench *b, uint32_t tokens) {
    const node_model *m = b->model;
    const node_batch batch = {tokens, b->id, b->pos, b->zero, b->pos};
    node_embed(&b->engine, m, &batch, b->x);
    for (uint32_t l = 0; l < m->layers; l++)
        node_layer_forward(&b->engine, m, l, NULL, &batch, &b->acts, b->scratch, b->x);
    b->kern.rmsnorm->forward(tokens, m->hidden, m->norm_epsilon, b->x, m->final_norm, b->norm);
}

static void logits_of(bench *b, uint32_t first, uint32_t rows) {
    node_matmul(&b->engine, &b->model->head, rows, b->norm + (size_t)first * b->model->hidden,
                b->logits, b->scratch);
}

// Mean loss of id[1..tokens) in nats; log-softmax in double.
static double mean_nll(bench *b, uint32_t tokens) {
    const uint32_t n = b->model->vocabulary;
    double sum = 0;
    run_layers(b, tokens);
    for (uint32_t first = 0; first + 1 < tokens; first += b->rows) {
        const uint32_t left = tokens - 1 - first, rows = left < b->rows ? left : b->rows;
        logits_of(b, first, rows);
        for (uint32_t t = 0; t < rows; t++) {
            const float *l = b->logits + (size_t)t * n;
            double most = -INFINITY, total = 0;
            for (uint32_t i = 0; i < n; i++) most = fmax(most, (double)l[i]);
            for (uint32_t i = 0; i < n; i++) total += exp((double)l[i] - most);
            sum += most + log(total) - (double)l[b->id[first + t + 1]];
        }
    }
    return sum / (tokens - 1);
}

// "pos P tok T <8 logits> argmax A M" for tokens that were run together.
static void check_positions(bench *b, const char *golden, double tolerance) {
    uint32_t tokens = 0, seen = 0;
    for (const char *line = golden; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n';
        int pos, id;
        if (sscanf(line, "pos %d tok %d", &pos, &id) == 2 && (uint32_t)pos == tokens)
            b->id[tokens++] = id;
    }
    T_NEED(tokens > 4 && tokens <= b->rows, "golden positions");
    run_layers(b, tokens);
    logits_of(b, 0, tokens);
    for (const char *line = golden; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n';
        int pos, id, argmax;
        double want[8], most;
        if (sscanf(line, "pos %d tok %d %lf %lf %lf %lf %lf %lf %lf %lf argmax %d %lf", &pos, &id,
                   &want[0], &want[1], &want[2], &want[3], &want[4], &want[5], &want[6], &want[7],
                   &argmax, &most) != 12)
            continue;
        const float *l = b->logits + (size_t)pos * b->model->vocabulary;
        for (int i = 0; i < 8; i++) T_NEAR((double)l[i], want[i], tolerance, "pos %d, %d", pos, i);
        uint32_t best = 0;
        for (uint32_t i = 1; i < b->model->vocabulary; i++)
            if (l[i] > l[best]) best = i;
        T_EQ(best, argmax);
        T_NEAR((double)l[best], most, tolerance, "pos %d, the largest", pos);
        seen++;
    }
    T_EQ(seen, tokens);
}

static fl_bytes strip(const char *begin, const char *end) {
    while (begin < end && strchr(" \t\r\n", *begin) != NULL) begin++;
    while (end > begin && strchr(" \t\r\n", end[-1]) != NULL) end--;
    return (fl_bytes){(const uint8_t *)begin, (size_t)(end - begin)};
}

// bos, the story, and for the second model eos; cut at 512.
static uint32_t encode_story(bench *b, fl_bytes story, bool add_eos) {
    static int32_t ids[1 << 16];
    size_t count = 0;
    fl_err err;
    T_OK(node_tokenizer_encode(b->tokenizer, story, NODE_ENCODE_ENDS, ids, FL_COUNT(ids), &count,
                               &err),
         err);
    if (add_eos) ids[count++] = 2;
    if (count > TOKENS_MAX) count = TOKENS_MAX;
    memcpy(b->id, ids, count * sizeof(ids[0]));
    return (uint32_t)count;
}

static void check_stories(bench *b, const char *golden, bool add_eos) {
    size_t size;
    char *text = read_text(path_of("text/tinystories_sample_2MiB.txt"), &size);
    const char *at = text, *line = golden;
    double sum = 0;
    long total = 0;
    for (int i = 0; i < STORIES; i++) {
        const char *end = strstr(at, "<|endoftext|>");
        T_NEED(end != NULL, "story %d", i);
        const uint32_t tokens = encode_story(b, strip(at, end), add_eos);
        at = end + strlen("<|endoftext|>");
        char mark[32];
        snprintf(mark, sizeof(mark), "\nline %d tokens ", i);
        line = strstr(line, mark);
        int want_tokens = 0;
        double want = 0;
        T_NEED(line != NULL && sscanf(line + strlen(mark), "%d nll %lf", &want_tokens, &want) == 2,
               "golden line %d", i);
        T_EQ(tokens, want_tokens);
        const double nll = mean_nll(b, tokens);
        T_NEAR(nll, want, 1e-4, "story %d", i);
        sum += nll * (tokens - 1);
        total += (long)tokens - 1;
    }
    printf("%ld tokens predicted, mean loss %.6f\n", total, sum / (double)total);
    free(text);
}

static void check_model(const char *converted, const char *golden_name, bool add_eos) {
    size_t size;
    bench b;
    bench_open(&b, converted);
    unlink(converted);
    char *golden = read_text(path_of(golden_name), &size);
    check_positions(&b, golden, 1e-3);
    check_stories(&b, golden, add_eos);
    free(golden);
    bench_close(&b);
}

static const char stories[] = "stories260K.tmp.gguf";

static void make_stories260k(void) {
    t_convert_llama2c(path_of("models/stories260K/stories260K.bin"),
                      path_of("models/stories260K/tok512.bin"), stories);
}

static void test_stories260k(void) {
    make_stories260k();
    check_model(stories, "models/stories260K/golden.txt", false);
}

// The most probable token after the last one fed; keys and values of all before are kept.
static int32_t next_token(bench *b, node_session *s, int32_t id) {
    const node_model *m = b->model;
    const float *hidden = NULL;
    fl_err err;
    T_OK(node_session_feed(s, &b->engine, NULL, &id, 1, &hidden, &err), err);
    b->kern.rmsnorm->forward(1, m->hidden, m->norm_epsilon,
                             hidden + (size_t)(m->exits - 1) * m->hidden, m->final_norm, b->norm);
    logits_of(b, 0, 1);
    int32_t best = 0;
    for (uint32_t i = 1; i < m->vocabulary; i++)
        if (b->logits[i] > b->logits[best]) best = (int32_t)i;
    return best;
}

// The text that the model's own page gives for temperature 0.
static void test_stories260k_tells_its_story(void) {
    size_t size, text_size = 0;
    fl_err err;
    bench b;
    make_stories260k();
    bench_open(&b, stories);
    unlink(stories);
    const node_session_opts opts = {257, 1, 2, 0};
    T_OK(node_session_plan(b.model, &opts, &size, &err), err);
    void *block = aligned_alloc(64, (size + 63) / 64 * 64);
    fl_arena arena;
    fl_arena_init(&arena, block, size);
    node_session *s = node_session_bind(b.model, &opts, &arena);
    int32_t ids[257] = {node_tokenizer_bos(b.tokenizer)};
    for (size_t i = 1; i < 257; i++) ids[i] = next_token(&b, s, ids[i - 1]);
    uint8_t text[4096] = {0};
    T_OK(node_tokenizer_decode(b.tokenizer, ids + 1, 256, false, text, sizeof(text) - 1, &text_size,
                               &err),
         err);
    char *page = read_text(path_of("models/stories260K/stories260K.md"), &size);
    char *want = strstr(page, "-t 0.0\n");
    T_NEED(want != NULL, "the page's text");
    want += strlen("-t 0.0\n");
    char *end = strstr(want, "\n```");
    T_NEED(end != NULL, "its end");
    *end = '\0';
    T_STR((char *)text, want);
    free(page);
    free(block);
    bench_close(&b);
}

static void test_tinystories656k(void) {
    static const char out[] = "TinyStories-656K.tmp.gguf";
    t_convert_safetensors(path_of("models/TinyStories-656K"), out);
    check_model(out, "models/TinyStories-656K/golden.txt", true);
}

static void check_perplexity(bench *b, const char *golden) {
    size_t size, count = 0;
    fl_err err;
    char *text = read_text(path_of("text/wiki.valid.tokens"), &size);
    const size_t room = node_tokenizer_ids_max(size);
    int32_t *ids = calloc(room, sizeof(*ids));
    const fl_bytes bytes = {(const uint8_t *)text, size};
    T_OK(node_tokenizer_encode(b->tokenizer, bytes, 0, ids, room, &count, &err), err);
    const int windows = getenv("FL_TEST_LONG") != NULL ? 39 : 3;
    double got = 0, want = 0;
    for (int i = 0; i < windows; i++) {
        char mark[32];
        double nll;
        snprintf(mark, sizeof(mark), "\nwindow %d nll ", i);
        const char *line = strstr(golden, mark);
        T_NEED(line != NULL && sscanf(line + strlen(mark), "%lf", &nll) == 1, "window %d", i);
        memcpy(b->id, ids + (size_t)i * WINDOW, WINDOW * sizeof(*ids));
        const double mine = mean_nll(b, WINDOW);
        T_NEAR(mine, nll, 0.02, "window %d", i);
        got += mine / windows;
        want += nll / windows;
    }
    printf(
        "SmolLM2 on WikiText-2, %d windows of %d: perplexity %.4f, independent %.4f (%+.4f %%)\n",
        windows, WINDOW, exp(got), exp(want), 100 * (exp(got - want) - 1));
    T_NEAR(exp(got) / exp(want), 1, 0.005, "perplexity");
    free(ids);
    free(text);
}

static void test_smollm2(void) {
    const char *path = getenv("FLEETUNE_SMOLLM2");
    if (path == NULL || access(path, R_OK) != 0)
        T_SKIP("SmolLM2: set FLEETUNE_SMOLLM2 to its GGUF file");
    size_t size;
    bench b;
    bench_open(&b, path);
    char *golden = read_text(FL_GOLDEN_FOLDER "/smollm2_wiki.txt", &size);
    check_positions(&b, golden, 5e-3);
    check_perplexity(&b, golden);
    free(golden);
    bench_close(&b);
}

static bool find_folder(void) {
    const char *from = getenv("FLEETUNE_DATA");
    snprintf(folder, sizeof(folder), "%s", from != NULL ? from : FL_DATA_FOLDER);
    return access(path_of("models/stories260K/golden.txt"), R_OK) == 0;
}

int main(int argc, char **argv) {
    static const t_case cases[] = {
        {"stories260k", test_stories260k},
        {"stories260k_tells_its_story", test_stories260k_tells_its_story},
        {"tinystories656k", test_tinystories656k},
        {"smollm2", test_smollm2}};
    if (!find_folder()) {
        fprintf(stderr, "no data in %s: set FLEETUNE_DATA\n", folder);
        return 77;
    }
    return t_main(argc, argv, cases, FL_COUNT(cases));
}
