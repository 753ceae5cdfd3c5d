"""Goal: whatever call to its disk a node dies at, and whichever fails, it opens the same folder again
and goes on; what it was told is counted is counted, once; it trains on nothing that is not whole.

Method: a coordinator and three nodes on a tiny model. Each node is started again and again under
disk.c, which kills it at, or fails, the K-th call: while it opens its state, installs layers, spools,
drops what was acknowledged, writes its status. Afterwards each must work without a plan, and once
more after a bit of its model and of every layer was turned: all of them are fetched again. The run is
judged as in test_kill.py: the ledger against what the nodes logged, every layer bit for bit.

FLEETUNE_NODE_POINTS: how many points (90), spread over all there are.
"""
import collections
import hashlib
import os
import pathlib
import random
import re
import struct
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "e2e"))
import fleet  # noqa: E402
import judge  # noqa: E402

NAMES = ("ada", "bert", "cleo")
ACTIONS = ("kill", "torn", "full", "eio", "short")
OPS = 9
POINT_SECONDS = 3.0


class Node:
    """One node with its disk."""

    def __init__(self, f, name):
        self.name, self.process = name, f.node(name)
        self.count = f.dir / f"{name}.count"
        self.process.env.update({"LD_PRELOAD": str(f.bin / "libdisk_faults.so"),
                                 "FLEETUNE_DISK_ROOT": str(f.state(name)),
                                 "FLEETUNE_DISK_COUNT": str(self.count)})
        self.ended, self.failures = collections.Counter(), []

    def start(self, plan):
        self.count.write_bytes(bytes(8 * (OPS + 1)))
        self.process.env["FLEETUNE_DISK_PLAN"] = plan
        self.process.start()

    def calls(self):
        return struct.unpack(f"<{OPS + 1}Q", self.count.read_bytes())

    def acknowledged(self):
        return self.process.text().count("update.acknowledged")

    def fail(self, plan, text):
        self.failures.append(f"{plan}: {text}: {self.process.text()[-300:]}")

    def point(self, plan):
        """Starts under the plan; ends it when the plan has come to pass and it went on."""
        action, at = plan.split(":")
        before = self.acknowledged()
        self.start(plan)
        end = time.monotonic() + POINT_SECONDS
        while time.monotonic() < end and self.process.alive():
            if self.calls()[OPS] >= int(at) and (action == "full" or self.acknowledged() > before):
                time.sleep(0.05)
                break
            time.sleep(0.01)
        if self.process.alive():
            self.process.kill()
            return
        status = self.process.child.returncode
        self.ended[action] += 1
        if action in ("kill", "torn"):
            if status != -9:
                self.fail(plan, f"it ended with {status}")
        elif status != 1 or not re.search(r"fleetune-node: .*", self.process.text()[-400:]):
            self.fail(plan, f"it ended with {status} and without a reason")

    def works_again(self):
        before = self.acknowledged()
        self.start("kill:0")
        fleet.wait_for(f"{self.name} works again",
                       lambda: self.acknowledged() >= before + 2, 60)


def spread(calls, wanted):
    """Of all (action, K) as many as wanted, evenly."""
    points = [f"{a}:{k}" for a in ACTIONS for k in range(1, calls + 1)]
    step = max(1.0, len(points) / wanted)
    return [points[int(i * step)] for i in range(min(wanted, len(points)))]


def check_acknowledged(nodes, ledger):
    keys = collections.Counter((ledger.nodes[u["node"]], u["layer"], u["base"])
                               for u in ledger.updates)
    fleet.check(all(n == 1 for n in keys.values()), "an update is in the ledger twice")
    for name, node in nodes.items():
        for layer, base in re.findall(r"update\.acknowledged: layer (\d+) of version (\d+)",
                                      node.process.text()):
            fleet.check((name, int(layer), int(base)) in keys,
                        f"{name} was told that layer {layer} of version {base} counts: it is lost")


def turn_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def turned_bits(f, nodes):
    """A bit of the model or of a layer is found at the start, and what it is in comes again."""
    rng = random.Random(7)
    for name, node in nodes.items():
        fetched = node.process.text().count("model.fetched")
        layers = sorted(p for p in (f.state(name) / "layers").iterdir() if p.name.isdigit())
        for path in layers:
            turn_bit(path, rng)
        turn_bit(f.state(name) / "model.gguf", rng)
        node.start("kill:0")
        fleet.wait_for(f"{name} fetches its damaged model again",
                       lambda n=node, c=fetched: n.process.text().count("model.fetched") > c, 60)
        acknowledged = node.acknowledged()
        fleet.wait_for(f"{name} works with it",
                       lambda n=node, c=acknowledged: n.acknowledged() > c, 60)
        fleet.check(node.process.stop(60) == 0, f"{name} stops")
        for path in layers:
            whole = path.exists() and hashlib.blake2b(path.read_bytes(), digest_size=32).digest() \
                == path.with_suffix(".sum").read_bytes()
            fleet.check(not path.exists() or whole,
                        f"{name} goes on with a damaged layer {path.name}")


def test(f):
    wanted = int(os.environ.get("FLEETUNE_NODE_POINTS", "90"))
    f.init(f.tiny_model("--layers", 4), "--steps", 1, "--sequence", 16, "--eval-tokens", 32,
           "--exits", 2, "--rank", 2, "--windows", "even", "--retry", 50, "--deadline", 1,
           "--versions-kept", 1000)
    keeper = judge.Keeper(f)
    f.start_coordinator()
    url = f.token("--uses", len(NAMES), "--auto-approve")
    for name in NAMES:
        fleet.check(f.join(name, url).returncode == 0, f"{name} joins")
    nodes = {name: Node(f, name) for name in NAMES}
    keeper.start()
    first = nodes["ada"]
    first.start("kill:0")
    fleet.wait_for("a first round", lambda: first.acknowledged() >= 4, 60)
    first.process.kill()
    calls = first.calls()
    points = spread(calls[OPS], wanted)
    print(f"{calls[OPS]} calls from the start to the second task's end; {len(points)} points")

    def drive(index, node):
        for plan in points[index::len(NAMES)]:
            node.point(plan)

    threads = [threading.Thread(target=drive, args=(i, n)) for i, n in enumerate(nodes.values())]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for node in nodes.values():  # a process dies with the thread that started it: not in those
        node.works_again()
    for name, node in nodes.items():
        status = node.process.stop(60)
        fleet.check(status == 0, f"{name}, told to stop, ends with {status}")
    turned_bits(f, nodes)
    fleet.check(f.coordinator.stop() == 0, "a coordinator told to stop ends with status 0")
    keeper.stop()
    for name in NAMES:  # a whole file that never got its name was once sent again at every start
        left = [p.name for p in f.state(name).rglob("*") if re.search(r"\.[A-Za-z0-9]{6}$", p.name)]
        fleet.check(not left, f"{name} keeps what was cut off: {left}")
    ended = sum((n.ended for n in nodes.values()), collections.Counter())
    failures = [x for n in nodes.values() for x in n.failures]
    fleet.check(not failures, f"{len(failures)} points failed: {failures[:3]}")
    ledger = judge.Ledger(f.home)
    check_acknowledged(nodes, ledger)
    rounds = judge.check_rounds(ledger)
    judge.check_layers(f.home, ledger, f.dir / "kept")
    fleet.check(f.coordinator_json("verify")["whole"], "verify")
    print(f"ended by its plan: {dict(ended)}; {rounds} rounds, {len(ledger.updates)} updates in the "
          f"ledger, {len(ledger.history)} versions of layers recomputed")


if __name__ == "__main__":
    fleet.main(test)
