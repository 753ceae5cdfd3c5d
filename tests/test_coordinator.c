// Goal: a real coordinator process, killed at any moment, counts every acknowledged update exactly
// once, gives out exactly the mean of what it acknowledged, and refuses everything else by name.
// Method: the built program and its commands; nodes made here from proto/ alone, with real keys and
// sockets on loopback. What comes out is compared, bit for bit, with a mean made from the ledger
// and from the values that the nodes remember.
#include "tests/fleet.h"

static void test_three_nodes_three_rounds(void) {
    node nodes[NODES];
    set_up("3", "even");
    start();
    open_fleet(nodes);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < NODES; i++) T_CHECK(work(&nodes[i], i + 1), "node %d has work", i);
    }
    // A node fetches what changed, and the model, and checks the digests.
    fl_msg m = request_task(&nodes[0]);
    T_NEED(m.type == FL_MSG_TASK && m.task.object_count > 0, "new layers are offered");
    fl_msg q = {.type = FL_MSG_CHUNK_REQUEST, .chunk_request = {.size = FL_CHUNK_MAX}};
    uint64_t total = m.task.model_size;
    uint8_t want[FL_DIGEST_SIZE], got[FL_DIGEST_SIZE];
    memcpy(want, m.task.model_digest, sizeof(want));
    fl_hasher h;
    fl_hash_init(&h, (fl_bytes){0}, FL_DIGEST_SIZE);
    memcpy(q.chunk_request.digest, want, sizeof(want));
    while (q.chunk_request.offset < total) {
        m = ask(&nodes[0], &q, FL_MSG_CHUNK, FL_MSG_CHUNK);
        T_NEED(m.type == FL_MSG_CHUNK && m.chunk.offset == q.chunk_request.offset, "a chunk");
        fl_hash_add(&h, m.chunk.data);
        q.chunk_request.offset += m.chunk.data.size;
    }
    fl_hash_done(&h, got);
    T_CHECK(memcmp(want, got, sizeof(want)) == 0, "the model came whole");
    q.chunk_request.digest[0] ^= 1;
    q.chunk_request.offset = 0;
    m = ask(&nodes[0], &q, FL_MSG_CHUNK, FL_MSG_CHUNK);
    T_CHECK(m.type == FL_MSG_ERROR && m.error.code == FL_CODE_NO_OBJECT, "no such object");
    for (int i = 0; i < NODES; i++) node_close(&nodes[i]);
    T_EQ(stop(SIGTERM), 0);
    T_EQ(check_whole_history(), 3);
}

static void wait_until_it_listens(void) {
    const struct sockaddr_in a = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    for (int tries = 0; tries < 500; tries++) {
        const int fd = socket(AF_INET, SOCK_STREAM, 0);
        const bool up = fd >= 0 && connect(fd, (const struct sockaddr *)&a, sizeof(a)) == 0;
        close(fd);
        if (up) return;
        usleep(10000);
    }
}

// Starts the coordinator and kills it at random moments, `kills` times; then tells.
static pid_t supervise(int kills, int *ret_done) {
    int fds[2];
    T_NEED(pipe(fds) == 0, "pipe");
    const pid_t pid = fork();
    if (pid != 0) {
        close(fds[1]);
        *ret_done = fds[0];
        return pid;
    }
    for (int i = 0; i < kills; i++) {
        start();
        if (i % 5 != 4) wait_until_it_listens(); // each fifth one dies while it starts
        usleep((useconds_t)(t_rand() % 700000));
        stop(SIGKILL);
    }
    start(); // the nodes are still at work; this one dies with its parent
    if (write(fds[1], "", 1) == 1) pause();
    _exit(1);
}

static void test_killed_thirty_times(void) {
    node nodes[NODES];
    int done = -1;
    set_up("3", "last-heavy");
    start();
    open_fleet(nodes);
    T_EQ(stop(SIGKILL), 128 + SIGKILL);
    const pid_t supervisor = supervise(30, &done);
    for (;;) {
        fd_set set;
        FD_ZERO(&set);
        FD_SET(done, &set);
        struct timeval no_wait = {0};
        if (select(done + 1, &set, NULL, NULL, &no_wait) == 1) break;
        for (int i = 0; i < NODES; i++) work(&nodes[i], i + 1);
    }
    close(done);
    kill(supervisor, SIGKILL);
    waitpid(supervisor, NULL, 0);
    usleep(300000);
    start();
    // A busy machine got less done between the kills: go on until there is enough to judge.
    for (int k = 0; k < 100 && (k == 0 || remembered < 60); k++)
        for (int i = 0; i < NODES; i++) work(&nodes[i], i + 1);
    for (int i = 0; i < NODES; i++) node_close(&nodes[i]);
    T_EQ(stop(SIGTERM), 0);
    const int64_t rounds = check_whole_history();
    T_CHECK(rounds >= 5, "only %d rounds", (int)rounds);
    T_CHECK(remembered > 30, "only %zu updates", remembered);
}

