// Layers and their versions, rounds, tasks, and the ledger of updates.
#include "coordinator/store_sql.h"

#include <math.h>
#include <string.h>

fl_status coord_store_add_layers(coord_store *s, uint32_t layers, fl_err *err) {
    int64_t there = 0;
    FL_TRY(coord_sql_integer(s, &there, err, "SELECT count(*) FROM layers", ""));
    if (there != 0) return FL_FAIL(err, FL_ESTATE, "the state has %lld layers", (long long)there);
    for (uint32_t l = 0; l < layers; l++) {
        FL_TRY(coord_sql_run(s, NULL, err,
                             "INSERT INTO layers(layer, version, count, size, round)"
                             " VALUES(?, 0, 0, 0, 0)",
                             "i", (int64_t)l));
    }
    return FL_OK;
}

fl_status coord_store_pin_layer(coord_store *s, uint32_t layer, int64_t count, fl_err *err) {
    int64_t changed = 0;
    FL_TRY(coord_sql_run(s, &changed, err,
                         "UPDATE layers SET count = ?1 WHERE layer = ?2 AND count IN (0, ?1)", "ii",
                         count, (int64_t)layer));
    return changed == 1 ? FL_OK
                        : FL_FAIL(err, FL_ESTATE, "layer %u does not have %lld values", layer,
                                  (long long)count);
}

fl_status coord_store_layers(coord_store *s, coord_layer_row *rows, size_t max, size_t *ret_count,
                             fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool more = true;
    size_t n = 0;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT layer, version, count, digest, size, moments, round FROM layers"
                     " ORDER BY layer",
                     ""));
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more) {
        if (n == max || coord_col_i(stmt, 0) != (int64_t)n) {
            st = FL_FAIL(err, FL_EFORMAT, "the table of layers is damaged");
            break;
        }
        coord_layer_row *r = &rows[n++];
        *r = (coord_layer_row){.layer = (uint32_t)coord_col_i(stmt, 0),
                               .version = coord_col_i(stmt, 1),
                               .count = coord_col_i(stmt, 2),
                               .size = coord_col_i(stmt, 4),
                               .round = coord_col_i(stmt, 6)};
        const bool has_digest = coord_col_blob(stmt, 3, r->digest, COORD_DIGEST);
        r->has_moments = coord_col_blob(stmt, 5, r->moments, COORD_DIGEST);
        if (has_digest != (r->version > 0)) {
            st = FL_FAIL(err, FL_EFORMAT, "the row of layer %u is damaged", r->layer);
            break;
        }
        st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    if (st == FL_OK) *ret_count = n;
    return st;
}

fl_status coord_store_set_layer(coord_store *s, const coord_layer_row *row, int64_t updates,
                                fl_err *err) {
    int64_t changed = 0;
    FL_TRY(coord_sql_run(s, &changed, err,
                         "UPDATE layers SET version = ?2, digest = ?3, size = ?4, moments = ?5,"
                         " round = ?6 WHERE layer = ?1 AND version = ?2 - 1",
                         "iibibi", (int64_t)row->layer, row->version, row->digest,
                         (size_t)COORD_DIGEST, row->size, row->has_moments ? row->moments : NULL,
                         row->has_moments ? (size_t)COORD_DIGEST : (size_t)0, row->round));
    if (changed != 1)
        return FL_FAIL(err, FL_ESTATE, "layer %u is not at version %lld", row->layer,
                       (long long)(row->version - 1));
    return coord_sql_run(s, NULL, err,
                         "INSERT INTO layer_history(layer, version, digest, size, round, updates)"
                         " VALUES(?, ?, ?, ?, ?, ?)",
                         "iibiii", (int64_t)row->layer, row->version, row->digest,
                         (size_t)COORD_DIGEST, row->size, row->round, updates);
}

fl_status coord_store_find_layer(coord_store *s, uint32_t layer, int64_t version,
                                 uint8_t ret_digest[COORD_DIGEST], fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool found = false;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT digest FROM layer_history WHERE layer = ? AND version = ?", "ii",
                     (int64_t)layer, version));
    fl_status st = coord_sql_step(s, stmt, &found, err);
    if (st == FL_OK && !found)
        st = FL_FAIL(err, FL_ENOENT, "version %lld of layer %u is not kept", (long long)version,
                     layer);
    if (st == FL_OK && !coord_col_blob(stmt, 0, ret_digest, COORD_DIGEST))
        st = FL_FAIL(err, FL_EFORMAT, "a row names an object without a digest");
    coord_sql_end(stmt);
    return st;
}

fl_status coord_store_is_layer(coord_store *s, const uint8_t digest[COORD_DIGEST], bool *ret,
                               fl_err *err) {
    int64_t found = 0;
    FL_TRY(coord_sql_integer(s, &found, err,
                             "SELECT EXISTS(SELECT 1 FROM layer_history WHERE digest = ?)", "b",
                             digest, (size_t)COORD_DIGEST));
    *ret = found != 0;
    return FL_OK;
}

