"""Goal: who listens on the network learns nothing: no weight, no name, no key, no private text.

Method: a fleet runs in a network namespace of its own, where a packet socket records everything
that crosses the loopback device. The TCP streams are put together again and searched for pieces of
the model, of every delta and layer, for names, public keys, the join secret and lines of the
private texts. Encrypted bytes look random, so they must not compress either. A marker that is sent
in the clear on the same device proves that the recorder and the search would have found something.

Needs root (or CAP_SYS_ADMIN and CAP_NET_RAW); is skipped otherwise.
"""
import collections
import contextlib
import ctypes
import fcntl
import random
import socket
import sqlite3
import struct
import sys
import threading
import time
import zlib

import fleet
import judge

CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8914, 1
ETH_P_ALL, SOL_PACKET, PACKET_STATISTICS, SO_RCVBUFFORCE = 3, 263, 6, 33
NAMES = ("adelheid-kitchen", "bertram-workshop", "cleopatra-cellar")
MARKER = b"the quick brown marker that everybody may read"
PIECE = 20  # bytes: long enough that chance never makes them


def enter_namespace():
    """A network of our own with nothing but its loopback device."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNET) != 0:
        fleet.skip("a network namespace needs root")
    with socket.socket() as s:
        fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


class Recorder(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self.socket.bind(("lo", 0))
        self.socket.settimeout(0.2)
        self.streams = collections.defaultdict(dict)  # (ports) -> {sequence number: payload}
        self.done = False

    def run(self):
        while not self.done:
            with contextlib.suppress(TimeoutError):
                self.take(self.socket.recv(1 << 17))

    def take(self, packet):
        if packet[12:14] != b"\x08\x00" or packet[23] != 6:  # Ethernet, IPv4, TCP
            return
        ip = packet[14:14 + struct.unpack(">H", packet[16:18])[0]]
        tcp = ip[(ip[0] & 15) * 4:]
        ports = struct.unpack(">HH", tcp[:4])
        payload = tcp[(tcp[12] >> 4) * 4:]
        if payload:
            self.streams[ports].setdefault(struct.unpack(">I", tcp[4:8])[0], payload)

    def stop(self):
        time.sleep(0.5)
        self.done = True
        self.join()
        stats = self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        fleet.check(struct.unpack("II", stats)[1] == 0, "the recorder lost packets")
        return {ports: self.whole(parts) for ports, parts in self.streams.items()}

    @staticmethod
    def whole(parts):
        """Payloads in order. The streams are short: sequence numbers wrap at most once."""
        order = sorted(parts)
        if order[-1] - order[0] > 1 << 31:
            order.sort(key=lambda n: (n + (1 << 31)) % (1 << 32))
        out, end = bytearray(), None
        for n in order:
            data = parts[n]
            if end is not None and n < end:  # sent again
                data = data[end - n:]
            out += data
            end = n + len(parts[n]) if end is None else max(end, n + len(parts[n]))
        return bytes(out)


def pieces(data, count, rng):
    """Some of the bytes, none of them so regular that others could have the same by chance."""
    found = []
    for _ in range(20 * count):
        at = rng.randrange(max(1, len(data) - PIECE))
        piece = data[at:at + PIECE]
        if len(piece) == PIECE and len(set(piece)) > 8:
            found.append(piece)
        if len(found) == count:
            break
    return found


def secrets_of(f, urls, texts):
    """(what it is, the bytes that must not be seen) of everything private in the run."""
    rng = random.Random(1)
    out = [("a node's name", n.encode()) for n in NAMES]
    out += [("a join URL's secret", u.rsplit("/", 1)[1][i:i + PIECE].encode())
            for u in urls for i in (0, 30)]
    for text in texts:
        out += [("private text", line.encode()) for line in text.splitlines() if len(line) >= PIECE]
    out += [("the model", p) for p in pieces((f.dir / "model.gguf").read_bytes(), 400, rng)]
    out += [("the model's metadata", b"attn_norm.weight"), ("the model's metadata", b"llama.block")]
    for path in (f.dir / "kept").iterdir():
        out += [("a delta", p) for p in pieces(path.read_bytes(), 60, rng)]
    for path in (f.home / "objects").iterdir():
        out += [("a layer", p) for p in pieces(path.read_bytes(), 60, rng)]
    out += [("a format's name", m) for m in (b"FLU1", b"FLL1\x02", b"FLL1\x03", b"fleetune-0")]
    with contextlib.closing(sqlite3.connect(f"file:{f.home}/state.db?mode=ro",
                                            uri=True)) as db:
        for sign, transport in db.execute("SELECT sign_key, transport_key FROM nodes"):
            out += [("a node's identity", sign), ("a node's transport key", transport)]
        out += [("the run's id", v) for v, in db.execute("SELECT value FROM facts WHERE key='run_id'")]
    return out


def say_marker():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(MARKER)
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
            return server.getsockname()[1]


def run_fleet(f, texts):
    f.init(f.tiny_model("--layers", 4), "--steps", 2, "--sequence", 32, "--eval-tokens", 64,
           "--exits", 2, "--retry", 50, "--rounds", 3, "--versions-kept", 100)
    keeper = judge.Keeper(f)
    keeper.start()
    f.start_coordinator()
    urls = [f.token("--auto-approve") for _ in NAMES]
    for name, url, text in zip(NAMES, urls, texts):
        fleet.check(f.join(name, url).returncode == 0, f"{name} joins")
        f.node(name, text).start()
    for process in f.nodes.values():
        fleet.check(process.wait(60) == 0, "a node ends well when the run is finished")
    fleet.check(f.coordinator.stop() == 0, "the coordinator ends well")
    keeper.stop()
    return urls


def test(f):
    recorder = Recorder()
    recorder.start()
    marker_port = say_marker()
    texts = [fleet.text_of(name, 6000) for name in NAMES]
    urls = run_fleet(f, texts)
    streams = recorder.stop()
    in_clear = [p for p, data in streams.items() if MARKER in data]
    fleet.check(len(in_clear) == 1 and marker_port in in_clear[0], "the marker was not recorded")
    wire = {p: data for p, data in streams.items() if p not in in_clear}
    total = sum(map(len, wire.values()))
    model = (f.dir / "model.gguf").stat().st_size
    fleet.check(total > 3 * model, f"only {total} bytes were recorded: not the whole run")
    secrets = secrets_of(f, urls, texts)
    for what, needle in secrets:
        for ports, data in wire.items():
            fleet.check(needle not in data, f"{what} in the clear, ports {ports}: {needle!r}")
    for ports, data in wire.items():
        ratio = len(zlib.compress(data, 9)) / len(data)
        fleet.check(len(data) < 100000 or ratio > 0.98,
                    f"ports {ports}: {len(data)} bytes compress to {ratio:.3f}: not encrypted?")
    print(f"{total} bytes of {len(wire)} streams searched for {len(secrets)} things: none is there")


if __name__ == "__main__":
    if not hasattr(socket, "AF_PACKET") or sys.platform != "linux":
        fleet.skip("packet sockets are Linux's")
    enter_namespace()
    fleet.main(test)
