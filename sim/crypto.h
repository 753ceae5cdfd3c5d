// crypto.h: public-key arithmetic of the same shape and a thousandth of the cost, for simulations
// alone. A signature is a hash that anybody could make: the attackers of the simulator do not forge
// it, those of the real tests meet the real thing.
#ifndef SIM_CRYPTO_H
#define SIM_CRYPTO_H

#include "common/crypto.h"
#include "proto/seal.h"

extern const fl_pk sim_pk;

void sim_public(const uint8_t secret[FL_SEED_SIZE], uint8_t ret_key[FL_DH_KEY]);

// As fl_seal_update and fl_unseal_update, with the same layout, sizes and statuses.
void sim_seal(const fl_seal_label *label, fl_bytes payload, uint8_t *out);
fl_status sim_unseal(const fl_seal_label *label, fl_bytes sealed, const fl_secret *update_secret,
                     const uint8_t update_key[FL_KEY_SIZE], uint8_t *out, size_t out_size,
                     fl_bytes *ret, fl_err *err);

#endif
