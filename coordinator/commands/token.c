// token: a join URL for new devices, and its QR code on a terminal.
#include "common/clock.h"
#include "coordinator/commands/commands.h"
#include "coordinator/keys.h"
#include "coordinator/settings.h"
#include "proto/invite.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <qrencode.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct token_opts {
    char dir[FL_SETTING_TEXT_MAX];
    int64_t uses;
    bool auto_approve, json;
} token_opts;

static const fl_setting table[] = {
    {NULL, "DIR", FL_KIND_TEXT, "DIR", 0, 0, NULL, "the coordinator's folder", NULL,
     offsetof(token_opts, dir)},
    {NULL, "uses", FL_KIND_INTEGER, "N", 1, 1024, "1", "how many nodes may join with it", NULL,
     offsetof(token_opts, uses)},
    {NULL, "auto-approve", FL_KIND_FLAG, NULL, 0, 0, "no",
     "nodes that come with it need no approval", NULL, offsetof(token_opts, auto_approve)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,
     offsetof(token_opts, json)},
};

// "tcp://HOST:PORT" or "HOST:PORT" or "HOST": what is there is written, the rest left alone.
static void take_address(const char *text, char host[FL_INVITE_HOST_MAX + 1], uint16_t *port) {
    const char *scheme = strstr(text, "://");
    const char *at = scheme != NULL ? scheme + 3 : text;
    const char *colon = strrchr(at, ':');
    const size_t size = colon != NULL ? (size_t)(colon - at) : strlen(at);
    const bool any = size == 0 || (size == 1 && *at == '*') || strncmp(at, "0.0.0.0", size) == 0;
    if (colon != NULL) {
        const long number = strtol(colon + 1, NULL, 10);
        if (number > 0 && number < 65536) *port = (uint16_t)number;
    }
    if (!any) snprintf(host, FL_INVITE_HOST_MAX + 1, "%.*s", (int)size, at);
}

// The first address that other machines could reach; the loopback one when there is none.
static void own_address(char host[FL_INVITE_HOST_MAX + 1]) {
    struct ifaddrs *list = NULL;
    snprintf(host, FL_INVITE_HOST_MAX + 1, "127.0.0.1");
    if (getifaddrs(&list) != 0) return;
    for (const struct ifaddrs *i = list; i != NULL; i = i->ifa_next) {
        if (i->ifa_addr == NULL || i->ifa_addr->sa_family != AF_INET ||
            (i->ifa_flags & IFF_LOOPBACK) != 0 || (i->ifa_flags & IFF_UP) == 0)
            continue;
        struct sockaddr_in address;
        memcpy(&address, i->ifa_addr, sizeof(address));
        if (inet_ntop(AF_INET, &address.sin_addr, host, FL_INVITE_HOST_MAX) != NULL) break;
    }
    freeifaddrs(list);
}

// Where nodes shall dial: what the owner says, else where we listen, with the port that was got.
static fl_status fill_address(const coord_settings *s, coord_store *store, fl_invite *ret,
                              fl_err *err) {
    char endpoint[256] = "";
    size_t size = 0;
    own_address(ret->host);
    take_address(s->listen, ret->host, &ret->port);
    const fl_status st =
        coord_store_get_value(store, "endpoint", endpoint, sizeof(endpoint) - 1, &size, err);
    if (st != FL_OK && st != FL_ENOENT) return st;
    if (ret->port == 0) take_address(endpoint, ret->host, &ret->port);
    if (s->advertise[0] != '\0') take_address(s->advertise, ret->host, &ret->port);
    if (ret->port == 0)
        return FL_FAIL(err, FL_ESTATE,
                       "the port is not known before the first run: start run, then ask again");
    return FL_OK;
}

static fl_status make(const token_opts *o, char url[FL_INVITE_URL_MAX], fl_err *err) {
    coord_settings settings;
    coord_keys keys = {0};
    coord_store *store = NULL;
    fl_invite invite = {.port = 0};
    uint8_t id[FL_TOKEN_ID_SIZE], key[FL_KEY_SIZE];
    FL_TRY(fl_crypto_init(err));
    fl_status st = coord_store_open(o->dir, &store, err);
    if (st != FL_OK) goto out;
    st = coord_settings_load(o->dir, &settings, err);
    if (st != FL_OK) goto out;
    st = coord_keys_load(o->dir, &keys, err);
    if (st != FL_OK) goto out;
    st = fill_address(&settings, store, &invite, err);
    if (st != FL_OK) goto out;
    memcpy(invite.curve_key, keys.transport_key, sizeof(invite.curve_key));
    fl_random(invite.secret, sizeof(invite.secret));
    fl_invite_derive(invite.secret, id, key);
    st = fl_invite_format(&invite, url, err);
    if (st != FL_OK) goto out;
    st = coord_store_begin(store, err);
    if (st == FL_OK) st = coord_store_add_token(store, id, key, o->uses, o->auto_approve, err);
    if (st == FL_OK)
        st = coord_store_add_event(store, fl_clock_wall_s(), "token.made", 0,
                                   o->auto_approve ? "nodes that use it need no approval"
                                                   : "nodes that use it wait for approval",
                                   err);
    if (st == FL_OK) st = coord_store_commit(store, err);
out:
    fl_wipe(&invite, sizeof(invite));
    fl_wipe(key, sizeof(key));
    coord_keys_close(&keys);
    coord_store_close(store);
    return st;
}

// Two modules a character, light on dark turned around: phones want dark on light.
static void print_qr(const char *url) {
    QRcode *code = QRcode_encodeString(url, 0, QR_ECLEVEL_L, QR_MODE_8, 1);
    if (code == NULL) return; // the URL is there to be typed
    const int width = code->width, quiet = 2;
    for (int y = -quiet; y < width + quiet; y += 2) {
        printf("\033[40;97m");
        for (int x = -quiet; x < width + quiet; x++) {
            bool dark[2];
            for (int k = 0; k < 2; k++) {
                const bool inside = x >= 0 && x < width && y + k >= 0 && y + k < width;
                dark[k] = inside && (code->data[(y + k) * width + x] & 1) != 0;
            }
            printf("%s", dark[0] ? (dark[1] ? " " : "▄") : (dark[1] ? "▀" : "█"));
        }
        printf("\033[0m\n");
    }
    QRcode_free(code);
}

static int run(const void *options) {
    const token_opts *o = options;
    char url[FL_INVITE_URL_MAX];
    fl_err err;
    if (make(o, url, &err) != FL_OK) return fl_cli_fail(&err);
    if (o->json) {
        fl_json *j = coord_cmd_object();
        if (j == NULL) return FL_EXIT_FAILED;
        fl_json_set_string(j, "url", url);
        fl_json_set_integer(j, "uses", o->uses);
        fl_json_set_bool(j, "auto_approve", o->auto_approve);
        return coord_cmd_print(j);
    }
    if (isatty(STDOUT_FILENO)) print_qr(url);
    printf("%s\n", url);
    return FL_EXIT_OK;
}

const fl_command coord_cmd_token = {
    .name = "token",
    .summary = "print a join URL for new devices; whoever has it may ask to join",
    .example = "fleetune-coordinator token home --uses 3 --auto-approve",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(token_opts),
    .run = run,
};
