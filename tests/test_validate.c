// Goal: a worse model is noticed whatever f nodes say, and never because of what f nodes say; who
// points away from the others is put away, for a while, and comes back when it behaves; what is
// remembered survives as bytes.
// Method: every position of the liars against plain fleets, seeds of honest noise, the rules'
// limits one by one, encodings cut at every byte.
#include "coordinator/validate.h"
#include "tests/check.h"

enum { ALL = 15, LIARS = 3 };

static coord_judgement judge(const double *nats, uint32_t n, uint32_t members, double *ret) {
    coord_change c[64];
    double unused;
    for (uint32_t i = 0; i < n; i++) c[i] = (coord_change){.nats = nats[i], .tokens = 1000000};
    return coord_validate(c, n, members, 0.2, 0.02, ret != NULL ? ret : &unused);
}

static void test_what_all_say_is_judged(void) {
    double nats[ALL], change;
    for (int i = 0; i < ALL; i++) nats[i] = 0.3 + 0.01 * i;
    T_EQ(judge(nats, ALL, ALL, &change), COORD_WORSE);
    T_NEAR(change, 0.35, 1e-12, "the sixth of fifteen: (15 - 3 - 1) / 2 is 5");
    for (int i = 0; i < ALL; i++) nats[i] = -0.3 + 0.01 * i;
    T_EQ(judge(nats, ALL, ALL, &change), COORD_BETTER);
    T_NEAR(change, -0.21, 1e-12, "its mirror, the tenth");
    for (int i = 0; i < ALL; i++) nats[i] = 0.02 * (i - 7) / 7.0;
    T_EQ(judge(nats, ALL, ALL, NULL), COORD_NO_WORSE);
    for (int i = 0; i < ALL; i++) nats[i] = 0.019;
    T_EQ(judge(nats, ALL, ALL, NULL), COORD_NO_WORSE); // within the tolerance
    T_EQ(judge(nats, 2, 2, NULL), COORD_UNKNOWN);      // too few to say
    T_EQ(judge(nats, 7, ALL, NULL), COORD_UNKNOWN);    // less than half of the fleet
    T_EQ(judge(nats, 8, ALL, NULL), COORD_NO_WORSE);
    T_EQ(judge(nats, 0, 0, NULL), COORD_UNKNOWN);
}

// Three liars say anything: a fleet that is better is never found worse, one that is worse is
// never found better, and with no lie in it a clear change is found.
static void test_three_liars_change_no_judgement(void) {
    static const double lies[] = {1e9, -1e9, 1.0, -1.0, 0.0};
    for (int seed = 0; seed < 2000; seed++) {
        double nats[ALL];
        const double lie = lies[seed % 5];
        for (int i = 0; i < ALL; i++)
            nats[i] = i < LIARS ? lie : -0.05 + 0.049 * (double)t_randf();
        T_CHECK(judge(nats, ALL, ALL, NULL) != COORD_WORSE, "liars undo a good round, %g", lie);
        for (int i = LIARS; i < ALL; i++) nats[i] = 0.05 + 0.049 * (double)t_randf();
        T_CHECK(judge(nats, ALL, ALL, NULL) != COORD_BETTER, "liars praise a bad round, %g", lie);
        for (int i = LIARS; i < ALL; i++) nats[i] = 0.5 + 0.1 * (double)t_randf();
        T_EQ(judge(nats, ALL, ALL, NULL), COORD_WORSE);
    }
}

static void test_few_tokens_prove_little(void) {
    coord_change c[5];
    double change;
    for (int tokens = 0; tokens < 3; tokens++) {
        static const uint64_t counts[] = {100, 400, 10000}; // errors of 0.1, 0.05, 0.01
        for (int i = 0; i < 5; i++) c[i] = (coord_change){.nats = 0.06, .tokens = counts[tokens]};
        T_EQ(coord_validate(c, 5, 5, 0.2, 0.02, &change),
             tokens == 2 ? COORD_WORSE : COORD_NO_WORSE);
    }
    // What cannot be a measurement is not one.
    c[0].nats = (double)NAN, c[1].nats = (double)INFINITY, c[2].tokens = 0;
    T_EQ(coord_validate(c, 5, 5, 0.2, 0.02, &change), COORD_UNKNOWN);
}

