// show.h: the scheduler's view of the machine, as people and as machines read it.
#ifndef NODE_COMMANDS_SHOW_H
#define NODE_COMMANDS_SHOW_H

#include "common/json.h"
#include "node/commands/choose.h"

// "rates", "threads_compute", "threads_stream", "storage_bytes_per_second" of the object.
void node_show_rates_json(const node_rates *rates, fl_json *object);
void node_show_rates(const node_rates *rates, FILE *out);
// "schedule" of the object: the choice and the candidates, predicted and, where they were,
// measured.
void node_show_schedule_json(const node_schedule *schedule, fl_json *object);
void node_show_schedule(const node_schedule *schedule, FILE *out);

#endif
