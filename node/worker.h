// worker.h: the thread that trains, so that the loop can go on talking. The loop owns all state;
// the worker owns a task from start to finish and what it makes of it, which the loop takes when
// the worker says that it is done.
#ifndef NODE_WORKER_H
#define NODE_WORKER_H

#include "node/state.h"
#include "node/upload/choose.h"
#include "node/upload/uplink.h"

typedef struct node_worker_opts {
    const char *data;          // file or folder of private text
    uint64_t memory_bytes;     // of the whole process; 0: what the machine has
    int64_t threads;           // 0: the best number, chosen anew for every task
    double pause_c;            // degrees at which the owner's rules pause it
    uint64_t prefix_bytes;     // memory for states that come again (node/tune/prefix.h); 0: none
    const char *prefix_folder; // "": none on disk
    uint64_t prefix_disk;      // bytes there
} node_worker_opts;

typedef struct node_worker node_worker;

// Reads nothing yet. `state` must outlive the worker; while a task runs the loop does not change
// its layers.
fl_status node_worker_open(const node_worker_opts *opts, node_state *state, node_worker **ret,
                           fl_err *err) FL_NODISCARD;
void node_worker_close(node_worker *worker); // stops a task first; NULL is fine

typedef struct node_worker_upload {
    node_upload_rule rule;
    node_uplink uplink; // as measured so far
    double left_s;      // until the task's deadline
} node_worker_upload;

// Starts on a task: its objects are on disk. update_key: the coordinator's, for sealing.
fl_status node_worker_start(node_worker *worker, const fl_task *task,
                            const uint8_t update_key[FL_KEY_SIZE],
                            const node_worker_upload *upload, fl_err *err) FL_NODISCARD;
void node_worker_pause(node_worker *worker, bool pause); // takes effect at the next step
void node_worker_stop(node_worker *worker);              // ends as NODE_WORK_FAILED, soon
// New voting weights of the fleet, used from the next task on.
void node_worker_set_vote(node_worker *worker, const fl_vote *vote);

typedef enum node_work {
    NODE_WORK_IDLE,
    NODE_WORK_BUSY,
    NODE_WORK_DONE,
    NODE_WORK_FAILED
} node_work;

typedef struct node_progress {
    uint32_t step, steps;
    uint64_t tokens;
    float loss, tokens_per_second;
    uint32_t window_max; // layers that fit the memory; 0: not known yet
    uint64_t tokens_local;
} node_progress;

// What it is doing. DONE and FAILED are said once; then the worker is idle.
node_work node_worker_poll(node_worker *worker, node_progress *ret);

// After DONE, until the next start.
typedef struct node_work_result {
    node_spooled updates[FL_LAYERS_MAX]; // durable in the spool
    size_t update_count;
    node_upload_choice upload; // how they were made
    uint64_t bytes;            // of all of them, sealed
    fl_report report;
    bool has_report;
} node_work_result;
const node_work_result *node_worker_result(const node_worker *worker);
const fl_err *node_worker_error(const node_worker *worker); // after FAILED

#endif
