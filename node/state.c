#include "node/state.h"

#include "common/checked.h"
#include "common/conf.h"
#include "proto/update.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

// The two INI files are tables like any other: hex texts for keys, numbers for counters.
typedef struct saved {
    char host[FL_SETTING_TEXT_MAX], name[FL_SETTING_TEXT_MAX];
    char coordinator_curve[FL_SETTING_TEXT_MAX], coordinator_identity[FL_SETTING_TEXT_MAX];
    int64_t port;
    char run_id[FL_SETTING_TEXT_MAX], model_digest[FL_SETTING_TEXT_MAX];
    int64_t updates_made, reports_made;
    int64_t upload_day, upload_bytes, upload_least;
} saved;

#define AT(field) NULL, offsetof(saved, field)
static const fl_setting enrolment_table[] = {
    {"coordinator", "host", FL_KIND_TEXT, "HOST", 0, 0, "", "name or address", AT(host)},
    {"coordinator", "port", FL_KIND_INTEGER, "PORT", 1, 65535, "1", "TCP port", AT(port)},
    {"coordinator", "curve_key", FL_KIND_TEXT, "HEX", 0, 0, "", "its transport key, pinned",
     AT(coordinator_curve)},
    {"coordinator", "identity_key", FL_KIND_TEXT, "HEX", 0, 0, "", "its identity, pinned",
     AT(coordinator_identity)},
    {"node", "name", FL_KIND_TEXT, "NAME", 0, 0, "", "what the owner calls this node", AT(name)},
};
static const fl_setting run_table[] = {
    {"run", "id", FL_KIND_TEXT, "HEX", 0, 0, "", "the run this node takes part in", AT(run_id)},
    {"run", "model", FL_KIND_TEXT, "HEX", 0, 0, "", "digest of its model", AT(model_digest)},
    {"run", "updates", FL_KIND_INTEGER, "count", 0, 0, "0", "updates made", AT(updates_made)},
    {"run", "reports", FL_KIND_INTEGER, "count", 0, 0, "0", "reports made", AT(reports_made)},
    {"upload", "day", FL_KIND_INTEGER, "days", 0, 0, "0", "since 1970", AT(upload_day)},
    {"upload", "bytes", FL_KIND_INTEGER, "bytes", 0, 0, "0", "of updates made on it",
     AT(upload_bytes)},
    {"upload", "least", FL_KIND_INTEGER, "bytes", 0, 0, "0", "that the last task needed",
     AT(upload_least)},
};

void node_state_path(const node_state *s, const char *name, char *path) {
    snprintf(path, NODE_PATH_MAX, "%s/%s", s->folder, name);
}

void node_state_layer_path(const node_state *s, uint32_t layer, char *path) {
    snprintf(path, NODE_PATH_MAX, "%s/layers/%03u", s->folder, layer);
}

static fl_status fail_errno(fl_err *err, const char *verb, const char *path) {
    return FL_FAIL(err, FL_EIO, "cannot %s %s: %s", verb, path, strerror(errno));
}

static fl_status open_keys(node_state *s, fl_err *err) {
    char path[NODE_PATH_MAX];
    node_state_path(s, "identity.key", path);
    fl_status st = fl_secret_load(path, FL_SEED_SIZE, &s->identity, err);
    if (st == FL_ENOENT) {
        FL_TRY(fl_sign_new(&s->identity, s->identity_key, err));
        st = fl_secret_save(s->identity, path, err);
    }
    FL_TRY(st);
    FL_TRY(fl_sign_key(s->identity, s->identity_key, err));
    node_state_path(s, "curve.key", path);
    st = fl_secret_load(path, FL_SEED_SIZE, &s->curve, err);
    if (st == FL_ENOENT) {
        FL_TRY(fl_dh_new(&s->curve, s->curve_key, err));
        st = fl_secret_save(s->curve, path, err);
    }
    FL_TRY(st);
    return fl_dh_key(s->curve, s->curve_key, err);
}

