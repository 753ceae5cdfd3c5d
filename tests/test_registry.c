// Goal: nobody takes part who was not let in, and nobody uses more of us than his share.
// Method: every answer of the join table, with the states that lead to it; buckets against a plain
// model under random times.
#include "coordinator/registry.h"
#include "tests/check.h"

enum { MANY = 1000 };

static _Alignas(64) uint8_t block[1 << 20];
static coord_registry reg;
static fl_join_request ask;
static coord_join join;

static void fresh(uint32_t max) {
    fl_arena arena;
    fl_err err;
    fl_arena_init(&arena, block, sizeof(block));
    T_OK(coord_registry_init(&reg, max, &arena, &err), err);
    ask = (fl_join_request){.protocol = FL_PROTOCOL, .name = "pi"};
    memset(ask.identity_key, 1, FL_KEY_SIZE);
    memset(ask.curve_key, 2, FL_KEY_SIZE);
    join = (coord_join){
        .request = &ask, .transport_key = ask.curve_key, .proof_holds = true, .uses = 1};
}

static uint32_t put(int64_t id, coord_member_state state) {
    coord_member m = {.id = id, .state = state};
    uint32_t index = COORD_NOBODY;
    fl_err err;
    memcpy(m.name, ask.name, sizeof(m.name));
    memcpy(m.sign_key, ask.identity_key, FL_KEY_SIZE);
    memcpy(m.transport_key, ask.curve_key, FL_KEY_SIZE);
    T_OK(coord_registry_put(&reg, &m, &index, &err), err);
    return index;
}

static void expect(fl_verdict verdict, fl_code code, bool add, bool take_use, bool approve) {
    const coord_join_answer a = coord_registry_join(&reg, &join);
    T_EQ(a.verdict, verdict);
    T_EQ(a.code, code);
    T_EQ(a.add, add);
    T_EQ(a.take_use, take_use);
    T_EQ(a.approve, approve);
}

static void test_join_of_a_stranger(void) {
    fresh(2);
    expect(FL_VERDICT_PENDING, FL_CODE_PENDING, true, true, false);
    join.auto_approve = true;
    expect(FL_VERDICT_ACCEPTED, FL_CODE_NONE, true, true, false);
    join.uses = 0;
    expect(FL_VERDICT_REFUSED, FL_CODE_TOKEN, false, false, false);
    join.uses = 1, join.proof_holds = false;
    expect(FL_VERDICT_REFUSED, FL_CODE_TOKEN, false, false, false);
    join.proof_holds = true, ask.protocol = FL_PROTOCOL + 1;
    expect(FL_VERDICT_REFUSED, FL_CODE_PROTOCOL, false, false, false);
    ask.protocol = FL_PROTOCOL;
    uint8_t other[FL_KEY_SIZE] = {3};
    join.transport_key = other; // says one key, came with another
    expect(FL_VERDICT_REFUSED, FL_CODE_MALFORMED, false, false, false);
}

static void test_join_again(void) {
    fresh(2);
    const uint32_t index = put(7, COORD_MEMBER_PENDING);
    join.uses = 0; // its own use was the last one
    expect(FL_VERDICT_PENDING, FL_CODE_PENDING, false, false, false);
    join.uses = 1, join.auto_approve = true;
    expect(FL_VERDICT_ACCEPTED, FL_CODE_NONE, false, true, true);
    T_EQ(put(7, COORD_MEMBER_ACTIVE), index);
    expect(FL_VERDICT_ACCEPTED, FL_CODE_NONE, false, false, false);
    T_EQ(coord_registry_active(&reg), 1);
    put(7, COORD_MEMBER_REVOKED);
    expect(FL_VERDICT_REFUSED, FL_CODE_REVOKED, false, false, false);
    T_EQ(coord_registry_active(&reg), 0);
}

static void test_join_refuses_borrowed_keys_and_names(void) {
    fresh(2);
    put(7, COORD_MEMBER_ACTIVE);
    ask.curve_key[0] ^= 1; // a known identity with a new transport key
    expect(FL_VERDICT_REFUSED, FL_CODE_STATE, false, false, false);
    ask.curve_key[0] ^= 1, ask.identity_key[0] ^= 1; // and the reverse
    expect(FL_VERDICT_REFUSED, FL_CODE_STATE, false, false, false);
    ask.curve_key[0] ^= 1; // both new, the name is not
    expect(FL_VERDICT_REFUSED, FL_CODE_NAME, false, false, false);
    snprintf(ask.name, sizeof(ask.name), "pi-2");
    expect(FL_VERDICT_PENDING, FL_CODE_PENDING, true, true, false);
    put(8, COORD_MEMBER_REVOKED);
    memset(ask.identity_key, 9, FL_KEY_SIZE), memset(ask.curve_key, 9, FL_KEY_SIZE);
    expect(FL_VERDICT_REFUSED, FL_CODE_FULL, false, false, false);
}

