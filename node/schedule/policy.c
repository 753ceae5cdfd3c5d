#include "node/schedule/policy.h"

enum { THROTTLED_NOW = 0xf };

static bool hour_allowed(const node_rules *r, uint32_t hour) {
    if (r->hour_first == r->hour_last) return true;
    if (r->hour_first < r->hour_last) return hour >= r->hour_first && hour < r->hour_last;
    return hour >= r->hour_first || hour < r->hour_last; // over midnight
}

node_may node_policy_ask(const node_rules *r, const node_observed *now, node_may before) {
    const double limit_c = before == NODE_MAY_NOT_HOT ? r->resume_c : r->pause_c;
    const double limit_busy = before == NODE_MAY_NOT_BUSY ? r->busy_max / 2 : r->busy_max;
    // Comparisons with NAN are false: what the machine does not say is no reason to pause.
    if (now->temperature_c >= limit_c) return NODE_MAY_NOT_HOT;
    if (now->throttle_bits & THROTTLED_NOW) return NODE_MAY_NOT_POWER;
    if (now->busy_others > limit_busy) return NODE_MAY_NOT_BUSY;
    if (!hour_allowed(r, now->hour)) return NODE_MAY_NOT_HOUR;
    if (now->disk_free < r->disk_free_min) return NODE_MAY_NOT_DISK;
    if (r->mains_only && !now->on_mains) return NODE_MAY_NOT_BATTERY;
    if (now->upload_spent) return NODE_MAY_NOT_UPLOAD;
    return NODE_MAY_TRAIN;
}

bool node_policy_spare(double temperature_c, double pause_c, bool before) {
    return temperature_c >= pause_c - (before ? 10 : 5); // false for NAN
}

uint32_t node_policy_threads(uint32_t threads, uint32_t online, double others) {
    const double left = (double)online - others + 0.5;
    const uint32_t most = left < 1 || !(others >= 0) ? 1 : (uint32_t)left;
    return threads < most ? threads : most;
}

const char *node_may_text(node_may may) {
    static const char *const texts[] = {
        [NODE_MAY_TRAIN] = "training is allowed",
        [NODE_MAY_NOT_HOT] = "the device is too hot",
        [NODE_MAY_NOT_POWER] = "the power supply is too weak or the clock is throttled",
        [NODE_MAY_NOT_BUSY] = "other programs need the processor",
        [NODE_MAY_NOT_HOUR] = "outside the owner's hours",
        [NODE_MAY_NOT_DISK] = "too little free disk space",
        [NODE_MAY_NOT_BATTERY] = "running on battery",
        [NODE_MAY_NOT_UPLOAD] = "the day's upload budget is spent",
    };
    return texts[may];
}