static fl_status load_table(const node_state *s, const char *name, const fl_setting *table,
                            size_t count, saved *into, bool *ret_there, fl_err *err) {
    char path[NODE_PATH_MAX];
    node_state_path(s, name, path);
    const fl_status st = fl_conf_load(path, "FLEETUNE_IN_FILE", table, count, into, err);
    *ret_there = st == FL_OK;
    return st == FL_ENOENT ? FL_OK : st;
}

static fl_status open_tables(node_state *s, fl_err *err) {
    saved f = {0};
    FL_TRY(load_table(s, "enrolment.ini", enrolment_table, FL_COUNT(enrolment_table), &f,
                      &s->enrolled, err));
    if (s->enrolled) {
        snprintf(s->host, sizeof(s->host), "%.500s", f.host);
        snprintf(s->name, sizeof(s->name), "%.500s", f.name);
        s->port = f.port;
        if (!fl_hex_decode(f.coordinator_curve, s->coordinator_curve, FL_KEY_SIZE) ||
            !fl_hex_decode(f.coordinator_identity, s->coordinator_identity, FL_KEY_SIZE))
            return FL_FAIL(err, FL_EFORMAT, "%s/enrolment.ini has damaged keys: join again",
                           s->folder);
    }
    FL_TRY(load_table(s, "run.ini", run_table, FL_COUNT(run_table), &f, &s->has_run, err));
    s->updates_made = f.updates_made;
    s->reports_made = f.reports_made;
    s->upload = (node_upload_spent){f.upload_day, f.upload_bytes, f.upload_least};
    if (!s->has_run) return FL_OK;
    s->has_run = fl_hex_decode(f.run_id, s->run_id, FL_ID_SIZE) &&
                 fl_hex_decode(f.model_digest, s->model_digest, FL_DIGEST_SIZE);
    return s->has_run ? FL_OK
                      : FL_FAIL(err, FL_EFORMAT, "%s/run.ini is damaged: remove it", s->folder);
}

// Goes with the process, however it ends.
static fl_status take_lock(node_state *s, fl_err *err) {
    char path[NODE_PATH_MAX];
    node_state_path(s, "lock", path);
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) return fail_errno(err, "open", path);
    s->lock = fd + 1;
    if (flock(fd, LOCK_EX | LOCK_NB) == 0) return FL_OK;
    return FL_FAIL(err, FL_ESTATE, "another fleetune-node works with the state in %s", s->folder);
}

// What a kill left of files that were being written beside their names (common/file.c): a whole one
// must not be taken for what it was to become.
static void remove_cut_off(const node_state *s, const char *name) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    char folder[NODE_PATH_MAX];
    node_state_path(s, name, folder);
    DIR *d = opendir(folder);
    if (d == NULL) return;
    for (const struct dirent *e; (e = readdir(d)) != NULL;) {
        const size_t n = strlen(e->d_name);
        if (n > 7 && e->d_name[n - 7] == '.' && strspn(e->d_name + n - 6, letters) == 6)
            unlinkat(dirfd(d), e->d_name, 0);
    }
    closedir(d);
}

fl_status node_state_open(const char *folder, node_state *ret, fl_err *err) {
    static const char *const folders[] = {".", "layers", "spool", "kept"};
    node_state s = {0};
    if (snprintf(s.folder, sizeof(s.folder), "%s", folder) >= (int)sizeof(s.folder))
        return FL_FAIL(err, FL_EARG, "the state folder's path is too long");
    FL_TRY(fl_crypto_init(err));
    char path[NODE_PATH_MAX];
    fl_status st = take_lock(&s, err);
    node_state_path(&s, "layers", path);
    if (st == FL_OK) st = fl_folder_make(path, err);
    node_state_path(&s, "spool", path);
    if (st == FL_OK) st = fl_folder_make(path, err);
    node_state_path(&s, "kept", path);
    if (st == FL_OK) st = fl_folder_make(path, err);
    for (size_t i = 0; st == FL_OK && i < FL_COUNT(folders); i++) remove_cut_off(&s, folders[i]);
    if (st == FL_OK) st = open_keys(&s, err);
    if (st == FL_OK) st = open_tables(&s, err);
    if (st != FL_OK) {
        node_state_close(&s);
        return st;
    }
    *ret = s;
    return FL_OK;
}

