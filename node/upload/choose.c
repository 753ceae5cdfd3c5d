#include "node/upload/choose.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MILLION = 1000000 };
static const double work_share = 0.25, left_share = 0.5, work_least_s = 2.0;
enum { FIRST_PPM = 50000 }; // before the link was measured

typedef struct rung {
    fl_update_encoding encoding;
    uint32_t keep_ppm;
} rung;

// From the most to the least. Below a thousandth, a layer's head is most of its update.
static const rung ladder[] = {
    {FL_UPDATE_INT16, MILLION},  {FL_UPDATE_INT8, MILLION},   {FL_UPDATE_INT4, MILLION},
    {FL_UPDATE_SPARSE8, 250000}, {FL_UPDATE_SPARSE8, 100000}, {FL_UPDATE_SPARSE4, 100000},
    {FL_UPDATE_SPARSE4, 50000},  {FL_UPDATE_SPARSE4, 30000},  {FL_UPDATE_SPARSE4, 20000},
    {FL_UPDATE_SPARSE4, 10000},  {FL_UPDATE_SPARSE4, 5000},   {FL_UPDATE_SPARSE4, 2000},
    {FL_UPDATE_SPARSE4, 1000},
};

fl_status node_upload_parse(const char *text, node_upload_rule *ret, fl_err *err) {
    node_upload_rule r = *ret;
    char *end = NULL;
    if (strcmp(text, "auto") == 0) {
        r.mode = NODE_UPLOAD_AUTO;
    } else if (strcmp(text, "dense") == 0) {
        r.mode = NODE_UPLOAD_DENSE;
    } else {
        r.mode = NODE_UPLOAD_RATIO;
        r.ratio = strtod(text, &end);
        if (end != text && strcmp(end, "%") == 0) r.ratio /= 100.0;
        const bool whole = end != text && (*end == '\0' || strcmp(end, "%") == 0);
        if (!whole || !(r.ratio > 0.0 && r.ratio <= 1.0))
            return FL_FAIL(err, FL_EARG,
                           "upload is \"auto\", \"dense\", or a share above 0 and up to 1, as 0.05 "
                           "or 5%%; not \"%.40s\"",
                           text);
    }
    *ret = r;
    return FL_OK;
}

const char *node_upload_why_text(node_upload_why why) {
    static const char *const texts[] = {
        [NODE_UPLOAD_WANTED] = "as much as the coordinator wants",
        [NODE_UPLOAD_OWNER] = "the owner's share",
        [NODE_UPLOAD_UNMEASURED] = "the link is not measured yet",
        [NODE_UPLOAD_LINK] = "the link is slow for the task's time",
        [NODE_UPLOAD_BUDGET] = "the day's upload budget is short",
        [NODE_UPLOAD_SPENT] = "the day's upload budget is spent",
    };
    return texts[why];
}

uint32_t node_upload_keep(uint32_t count, uint32_t keep_ppm) {
    const uint64_t keep = ((uint64_t)count * keep_ppm + MILLION - 1) / MILLION;
    return keep == 0 ? 1 : (uint32_t)keep;
}

static uint64_t bytes_of(const node_upload_ask *a, rung r) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < a->layers; i++) {
        const uint32_t keep = node_upload_keep(a->counts[i], r.keep_ppm);
        sum += fl_update_size_about(a->counts[i], r.encoding, keep) + NODE_UPLOAD_OVERHEAD;
    }
    return sum;
}

// What the coordinator wants at the most.
static rung top_of(const node_upload_ask *a) {
    rung top = {(fl_update_encoding)(a->most != 0 ? a->most : a->only), MILLION};
    const bool sparse = top.encoding == FL_UPDATE_SPARSE8 || top.encoding == FL_UPDATE_SPARSE4;
    if (sparse && a->keep_ppm != 0) top.keep_ppm = a->keep_ppm;
    return top;
}

