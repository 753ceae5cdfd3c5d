// crypto.h: keys, sealing, secrets. The only door to libsodium.
//
// Primitives: Ed25519 (identity), X25519 (key agreement and CURVE keys), XChaCha20-Poly1305 (IETF),
// BLAKE2b, the system's random generator. Secrets live in fl_secret: locked pages between guard
// pages, kept out of core dumps, wiped on close, compared in constant time; never in an fl_err.
// Call fl_crypto_init once before anything else here; all other functions are thread-safe.
#ifndef FL_COMMON_CRYPTO_H
#define FL_COMMON_CRYPTO_H

#include "common/status.h"

enum {
    FL_SIGN_KEY = 32,  // public
    FL_SIGN_SIZE = 64, // signature
    FL_DH_KEY = 32,    // public X25519
    FL_SEAL_KEY = 32,
    FL_SEAL_NONCE = 24,
    FL_SEAL_TAG = 16,
    FL_HASH_SIZE = 32,
    FL_SEED_SIZE = 32,
};

fl_status fl_crypto_init(fl_err *err) FL_NODISCARD; // FL_EIO: no randomness. Idempotent.

// ---- secrets
typedef struct fl_secret fl_secret;
// Zeros, 1..4096 bytes.
fl_status fl_secret_open(size_t size, fl_secret **ret, fl_err *err) FL_NODISCARD;
fl_status fl_secret_copy(fl_bytes from, fl_secret **ret, fl_err *err) FL_NODISCARD;
fl_status fl_secret_random(size_t size, fl_secret **ret, fl_err *err) FL_NODISCARD;
void fl_secret_close(fl_secret *s);          // NULL is fine
fl_bytes fl_secret_view(const fl_secret *s); // borrowed; do not copy it elsewhere
uint8_t *fl_secret_edit(fl_secret *s);
bool fl_secret_equal(const fl_secret *s, fl_bytes other); // constant time; sizes are not secret
bool fl_equal(const uint8_t *a, const uint8_t *b, size_t size); // constant time
void fl_wipe(void *p, size_t size);

// Key file, mode 0600: "FLTKEY1\n", the bytes, 8 bytes of checksum. Saved atomically: written
// beside, fsync, rename, fsync of the folder. Loading refuses a file that group or others may read
// (FL_EAUTH), a symbolic link (FL_EIO), and content that is not exactly `size` bytes (FL_EFORMAT);
// FL_ENOENT when there is none.
fl_status fl_secret_save(const fl_secret *s, const char *path, fl_err *err) FL_NODISCARD;
fl_status fl_secret_load(const char *path, size_t size, fl_secret **ret, fl_err *err) FL_NODISCARD;

// ---- randomness
void fl_random(void *out, size_t size);

// ---- identity: Ed25519. The secret is the 32-byte seed.
fl_status fl_sign_new(fl_secret **ret, uint8_t ret_key[FL_SIGN_KEY], fl_err *err) FL_NODISCARD;
fl_status fl_sign_key(const fl_secret *seed, uint8_t ret_key[FL_SIGN_KEY],
                      fl_err *err) FL_NODISCARD;
fl_status fl_sign(const fl_secret *seed, fl_bytes message, uint8_t ret[FL_SIGN_SIZE],
                  fl_err *err) FL_NODISCARD;
bool fl_sign_check(const uint8_t key[FL_SIGN_KEY], fl_bytes message,
                   const uint8_t sig[FL_SIGN_SIZE]);

// ---- key agreement: X25519. Also how CURVE key pairs are made. The secret is the 32-byte scalar.
fl_status fl_dh_new(fl_secret **ret, uint8_t ret_key[FL_DH_KEY], fl_err *err) FL_NODISCARD;
fl_status fl_dh_key(const fl_secret *secret, uint8_t ret_key[FL_DH_KEY], fl_err *err) FL_NODISCARD;
// FL_EAUTH: the peer's key is one of the few that give no secret at all.
fl_status fl_dh(const fl_secret *secret, const uint8_t peer[FL_DH_KEY], fl_secret **ret,
                fl_err *err) FL_NODISCARD;

