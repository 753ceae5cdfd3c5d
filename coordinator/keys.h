// keys.h: the coordinator's secrets, in DIR/keys (mode 0600 each).
#ifndef COORD_KEYS_H
#define COORD_KEYS_H

#include "common/crypto.h"

typedef struct coord_keys {
    fl_secret *identity, *transport, *update;
    uint8_t identity_key[FL_SIGN_KEY]; // Ed25519: nodes pin it
    uint8_t transport_key[FL_DH_KEY];  // CURVE: in every join URL
    uint8_t update_key[FL_DH_KEY];     // X25519: updates are sealed to it
} coord_keys;

// Makes what is not there yet in `dir`/keys: an init that was cut short goes on.
fl_status coord_keys_make(const char *dir, fl_err *err) FL_NODISCARD;
// FL_ENOENT, FL_EAUTH (readable by others), FL_EFORMAT.
fl_status coord_keys_load(const char *dir, coord_keys *ret, fl_err *err) FL_NODISCARD;
fl_status coord_keys_copy(const coord_keys *from, coord_keys *ret, fl_err *err) FL_NODISCARD;
void coord_keys_close(coord_keys *keys); // empty is fine

#endif
