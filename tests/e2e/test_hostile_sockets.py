"""Goal: who has no key, or a key and bad manners, costs the coordinator little, is gone soon, and
honest nodes do not notice. Method: raw sockets and libzmq against the real coordinator, with two
honest nodes at work all the time. Each figure is printed beside its bound.
"""
import base64
import concurrent.futures
import os
import resource
import select
import socket
import sys
import time

import pathlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "net"))
import fleet  # noqa: E402
import hostile_zmq  # noqa: E402
import swarm  # noqa: E402

IDLERS = 1000
COUNT = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
GONE_S = 3.0
SLACK = 1.3  # of times, for machines that do other things too


def greeting(mechanism):
    return b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def report(what, value, bound, unit=""):
    print(f"  {what}: {value:.3g} {unit} (at most {bound:.3g})", flush=True)
    fleet.check(value <= bound, f"{what}: {value:.3g} {unit}, more than {bound:.3g}")


def cpu_s(process):
    fields = pathlib.Path(f"/proc/{process.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def connect(f):
    s = socket.create_connection(("127.0.0.1", f.port))
    s.setblocking(False)
    return s


def until_closed(sockets, seconds):
    """When each was closed by the other side, in seconds from now; None: it never was."""
    start, left, when = time.monotonic(), {s.fileno(): s for s in sockets}, []
    poll = select.poll()
    for fd in left:
        poll.register(fd, select.POLLIN)
    while left and time.monotonic() - start < seconds:
        for fd, _ in poll.poll(50):
            try:
                data = left[fd].recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                poll.unregister(fd)
                left.pop(fd).close()
                when.append(time.monotonic() - start)
    still = len(left)
    for s in left.values():
        s.close()
    return when, still


def join_time(f, name, url):
    start = time.monotonic()
    fleet.check(f.join(name, url).returncode == 0, f"{name} joins")
    return time.monotonic() - start


def rate(s, seconds):
    """Acknowledged updates a second of the honest nodes."""
    before, start = s.now["acked"], time.monotonic()
    time.sleep(seconds)
    return (s.now["acked"] - before) / (time.monotonic() - start)


def check_idlers(f, s, url):
    print(f"{IDLERS} connections that say nothing")
    quiet = rate(s, 2)
    rss, cpu, start = swarm.memory(f.coordinator)[0], cpu_s(f.coordinator), time.monotonic()
    idlers = [connect(f) for _ in range(IDLERS)]
    opened = time.monotonic() - start
    report("memory, MB", (swarm.memory(f.coordinator)[0] - rss) / 1e6, 16)
    report("an honest join, s", join_time(f, "late", url), 5)
    loaded = rate(s, 0.5)
    when, still = until_closed(idlers, 6)
    fleet.check(still == 0, f"{still} idle connections are still held")
    report("the last is gone after, s", max(when) + opened,
           (GONE_S + opened) * SLACK)
    spent = (cpu_s(f.coordinator) - cpu) / (time.monotonic() - start)
    print(f"  honest updates a second: {quiet:.0f} before, {loaded:.0f} meanwhile; processor "
          f"{100 * spent:.0f} % with the honest work")
    fleet.check(loaded >= 0.5 * quiet, "honest nodes are starved")


def check_greetings(f):
    """Each way not to finish a handshake, twenty times at once."""
    curve = greeting(b"CURVE")
    kinds = {
        "half a greeting": [curve[:10]], "all but a byte": [curve[:63]],
        "NULL": [greeting(b"NULL"), b"\x04\x26\x05READY" + bytes(32)],
        "PLAIN": [greeting(b"PLAIN"), b"\x04\x0a\x05HELLO\x01a\x01b"],
        "ZMTP 1.0": [b"\x01\x00", b"\x05\x00hack"],
        "ZMTP 2.0": [b"\xff" + bytes(7) + b"\x01\x7f\x01\x05", b"\x00\x00", b"\x00\x04hack"],
        "CURVE and silence": [curve],
        "CURVE and a wrong HELLO": [curve, b"\x04\xc8\x05HELLO\x01\x00" + os.urandom(192)],
        "random bytes": [os.urandom(4096)],
        "HTTP": [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
    }
    worst, count = 0, 0
    for name, parts in kinds.items():
        sockets = [connect(f) for _ in range(20)]
        for s in sockets:
            try:
                for part in parts:
                    s.sendall(part)
                    time.sleep(0.001)
            except OSError:
                pass
        when, still = until_closed(sockets, 5)
        fleet.check(still == 0, f"{name}: {still} of 20 connections are held")
        worst, count = max(worst, max(when)), count + 20
    print(f"{count} handshakes of {len(kinds)} kinds that come to nothing")
    report("the last is gone after, s", worst, GONE_S * SLACK)
    dribbler = connect(f)
    start, at = time.monotonic(), 0
    try:
        while time.monotonic() - start < 8:
            dribbler.send(curve[at % 64:at % 64 + 1])
            at += 1
            time.sleep(0.2)
            if select.select([dribbler], [], [], 0)[0] and dribbler.recv(4096) == b"":
                break
    except ConnectionError:
        pass
    report("a byte every 0.2 s is cut after, s", time.monotonic() - start, GONE_S * SLACK)


def check_giants(f):
    """Frames before anybody is authenticated: announced and poured, or small enough and held back."""
    rss = swarm.memory(f.coordinator)[0]
    poured, sockets = 0, []
    for size in (1 << 30, 1 << 20, 65536 + 100, 65000):
        for _ in range(16):
            s = connect(f)
            s.setblocking(True)
            s.settimeout(0.05)
            try:
                s.sendall(greeting(b"CURVE"))
                s.recv(64)
                s.sendall(b"\x06" + size.to_bytes(8, "big"))
                for _ in range(min(size - 1, 1 << 22) // 65000):
                    poured += s.send(bytes(65000))
                sockets.append(s)
            except OSError:
                s.close()
    held = swarm.memory(f.coordinator)[0] - rss
    print(f"64 giant frames before authentication, {poured / 1e6:.1f} MB poured")
    report("held for each, bytes", max(held, 0) / 64, 65536)
    for s in sockets:
        s.setblocking(False)
    when, still = until_closed(sockets, 5)
    fleet.check(still == 0, f"{still} are held")


def check_strangers(f, s, server_key, url):
    """10,000 connections a minute with keys that nobody knows."""
    quiet = rate(s, 2)
    alone = join_time(f, "calm", url)
    start, n, waiting = time.monotonic(), 0, []
    before = s.now["acked"]
    joined, pool = None, concurrent.futures.ThreadPoolExecutor(1)
    while time.monotonic() - start < 5:
        while n < (time.monotonic() - start) * 10000 / 60:
            waiting.append(hostile_zmq.Dealer(f.port, server_key, hostile_zmq.new_key(),
                                              f"127.0.0.{2 + n % 3}"))
            n += 1
            if len(waiting) > 100:
                waiting.pop(0).close()
        if joined is None and time.monotonic() - start > 2:
            joined = pool.submit(join_time, f, "storm", url)
        time.sleep(0.005)
    loaded = (s.now["acked"] - before) / (time.monotonic() - start)
    joined = joined.result()
    for d in waiting:
        d.close()
    print(f"{n} unknown keys in 5 s; honest updates a second: {quiet:.0f} before, {loaded:.0f} "
          f"meanwhile; a join {alone:.2f} s before, {joined:.2f} s in it")
    report("an honest join, s", joined, max(2 * alone, 5))
    fleet.check(loaded >= 0.5 * quiet, "honest nodes are starved")


def check_silent_keys(f, server_key):
    """An enrolled key opens hundreds of connections and says nothing on them."""
    key = hostile_zmq.key_of(f.state("thief"))
    before = fds(f)
    dealers = [hostile_zmq.Dealer(f.port, server_key, key) for _ in range(200)]
    fleet.wait_for("they are connected", lambda: fds(f) >= before + 190, 10)
    start = time.monotonic()
    fleet.wait_for("the connections are closed", lambda: fds(f) <= before + 100, 20)
    print(f"200 silent connections of one key\n  cut after {time.monotonic() - start:.1f} s")
    for d in dealers:
        d.close()
    fleet.wait_for("all are gone", lambda: fds(f) <= before + 10, 10)


def fds(f):
    return len(os.listdir(f"/proc/{f.coordinator.child.pid}/fd"))


def check_endless(f, server_key, key, who):
    """A message that never ends: parts and parts, of which libzmq keeps every one."""
    rss, peak, sent, cuts = swarm.memory(f.coordinator)[0], 0, 0, 0
    part, start = bytes(60000), time.monotonic()
    while time.monotonic() - start < 4:
        try:
            d = hostile_zmq.RawDealer(f.port, server_key, key)
            for i in range(1000000):
                d.send(part, more=True)
                sent += len(part)
                if i % 20 == 0:
                    peak = max(peak, swarm.memory(f.coordinator)[0] - rss)
        except OSError:
            cuts += 1
        d.close()
    print(f"an endless message of {who}: {sent / 1e6:.0f} MB sent, cut {cuts} times")
    fleet.check(sent > 10e6 and cuts > 0, "the endless message did not come through")
    report("memory, MB", peak / 1e6, 32)


def check_guesses(f, url):
    """Tokens made up: a few are answered, then the door is closed to whoever makes them up."""
    since = len(f.events("join.refused"))
    g = swarm.Swarm(f, 20, COUNT, 0, "guesser", url=url)
    g.start()
    time.sleep(7)  # each of eight asks again every three seconds
    g.process.kill()
    guesses = len(f.events("join.refused")) - since
    print("tokens made up by eight keys for 7 s")
    fleet.check(guesses > 0, "nobody guessed")
    report("guesses answered", guesses, 6)
    fleet.check(g.now["joined"] == 0, "a guess was right")


def check_revoked(f, s):
    before = s.now["up"]
    start = time.monotonic()
    f.ok(f.coordinator_bin, "revoke", f.home, "swarm-1")
    fleet.wait_for("its connection ends", lambda: s.now["up"] < before, 10, 0.01)
    print("revoked")
    report("its connection is cut after, s", time.monotonic() - start, 5)


def test(f):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    f.init(f.tiny_model("--layers", 4), "--exits", 2, "--rank", 2, "--retry", 50,
           "--updates-per-round", 1)
    f.start_coordinator()
    url = f.token("--auto-approve", "--uses", 100)
    code = base64.b32decode(url.rsplit("/", 1)[1].upper().ljust(-(-len(url.rsplit("/", 1)[1]) // 8)
                                                               * 8, "="))
    server_key = code[1:33]
    fleet.check(f.join("thief", url).returncode == 0, "a node whose key is stolen joins")
    s = swarm.Swarm(f, 2, COUNT, 1000000, url=url)
    s.start()
    s.wait(20, sessions=2, acked=4)
    check_idlers(f, s, url)
    check_greetings(f)
    check_giants(f)
    check_strangers(f, s, server_key, url)
    check_silent_keys(f, server_key)
    check_endless(f, server_key, hostile_zmq.new_key(), "somebody who may ask to join")
    check_endless(f, server_key, hostile_zmq.key_of(f.state("thief")), "an enrolled node")
    check_guesses(f, url)
    check_revoked(f, s)
    fleet.check(rate(s, 2) > 0, "the honest node is at work after all that")
    fleet.check(f.coordinator.stop() == 0, "the coordinator ends well after all that")
    fleet.check(f.coordinator_json("verify")["whole"], "verify")


if __name__ == "__main__":
    fleet.main(test)
