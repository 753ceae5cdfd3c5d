// Property: a coordinator's end that is fed any bytes never panics, never opens a frame that the
// node's end did not seal, and afterwards still serves the honest node. The input is a list of
// records: one byte that says what to do, one byte of size, then the bytes. Join URLs and sealed
// updates are read from the same input.
#include "common/checked.h"
#include "proto/channel.h"
#include "proto/invite.h"
#include "proto/seal.h"
#include "tests/fuzz/fuzz.h"

#include <stdlib.h>
#include <string.h>

static fl_channel *node, *coord;
static fl_secret *node_secret, *coord_secret;
static uint8_t node_key[FL_KEY_SIZE], coord_key[FL_KEY_SIZE], update_key[FL_KEY_SIZE];

static void start(void) {
    static const uint8_t seed[2][32] = {{1}, {2}};
    if (node_secret == NULL &&
        (fl_crypto_init(NULL) != FL_OK ||
         fl_secret_copy((fl_bytes){seed[0], 32}, &node_secret, NULL) != FL_OK ||
         fl_secret_copy((fl_bytes){seed[1], 32}, &coord_secret, NULL) != FL_OK ||
         fl_sign_key(node_secret, node_key, NULL) != FL_OK ||
         fl_sign_key(coord_secret, coord_key, NULL) != FL_OK ||
         fl_dh_key(coord_secret, update_key, NULL) != FL_OK))
        abort();
    fl_channel_opts opts = {.role = FL_CHANNEL_NODE,
                            .identity = node_secret,
                            .identity_key = node_key,
                            .peer_key = coord_key,
                            .update_key = update_key};
    FL_ASSERT(fl_channel_open(&opts, &node, NULL) == FL_OK);
    opts.role = FL_CHANNEL_COORDINATOR;
    opts.identity = coord_secret;
    opts.identity_key = coord_key;
    opts.peer_key = node_key;
    FL_ASSERT(fl_channel_open(&opts, &coord, NULL) == FL_OK);
}

static void shake(uint8_t salt) {
    uint8_t random[FL_CHANNEL_RANDOM] = {9, salt, [64] = 3, [65] = salt};
    fl_hello hello;
    fl_hello_reply reply;
    fl_hello_finish finish;
    FL_ASSERT(fl_channel_hello(node, random, &hello, NULL) == FL_OK);
    random[2] = 1;
    FL_ASSERT(fl_channel_on_hello(coord, &hello, random, &reply, NULL) == FL_OK);
    FL_ASSERT(fl_channel_on_reply(node, &reply, &finish, NULL) == FL_OK);
    FL_ASSERT(fl_channel_on_finish(coord, &finish, NULL) == FL_OK);
}

static void feed_frame(fl_bytes in) { // the session's number is given for free: the seal must hold
    uint8_t copy[300], out[300];
    fl_frame f;
    fl_bytes body;
    if (in.size > sizeof(copy) || in.size < FL_FRAME_HEAD) return;
    memcpy(copy, in.data, in.size);
    fl_put_u64(copy + 8, fl_channel_session(coord));
    if (fl_frame_decode((fl_bytes){copy, in.size}, FL_FROM_NODE, &f, NULL) != FL_OK) return;
    FL_ASSERT(fl_channel_unseal(coord, &f, out, sizeof(out), &body, NULL) != FL_OK);
}

static void feed_handshake(fl_bytes in) {
    fl_hello hello = {.protocol = FL_PROTOCOL};
    fl_hello_reply reply;
    fl_hello_finish finish = {.session = fl_channel_session(coord)};
    uint8_t random[FL_CHANNEL_RANDOM] = {7};
    memcpy(hello.identity_key, node_key, FL_KEY_SIZE);
    memcpy(hello.ephemeral_key, in.data, in.size < FL_KEY_SIZE ? in.size : FL_KEY_SIZE);
    if (fl_channel_on_hello(coord, &hello, random, &reply, NULL) == FL_OK)
        finish.session = reply.session;
    memcpy(finish.signature, in.data, in.size < FL_SIGNATURE_SIZE ? in.size : FL_SIGNATURE_SIZE);
    FL_ASSERT(fl_channel_on_finish(coord, &finish, NULL) != FL_OK);
}

static void feed_text(fl_bytes in) {
    char url[300];
    uint8_t out[300];
    fl_invite invite;
    fl_bytes got;
    fl_seal_label label = {.round = 1};
    memcpy(url, in.data, in.size);
    url[in.size] = '\0';
    if (fl_invite_parse(url, &invite, NULL) == FL_OK) {
        char again[FL_INVITE_URL_MAX];
        fl_invite back;
        FL_ASSERT(fl_invite_format(&invite, again, NULL) == FL_OK);
        FL_ASSERT(fl_invite_parse(again, &back, NULL) == FL_OK);
        FL_ASSERT(memcmp(&invite.secret, &back.secret, FL_INVITE_SECRET) == 0);
    }
    memcpy(label.node_key, node_key, FL_KEY_SIZE);
    FL_ASSERT(fl_unseal_update(&label, in, coord_secret, update_key, out, sizeof(out), &got,
                               NULL) != FL_OK);
}

static void honest(uint8_t salt) {
    uint8_t frame[128], out[128];
    size_t size;
    fl_frame f;
    fl_bytes body;
    FL_ASSERT(fl_channel_seal(node, FL_MSG_HEARTBEAT, (fl_bytes){&salt, 1}, frame, sizeof(frame),
                              &size, NULL) == FL_OK);
    FL_ASSERT(fl_frame_decode((fl_bytes){frame, size}, FL_FROM_NODE, &f, NULL) == FL_OK);
    FL_ASSERT(fl_channel_unseal(coord, &f, out, sizeof(out), &body, NULL) == FL_OK);
    FL_ASSERT(body.size == 1 && out[0] == salt);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    start();
    shake(0);
    for (size_t at = 0; at + 2 <= size;) {
        const size_t left = size - at - 2, n = data[at + 1] < left ? data[at + 1] : left;
        const fl_bytes in = {data + at + 2, n};
        switch (data[at] % 5) {
        case 0:
            feed_frame(in);
            break;
        case 1:
            feed_handshake(in);
            break;
        case 2:
            feed_text(in);
            break;
        case 3:
            shake((uint8_t)at);
            break;
        default:
            honest((uint8_t)at);
        }
        at += 2 + n;
    }
    honest(1);
    fl_channel_close(node);
    fl_channel_close(coord);
    return 0;
}
