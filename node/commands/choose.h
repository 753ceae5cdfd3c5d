// choose.h: where the scheduler meets the tuner: the machine's rates and the model's calibration,
// from their caches or measured now, and the plan that comes of them.
//
// A learning choice (window, tokens of a sequence, sequences a step) is a function of the memory
// and the owner's wishes. A hardware choice (threads, kept activations) is what is fastest by
// prediction, then by measurement of the best few. The chunk of the vocabulary, which changes the
// last bits, goes by prediction alone, and that is a function of what lies in the caches.
#ifndef NODE_COMMANDS_CHOOSE_H
#define NODE_COMMANDS_CHOOSE_H

#include "node/schedule/cost.h"
#include "node/tune/tuner.h"

// Did other programs take part of the machine since `begin`? What was measured then is not stored.
typedef struct node_watch {
    double busy_s, own_s, start_s;
} node_watch;
node_watch node_watch_begin(void);
bool node_watch_disturbed(const node_watch *watch);
// Processors that others took on average; 0 for less than half a second.
double node_watch_others(const node_watch *watch);

typedef struct node_job {
    const fl_kern *kern;
    const node_facts *facts;
    const node_model *model;
    node_adapter *adapter; // its values are not changed, whatever is measured
    const node_docs *docs; // what will be trained on
    node_tune_opts opts;   // as asked: 0 and NODE_TUNE_KEEP_AUTO are free, 0 threads too
    uint32_t threads_max;  // of the free choice
    uint64_t steps;        // of the run: decides whether measuring pays; UINT64_MAX: it does
    const char *folder;    // of the caches; "": none
    const char *path;      // of the model's file, whose storage is measured; "": not
    bool again;            // measure, whatever lies in the caches
} node_job;

typedef struct node_schedule {
    node_cost cost;
    bool measured;  // rates are measured ones, now or earlier, not assumed
    bool disturbed; // by other programs while it was measured now: nothing was stored
    node_choice choice;
    node_choice list[NODE_CHOICES_MAX]; // with the same window, sequence and chunk; best first
    uint32_t count, seen;               // seen: candidates whose exact peak was asked for
    node_tune_plan plan;
} node_schedule;

// FL_EARG as node_tune_make_plan; FL_ENOMEM with the smallest that would do, or with choices that
// fit when the owner's do not. What cannot be measured or stored is no failure.
fl_status node_schedule_make(const node_job *job, node_schedule *ret, fl_err *err) FL_NODISCARD;

// The model as the cost sees it. Widths are means over its layers.
void node_shape_of(const node_model *model, const node_adapter *adapter, node_shape *ret);
// Options of the tuner for a choice.
void node_job_opts(const node_job *job, const node_choice *choice, node_tune_opts *ret);

// Seconds of a step, the median of `runs` after one that is not counted. The adapter stays as it
// is: the rates of learning are zero. FL_ENOMEM, FL_EIO when it cannot be run.
fl_status node_job_time(const node_job *job, const node_choice *choice, uint32_t runs,
                        double *ret_s, fl_err *err) FL_NODISCARD;
// Measures the parts of small steps (some seconds at most) and what prefill and decode take, with
// few and with all threads. Needs `rates` and `shape` in place.
fl_status node_job_calibrate(const node_job *job, node_cost *cost, fl_err *err) FL_NODISCARD;

#endif
