// Nodes, join tokens, events and single values.
#include "common/crypto.h"
#include "coordinator/store_sql.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *coord_node_state_text(coord_node_state state) {
    static const char *const texts[COORD_NODE_STATE_COUNT] = {
#define X(name, text) text,
        COORD_NODE_STATE_LIST(X)
#undef X
    };
    FL_ASSERT(state < COORD_NODE_STATE_COUNT);
    return texts[state];
}

fl_status coord_store_add_node(coord_store *s, const coord_node_row *row, int64_t *ret_id,
                               fl_err *err) {
    int64_t known = 0;
    FL_TRY(coord_sql_integer(
        s, &known, err,
        "SELECT EXISTS(SELECT 1 FROM nodes WHERE sign_key = ?1 OR transport_key = ?2)", "bb",
        row->sign_key, (size_t)COORD_KEY, row->transport_key, (size_t)COORD_KEY));
    if (known != 0) return FL_FAIL(err, FL_ESTATE, "a node with this key is known already");
    return coord_sql_integer(
        s, ret_id, err,
        "INSERT INTO nodes(name, sign_key, transport_key, state, joined_s, seen_s, bytes_up,"
        " bytes_down) VALUES(?, ?, ?, ?, ?, ?, 0, 0) RETURNING id",
        "tbbiii", row->name, row->sign_key, (size_t)COORD_KEY, row->transport_key,
        (size_t)COORD_KEY, (int64_t)row->state, row->joined_s, row->seen_s);
}

fl_status coord_store_set_node_state(coord_store *s, int64_t id, coord_node_state state,
                                     fl_err *err) {
    int64_t changed = 0, now = 0;
    FL_TRY(coord_sql_run(s, &changed, err,
                         "UPDATE nodes SET state = ?1 WHERE id = ?2 AND (state <> ?3 OR ?1 = ?3)",
                         "iii", (int64_t)state, id, (int64_t)COORD_NODE_REVOKED));
    if (changed != 0) return FL_OK;
    const fl_status st =
        coord_sql_integer(s, &now, NULL, "SELECT state FROM nodes WHERE id = ?", "i", id);
    if (st == FL_ENOENT) return FL_FAIL(err, FL_ENOENT, "there is no node %lld", (long long)id);
    return FL_FAIL(err, FL_ESTATE, "node %lld is revoked for good; let it join again with new keys",
                   (long long)id);
}

fl_status coord_store_touch_node(coord_store *s, int64_t id, int64_t seen_s, int64_t bytes_up,
                                 int64_t bytes_down, fl_err *err) {
    return coord_sql_run(s, NULL, err,
                         "UPDATE nodes SET seen_s = ?, bytes_up = bytes_up + ?,"
                         " bytes_down = bytes_down + ? WHERE id = ?",
                         "iiii", seen_s, bytes_up, bytes_down, id);
}

#define NODE_COLUMNS                                                                               \
    "id, name, sign_key, transport_key, state, joined_s, seen_s, bytes_up, bytes_down"

static fl_status node_of(sqlite3_stmt *stmt, coord_node_row *ret, fl_err *err) {
    *ret = (coord_node_row){.id = coord_col_i(stmt, 0),
                            .joined_s = coord_col_i(stmt, 5),
                            .seen_s = coord_col_i(stmt, 6),
                            .bytes_up = coord_col_i(stmt, 7),
                            .bytes_down = coord_col_i(stmt, 8)};
    coord_col_text(stmt, 1, ret->name, sizeof(ret->name));
    const int64_t state = coord_col_i(stmt, 4);
    if (!coord_col_blob(stmt, 2, ret->sign_key, COORD_KEY) ||
        !coord_col_blob(stmt, 3, ret->transport_key, COORD_KEY) || state < 0 ||
        state >= COORD_NODE_STATE_COUNT)
        return FL_FAIL(err, FL_EFORMAT, "the row of node %lld is damaged", (long long)ret->id);
    ret->state = (coord_node_state)state;
    return FL_OK;
}

fl_status coord_store_each_node(coord_store *s, coord_node_fn fn, void *ctx, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    coord_node_row row;
    bool more = true;
    FL_TRY(coord_sql(s, &stmt, err, "SELECT " NODE_COLUMNS " FROM nodes ORDER BY id", ""));
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more) {
        st = node_of(stmt, &row, err);
        if (st == FL_OK) st = fn(ctx, &row, err);
        if (st == FL_OK) st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    return st;
}

typedef struct search {
    const char *text;
    int64_t id; // 0 when text is no number
    coord_node_row found;
    unsigned count;
} search;

static fl_status match_node(void *ctx, const coord_node_row *row, fl_err *err) {
    search *q = ctx;
    char hex[FL_HEX_SIZE(COORD_KEY)];
    (void)err;
    if (!fl_hex_encode((fl_bytes){row->sign_key, COORD_KEY}, hex, sizeof(hex))) return FL_OK;
    const size_t size = strlen(q->text);
    const bool by_key = size >= 8 && strncmp(hex, q->text, size) == 0;
    if (row->id != q->id && strcmp(row->name, q->text) != 0 && !by_key) return FL_OK;
    q->found = *row;
    q->count++;
    return FL_OK;
}

fl_status coord_store_find_node(coord_store *s, const char *text, coord_node_row *ret,
                                fl_err *err) {
    char *end;
    search q = {.text = text};
    const long long id = strtoll(text, &end, 10);
    if (*text != '\0' && *end == '\0') q.id = id;
    FL_TRY(coord_store_each_node(s, match_node, &q, err));
    if (q.count == 0)
        return FL_FAIL(err, FL_ENOENT, "there is no node \"%s\"; the command nodes lists them",
                       text);
    if (q.count > 1)
        return FL_FAIL(err, FL_EARG, "\"%s\" fits %u nodes; give the number instead", text,
                       q.count);
    *ret = q.found;
    return FL_OK;
}

