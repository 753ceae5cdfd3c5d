// backup and restore: a whole copy of a coordinator's folder, or none.
#include "common/clock.h"
#include "common/crypto.h"
#include "common/file.h"
#include "coordinator/commands/commands.h"

#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef struct backup_opts {
    char from[FL_SETTING_TEXT_MAX], to[FL_SETTING_TEXT_MAX];
    bool json;
} backup_opts;

#define ROW_TO(help)                                                                               \
    {                                                                                              \
        NULL, "TO", FL_KIND_TEXT, "FOLDER", 0, 0, NULL, help, NULL, offsetof(backup_opts, to)      \
    }
#define ROW_JSON                                                                                   \
    {                                                                                              \
        NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,        \
            offsetof(backup_opts, json)                                                            \
    }

static int remove_one(const char *path, const struct stat *s, int type, struct FTW *ftw) {
    (void)s, (void)type, (void)ftw;
    return remove(path);
}

static void tell(void *ctx, const char *text) {
    (void)ctx;
    fprintf(stderr, "problem: %s\n", text);
}

// The copy, before it has its name: read again, every byte of it.
static fl_status check(const char *part, coord_verified *ret, fl_err *err) {
    coord_store *s = NULL;
    fl_status st = coord_store_open(part, &s, err);
    if (st == FL_OK) st = coord_store_verify(s, tell, NULL, ret, err);
    coord_store_close(s);
    if (st == FL_OK && ret->problems != 0)
        st = FL_FAIL(err, FL_EFORMAT, "the copy has %lld problems: %s is damaged",
                     (long long)ret->problems, "what was copied");
    return st;
}

// What came after the backup is forgotten, but not by the nodes: versions would be made a second
// time with other bytes. As another run they fetch everything again.
static fl_status begin_again(const char *part, fl_err *err) {
    coord_store *s = NULL;
    uint8_t run_id[16];
    fl_random(run_id, sizeof(run_id));
    FL_TRY(coord_store_open(part, &s, err));
    fl_status st = coord_store_begin(s, err);
    if (st == FL_OK)
        st = coord_store_put_value(s, "run_id", (fl_bytes){run_id, sizeof(run_id)}, err);
    if (st == FL_OK)
        st = coord_store_add_event(s, fl_clock_wall_s(), "run.restored", 0,
                                   "restored from a backup: nodes fetch everything again", err);
    if (st == FL_OK) st = coord_store_commit(s, err);
    coord_store_close(s);
    return st;
}

static fl_status copy_whole(const backup_opts *o, bool restore, coord_verified *ret, fl_err *err) {
    char part[FL_SETTING_TEXT_MAX + 8];
    coord_store *s = NULL;
    size_t n = strlen(o->to);
    while (n > 1 && o->to[n - 1] == '/') n--;
    snprintf(part, sizeof(part), "%.*s.part", (int)n, o->to);
    FL_TRY(fl_crypto_init(err));
    if (fl_file_exists(o->to))
        return FL_FAIL(err, FL_ESTATE, "%s is there already; choose another folder", o->to);
    fl_status st = coord_store_open(o->from, &s, err);
    if (st != FL_OK) return st;
    nftw(part, remove_one, 16, FTW_DEPTH | FTW_PHYS); // of a copy that was cut short
    st = coord_store_backup(s, part, err);
    if (st == FL_OK) st = check(part, ret, err);
    if (st == FL_OK && restore) st = begin_again(part, err);
    if (st == FL_OK) st = fl_folder_sync(part, err);
    if (st == FL_OK && rename(part, o->to) != 0)
        st = FL_FAIL(err, FL_EIO, "cannot name %s: %s", o->to, strerror(errno));
    if (st == FL_OK) st = fl_folder_make(o->to, err); // it is there: its name becomes durable
    if (st != FL_OK) nftw(part, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    coord_store_close(s);
    return st;
}

static int run(const void *options, bool restore) {
    const backup_opts *o = options;
    coord_verified v = {0};
    fl_err err;
    if (copy_whole(o, restore, &v, &err) != FL_OK) return fl_cli_fail(&err);
    if (!o->json) {
        printf("%s: %lld objects and %lld waiting updates, read again and whole\n", o->to,
               (long long)v.objects, (long long)v.updates);
        return FL_EXIT_OK;
    }
    fl_json *j = coord_cmd_object();
    if (j == NULL) return FL_EXIT_FAILED;
    fl_json_set_string(j, restore ? "restored" : "backup", o->to);
    fl_json_set_integer(j, "objects", v.objects);
    fl_json_set_integer(j, "updates", v.updates);
    return coord_cmd_print(j);
}

static int run_backup(const void *options) {
    return run(options, false);
}

static int run_restore(const void *options) {
    return run(options, true);
}

static const fl_setting backup_table[] = {
    {NULL, "DIR", FL_KIND_TEXT, "DIR", 0, 0, NULL, "the coordinator's folder", NULL,
     offsetof(backup_opts, from)},
    ROW_TO("folder to make, with keys: keep it as you keep the other one"),
    ROW_JSON,
};
static const fl_setting restore_table[] = {
    {NULL, "BACKUP", FL_KIND_TEXT, "FOLDER", 0, 0, NULL, "what backup made", NULL,
     offsetof(backup_opts, from)},
    ROW_TO("the coordinator's folder to make"),
    ROW_JSON,
};

const fl_command coord_cmd_backup = {
    .name = "backup",
    .summary = "copy a coordinator, also while it runs, and check the copy",
    .example = "fleetune-coordinator backup home /mnt/usb/home-monday",
    .table = backup_table,
    .count = FL_COUNT(backup_table),
    .options_size = sizeof(backup_opts),
    .run = run_backup,
};
const fl_command coord_cmd_restore = {
    .name = "restore",
    .summary = "make a coordinator's folder from a backup, as a new run of the same fleet",
    .example = "fleetune-coordinator restore /mnt/usb/home-monday home",
    .table = restore_table,
    .count = FL_COUNT(restore_table),
    .options_size = sizeof(backup_opts),
    .run = run_restore,
};
