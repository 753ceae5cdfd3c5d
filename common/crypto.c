#include "common/crypto.h"

#include "common/checked.h"
#include "common/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct fl_secret {
    size_t size;
    uint8_t data[];
};

enum { SECRET_MAX = 4096 };

_Static_assert(sizeof(crypto_generichash_state) <= sizeof(((fl_hasher *)0)->state),
               "the hasher's room holds libsodium's state");
_Static_assert(crypto_sign_PUBLICKEYBYTES == FL_SIGN_KEY && crypto_sign_BYTES == FL_SIGN_SIZE &&
                   crypto_sign_SEEDBYTES == FL_SEED_SIZE,
               "Ed25519 sizes");
_Static_assert(crypto_aead_xchacha20poly1305_ietf_KEYBYTES == FL_SEAL_KEY &&
                   crypto_aead_xchacha20poly1305_ietf_NPUBBYTES == FL_SEAL_NONCE &&
                   crypto_aead_xchacha20poly1305_ietf_ABYTES == FL_SEAL_TAG,
               "XChaCha20-Poly1305 sizes");
_Static_assert(crypto_scalarmult_BYTES == FL_DH_KEY, "X25519 sizes");

fl_status fl_crypto_init(fl_err *err) {
    // sodium_init is thread-safe and gives 1 when it was done before.
    if (fl_fault() || sodium_init() < 0)
        return FL_FAIL(err, FL_EIO, "the system gives no random numbers; is /dev/urandom there?");
    return FL_OK;
}

// ---- secrets

fl_status fl_secret_open(size_t size, fl_secret **ret, fl_err *err) {
    if (size == 0 || size > SECRET_MAX)
        return FL_FAIL(err, FL_EARG, "a secret of %zu bytes; 1 to %d are possible", size,
                       SECRET_MAX);
    // sodium_malloc needs sizes that keep the alignment of its result; the struct starts with
    // size_t.
    const size_t whole = (sizeof(fl_secret) + size + 15) & ~(size_t)15;
    fl_secret *s = fl_fault() ? NULL : sodium_malloc(whole);
    if (s == NULL) return FL_FAIL(err, FL_ENOMEM, "no locked memory for a secret");
    memset(s, 0, whole);
    s->size = size;
    *ret = s;
    return FL_OK;
}

fl_status fl_secret_copy(fl_bytes from, fl_secret **ret, fl_err *err) {
    FL_TRY(fl_secret_open(from.size, ret, err));
    memcpy((*ret)->data, from.data, from.size);
    return FL_OK;
}

fl_status fl_secret_random(size_t size, fl_secret **ret, fl_err *err) {
    FL_TRY(fl_secret_open(size, ret, err));
    randombytes_buf((*ret)->data, size);
    return FL_OK;
}

void fl_secret_close(fl_secret *s) {
    sodium_free(s); // wipes; NULL is fine
}

fl_bytes fl_secret_view(const fl_secret *s) {
    return (fl_bytes){s->data, s->size};
}

uint8_t *fl_secret_edit(fl_secret *s) {
    return s->data;
}

bool fl_secret_equal(const fl_secret *s, fl_bytes other) {
    return s->size == other.size && sodium_memcmp(s->data, other.data, s->size) == 0;
}

bool fl_equal(const uint8_t *a, const uint8_t *b, size_t size) {
    return sodium_memcmp(a, b, size) == 0;
}

void fl_wipe(void *p, size_t size) {
    sodium_memzero(p, size);
}

// ---- key files

static const char key_magic[8] = {'F', 'L', 'T', 'K', 'E', 'Y', '1', '\n'};
enum { KEY_CHECK = 8, KEY_FILE_MAX = 8 + SECRET_MAX + KEY_CHECK };

static void key_check(fl_bytes secret, uint8_t ret[KEY_CHECK]) {
    uint8_t digest[FL_HASH_SIZE];
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){(const uint8_t *)"fleetune key file", 17}, FL_HASH_SIZE);
    fl_hash_add(&h, secret);
    fl_hash_done(&h, digest);
    memcpy(ret, digest, KEY_CHECK);
    fl_wipe(digest, sizeof(digest));
}

static bool write_all(int fd, const uint8_t *p, size_t size) {
    while (size > 0) {
        const ssize_t n = fl_fault() ? -1 : write(fd, p, size);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        p += n;
        size -= (size_t)n;
    }
    return true;
}