fl_status coord_store_trim_layers(coord_store *s, int64_t keep, fl_err *err) {
    return coord_sql_run(
        s, NULL, err,
        "DELETE FROM layer_history WHERE version <="
        " (SELECT version FROM layers WHERE layers.layer = layer_history.layer) - ?",
        "i", keep);
}

fl_status coord_store_open_round(coord_store *s, int64_t round, int64_t opened_s, fl_err *err) {
    return coord_sql_run(s, NULL, err,
                         "INSERT INTO rounds(round, opened_s, closed_s, contributions, updates,"
                         " layers, bytes_up, loss, reason) VALUES(?, ?, 0, 0, 0, 0, 0, NULL, '')",
                         "ii", round, opened_s);
}

fl_status coord_store_close_round(coord_store *s, const coord_round_row *row, fl_err *err) {
    int64_t changed = 0;
    FL_TRY(coord_sql_run(s, &changed, err,
                         "UPDATE rounds SET closed_s = ?, contributions = ?, updates = ?,"
                         " layers = ?, bytes_up = ?, loss = ?, reason = ?"
                         " WHERE round = ? AND closed_s = 0",
                         "iiiiidti", row->closed_s, row->contributions, row->updates, row->layers,
                         row->bytes_up, row->loss, row->reason,
                         row->round)); // NaN is stored as NULL
    return changed == 1 ? FL_OK
                        : FL_FAIL(err, FL_ESTATE, "round %lld is not open", (long long)row->round);
}

fl_status coord_store_rounds(coord_store *s, coord_round_row *rows, size_t max, size_t *ret_count,
                             fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool more = true;
    size_t n = 0;
    // The reports of a round may come after its end, the last node's nearly always does: the loss
    // is of each node's newest report of the round, whenever it came.
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT round, opened_s, closed_s, contributions, updates, layers, bytes_up,"
                     " coalesce((SELECT sum(nll_voted) / (sum(tokens) * 1048576.0) FROM"
                     "  (SELECT nll_voted, tokens, max(sequence) FROM reports"
                     "   WHERE reports.round = newest.round GROUP BY node)), loss), reason"
                     " FROM (SELECT * FROM rounds ORDER BY round DESC LIMIT ?) AS newest"
                     " ORDER BY round",
                     "i", (int64_t)max));
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more && n < max) {
        coord_round_row *r = &rows[n++];
        *r = (coord_round_row){.round = coord_col_i(stmt, 0),
                               .opened_s = coord_col_i(stmt, 1),
                               .closed_s = coord_col_i(stmt, 2),
                               .contributions = coord_col_i(stmt, 3),
                               .updates = coord_col_i(stmt, 4),
                               .layers = coord_col_i(stmt, 5),
                               .bytes_up = coord_col_i(stmt, 6),
                               .loss = coord_col_d(stmt, 7)};
        coord_col_text(stmt, 8, r->reason, sizeof(r->reason));
        st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    if (st == FL_OK) *ret_count = n;
    return st;
}

fl_status coord_store_add_task(coord_store *s, const coord_task_row *row, fl_err *err) {
    return coord_sql_run(s, NULL, err,
                         "INSERT INTO tasks(task, node, round, exit, first, last, counted, open)"
                         " VALUES(?, ?, ?, ?, ?, ?, 0, 1)",
                         "iiiiii", row->task, row->node, row->round, (int64_t)row->exit,
                         (int64_t)row->first, (int64_t)row->last);
}

fl_status coord_store_last_task(coord_store *s, int64_t *ret, fl_err *err) {
    return coord_sql_integer(s, ret, err, "SELECT coalesce(max(task), 0) FROM tasks", "");
}

fl_status coord_store_close_task(coord_store *s, int64_t task, int64_t counted, fl_err *err) {
    return coord_sql_run(s, NULL, err, "UPDATE tasks SET open = 0, counted = ? WHERE task = ?",
                         "ii", counted, task);
}

fl_status coord_store_each_task(coord_store *s, int64_t round, coord_task_fn fn, void *ctx,
                                fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool more = true;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT task, node, round, exit, first, last, counted, open FROM tasks"
                     " WHERE open = 1 OR counted = ?1 ORDER BY task",
                     "i", round));
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more) {
        const coord_task_row row = {.task = coord_col_i(stmt, 0),
                                    .node = coord_col_i(stmt, 1),
                                    .round = coord_col_i(stmt, 2),
                                    .exit = (uint32_t)coord_col_i(stmt, 3),
                                    .first = (uint32_t)coord_col_i(stmt, 4),
                                    .last = (uint32_t)coord_col_i(stmt, 5),
                                    .counted = coord_col_i(stmt, 6),
                                    .open = coord_col_i(stmt, 7) != 0};
        st = fn(ctx, &row, err);
        if (st == FL_OK) st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    return st;
}

fl_status coord_store_task_counts(coord_store *s, uint64_t *counts, size_t exits, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool more = true;
    memset(counts, 0, exits * sizeof(counts[0]));
    FL_TRY(coord_sql(s, &stmt, err, "SELECT exit, count(*) FROM tasks GROUP BY exit", ""));
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more) {
        const int64_t exit = coord_col_i(stmt, 0);
        if (exit >= 0 && exit < (int64_t)exits) counts[exit] = (uint64_t)coord_col_i(stmt, 1);
        st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    return st;
}

