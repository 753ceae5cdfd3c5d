// Goal: error feedback loses nothing, whatever is refused; a node sends as much as the coordinator
// wants, its link can carry in the task's time and the owner allows. Method: exact integer sums
// over many updates of every encoding; what is kept as bytes, cut and altered everywhere; the
// choice over whole ranges of its inputs.
#include "common/checked.h"
#include "node/upload/choose.h"
#include "node/upload/residual.h"
#include "node/upload/uplink.h"
#include "tests/check.h"

// Layers of SmolLM2-135M at rank 8: q, k, v, o, gate, up, down.
enum { LAYER = (576 + 192 + 192 + 576 + 1536 + 1536 + 576) * 8, ROUNDS = 40, COUNT = 5000 };

static void fill(float *v, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        const float x = t_randf();
        v[i] = 0.02f * x * x * x + 0.001f;
    }
}

// ---- error feedback

// A node and the coordinator over many updates, some of which are refused and come back. Exactly:
// what was read and what is kept are together what was changed.
static void conserve(fl_update_encoding encoding, uint32_t keep) {
    static float delta[COUNT];
    static int64_t sum[COUNT], changed[COUNT], read[COUNT], now[COUNT];
    memset(sum, 0, sizeof(sum)), memset(changed, 0, sizeof(changed)), memset(read, 0, sizeof(read));
    const size_t most = fl_update_size_max(COUNT, encoding, keep);
    uint8_t *bytes = t_guarded(most);
    fl_err err;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        const fl_update_info info = {encoding, 3, COUNT, round, 100};
        bool kept;
        size_t size;
        fl_update u;
        fill(delta, COUNT);
        T_OK(node_residual_add(delta, COUNT, sum, &kept, &err), err);
        T_CHECK(kept, "sums of small changes fit");
        for (uint32_t i = 0; i < COUNT; i++) changed[i] += llrint((double)delta[i] * 0x1p32);
        T_OK(fl_update_encode_fixed(&info, keep, sum, round, bytes, most, &size, &err), err);
        T_OK(fl_update_open((fl_bytes){bytes, size}, &u, &err), err);
        if (round % 5 == 4) continue; // refused, but good: all of it stays in the sum
        node_residual_take(&u, sum);
        fl_update_fixed(&u, 0, COUNT, now);
        for (uint32_t i = 0; i < COUNT; i++) read[i] += now[i];
    }
    double left = 0, all = 0;
    for (uint32_t i = 0; i < COUNT; i++) {
        if (read[i] + sum[i] != changed[i]) {
            T_CHECK(false, "%s: value %u: read %lld + kept %lld, changed %lld",
                    fl_update_encoding_name(encoding), i, (long long)read[i], (long long)sum[i],
                    (long long)changed[i]);
            break;
        }
        left += fabs((double)sum[i]), all += fabs((double)changed[i]);
    }
    // It is fed back, not hoarded: of a change that always goes the same way, most arrives.
    T_CHECK(left < 0.5 * all, "%s: %.0f %% is still kept", fl_update_encoding_name(encoding),
            100 * left / all);
    t_guarded_free(bytes, most);
}

static void test_nothing_is_lost(void) {
    for (int e = FL_UPDATE_INT16; e <= FL_UPDATE_ENCODINGS; e++)
        conserve((fl_update_encoding)e, COUNT / 10);
    conserve(FL_UPDATE_SPARSE4, COUNT);
    conserve(FL_UPDATE_SPARSE8, COUNT);
}

static void test_sums_that_do_not_fit(void) {
    float delta[3] = {1.0f, -2.0f, 63.0f};
    int64_t sum[3] = {0, 0, (int64_t)2 << 32};
    bool kept = true;
    fl_err err;
    T_OK(node_residual_add(delta, 3, sum, &kept, &err), err);
    T_CHECK(!kept && sum[0] == (int64_t)1 << 32 && sum[2] == (int64_t)63 << 32, "let go");
    const float bad[] = {NAN, INFINITY, -INFINITY, 64.5f, -65.0f};
    for (size_t i = 0; i < FL_COUNT(bad); i++) {
        delta[1] = bad[i];
        T_EQ(node_residual_add(delta, 3, sum, &kept, NULL), FL_EFORMAT);
        T_CHECK(sum[0] == (int64_t)1 << 32 && sum[2] == (int64_t)63 << 32, "untouched");
    }
}

