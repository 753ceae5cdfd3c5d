// pool.h: worker threads over ranges of rows.
//
// A worker gets a function and a row range and owns nothing. Ranges are cut in the same way
// whatever the number of threads, so a function whose rows are independent gives the same bits with
// any.
#ifndef FL_COMMON_POOL_H
#define FL_COMMON_POOL_H

#include "common/status.h"

typedef struct fl_pool fl_pool;

// Rows [begin, end); worker is below fl_pool_threads(), for scratch memory of its own.
typedef void (*fl_pool_fn)(void *ctx, size_t begin, size_t end, unsigned worker);

// threads includes the caller. Workers spin for a short while, then sleep.
fl_status fl_pool_open(unsigned threads, fl_pool **ret, fl_err *err) FL_NODISCARD;
void fl_pool_close(fl_pool *pool);             // NULL is fine
unsigned fl_pool_threads(const fl_pool *pool); // 1 for NULL

// Calls fn over all of [0, rows) in pieces of `grain` rows (the last may be shorter), and returns
// when every piece is done. A NULL pool runs them here, in order. Not reentrant.
void fl_pool_run(fl_pool *pool, size_t rows, size_t grain, fl_pool_fn fn, void *ctx);

#endif
