// residual.h: error feedback. What an update leaves out of a layer's change (values that are not
// named, and rounding) is kept on the node's disk and added to the layer's next change, so that
// nothing is lost but time. Stich, Cordonnier, Jaggi, "Sparsified SGD with memory", NeurIPS 2018;
// Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019. Pure: bytes and numbers.
//
// All sums are of integers in units of 2^-32, which is also how the coordinator reads an update:
//     sum of what it reads + what is kept = sum of the changes, each rounded once to 2^-32
// exactly, for any number of updates.
//
// What is kept travels in the spool file of the update that it belongs to, behind the sealed update
// (node/state.h). So a single rename makes both durable, and a single rename ends both: there is no
// moment at which they disagree. Sealed, it begins after a nonce of 24 bytes:
//   offset  size  field
//   0       4     magic         "FLE1"
//   4       4     layer
//   8       4     count         values
//   12      4     payload size
//   16      8     base version  of the update
//   24      8     sequence      of the update
//   32      ...   payload       of the update in clear (proto/update.h), to take it back
//   ...     5*n   values        40 bits each, two's complement, little-endian
// The key is derived from the node's identity: who has the spool file alone can read neither the
// update nor this. The seal's tag is the checksum.
#ifndef NODE_UPLOAD_RESIDUAL_H
#define NODE_UPLOAD_RESIDUAL_H

#include "common/crypto.h"
#include "proto/codec.h"
#include "proto/update.h"

enum {
    NODE_RESIDUAL_HEAD = 32,
    NODE_RESIDUAL_VALUE = 5,
    NODE_RESIDUAL_FRESH = 8, // versions until it counts half
};

typedef struct node_residual {
    uint32_t layer, count;
    uint64_t base_version, sequence;
} node_residual;

// The changes of a layer, added to what was kept of earlier ones: sum[i] += delta[i]. A sum beyond
// FL_UPDATE_ABS_MAX means that what was kept is of no use: it is let go, sum = delta, *ret_kept is
// false.
//   FL_EFORMAT  a change is not finite or beyond FL_UPDATE_ABS_MAX; sum is as before
fl_status node_residual_add(const float *delta, uint32_t count, int64_t *sum, bool *ret_kept,
                            fl_err *err) FL_NODISCARD;
// What an update leaves: sum[i] -= what the coordinator will read.
void node_residual_take(const fl_update *sent, int64_t *sum);
// The layer is `versions` newer than the update was: what is kept was made for another point. It
// counts in full for NODE_RESIDUAL_FRESH versions, half for as many more, a quarter, and so on.
void node_residual_age(int64_t *values, uint32_t count, uint64_t versions);

// What becomes of the update and of what was kept with it, once the coordinator has answered.
typedef enum node_residual_fate {
    NODE_RESIDUAL_KEEP,   // it was counted: what it left is kept
    NODE_RESIDUAL_RETURN, // not counted, but good: all of it is kept
    NODE_RESIDUAL_DROP,   // its content was refused: it would be refused again, and larger
} node_residual_fate;
node_residual_fate node_residual_judge(fl_verdict verdict, fl_code code);

// Bytes of what is behind the update in a spool file.
size_t node_residual_size(uint32_t count, size_t payload_size);
// random: FL_SEAL_NONCE fresh bytes. out[node_residual_size()].
void node_residual_write(const node_residual *r, fl_bytes payload, const int64_t *values,
                         const fl_secret *identity, const uint8_t run_id[FL_ID_SIZE],
                         const uint8_t random[FL_SEAL_NONCE], uint8_t *out);
// Opens it in place. *ret_values: count values, `returned`: with what the update carried.
//   FL_EFORMAT  not one, or damaged   FL_EAUTH  altered, or of another run or node
//   FL_ELIMIT   not of this layer or count
fl_status node_residual_read(uint8_t *bytes, size_t size, uint32_t layer, uint32_t count,
                             bool returned, const fl_secret *identity,
                             const uint8_t run_id[FL_ID_SIZE], node_residual *ret,
                             int64_t *ret_values, fl_err *err) FL_NODISCARD;

#endif
