// What was measured, as small text files.
#include "common/file.h"
#include "node/schedule/cost.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FILE_MAX = 1 << 14 };

// Reads one number after another and remembers whether any was missing.
typedef struct reader {
    const char *at;
    bool bad;
} reader;

static double take(reader *r) {
    char *end;
    const double v = strtod(r->at, &end);
    if (end == r->at || !(v >= 0) || v > 1e18) r->bad = true; // false for NaN too
    r->at = end;
    return r->bad ? 0 : v;
}

static uint32_t take_count(reader *r, uint32_t max) {
    const double v = take(r);
    if (v < 1 || v > max || v != (double)(uint32_t)v) r->bad = true;
    return r->bad ? 1 : (uint32_t)v;
}

// The whole file when its first line is `title` and `key`.
static fl_status open_cache(const char *path, const char *title, uint64_t key, uint8_t **ret_data,
                            reader *ret, fl_err *err) {
    uint8_t *data = NULL;
    size_t size = 0;
    FL_TRY(fl_file_read(path, FILE_MAX, &data, &size, err));
    const char *text = (const char *)data;
    const size_t n = strlen(title);
    char *end = NULL;
    unsigned long long found = 0;
    fl_status st = FL_OK;
    if (strncmp(text, title, n) == 0) found = strtoull(text + n, &end, 16);
    if (end == NULL || end == text + n)
        st = FL_FAIL(err, FL_EFORMAT, "%s is not a cache of what was measured", path);
    else if (found != key)
        st = FL_FAIL(err, FL_ENOENT, "%s is of another machine", path);
    if (st != FL_OK) {
        free(data);
        return st;
    }
    *ret_data = data;
    *ret = (reader){end, false};
    return FL_OK;
}

static fl_status close_cache(const char *path, uint8_t *data, const reader *r, fl_err *err) {
    const bool whole = !r->bad && strcmp(r->at, "\nend\n") == 0;
    free(data);
    return whole ? FL_OK : FL_FAIL(err, FL_EFORMAT, "%s is damaged or cut short", path);
}

// Text that grows up to FILE_MAX.
typedef struct writer {
    char text[FILE_MAX];
    size_t size;
} writer;

static void put(writer *w, const char *fmt, ...) FL_PRINTF(2, 3);
static void put(writer *w, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(w->text + w->size, sizeof(w->text) - w->size, fmt, ap);
    va_end(ap);
    FL_ASSERT(n >= 0 && (size_t)n < sizeof(w->text) - w->size);
    w->size += (size_t)n;
}

static fl_status save(const char *path, writer *w, fl_err *err) {
    put(w, "\nend\n");
    return fl_file_replace(path, (fl_bytes){(const uint8_t *)w->text, w->size}, err);
}

static const char rates_title[] = "fleetune-rates 2 ";

fl_status node_rates_read(const char *path, const node_facts *facts, node_rates *ret, fl_err *err) {
    uint8_t *data = NULL;
    reader in;
    FL_TRY(open_cache(path, rates_title, facts->fingerprint, &data, &in, err));
    node_rates r = {.threads = take_count(&in, NODE_THREADS_MAX)};
    r.threads_compute = take_count(&in, r.threads);
    r.threads_stream = take_count(&in, r.threads);
    r.storage_bytes = take(&in);
    for (uint32_t n = 1; n <= r.threads; n++) {
        double *const all[] = {&r.packed_ops[n], &r.float_ops[n], &r.attention_ops[n],
                               &r.stream_bytes[n], &r.read_bytes[n]};
        for (size_t i = 0; i < FL_COUNT(all); i++) {
            *all[i] = take(&in);
            if (*all[i] == 0) in.bad = true;
        }
    }
    FL_TRY(close_cache(path, data, &in, err));
    *ret = r;
    return FL_OK;
}

fl_status node_rates_write(const char *path, const node_facts *facts, const node_rates *r,
                           fl_err *err) {
    writer w;
    w.size = 0;
    put(&w, "%s%llx\n%u %u %u %.6e", rates_title, (unsigned long long)facts->fingerprint,
        r->threads, r->threads_compute, r->threads_stream, r->storage_bytes);
    for (uint32_t n = 1; n <= r->threads; n++)
        put(&w, "\n%.6e %.6e %.6e %.6e %.6e", r->packed_ops[n], r->float_ops[n],
            r->attention_ops[n], r->stream_bytes[n], r->read_bytes[n]);
    return save(path, &w, err);
}

static void hash(uint64_t *h, const void *data, size_t size) { // FNV-1a
    const uint8_t *p = data;
    for (size_t i = 0; i < size; i++) *h = (*h ^ p[i]) * 0x100000001b3u;
}

uint64_t node_calibration_key(const node_facts *facts, const node_shape *s) {
    const double numbers[] = {s->layers,        s->hidden,          s->vocabulary,
                              s->layer_weights, s->layer_bytes,     s->head_weights,
                              s->head_bytes,    s->adapter_weights, s->attention_width};
    uint64_t key = facts->fingerprint;
    hash(&key, numbers, sizeof(numbers));
    return key;
}

static const char calibration_title[] = "fleetune-calibration 1 ";

fl_status node_calibration_read(const char *path, uint64_t key, node_calibration *ret,
                                fl_err *err) {
    uint8_t *data = NULL;
    reader in;
    FL_TRY(open_cache(path, calibration_title, key, &data, &in, err));
    node_calibration k = {.key = key, .threads = take_count(&in, NODE_THREADS_MAX)};
    for (int i = 0; i < NODE_POINTS; i++) k.tokens[i] = take_count(&in, UINT16_MAX);
    for (uint32_t n = 1; n <= k.threads; n++) {
        for (int i = 0; i < NODE_POINTS; i++)
            for (int p = 0; p < NODE_PARTS; p++) k.part[n][i][p] = take(&in);
        k.prefill[n] = take(&in);
        k.decode[n] = take(&in);
    }
    FL_TRY(close_cache(path, data, &in, err));
    *ret = k;
    return FL_OK;
}

fl_status node_calibration_write(const char *path, const node_calibration *k, fl_err *err) {
    writer w;
    w.size = 0;
    put(&w, "%s%llx\n%u", calibration_title, (unsigned long long)k->key, k->threads);
    for (int i = 0; i < NODE_POINTS; i++) put(&w, " %u", k->tokens[i]);
    for (uint32_t n = 1; n <= k->threads; n++) {
        put(&w, "\n");
        for (int i = 0; i < NODE_POINTS; i++)
            for (int p = 0; p < NODE_PARTS; p++) put(&w, "%.6e ", k->part[n][i][p]);
        put(&w, "%.6e %.6e", k->prefill[n], k->decode[n]);
    }
    return save(path, &w, err);
}