static void test_good_layers_follow_judgements(void) {
    coord_good g = {0};
    T_CHECK(!coord_good_judged(&g, COORD_UNKNOWN, 1), "nothing is known");
    T_CHECK(coord_good_judged(&g, COORD_NO_WORSE, 2), "the first that were measured");
    g.known = true, g.round = 2;
    T_CHECK(!coord_good_judged(&g, COORD_NO_WORSE, 3), "drift is measured from the good ones");
    T_CHECK(coord_good_judged(&g, COORD_BETTER, 4), "better ones");
    g.round = 4;
    T_CHECK(!coord_good_judged(&g, COORD_WORSE, 5), "worse ones");
    T_CHECK(!coord_good_judged(&g, COORD_WORSE, 4 + COORD_GOOD_AGE), "worse ones, ever");
    T_CHECK(!coord_good_judged(&g, COORD_NO_WORSE, 3 + COORD_GOOD_AGE), "not yet");
    T_CHECK(coord_good_judged(&g, COORD_NO_WORSE, 4 + COORD_GOOD_AGE), "after a while");
    g.last = 100;
    T_CHECK(!coord_good_judged(&g, COORD_UNKNOWN, 100 + COORD_GOOD_FORGET) && g.known, "kept");
    T_CHECK(!coord_good_judged(&g, COORD_UNKNOWN, 101 + COORD_GOOD_FORGET) && !g.known, "gone");
}

// ---- conduct

typedef struct changes {
    int quarantined, released;
    int64_t last;
} changes;

static void count_change(void *ctx, const coord_conduct *row, coord_conduct_change change) {
    changes *c = ctx;
    c->quarantined += change == COORD_CONDUCT_QUARANTINED;
    c->released += change == COORD_CONDUCT_RELEASED;
    c->last = row->node;
}

static void conduct_round(coord_conducts *c, int64_t round, double bad, uint32_t most,
                          changes *seen) {
    for (int64_t node = 1; node <= ALL; node++) {
        const double honest = 0.3 + 0.3 * (double)t_randf();
        for (int layer = 0; layer < 4; layer++)
            coord_conduct_note(c, node, node > ALL - LIARS ? bad : honest);
    }
    coord_conducts_close(c, round, most, count_change, seen);
}

static coord_conduct rows[COORD_CONDUCT_MAX];

static void test_who_points_away_is_put_away(void) {
    coord_conducts c = {.rows = rows};
    changes seen = {0};
    for (int64_t round = 1; round < COORD_SEEN_MIN; round++)
        conduct_round(&c, round, -0.6, 3, &seen);
    T_EQ(seen.quarantined, 0); // too early to say
    conduct_round(&c, 3, -0.6, 3, &seen);
    T_EQ(seen.quarantined, 3);
    for (int64_t node = 1; node <= ALL; node++)
        T_EQ(coord_is_quarantined(&c, node, 4), node > ALL - LIARS);
    T_CHECK(coord_is_quarantined(&c, ALL, 3 + COORD_QUARANTINE), "to the end");
    T_CHECK(!coord_is_quarantined(&c, ALL, 4 + COORD_QUARANTINE), "and no longer");
    // It goes on: the time is extended, to twice as long, and nobody else is put away.
    for (int64_t round = 4; round <= 3 + COORD_QUARANTINE; round++)
        conduct_round(&c, round, -0.6, 3, &seen);
    T_EQ(seen.quarantined, 6);
    T_EQ(seen.released, 0);
    const int64_t end = 3 + 3 * COORD_QUARANTINE;
    T_CHECK(coord_is_quarantined(&c, ALL, end) && !coord_is_quarantined(&c, ALL, end + 1), "twice");
    // They behave: at the end of their time they are released by themselves.
    for (int64_t round = 4 + COORD_QUARANTINE; round <= end; round++)
        conduct_round(&c, round, 0.3, 3, &seen);
    T_EQ(seen.released, 3);
    for (int64_t node = 1; node <= ALL; node++) T_CHECK(!coord_is_quarantined(&c, node, end + 1),
                                                        "node %d is free", (int)node);
}