void node_state_close(node_state *s) {
    fl_secret_close(s->identity);
    fl_secret_close(s->curve);
    if (s->lock > 0) close(s->lock - 1);
    s->identity = s->curve = NULL;
    s->lock = 0;
}

static fl_status save_table(const node_state *s, const char *name, const fl_setting *table,
                            size_t count, const saved *values, fl_err *err) {
    char path[NODE_PATH_MAX], *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (out == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for %s", name);
    fl_conf_print(table, count, values, out);
    fclose(out);
    node_state_path(s, name, path);
    const fl_status st = fl_file_replace(path, (fl_bytes){(const uint8_t *)text, size}, err);
    free(text);
    return st;
}

static void hex(const uint8_t *in, size_t size, char *out, size_t out_size) {
    const bool fits = fl_hex_encode((fl_bytes){in, size}, out, out_size);
    FL_ASSERT(fits);
}

fl_status node_state_save_enrolment(const node_state *s, fl_err *err) {
    saved f = {.port = s->port};
    snprintf(f.host, sizeof(f.host), "%s", s->host);
    snprintf(f.name, sizeof(f.name), "%s", s->name);
    hex(s->coordinator_curve, FL_KEY_SIZE, f.coordinator_curve, sizeof(f.coordinator_curve));
    hex(s->coordinator_identity, FL_KEY_SIZE, f.coordinator_identity,
        sizeof(f.coordinator_identity));
    return save_table(s, "enrolment.ini", enrolment_table, FL_COUNT(enrolment_table), &f, err);
}

fl_status node_state_save_run(const node_state *s, fl_err *err) {
    saved f = {.updates_made = s->updates_made,
               .reports_made = s->reports_made,
               .upload_day = s->upload.day,
               .upload_bytes = s->upload.bytes,
               .upload_least = s->upload.least};
    hex(s->run_id, FL_ID_SIZE, f.run_id, sizeof(f.run_id));
    hex(s->model_digest, FL_DIGEST_SIZE, f.model_digest, sizeof(f.model_digest));
    return save_table(s, "run.ini", run_table, FL_COUNT(run_table), &f, err);
}

static void empty_folder(const node_state *s, const char *name) {
    char folder[NODE_PATH_MAX], path[NODE_PATH_MAX + 256];
    node_state_path(s, name, folder);
    DIR *d = opendir(folder);
    if (d == NULL) return;
    for (const struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof(path), "%s/%s", folder, e->d_name);
        unlink(path);
    }
    closedir(d);
}

fl_status node_state_begin_run(node_state *s, const uint8_t run_id[FL_ID_SIZE],
                               const uint8_t model_digest[FL_DIGEST_SIZE], fl_err *err) {
    if (s->has_run && memcmp(s->run_id, run_id, FL_ID_SIZE) == 0 &&
        memcmp(s->model_digest, model_digest, FL_DIGEST_SIZE) == 0)
        return FL_OK;
    empty_folder(s, "layers");
    empty_folder(s, "spool");
    empty_folder(s, "kept"); // of another run's layers
    memcpy(s->run_id, run_id, FL_ID_SIZE);
    memcpy(s->model_digest, model_digest, FL_DIGEST_SIZE);
    s->has_run = true;
    return node_state_save_run(s, err);
}

static bool has_digest(fl_bytes bytes, const uint8_t digest[FL_DIGEST_SIZE]) {
    uint8_t found[FL_DIGEST_SIZE];
    fl_hash(bytes, found);
    return fl_equal(found, digest, sizeof(found));
}