static int64_t updates_in_ledger(void) {
    coord_store *s = NULL;
    fl_err err;
    T_OK(coord_store_open(dir, &s, &err), err);
    book.count = 0;
    T_OK(coord_store_each_open_update(s, collect, &book, &err), err);
    coord_store_close(s);
    return (int64_t)book.count;
}

static void expect_refused(node *n, const parcel *p, fl_code code, const char *what) {
    const fl_update_ack ack = deliver(n, p);
    T_CHECK(ack.verdict == FL_VERDICT_REFUSED && ack.code == code, "%s: verdict %d code %s", what,
            (int)ack.verdict, fl_code_name(ack.code));
    T_CHECK(has_event("update.refused", fl_code_name(code)), "%s: the reason is an event", what);
    T_EQ(updates_in_ledger(), 0);
}

// One hostile update of each kind, each to a layer of its own task: refused by name, nothing
// counted.
static void test_hostile_updates_are_refused(void) {
    node nodes[NODES], *n = &nodes[0];
    static parcel p, q;
    set_up("3", "last");
    start();
    open_fleet(nodes);
    const fl_msg m = request_task(n);
    T_NEED(m.type == FL_MSG_TASK, "a task");
    const fl_task t = m.task; // layers 3 to 5

    pack(n, &t, 0, 0, &p), seal(n, &p);
    expect_refused(n, &p, FL_CODE_NOT_ASSIGNED, "a layer of nobody");
    pack(n, &t, 3, 1, &p), seal(n, &p);
    expect_refused(n, &p, FL_CODE_BASE, "a version of the future");
    pack(n, &t, 3, 0, &p), p.begin.run_id[0] ^= 1, seal(n, &p);
    expect_refused(n, &p, FL_CODE_RUN, "another run");
    pack(n, &t, 3, 0, &p), p.begin.task_id++, seal(n, &p);
    expect_refused(n, &p, FL_CODE_NOT_ASSIGNED, "another task");
    pack(n, &t, 3, 0, &p), seal(n, &p), p.sealed[100] ^= 4;
    expect_refused(n, &p, FL_CODE_DIGEST, "bits flipped on the way");
    fl_hash((fl_bytes){p.sealed, (size_t)p.begin.size}, p.begin.digest);
    expect_refused(n, &p, FL_CODE_SIGNATURE, "bits flipped before the digest");
    pack(n, &t, 4, 0, &p);
    const uint32_t nan = 0x7fc00000;
    memcpy(p.payload + FL_UPDATE_HEAD, &nan, 4), seal(n, &p);
    expect_refused(n, &p, FL_CODE_MALFORMED, "NaN");
    node_close(n); // its task is nearly over: the next ones are another node's
    n = &nodes[1];
    const fl_msg m2 = request_task(n);
    T_NEED(m2.type == FL_MSG_TASK, "a task");
    const fl_task t2 = m2.task;
    pack(n, &t2, 3, 0, &p), p.payload_size -= 2, seal(n, &p);
    expect_refused(n, &p, FL_CODE_MALFORMED, "cut short");
    pack(n, &t2, 4, 0, &p);
    const uint32_t huge = 0x7f000000;
    memcpy(p.payload + FL_UPDATE_HEAD, &huge, 4), seal(n, &p);
    expect_refused(n, &p, FL_CODE_NOT_FINITE, "1e38 a code");
    pack(n, &t2, 5, 0, &p), p.begin.tokens += 1, seal(n, &p);
    expect_refused(n, &p, FL_CODE_SHAPE, "claims more tokens than the payload");
    node_close(n);

    // The third node: a good update counts once, and its replay never.
    n = &nodes[2];
    const fl_msg m3 = request_task(n);
    T_NEED(m3.type == FL_MSG_TASK, "a task");
    const fl_task t3 = m3.task;
    pack(n, &t3, 3, 0, &p), seal(n, &p);
    T_EQ(deliver(n, &p).verdict, FL_VERDICT_ACCEPTED);
    T_EQ(deliver(n, &p).verdict, FL_VERDICT_DUPLICATE);
    pack(n, &t3, 3, 0, &q), seal(n, &q);
    T_EQ(deliver(n, &q).verdict, FL_VERDICT_REFUSED); // one for each layer and version
    T_EQ(updates_in_ledger(), 1);
    pack(n, &t3, 4, 0, &q), q.payload_size = 2000, seal(n, &q);
    T_EQ(deliver(n, &q).verdict, FL_VERDICT_REFUSED); // larger than the layer
    T_EQ(updates_in_ledger(), 1);
    node_close(n);
    T_EQ(stop(SIGTERM), 0);
    T_EQ(check_whole_history(), 0);
}

