// export: the newest state of every tuned layer as files, with a manifest that says what they are.
#include "common/checked.h"
#include "common/crypto.h"
#include "common/file.h"
#include "coordinator/commands/commands.h"
#include "coordinator/settings.h"
#include "proto/update.h"

#include <stdlib.h>
#include <string.h>

typedef struct export_opts {
    char dir[FL_SETTING_TEXT_MAX];
    char out[FL_SETTING_TEXT_MAX];
    bool json;
} export_opts;

static const fl_setting table[] = {
    {NULL, "DIR", FL_KIND_TEXT, "DIR", 0, 0, NULL, "the coordinator's folder", NULL,
     offsetof(export_opts, dir)},
    {NULL, "out", FL_KIND_TEXT, "FOLDER", 0, 0, NULL, "folder to write", NULL,
     offsetof(export_opts, out)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "print the manifest", NULL,
     offsetof(export_opts, json)},
};

static fl_status export_layer(coord_store *s, const export_opts *o, const coord_layer_row *row,
                              fl_json *layers, fl_err *err) {
    char name[32], path[FL_SETTING_TEXT_MAX + 64], hex[2 * COORD_DIGEST + 1];
    uint8_t *data = NULL;
    size_t size = 0;
    snprintf(name, sizeof(name), "layer-%03u.fll", row->layer);
    snprintf(path, sizeof(path), "%s/%s", o->out, name);
    FL_TRY(coord_store_get_object(s, row->digest, FL_UPDATE_VALUES_MAX * 8, &data, &size, err));
    const fl_status st = fl_file_replace(path, (fl_bytes){data, size}, err);
    free(data);
    coord_digest_text(row->digest, hex);
    fl_json *j = fl_json_add_object(layers, NULL);
    fl_json_set_integer(j, "layer", row->layer);
    fl_json_set_integer(j, "version", row->version);
    fl_json_set_integer(j, "count", row->count);
    fl_json_set_string(j, "file", name);
    fl_json_set_string(j, "digest", hex);
    return st;
}

static fl_status fill_manifest(coord_store *s, const coord_settings *settings, fl_json *j,
                               fl_err *err) {
    uint8_t digest[COORD_DIGEST] = {0}, seed[8] = {0};
    char hex[2 * COORD_DIGEST + 1];
    coord_vote_row vote = {0};
    size_t size = 0;
    FL_TRY(coord_store_get_value(s, "model_digest", digest, sizeof(digest), &size, err));
    FL_TRY(coord_store_get_value(s, "a_seed", seed, sizeof(seed), &size, err));
    const fl_status st = coord_store_last_vote(s, &vote, err);
    if (st != FL_OK && st != FL_ENOENT) return st;
    coord_digest_text(digest, hex);
    fl_json_set_string(j, "model_digest", hex);
    fl_json_set_integer(j, "rank", settings->rank);
    fl_json_set_number(j, "alpha", settings->alpha);
    fl_json_set_integer(j, "seed", (int64_t)fl_get_u64(seed));
    fl_json_set_integer(j, "exits", settings->exits);
    fl_json *weights = fl_json_add_array(j, "vote");
    for (uint32_t t = 0; t < vote.exits; t++) fl_json_set_number(weights, NULL, vote.weights[t]);
    return FL_OK;
}

static fl_status save_manifest(const export_opts *o, const fl_json *j, fl_err *err) {
    char path[FL_SETTING_TEXT_MAX + 64], *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the manifest");
    fl_status st = fl_json_print(j, out, err);
    if (fclose(out) != 0 && st == FL_OK) st = FL_FAIL(err, FL_ENOMEM, "no memory");
    snprintf(path, sizeof(path), "%s/manifest.json", o->out);
    if (st == FL_OK) st = fl_file_replace(path, (fl_bytes){(const uint8_t *)text, size}, err);
    free(text);
    return st;
}

// The manifest comes last: a folder without one was cut short.
static fl_status export_all(const export_opts *o, fl_json *j, int *ret_count, fl_err *err) {
    static coord_layer_row rows[COORD_LAYERS_MAX];
    coord_settings settings;
    coord_store *s = NULL;
    size_t layers = 0;
    fl_status st = fl_crypto_init(err);
    if (st == FL_OK) st = coord_store_open(o->dir, &s, err);
    if (st == FL_OK) st = coord_settings_load(o->dir, &settings, err);
    if (st == FL_OK) st = coord_store_layers(s, rows, COORD_LAYERS_MAX, &layers, err);
    if (st == FL_OK) st = fill_manifest(s, &settings, j, err);
    if (st == FL_OK) st = fl_folder_make(o->out, err);
    fl_json *list = fl_json_add_array(j, "layers");
    for (size_t l = 0; l < layers && st == FL_OK; l++) {
        if (rows[l].version == 0) continue;
        st = export_layer(s, o, &rows[l], list, err);
        (*ret_count)++;
    }
    if (st == FL_OK) st = save_manifest(o, j, err);
    coord_store_close(s);
    return st;
}

static int run(const void *options) {
    const export_opts *o = options;
    int count = 0;
    fl_err err;
    fl_json *j = coord_cmd_object();
    if (j == NULL) return FL_EXIT_FAILED;
    if (export_all(o, j, &count, &err) != FL_OK) {
        fl_json_free(j);
        return fl_cli_fail(&err);
    }
    if (o->json) return coord_cmd_print(j);
    fl_json_free(j);
    printf("%d layers written to %s\n", count, o->out);
    return FL_EXIT_OK;
}

const fl_command coord_cmd_export = {
    .name = "export",
    .summary = "write the newest state of every tuned layer, and a manifest",
    .example = "fleetune-coordinator export home --out tuned",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(export_opts),
    .run = run,
};
