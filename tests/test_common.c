// Goal: the base module keeps its promises: sizes never wrap, reasons survive, plans are exact.
// Method: values chosen at the wrap; a three-step function walked through every failure.
#include "common/arena.h"
#include "common/checked.h"
#include "common/fault.h"
#include "common/status.h"
#include "tests/check.h"

static void test_arena_refuses_overflow(void) {
    _Alignas(64) static uint8_t block[64];
    fl_arena a;
    fl_arena_init(&a, block, sizeof(block));
    // Chosen so that the product wraps to 2 and would fit: a wrap to something huge proves nothing.
    T_CHECK(fl_arena_alloc(&a, SIZE_MAX / 2 + 2, 2, 1) == NULL, "count * size overflows");
    T_CHECK(fl_arena_alloc(&a, 65, 1, 1) == NULL, "one byte too many");
    const size_t mark = a.used;
    T_CHECK(FL_ARENA_NEW(&a, uint64_t, 4) != NULL, "fits");
    fl_arena_rewind(&a, mark);
    T_EQ(a.used, mark);
    T_EQ(a.peak, 32);
}

// The same sequence of requests, counted and then bound, needs the same number of bytes.
static size_t take(fl_arena *a, size_t n) {
    fl_arena_alloc(a, n, 1, 1);
    fl_arena_alloc(a, n, 8, 64);
    fl_arena_alloc(a, 3, n, 16);
    return a->peak;
}

static void test_counting_predicts_binding(void) {
    _Alignas(64) static uint8_t block[4096];
    for (size_t n = 1; n < 100; n++) {
        fl_arena count, real;
        fl_arena_init_counting(&count);
        const size_t size = take(&count, n);
        fl_arena_init(&real, block, size);
        T_EQ(take(&real, n), size);
        T_CHECK(fl_arena_alloc(&real, 1, 1, 1) == NULL, "n=%zu: nothing is left over", n);
    }
}

static void test_err_keeps_the_reason(void) {
    fl_err err = {0};
    T_EQ(FL_FAIL(&err, FL_ELIMIT, "layer %d", 7), FL_ELIMIT);
    T_STR(err.text, "layer 7");
    T_CHECK(strstr(err.where, "test_common.c:") != NULL, "%s", err.where);
    T_EQ(FL_FAIL(NULL, FL_EIO, "nobody listens"), FL_EIO);
    T_STR(fl_status_name(FL_EIO), "FL_EIO");
    T_EQ(FL_FAIL(&err, FL_EFORMAT, "name %s", "a\nb\x1b[2J"), FL_EFORMAT);
    T_STR(err.text, "name a?b?[2J");
}

static void test_checked_sizes(void) {
    size_t n = 7;
    T_CHECK(!fl_mul_size(SIZE_MAX, 2, &n), "wraps");
    T_CHECK(!fl_add_size(SIZE_MAX, 1, &n), "wraps");
    T_CHECK(!fl_round_up(SIZE_MAX, 64, &n), "wraps");
    T_EQ(n, 7);
    T_CHECK(fl_round_up(65, 64, &n) && n == 128, "%zu", n);
    T_CHECK(fl_round_up(128, 64, &n) && n == 128, "%zu", n);
}

static void test_reader_stays_inside(void) {
    static const uint8_t bytes[] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    for (size_t size = 0; size <= sizeof(bytes); size++) {
        uint8_t *p = t_guarded(size);
        memcpy(p, bytes, size);
        fl_reader r = {.in = {p, size}};
        const uint64_t v = fl_read_u64(&r);
        T_EQ(r.bad, size < 8);
        T_CHECK(v == (size < 8 ? 0 : 0x0807060504030201u), "%llx", (unsigned long long)v);
        T_EQ(fl_read_bytes(&r, SIZE_MAX).size, 0);
        T_CHECK(r.bad, "a size that wraps is refused");
        t_guarded_free(p, size);
    }
}

#ifdef FL_FAULTS
// Three fallible steps; the first failure wins and everything taken is given back.
static int held;

static fl_status step(void) {
    if (fl_fault()) return FL_EIO;
    held++;
    return FL_OK;
}

static fl_status three_steps(void) {
    fl_status st = FL_OK;
    for (int i = 0; i < 3 && st == FL_OK; i++) st = step();
    held = 0;
    return st;
}

static void test_every_failure_is_clean(void) {
    unsigned n = 0;
    do {
        fl_fault_arm(++n);
        const fl_status st = three_steps();
        T_EQ(st, fl_fault_fired() ? FL_EIO : FL_OK);
        T_EQ(held, 0);
    } while (fl_fault_fired());
    fl_fault_arm(0);
    T_EQ(n, 4); // three failures, then a clean run
}
#endif

T_MAIN({"arena_refuses_overflow", test_arena_refuses_overflow},
       {"counting_predicts_binding", test_counting_predicts_binding},
       {"err_keeps_the_reason", test_err_keeps_the_reason}, {"checked_sizes", test_checked_sizes},
       {"reader_stays_inside", test_reader_stays_inside},
#ifdef FL_FAULTS
       {"every_failure_is_clean", test_every_failure_is_clean},
#endif
)
