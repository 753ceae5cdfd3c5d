#include "coordinator/settings.h"

#include "common/file.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const fl_setting coord_setting_table[] = {
#define X(field, ctype, section, key, kind, unit, min, max, otherwise, help, choices)              \
    {section, key,       FL_KIND_##kind, unit,    min,                                             \
     max,     otherwise, help,           choices, offsetof(coord_settings, field)},
    COORD_SETTING_LIST(X)
#undef X
};
const size_t coord_setting_count = FL_COUNT(coord_setting_table);

fl_status coord_settings_load(const char *dir, coord_settings *ret, fl_err *err) {
    char path[4096];
    snprintf(path, sizeof(path), "%s/coordinator.ini", dir);
    return fl_conf_load(path, COORD_ENV_PREFIX, coord_setting_table, coord_setting_count, ret, err);
}

fl_status coord_settings_save(const char *dir, const coord_settings *s, fl_err *err) {
    char path[4096], *text = NULL;
    size_t size = 0;
    snprintf(path, sizeof(path), "%s/coordinator.ini", dir);
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the settings");
    fl_conf_print(coord_setting_table, coord_setting_count, s, out);
    const bool whole = fclose(out) == 0;
    const fl_status st = whole ? fl_file_replace(path, (fl_bytes){(const uint8_t *)text, size}, err)
                               : FL_FAIL(err, FL_ENOMEM, "no memory for the settings");
    free(text);
    return st;
}

// How often each exit's window is given out.
static uint32_t share(const coord_settings *s, uint32_t exit, uint32_t exits) {
    const bool last = exit == exits - 1;
    switch (s->windows) {
    case 0:
        return last;
    case 1:
        return last ? exits + 1 : 1;
    default:
        return 1;
    }
}

fl_status coord_settings_round(const coord_settings *s, uint32_t layers, coord_round_opts *ret,
                               fl_err *err) {
    const uint32_t exits = (uint32_t)s->exits;
    if (layers == 0 || exits > layers)
        return FL_FAIL(err, FL_EARG, "the model has %u layers: %u exits do not fit", layers, exits);
    if (s->refuse < s->clip)
        return FL_FAIL(err, FL_EARG, "refuse-factor must not be below clip-factor");
    *ret = (coord_round_opts){.nodes_max = (uint32_t)s->nodes_max,
                              .layers = layers,
                              .exits = exits,
                              .window = (uint32_t)s->window,
                              .steps = (uint32_t)s->steps,
                              .step_tokens = (uint64_t)(s->sequence * s->micro_batch),
                              .task_deadline_ms = (uint64_t)s->task_deadline_s * 1000,
                              .updates = (uint32_t)s->updates,
                              .updates_min = (uint32_t)s->updates_min,
                              .deadline_ms = (uint64_t)s->deadline_s * 1000,
                              .staleness_max = (uint64_t)s->staleness_max,
                              .rounds = (uint64_t)s->rounds,
                              .retry_ms = (uint64_t)s->retry_ms};
    for (uint32_t e = 0; e < exits; e++) {
        // round(layers * (e + 1) / exits) layers lie below exit e.
        const uint32_t below = (2 * layers * (e + 1) + exits) / (2 * exits);
        ret->exit_layers[e] = below - 1;
        ret->shares[e] = share(s, e, exits);
    }
    return FL_OK;
}