static void test_no_more_than_may_be_bad_are_put_away(void) {
    coord_conducts c = {.rows = rows};
    changes seen = {0};
    for (int64_t round = 1; round < 8; round++) conduct_round(&c, round, -0.6, 2, &seen);
    T_EQ(seen.quarantined, 2);
    seen = (changes){0}, c.count = 0;
    for (int64_t round = 1; round < 8; round++) conduct_round(&c, round, -0.6, 0, &seen);
    T_EQ(seen.quarantined, 0);
}

static void test_differing_is_no_crime(void) {
    coord_conducts c = {.rows = rows};
    changes seen = {0};
    for (int64_t round = 1; round < 300; round++) conduct_round(&c, round, 0.0, 3, &seen);
    T_EQ(seen.quarantined, 0); // nothing in common with the others, and no harm in it
    c.count = 0;
    for (int64_t round = 1; round < 9; round++) { // four nodes: who is to say which is right
        for (int64_t node = 1; node <= 4; node++)
            coord_conduct_note(&c, node, node == 1 ? -1.0 : 0.9);
        coord_conducts_close(&c, round, 1, count_change, &seen);
    }
    T_EQ(seen.quarantined, 0);
}

static void test_refused_updates_count_against_a_node(void) {
    coord_conducts c = {.rows = rows};
    changes seen = {0};
    for (int64_t round = 1; round <= COORD_SEEN_MIN; round++) {
        for (int64_t node = 1; node <= ALL; node++)
            coord_conduct_note(&c, node, node == 7 ? -1.0 : 0.3 + 0.1 * (double)t_randf());
        coord_conducts_close(&c, round, 3, count_change, &seen);
    }
    T_EQ(seen.quarantined, 1);
    T_EQ(seen.last, 7);
}

static void test_memory_survives_as_bytes(void) {
    static uint8_t bytes[COORD_CONDUCT_MAX * COORD_CONDUCT_BYTES];
    static coord_conduct again[COORD_CONDUCT_MAX];
    uint8_t good_bytes[COORD_GOOD_BYTES];
    coord_conducts c = {.rows = rows}, d = {.rows = again};
    changes seen = {0};
    fl_err err;
    for (int64_t round = 1; round < 6; round++) conduct_round(&c, round, -0.4, 3, &seen);
    const size_t size = coord_conducts_encode(&c, bytes);
    T_OK(coord_conducts_decode((fl_bytes){bytes, size}, &d, &err), err);
    T_EQ(d.count, c.count);
    for (uint32_t i = 0; i < c.count; i++)
        T_CHECK(memcmp(&rows[i], &again[i], sizeof(rows[i])) == 0, "row %u", i);
    for (size_t cut = 1; cut < COORD_CONDUCT_BYTES; cut++)
        T_EQ(coord_conducts_decode((fl_bytes){bytes, cut}, &d, &err), FL_EFORMAT);
    coord_good g = {.known = true, .round = 7, .last = 9, .layers = 3, .exits = 2}, h;
    g.version[2] = 5, g.vote[1] = 0.75;
    const size_t n = coord_good_encode(&g, good_bytes);
    T_OK(coord_good_decode((fl_bytes){good_bytes, n}, &h, &err), err);
    T_CHECK(h.known && h.round == 7 && h.last == 9 && h.version[2] == 5 && h.vote[1] == 0.75 &&
                h.layers == 3 && h.exits == 2,
            "the same again");
    for (size_t cut = 0; cut < n; cut++)
        T_EQ(coord_good_decode((fl_bytes){good_bytes, cut}, &h, &err), FL_EFORMAT);
    good_bytes[25] = 2; // 515 layers
    T_EQ(coord_good_decode((fl_bytes){good_bytes, n}, &h, &err), FL_EFORMAT);
}

T_MAIN({"what_all_say_is_judged", test_what_all_say_is_judged},
       {"three_liars_change_no_judgement", test_three_liars_change_no_judgement},
       {"few_tokens_prove_little", test_few_tokens_prove_little},
       {"good_layers_follow_judgements", test_good_layers_follow_judgements},
       {"who_points_away_is_put_away", test_who_points_away_is_put_away},
       {"no_more_than_may_be_bad_are_put_away", test_no_more_than_may_be_bad_are_put_away},
       {"differing_is_no_crime", test_differing_is_no_crime},
       {"refused_updates_count_against_a_node", test_refused_updates_count_against_a_node},
       {"memory_survives_as_bytes", test_memory_survives_as_bytes})
