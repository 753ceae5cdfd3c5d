// Published votes, and the reports that they are made from.
#include "coordinator/store_sql.h"

#include "common/checked.h"

#include <string.h>

enum { SUMS_BYTES = 16 * COORD_SUMS_MAX };

fl_status coord_store_add_vote(coord_store *s, const coord_vote_row *row, fl_err *err) {
    FL_ASSERT(row->exits <= COORD_SUMS_MAX);
    uint8_t blob[8 * COORD_SUMS_MAX];
    for (uint32_t t = 0; t < row->exits; t++) {
        uint64_t bits;
        memcpy(&bits, &row->weights[t], sizeof(bits));
        fl_put_u64(blob + 8 * t, bits);
    }
    return coord_sql_run(s, NULL, err,
                         "INSERT INTO votes(version, round, tokens, weights, loss, gain)"
                         " VALUES(?, ?, ?, ?, ?, ?)",
                         "iiibdd", row->version, row->round, row->tokens, blob,
                         (size_t)(8 * row->exits), row->loss, row->gain);
}

fl_status coord_store_last_vote(coord_store *s, coord_vote_row *ret, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    bool row = false;
    uint8_t blob[8 * COORD_SUMS_MAX];
    FL_TRY(
        coord_sql(s, &stmt, err,
                  "SELECT version, round, tokens, loss, gain, length(weights), weights FROM votes"
                  " ORDER BY version DESC LIMIT 1",
                  ""));
    fl_status st = coord_sql_step(s, stmt, &row, err);
    if (st == FL_OK && !row) st = FL_FAIL(err, FL_ENOENT, "no vote was published yet");
    if (st == FL_OK) {
        const size_t size = (size_t)coord_col_i(stmt, 5);
        *ret = (coord_vote_row){.version = coord_col_i(stmt, 0),
                                .round = coord_col_i(stmt, 1),
                                .tokens = coord_col_i(stmt, 2),
                                .loss = coord_col_d(stmt, 3),
                                .gain = coord_col_d(stmt, 4),
                                .exits = (uint32_t)(size / 8)};
        if (size > sizeof(blob) || size % 8 != 0 || !coord_col_blob(stmt, 6, blob, size))
            st = FL_FAIL(err, FL_EFORMAT, "the row of a vote is damaged");
        for (uint32_t t = 0; st == FL_OK && t < ret->exits; t++) {
            const uint64_t bits = fl_get_u64(blob + 8 * t);
            memcpy(&ret->weights[t], &bits, sizeof(bits));
        }
    }
    coord_sql_end(stmt);
    return st;
}

fl_status coord_store_add_report(coord_store *s, const coord_report_row *r, fl_err *err) {
    FL_ASSERT(r->exits <= COORD_SUMS_MAX);
    uint8_t blob[SUMS_BYTES];
    int64_t newest = 0;
    FL_TRY(coord_sql_integer(s, &newest, err,
                             "SELECT coalesce(max(sequence), 0) FROM reports WHERE node = ?", "i",
                             r->node));
    if (newest >= r->sequence)
        return FL_FAIL(err, FL_ESTATE, "report %lld of node %lld was already taken",
                       (long long)r->sequence, (long long)r->node);
    for (uint32_t t = 0; t < r->exits; t++) {
        fl_put_u64(blob + 16 * t, (uint64_t)r->share[t]);
        fl_put_u64(blob + 16 * t + 8, (uint64_t)r->nll[t]);
    }
    return coord_sql_run(s, NULL, err,
                         "INSERT INTO reports(node, sequence, round, vote, tokens, nll_base,"
                         " nll_local, nll_voted, peak_rss, sums)"
                         " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                         "iiiiiiiiib", r->node, r->sequence, r->round, r->vote, r->tokens,
                         r->nll_base, r->nll_local, r->nll_voted, r->peak_rss_bytes, blob,
                         (size_t)(16 * r->exits));
}

static fl_status report_of(sqlite3_stmt *stmt, coord_report_row *ret, fl_err *err) {
    uint8_t blob[SUMS_BYTES];
    const size_t size = (size_t)coord_col_i(stmt, 9);
    *ret = (coord_report_row){.node = coord_col_i(stmt, 0),
                              .sequence = coord_col_i(stmt, 1),
                              .round = coord_col_i(stmt, 2),
                              .vote = coord_col_i(stmt, 3),
                              .tokens = coord_col_i(stmt, 4),
                              .nll_base = coord_col_i(stmt, 5),
                              .nll_local = coord_col_i(stmt, 6),
                              .nll_voted = coord_col_i(stmt, 7),
                              .peak_rss_bytes = coord_col_i(stmt, 8),
                              .exits = (uint32_t)(size / 16)};
    if (size > sizeof(blob) || size % 16 != 0 ||
        (size > 0 && !coord_col_blob(stmt, 10, blob, size)))
        return FL_FAIL(err, FL_EFORMAT, "the row of a report is damaged");
    for (uint32_t t = 0; t < ret->exits; t++) {
        ret->share[t] = (int64_t)fl_get_u64(blob + 16 * t);
        ret->nll[t] = (int64_t)fl_get_u64(blob + 16 * t + 8);
    }
    return FL_OK;
}

static fl_status each_report(coord_store *s, sqlite3_stmt *stmt, coord_report_fn fn, void *ctx,
                             fl_err *err) {
    coord_report_row row;
    bool more = true;
    fl_status st = coord_sql_step(s, stmt, &more, err);
    while (st == FL_OK && more) {
        st = report_of(stmt, &row, err);
        if (st == FL_OK) st = fn(ctx, &row, err);
        if (st == FL_OK) st = coord_sql_step(s, stmt, &more, err);
    }
    coord_sql_end(stmt);
    return st;
}

#define REPORT_COLUMNS                                                                             \
    "node, sequence, round, vote, tokens, nll_base, nll_local, nll_voted, peak_rss, length(sums)," \
    " sums"

fl_status coord_store_each_last_report(coord_store *s, coord_report_fn fn, void *ctx, fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT " REPORT_COLUMNS " FROM reports AS r WHERE sequence ="
                     " (SELECT max(sequence) FROM reports WHERE node = r.node) ORDER BY node",
                     ""));
    return each_report(s, stmt, fn, ctx, err);
}

fl_status coord_store_each_report(coord_store *s, int64_t round, coord_report_fn fn, void *ctx,
                                  fl_err *err) {
    sqlite3_stmt *stmt = NULL;
    FL_TRY(coord_sql(s, &stmt, err,
                     "SELECT " REPORT_COLUMNS " FROM reports WHERE round = ?"
                     " ORDER BY node, sequence",
                     "i", round));
    return each_report(s, stmt, fn, ctx, err);
}