bool node_state_has_model(const node_state *s) {
    char path[NODE_PATH_MAX];
    fl_map map = {0};
    node_state_path(s, "model.gguf", path);
    if (!s->has_run || fl_map_open(path, &map, NULL) != FL_OK) return false;
    const bool whole = has_digest(map.bytes, s->model_digest);
    fl_map_close(&map);
    if (!whole) unlink(path);
    return whole;
}

// The digest that a layer had when it came is kept beside it: its own format cannot tell a bit.
static void layer_sum_path(const node_state *s, uint32_t layer, char *path) {
    node_state_layer_path(s, layer, path);
    const size_t n = strlen(path);
    snprintf(path + n, NODE_PATH_MAX - n, ".sum");
}

static bool layer_is_whole(const node_state *s, uint32_t layer, fl_bytes bytes) {
    char path[NODE_PATH_MAX];
    uint8_t *digest = NULL;
    size_t size = 0;
    layer_sum_path(s, layer, path);
    if (fl_file_read(path, FL_DIGEST_SIZE, &digest, &size, NULL) != FL_OK) return false;
    const bool whole = size == FL_DIGEST_SIZE && has_digest(bytes, digest);
    free(digest);
    return whole;
}

fl_status node_state_held(const node_state *s, fl_layer_version *held, size_t *ret_count,
                          fl_err *err) {
    size_t count = 0;
    for (uint32_t layer = 0; layer < FL_LAYERS_MAX; layer++) {
        char path[NODE_PATH_MAX];
        node_state_layer_path(s, layer, path);
        fl_map map = {0};
        const fl_status st = fl_map_open(path, &map, err);
        if (st == FL_ENOENT) continue;
        fl_layer l;
        if (st != FL_OK || fl_layer_open(map.bytes, &l, err) != FL_OK || l.layer != layer ||
            !layer_is_whole(s, layer, map.bytes))
            unlink(path);
        else
            held[count++] = (fl_layer_version){layer, l.version};
        fl_map_close(&map);
    }
    *ret_count = count;
    return FL_OK;
}

// ---- fetching

static void part_path(const node_state *s, const node_object *o, char *path) {
    char name[32];
    if (o->model)
        snprintf(name, sizeof(name), "model.part");
    else
        snprintf(name, sizeof(name), "layers/%03u.part", o->layer);
    node_state_path(s, name, path);
}

// What is there of a part must be of this very object: its digest is kept beside it.
static void part_digest_path(const node_state *s, const node_object *o, char *path) {
    part_path(s, o, path);
    const size_t n = strlen(path);
    snprintf(path + n, NODE_PATH_MAX - n, "-of");
}

fl_status node_state_fetched(const node_state *s, const node_object *o, uint64_t *ret,
                             fl_err *err) {
    char path[NODE_PATH_MAX], digest_path[NODE_PATH_MAX];
    part_path(s, o, path);
    part_digest_path(s, o, digest_path);
    uint8_t *digest = NULL;
    size_t size = 0;
    *ret = 0;
    const bool same = fl_file_read(digest_path, FL_DIGEST_SIZE, &digest, &size, NULL) == FL_OK &&
                      size == FL_DIGEST_SIZE && memcmp(digest, o->digest, size) == 0;
    free(digest);
    if (!same) {
        unlink(path);
        return fl_file_replace(digest_path, (fl_bytes){o->digest, FL_DIGEST_SIZE}, err);
    }
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return FL_OK;
    const off_t end = lseek(fd, 0, SEEK_END);
    close(fd);
    if (end > 0) *ret = (uint64_t)end < o->size ? (uint64_t)end : o->size;
    return FL_OK;
}

fl_status node_state_store(const node_state *s, const node_object *o, uint64_t offset,
                           fl_bytes piece, fl_err *err) {
    char path[NODE_PATH_MAX];
    part_path(s, o, path);
    const int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return fail_errno(err, "write", path);
    size_t done = 0;
    fl_status st = FL_OK;
    while (done < piece.size) {
        const ssize_t n = pwrite(fd, piece.data + done, piece.size - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) {
            st = fail_errno(err, "write", path);
            break;
        }
        done += (size_t)n;
    }
    close(fd);
    return st;
}