static void test_age(void) {
    for (uint64_t versions = 0; versions < 400; versions++) {
        int64_t v[3] = {1000000, -1000000, 0};
        node_residual_age(v, 3, versions);
        const uint64_t halvings = versions / NODE_RESIDUAL_FRESH;
        T_EQ(v[0], halvings < 40 ? (int64_t)1000000 >> halvings : 0);
        T_EQ(v[1], -v[0]);
        T_EQ(v[2], 0);
    }
}

static void test_judge(void) {
    T_EQ(node_residual_judge(FL_VERDICT_ACCEPTED, FL_CODE_NONE), NODE_RESIDUAL_KEEP);
    T_EQ(node_residual_judge(FL_VERDICT_DUPLICATE, FL_CODE_NONE), NODE_RESIDUAL_KEEP);
    const fl_code good[] = {FL_CODE_BASE, FL_CODE_LATE, FL_CODE_NOT_ASSIGNED, FL_CODE_DIGEST,
                            FL_CODE_INTERNAL, FL_CODE_SIGNATURE, FL_CODE_QUOTA, FL_CODE_ENCODING};
    const fl_code bad[] = {FL_CODE_NORM, FL_CODE_NOT_FINITE, FL_CODE_SHAPE, FL_CODE_RUN,
                           FL_CODE_MALFORMED};
    for (size_t i = 0; i < FL_COUNT(good); i++)
        T_EQ(node_residual_judge(FL_VERDICT_REFUSED, good[i]), NODE_RESIDUAL_RETURN);
    for (size_t i = 0; i < FL_COUNT(bad); i++)
        T_EQ(node_residual_judge(FL_VERDICT_REFUSED, bad[i]), NODE_RESIDUAL_DROP);
}

// What is kept, as bytes: the same again, with the update's content when it comes back; every cut
// and every altered byte is noticed, and so is another run, node, layer or count.
static void test_kept_bytes(void) {
    enum { N = 300 };
    static const uint8_t run[FL_ID_SIZE] = {1}, other_run[FL_ID_SIZE] = {2}, random[24] = {9};
    uint8_t key[FL_KEY_SIZE], payload[2000];
    int64_t v[N], back[N], sent[N];
    fl_secret *me = NULL, *you = NULL;
    fl_err err;
    T_OK(fl_crypto_init(&err), err);
    T_OK(fl_sign_new(&me, key, &err), err);
    T_OK(fl_sign_new(&you, key, &err), err);
    for (int i = 0; i < N; i++) v[i] = llrint((double)t_randf() * 0x1p38);
    const fl_update_info info = {FL_UPDATE_SPARSE4, 7, N, 5, 1};
    size_t size;
    fl_update u;
    T_OK(fl_update_encode_fixed(&info, 30, v, 1, payload, sizeof(payload), &size, &err), err);
    T_OK(fl_update_open((fl_bytes){payload, size}, &u, &err), err);
    fl_update_fixed(&u, 0, N, sent);
    node_residual_take(&u, v);
    v[0] = ((int64_t)1 << 39) - 1, v[1] = -((int64_t)1 << 39);
    const size_t all = node_residual_size(N, size);
    uint8_t *made = t_guarded(all), *copy = t_guarded(all);
    const node_residual head = {7, N, 5, 77};
    node_residual got;
    node_residual_write(&head, (fl_bytes){payload, size}, v, me, run, random, made);
    for (int whole = 0; whole < 2; whole++) {
        memcpy(copy, made, all);
        T_OK(node_residual_read(copy, all, 7, N, whole, me, run, &got, back, &err), err);
        T_CHECK(got.base_version == 5 && got.sequence == 77, "head");
        for (int i = 0; i < N; i++) T_EQ(back[i], v[i] + (whole ? sent[i] : 0));
    }
    for (size_t n = 0; n < all; n++) {
        memcpy(copy, made, all);
        T_CHECK(node_residual_read(copy, n, 7, N, false, me, run, &got, back, NULL) != FL_OK,
                "cut to %zu", n);
        memcpy(copy, made, all);
        copy[n] ^= 1;
        T_EQ(node_residual_read(copy, all, 7, N, false, me, run, &got, back, NULL), FL_EAUTH);
    }
    memcpy(copy, made, all);
    T_EQ(node_residual_read(copy, all, 7, N, false, you, run, &got, back, NULL), FL_EAUTH);
    memcpy(copy, made, all);
    T_EQ(node_residual_read(copy, all, 7, N, false, me, other_run, &got, back, NULL), FL_EAUTH);
    memcpy(copy, made, all);
    T_EQ(node_residual_read(copy, all, 8, N, false, me, run, &got, back, NULL), FL_ELIMIT);
    memcpy(copy, made, all);
    T_EQ(node_residual_read(copy, all, 7, N - 1, false, me, run, &got, back, NULL), FL_ELIMIT);
    t_guarded_free(made, all), t_guarded_free(copy, all);
    fl_secret_close(me), fl_secret_close(you);
}

