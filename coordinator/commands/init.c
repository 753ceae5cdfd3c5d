// init: makes a coordinator's folder: keys, settings, the model, an empty state.
#include "common/checked.h"
#include "common/clock.h"
#include "common/file.h"
#include "coordinator/commands/commands.h"
#include "coordinator/keys.h"
#include "coordinator/settings.h"
#include "coordinator/shape.h"

#include <string.h>

typedef struct init_opts {
    char dir[FL_SETTING_TEXT_MAX];
    char model[FL_SETTING_TEXT_MAX];
    bool json;
    coord_settings settings;
} init_opts;

static const fl_setting table[] = {
    {NULL, "DIR", FL_KIND_TEXT, "DIR", 0, 0, NULL, "folder to make", NULL,
     offsetof(init_opts, dir)},
    {NULL, "model", FL_KIND_TEXT, "FILE", 0, 0, NULL,
     "compressed model that all nodes tune (from fleetune-node compress)", NULL,
     offsetof(init_opts, model)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,
     offsetof(init_opts, json)},
#define X(field, ctype, section, key, kind, unit, min, max, otherwise, help, choices)              \
    {NULL,                                                                                         \
     key,                                                                                          \
     FL_KIND_##kind,                                                                               \
     unit,                                                                                         \
     min,                                                                                          \
     max,                                                                                          \
     otherwise,                                                                                    \
     help,                                                                                         \
     choices,                                                                                      \
     offsetof(init_opts, settings) + offsetof(coord_settings, field)},
    COORD_SETTING_LIST(X)
#undef X
};

typedef struct made {
    coord_shape shape;
    coord_round_opts opts;
    uint64_t model_size;
    uint8_t model_digest[COORD_DIGEST];
    uint8_t run_id[16];
} made;

static fl_status read_shape(const init_opts *o, made *m, fl_err *err) {
    fl_map map = {0};
    FL_TRY(fl_map_open(o->model, &map, err));
    fl_status st = coord_shape_read(map.bytes, &m->shape, err);
    if (st != FL_OK && err->text[0] != '\0') {
        char why[160];
        snprintf(why, sizeof(why), "%.*s", (int)sizeof(why) - 1, err->text);
        st = FL_FAIL(err, st, "%.60s: %s", o->model, why);
    }
    fl_map_close(&map);
    return st == FL_OK ? coord_settings_round(&o->settings, m->shape.layers, &m->opts, err) : st;
}

static fl_status put_number(coord_store *s, const char *key, uint64_t value, fl_err *err) {
    uint8_t bytes[8];
    fl_put_u64(bytes, value);
    return coord_store_put_value(s, key, (fl_bytes){bytes, sizeof(bytes)}, err);
}

// How large each layer's updates are is the model's word, not that of the node that comes first.
static fl_status pin_layers(coord_store *s, const init_opts *o, const made *m, fl_err *err) {
    for (uint32_t l = 0; l < m->shape.layers; l++) {
        bool has_exit = false;
        for (uint32_t e = 0; e < m->opts.exits; e++) has_exit |= m->opts.exit_layers[e] == l;
        const uint32_t count =
            coord_shape_values(&m->shape, l, (uint32_t)o->settings.rank, has_exit);
        if (count != 0) FL_TRY(coord_store_pin_layer(s, l, count, err));
    }
    return put_number(s, "rank", (uint64_t)o->settings.rank, err);
}

static fl_status fill(coord_store *s, const init_opts *o, made *m, fl_err *err) {
    uint8_t random[8];
    fl_random(m->run_id, sizeof(m->run_id));
    fl_random(random, sizeof(random));
    const uint64_t seed =
        o->settings.seed != 0 ? (uint64_t)o->settings.seed : fl_get_u64(random) >> 11;
    FL_TRY(coord_store_import_object(s, o->model, m->model_digest, &m->model_size, err));
    FL_TRY(coord_store_begin(s, err));
    FL_TRY(coord_store_put_value(s, "run_id", (fl_bytes){m->run_id, sizeof(m->run_id)}, err));
    FL_TRY(coord_store_put_value(s, "model_digest",
                                 (fl_bytes){m->model_digest, sizeof(m->model_digest)}, err));
    FL_TRY(put_number(s, "model_size", m->model_size, err));
    FL_TRY(put_number(s, "a_seed", seed, err));
    FL_TRY(put_number(s, "exits", (uint64_t)o->settings.exits, err));
    FL_TRY(coord_store_add_layers(s, m->shape.layers, err));
    FL_TRY(pin_layers(s, o, m, err));
    FL_TRY(coord_store_open_round(s, 1, fl_clock_wall_s(), err));
    FL_TRY(
        coord_store_add_event(s, fl_clock_wall_s(), "run.created", 0, "the run was created", err));
    return coord_store_commit(s, err);
}

// An init that was cut short has no run yet: it is taken up again.
static fl_status create(const char *dir, fl_err *err) {
    coord_store *s = NULL;
    uint8_t run_id[16];
    size_t size = 0;
    const fl_status st = coord_store_create(dir, err);
    if (st != FL_ESTATE) return st;
    if (coord_store_open(dir, &s, NULL) != FL_OK) return st;
    const fl_status found = coord_store_get_value(s, "run_id", run_id, sizeof(run_id), &size, NULL);
    coord_store_close(s);
    return found == FL_ENOENT ? FL_OK : st;
}

// Everything that can be refused is looked at before the folder is made.
static fl_status make(const init_opts *o, made *m, fl_err *err) {
    coord_store *s = NULL;
    FL_TRY(fl_crypto_init(err));
    FL_TRY(read_shape(o, m, err));
    FL_TRY(create(o->dir, err));
    FL_TRY(coord_keys_make(o->dir, err));
    FL_TRY(coord_settings_save(o->dir, &o->settings, err));
    FL_TRY(coord_store_open(o->dir, &s, err));
    const fl_status st = fill(s, o, m, err);
    coord_store_close(s);
    return st;
}

static int run(const void *options) {
    const init_opts *o = options;
    made m = {0};
    fl_err err;
    char digest[2 * COORD_DIGEST + 1];
    if (make(o, &m, &err) != FL_OK) return fl_cli_fail(&err);
    coord_digest_text(m.model_digest, digest);
    if (!o->json) {
        printf("%s is ready: a model of %u layers, %llu bytes.\n"
               "Start it:     fleetune-coordinator run %s\n"
               "Add devices:  fleetune-coordinator token %s\n",
               o->dir, m.shape.layers, (unsigned long long)m.model_size, o->dir, o->dir);
        return FL_EXIT_OK;
    }
    fl_json *j = coord_cmd_object();
    if (j == NULL) return FL_EXIT_FAILED;
    fl_json_set_string(j, "dir", o->dir);
    fl_json_set_integer(j, "layers", m.shape.layers);
    fl_json_set_integer(j, "model_bytes", (int64_t)m.model_size);
    fl_json_set_string(j, "model_digest", digest);
    return coord_cmd_print(j);
}

const fl_command coord_cmd_init = {
    .name = "init",
    .summary = "make a coordinator: keys, settings, the model that its fleet tunes",
    .example = "fleetune-coordinator init home --model compressed.gguf",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(init_opts),
    .run = run,
};
