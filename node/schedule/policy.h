// policy.h: may we train now? Pure: the owner's rules and what was observed go in, an answer with
// its reason comes out. Pauses at once, resumes only when things are clearly better, so that a
// device near its limit does not flap.
#ifndef NODE_SCHEDULE_POLICY_H
#define NODE_SCHEDULE_POLICY_H

#include "common/base.h"

typedef struct node_rules {
    double pause_c, resume_c;       // degrees Celsius, resume_c below pause_c
    double busy_max;                // share of all cores that others may use, 0..1
    uint32_t hour_first, hour_last; // local hours, first included, last excluded; equal: always
    uint64_t disk_free_min;         // bytes
    bool mains_only;
} node_rules;

typedef struct node_observed {
    double temperature_c;   // NAN: unknown, never a reason to pause
    uint32_t throttle_bits; // Raspberry Pi: 0 undervolt, 1 capped, 2 throttled, 3 soft limit
    double busy_others;     // share of all cores, 0..1; NAN: unknown
    uint32_t hour;          // local, 0..23
    uint64_t disk_free;     // bytes
    bool on_mains;          // true when unknown
    bool upload_spent;      // another task's updates would be above the owner's budget
} node_observed;

typedef enum node_may {
    NODE_MAY_TRAIN,
    NODE_MAY_NOT_HOT,
    NODE_MAY_NOT_POWER, // undervolt or throttled now
    NODE_MAY_NOT_BUSY,
    NODE_MAY_NOT_HOUR,
    NODE_MAY_NOT_DISK,
    NODE_MAY_NOT_BATTERY,
    NODE_MAY_NOT_UPLOAD, // the day's budget of bytes is spent
} node_may;

// `before` is the previous answer: paused by heat, we wait for resume_c; paused by load, for half
// of busy_max.
node_may node_policy_ask(const node_rules *rules, const node_observed *now, node_may before);
// Warm, though not yet hot: train with half the threads, so that it need not pause. From 5 degrees
// below pause_c until 10 below it; NAN is cool.
bool node_policy_spare(double temperature_c, double pause_c, bool before);
// Threads that are worth having beside other programs: of `threads`, as many as there are
// processors left of `online` when others take `others` of them on average; at least 1. A thread
// that has to share its processor holds up all the others.
uint32_t node_policy_threads(uint32_t threads, uint32_t online, double others);
const char *node_may_text(node_may may); // "the device is too hot"

#endif
