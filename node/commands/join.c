// join: takes part in a fleet. The URL that `fleetune-coordinator token` printed names the
// coordinator's key, so we prove that we speak to it before anything is said.
#include "common/clock.h"
#include "common/json.h"
#include "node/commands/commands.h"
#include "node/commands/state_dir.h"
#include "node/state.h"
#include "proto/invite.h"
#include "proto/link.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct join_opts {
    char url[FL_SETTING_TEXT_MAX];
    char name[FL_SETTING_TEXT_MAX];
    char state[FL_SETTING_TEXT_MAX];
    int64_t wait_s;
    bool json;
} join_opts;

static const fl_setting table[] = {
    {NULL, "URL", FL_KIND_TEXT, "URL", 0, 0, NULL, "what `fleetune-coordinator token` printed",
     NULL, offsetof(join_opts, url)},
    {NULL, "name", FL_KIND_TEXT, "NAME", 0, 0, "", "what to call this node (default: host name)",
     NULL, offsetof(join_opts, name)},
    {NULL, "state", FL_KIND_TEXT, "FOLDER", 0, 0, "", "where the node keeps its state", NULL,
     offsetof(join_opts, state)},
    {NULL, "wait", FL_KIND_INTEGER, "SECONDS", 1, 86400, "30", "how long to try", NULL,
     offsetof(join_opts, wait_s)},
    {NULL, "json", FL_KIND_FLAG, NULL, 0, 0, "no", "one JSON object for machines", NULL,
     offsetof(join_opts, json)},
};

enum { ASK_AGAIN_MS = 1000, STEP_MS = 200 };

