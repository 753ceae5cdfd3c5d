// clock.h: time as the daemons see it. Only loops and commands read clocks; all else is told.
#ifndef FL_COMMON_CLOCK_H
#define FL_COMMON_CLOCK_H

#include "common/base.h"

uint64_t fl_clock_ms(void);    // monotonic milliseconds; never compared between machines
double fl_clock_s(void);       // the same in seconds, for durations
int64_t fl_clock_wall_s(void); // seconds since 1970, for people to read; may be wrong or jump

#endif