// The rename is durable only when its folder is: a key that vanishes with the power is a lost node.
static bool sync_folder(const char *path) {
    char folder[4096];
    const char *slash = strrchr(path, '/');
    if (slash == NULL) {
        memcpy(folder, ".", 2);
    } else {
        const size_t n = slash == path ? 1 : (size_t)(slash - path);
        if (n >= sizeof(folder)) return false;
        memcpy(folder, path, n);
        folder[n] = '\0';
    }
    const int fd = fl_fault() ? -1 : open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return false;
    const bool ok = !fl_fault() && fsync(fd) == 0;
    close(fd);
    return ok;
}

fl_status fl_secret_save(const fl_secret *s, const char *path, fl_err *err) {
    char temp[4096];
    fl_secret *file = NULL; // the whole content stays in locked memory too
    fl_status st;
    int fd = -1;
    bool made = false;

    const int n = snprintf(temp, sizeof(temp), "%s.new", path);
    if (n < 0 || (size_t)n >= sizeof(temp))
        return FL_FAIL(err, FL_EARG, "path of a key is too long");
    const size_t size = sizeof(key_magic) + s->size + KEY_CHECK;
    if (s->size > SECRET_MAX - 16) return FL_FAIL(err, FL_EARG, "this secret is no key");
    st = fl_secret_open(size, &file, err);
    if (st != FL_OK) return st;
    memcpy(file->data, key_magic, sizeof(key_magic));
    memcpy(file->data + sizeof(key_magic), s->data, s->size);
    key_check(fl_secret_view(s), file->data + sizeof(key_magic) + s->size);

    st = FL_EIO;
    unlink(temp); // left by a run that was killed; never written to by two at once: one daemon, one
                  // state
    if (!fl_fault()) fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    made = fd >= 0;
    if (fd < 0 || !write_all(fd, file->data, size) || fl_fault() || fsync(fd) != 0) goto out;
    if (fl_fault() || rename(temp, path) != 0) goto out;
    made = false;
    if (!sync_folder(path)) goto out;
    st = FL_OK;
out:
    if (st != FL_OK) FL_FAIL(err, st, "cannot save key %s: %s", path, strerror(errno));
    if (fd >= 0) close(fd);
    if (made) unlink(temp);
    fl_secret_close(file);
    return st;
}

static fl_status open_key(const char *path, int *ret, fl_err *err) {
    const int fd = fl_fault() ? -1 : open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        const bool none = errno == ENOENT;
        return FL_FAIL(err, none ? FL_ENOENT : FL_EIO, "cannot open key %s: %s", path,
                       strerror(errno));
    }
    struct stat info;
    if (fl_fault() || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        close(fd);
        return FL_FAIL(err, FL_EIO, "key %s is not a plain file", path);
    }
    if ((info.st_mode & 077) != 0) {
        close(fd);
        return FL_FAIL(err, FL_EAUTH, "key %s can be read by others; run: chmod 600 %s", path,
                       path);
    }
    *ret = fd;
    return FL_OK;
}

fl_status fl_secret_load(const char *path, size_t size, fl_secret **ret, fl_err *err) {
    fl_secret *file = NULL, *s = NULL;
    int fd = -1;
    if (size == 0 || size > SECRET_MAX - 32)
        return FL_FAIL(err, FL_EARG, "no key has %zu bytes", size);
    const size_t whole = sizeof(key_magic) + size + KEY_CHECK;
    FL_TRY(open_key(path, &fd, err));
    size_t got = 0;
    fl_status st =
        fl_secret_open(whole + 1, &file, err); // one more byte shows a file that is too long
    while (st == FL_OK && got < whole + 1) {
        const ssize_t n = fl_fault() ? -1 : read(fd, file->data + got, whole + 1 - got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) st = FL_FAIL(err, FL_EIO, "cannot read key %s: %s", path, strerror(errno));
        if (n <= 0) break;
        got += (size_t)n;
    }
    if (st != FL_OK) goto out;
    uint8_t check[KEY_CHECK];
    key_check((fl_bytes){file->data + sizeof(key_magic), size}, check);
    if (got != whole || memcmp(file->data, key_magic, sizeof(key_magic)) != 0 ||
        !fl_equal(check, file->data + whole - KEY_CHECK, KEY_CHECK)) {
        st = FL_FAIL(err, FL_EFORMAT, "key %s is damaged; restore it from a backup", path);
        goto out;
    }
    st = fl_secret_copy((fl_bytes){file->data + sizeof(key_magic), size}, &s, err);
    if (st == FL_OK) *ret = s;
out:
    close(fd);
    fl_secret_close(file);
    return st;
}

// ---- randomness

void fl_random(void *out, size_t size) {
    randombytes_buf(out, size);
}

// ---- identity

