// JOIN_REQUEST: the only thing that a key which is not admitted can say.
#include "common/plant.h"
#include "coordinator/loop_state.h"
#include "proto/invite.h"

#include <stdio.h>
#include <string.h>

enum {
    GUESSES_MIN = 5, // requests with a wrong proof that are answered at once; then one in
    GUESS_S = 12,    // this time, and every other closes the door for
    GUESS_SHUT_MS = 60000,
};

static fl_status add_member(coord_loop *loop, const fl_join_request *q, bool active,
                            uint64_t now_ms, fl_err *err) {
    coord_node_row row = {.state = active ? COORD_NODE_ACTIVE : COORD_NODE_PENDING,
                          .joined_s = loop->world.wall_s(loop->world.ctx),
                          .seen_s = loop->world.wall_s(loop->world.ctx)};
    snprintf(row.name, sizeof(row.name), "%s", q->name);
    memcpy(row.sign_key, q->identity_key, sizeof(row.sign_key));
    memcpy(row.transport_key, q->curve_key, sizeof(row.transport_key));
    FL_TRY(coord_store_add_node(loop->store, &row, &row.id, err));
    FL_TRY(coord_loop_refresh(loop, now_ms, err));
    return coord_loop_event(loop, active ? "node.joined" : "node.waits",
                            coord_registry_by_id(&loop->registry, row.id), err, "%s",
                            active ? "approved by its token"
                                   : "waits for the owner's approval (command approve)");
}

static fl_status carry_out(coord_loop *loop, const fl_join_request *q, const coord_join_answer *a,
                           uint64_t now_ms, fl_err *err) {
    if (a->take_use && !fl_plant(TOKEN_FREE))
        FL_TRY(coord_store_use_token(loop->store, q->token_id, err));
    if (a->add) FL_TRY(add_member(loop, q, a->verdict == FL_VERDICT_ACCEPTED, now_ms, err));
    if (!a->approve) return FL_OK;
    const uint32_t node = coord_registry_by_sign_key(&loop->registry, q->identity_key);
    FL_TRY(coord_store_set_node_state(loop->store, loop->registry.members[node].id,
                                      COORD_NODE_ACTIVE, err));
    FL_TRY(coord_loop_refresh(loop, now_ms, err));
    return coord_loop_event(loop, "node.joined", node, err, "approved by its token");
}

fl_status coord_loop_join(coord_loop *loop, const fl_link_message *m, const fl_join_request *q,
                          uint64_t now_ms, fl_err *err) {
    coord_token_row token = {0};
    const fl_status found = coord_store_find_token(loop->store, q->token_id, &token, err);
    if (found != FL_OK && found != FL_ENOENT) return found;
    const bool holds = found == FL_OK && fl_invite_check(token.key, loop->keys.transport_key, q);
    if (!holds && m->from == FL_LINK_ENROL &&
        !coord_quota_take(&loop->join_faults, 1, GUESSES_MIN * GUESS_S, GUESS_S, now_ms)) {
        fl_link_shut(loop->link, m->key, GUESS_SHUT_MS); // who guesses keys of tokens
        return FL_OK;
    }
    const coord_join join = {.request = q,
                             .transport_key = m->key,
                             .proof_holds = holds,
                             .uses = token.uses,
                             .auto_approve = token.auto_approve};
    const coord_join_answer a = coord_registry_join(&loop->registry, &join);
    fl_msg out = {.type = FL_MSG_JOIN_REPLY, .join_reply = {.verdict = a.verdict, .code = a.code}};
    FL_TRY(coord_store_begin(loop->store, err));
    FL_TRY(carry_out(loop, q, &a, now_ms, err));
    if (a.verdict == FL_VERDICT_REFUSED)
        FL_TRY(coord_loop_event(loop, "join.refused", COORD_NOBODY, err, "%s: %s", q->name,
                                fl_code_text(a.code)));
    if (a.code != FL_CODE_NONE)
        snprintf(out.join_reply.text, sizeof(out.join_reply.text), "%s", fl_code_text(a.code));
    memcpy(out.join_reply.identity_key, loop->keys.identity_key, FL_KEY_SIZE);
    fl_node_id(q->identity_key, out.join_reply.node_id);
    if (found == FL_OK) fl_invite_prove_reply(token.key, q, &out.join_reply);
    fl_wipe(&token, sizeof(token));
    return coord_loop_answer_clear(loop, m->peer, &out, err);
}
