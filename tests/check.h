// check.h: a thin vocabulary over cmocka. One binary per test file; ctest runs each with a limit.
// A cross-build has no cmocka for its target: with FL_TESTS_PLAIN a loop of ours runs the cases.
//   test_x            run all tests          test_x --seed=7        replay a random failure
//   test_x frame      run names with "frame" FL_TEST_NO_SKIP=1      a skip is a failure (full CI)
// A failed check prints its values and goes on, so one run shows everything that is wrong; the
// case fails when it ends.
#ifndef FL_TESTS_CHECK_H
#define FL_TESTS_CHECK_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef FL_TESTS_PLAIN
#include <cmocka.h>
#endif

enum { T_CASES_MAX = 256 };

typedef struct t_case {
    const char *name;
    void (*run)(void);
} t_case;

#ifdef FL_TESTS_PLAIN
static jmp_buf t_leave;
#define fail() longjmp(t_leave, 1)
#endif
static int t_failed, t_skipped;
static uint64_t t_seed = 1, t_first_seed = 1;

#define T_CHECK(cond, ...)                                                                         \
    ((cond) ? (void)0                                                                              \
            : (t_failed++, fprintf(stderr, "%s:%d: %s | ", __FILE__, __LINE__, #cond),             \
               fprintf(stderr, __VA_ARGS__), (void)fputc('\n', stderr)))
#define T_EQ(got, want)                                                                            \
    do {                                                                                           \
        const long long got_ = (long long)(got), want_ = (long long)(want);                        \
        T_CHECK(got_ == want_, "%s = %lld, want %lld", #got, got_, want_);                         \
    } while (0)
#define T_STR(got, want)                                                                           \
    do {                                                                                           \
        const char *got_ = (got), *want_ = (want);                                                 \
        T_CHECK(strcmp(got_, want_) == 0, "%s = \"%s\", want \"%s\"", #got, got_, want_);          \
    } while (0)
// Stops the case: what follows would crash without it.
#define T_NEED(cond, ...)                                                                          \
    do {                                                                                           \
        const bool ok_ = (cond);                                                                   \
        T_CHECK(ok_, "needed: " __VA_ARGS__);                                                      \
        if (!ok_) fail();                                                                          \
    } while (0)
// For functions (.., fl_err *err): prints the reason when the status is not the one wanted.
#define T_OK(call, err)                                                                            \
    do {                                                                                           \
        (err).text[0] = '\0';                                                                      \
        const int st_ = (int)(call);                                                               \
        if (st_ != 0) fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, (err).text);              \
        T_NEED(st_ == 0, "%s gave %d", #call, st_);                                                \
    } while (0)
// NaN-safe: a NaN on either side fails.
#define T_NEAR(got, want, tol, ...)                                                                \
    do {                                                                                           \
        const double got_ = (got), want_ = (want), tol_ = (tol);                                   \
        if (!(fabs(got_ - want_) <= tol_)) {                                                       \
            fprintf(stderr, "got %.9g want %.9g tolerance %.3g: ", got_, want_, tol_);             \
            T_CHECK(false, __VA_ARGS__);                                                           \
        }                                                                                          \
    } while (0)
// Leaves the case; "return" is part of it because the rest cannot run.
#define T_SKIP(...)                                                                                \
    do {                                                                                           \
        T_SKIP_PART(__VA_ARGS__);                                                                  \
        return;                                                                                    \
    } while (0)
// Notes that a part (one kernel variant, say) could not run here; the case goes on.
#define T_SKIP_PART(...)                                                                           \
    (t_skipped++, fprintf(stderr, "skip: "), fprintf(stderr, __VA_ARGS__),                         \
     (void)fputc('\n', stderr))

// splitmix64: every random test is a function of t_seed.
static inline uint64_t t_rand(void) {
    uint64_t z = (t_seed += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// Uniform in [-1, 1).
static inline float t_randf(void) {
    return (float)((double)(int64_t)t_rand() * 0x1p-63);
}

// `size` bytes whose end touches an unmapped page: reading or writing one byte more faults.
static inline void *t_guarded(size_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (size + page - 1) / page * page;
    uint8_t *p =
        mmap(NULL, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p + body, page, PROT_NONE) != 0) abort();
    return p + body - size;
}

static inline void t_guarded_free(void *data, size_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (size + page - 1) / page * page;
    munmap((uint8_t *)data + size - body, body + page);
}

#ifdef FL_TESTS_PLAIN
static inline void t_run_case(const t_case *c) {
    t_seed = t_first_seed; // each case replays alone
    if (setjmp(t_leave) == 0) c->run();
}

static inline int t_run_all(const t_case *const *cases, size_t count) {
    int bad = 0;
    for (size_t i = 0; i < count; i++) {
        const int before = t_failed;
        t_run_case(cases[i]);
        bad += t_failed != before;
        fprintf(stderr, "[%s] %s\n", t_failed == before ? "  OK  " : "FAILED", cases[i]->name);
    }
    return bad;
}
#else
static inline void t_run_case(void **state) {
    const t_case *c = *state;
    const int before = t_failed;
    t_seed = t_first_seed; // each case replays alone
    c->run();
    if (t_failed != before) fail_msg("%s --seed=%llu", c->name, (unsigned long long)t_first_seed);
}

static inline int t_run_all(const t_case *const *cases, size_t count) {
    struct CMUnitTest tests[T_CASES_MAX];
    for (size_t i = 0; i < count; i++) {
        tests[i] = (struct CMUnitTest){.name = cases[i]->name,
                                       .test_func = t_run_case,
                                       .initial_state = (void *)(uintptr_t)cases[i]};
    }
    return _cmocka_run_group_tests("fleetune", tests, count, NULL, NULL);
}
#endif

static inline int t_main(int argc, char **argv, const t_case *cases, size_t count) {
    const char *filter = "";
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--seed=", 7) == 0)
            t_first_seed = strtoull(argv[i] + 7, NULL, 0);
        else
            filter = argv[i];
    }
    const t_case *chosen[T_CASES_MAX];
    size_t ran = 0;
    for (size_t i = 0; i < count && ran < T_CASES_MAX; i++) {
        if (strstr(cases[i].name, filter) != NULL) chosen[ran++] = &cases[i];
    }
    if (ran == 0) return 2; // a filter that matches nothing is an error, not a pass
    const int failed = t_run_all(chosen, ran);
    if (t_skipped != 0) fprintf(stderr, "%d skipped\n", t_skipped);
    return failed != 0 || t_failed != 0 || (t_skipped != 0 && getenv("FL_TEST_NO_SKIP") != NULL);
}

#define T_MAIN(...)                                                                                \
    int main(int argc, char **argv) {                                                              \
        static const t_case cases[] = {__VA_ARGS__};                                               \
        return t_main(argc, argv, cases, sizeof(cases) / sizeof(cases[0]));                        \
    }

#endif
