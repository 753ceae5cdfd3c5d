// Some nodes are no members yet: they hold a token and ask until they are told that they are in.
#include "sim/state.h"

#include "common/checked.h"

#include <stdio.h>
#include <string.h>

// The curve key of a simulated node begins with its number.
uint32_t sim_node_of_key(const sim *s, const uint8_t key[FL_LINK_KEY]) {
    const uint32_t node = fl_get_u32(key);
    const bool fits =
        node < s->opts.nodes && memcmp(s->nodes[node].curve_key, key, FL_LINK_KEY) == 0;
    return fits ? node : COORD_NOBODY;
}

void sim_join_draw(sim *s) {
    const bool some = sim_chance(&s->rng, 0.5);
    sim_fill(&s->rng, s->token_secret, sizeof(s->token_secret));
    for (uint32_t i = 0; i < s->opts.nodes; i++) {
        s->nodes[i].enrolled = !some || i % 4 != 2;
        s->token_uses += !s->nodes[i].enrolled;
    }
}

fl_status sim_join_token(const sim *s, coord_store *st, fl_err *err) {
    uint8_t id[FL_TOKEN_ID_SIZE], key[FL_KEY_SIZE];
    fl_invite_derive(s->token_secret, id, key);
    return coord_store_add_token(st, id, key, s->token_uses, true, err);
}

static void make_request(const sim_node *n, uint8_t ret_key[FL_KEY_SIZE], fl_join_request *q) {
    const sim *s = n->sim;
    *q = (fl_join_request){.protocol = FL_PROTOCOL, .capability = n->client->capability};
    fl_invite_derive(s->token_secret, q->token_id, ret_key);
    memcpy(q->identity_key, n->identity_key, FL_KEY_SIZE);
    memcpy(q->curve_key, n->curve_key, FL_KEY_SIZE);
    snprintf(q->name, sizeof(q->name), "node%u", n->index);
    snprintf(q->software, sizeof(q->software), "simulated");
    fl_invite_prove(ret_key, s->host.keys.transport_key, q); // nonce: zeros, as good as any here
}

void sim_join_ask(sim_node *n) {
    sim *s = n->sim;
    uint8_t key[FL_KEY_SIZE];
    fl_msg m = {.type = FL_MSG_JOIN_REQUEST};
    fl_bytes body;
    size_t size = 0;
    make_request(n, key, &m.join_request);
    fl_status st = fl_msg_encode(&m, &s->scratch, &body, NULL);
    const fl_frame f = {.type = m.type, .body = body};
    if (st == FL_OK) st = fl_frame_encode(&f, s->frame, FL_FRAME_MAX, &size, NULL);
    FL_ASSERT(st == FL_OK);
    sim_send_to_coordinator(s, n->index, (fl_bytes){s->frame, size});
}

void sim_join_answer(sim_node *n, fl_bytes frame) {
    sim *s = n->sim;
    uint8_t key[FL_KEY_SIZE];
    fl_join_request q;
    fl_frame f;
    fl_msg m;
    if (fl_frame_decode(frame, FL_FROM_COORDINATOR, &f, NULL) != FL_OK ||
        f.type != FL_MSG_JOIN_REPLY ||
        fl_msg_decode(f.type, f.body, &s->scratch, &m, NULL) != FL_OK)
        return;
    make_request(n, key, &q);
    if (!fl_invite_check_reply(key, &q, &m.join_reply))
        sim_fail(s, "node %u was answered by somebody without its token", n->index);
    else if (m.join_reply.verdict != FL_VERDICT_ACCEPTED && !n->revoked)
        sim_fail(s, "node %u may not join: %s", n->index, m.join_reply.text);
    else
        n->enrolled = true;
}

void sim_join_check(sim *s) {
    const coord_loop *loop = s->host.loop;
    uint8_t id[FL_TOKEN_ID_SIZE], key[FL_KEY_SIZE];
    coord_token_row row = {0};
    uint32_t first = 0;
    for (uint32_t i = 0; i < s->opts.nodes; i++) {
        const sim_node *n = &s->nodes[i];
        const uint32_t member = coord_registry_by_sign_key(&loop->registry, n->identity_key);
        first += s->token_uses == 0 || i % 4 != 2;
        s->result.checks++;
        if (n->enrolled && member == COORD_NOBODY)
            sim_fail(s, "node %u was told that it is in, and it is not", i);
    }
    fl_invite_derive(s->token_secret, id, key);
    const fl_status st = coord_store_find_token(loop->store, id, &row, NULL);
    const int64_t joined = (int64_t)loop->registry.count - first;
    if (st != FL_OK || row.uses != (int64_t)s->token_uses - joined)
        sim_fail(s, "%lld nodes joined by a token for %u that has %lld uses left",
                 (long long)joined, s->token_uses, (long long)row.uses);
}
