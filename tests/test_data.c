// Goal: text becomes documents, parts and micro-batches as data.h says, and bad text is refused
// with a reason. Method: a tokenizer of bytes, so that tokens can be read back as text; properties
// over random documents; every refusal.
#include "common/fault.h"
#include "node/tune/data.h"
#include "tests/check.h"

#include <sys/stat.h>

enum { BEGIN = 1, END = 2, BYTE = 3 }; // ids: unknown, begin, end, then the 256 bytes

static node_tokenizer *byte_tokenizer(void) {
    static char text[259][8];
    static fl_bytes token[259];
    static float score[259];
    static int32_t type[259];
    static const char *const names[] = {"<unk>", "<s>", "</s>"};
    for (int i = 0; i < 259; i++) {
        if (i < 3)
            snprintf(text[i], sizeof(text[i]), "%s", names[i]);
        else
            snprintf(text[i], sizeof(text[i]), "<0x%02X>", (unsigned)(i - BYTE));
        token[i] = (fl_bytes){(const uint8_t *)text[i], strlen(text[i])};
        type[i] = i == 0 ? NODE_TOKEN_UNKNOWN : i < 3 ? NODE_TOKEN_CONTROL : NODE_TOKEN_BYTE;
    }
    const node_vocabulary v = {.model = "llama",
                               .count = 259,
                               .token = token,
                               .score = score,
                               .type = type,
                               .bos = BEGIN,
                               .eos = END,
                               .unknown = 0};
    node_tokenizer *t = NULL;
    fl_err err;
    T_OK(node_tokenizer_open(&v, &t, &err), err);
    return t;
}

static node_corpus *from_text(const char *text, const node_corpus_opts *opts) {
    node_tokenizer *t = byte_tokenizer();
    node_corpus *c = NULL;
    fl_err err;
    T_OK(node_corpus_from_text((fl_bytes){(const uint8_t *)text, strlen(text)}, "a text", t, opts,
                               &c, &err),
         err);
    node_tokenizer_close(t);
    return c;
}

// The bytes of document i. Spaces are U+2581 to this kind of tokenizer; tests avoid them.
static const char *doc_text(const node_docs *docs, uint32_t i) {
    static char out[4096];
    size_t n = 0;
    for (uint64_t k = docs->begin[i]; k < docs->begin[i + 1] && n + 1 < sizeof(out); k++)
        if (docs->ids[k] >= BYTE) out[n++] = (char)(docs->ids[k] - BYTE);
    out[n] = '\0';
    return out;
}

static bool has_doc(const node_docs *docs, const char *text) {
    for (uint32_t i = 0; i < docs->count; i++)
        if (strcmp(doc_text(docs, i), text) == 0) return true;
    return false;
}

static void test_documents_and_parts(void) {
    const node_corpus_opts opts = {0};
    node_corpus *c =
        from_text("one\n<|endoftext|>\ntwo<|endoftext|>\n\n<|endoftext|>three\n", &opts);
    static const char *const want[] = {"one", "two", "three"};
    T_EQ(c->train.count + c->held.count, 3);
    T_CHECK(c->train.count >= 1 && c->held.count >= 1, "both parts have something");
    for (int i = 0; i < 3; i++)
        T_CHECK(has_doc(&c->train, want[i]) != has_doc(&c->held, want[i]), "%s", want[i]);
    for (uint32_t i = 0; i < c->train.count; i++) {
        T_EQ(c->train.ids[c->train.begin[i]], BEGIN);
        T_EQ(c->train.ids[c->train.begin[i + 1] - 1], END);
    }
    node_corpus_close(c);
    const node_corpus_opts all = {.no_split = true};
    c = from_text("one<|endoftext|>two<|endoftext|>three", &all);
    T_EQ(c->train.count, 3);
    T_EQ(c->held.count, 0);
    node_corpus_close(c);
}