fl_status coord_store_seen_update(coord_store *s, int64_t node, uint32_t layer, int64_t base,
                                  int64_t sequence, coord_seen *ret, fl_err *err) {
    int64_t kept = 0;
    const fl_status st = coord_sql_integer(
        s, &kept, err, "SELECT sequence FROM updates WHERE node = ? AND layer = ? AND base = ?",
        "iii", node, (int64_t)layer, base);
    if (st != FL_OK && st != FL_ENOENT) return st;
    *ret = st == FL_ENOENT ? COORD_SEEN_NEW : kept == sequence ? COORD_SEEN_SAME : COORD_SEEN_OTHER;
    return FL_OK;
}

fl_status coord_store_add_update(coord_store *s, const coord_update_row *r, fl_err *err) {
    return coord_sql_run(
        s, NULL, err,
        "INSERT INTO updates(task, node, layer, base, sequence, tokens, weight, clip, norm, round,"
        " spool, place, size, digest) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?, ?)",
        "iiiiiiiidiiib", r->task, r->node, (int64_t)r->layer, r->base, r->sequence, r->tokens,
        r->weight, (int64_t)r->clip, r->norm, r->at.spool, r->at.offset, r->at.size, r->at.digest,
        (size_t)COORD_DIGEST);
}

#define UPDATE_COLUMNS                                                                             \
    "id, task, node, layer, base, sequence, tokens, weight, clip, norm, round, spool, place, "     \
    "size,"                                                                                        \
    " digest"

static fl_status each_update(coord_store *s, sqlite3_stmt *stmt, coord_update_fn fn, void *ctx,
                             fl_err *err) {
    bool more = true;
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more) {
        coord_update_row r = {.id = coord_col_i(stmt, 0),
                              .task = coord_col_i(stmt, 1),
                              .node = coord_col_i(stmt, 2),
                              .layer = (uint32_t)coord_col_i(stmt, 3),
                              .base = coord_col_i(stmt, 4),
                              .sequence = coord_col_i(stmt, 5),
                              .tokens = coord_col_i(stmt, 6),
                              .weight = coord_col_i(stmt, 7),
                              .clip = (uint32_t)coord_col_i(stmt, 8),
                              .norm = coord_col_d(stmt, 9),
                              .round = coord_col_i(stmt, 10),
                              .at = {.spool = coord_col_i(stmt, 11),
                                     .offset = coord_col_i(stmt, 12),
                                     .size = coord_col_i(stmt, 13)}};
        st = coord_col_blob(stmt, 14, r.at.digest, COORD_DIGEST)
                 ? fn(ctx, &r, err)
                 : FL_FAIL(err, FL_EFORMAT, "the row of update %lld is damaged", (long long)r.id);
        if (st == FL_OK) st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    return st;
}

fl_status coord_store_each_open_update(coord_store *s, coord_update_fn fn, void *ctx, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT " UPDATE_COLUMNS " FROM updates WHERE round = 0 ORDER BY id", ""));
    return each_update(s, stmt, fn, ctx, err);
}

fl_status coord_store_each_update_after(coord_store *s, int64_t id, coord_update_fn fn, void *ctx,
                                        fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT " UPDATE_COLUMNS " FROM updates WHERE id > ? ORDER BY id", "i", id));
    return each_update(s, stmt, fn, ctx, err);
}

fl_status coord_store_each_task_update(coord_store *s, int64_t task, coord_update_fn fn, void *ctx,
                                       fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT " UPDATE_COLUMNS " FROM updates WHERE task = ? ORDER BY id", "i",
                     task));
    return each_update(s, stmt, fn, ctx, err);
}

fl_status coord_store_each_recent_update(coord_store *s, uint32_t layer, int64_t max,
                                         coord_update_fn fn, void *ctx, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT " UPDATE_COLUMNS " FROM (SELECT * FROM updates WHERE layer = ?"
                     " ORDER BY id DESC LIMIT ?) ORDER BY id",
                     "ii", (int64_t)layer, max));
    return each_update(s, stmt, fn, ctx, err);
}

fl_status coord_store_each_last_update(coord_store *s, coord_update_fn fn, void *ctx, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT " UPDATE_COLUMNS " FROM updates AS u WHERE base ="
                     " (SELECT max(base) FROM updates WHERE node = u.node AND layer = u.layer)"
                     " ORDER BY node, layer",
                     ""));
    return each_update(s, stmt, fn, ctx, err);
}

fl_status coord_store_spooled_bytes(coord_store *s, int64_t *ret, fl_err *err) {
    return coord_sql_integer(s, ret, err,
                             "SELECT coalesce(sum(size), 0) FROM updates WHERE round = 0", "");
}

fl_status coord_store_fold_updates(coord_store *s, int64_t round, fl_err *err) {
    FL_ASSERT(round > 0);
    return coord_sql_run(s, NULL, err, "UPDATE updates SET round = ? WHERE round = 0", "i", round);
}