static fl_status check_part(const node_object *o, const char *path, fl_err *err) {
    fl_map map;
    FL_TRY(fl_map_open(path, &map, err));
    const bool good = map.bytes.size == o->size && has_digest(map.bytes, o->digest);
    fl_map_close(&map);
    return good ? FL_OK
                : FL_FAIL(err, FL_EAUTH, "what was fetched has another digest: fetched again");
}

fl_status node_state_fetch_done(node_state *s, const node_object *o, fl_err *err) {
    char path[NODE_PATH_MAX], digest_path[NODE_PATH_MAX], final[NODE_PATH_MAX];
    part_path(s, o, path);
    part_digest_path(s, o, digest_path);
    if (o->model)
        node_state_path(s, "model.gguf", final);
    else
        node_state_layer_path(s, o->layer, final);
    const fl_status st = check_part(o, path, err);
    if (st != FL_OK) {
        unlink(path);
        return st;
    }
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    const bool synced = fd >= 0 && fsync(fd) == 0;
    if (fd >= 0) close(fd);
    if (!synced || rename(path, final) != 0) return fail_errno(err, "keep", final);
    if (o->model) return unlink(digest_path) == 0 ? FL_OK : fail_errno(err, "drop", digest_path);
    layer_sum_path(s, o->layer, final);
    return rename(digest_path, final) == 0 ? FL_OK : fail_errno(err, "keep", final);
}

// ---- spool. A file is u32 size of the encoded UPDATE_BEGIN, that message, the sealed payload, and
// behind it what is kept with it, if anything.

#define SPOOL_NAME "%012llu"

static void spool_path(const node_state *s, uint64_t sequence, char *path) {
    char name[64];
    snprintf(name, sizeof(name), "spool/" SPOOL_NAME, (unsigned long long)sequence);
    node_state_path(s, name, path);
}

enum { BEGIN_MAX = 512, BEGIN_ARENA = 8192 };

fl_status node_state_spool_add(const node_state *s, const fl_update_begin *begin, fl_bytes sealed,
                               fl_bytes rest, fl_err *err) {
    _Alignas(16) uint8_t block[BEGIN_ARENA];
    uint8_t head[4];
    fl_arena scratch;
    fl_arena_init(&scratch, block, sizeof(block));
    const fl_msg m = {.type = FL_MSG_UPDATE_BEGIN, .update_begin = *begin};
    fl_bytes body;
    FL_TRY(fl_msg_encode(&m, &scratch, &body, err));
    fl_put_u32(head, (uint32_t)body.size);
    char path[NODE_PATH_MAX];
    spool_path(s, begin->key.sequence, path);
    fl_file *f = NULL;
    fl_status st = fl_file_create(path, &f, err);
    if (st != FL_OK) goto out;
    st = fl_file_write(f, (fl_bytes){head, sizeof(head)}, err);
    if (st != FL_OK) goto out;
    st = fl_file_write(f, body, err);
    if (st != FL_OK) goto out;
    st = fl_file_write(f, sealed, err);
    if (st != FL_OK) goto out;
    if (rest.size > 0) st = fl_file_write(f, rest, err);
    if (st != FL_OK) goto out;
    st = fl_file_commit(&f, err);
out:
    fl_file_discard(f);
    return st;
}

// The message at the head of a spooled file, and where its payload begins.
static fl_status spool_head(fl_bytes file, fl_update_begin *ret, size_t *ret_payload, fl_err *err) {
    _Alignas(16) uint8_t block[BEGIN_ARENA];
    fl_arena scratch;
    fl_arena_init(&scratch, block, sizeof(block));
    fl_reader r = {.in = file};
    const uint32_t size = fl_read_u32(&r);
    const fl_bytes body = fl_read_bytes(&r, size);
    if (r.bad || size > BEGIN_MAX) return FL_FAIL(err, FL_EFORMAT, "a spooled update is damaged");
    fl_msg m;
    FL_TRY(fl_msg_decode(FL_MSG_UPDATE_BEGIN, body, &scratch, &m, err));
    if (m.update_begin.size > fl_reader_left(&r))
        return FL_FAIL(err, FL_EFORMAT, "a spooled update is cut short");
    *ret = m.update_begin;
    *ret_payload = r.at;
    return FL_OK;
}