// ---- the choice

static const uint32_t window[] = {LAYER, LAYER, LAYER, LAYER, LAYER, LAYER, LAYER, LAYER};

static node_upload_ask ask_of(fl_update_encoding most, double bytes_per_s) {
    return (node_upload_ask){.only = FL_UPDATE_INT8,
                             .most = most,
                             .keep_ppm = 50000,
                             .counts = window,
                             .layers = FL_COUNT(window),
                             .bytes_per_s = bytes_per_s,
                             .rtt_s = 0.02,
                             .work_s = 60,
                             .left_s = 3000,
                             .budget_left = UINT64_MAX,
                             .budget_share = UINT64_MAX};
}

// The faster the link, the more; never above what is wanted, and in time whenever that is possible.
static void test_choice_follows_the_link(void) {
    for (int most = FL_UPDATE_INT16; most <= FL_UPDATE_ENCODINGS; most++) {
        uint64_t before = 0;
        node_upload_choice c = {.bytes = 0};
        for (double rate = 100; rate < 1e9; rate *= 1.3) {
            const node_upload_ask a = ask_of((fl_update_encoding)most, rate);
            c = node_upload_choose(&a);
            T_CHECK(c.bytes >= before, "%.0f bytes/s: %llu bytes", rate,
                    (unsigned long long)c.bytes);
            T_CHECK(c.encoding >= (fl_update_encoding)most, "more than is wanted");
            const double s = (double)c.bytes / rate + 3 * 0.02 * a.layers;
            T_CHECK(s <= 15.0 || c.bytes == c.least, "%.0f bytes/s: %.1f s", rate, s);
            T_CHECK((c.why == NODE_UPLOAD_WANTED) == (c.encoding == (fl_update_encoding)most) ||
                        most == FL_UPDATE_SPARSE4,
                    "why");
            before = c.bytes;
        }
        T_CHECK(c.why == NODE_UPLOAD_WANTED && c.encoding == (fl_update_encoding)most, "the top");
    }
    node_upload_ask a = ask_of(FL_UPDATE_INT16, 0);
    node_upload_choice c = node_upload_choose(&a);
    T_CHECK(c.why == NODE_UPLOAD_UNMEASURED && c.encoding == FL_UPDATE_SPARSE4, "not measured");
    a = ask_of(FL_UPDATE_INT8, 1e6);
    a.left_s = 0.2; // of 8 layers, 0.48 s of round trips alone
    c = node_upload_choose(&a);
    T_CHECK(c.why == NODE_UPLOAD_LINK && c.bytes == c.least, "no time: the least");
    a.most = 0; // a coordinator of before
    c = node_upload_choose(&a);
    T_CHECK(c.encoding == FL_UPDATE_INT8 && c.why == NODE_UPLOAD_WANTED, "what it knows");
}

