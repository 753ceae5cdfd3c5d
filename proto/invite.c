#include "proto/invite.h"

#include <stdio.h>
#include <string.h>

enum {
    VERSION = 1,
    CHECK_SIZE = 4,
    CHECK_AT = 1 + FL_KEY_SIZE + FL_INVITE_SECRET,
    BLOB_SIZE = CHECK_AT + CHECK_SIZE,
};
static const char scheme[] = "fleetune://";

static void start(fl_hasher *h, fl_bytes key, const char *label, size_t out_size) {
    fl_hash_init(h, key, out_size);
    fl_hash_add_framed(h, (fl_bytes){(const uint8_t *)label, strlen(label)});
}

// The checksum covers host and port too: any mistyped character is found before anything is
// dialled.
static void checksum(const fl_invite *in, const uint8_t *blob, uint8_t ret[CHECK_SIZE]) {
    uint8_t digest[FL_HASH_SIZE];
    fl_hasher h;
    start(&h, (fl_bytes){NULL, 0}, "fleetune/1 invite", FL_HASH_SIZE);
    fl_hash_add_framed(&h, (fl_bytes){(const uint8_t *)in->host, strlen(in->host)});
    fl_hash_add_u64(&h, in->port);
    fl_hash_add(&h, (fl_bytes){blob, CHECK_AT});
    fl_hash_done(&h, digest);
    memcpy(ret, digest, CHECK_SIZE);
}

// Lower case, so that a URL typed in another case has the same checksum.
static bool host_ok(const char *s) {
    const size_t n = strnlen(s, FL_INVITE_HOST_MAX + 1);
    if (n == 0 || n > FL_INVITE_HOST_MAX) return false;
    return strspn(s, "abcdefghijklmnopqrstuvwxyz0123456789.-:%_") == n;
}

fl_status fl_invite_format(const fl_invite *invite, char ret[FL_INVITE_URL_MAX], fl_err *err) {
    if (!host_ok(invite->host) || invite->port == 0)
        return FL_FAIL(err, FL_EARG, "an invitation needs a host name in lower case, and a port");
    uint8_t blob[BLOB_SIZE];
    char text[FL_BASE32_SIZE(BLOB_SIZE)];
    blob[0] = VERSION;
    memcpy(blob + 1, invite->curve_key, FL_KEY_SIZE);
    memcpy(blob + 1 + FL_KEY_SIZE, invite->secret, FL_INVITE_SECRET);
    checksum(invite, blob, blob + CHECK_AT);
    const bool ok = fl_base32_encode((fl_bytes){blob, BLOB_SIZE}, text, sizeof(text));
    FL_ASSERT(ok);
    const bool v6 = strchr(invite->host, ':') != NULL;
    snprintf(ret, FL_INVITE_URL_MAX, "%s%s%s%s:%u/%s", scheme, v6 ? "[" : "", invite->host,
             v6 ? "]" : "", invite->port, text);
    fl_wipe(blob, sizeof(blob));
    fl_wipe(text, sizeof(text));
    return FL_OK;
}

// HOST:PORT or [HOST]:PORT, in lower case, ended by NUL.
static bool parse_address(char *s, fl_invite *ret) {
    char *host = s, *end = strrchr(s, ':');
    if (end == NULL) return false;
    const char *digits = end + 1;
    *end = '\0';
    if (*host == '[') {
        host++;
        if (end[-1] != ']') return false;
        end[-1] = '\0';
        if (strchr(host, ':') == NULL) return false;
    } else if (strchr(host, ':') != NULL) {
        return false;
    }
    const size_t n = strlen(digits);
    if (n == 0 || n > 5 || strspn(digits, "0123456789") != n || digits[0] == '0') return false;
    uint32_t port = 0;
    for (size_t i = 0; i < n; i++) port = port * 10 + (uint32_t)(digits[i] - '0');
    if (port > 65535 || !host_ok(host)) return false;
    memcpy(ret->host, host, strlen(host) + 1);
    ret->port = (uint16_t)port;
    return true;
}

fl_status fl_invite_parse(const char *url, fl_invite *ret, fl_err *err) {
    char s[FL_INVITE_URL_MAX];
    uint8_t blob[BLOB_SIZE], check[CHECK_SIZE];
    fl_invite in = {.port = 0};
    static const char blanks[] = " \t\r\n";

    url += strspn(url, blanks);
    size_t n = strnlen(url, FL_INVITE_URL_MAX);
    while (n > 0 && strchr(blanks, url[n - 1]) != NULL) n--;
    if (n >= FL_INVITE_URL_MAX) return FL_FAIL(err, FL_EFORMAT, "the join URL is too long");
    for (size_t i = 0; i < n; i++)
        s[i] = (char)(url[i] >= 'A' && url[i] <= 'Z' ? url[i] - 'A' + 'a' : url[i]);
    s[n] = '\0';
    fl_status st = FL_EFORMAT;
    char *slash = strrchr(s, '/');
    if (strncmp(s, scheme, sizeof(scheme) - 1) != 0 || slash < s + sizeof(scheme) - 1) {
        FL_FAIL(err, st, "a join URL looks like fleetune://HOST:PORT/CODE");
        goto out;
    }
    *slash = '\0';
    if (!parse_address(s + sizeof(scheme) - 1, &in)) {
        FL_FAIL(err, st, "host or port of the join URL is not right");
        goto out;
    }
    if (!fl_base32_decode(slash + 1, blob, BLOB_SIZE)) {
        FL_FAIL(err, st, "the code of the join URL is incomplete or has a wrong character");
        goto out;
    }
    checksum(&in, blob, check);
    if (blob[0] != VERSION) {
        st = FL_EUNSUPPORTED;
        FL_FAIL(err, st, "the join URL is of a newer program or mistyped");
    } else if (memcmp(check, blob + CHECK_AT, CHECK_SIZE) != 0) {
        FL_FAIL(err, st, "the join URL is mistyped: its checksum does not fit");
    } else {
        memcpy(in.curve_key, blob + 1, FL_KEY_SIZE);
        memcpy(in.secret, blob + 1 + FL_KEY_SIZE, FL_INVITE_SECRET);
        *ret = in;
        st = FL_OK;
    }
out:
    fl_wipe(s, sizeof(s));
    fl_wipe(blob, sizeof(blob));
    fl_wipe(&in, sizeof(in));
    return st;
}

