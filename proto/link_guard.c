#include "proto/link_guard.h"

#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum { FDS_MAX = 1 << 20, END_MS = 1000 };

static uint64_t cookie_of(int fd) {
    uint64_t cookie = 0;
    socklen_t size = sizeof(cookie);
    return getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) == 0 ? cookie : 0;
}

// Bytes that left the kernel towards libzmq since the connection began; 0 when it is no longer TCP.
static uint64_t bytes_read(int fd) {
    struct tcp_info info;
    socklen_t size = sizeof(info);
    int waiting = 0;
    memset(&info, 0, sizeof(info));
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0 ||
        size < offsetof(struct tcp_info, tcpi_bytes_received) + sizeof(info.tcpi_bytes_received) ||
        ioctl(fd, SIOCINQ, &waiting) != 0)
        return 0;
    const uint64_t got = info.tcpi_bytes_received;
    return got > (uint64_t)waiting ? got - (uint64_t)waiting : 0;
}

static fl_guard_conn *conn_of(fl_guard *g, int fd) {
    if (fd < 0 || (size_t)fd >= g->count || g->conns[fd].cookie == 0) return NULL;
    return &g->conns[fd];
}

void fl_guard_done(fl_guard *g) {
    free(g->conns);
    *g = (fl_guard){.count = 0};
}

void fl_guard_opened(fl_guard *g, int fd, uint64_t now_ms) {
    if (fd < 0 || fd >= FDS_MAX) return;
    if ((size_t)fd >= g->count) {
        const size_t count = 2 * (size_t)fd + 64;
        fl_guard_conn *conns = realloc(g->conns, count * sizeof(*conns));
        if (conns == NULL) return;
        memset(conns + g->count, 0, (count - g->count) * sizeof(*conns));
        g->conns = conns;
        g->count = count;
    }
    fl_guard_conn *c = &g->conns[fd];
    const uint64_t cookie = cookie_of(fd);
    if (cookie == c->cookie) return; // it spoke before its event came, or is gone already
    g->live += (c->cookie == 0) - (size_t)(cookie == 0);
    *c = (fl_guard_conn){.cookie = cookie, .since_ms = now_ms};
}

void fl_guard_closed(fl_guard *g, int fd) {
    fl_guard_conn *c = conn_of(g, fd);
    if (c == NULL || cookie_of(fd) == c->cookie) return;
    *c = (fl_guard_conn){.cookie = 0};
    g->live--;
}

fl_guard_id fl_guard_heard(fl_guard *g, int fd, uint64_t now_ms) {
    fl_guard_conn *c = conn_of(g, fd);
    if (c == NULL) {
        fl_guard_opened(g, fd, now_ms);
        c = conn_of(g, fd);
    }
    if (c == NULL) return (fl_guard_id){.fd = -1};
    c->frames++;
    return (fl_guard_id){.fd = fd, .cookie = c->cookie};
}

void fl_guard_cut(fl_guard *g, fl_guard_id id) {
    fl_guard_conn *c = conn_of(g, id.fd);
    if (c == NULL || c->cut || c->cookie != id.cookie || cookie_of(id.fd) != id.cookie) return;
    shutdown(id.fd, SHUT_RDWR); // libzmq reads the end and closes it
    c->cut = true;
    g->cuts++;
}

void fl_guard_end(fl_guard *g, fl_guard_id id, uint64_t now_ms) {
    fl_guard_conn *c = conn_of(g, id.fd);
    if (c != NULL && c->cookie == id.cookie) c->end_ms = now_ms + END_MS;
}

void fl_guard_scan(fl_guard *g, const fl_guard_limits *limits) {
    for (size_t i = 0; i < g->count && g->live != 0; i++) {
        fl_guard_conn *c = &g->conns[i];
        const int fd = (int)i;
        if (c->cookie == 0) continue;
        const uint64_t bytes = bytes_read(fd);
        if (c->frames != c->frames_then || bytes < c->bytes_then) {
            c->frames_then = c->frames;
            c->bytes_then = bytes;
        }
        const bool silent = c->frames == 0 && limits->drained_ms > c->since_ms + limits->silent_ms;
        const bool over = c->end_ms != 0 && limits->now_ms >= c->end_ms;
        if (silent || over || bytes - c->bytes_then > limits->held_max) {
            fl_guard_cut(g, (fl_guard_id){fd, c->cookie});
            fl_guard_closed(g, fd); // its number has gone to another by now
        }
    }
}