static void test_choice_of_the_owner(void) {
    node_upload_ask a = ask_of(FL_UPDATE_INT16, 1000);
    a.rule.mode = NODE_UPLOAD_DENSE;
    node_upload_choice c = node_upload_choose(&a);
    T_CHECK(c.encoding == FL_UPDATE_INT16 && c.why == NODE_UPLOAD_WANTED, "dense on a slow link");
    a.most = FL_UPDATE_SPARSE4;
    c = node_upload_choose(&a);
    T_CHECK(c.encoding == FL_UPDATE_SPARSE4 && c.keep_ppm == 50000, "no more than is wanted");
    a.rule.mode = NODE_UPLOAD_RATIO;
    a.rule.ratio = 0.01;
    c = node_upload_choose(&a);
    T_CHECK(c.encoding == FL_UPDATE_SPARSE8 && c.keep_ppm == 10000, "1 %% in 8 bits");
    T_EQ(c.why, NODE_UPLOAD_OWNER);
    a.rule.ratio = 0.9;
    c = node_upload_choose(&a);
    T_CHECK(c.encoding == FL_UPDATE_SPARSE4 && c.keep_ppm == 50000, "no more than is wanted");
}

static void test_choice_within_the_budget(void) {
    for (int mode = NODE_UPLOAD_AUTO; mode <= NODE_UPLOAD_RATIO; mode++) {
        node_upload_ask a = ask_of(FL_UPDATE_INT8, 1e8);
        a.rule = (node_upload_rule){.mode = (node_upload_mode)mode, .ratio = 0.2};
        uint64_t before = UINT64_MAX;
        for (uint64_t share = 2000000; share > 10; share -= share / 10 + 1) {
            a.budget_share = share;
            a.budget_left = 10000000;
            const node_upload_choice c = node_upload_choose(&a);
            T_CHECK(c.bytes <= before && (c.bytes <= share || c.bytes == c.least), "share");
            T_CHECK(c.why != NODE_UPLOAD_SPENT, "there is enough for the least");
            before = c.bytes;
            a.budget_left = share;
            const node_upload_choice d = node_upload_choose(&a);
            T_CHECK((d.why == NODE_UPLOAD_SPENT) == (share < d.least), "%llu left of %llu",
                    (unsigned long long)share, (unsigned long long)d.least);
        }
        T_CHECK(before < 20000, "the least of 8 layers: %llu", (unsigned long long)before);
    }
}

static void test_budget_of_a_day(void) {
    const node_upload_rule rule = {.budget_bytes = 100000}, none = {0};
    const int64_t noon = 100 * (int64_t)NODE_UPLOAD_DAY_S + NODE_UPLOAD_DAY_S / 2;
    node_upload_spent s = {0};
    node_upload_roll(&s, noon);
    T_EQ(node_upload_left(&s, &rule), 100000);
    T_EQ(node_upload_share(&s, &rule, noon, 4320), 10000); // a tenth of half a day
    T_EQ(node_upload_share(&s, &rule, noon, 1e9), 100000);
    s.bytes = 95000, s.least = 4000;
    T_CHECK(!node_upload_waits(&s, &rule, noon), "5000 are enough");
    s.bytes = 97000;
    T_CHECK(node_upload_waits(&s, &rule, noon) && !node_upload_waits(&s, &none, noon), "waits");
    T_CHECK(!node_upload_waits(&s, &rule, noon + NODE_UPLOAD_DAY_S), "until tomorrow");
    node_upload_roll(&s, noon + 10);
    T_EQ(node_upload_left(&s, &rule), 3000);
    node_upload_roll(&s, noon + NODE_UPLOAD_DAY_S);
    T_EQ(node_upload_left(&s, &rule), 100000);
    s.bytes = INT64_MAX;
    T_EQ(node_upload_left(&s, &rule), 0);
    T_CHECK(node_upload_left(&s, &none) == UINT64_MAX, "no budget");
}

static void test_parse(void) {
    const struct {
        const char *text;
        int mode;
        double ratio;
    } good[] = {{"auto", NODE_UPLOAD_AUTO, 0}, {"dense", NODE_UPLOAD_DENSE, 0},
                {"0.05", NODE_UPLOAD_RATIO, 0.05}, {"5%", NODE_UPLOAD_RATIO, 0.05},
                {"1", NODE_UPLOAD_RATIO, 1}, {"100%", NODE_UPLOAD_RATIO, 1}};
    const char *const bad[] = {"", "0", "-1", "1.1", "101%", "nan", "5%%", "full", "%", "5 %"};
    for (size_t i = 0; i < FL_COUNT(good); i++) {
        node_upload_rule r = {.budget_bytes = 7};
        T_EQ(node_upload_parse(good[i].text, &r, NULL), FL_OK);
        T_EQ(r.mode, good[i].mode);
        T_EQ(r.budget_bytes, 7);
        if (r.mode == NODE_UPLOAD_RATIO) T_NEAR(r.ratio, good[i].ratio, 1e-12, "%s", good[i].text);
    }
    for (size_t i = 0; i < FL_COUNT(bad); i++) {
        node_upload_rule r = {.budget_bytes = 7};
        T_EQ(node_upload_parse(bad[i], &r, NULL), FL_EARG);
        T_CHECK(r.mode == NODE_UPLOAD_AUTO && r.budget_bytes == 7, "untouched");
    }
}