fl_status coord_store_add_token(coord_store *s, const uint8_t id[COORD_TOKEN_ID],
                                const uint8_t key[COORD_KEY], int64_t uses, bool auto_approve,
                                fl_err *err) {
    return coord_sql_run(s, NULL, err, "INSERT INTO tokens(id, key, uses, auto) VALUES(?, ?, ?, ?)",
                         "bbii", id, (size_t)COORD_TOKEN_ID, key, (size_t)COORD_KEY, uses,
                         (int64_t)auto_approve);
}

fl_status coord_store_find_token(coord_store *s, const uint8_t id[COORD_TOKEN_ID],
                                 coord_token_row *ret, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool row = false;
    FL_TRY(coord_sql(s, &stmt, err, "SELECT key, uses, auto FROM tokens WHERE id = ?", "b", id,
                     (size_t)COORD_TOKEN_ID));
    fl_status st = coord_sql_step(s, stmt, &row, err);
    if (st == FL_OK && !row) st = FL_FAIL(err, FL_ENOENT, "the join token is not known");
    if (st == FL_OK) {
        if (!coord_col_blob(stmt, 0, ret->key, COORD_KEY))
            st = FL_FAIL(err, FL_EFORMAT, "the row of a join token is damaged");
        ret->uses = coord_col_i(stmt, 1);
        ret->auto_approve = coord_col_i(stmt, 2) != 0;
    }
    coord_sql_end(stmt);
    return st;
}

fl_status coord_store_use_token(coord_store *s, const uint8_t id[COORD_TOKEN_ID], fl_err *err) {
    int64_t changed = 0;
    FL_TRY(coord_sql_run(s, &changed, err,
                         "UPDATE tokens SET uses = uses - 1 WHERE id = ? AND uses > 0", "b", id,
                         (size_t)COORD_TOKEN_ID));
    return changed != 0 ? FL_OK : FL_FAIL(err, FL_EAUTH, "the join token is unknown or used up");
}

fl_status coord_store_enrolling(coord_store *s, bool *ret, fl_err *err) {
    int64_t found = 0;
    FL_TRY(coord_sql_integer(s, &found, err,
                             "SELECT EXISTS(SELECT 1 FROM tokens WHERE uses > 0) OR"
                             " EXISTS(SELECT 1 FROM nodes WHERE state = ?)",
                             "i", (int64_t)COORD_NODE_PENDING));
    *ret = found != 0;
    return FL_OK;
}

fl_status coord_store_add_event(coord_store *s, int64_t time_s, const char *kind, int64_t node,
                                const char *text, fl_err *err) {
    char line[COORD_TEXT_MAX];
    snprintf(line, sizeof(line), "%s", text);
    for (char *c = line; *c != '\0'; c++) {
        if ((unsigned char)*c < ' ') *c = '?';
    }
    return coord_sql_run(s, NULL, err,
                         "INSERT INTO events(time_s, kind, node, text) VALUES(?, ?, ?, ?)", "itit",
                         time_s, kind, node, line);
}

fl_status coord_store_events(coord_store *s, coord_event_row *rows, size_t max, size_t *ret_count,
                             fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool more = true;
    size_t count = 0;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT id, time_s, kind, node, text FROM"
                     " (SELECT * FROM events ORDER BY id DESC LIMIT ?) ORDER BY id",
                     "i", (int64_t)max));
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more && count < max) {
        coord_event_row *e = &rows[count++];
        *e = (coord_event_row){.id = coord_col_i(stmt, 0),
                               .time_s = coord_col_i(stmt, 1),
                               .node = coord_col_i(stmt, 3)};
        coord_col_text(stmt, 2, e->kind, sizeof(e->kind));
        coord_col_text(stmt, 4, e->text, sizeof(e->text));
        st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    if (st == FL_OK) *ret_count = count;
    return st;
}

fl_status coord_store_trim_events(coord_store *s, int64_t keep, fl_err *err) {
    return coord_sql_run(
        s, NULL, err, "DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", "i", keep);
}

fl_status coord_store_put_value(coord_store *s, const char *key, fl_bytes value, fl_err *err) {
    return coord_sql_run(s, NULL, err,
                         "INSERT INTO facts(key, value) VALUES(?, ?)"
                         " ON CONFLICT(key) DO UPDATE SET value = excluded.value",
                         "tb", key, value.data, value.size);
}

fl_status coord_store_get_value(coord_store *s, const char *key, void *data, size_t size_max,
                                size_t *ret_size, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool row = false;
    FL_TRY(
        coord_sql(s, &stmt, err, "SELECT length(value), value FROM facts WHERE key = ?", "t", key));
    fl_status st = coord_sql_step(s, stmt, &row, err);
    if (st == FL_OK && !row) st = FL_FAIL(err, FL_ENOENT, "the state has no \"%s\"", key);
    if (st == FL_OK) {
        const size_t size = (size_t)coord_col_i(stmt, 0);
        if (size > size_max)
            st =
                FL_FAIL(err, FL_ELIMIT, "\"%s\" has %zu bytes, more than %zu", key, size, size_max);
        else if (size > 0 && !coord_col_blob(stmt, 1, data, size))
            st = FL_FAIL(err, FL_EFORMAT, "\"%s\" is damaged", key);
        else
            *ret_size = size;
    }
    coord_sql_end(stmt);
    return st;
}