// Nothing of a held-out document is trained on, in whatever order the documents come.
static void test_split_is_by_document_alone(void) {
    static char a[8192], b[8192];
    size_t n = 0, m = 0;
    for (int i = 0; i < 200; i++) {
        n += (size_t)snprintf(a + n, sizeof(a) - n, "document-%d<|endoftext|>", i * 7919);
        m += (size_t)snprintf(b + m, sizeof(b) - m, "document-%d<|endoftext|>", (199 - i) * 7919);
    }
    const node_corpus_opts opts = {0};
    node_corpus *x = from_text(a, &opts), *y = from_text(b, &opts);
    T_EQ(x->train.count + x->held.count, 200);
    T_CHECK(x->held.count > 8 && x->held.count < 40, "%u held out", x->held.count);
    T_EQ(x->held.count, y->held.count);
    for (uint32_t i = 0; i < x->held.count; i++) {
        char text[4096];
        snprintf(text, sizeof(text), "%s", doc_text(&x->held, i));
        T_CHECK(has_doc(&y->held, text) && !has_doc(&y->train, text), "%s", text);
    }
    node_corpus_close(x);
    node_corpus_close(y);
}

static void test_long_text_is_cut(void) {
    static char text[40000];
    for (size_t i = 0; i + 1 < sizeof(text); i++)
        text[i] = i % 500 > 497 ? '\n' : (char)('a' + i / 500 % 26);
    const node_corpus_opts opts = {0};
    node_corpus *c = from_text(text, &opts);
    T_CHECK(c->train.count + c->held.count >= 10, "%u", c->train.count + c->held.count);
    node_corpus_close(c);
    memset(text, 'x', sizeof(text) - 1); // no line ends at all
    c = from_text(text, &opts);
    T_CHECK(c->train.count + c->held.count >= 10, "%u", c->train.count + c->held.count);
    T_EQ(node_docs_inputs(&c->train) + node_docs_inputs(&c->held),
         sizeof(text) - 1 + c->train.count + c->held.count);
    node_corpus_close(c);
    const node_corpus_opts whole = {.whole = true};
    c = from_text(text, &whole);
    T_EQ(c->train.count, 1);
    T_EQ(c->train.begin[1], sizeof(text) - 1); // no begin token, no end token
    node_corpus_close(c);
    const node_corpus_opts few = {.tokens_max = 5000};
    c = from_text(text, &few);
    T_CHECK(c->truncated, "it says so");
    T_CHECK(c->memory <= 10000 * sizeof(int32_t) + 1000, "%zu", c->memory);
    T_CHECK(c->held.count > 0, "the limit leaves the held-out part");
    node_corpus_close(c);
}

static void test_bad_text_is_refused(void) {
    static const struct {
        const char *text;
        size_t size;
        fl_status want;
        const char *says;
    } bad[] = {
        {"abc\xff\x64", 5, FL_EFORMAT, "byte 3"},
        {"\xed\xa0\x80", 3, FL_EFORMAT, "UTF-8"}, // a surrogate
        {"ok\xc3", 3, FL_EFORMAT, "byte 2"},      // cut inside a character
        {"\xc0\xaf", 2, FL_EFORMAT, "UTF-8"},     // overlong
        {"a\0b", 3, FL_EFORMAT, "zero bytes"},
        {"", 0, FL_EARG, "no text"},
        {" \n\t\n<|endoftext|>\n", 18, FL_EARG, "no text"},
    };
    node_tokenizer *t = byte_tokenizer();
    const node_corpus_opts opts = {0};
    for (size_t i = 0; i < FL_COUNT(bad); i++) {
        uint8_t *p = t_guarded(bad[i].size);
        memcpy(p, bad[i].text, bad[i].size);
        node_corpus *c = NULL;
        fl_err err = {0};
        T_EQ(node_corpus_from_text((fl_bytes){p, bad[i].size}, "a.txt", t, &opts, &c, &err),
             bad[i].want);
        T_CHECK(strstr(err.text, bad[i].says) != NULL && strstr(err.text, "a.txt") != NULL, "%s",
                err.text);
        T_CHECK(c == NULL, "nothing was given out");
        t_guarded_free(p, bad[i].size);
    }
    node_corpus *c = NULL;
    T_EQ(node_corpus_open("test_data.none", t, &opts, &c, NULL), FL_ENOENT);
    node_tokenizer_close(t);
}

