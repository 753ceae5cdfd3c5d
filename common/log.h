// log.h: what the daemons say, one line an event, on standard error. Only programs log.
//
// Text lines start with the journal's priority prefix <N> when standard error is not a terminal.
// Never key material, never a user's text, never gradients.
#ifndef FL_COMMON_LOG_H
#define FL_COMMON_LOG_H

#include "common/base.h"

typedef enum fl_log_level { FL_LOG_ERROR, FL_LOG_WARN, FL_LOG_INFO, FL_LOG_DEBUG } fl_log_level;

void fl_log_init(fl_log_level level, bool json);
// `event` is a short stable word a script can match: "update.refused". The text is one sentence.
void fl_log(fl_log_level level, const char *event, const char *fmt, ...) FL_PRINTF(3, 4);

#endif
