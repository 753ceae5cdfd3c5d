// Goal: only exact frames decode, each from the side and in the form that its type allows. Method:
// every type, every truncation at the end of a page, every head byte altered.
#include "common/checked.h"
#include "proto/frame.h"
#include "tests/check.h"

static const fl_msg_type types[] = {
#define X(name, number, from, form, body_max) FL_MSG_##name,
    FL_MSG_LIST(X)
#undef X
};

// A frame of this type in guarded memory: sealed when it may be.
static uint8_t *make(fl_msg_type type, bool sealed, size_t body, size_t *ret_size) {
    const size_t size = FL_FRAME_HEAD + body;
    uint8_t *p = t_guarded(size);
    const fl_frame f = {
        .type = type,
        .session = sealed ? 77 : 0,
        .counter = sealed ? 5 : 0,
        .body = {NULL, body},
    };
    fl_frame_head(&f, p);
    *ret_size = size;
    return p;
}

static void test_every_type(void) {
    for (size_t i = 0; i < FL_COUNT(types); i++) {
        const fl_msg_info *info = fl_msg_info_of(types[i]);
        T_NEED(info != NULL && info->type == types[i], "type %d", types[i]);
        for (int sealed = 0; sealed < 2; sealed++) {
            for (int from = FL_FROM_NODE; from <= FL_FROM_COORDINATOR; from++) {
                size_t size;
                uint8_t *p = make(types[i], sealed, 20, &size);
                fl_frame f = {.body = {NULL, 0}};
                const fl_status st =
                    fl_frame_decode((fl_bytes){p, size}, (fl_msg_from)from, &f, NULL);
                const int form = sealed ? FL_FORM_SEALED : FL_FORM_CLEAR;
                const bool legal = ((int)info->from & from) != 0 && ((int)info->form & form) != 0;
                T_CHECK(st == (legal ? FL_OK : FL_ESTATE), "%s sealed %d from %d: %s", info->name,
                        sealed, from, fl_status_name(st));
                if (legal) {
                    T_EQ(f.type, types[i]);
                    T_EQ(f.session, sealed ? 77 : 0);
                    T_EQ(f.counter, sealed ? 5 : 0);
                    T_EQ(f.body.size, 20);
                    T_CHECK(f.head.data == p && f.body.data == p + FL_FRAME_HEAD, "views");
                }
                t_guarded_free(p, size);
            }
        }
    }
}

static void test_limits_of_every_type(void) {
    for (size_t i = 0; i < FL_COUNT(types); i++) {
        const fl_msg_info *info = fl_msg_info_of(types[i]);
        const bool sealed = ((int)info->form & FL_FORM_SEALED) != 0;
        const size_t max = info->body_max + (sealed ? FL_FRAME_TAG : 0);
        T_CHECK(max + FL_FRAME_HEAD <= FL_FRAME_MAX, "%s is above the largest frame", info->name);
        for (size_t extra = 0; extra < 2; extra++) {
            size_t size;
            uint8_t *p = make(types[i], sealed, max + extra, &size);
            fl_frame f;
            T_EQ(fl_frame_decode((fl_bytes){p, size}, info->from, &f, NULL),
                 extra == 0 ? FL_OK : FL_ELIMIT);
            t_guarded_free(p, size);
        }
    }
}

static void test_every_truncation(void) {
    size_t size;
    uint8_t *p = make(FL_MSG_TASK, true, 50, &size);
    for (size_t n = 0; n < size; n++) {
        uint8_t *q = t_guarded(n + (n == 0));
        memcpy(q, p, n);
        fl_frame f;
        T_EQ(fl_frame_decode((fl_bytes){q, n}, FL_FROM_COORDINATOR, &f, NULL), FL_EFORMAT);
        t_guarded_free(q, n + (n == 0));
    }
    t_guarded_free(p, size);
    for (size_t body = 0; body < FL_FRAME_TAG; body++) { // sealed, yet too short for a seal
        p = make(FL_MSG_TASK, true, body, &size);
        fl_frame f;
        T_EQ(fl_frame_decode((fl_bytes){p, size}, FL_FROM_COORDINATOR, &f, NULL), FL_EFORMAT);
        t_guarded_free(p, size);
    }
}

// Any altered byte of the head gives another frame or none; never the same one.
static void test_every_head_byte(void) {
    size_t size;
    uint8_t *p = make(FL_MSG_TASK, true, 50, &size);
    for (size_t i = 0; i < FL_FRAME_HEAD; i++) {
        for (unsigned v = 1; v < 256; v++) {
            p[i] ^= (uint8_t)v;
            fl_frame f = {.session = 77, .counter = 5, .type = FL_MSG_TASK};
            const fl_status st =
                fl_frame_decode((fl_bytes){p, size}, FL_FROM_COORDINATOR, &f, NULL);
            const bool same = f.session == 77 && f.counter == 5 && f.type == FL_MSG_TASK;
            T_CHECK(st != FL_OK || !same, "byte %zu ^ %u", i, v);
            if (i == 4) T_EQ(st, FL_EUNSUPPORTED);
            if (i < 4 || i == 6 || i == 7 || i >= 28) T_EQ(st, FL_EFORMAT);
            p[i] ^= (uint8_t)v;
        }
    }
    fl_put_u64(p + 8, 0); // clear, but with a counter
    fl_frame f;
    T_EQ(fl_frame_decode((fl_bytes){p, size}, FL_FROM_COORDINATOR, &f, NULL), FL_EFORMAT);
    fl_put_u64(p + 8, 77);
    fl_put_u64(p + 16, 0); // sealed, but without
    T_EQ(fl_frame_decode((fl_bytes){p, size}, FL_FROM_COORDINATOR, &f, NULL), FL_EFORMAT);
    t_guarded_free(p, size);
}

static void test_encode(void) {
    static const uint8_t body[600] = {1, 2, 3};
    uint8_t out[1024];
    size_t size = 0;
    fl_frame f = {.type = FL_MSG_HELLO, .body = {body, 100}}, back;
    T_EQ(fl_frame_encode(&f, out, sizeof(out), &size, NULL), FL_OK);
    T_EQ(size, FL_FRAME_HEAD + 100);
    T_EQ(fl_frame_decode((fl_bytes){out, size}, FL_FROM_NODE, &back, NULL), FL_OK);
    T_CHECK(memcmp(back.body.data, body, 100) == 0, "body");
    T_EQ(fl_frame_encode(&f, out, FL_FRAME_HEAD + 99, &size, NULL), FL_ELIMIT);
    T_EQ(fl_frame_encode(&f, out, 0, &size, NULL), FL_ELIMIT);
    f.body.size = 513;
    T_EQ(fl_frame_encode(&f, out, sizeof(out), &size, NULL), FL_ELIMIT);
    f.type = FL_MSG_TASK;
    T_EQ(fl_frame_encode(&f, out, sizeof(out), &size, NULL), FL_ESTATE);
    T_STR(fl_msg_name(FL_MSG_TASK), "TASK");
    T_STR(fl_msg_name(0), "unknown");
}

T_MAIN({"every_type", test_every_type}, {"limits_of_every_type", test_limits_of_every_type},
       {"every_truncation", test_every_truncation}, {"every_head_byte", test_every_head_byte},
       {"encode", test_encode})