// Sealed frames that were seen once are worth nothing again, and bytes that are no frame harm
// nobody.
static void test_replayed_frames_and_noise(void) {
    node nodes[NODES], *n = &nodes[0];
    set_up("3", "last");
    start();
    open_fleet(nodes);
    const fl_msg request = {.type = FL_MSG_TASK_REQUEST, .task_request.capability.window_max = 9};
    fl_msg reply;
    fl_bytes body;
    fl_err err;
    size_t size;
    uint8_t frame[1024], noise[1024];
    T_OK(fl_msg_encode(&request, &n->arena, &body, &err), err);
    T_OK(fl_channel_seal(n->channel, request.type, body, frame, sizeof(frame), &size, &err), err);
    T_OK(fl_link_send(n->link, 0, (fl_bytes){frame, size}, &err), err);
    T_CHECK(receive(n, 3000, &reply) && reply.type == FL_MSG_TASK, "answered once");
    for (int i = 0; i < 20; i++) T_OK(fl_link_send(n->link, 0, (fl_bytes){frame, size}, &err), err);
    T_CHECK(!receive(n, 500, &reply), "a replay is not answered");
    for (int i = 0; i < 500; i++) {
        const size_t length = 1 + t_rand() % sizeof(noise);
        for (size_t k = 0; k < length; k++) noise[k] = (uint8_t)t_rand();
        if (i % 2 == 0) memcpy(noise, frame, size < length ? size : length); // a damaged frame
        noise[t_rand() % length] ^= 1;
        (void)!fl_link_send(n->link, 0, (fl_bytes){noise, length}, NULL);
        if (i % 32 == 0) (void)receive(n, 20, &reply);
    }
    T_CHECK(has_event("frame.refused", ""), "it is an event");
    T_CHECK(request_task(&nodes[1]).type == FL_MSG_TASK, "others are served");
    for (int i = 0; i < NODES; i++) node_close(&nodes[i]);
    T_EQ(stop(SIGTERM), 0);
}

static void test_approve_and_revoke_take_effect_at_once(void) {
    node n, stranger;
    char url[FL_INVITE_URL_MAX + 2];
    fl_msg reply;
    set_up("1", "last");
    start();
    token(url, sizeof(url), "1", false);
    node_open(&n, "pi");
    T_EQ(node_join(&n, url).verdict, FL_VERDICT_PENDING);
    T_CHECK(!node_session(&n, 500), "no session before the owner says so");
    node_open(&stranger, "stranger"); // the token was used up
    fl_invite invite;
    T_EQ(fl_invite_parse(url, &invite, NULL), FL_OK);
    T_EQ(node_join(&stranger, url).code, FL_CODE_TOKEN);
    T_CHECK(!node_session(&stranger, 300), "a stranger has no session");
    T_EQ(COMMAND(NULL, 0, "approve", dir, "pi"), 0);
    const uint64_t approved_ms = fl_clock_ms();
    T_CHECK(node_session(&n, 5000), "approved");
    T_CHECK(fl_clock_ms() - approved_ms < 3000, "soon");
    T_EQ(request_task(&n).type, FL_MSG_TASK);
    T_EQ(node_join(&n, url).verdict, FL_VERDICT_ACCEPTED); // asks again: the same answer
    T_EQ(COMMAND(NULL, 0, "revoke", dir, "pi"), 0);
    const fl_msg request = {.type = FL_MSG_TASK_REQUEST, .task_request.capability.window_max = 9};
    const uint64_t revoked_ms = fl_clock_ms();
    do send_sealed(&n, &request);
    while (receive(&n, 500, &reply) && fl_clock_ms() - revoked_ms < 3000);
    T_CHECK(fl_clock_ms() - revoked_ms < 2500, "nothing is answered soon after");
    send_sealed(&n, &request);
    T_CHECK(!receive(&n, 500, &reply), "and never again");
    T_CHECK(!node_session(&n, 700), "and no session is made");
    T_EQ(COMMAND(NULL, 0, "approve", dir, "pi"), 1); // revoked for good
    T_EQ(COMMAND(NULL, 0, "approve", dir, "nobody"), 1);
    node_close(&n);
    node_close(&stranger);
    T_EQ(stop(SIGTERM), 0);
    T_EQ(check_whole_history(), 0);
}