// A link of known rate and delay is found from its round trips, to what the clock can show.
static void test_uplink(void) {
    const double rates[] = {4000, 31250, 125000, 1e6, 6.25e6};
    for (size_t i = 0; i < FL_COUNT(rates); i++) {
        for (uint64_t rtt = 0; rtt <= 400; rtt += 80) {
            node_uplink u = {0};
            for (int n = 0; n < 30; n++) {
                const uint32_t size = n % 2 == 0 ? 3000 : 262144;
                node_uplink_small(&u, rtt);
                node_uplink_chunk(&u, size, rtt + (uint64_t)(size / rates[i] * 1000.0 + 0.5));
            }
            T_NEAR(u.rtt_s, rtt == 0 ? 0.001 : (double)rtt * 1e-3, 1e-6, "round trip");
            // A chunk that takes less than half a round trip more only gives a bound.
            const double seen = 262144 / fmax((double)rtt * 0.5e-3, 0.001);
            T_CHECK(u.bytes_per_s > 0.8 * fmin(rates[i], seen) && u.bytes_per_s < 1.6 * rates[i],
                    "%.0f bytes/s at %llu ms: %.0f", rates[i], (unsigned long long)rtt,
                    u.bytes_per_s);
        }
    }
    node_uplink u = {0};
    node_uplink_small(&u, 50);
    node_uplink_chunk(&u, 262144, 300); // 1 MB/s
    const double before = u.bytes_per_s;
    for (int n = 0; n < 50; n++) node_uplink_chunk(&u, 1000, 51);
    T_CHECK(u.bytes_per_s == before, "small chunks say nothing against it");
}

// The default: at least 50 times fewer bytes than the layer's values in f32, sealed both.
static void test_fifty_times_fewer(void) {
    static int64_t v[LAYER];
    static float delta[LAYER];
    bool kept;
    fl_err err;
    fill(delta, LAYER);
    T_OK(node_residual_add(delta, LAYER, v, &kept, &err), err);
    node_upload_ask a = ask_of(FL_UPDATE_SPARSE4, 1e6);
    const node_upload_choice c = node_upload_choose(&a);
    const uint32_t keep = node_upload_keep(LAYER, c.keep_ppm);
    const size_t most = fl_update_size_max(LAYER, c.encoding, keep);
    uint8_t *bytes = t_guarded(most);
    const fl_update_info info = {c.encoding, 0, LAYER, 1, 1};
    size_t size;
    T_OK(fl_update_encode_fixed(&info, keep, v, 1, bytes, most, &size, &err), err);
    const double dense = FL_UPDATE_HEAD + 4.0 * LAYER + 112, sparse = (double)size + 112;
    T_CHECK(dense / sparse >= 50, "%.0f bytes, %.1f times fewer", sparse, dense / sparse);
    T_CHECK((uint64_t)size + NODE_UPLOAD_OVERHEAD <= c.bytes / a.layers * 11 / 10, "planned");
    t_guarded_free(bytes, most);
}

T_MAIN({"nothing_is_lost", test_nothing_is_lost},
       {"sums_that_do_not_fit", test_sums_that_do_not_fit}, {"age", test_age},
       {"judge", test_judge}, {"kept_bytes", test_kept_bytes},
       {"choice_follows_the_link", test_choice_follows_the_link},
       {"choice_of_the_owner", test_choice_of_the_owner},
       {"choice_within_the_budget", test_choice_within_the_budget},
       {"budget_of_a_day", test_budget_of_a_day}, {"parse", test_parse}, {"uplink", test_uplink},
       {"fifty_times_fewer", test_fifty_times_fewer})
