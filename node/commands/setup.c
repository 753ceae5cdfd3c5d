#include "node/commands/setup.h"

#include "common/file.h"
#include "node/model/unicode.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum { TEXT_BYTES_MAX = 1 << 28 };

fl_status node_setup_open(const node_setup_opts *opts, node_setup *ret, fl_err *err) {
    node_setup s = {0};
    node_facts_read("", &s.facts);
    fl_kern_select(&s.kern, s.facts.cpu);
    const uint32_t threads =
        opts->threads > 0 ? (uint32_t)opts->threads : node_facts_threads(&s.facts);
    fl_status st = fl_pool_open(threads, &s.pool, err);
    if (st != FL_OK) goto out;
    st = node_model_open(opts->model, &s.model, err);
    if (st != FL_OK) goto out;
    if (!opts->without_tokenizer) {
        st = node_tokenizer_open_gguf(s.model->file, &s.tokenizer, err);
        if (st == FL_ENOENT) FL_FAIL(err, st, "%s has no tokenizer", opts->model);
        if (st != FL_OK) goto out;
    }
    if (opts->adapter != NULL && opts->adapter[0] != '\0')
        st = node_adapter_load(opts->adapter, s.model, opts->any_base, &s.adapter, err);
out:
    if (st != FL_OK) {
        node_setup_close(&s);
        return st;
    }
    *ret = s;
    ret->engine = (node_engine){&ret->kern, ret->pool};
    return FL_OK;
}

fl_status node_setup_threads(node_setup *s, uint32_t threads, fl_err *err) {
    if (threads == fl_pool_threads(s->pool)) return FL_OK;
    fl_pool *pool = NULL;
    FL_TRY(fl_pool_open(threads, &pool, err));
    fl_pool_close(s->pool);
    s->pool = s->engine.pool = pool;
    return FL_OK;
}

void node_setup_close(node_setup *s) {
    node_adapter_close(s->adapter);
    node_tokenizer_close(s->tokenizer);
    node_model_close(s->model);
    fl_pool_close(s->pool);
    *s = (node_setup){0};
}

fl_status node_read_text(const char *path, uint8_t **ret_text, size_t *ret_size, fl_err *err) {
    uint8_t *text = NULL;
    size_t size = 0;
    FL_TRY(fl_file_read(path, TEXT_BYTES_MAX, &text, &size, err));
    fl_status st = FL_OK;
    if (size == 0)
        st = FL_FAIL(err, FL_EFORMAT, "%s is empty: give a file with some text in it", path);
    else if (!node_utf8_valid((fl_bytes){text, size}))
        st = FL_FAIL(err, FL_EFORMAT, "%s is not UTF-8 text: convert it with iconv", path);
    if (st != FL_OK) {
        free(text);
        return st;
    }
    *ret_text = text;
    *ret_size = size;
    return FL_OK;
}

uint64_t node_rss_now(void) {
    FILE *f = fopen("/proc/self/statm", "re");
    unsigned long long pages = 0;
    if (f == NULL) return 0;
    if (fscanf(f, "%*u %llu", &pages) != 1) pages = 0;
    fclose(f);
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t node_rss_peak(void) {
    struct rusage u;
    return getrusage(RUSAGE_SELF, &u) == 0 ? (uint64_t)u.ru_maxrss << 10 : 0;
}

// Closes the plan of the weights; what it read is added up.
static void close_weights(node_setup *s) {
    node_resident_stats now;
    node_resident_read_stats(s->model, &now);
    s->streamed.streamed_bytes += now.streamed_bytes;
    s->streamed.read_seconds += now.read_seconds;
    s->streamed.wait_seconds += now.wait_seconds;
    node_resident_close(s->model);
}

static node_resident_stats streamed(const node_setup *s) {
    node_resident_stats now;
    node_resident_read_stats(s->model, &now);
    now.streamed_bytes += s->streamed.streamed_bytes;
    now.read_seconds += s->streamed.read_seconds;
    now.wait_seconds += s->streamed.wait_seconds;
    return now;
}

void node_setup_trim(void) {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

void node_setup_let_go(node_setup *s) {
    close_weights(s);
    node_resident_drop(s->model);
    node_setup_trim();
}

uint64_t node_setup_bytes(node_setup *s) {
    enum { CODE = 1 << 20 }; // code and tables of the program that were not touched yet
    node_setup_let_go(s);
    return node_rss_now() + CODE;
}

fl_status node_setup_place_weights(node_setup *s, const node_resident_plan *plan, fl_err *err) {
    close_weights(s);
    const uint64_t cache = node_facts_memory_budget(&s->facts, 0);
    return node_resident_open(s->model, plan, plan->ring != 0 && cache < s->model->bytes, err);
}

fl_status node_setup_fit(node_setup *s, const node_resident_use *use, uint64_t memory, size_t block,
                         uint64_t *ret_peak, fl_err *err) {
    const uint64_t limit = node_facts_memory_budget(&s->facts, memory);
    const uint64_t rest = node_setup_bytes(s) + block;
    node_resident_plan plan;
    if (!node_resident_make_plan(s->model, use, limit > rest ? limit - rest : 1, &plan))
        return FL_FAIL(err, FL_ENOMEM, "that does not fit %.0f MB: it needs %.0f MB",
                       (double)limit / 1e6, (double)(rest + plan.least) / 1e6 + 1);
    const uint64_t opened = node_rss_peak();
    *ret_peak = rest + plan.bytes > opened ? rest + plan.bytes : opened;
    return node_setup_place_weights(s, &plan, err);
}

void node_setup_add_streamed(const node_setup *setup, fl_json *root) {
    const node_resident_stats s = streamed(setup);
    fl_json_set_integer(root, "streamed_bytes", (int64_t)s.streamed_bytes);
    fl_json_set_number(root, "read_seconds", s.read_seconds);
    fl_json_set_number(root, "wait_seconds", s.wait_seconds);
}

void node_setup_print_streamed(const node_setup *setup, double seconds, FILE *out) {
    const node_resident_stats s = streamed(setup);
    if (s.streamed_bytes == 0) return;
    fprintf(out, "weights read: %.1f MB at %.0f MB/s; %.0f %% of the time was waiting for them\n",
            (double)s.streamed_bytes / 1e6, (double)s.streamed_bytes / 1e6 / s.read_seconds,
            100 * s.wait_seconds / seconds);
}

fl_status node_block_take(size_t size, void **ret, fl_err *err) {
    const size_t rounded = (size + 63) & ~(size_t)63;
    void *block = aligned_alloc(64, rounded == 0 ? 64 : rounded);
    if (block == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory: %zu bytes are needed", size);
    *ret = block;
    return FL_OK;
}
