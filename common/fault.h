// fault.h: make the n-th fallible call fail, so that tests walk every error path.
// Compiled to nothing unless FL_FAULTS is defined (the debug preset defines it). One thread.
#ifndef FL_COMMON_FAULT_H
#define FL_COMMON_FAULT_H

#include "common/base.h"

#ifdef FL_FAULTS
bool fl_fault(void);           // true when this call must pretend to fail
void fl_fault_arm(unsigned n); // the n-th call from now fails (1-based); 0 disarms
bool fl_fault_fired(void);     // did the armed fault happen?
#else
#define fl_fault() (false)
#endif

#endif