// The host name, with what a node's name may not have replaced.
static void default_name(char *name, size_t size) {
    if (gethostname(name, size) != 0) snprintf(name, size, "node");
    name[size - 1] = '\0';
    for (char *c = name; *c != '\0'; c++) {
        const bool fine = (*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') ||
                          (*c >= '0' && *c <= '9') || *c == '.' || *c == '_' || *c == '-';
        if (!fine) *c = '-';
    }
}

static fl_status make_request(const node_state *s, const fl_invite *invite,
                              const uint8_t token_key[FL_KEY_SIZE], fl_join_request *ret,
                              fl_err *err) {
    uint8_t key[FL_KEY_SIZE];
    fl_join_request r = {.protocol = FL_PROTOCOL};
    fl_invite_derive(invite->secret, r.token_id, key);
    memcpy(r.identity_key, s->identity_key, FL_KEY_SIZE);
    memcpy(r.curve_key, s->curve_key, FL_KEY_SIZE);
    if (strlen(s->name) > FL_NAME_MAX)
        return FL_FAIL(err, FL_EARG, "the name is longer than %d characters", FL_NAME_MAX);
    snprintf(r.name, sizeof(r.name), "%.63s", s->name);
    snprintf(r.software, sizeof(r.software), "fleetune-%s", FL_VERSION);
    fl_random(r.nonce, sizeof(r.nonce));
    fl_invite_prove(token_key, invite->curve_key, &r);
    fl_wipe(key, sizeof(key));
    *ret = r;
    return FL_OK;
}

static fl_status send_request(fl_link *link, const fl_join_request *request, fl_arena *scratch,
                              fl_err *err) {
    uint8_t frame[FL_FRAME_HEAD + 1024];
    size_t size;
    fl_bytes body;
    const fl_msg m = {.type = FL_MSG_JOIN_REQUEST, .join_request = *request};
    FL_TRY(fl_msg_encode(&m, scratch, &body, err));
    const fl_frame f = {.type = FL_MSG_JOIN_REQUEST, .body = body};
    FL_TRY(fl_frame_encode(&f, frame, sizeof(frame), &size, err));
    const fl_status st = fl_link_send(link, 0, (fl_bytes){frame, size}, err);
    fl_arena_rewind(scratch, 0);
    return st;
}

// A JOIN_REPLY whose proof holds; anything else is not for us.
static bool take_reply(fl_bytes frame, const uint8_t token_key[FL_KEY_SIZE],
                       const fl_join_request *request, fl_arena *scratch, fl_join_reply *ret) {
    fl_frame f;
    fl_msg m;
    fl_arena_rewind(scratch, 0);
    if (fl_frame_decode(frame, FL_FROM_COORDINATOR, &f, NULL) != FL_OK) return false;
    if (f.type != FL_MSG_JOIN_REPLY || fl_msg_decode(f.type, f.body, scratch, &m, NULL) != FL_OK)
        return false;
    const bool proven = fl_invite_check_reply(token_key, request, &m.join_reply);
    if (!proven && m.join_reply.verdict != FL_VERDICT_REFUSED) return false;
    *ret = m.join_reply;
    return true;
}

// Asks until there is an answer that is not "later", or the time is up; then the last word stands.
static fl_status ask(fl_link *link, const fl_join_request *request,
                     const uint8_t token_key[FL_KEY_SIZE], int64_t wait_s, fl_join_reply *ret,
                     fl_err *err) {
    uint8_t *block = malloc(FL_CODEC_ARENA);
    if (block == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the messages");
    fl_arena scratch;
    fl_arena_init(&scratch, block, FL_CODEC_ARENA);
    const uint64_t start = fl_clock_ms();
    uint64_t asked = 0;
    fl_status st = FL_FAIL(err, FL_ETIME,
                           "no answer from the coordinator: is it running, and is its address "
                           "reachable from here?");
    *ret = (fl_join_reply){0};
    while (fl_clock_ms() - start < (uint64_t)wait_s * 1000) {
        if (fl_link_state(link) == FL_LINK_REFUSED || fl_link_state(link) == FL_LINK_MISMATCH)
            st = FL_FAIL(err, FL_EAUTH,
                         "the coordinator refused the connection: the join URL was used already, "
                         "or is not of this coordinator; make a new one with `token`");
        if (asked == 0 || fl_clock_ms() - asked > ASK_AGAIN_MS) {
            if (send_request(link, request, &scratch, NULL) == FL_OK) asked = fl_clock_ms();
        }
        fl_link_message m;
        if (fl_link_receive(link, STEP_MS, &m, NULL) != FL_OK) continue;
        if (!take_reply(m.frame, token_key, request, &scratch, ret)) continue;
        st = FL_OK;
        break;
    }
    free(block);
    return st;
}

static fl_status join(const fl_invite *invite, int64_t wait_s, node_state *s, fl_join_reply *reply,
                      fl_err *err) {
    uint8_t token_key[FL_KEY_SIZE], token_id[FL_TOKEN_ID_SIZE];
    fl_link *link = NULL;
    fl_join_request request;
    char endpoint[FL_INVITE_HOST_MAX + 32];
    fl_invite_derive(invite->secret, token_id, token_key);
    snprintf(endpoint, sizeof(endpoint),
             strchr(invite->host, ':') ? "tcp://[%s]:%u" : "tcp://%s:%u", invite->host,
             invite->port);
    const fl_link_opts opts = {.endpoint = endpoint,
                               .curve_secret = fl_secret_view(s->curve).data,
                               .curve_key = s->curve_key,
                               .coordinator_key = invite->curve_key};
    fl_status st = make_request(s, invite, token_key, &request, err);
    if (st != FL_OK) goto out;
    st = fl_link_dial(&opts, &link, err);
    if (st != FL_OK) goto out;
    st = ask(link, &request, token_key, wait_s, reply, err);
    if (st != FL_OK) goto out;
    if (reply->verdict == FL_VERDICT_REFUSED) {
        st = FL_FAIL(err, FL_EAUTH, "the coordinator refused: %s", reply->text);
        goto out;
    }
    snprintf(s->host, sizeof(s->host), "%s", invite->host);
    s->port = invite->port;
    memcpy(s->coordinator_curve, invite->curve_key, FL_KEY_SIZE);
    memcpy(s->coordinator_identity, reply->identity_key, FL_KEY_SIZE);
    st = node_state_save_enrolment(s, err);
out:
    fl_link_close(link);
    fl_wipe(token_key, sizeof(token_key));
    return st;
}

static fl_status print_joined(const join_opts *o, const node_state *s, bool pending, fl_err *err) {
    if (o->json) {
        fl_json *root = fl_json_object();
        fl_json_set_string(root, "state", pending ? "pending" : "active");
        fl_json_set_string(root, "name", s->name);
        fl_json_set_string(root, "folder", s->folder);
        const fl_status st = fl_json_print(root, stdout, err);
        fl_json_free(root);
        return st;
    }
    if (pending)
        printf("asked to join as \"%s\"; the owner has to approve it:\n"
               "  fleetune-coordinator approve DIR %s\n",
               s->name, s->name);
    else
        printf("joined as \"%s\"\n", s->name);
    printf("next: fleetune-node run --data FOLDER_OF_TEXT\n");
    return FL_OK;
}

static int run(const void *options) {
    const join_opts *o = options;
    char folder[NODE_PATH_MAX - 64];
    node_state s = {0};
    fl_join_reply reply = {0};
    fl_err err;
    fl_invite invite;
    fl_status st = fl_invite_parse(o->url, &invite, &err); // before anything is made
    if (st == FL_OK) st = node_state_dir(o->state, folder, sizeof(folder), &err);
    if (st == FL_OK) st = node_state_dir_make(folder, &err);
    if (st == FL_OK) st = node_state_open(folder, &s, &err);
    if (st == FL_OK) {
        if (o->name[0] != '\0')
            snprintf(s.name, sizeof(s.name), "%.500s", o->name);
        else
            default_name(s.name, FL_NAME_MAX + 1);
        st = join(&invite, o->wait_s, &s, &reply, &err);
    }
    if (st == FL_OK) st = print_joined(o, &s, reply.verdict == FL_VERDICT_PENDING, &err);
    node_state_close(&s);
    fl_wipe(&invite, sizeof(invite));
    return st == FL_OK ? FL_EXIT_OK : fl_cli_fail(&err);
}

const fl_command node_cmd_join = {
    .name = "join",
    .summary = "makes this device a member of a fleet",
    .example = "fleetune-node join fleetune://192.168.1.10:7700/AEB... --name kitchen",
    .table = table,
    .count = FL_COUNT(table),
    .options_size = sizeof(join_opts),
    .run = run,
};