// A share of the values in 8 bits if that is no more than what is wanted, else in 4.
static rung owners(const node_upload_ask *a, rung top) {
    rung r = {FL_UPDATE_SPARSE8, (uint32_t)ceil(a->rule.ratio * MILLION)};
    if (r.keep_ppm > top.keep_ppm) r.keep_ppm = top.keep_ppm;
    if (bytes_of(a, r) > bytes_of(a, top)) r.encoding = FL_UPDATE_SPARSE4;
    return bytes_of(a, r) > bytes_of(a, top) ? top : r;
}

// Seconds that an upload takes: three round trips a layer (begin, chunk, commit), and its bytes.
static double seconds_of(const node_upload_ask *a, uint64_t bytes) {
    return 3.0 * a->rtt_s * a->layers + (double)bytes / a->bytes_per_s;
}

static node_upload_why reason_against(const node_upload_ask *a, rung r, uint64_t bytes) {
    if (bytes > a->budget_left || bytes > a->budget_share) return NODE_UPLOAD_BUDGET;
    if (a->rule.mode != NODE_UPLOAD_AUTO) return NODE_UPLOAD_WANTED;
    if (!(a->bytes_per_s > 0.0)) {
        const bool small = r.encoding == FL_UPDATE_SPARSE4 && r.keep_ppm <= FIRST_PPM;
        return small ? NODE_UPLOAD_WANTED : NODE_UPLOAD_UNMEASURED;
    }
    const double work_s = work_share * a->work_s, left_s = left_share * a->left_s;
    const double may_s = fmin(fmax(work_s, work_least_s), left_s);
    return seconds_of(a, bytes) <= may_s ? NODE_UPLOAD_WANTED : NODE_UPLOAD_LINK;
}

node_upload_choice node_upload_choose(const node_upload_ask *a) {
    const rung top = top_of(a);
    rung now = a->rule.mode == NODE_UPLOAD_RATIO && a->most != 0 ? owners(a, top) : top;
    uint64_t bytes = bytes_of(a, now);
    node_upload_why why = a->rule.mode == NODE_UPLOAD_RATIO && a->most != 0 ? NODE_UPLOAD_OWNER
                                                                            : NODE_UPLOAD_WANTED;
    uint64_t least = bytes;
    for (size_t i = 0; a->most != 0 && i < FL_COUNT(ladder); i++) {
        const uint64_t size = bytes_of(a, ladder[i]);
        if (ladder[i].keep_ppm > now.keep_ppm || size >= bytes) continue; // not below this one
        least = size < least ? size : least;
        const node_upload_why against = reason_against(a, now, bytes);
        if (against == NODE_UPLOAD_WANTED) continue;
        why = against;
        now = ladder[i];
        bytes = size;
    }
    if (bytes > a->budget_left) why = NODE_UPLOAD_SPENT;
    return (node_upload_choice){now.encoding, now.keep_ppm, bytes, least, why};
}

// ---- budget

void node_upload_roll(node_upload_spent *s, int64_t now_s) {
    const int64_t day = now_s / NODE_UPLOAD_DAY_S;
    if (s->day == day) return;
    s->day = day;
    s->bytes = 0;
}

uint64_t node_upload_left(const node_upload_spent *s, const node_upload_rule *rule) {
    if (rule->budget_bytes == 0) return UINT64_MAX;
    const uint64_t used = s->bytes > 0 ? (uint64_t)s->bytes : 0;
    return used < rule->budget_bytes ? rule->budget_bytes - used : 0;
}

uint64_t node_upload_share(const node_upload_spent *s, const node_upload_rule *rule, int64_t now_s,
                           double cycle_s) {
    if (rule->budget_bytes == 0) return UINT64_MAX;
    const double day_s = (double)(NODE_UPLOAD_DAY_S - now_s % NODE_UPLOAD_DAY_S);
    const double part = cycle_s < day_s ? cycle_s / day_s : 1.0;
    return (uint64_t)((double)node_upload_left(s, rule) * (part > 0.0 ? part : 0.0));
}

bool node_upload_waits(const node_upload_spent *s, const node_upload_rule *rule, int64_t now_s) {
    if (rule->budget_bytes == 0 || s->day != now_s / NODE_UPLOAD_DAY_S) return false;
    return node_upload_left(s, rule) < (uint64_t)(s->least > 0 ? s->least : 1);
}