static void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "wb");
    T_NEED(f != NULL, "%s", path);
    fputs(text, f);
    fclose(f);
}

static void test_folder_and_every_failure(void) {
    const char *folder = "test_data.tmp";
    mkdir(folder, 0700);
    write_text("test_data.tmp/b.txt", "from-b");
    write_text("test_data.tmp/a.md", "from-a<|endoftext|>also-a");
    write_text("test_data.tmp/c.bin", "not-read");
    write_text("test_data.tmp/.hidden.txt", "not-read");
    node_tokenizer *t = byte_tokenizer();
    const node_corpus_opts opts = {.no_split = true};
    node_corpus *c = NULL;
    unsigned n = 0;
    fl_status st;
    bool fired = false;
    do {
#ifdef FL_FAULTS
        fl_fault_arm(++n);
#endif
        st = node_corpus_open(folder, t, &opts, &c, NULL);
#ifdef FL_FAULTS
        fired = fl_fault_fired();
        fl_fault_arm(0);
#endif
        T_CHECK((st == FL_OK) == !fired, "fault %u gave %s", n, fl_status_name(st));
        T_CHECK(st == FL_OK || c == NULL, "fault %u", n);
    } while (fired && n < 200);
    T_NEED(c != NULL, "the last run is clean");
    T_EQ(c->train.count, 3);
    T_STR(doc_text(&c->train, 0), "from-a"); // in order of name
    T_STR(doc_text(&c->train, 1), "also-a");
    T_STR(doc_text(&c->train, 2), "from-b");
    node_corpus_close(c);
    node_tokenizer_close(t);
    unlink("test_data.tmp/b.txt");
    unlink("test_data.tmp/a.md");
    unlink("test_data.tmp/c.bin");
    unlink("test_data.tmp/.hidden.txt");
    rmdir(folder);
}

typedef struct pack {
    int32_t ids[4000];
    uint64_t begin[41];
    node_docs docs;
    _Alignas(64) uint8_t block[1 << 16];
    node_batches batches;
    node_micro micro;
} pack;

// 40 documents of 1 to 98 tokens (the first has no input at all), every token different.
static pack *make_pack(uint32_t sequence, uint64_t text_seed, uint64_t seed) {
    pack *p = calloc(1, sizeof(*p));
    T_NEED(p != NULL, "memory");
    for (int i = 0; i < 4000; i++) p->ids[i] = i;
    for (int i = 0; i < 40; i++) p->begin[i + 1] = p->begin[i] + 1 + (i == 0 ? 0 : t_rand() % 98);
    p->docs = (node_docs){p->ids, p->begin, 40};
    fl_arena arena;
    fl_arena_init(&arena, p->block, sizeof(p->block));
    node_batches_bind(&p->batches, &p->docs, sequence, text_seed, seed, &arena);
    node_micro_bind(&p->micro, sequence, &arena);
    return p;
}

static void check_micro(const node_micro *m) {
    T_EQ(m->tokens, m->tokens_max);
    T_EQ(m->scored, m->tokens_max);
    for (uint32_t i = 0; i < m->tokens; i++) {
        T_EQ(m->target[i], m->id[i] + 1);
        T_EQ(m->kv_row[i], i);
        T_EQ(m->kv_begin[i] + m->pos[i], i);
        if (m->pos[i] > 0) T_EQ(m->id[i], m->id[i - 1] + 1);
    }
}