static int by_sequence(const void *a, const void *b) {
    const uint64_t x = ((const node_spooled *)a)->begin.key.sequence;
    const uint64_t y = ((const node_spooled *)b)->begin.key.sequence;
    return (x > y) - (x < y);
}

fl_status node_state_spool_list(const node_state *s, node_spooled *list, size_t *ret_count,
                                fl_err *err) {
    char folder[NODE_PATH_MAX], path[NODE_PATH_MAX + 256];
    node_state_path(s, "spool", folder);
    DIR *d = opendir(folder);
    if (d == NULL) return fail_errno(err, "list", folder);
    size_t count = 0;
    fl_status st = FL_OK;
    for (const struct dirent *e = readdir(d); e != NULL && st == FL_OK; e = readdir(d)) {
        if (e->d_name[0] == '.' || count == FL_LAYERS_MAX) continue;
        snprintf(path, sizeof(path), "%s/%s", folder, e->d_name);
        char name[32] = "";
        fl_map map = {0};
        size_t payload;
        st = fl_map_open(path, &map, err);
        if (st == FL_EIO || st == FL_ENOMEM) continue; // ends it: what cannot be read may be good
        if (st == FL_OK && spool_head(map.bytes, &list[count].begin, &payload, err) == FL_OK)
            snprintf(name, sizeof(name), SPOOL_NAME,
                     (unsigned long long)list[count].begin.key.sequence);
        fl_map_close(&map);
        st = FL_OK;
        if (strcmp(name, e->d_name) == 0)
            count++;
        else
            unlink(path); // a temporary file, whole or not, of a write that was cut off
    }
    closedir(d);
    qsort(list, count, sizeof(*list), by_sequence);
    *ret_count = count;
    return st;
}

fl_status node_state_spool_read(const node_state *s, uint64_t sequence, uint64_t offset,
                                uint32_t size, uint8_t *out, fl_err *err) {
    char path[NODE_PATH_MAX];
    spool_path(s, sequence, path);
    fl_map map;
    FL_TRY(fl_map_open(path, &map, err));
    fl_update_begin begin;
    size_t payload;
    fl_status st = spool_head(map.bytes, &begin, &payload, err);
    if (st == FL_OK && (offset > begin.size || size > begin.size - offset))
        st = FL_FAIL(err, FL_EARG, "a piece past the end of a spooled update");
    if (st == FL_OK) memcpy(out, map.bytes.data + payload + offset, size);
    fl_map_close(&map);
    return st;
}

// ---- what updates leave

// Name of the file that keeps the rest of a layer's newest update.
static void kept_path(const node_state *s, uint32_t layer, bool whole, char *path) {
    char name[32];
    snprintf(name, sizeof(name), "kept/%03u%s", layer, whole ? "-whole" : "");
    node_state_path(s, name, path);
}

// The sequence of a file that is, or was, a layer's in the spool; 0: there is none, or none with
// something behind its update. *ret_rest is where that begins. FL_EIO, FL_ENOMEM: not known.
static fl_status sequence_of(const char *path, uint32_t layer, uint64_t *ret, fl_map *ret_map,
                             size_t *ret_rest, fl_err *err) {
    fl_update_begin begin;
    size_t payload = 0;
    *ret = 0;
    *ret_map = (fl_map){0};
    const fl_status st = fl_map_open(path, ret_map, err);
    if (st == FL_EIO || st == FL_ENOMEM) return st;
    if (st != FL_OK) return FL_OK;
    if (spool_head(ret_map->bytes, &begin, &payload, NULL) == FL_OK && begin.key.layer == layer &&
        payload + begin.size < ret_map->bytes.size) {
        *ret_rest = payload + (size_t)begin.size;
        *ret = begin.key.sequence;
    }
    return FL_OK;
}

