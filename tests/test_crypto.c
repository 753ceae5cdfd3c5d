// Goal: the primitives are the ones we think they are, and whatever is altered is refused. Method:
// published vectors, every single bit of a short message flipped, every n-th failing call.
#include "common/crypto.h"
#include "common/fault.h"
#include "tests/check.h"

#include <fcntl.h>
#include <sys/stat.h>

static void from_hex(const char *hex, uint8_t *out, size_t size) {
    T_NEED(fl_hex_decode(hex, out, size), "vector of %zu bytes", size);
}

static void check_hex(const uint8_t *got, const char *want) {
    char text[2048];
    T_NEED(fl_hex_encode((fl_bytes){got, strlen(want) / 2}, text, sizeof(text)), "room");
    T_STR(text, want);
}

static fl_secret *secret_hex(const char *hex) {
    uint8_t raw[64];
    fl_secret *s = NULL;
    fl_err err;
    from_hex(hex, raw, strlen(hex) / 2);
    T_OK(fl_secret_copy((fl_bytes){raw, strlen(hex) / 2}, &s, &err), err);
    return s;
}

// RFC 7693, appendix A, and the same input at 32 bytes.
static void test_blake2b(void) {
    uint8_t out[64];
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){NULL, 0}, 64);
    fl_hash_add(&h, (fl_bytes){(const uint8_t *)"a", 1});
    fl_hash_add(&h, (fl_bytes){NULL, 0});
    fl_hash_add(&h, (fl_bytes){(const uint8_t *)"bc", 2});
    fl_hash_done(&h, out);
    check_hex(out, "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
                   "7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923");
    fl_hash((fl_bytes){(const uint8_t *)"abc", 3}, out);
    check_hex(out, "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");
}