// Every input comes in every epoch, once but for those that fill the last micro-batch; a piece ends
// only with its document or its micro-batch.
static void test_every_input_in_every_epoch(void) {
    for (uint32_t sequence = 16; sequence <= 4096; sequence = sequence * 2 + 5) {
        pack *p = make_pack(sequence, 5, 5);
        const uint64_t inputs = node_docs_inputs(&p->docs);
        const uint32_t count = p->batches.count;
        T_EQ(count, (inputs + sequence - 1) / sequence);
        for (int epoch = 0; epoch < 3; epoch++) {
            uint8_t seen[4000] = {0};
            uint64_t distinct = 0, again = 0;
            for (uint32_t i = 0; i < count; i++) {
                const uint32_t index = node_batches_next(&p->batches);
                T_NEED(index < count, "%u", index);
                T_EQ(p->batches.epoch, epoch);
                node_batches_fill(&p->batches, index, &p->micro);
                check_micro(&p->micro);
                for (uint32_t k = 0; k < sequence; k++) {
                    const int32_t id = p->micro.id[k];
                    distinct += seen[id] == 0, again += seen[id] != 0;
                    seen[id] = 1;
                    if (k + 1 == sequence || p->micro.pos[k + 1] > 0) continue;
                    bool ends = false;
                    for (int d = 0; d < 40; d++) ends = ends || p->begin[d + 1] == (uint64_t)id + 2;
                    T_CHECK(ends, "a piece ends inside a document");
                }
            }
            T_EQ(distinct, inputs);
            T_EQ(again, (uint64_t)count * sequence - inputs);
        }
        free(p);
    }
}

static void test_micro_batches_stay_their_order_does_not(void) {
    pack *p = make_pack(32, 5, 5), *q = make_pack(32, 5, 6), *r = make_pack(32, 6, 5);
    memcpy(q->ids, p->ids, sizeof(p->ids));
    memcpy(q->begin, p->begin, sizeof(p->begin)); // the same text, bound anew
    memcpy(r->begin, p->begin, sizeof(p->begin));
    fl_arena arena;
    fl_arena_init(&arena, q->block, sizeof(q->block));
    node_batches_bind(&q->batches, &q->docs, 32, 5, 6, &arena);
    node_micro_bind(&q->micro, 32, &arena);
    fl_arena_init(&arena, r->block, sizeof(r->block));
    node_batches_bind(&r->batches, &r->docs, 32, 6, 5, &arena);
    node_micro_bind(&r->micro, 32, &arena);
    const uint32_t count = p->batches.count;
    uint32_t same_order = 0, same_text = 0, same_epoch = 0, first[300];
    T_NEED(count > 20 && count < 300, "%u", count);
    memcpy(first, p->batches.order, count * sizeof(*first));
    for (uint32_t i = 0; i < count; i++) {
        same_order += p->batches.order[i] == q->batches.order[i];
        node_batches_fill(&p->batches, i, &p->micro);
        node_batches_fill(&q->batches, i, &q->micro);
        node_batches_fill(&r->batches, i, &r->micro);
        T_CHECK(memcmp(p->micro.id, q->micro.id, 32 * sizeof(int32_t)) == 0, "the text seed alone");
        same_text += memcmp(p->micro.id, r->micro.id, 32 * sizeof(int32_t)) == 0;
    }
    for (uint32_t i = 0; i <= count; i++) node_batches_next(&p->batches); // into the next epoch
    for (uint32_t i = 0; i < count; i++) same_epoch += p->batches.order[i] == first[i];
    T_CHECK(same_order < count / 2, "%u of %u turns", same_order, count);
    T_CHECK(same_epoch < count / 2, "%u of %u turns", same_epoch, count);
    T_CHECK(same_text < count / 2, "%u of %u micro-batches", same_text, count);
    free(p);
    free(q);
    free(r);
}

T_MAIN({"documents_and_parts", test_documents_and_parts},
       {"split_is_by_document_alone", test_split_is_by_document_alone},
       {"long_text_is_cut", test_long_text_is_cut},
       {"bad_text_is_refused", test_bad_text_is_refused},
       {"folder_and_every_failure", test_folder_and_every_failure},
       {"every_input_in_every_epoch", test_every_input_in_every_epoch},
       {"micro_batches_stay_their_order_does_not", test_micro_batches_stay_their_order_does_not})