static fl_status kept_sequence(const char *path, uint32_t layer, uint64_t *ret, fl_err *err) {
    fl_map map;
    size_t rest;
    const fl_status st = sequence_of(path, layer, ret, &map, &rest, err);
    fl_map_close(&map);
    return st;
}

void node_state_spool_end(const node_state *s, const fl_update_key *key, node_residual_fate fate) {
    char from[NODE_PATH_MAX], rest[NODE_PATH_MAX], whole[NODE_PATH_MAX];
    spool_path(s, key->sequence, from);
    kept_path(s, key->layer, false, rest);
    kept_path(s, key->layer, true, whole);
    uint64_t older = 0, old = 0; // 0 as well when it cannot be read: then it is replaced
    (void)kept_sequence(rest, key->layer, &older, NULL);
    (void)kept_sequence(whole, key->layer, &old, NULL);
    const bool newest = older < key->sequence && old < key->sequence;
    if (fate == NODE_RESIDUAL_DROP) { // of older ones this one's rest was made
        unlink(rest);
        unlink(whole);
    } else if (newest) { // one that has nothing behind it is one with nothing to be read
        const bool is_whole = fate == NODE_RESIDUAL_RETURN;
        if (rename(from, is_whole ? whole : rest) == 0) unlink(is_whole ? rest : whole);
        return;
    }
    unlink(from);
}

fl_status node_state_rest(const node_state *s, uint32_t layer, uint8_t **ret, size_t *ret_size,
                          bool *ret_whole, fl_err *err) {
    char paths[2][NODE_PATH_MAX], newest[NODE_PATH_MAX];
    uint64_t best = 0;
    for (int whole = 0; whole < 2; whole++) {
        kept_path(s, layer, whole == 1, paths[whole]);
        uint64_t sequence;
        FL_TRY(kept_sequence(paths[whole], layer, &sequence, err));
        if (sequence <= best) continue;
        best = sequence;
        *ret_whole = whole == 1;
        memcpy(newest, paths[whole], sizeof(newest));
    }
    node_spooled *list = calloc(FL_LAYERS_MAX, sizeof(*list));
    size_t count = 0;
    if (list == NULL) return FL_FAIL(err, FL_ENOMEM, "no memory for the spool's list");
    fl_status st = node_state_spool_list(s, list, &count, err);
    for (size_t i = 0; st == FL_OK && i < count; i++) { // not answered yet: taken to be counted
        const fl_update_key *key = &list[i].begin.key;
        if (key->layer != layer || key->sequence <= best) continue;
        uint64_t sequence;
        spool_path(s, key->sequence, paths[0]);
        st = kept_sequence(paths[0], layer, &sequence, err);
        if (st != FL_OK || sequence != key->sequence) continue;
        best = sequence;
        *ret_whole = false;
        memcpy(newest, paths[0], sizeof(newest));
    }
    free(list);
    if (st == FL_OK && best == 0) st = FL_FAIL(err, FL_ENOENT, "nothing of layer %u", layer);
    FL_TRY(st);
    fl_map map;
    size_t rest = 0;
    uint64_t sequence;
    FL_TRY(sequence_of(newest, layer, &sequence, &map, &rest, err));
    if (sequence != best) {
        fl_map_close(&map);
        return FL_FAIL(err, FL_EIO, "the rest of layer %u changed while it was read", layer);
    }
    uint8_t *out = malloc(map.bytes.size - rest);
    if (out != NULL) memcpy(out, map.bytes.data + rest, map.bytes.size - rest);
    *ret = out;
    *ret_size = map.bytes.size - rest;
    fl_map_close(&map);
    return out != NULL ? FL_OK : FL_FAIL(err, FL_ENOMEM, "no memory for layer %u", layer);
}
