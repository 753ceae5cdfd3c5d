// From files to documents to tokens.
#include "common/fault.h"
#include "common/file.h"
#include "node/model/unicode.h"
#include "node/tune/data.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { CUT_SIZE = 2000, FILES_MAX = 4096, PATH_SIZE = 4096 };
static const char mark[] = "<|endoftext|>";

// Documents found so far, as views into the texts, and the texts themselves.
typedef struct collector {
    fl_bytes *doc;
    size_t count, room;
    uint8_t **text;
    size_t texts;
    uint64_t bytes;
    const node_corpus_opts *opts;
} collector;

static fl_status add_doc(collector *c, fl_bytes doc, fl_err *err) {
    while (doc.size > 0 && !c->opts->whole && strchr(" \t\r\n", doc.data[0]) != NULL)
        doc.data++, doc.size--;
    while (doc.size > 0 && !c->opts->whole && strchr(" \t\r\n", doc.data[doc.size - 1]) != NULL)
        doc.size--;
    if (doc.size == 0) return FL_OK;
    if (c->count == c->room) {
        const size_t room = c->room == 0 ? 64 : 2 * c->room;
        fl_bytes *grown = fl_fault() ? NULL : realloc(c->doc, room * sizeof(*grown));
        if (grown == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for %zu documents", room);
        c->doc = grown;
        c->room = room;
    }
    c->doc[c->count++] = doc;
    return FL_OK;
}

// The end of a document of about CUT_SIZE bytes: after a blank line, else after a line, else
// between characters.
static size_t cut_at(fl_bytes text) {
    if (text.size <= CUT_SIZE + CUT_SIZE / 2) return text.size;
    const size_t end = text.size < 4 * CUT_SIZE ? text.size : 4 * CUT_SIZE;
    for (size_t i = CUT_SIZE; i + 1 < end; i++)
        if (text.data[i] == '\n' && text.data[i - 1] == '\n') return i + 1;
    for (size_t i = CUT_SIZE; i + 1 < end; i++)
        if (text.data[i] == '\n') return i + 1;
    size_t at = CUT_SIZE;
    while (at < text.size && (text.data[at] & 0xc0) == 0x80) at++;
    return at;
}

static fl_status split_text(collector *c, fl_bytes text, fl_err *err) {
    if (c->opts->whole) return add_doc(c, text, err);
    const uint8_t *found = memmem(text.data, text.size, mark, sizeof(mark) - 1);
    if (found == NULL) {
        while (text.size > 0) {
            const size_t n = cut_at(text);
            FL_TRY(add_doc(c, (fl_bytes){text.data, n}, err));
            text = (fl_bytes){text.data + n, text.size - n};
        }
        return FL_OK;
    }
    while (found != NULL) {
        const size_t n = (size_t)(found - text.data);
        FL_TRY(add_doc(c, (fl_bytes){text.data, n}, err));
        text = (fl_bytes){found + sizeof(mark) - 1, text.size - n - (sizeof(mark) - 1)};
        found = memmem(text.data, text.size, mark, sizeof(mark) - 1);
    }
    return add_doc(c, text, err);
}

static fl_status take_text(collector *c, fl_bytes text, const char *name, fl_err *err) {
    const size_t bad = node_utf8_check(text);
    if (bad != text.size)
        return FL_FAIL(err, FL_EFORMAT, "%s is not UTF-8 text: byte %zu is wrong; convert it first",
                       name, bad);
    if (memchr(text.data, 0, text.size) != NULL)
        return FL_FAIL(err, FL_EFORMAT, "%s holds zero bytes: it is not a text", name);
    c->bytes += text.size;
    if (c->bytes > NODE_CORPUS_BYTES_MAX)
        return FL_FAIL(err, FL_ELIMIT, "the texts have more than %d bytes", NODE_CORPUS_BYTES_MAX);
    return split_text(c, text, err);
}

static fl_status take_file(collector *c, const char *path, fl_err *err) {
    uint8_t *data = NULL;
    size_t size = 0;
    FL_TRY(fl_file_read(path, NODE_CORPUS_BYTES_MAX, &data, &size, err));
    uint8_t **grown = fl_fault() ? NULL : realloc(c->text, (c->texts + 1) * sizeof(*grown));
    if (grown == NULL) {
        free(data);
        return FL_FAIL(err, FL_ENOMEM, "no memory to read %s", path);
    }
    c->text = grown;
    c->text[c->texts++] = data;
    return take_text(c, (fl_bytes){data, size}, path, err);
}

static int is_text_name(const struct dirent *e) {
    static const char *const ends[] = {".txt", ".md", ".text", ".raw", ".tokens"};
    const size_t n = strlen(e->d_name);
    for (size_t i = 0; i < FL_COUNT(ends); i++) {
        const size_t m = strlen(ends[i]);
        if (e->d_name[0] != '.' && n > m && strcmp(e->d_name + n - m, ends[i]) == 0) return 1;
    }
    return 0;
}

static fl_status take_folder(collector *c, const char *path, fl_err *err) {
    struct dirent **entry = NULL;
    const int count = scandir(path, &entry, is_text_name, alphasort);
    if (count < 0) return FL_FAIL(err, FL_EIO, "cannot list the folder %s", path);
    fl_status st = FL_OK;
    if (count > FILES_MAX)
        st = FL_FAIL(err, FL_ELIMIT, "%s holds %d texts, more than %d", path, count, FILES_MAX);
    for (int i = 0; i < count; i++) {
        char name[PATH_SIZE];
        const int n = snprintf(name, sizeof(name), "%s/%s", path, entry[i]->d_name);
        if (st == FL_OK && (size_t)n < sizeof(name)) st = take_file(c, name, err);
        free(entry[i]);
    }
    free(entry);
    return st;
}

// Lowest hash first is held out; the hash is of the text alone.
static uint64_t hash_of(fl_bytes doc) {
    uint64_t h = 0xcbf29ce484222325u; // FNV-1a
    for (size_t i = 0; i < doc.size; i++) h = (h ^ doc.data[i]) * 0x100000001b3u;
    return (h ^ h >> 32) * 0x9e3779b97f4a7c15u;
}

static void mark_held(const collector *c, bool *held) {
    size_t held_count = 0, lowest = 0, highest = 0;
    if (c->opts->no_split || c->opts->whole || c->count < 2) return;
    for (size_t i = 0; i < c->count; i++) {
        const uint64_t h = hash_of(c->doc[i]);
        held[i] = h < UINT64_MAX / 10;
        held_count += held[i];
        if (h < hash_of(c->doc[lowest])) lowest = i;
        if (h > hash_of(c->doc[highest])) highest = i;
    }
    if (held_count == 0) held[lowest] = true;
    if (held_count == c->count) held[highest] = false;
}

// Where tokens go; both parts of the corpus share one array, the trained part first.
typedef struct sink {
    const node_tokenizer *tokenizer;
    const node_corpus_opts *opts;
    int32_t begin_id, end_id;
    uint64_t tokens_max, tokens, room;
    int32_t *ids;
    uint64_t *begin; // of each document
    uint32_t docs;
    bool truncated;
} sink;

static fl_status need_room(sink *s, uint64_t more, fl_err *err) {
    if (s->tokens + more <= s->room) return FL_OK;
    const uint64_t room = (s->tokens + more) * 3 / 2 + 4096;
    int32_t *grown = fl_fault() ? NULL : realloc(s->ids, room * sizeof(*grown));
    if (grown == NULL)
        return FL_FAIL(err, FL_ENOMEM, "no memory for %llu tokens", (unsigned long long)room);
    s->ids = grown;
    s->room = room;
    return FL_OK;
}

static fl_status encode_doc(sink *s, fl_bytes doc, fl_err *err) {
    const size_t ids_max = node_tokenizer_ids_max(doc.size);
    size_t count = 0;
    if (s->truncated) return FL_OK;
    FL_TRY(need_room(s, ids_max + 2, err));
    const uint64_t first = s->tokens;
    const bool ends = !s->opts->whole;
    if (ends && s->begin_id >= 0) s->ids[s->tokens++] = s->begin_id;
    FL_TRY(node_tokenizer_encode(s->tokenizer, doc, 0, s->ids + s->tokens, ids_max, &count, err));
    s->tokens += count;
    if (ends && s->end_id >= 0) s->ids[s->tokens++] = s->end_id;
    if (s->tokens > s->tokens_max) {
        s->tokens = s->tokens_max;
        s->truncated = true;
    }
    if (s->tokens < first + 2) { // nothing to predict
        s->tokens = first;
        return FL_OK;
    }
    s->begin[s->docs++] = first;
    return FL_OK;
}

static fl_status encode_part(sink *s, const collector *c, const bool *held, bool want,
                             fl_err *err) {
    for (size_t i = 0; i < c->count; i++)
        if (held[i] == want) FL_TRY(encode_doc(s, c->doc[i], err));
    s->begin[s->docs] = s->tokens;
    return FL_OK;
}

// SmolLM2 and GPT-2 put `<|endoftext|>` between documents; others have a begin and an end token.
static void choose_ends(sink *s) {
    const int32_t between = node_tokenizer_special(s->tokenizer, mark);
    s->begin_id = between >= 0 ? between : node_tokenizer_bos(s->tokenizer);
    s->end_id = between >= 0 ? between : node_tokenizer_eos(s->tokenizer);
    if (s->begin_id < 0) s->begin_id = s->end_id;
}

static fl_status build(const collector *c, const node_tokenizer *tokenizer, const bool *held,
                       node_corpus *corpus, fl_err *err) {
    sink s = {.tokenizer = tokenizer, .opts = c->opts};
    choose_ends(&s);
    s.tokens_max = c->opts->tokens_max != 0 ? c->opts->tokens_max : NODE_CORPUS_TOKENS_MAX;
    s.begin = fl_fault() ? NULL : calloc(c->count + 2, sizeof(*s.begin));
    if (s.begin == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for %zu documents", c->count);
    corpus->begin = s.begin;
    // The held-out part first: a limit on tokens must not leave it empty.
    fl_status st = encode_part(&s, c, held, true, err);
    const uint32_t held_docs = s.docs;
    if (s.truncated) s.tokens_max = s.tokens + s.tokens_max; // then as much again to train on
    s.truncated = false;
    if (st == FL_OK) st = encode_part(&s, c, held, false, err);
    corpus->ids = s.ids;
    if (st != FL_OK) return st;
    int32_t *shrunk = s.tokens == 0 ? NULL : realloc(s.ids, s.tokens * sizeof(*s.ids));
    if (shrunk != NULL) corpus->ids = s.ids = shrunk;
    corpus->held = (node_docs){s.ids, s.begin, held_docs};
    corpus->train = (node_docs){s.ids, s.begin + held_docs, s.docs - held_docs};
    corpus->bytes = c->bytes;
    corpus->truncated = s.truncated;
    corpus->memory = s.tokens * sizeof(*s.ids) + (c->count + 2) * sizeof(*s.begin);
    return FL_OK;
}

// Takes the collected documents and frees the collector.
static fl_status finish(collector *c, const char *name, const node_tokenizer *tokenizer,
                        fl_status st, node_corpus **ret, fl_err *err) {
    bool *held = NULL;
    node_corpus *corpus = NULL;
    if (st != FL_OK) goto out;
    if (c->count == 0) {
        st = FL_FAIL(err, FL_EARG, "%s holds no text", name);
        goto out;
    }
    held = fl_fault() ? NULL : calloc(c->count, sizeof(*held));
    corpus = held == NULL || fl_fault() ? NULL : calloc(1, sizeof(*corpus));
    if (corpus == NULL) {
        st = FL_FAIL(err, FL_ENOMEM, "no memory for %zu documents", c->count);
        goto out;
    }
    mark_held(c, held);
    st = build(c, tokenizer, held, corpus, err);
    if (st == FL_OK && corpus->train.count == 0)
        st = FL_FAIL(err, FL_EARG, "%s holds too little text: not one pair of tokens", name);
    if (st != FL_OK) goto out;
    *ret = corpus;
    corpus = NULL;
out:
    node_corpus_close(corpus);
    free(held);
    free(c->doc);
    for (size_t i = 0; i < c->texts; i++) free(c->text[i]);
    free(c->text);
    return st;
}

fl_status node_corpus_open(const char *path, const node_tokenizer *tokenizer,
                           const node_corpus_opts *opts, node_corpus **ret, fl_err *err) {
    collector c = {.opts = opts};
    struct stat info;
    fl_status st;
    if (stat(path, &info) != 0)
        st = FL_FAIL(err, FL_ENOENT, "there is no file or folder %s", path);
    else
        st = S_ISDIR(info.st_mode) ? take_folder(&c, path, err) : take_file(&c, path, err);
    return finish(&c, path, tokenizer, st, ret, err);
}

fl_status node_corpus_from_text(fl_bytes text, const char *name, const node_tokenizer *tokenizer,
                                const node_corpus_opts *opts, node_corpus **ret, fl_err *err) {
    collector c = {.opts = opts};
    const fl_status st = take_text(&c, text, name, err);
    return finish(&c, name, tokenizer, st, ret, err);
}

void node_corpus_close(node_corpus *corpus) {
    if (corpus == NULL) return;
    free(corpus->ids);
    free(corpus->begin);
    free(corpus);
}