static void test_members_keep_their_keys(void) {
    fresh(2);
    fl_err err;
    uint32_t index;
    T_EQ(put(7, COORD_MEMBER_ACTIVE), 0);
    coord_member m = reg.members[0];
    m.sign_key[5] ^= 1;
    T_EQ(coord_registry_put(&reg, &m, &index, &err), FL_ESTATE);
    m = reg.members[0], m.state = COORD_MEMBER_REVOKED;
    T_OK(coord_registry_put(&reg, &m, &index, &err), err);
    m.state = COORD_MEMBER_ACTIVE;
    T_EQ(coord_registry_put(&reg, &m, &index, &err), FL_ESTATE);
    T_EQ(coord_registry_by_id(&reg, 7), 0);
    T_EQ(coord_registry_by_id(&reg, 8), COORD_NOBODY);
    T_EQ(coord_registry_by_sign_key(&reg, m.sign_key), 0);
    T_EQ(coord_registry_by_transport_key(&reg, m.sign_key), COORD_NOBODY);
    m.id = 8, m.sign_key[0] ^= 1;
    T_OK(coord_registry_put(&reg, &m, &index, &err), err);
    m.id = 9, m.sign_key[0] ^= 2;
    T_EQ(coord_registry_put(&reg, &m, &index, &err), FL_ELIMIT);
}

static void test_quota_against_a_model(void) {
    for (int trial = 0; trial < 50; trial++) {
        coord_quota q = {0};
        const uint64_t rate = 1 + t_rand() % 1000, burst = 1 + t_rand() % 5000;
        uint64_t now = t_rand() % 1000000, began = now, taken = 0;
        double left = (double)burst;
        for (int i = 0; i < 500; i++) {
            const uint64_t step = t_rand() % 200, amount = t_rand() % 100;
            now += step;
            left = fmin((double)burst, left + (double)(step * rate) / 1000.0);
            const bool got = coord_quota_take(&q, rate, burst, amount, now);
            T_CHECK(got == (left + 1e-6 >= (double)amount), "left %g amount %d", left, (int)amount);
            if (got) left -= (double)amount, taken += amount;
        }
        T_CHECK((double)taken <= (double)burst + (double)rate * (double)(now - began) / 1000.0 + 1,
                "never more than the rate");
    }
    coord_quota q = {0};
    T_CHECK(coord_quota_take(&q, 1, 1, 1, 1000), "first");
    T_CHECK(!coord_quota_take(&q, 1, 1, 1, 5), "a clock that goes back gives nothing");
    T_CHECK(coord_quota_take(&q, 1ull << 39, 1, 1, UINT64_MAX), "a jump does not wrap");
}

static void draw_key(uint8_t key[FL_KEY_SIZE], bool alike) {
    for (size_t i = 0; i < FL_KEY_SIZE; i++) key[i] = (uint8_t)t_rand();
    if (alike) memset(key + FL_KEY_SIZE / 2, 7, 8); // all in one chain
}

// Every member is found by each of its names, and nobody by another: with keys as they are, and
// with keys made to fall into one chain.
static void test_many_members_are_found(void) {
    static uint8_t sign[MANY][FL_KEY_SIZE], transport[MANY][FL_KEY_SIZE];
    for (int alike = 0; alike < 2; alike++) {
        fresh(MANY);
        T_CHECK(coord_registry_size(MANY) <= sizeof(block), "the block is too small");
        for (int64_t i = 0; i < MANY; i++) {
            draw_key(sign[i], alike == 1);
            draw_key(transport[i], alike == 1);
            memcpy(ask.identity_key, sign[i], FL_KEY_SIZE);
            memcpy(ask.curve_key, transport[i], FL_KEY_SIZE);
            T_EQ(put(3 * i + 1, COORD_MEMBER_ACTIVE), i);
        }
        for (int64_t i = 0; i < MANY; i++) {
            T_EQ(coord_registry_by_id(&reg, 3 * i + 1), i);
            T_EQ(coord_registry_by_sign_key(&reg, sign[i]), i);
            T_EQ(coord_registry_by_transport_key(&reg, transport[i]), i);
            T_EQ(coord_registry_by_id(&reg, 3 * i + 2), COORD_NOBODY);
            T_EQ(coord_registry_by_sign_key(&reg, transport[i]), COORD_NOBODY);
            T_EQ(coord_registry_by_transport_key(&reg, sign[i]), COORD_NOBODY);
        }
    }
}

T_MAIN({"join_of_a_stranger", test_join_of_a_stranger}, {"join_again", test_join_again},
       {"join_refuses_borrowed_keys_and_names", test_join_refuses_borrowed_keys_and_names},
       {"members_keep_their_keys", test_members_keep_their_keys},
       {"many_members_are_found", test_many_members_are_found},
       {"quota_against_a_model", test_quota_against_a_model})
