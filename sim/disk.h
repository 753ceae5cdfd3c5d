// disk.h: a disk that forgets. Each file has what its readers see and what is durable; each name as
// well. A power cut keeps, by the seed, any subset of the writes that were not synced, torn at 512
// bytes, and for each name that was not synced the old or the new state. A kill keeps everything
// the system was told.
#ifndef SIM_DISK_H
#define SIM_DISK_H

#include "coordinator/store_disk.h"
#include "sim/rng.h"

typedef struct sim_disk sim_disk;

// What a broken disk, driver or program does; see plant.h.
typedef struct sim_disk_lies {
    bool spool_sync, log_sync, object_sync, folder_sync; // said to be done, and not done
} sim_disk_lies;

// now_ms: the wall clock of the machine, NULL for none. NULL when there is no memory.
sim_disk *sim_disk_new(uint64_t seed, const uint64_t *wall_ms);
void sim_disk_free(sim_disk *d); // NULL is fine
// What a reader sees now, all of it durable.
sim_disk *sim_disk_clone(const sim_disk *d);
coord_disk *sim_disk_table(sim_disk *d);
void sim_disk_lie(sim_disk *d, sim_disk_lies lies);

// The k-th change from now on (1-based) does not happen, or half, and nothing after it does. 0:
// none.
void sim_disk_arm(sim_disk *d, uint64_t k);
// The k-th change from now on fails, once.
void sim_disk_fail(sim_disk *d, uint64_t k);
bool sim_disk_failed(const sim_disk *d); // since the last restart
bool sim_disk_dead(const sim_disk *d);
uint64_t sim_disk_changes(const sim_disk *d);
// The machine starts again after all files are closed.
void sim_disk_restart(sim_disk *d, bool power_cut);

#endif