void fl_invite_derive(const uint8_t secret[FL_INVITE_SECRET], uint8_t ret_id[FL_TOKEN_ID_SIZE],
                      uint8_t ret_key[FL_KEY_SIZE]) {
    uint8_t id[FL_HASH_SIZE];
    fl_hasher h;
    start(&h, (fl_bytes){secret, FL_INVITE_SECRET}, "fleetune/1 token id", FL_HASH_SIZE);
    fl_hash_done(&h, id);
    memcpy(ret_id, id, FL_TOKEN_ID_SIZE);
    start(&h, (fl_bytes){secret, FL_INVITE_SECRET}, "fleetune/1 token key", FL_KEY_SIZE);
    fl_hash_done(&h, ret_key);
}

static void add_text(fl_hasher *h, const char *s) {
    fl_hash_add_framed(h, (fl_bytes){(const uint8_t *)s, strlen(s)});
}

static void request_proof(const uint8_t token_key[FL_KEY_SIZE],
                          const uint8_t curve_key[FL_KEY_SIZE], const fl_join_request *r,
                          uint8_t ret[FL_KEY_SIZE]) {
    const fl_capability *c = &r->capability;
    uint32_t rate;
    memcpy(&rate, &c->tokens_per_second, sizeof(rate));
    const uint64_t numbers[] = {r->protocol,
                                c->memory_bytes,
                                c->disk_free_bytes,
                                rate,
                                (uint64_t)(int64_t)c->temperature_mc,
                                c->flags,
                                c->cores,
                                c->window_max};
    fl_hasher h;
    start(&h, (fl_bytes){token_key, FL_KEY_SIZE}, "fleetune/1 join request", FL_KEY_SIZE);
    fl_hash_add(&h, (fl_bytes){curve_key, FL_KEY_SIZE});
    fl_hash_add(&h, (fl_bytes){r->token_id, FL_TOKEN_ID_SIZE});
    fl_hash_add(&h, (fl_bytes){r->identity_key, FL_KEY_SIZE});
    fl_hash_add(&h, (fl_bytes){r->curve_key, FL_KEY_SIZE});
    fl_hash_add(&h, (fl_bytes){r->nonce, FL_KEY_SIZE});
    add_text(&h, r->name);
    add_text(&h, r->software);
    for (size_t i = 0; i < FL_COUNT(numbers); i++) fl_hash_add_u64(&h, numbers[i]);
    fl_hash_done(&h, ret);
}

void fl_invite_prove(const uint8_t token_key[FL_KEY_SIZE], const uint8_t curve_key[FL_KEY_SIZE],
                     fl_join_request *request) {
    request_proof(token_key, curve_key, request, request->proof);
}

bool fl_invite_check(const uint8_t token_key[FL_KEY_SIZE], const uint8_t curve_key[FL_KEY_SIZE],
                     const fl_join_request *request) {
    uint8_t want[FL_KEY_SIZE];
    request_proof(token_key, curve_key, request, want);
    return fl_equal(want, request->proof, FL_KEY_SIZE);
}

static void reply_proof(const uint8_t token_key[FL_KEY_SIZE], const fl_join_request *request,
                        const fl_join_reply *r, uint8_t ret[FL_KEY_SIZE]) {
    fl_hasher h;
    start(&h, (fl_bytes){token_key, FL_KEY_SIZE}, "fleetune/1 join reply", FL_KEY_SIZE);
    fl_hash_add(&h, (fl_bytes){request->nonce, FL_KEY_SIZE});
    fl_hash_add(&h, (fl_bytes){request->identity_key, FL_KEY_SIZE});
    fl_hash_add_u64(&h, (uint64_t)r->verdict);
    fl_hash_add_u64(&h, (uint64_t)r->code);
    add_text(&h, r->text);
    fl_hash_add(&h, (fl_bytes){r->identity_key, FL_KEY_SIZE});
    fl_hash_add(&h, (fl_bytes){r->node_id, FL_ID_SIZE});
    fl_hash_done(&h, ret);
}

void fl_invite_prove_reply(const uint8_t token_key[FL_KEY_SIZE], const fl_join_request *request,
                           fl_join_reply *reply) {
    reply_proof(token_key, request, reply, reply->proof);
}

bool fl_invite_check_reply(const uint8_t token_key[FL_KEY_SIZE], const fl_join_request *request,
                           const fl_join_reply *reply) {
    uint8_t want[FL_KEY_SIZE];
    reply_proof(token_key, request, reply, want);
    return fl_equal(want, reply->proof, FL_KEY_SIZE);
}

void fl_node_id(const uint8_t identity_key[FL_KEY_SIZE], uint8_t ret[FL_ID_SIZE]) {
    uint8_t digest[FL_HASH_SIZE];
    fl_hasher h;
    start(&h, (fl_bytes){NULL, 0}, "fleetune/1 node", FL_HASH_SIZE);
    fl_hash_add(&h, (fl_bytes){identity_key, FL_KEY_SIZE});
    fl_hash_done(&h, digest);
    memcpy(ret, digest, FL_ID_SIZE);
}
