// verify: proves that the state is whole.
#include "common/crypto.h"
#include "coordinator/commands/commands.h"

static const fl_setting table[] = {COORD_ROW_DIR, COORD_ROW_JSON};

static void tell(void *ctx, const char *text) {
    fl_json *list = ctx;
    if (list == NULL)
        printf("problem: %s\n", text);
    else
        fl_json_set_string(list, NULL, text);
}

static int run(const void *options) {
    const coord_dir_opts *o = options;
    coord_store *s = NULL;
    coord_verified v = {0};
    fl_json *root = NULL, *list = NULL;
    fl_err err;
    if (o->json) {
        root = coord_cmd_object();
        if (root == NULL) return FL_EXIT_FAILED;
        list = fl_json_add_array(root, "problems");
    }
    fl_status st = fl_crypto_init(&err);
    if (st == FL_OK) st = coord_store_open(o->dir, &s, &err);
    if (st == FL_OK) st = coord_store_verify(s, tell, list, &v, &err);
    coord_store_close(s);
    if (st != FL_OK) {
        fl_json_free(root);
        return fl_cli_fail(&err);
    }
    const int status = v.problems == 0 ? FL_EXIT_OK : FL_EXIT_FAILED;
    if (root == NULL) {
        printf("%lld objects and %lld waiting updates read, %lld problems%s\n",
               (long long)v.objects, (long long)v.updates, (long long)v.problems,
               v.problems == 0 ? "" : "; restore what is named from a backup");
        return status;
    }
    fl_json_set_bool(root, "whole", v.problems == 0);
    fl_json_set_integer(root, "objects", v.objects);
    fl_json_set_integer(root, "updates", v.updates);
    const int printed = coord_cmd_print(root);
    return printed != FL_EXIT_OK ? printed : status;
}

const fl_command coord_cmd_verify = {
    .name = "verify",
    .summary = "read every stored byte and check it against its digest and its row",
    .example = "fleetune-coordinator verify home",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(coord_dir_opts),
    .run = run,
};
