// plant.h: bugs that can be planted, one at a time, to prove that the simulator finds bugs of their
// kind (docs/TESTING.md has the list with what they did). Compiled to nothing unless FL_PLANTS is
// defined, which only the library of tests/test_sim_plants.c does.
#ifndef FL_COMMON_PLANT_H
#define FL_COMMON_PLANT_H

#include "common/base.h"

#ifdef FL_PLANTS
#define FL_PLANT_LIST(X)                                                                           \
    X(LOST_SPOOL_SYNC, "the spool is never synced")                                                \
    X(LOST_LOG_SYNC, "SQLite's log is never synced")                                               \
    X(LOST_OBJECT_SYNC, "objects are never synced")                                                \
    X(LOST_FOLDER_SYNC, "new names are never synced")                                              \
    X(EARLY_ACK, "answers leave before the commit that they speak of")                             \
    X(NO_SETTLE, "a start answers from a log that is not synced yet")                              \
    X(FOLD_TWICE, "an update that is recovered is folded twice")                                   \
    X(CLIP_FORGOTTEN, "a recovered update is folded without its clip")                             \
    X(NORMS_OF_OLDEST, "the median of a start is of the oldest norms")                             \
    X(TASK_NOT_RESTORED, "a start forgets the tasks that are open")                                \
    X(BASES_NOT_RESTORED, "a start forgets which versions a node has sent for")                    \
    X(TASK_NUMBER_REUSED, "the first task after a start has the last one's number")                \
    X(TOUCHED_FORGOTTEN, "a layer of the recovered buffer gets no new version")                    \
    X(STALENESS_PLUS_ONE, "an update weighs as if it were one version later")                      \
    X(STALENESS_LIMIT, "updates one version too late are taken")                                   \
    X(OLDER_BASE, "an update for an older version than the node's last is taken")                  \
    X(DEADLINE_IGNORED, "a round waits for ever for nodes that are gone")                          \
    X(COUNTED_TWICE, "a node counts more than once in a round")                                    \
    X(SUM_NOT_RESET, "a sum goes on after its layer was sealed")                                   \
    X(SEAL_IN_TWO, "new layers are committed before the end of their round")                       \
    X(VERSION_REUSED, "a new layer's file carries the old version's number")                       \
    X(MOMENTS_LOST, "the optimiser starts anew in every round")                                    \
    X(OTHER_IS_SAME, "another update for a version is told it was counted already")                \
    X(NO_DIGEST, "bytes are not held against their digest")                                        \
    X(NO_SIGNATURE, "signatures are not looked at")                                                \
    X(NO_SHAPE, "an update's head is not held against what was announced")                         \
    X(NO_CLIP, "a large update is not clipped")                                                    \
    X(NORM_OF_REFUSED, "norms of refused updates move the median")                                 \
    X(SPOOL_CUT, "a spool that is opened again is cut to nothing")                                 \
    X(SWEEP_SPOOL, "the sweep takes the spool of the open buffer")                                 \
    X(SWEEP_MOMENTS, "the sweep takes the optimiser's objects")                                    \
    X(TOKEN_FREE, "a join takes no use of its token")

typedef enum fl_plant_id {
    FL_PLANT_NONE,
#define X(name, text) FL_PLANT_##name,
    FL_PLANT_LIST(X)
#undef X
    FL_PLANT_COUNT
} fl_plant_id;

extern _Thread_local fl_plant_id fl_planted; // in tests/test_sim_plants.c
#define fl_plant(name) (fl_planted == FL_PLANT_##name)
#else
#define fl_plant(name) (false)
#endif

#endif