static void test_reports_make_the_vote(void) {
    node nodes[NODES];
    char out[8192];
    set_up("3", "last");
    start();
    open_fleet(nodes);
    for (int i = 0; i < NODES; i++) {
        const fl_msg m = request_task(&nodes[i]);
        T_NEED(m.type == FL_MSG_TASK && m.task.vote.count == 2, "a task with a vote");
        fl_msg r = {.type = FL_MSG_REPORT,
                    .report = {.round = m.task.round,
                               .task_id = m.task.task_id,
                               .sequence = 1,
                               .vote_version = 0,
                               .tokens = 1000,
                               .nll_base_q20 = 4000ll << 20,
                               .nll_local_q20 = 3500ll << 20,
                               .nll_voted_q20 = 3000ll << 20,
                               .exit_count = 2,
                               .exits = {{.responsibility_q20 = 250ull << 20},
                                         {.responsibility_q20 = 750ull << 20}}}};
        memcpy(r.report.run_id, m.task.run_id, FL_ID_SIZE);
        fl_msg a = ask(&nodes[i], &r, FL_MSG_REPORT_ACK, FL_MSG_REPORT_ACK);
        T_EQ(a.report_ack.verdict, FL_VERDICT_ACCEPTED);
        a = ask(&nodes[i], &r, FL_MSG_REPORT_ACK, FL_MSG_REPORT_ACK);
        T_EQ(a.report_ack.verdict, FL_VERDICT_DUPLICATE);
    }
    for (int i = 0; i < NODES; i++) T_CHECK(work(&nodes[i], i + 1), "node %d has work", i);
    const fl_msg m = request_task(&nodes[0]);
    T_NEED(m.type == FL_MSG_TASK, "a task");
    T_EQ(m.task.vote.version, 1);
    T_NEAR(m.task.vote.weights[0], 0.25, 1e-6, "pooled EM step");
    T_EQ(COMMAND(out, sizeof(out), "status", dir, "--json"), 0);
    T_CHECK(strstr(out, "\"loss\":3") != NULL, "%s", out);
    T_EQ(COMMAND(out, sizeof(out), "nodes", dir, "--json"), 0);
    T_CHECK(strstr(out, "\"nll_voted\":3") != NULL, "%s", out);
    T_EQ(COMMAND(out, sizeof(out), "rounds", dir, "--json"), 0);
    T_CHECK(strstr(out, "\"contributions\":3") != NULL, "%s", out);
    for (int i = 0; i < NODES; i++) node_close(&nodes[i]);
    T_EQ(stop(SIGTERM), 0);
    T_EQ(check_whole_history(), 1);
}

static void test_commands_refuse_with_a_status(void) {
    char other[300];
    set_up("1", "last");
    snprintf(other, sizeof(other), "%s/none", root);
    T_EQ(COMMAND(NULL, 0, "run", other), 1);
    T_EQ(COMMAND(NULL, 0, "verify", other), 1);
    T_EQ(COMMAND(NULL, 0, "init", other, "--model", other), 1);
    T_EQ(COMMAND(NULL, 0, "init", other), 2);
    T_EQ(COMMAND(NULL, 0, "init", other, "--model", model, "--exits", "7"), 2); // 6 layers
    T_EQ(COMMAND(NULL, 0, "init", other, "--model", "/dev/null"), 1);
    T_CHECK(!fl_file_exists(other), "nothing is left behind");
    T_EQ(COMMAND(NULL, 0, "init", dir, "--model", model), 1);
    T_EQ(COMMAND(NULL, 0, "nonsense"), 2);
    start();
    usleep(600000);
    T_EQ(COMMAND(NULL, 0, "run", dir), 1); // one at a time
    T_EQ(stop(SIGTERM), 0);
}

T_MAIN({"commands_refuse_with_a_status", test_commands_refuse_with_a_status},
       {"three_nodes_three_rounds", test_three_nodes_three_rounds},
       {"reports_make_the_vote", test_reports_make_the_vote},
       {"approve_and_revoke_take_effect_at_once", test_approve_and_revoke_take_effect_at_once},
       {"hostile_updates_are_refused", test_hostile_updates_are_refused},
       {"replayed_frames_and_noise", test_replayed_frames_and_noise},
       {"killed_thirty_times", test_killed_thirty_times})
