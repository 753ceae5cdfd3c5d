"""Judges a coordinator's folder after a run, from what is on the disk and nothing else."""
import collections
import contextlib
import os
import sqlite3
import threading
import time

import brute_force as bf
from fleet import check

STALENESS_MAX, CLIP, NORMS_MIN = 8, 4.0, 6  # the coordinator's defaults


class Keeper(threading.Thread):
    """Gives every file of the spool a second name before the coordinator sweeps the first."""

    def __init__(self, fleet):
        super().__init__(daemon=True)
        self.source, self.target, self.done = fleet.home / "spool", fleet.dir / "kept", False
        self.target.mkdir()

    def run(self):
        while not self.done:
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(self.source):
                    # A file that was swept and made again is another one of the same name.
                    with contextlib.suppress(FileExistsError, FileNotFoundError):
                        os.link(entry.path, self.target / f"{entry.name}.{entry.inode()}")
            time.sleep(0.004)

    def stop(self):
        self.done = True
        self.join()


class Ledger:
    def __init__(self, home):
        with contextlib.closing(sqlite3.connect(f"file:{home}/state.db?mode=ro", uri=True,
                                                timeout=10)) as db:
            db.row_factory = sqlite3.Row
            self.updates = db.execute("SELECT * FROM updates ORDER BY id").fetchall()
            self.history = db.execute(
                "SELECT * FROM layer_history ORDER BY layer, version").fetchall()
            self.rounds = {r["round"]: r for r in db.execute("SELECT * FROM rounds")}
            self.nodes = {r["id"]: r["name"] for r in db.execute("SELECT * FROM nodes")}
            self.layers = {r["layer"]: r for r in db.execute("SELECT * FROM layers")}

    def model(self):
        """What must not change when an update is refused."""
        return ([tuple(u) for u in self.updates], [tuple(h) for h in self.history],
                [tuple(r) for r in self.layers.values()])


def check_rounds(ledger):
    """Every update is in one round; the rounds' own numbers agree. Gives the rounds closed."""
    by_round = collections.Counter(u["round"] for u in ledger.updates)
    closed = {n: r for n, r in ledger.rounds.items() if r["closed_s"] != 0}
    for number, row in closed.items():
        check(row["updates"] == by_round[number],
              f"round {number} says {row['updates']} updates, the ledger {by_round[number]}")
    check(set(by_round) - {0} <= set(closed), "an update was folded in a round that is open")
    return len(closed)


def _check_weight(u, version, recent, real):
    """The ledger's weight, norm and clip are what the rules say."""
    tau = version - 1 - u["base"]
    check(0 <= tau <= STALENESS_MAX, f"update {u['id']} is {tau} versions late")
    check(u["weight"] == u["tokens"] * bf.staleness(tau), f"the weight of update {u['id']}")
    size = bf.norm(real)
    check(size == u["norm"], f"the norm of update {u['id']}: {size!r}, not {u['norm']!r}")
    check(u["clip"] == bf.clip_of(size, recent, CLIP, NORMS_MIN), f"the clip of update {u['id']}")
    recent.append(size)


def _read_update(spool, u):
    data = b""
    for path in spool.glob(f"{u['spool']}.*"):
        with open(path, "rb") as file:
            file.seek(u["place"])
            found = file.read(u["size"])
        if bf.digest(found) == u["digest"]:
            data = found
    check(data, f"the spooled bytes of update {u['id']} were never on the disk")
    layer, base, tokens, fixed, real = bf.read_delta(data)
    check((layer, base, tokens) == (u["layer"], u["base"], u["tokens"]),
          f"update {u['id']} is of another layer or version")
    return fixed, real


def check_layers(home, ledger, spool):
    """Every version ever published is, bit for bit, the mean of exactly its round's updates."""
    folded = collections.defaultdict(list)
    for u in ledger.updates:
        folded[u["layer"], u["round"]].append(u)
    theta, recent = {}, collections.defaultdict(list)
    for h in ledger.history:
        layer, version = h["layer"], h["version"]
        updates, terms = folded.pop((layer, h["round"]), []), []
        check(updates and len(updates) == h["updates"],
              f"layer {layer} version {version} says {h['updates']} updates, not {len(updates)}")
        for u in updates:
            fixed, real = _read_update(spool, u)
            _check_weight(u, version, recent[layer], real)
            terms.append((fixed, u["weight"], u["clip"]))
        old = theta.get(layer, [0.0] * len(terms[0][0]))
        theta[layer] = bf.next_layer(old, terms)
        must = bf.encode_layer(layer, version, theta[layer])
        check(bf.digest(must) == h["digest"],
              f"layer {layer} version {version} is not the mean of its {len(terms)} updates")
        check((home / "objects" / h["digest"].hex()).read_bytes() == must,
              f"the object of layer {layer} version {version}")
    left = [key for key in folded if key[1] != 0]
    check(not left, f"updates of (layer, round) that changed nothing: {left}")
    for layer, row in ledger.layers.items():
        versions = [h["version"] for h in ledger.history if h["layer"] == layer]
        check(versions == list(range(1, row["version"] + 1)), f"layer {layer}: {versions}")