fl_status fl_sign_new(fl_secret **ret, uint8_t ret_key[FL_SIGN_KEY], fl_err *err) {
    fl_secret *seed = NULL;
    FL_TRY(fl_secret_random(FL_SEED_SIZE, &seed, err));
    const fl_status st = fl_sign_key(seed, ret_key, err);
    if (st != FL_OK) {
        fl_secret_close(seed);
        return st;
    }
    *ret = seed;
    return FL_OK;
}

fl_status fl_sign_key(const fl_secret *seed, uint8_t ret_key[FL_SIGN_KEY], fl_err *err) {
    if (seed->size != FL_SEED_SIZE) return FL_FAIL(err, FL_EARG, "not an identity key");
    uint8_t full[crypto_sign_SECRETKEYBYTES];
    crypto_sign_seed_keypair(ret_key, full, seed->data);
    fl_wipe(full, sizeof(full));
    return FL_OK;
}

fl_status fl_sign(const fl_secret *seed, fl_bytes message, uint8_t ret[FL_SIGN_SIZE], fl_err *err) {
    if (seed->size != FL_SEED_SIZE) return FL_FAIL(err, FL_EARG, "not an identity key");
    uint8_t full[crypto_sign_SECRETKEYBYTES], key[FL_SIGN_KEY];
    crypto_sign_seed_keypair(key, full, seed->data);
    crypto_sign_detached(ret, NULL, message.data, message.size, full);
    fl_wipe(full, sizeof(full));
    return FL_OK;
}

bool fl_sign_check(const uint8_t key[FL_SIGN_KEY], fl_bytes message,
                   const uint8_t sig[FL_SIGN_SIZE]) {
    return crypto_sign_verify_detached(sig, message.data, message.size, key) == 0;
}

// ---- key agreement

fl_status fl_dh_new(fl_secret **ret, uint8_t ret_key[FL_DH_KEY], fl_err *err) {
    fl_secret *secret = NULL;
    FL_TRY(fl_secret_random(FL_DH_KEY, &secret, err));
    crypto_scalarmult_base(ret_key, secret->data);
    *ret = secret;
    return FL_OK;
}

fl_status fl_dh_key(const fl_secret *secret, uint8_t ret_key[FL_DH_KEY], fl_err *err) {
    if (secret->size != FL_DH_KEY) return FL_FAIL(err, FL_EARG, "not a key for agreement");
    crypto_scalarmult_base(ret_key, secret->data);
    return FL_OK;
}

static void raw_dh_key(const uint8_t secret[FL_DH_KEY], uint8_t ret_key[FL_DH_KEY]) {
    crypto_scalarmult_base(ret_key, secret);
}

static fl_status raw_dh(const uint8_t secret[FL_DH_KEY], const uint8_t peer[FL_DH_KEY],
                        uint8_t ret_shared[FL_DH_KEY], fl_err *err) {
    if (crypto_scalarmult(ret_shared, secret, peer) == 0) return FL_OK;
    return FL_FAIL(err, FL_EAUTH, "the peer's key gives no shared secret");
}

fl_status fl_dh(const fl_secret *secret, const uint8_t peer[FL_DH_KEY], fl_secret **ret,
                fl_err *err) {
    if (secret->size != FL_DH_KEY) return FL_FAIL(err, FL_EARG, "not a key for agreement");
    fl_secret *shared = NULL;
    FL_TRY(fl_secret_open(FL_DH_KEY, &shared, err));
    const fl_status st = raw_dh(secret->data, peer, shared->data, err);
    if (st == FL_OK)
        *ret = shared;
    else
        fl_secret_close(shared);
    return st;
}

static void *locked_take(size_t size) {
    void *p = fl_fault() ? NULL : sodium_malloc((size + 15) & ~(size_t)15); // keeps it aligned
    if (p != NULL) memset(p, 0, size);
    return p;
}

const fl_pk fl_pk_real = {
    .sign = fl_sign,
    .sign_check = fl_sign_check,
    .dh_key = raw_dh_key,
    .dh = raw_dh,
    .take = locked_take,
    .give = sodium_free,
};

// ---- sealing

void fl_seal(const uint8_t key[FL_SEAL_KEY], const uint8_t nonce[FL_SEAL_NONCE], fl_bytes data,
             fl_bytes plain, uint8_t *out) {
    crypto_aead_xchacha20poly1305_ietf_encrypt(out, NULL, plain.data, plain.size, data.data,
                                               data.size, NULL, nonce, key);
}

