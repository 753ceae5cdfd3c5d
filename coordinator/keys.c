#include "coordinator/keys.h"

#include "common/file.h"

#include <stdio.h>

static const char *const names[] = {"identity", "transport", "update"};

static void path_of(const char *dir, const char *name, char ret[4096]) {
    snprintf(ret, 4096, "%s/keys/%s", dir, name);
}

fl_status coord_keys_make(const char *dir, fl_err *err) {
    char path[4096];
    path_of(dir, "", path);
    FL_TRY(fl_folder_make(path, err));
    for (size_t i = 0; i < FL_COUNT(names); i++) {
        fl_secret *secret = NULL;
        uint8_t key[FL_DH_KEY];
        path_of(dir, names[i], path);
        if (fl_file_exists(path)) continue;
        fl_status st = i == 0 ? fl_sign_new(&secret, key, err) : fl_dh_new(&secret, key, err);
        if (st == FL_OK) st = fl_secret_save(secret, path, err);
        fl_secret_close(secret);
        if (st != FL_OK) return st;
    }
    return FL_OK;
}

fl_status coord_keys_load(const char *dir, coord_keys *ret, fl_err *err) {
    coord_keys keys = {0};
    fl_secret **const secrets[] = {&keys.identity, &keys.transport, &keys.update};
    fl_status st = FL_OK;
    for (size_t i = 0; i < FL_COUNT(names) && st == FL_OK; i++) {
        char path[4096];
        path_of(dir, names[i], path);
        st = fl_secret_load(path, FL_SEED_SIZE, secrets[i], err);
    }
    if (st == FL_OK) st = fl_sign_key(keys.identity, keys.identity_key, err);
    if (st == FL_OK) st = fl_dh_key(keys.transport, keys.transport_key, err);
    if (st == FL_OK) st = fl_dh_key(keys.update, keys.update_key, err);
    if (st != FL_OK)
        coord_keys_close(&keys);
    else
        *ret = keys;
    return st;
}

fl_status coord_keys_copy(const coord_keys *from, coord_keys *ret, fl_err *err) {
    coord_keys keys = *from;
    keys.identity = keys.transport = keys.update = NULL;
    fl_status st = fl_secret_copy(fl_secret_view(from->identity), &keys.identity, err);
    if (st == FL_OK)
        st = fl_secret_copy(fl_secret_view(from->transport), &keys.transport, err);
    if (st == FL_OK) st = fl_secret_copy(fl_secret_view(from->update), &keys.update, err);
    if (st != FL_OK)
        coord_keys_close(&keys);
    else
        *ret = keys;
    return st;
}

void coord_keys_close(coord_keys *keys) {
    fl_secret_close(keys->identity);
    fl_secret_close(keys->transport);
    fl_secret_close(keys->update);
    keys->identity = keys->transport = keys->update = NULL;
}
