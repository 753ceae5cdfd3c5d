// Always fails. ctest runs it with WILL_FAIL: if the harness stops reporting, this test says so.
#include "tests/check.h"

static void test_fails(void) {
    T_EQ(1, 2);
}

T_MAIN({"fails", test_fails})