fl_status fl_unseal(const uint8_t key[FL_SEAL_KEY], const uint8_t nonce[FL_SEAL_NONCE],
                    fl_bytes data, fl_bytes sealed, uint8_t *out, fl_err *err) {
    if (sealed.size < FL_SEAL_TAG ||
        crypto_aead_xchacha20poly1305_ietf_decrypt(out, NULL, NULL, sealed.data, sealed.size,
                                                   data.data, data.size, nonce, key) != 0)
        return FL_FAIL(err, FL_EAUTH, "sealed bytes were altered, or the key is another");
    return FL_OK;
}

// ---- digests

void fl_hash(fl_bytes in, uint8_t ret[FL_HASH_SIZE]) {
    crypto_generichash(ret, FL_HASH_SIZE, in.data, in.size, NULL, 0);
}

void fl_hash_init(fl_hasher *h, fl_bytes key, size_t out_size) {
    FL_ASSERT(out_size >= 16 && out_size <= 64 && key.size <= 64);
    h->size = out_size;
    crypto_generichash_init((crypto_generichash_state *)(void *)h->state, key.data, key.size,
                            out_size);
}

void fl_hash_add(fl_hasher *h, fl_bytes in) {
    if (in.size != 0)
        crypto_generichash_update((crypto_generichash_state *)(void *)h->state, in.data, in.size);
}

void fl_hash_add_u64(fl_hasher *h, uint64_t v) {
    uint8_t b[8];
    fl_put_u64(b, v);
    fl_hash_add(h, (fl_bytes){b, sizeof(b)});
}

void fl_hash_add_framed(fl_hasher *h, fl_bytes in) {
    fl_hash_add_u64(h, in.size);
    fl_hash_add(h, in);
}

void fl_hash_done(fl_hasher *h, uint8_t *ret) {
    crypto_generichash_final((crypto_generichash_state *)(void *)h->state, ret, h->size);
    fl_wipe(h, sizeof(*h));
}

// ---- text: one coder for 4, 5 and 6 bits a character

static bool text_encode(fl_bytes in, unsigned bits, const char *alphabet, char *out,
                        size_t out_size) {
    if (in.size > SIZE_MAX / 8 || (in.size * 8 + bits - 1) / bits >= out_size) return false;
    uint32_t hold = 0;
    unsigned have = 0;
    for (size_t i = 0; i < in.size; i++) {
        hold = (hold << 8 | in.data[i]) & 0xffff;
        have += 8;
        while (have >= bits) {
            have -= bits;
            *out++ = alphabet[hold >> have & ((1u << bits) - 1)];
        }
    }
    if (have > 0) *out++ = alphabet[hold << (bits - have) & ((1u << bits) - 1)];
    *out = '\0';
    fl_wipe(&hold, sizeof(hold));
    return true;
}

static bool text_decode(const char *text, unsigned bits, const char *alphabet, bool fold,
                        uint8_t *out, size_t size) {
    const size_t chars = (size * 8 + bits - 1) / bits;
    if (strlen(text) != chars) return false;
    uint32_t hold = 0;
    unsigned have = 0;
    for (size_t i = 0; i < chars; i++) {
        char c = text[i];
        if (fold && c >= 'A' && c <= 'Z') c = (char)(c - 'A' + 'a');
        const char *at = strchr(alphabet, c);
        if (c == '\0' || at == NULL) return false;
        hold = (hold << bits | (uint32_t)(at - alphabet)) & 0xffff;
        have += bits;
        if (have >= 8) {
            have -= 8;
            *out++ = (uint8_t)(hold >> have);
        }
    }
    return (hold & ((1u << have) - 1)) == 0; // spare bits must be 0: one spelling for each value
}

static const char hex[] = "0123456789abcdef";
static const char base32[] = "abcdefghijklmnopqrstuvwxyz234567";
static const char base64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

bool fl_hex_encode(fl_bytes in, char *out, size_t out_size) {
    return text_encode(in, 4, hex, out, out_size);
}

bool fl_hex_decode(const char *text, uint8_t *out, size_t size) {
    return text_decode(text, 4, hex, true, out, size);
}

bool fl_base32_encode(fl_bytes in, char *out, size_t out_size) {
    return text_encode(in, 5, base32, out, out_size);
}

bool fl_base32_decode(const char *text, uint8_t *out, size_t size) {
    return text_decode(text, 5, base32, true, out, size);
}

bool fl_base64_encode(fl_bytes in, char *out, size_t out_size) {
    return text_encode(in, 6, base64, out, out_size);
}

bool fl_base64_decode(const char *text, uint8_t *out, size_t size) {
    return text_decode(text, 6, base64, false, out, size);
}