// What a handshake needs of the above, as a table; secrets are the caller's to keep and to wipe.
// Everything real uses fl_pk_real; a simulator that shakes hands a million times brings its own,
// which lives in the simulator alone.
typedef struct fl_pk {
    fl_status (*sign)(const fl_secret *seed, fl_bytes message, uint8_t ret[FL_SIGN_SIZE],
                      fl_err *err);
    bool (*sign_check)(const uint8_t key[FL_SIGN_KEY], fl_bytes message,
                       const uint8_t sig[FL_SIGN_SIZE]);
    void (*dh_key)(const uint8_t secret[FL_DH_KEY], uint8_t ret_key[FL_DH_KEY]);
    fl_status (*dh)(const uint8_t secret[FL_DH_KEY], const uint8_t peer[FL_DH_KEY],
                    uint8_t ret_shared[FL_DH_KEY], fl_err *err); // FL_EAUTH as fl_dh
    void *(*take)(size_t size); // zeros for secrets, locked as those of fl_secret; NULL: none left
    void (*give)(void *p);      // wipes; NULL is fine
} fl_pk;
extern const fl_pk fl_pk_real;

// ---- sealing: XChaCha20-Poly1305. A (key, nonce) pair must never seal two messages.
// out gets plain.size + FL_SEAL_TAG bytes; plain and out may be the same place, not overlap else.
void fl_seal(const uint8_t key[FL_SEAL_KEY], const uint8_t nonce[FL_SEAL_NONCE], fl_bytes data,
             fl_bytes plain, uint8_t *out);
// out gets sealed.size - FL_SEAL_TAG bytes, written only when it holds. FL_EAUTH: altered.
fl_status fl_unseal(const uint8_t key[FL_SEAL_KEY], const uint8_t nonce[FL_SEAL_NONCE],
                    fl_bytes data, fl_bytes sealed, uint8_t *out, fl_err *err) FL_NODISCARD;

// ---- digests: BLAKE2b
void fl_hash(fl_bytes in, uint8_t ret[FL_HASH_SIZE]);
// In pieces, with an optional key of up to 64 bytes and an output of 16..64 bytes. To feed a file
// range, read it in pieces and add each.
typedef struct fl_hasher {
    _Alignas(64) uint8_t state[384];
    size_t size;
} fl_hasher;
void fl_hash_init(fl_hasher *h, fl_bytes key, size_t out_size);
void fl_hash_add(fl_hasher *h, fl_bytes in);
void fl_hash_add_u64(fl_hasher *h, uint64_t v);     // 8 bytes, little-endian
void fl_hash_add_framed(fl_hasher *h, fl_bytes in); // its size as u64, then the bytes
void fl_hash_done(fl_hasher *h, uint8_t *ret);      // out_size bytes; wipes the state

// ---- text. Each writes a NUL; out_size must be at least the size given, or nothing is written
// and false returned. Decoders are strict: one spelling for each value, exact length.
#define FL_HEX_SIZE(n)    ((n)*2 + 1)
#define FL_BASE32_SIZE(n) (((n)*8 + 4) / 5 + 1)
#define FL_BASE64_SIZE(n) (((n)*8 + 5) / 6 + 1)
bool fl_hex_encode(fl_bytes in, char *out, size_t out_size) FL_NODISCARD;
bool fl_hex_decode(const char *text, uint8_t *out, size_t size) FL_NODISCARD;
// RFC 4648 base32 without padding; decoding accepts both cases.
bool fl_base32_encode(fl_bytes in, char *out, size_t out_size) FL_NODISCARD;
bool fl_base32_decode(const char *text, uint8_t *out, size_t size) FL_NODISCARD;
// RFC 4648 base64url without padding.
bool fl_base64_encode(fl_bytes in, char *out, size_t out_size) FL_NODISCARD;
bool fl_base64_decode(const char *text, uint8_t *out, size_t size) FL_NODISCARD;

#endif