// RFC 8032, section 7.1, tests 1 and 2.
static void test_ed25519(void) {
    static const struct {
        const char *seed, *key, *message, *sig;
    } v[] = {
        {"9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
         "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
         "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701"
         "c"
         "f9b46bd25bf5f0595bbe24655141438e7a100b"},
        {"4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
         "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "r",
         "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d"
         "0"
         "f11d8c387b2eaeb4302aeeb00d291612bb0c00"},
    };
    for (size_t i = 0; i < FL_COUNT(v); i++) {
        fl_secret *seed = secret_hex(v[i].seed);
        uint8_t key[FL_SIGN_KEY], sig[FL_SIGN_SIZE];
        const fl_bytes message = {(const uint8_t *)v[i].message, strlen(v[i].message)};
        T_EQ(fl_sign_key(seed, key, NULL), FL_OK);
        check_hex(key, v[i].key);
        T_EQ(fl_sign(seed, message, sig, NULL), FL_OK);
        check_hex(sig, v[i].sig);
        T_CHECK(fl_sign_check(key, message, sig), "own signature");
        for (size_t bit = 0; bit < 8 * FL_SIGN_SIZE; bit++) {
            sig[bit / 8] ^= (uint8_t)(1u << (bit % 8));
            T_CHECK(!fl_sign_check(key, message, sig), "bit %zu of the signature", bit);
            sig[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        }
        T_CHECK(!fl_sign_check(key, (fl_bytes){(const uint8_t *)"q", 1}, sig), "other message");
        key[0] ^= 1;
        T_CHECK(!fl_sign_check(key, message, sig), "other key");
        fl_secret_close(seed);
    }
}

// RFC 7748, section 6.1.
static void test_x25519(void) {
    fl_secret *a = secret_hex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a");
    fl_secret *b = secret_hex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb");
    uint8_t a_key[FL_DH_KEY], b_key[FL_DH_KEY];
    fl_secret *ab = NULL, *ba = NULL;
    fl_err err;
    T_OK(fl_dh_key(a, a_key, &err), err);
    T_OK(fl_dh_key(b, b_key, &err), err);
    check_hex(a_key, "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a");
    check_hex(b_key, "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f");
    T_OK(fl_dh(a, b_key, &ab, &err), err);
    T_OK(fl_dh(b, a_key, &ba, &err), err);
    check_hex(fl_secret_view(ab).data,
              "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742");
    T_CHECK(fl_secret_equal(ab, fl_secret_view(ba)), "both sides agree");
    static const uint8_t zero[FL_DH_KEY];
    fl_secret *none = NULL;
    T_EQ(fl_dh(a, zero, &none, NULL), FL_EAUTH);
    T_CHECK(none == NULL, "written on failure");
    fl_secret_close(a), fl_secret_close(b), fl_secret_close(ab), fl_secret_close(ba);
}

// draft-irtf-cfrg-xchacha-03, appendix A.3.1.
static void test_xchacha20_poly1305(void) {
    static const char text[] =
        "Ladies and Gentlemen of the class of '99: If I could offer you only "
        "one tip for the future, sunscreen would be it.";
    enum { SIZE = sizeof(text) - 1 };
    uint8_t key[FL_SEAL_KEY], nonce[FL_SEAL_NONCE], data[12], out[SIZE + FL_SEAL_TAG], back[SIZE];
    from_hex("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f", key, 32);
    from_hex("404142434445464748494a4b4c4d4e4f5051525354555657", nonce, 24);
    from_hex("50515253c0c1c2c3c4c5c6c7", data, 12);
    const fl_bytes plain = {(const uint8_t *)text, SIZE}, aad = {data, 12},
                   sealed = {out, sizeof(out)};
    fl_seal(key, nonce, aad, plain, out);
    check_hex(out, "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb"
                   "731c7f1b0b4aa6440bf3a82f4eda7e39ae64c6708c54c216cb96b72e1213b452"
                   "2f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff9"
                   "21f9664c97637da9768812f615c68b13b52ec0875924c1c7987947deafd8780acf49");
    T_EQ(fl_unseal(key, nonce, aad, sealed, back, NULL), FL_OK);
    T_CHECK(memcmp(back, text, SIZE) == 0, "opened");
    for (size_t bit = 0; bit < 8 * sizeof(out); bit++) {
        out[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        T_EQ(fl_unseal(key, nonce, aad, sealed, back, NULL), FL_EAUTH);
        out[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
    for (size_t size = 0; size < sizeof(out); size++)
        T_EQ(fl_unseal(key, nonce, aad, (fl_bytes){out, size}, back, NULL), FL_EAUTH);
    data[0] ^= 1;
    T_EQ(fl_unseal(key, nonce, aad, sealed, back, NULL), FL_EAUTH);
    data[0] ^= 1, nonce[23] ^= 1;
    T_EQ(fl_unseal(key, nonce, aad, sealed, back, NULL), FL_EAUTH);
    nonce[23] ^= 1, key[5] ^= 1;
    T_EQ(fl_unseal(key, nonce, aad, sealed, back, NULL), FL_EAUTH);
}

static void test_secrets(void) {
    fl_secret *s = NULL, *t = NULL;
    fl_err err;
    T_EQ(fl_secret_open(0, &s, NULL), FL_EARG);
    T_EQ(fl_secret_open(5000, &s, NULL), FL_EARG);
    for (size_t size = 1; size < 40; size++) {
        T_OK(fl_secret_random(size, &s, &err), err);
        T_OK(fl_secret_copy(fl_secret_view(s), &t, &err), err);
        T_CHECK(fl_secret_equal(s, fl_secret_view(t)), "copy of %zu", size);
        fl_secret_edit(t)[size - 1] ^= 0x80;
        T_CHECK(!fl_secret_equal(s, fl_secret_view(t)), "altered, %zu", size);
        T_CHECK(!fl_secret_equal(s, (fl_bytes){fl_secret_view(s).data, size - 1}), "shorter");
        fl_secret_close(s), fl_secret_close(t);
        s = t = NULL;
    }
    fl_secret_close(NULL);
    uint8_t key[FL_SIGN_KEY], sig[FL_SIGN_SIZE];
    T_OK(fl_secret_random(31, &s, &err), err);
    T_EQ(fl_sign_key(s, key, NULL), FL_EARG);
    T_EQ(fl_sign(s, (fl_bytes){key, 1}, sig, NULL), FL_EARG);
    T_EQ(fl_dh_key(s, key, NULL), FL_EARG);
    T_EQ(fl_dh(s, key, &t, NULL), FL_EARG);
    fl_secret_close(s);
}

static void test_texts(void) {
    static const struct {
        const char *plain, *base32, *base64;
    } v[] = {// RFC 4648, section 10, in lower case and without padding
             {"", "", ""},
             {"f", "my", "Zg"},
             {"fo", "mzxq", "Zm8"},
             {"foo", "mzxw6", "Zm9v"},
             {"foob", "mzxw6yq", "Zm9vYg"},
             {"fooba", "mzxw6ytb", "Zm9vYmE"},
             {"foobar", "mzxw6ytboi", "Zm9vYmFy"}};
    char text[64];
    uint8_t back[64];
    for (size_t i = 0; i < FL_COUNT(v); i++) {
        const fl_bytes in = {(const uint8_t *)v[i].plain, strlen(v[i].plain)};
        T_CHECK(fl_base32_encode(in, text, FL_BASE32_SIZE(in.size)), "base32 %zu", i);
        T_STR(text, v[i].base32);
        T_CHECK(!fl_base32_encode(in, text, FL_BASE32_SIZE(in.size) - 1), "no room, %zu", i);
        T_CHECK(fl_base32_decode(v[i].base32, back, in.size), "base32 back %zu", i);
        T_CHECK(memcmp(back, in.data, in.size) == 0, "base32 value %zu", i);
        T_CHECK(fl_base64_encode(in, text, FL_BASE64_SIZE(in.size)), "base64 %zu", i);
        T_STR(text, v[i].base64);
        T_CHECK(fl_base64_decode(v[i].base64, back, in.size), "base64 back %zu", i);
        T_CHECK(memcmp(back, in.data, in.size) == 0, "base64 value %zu", i);
        T_CHECK(!fl_base64_decode(v[i].base64, back, in.size + 1), "too short, %zu", i);
    }
    T_CHECK(fl_base32_decode("MZXW6", back, 3), "upper case");
    T_CHECK(!fl_base32_decode("mzxw7", back, 3), "spare bits set: a second spelling");
    T_CHECK(!fl_base32_decode("mz1w6", back, 3), "1 is no base32");
    T_CHECK(!fl_base64_decode("Zh", back, 1), "spare bits set");
    T_CHECK(!fl_base64_decode("Zm9v=", back, 3), "padding");
    T_CHECK(!fl_hex_decode("0g", back, 1) && !fl_hex_decode("000", back, 1), "not hex");
}

static void write_raw(const char *path, const void *data, size_t size, mode_t mode) {
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    T_NEED(fd >= 0 && write(fd, data, size) == (ssize_t)size && fchmod(fd, mode) == 0, "%s", path);
    close(fd);
}

static size_t read_raw(const char *path, uint8_t *out, size_t size) {
    const int fd = open(path, O_RDONLY);
    T_NEED(fd >= 0, "%s", path);
    const ssize_t n = read(fd, out, size);
    close(fd);
    return n < 0 ? 0 : (size_t)n;
}

static void test_key_files(void) {
    char dir[] = "/tmp/fl_crypto_XXXXXX", path[64], link_path[64];
    T_NEED(mkdtemp(dir) != NULL, "folder");
    snprintf(path, sizeof(path), "%s/key", dir);
    snprintf(link_path, sizeof(link_path), "%s/link", dir);
    fl_secret *s = NULL, *t = NULL;
    fl_err err;
    T_EQ(fl_secret_load(path, 32, &t, NULL), FL_ENOENT);
    T_OK(fl_secret_random(32, &s, &err), err);
    T_OK(fl_secret_save(s, path, &err), err);
    struct stat info;
    T_CHECK(stat(path, &info) == 0 && (info.st_mode & 0777) == 0600, "mode");
    T_OK(fl_secret_load(path, 32, &t, &err), err);
    T_CHECK(fl_secret_equal(s, fl_secret_view(t)), "same key");
    fl_secret_close(t);
    t = NULL;
    T_EQ(fl_secret_load(path, 31, &t, NULL), FL_EFORMAT);
    T_EQ(fl_secret_load(path, 33, &t, NULL), FL_EFORMAT);
    T_EQ(symlink(path, link_path), 0);
    T_EQ(fl_secret_load(link_path, 32, &t, NULL), FL_EIO);
    T_EQ(fl_secret_load(dir, 32, &t, NULL), FL_EIO);
    T_EQ(chmod(path, 0640), 0);
    T_EQ(fl_secret_load(path, 32, &t, NULL), FL_EAUTH);

    uint8_t raw[64];
    const size_t size = read_raw(path, raw, sizeof(raw));
    T_EQ(size, 48);
    for (size_t n = 0; n < size; n++) { // every truncation, every damaged byte
        write_raw(path, raw, n, 0600);
        T_EQ(fl_secret_load(path, 32, &t, NULL), FL_EFORMAT);
        raw[n] ^= 0x10;
        write_raw(path, raw, size, 0600);
        T_EQ(fl_secret_load(path, 32, &t, NULL), FL_EFORMAT);
        raw[n] ^= 0x10;
    }
    T_CHECK(t == NULL, "written on failure");
    unlink(path), unlink(link_path), rmdir(dir);
    fl_secret_close(s);
}

static void test_key_files_survive_every_failure(void) {
#ifdef FL_FAULTS
    char dir[] = "/tmp/fl_crypto_XXXXXX", path[64], temp[80];
    T_NEED(mkdtemp(dir) != NULL, "folder");
    snprintf(path, sizeof(path), "%s/key", dir);
    snprintf(temp, sizeof(temp), "%s.new", path);
    fl_secret *old = NULL, *new = NULL, *got = NULL;
    fl_err err;
    T_OK(fl_secret_random(32, &old, &err), err);
    T_OK(fl_secret_random(32, &new, &err), err);
    bool fired = true;
    for (unsigned n = 1; fired && n < 100; n++) {
        T_OK(fl_secret_save(old, path, &err), err);
        fl_fault_arm(n);
        const fl_status st = fl_secret_save(new, path, NULL);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st == FL_OK) == !fired, "save, fault %u: %s", n, fl_status_name(st));
        T_OK(fl_secret_load(path, 32, &got, &err), err);
        T_CHECK(fl_secret_equal(got, fl_secret_view(old)) ||
                    fl_secret_equal(got, fl_secret_view(new)),
                "neither the old nor the new key, fault %u", n);
        T_CHECK(access(temp, F_OK) != 0, "a key was left lying about, fault %u", n);
        fl_secret_close(got);
        got = NULL;
    }
    fired = true;
    for (unsigned n = 1; fired && n < 100; n++) {
        fl_fault_arm(n);
        const fl_status st = fl_secret_load(path, 32, &got, NULL);
        fired = fl_fault_fired();
        fl_fault_arm(0);
        T_CHECK((st == FL_OK) == !fired && (got != NULL) == !fired, "load, fault %u", n);
        fl_secret_close(got);
        got = NULL;
    }
    unlink(path), rmdir(dir);
    fl_secret_close(old), fl_secret_close(new);
#else
    T_SKIP("built without fault injection");
#endif
}

int main(int argc, char **argv) {
    if (fl_crypto_init(NULL) != FL_OK || fl_crypto_init(NULL) != FL_OK) return 2;
    static const t_case cases[] = {
        {"blake2b", test_blake2b},
        {"ed25519", test_ed25519},
        {"x25519", test_x25519},
        {"xchacha20_poly1305", test_xchacha20_poly1305},
        {"secrets", test_secrets},
        {"texts", test_texts},
        {"key_files", test_key_files},
        {"key_files_survive_every_failure", test_key_files_survive_every_failure},
    };
    return t_main(argc, argv, cases, FL_COUNT(cases));
}
