"""A fleet of real processes on this machine, for the end-to-end tests.

Every process is a child of the test and dies with it, whatever ends the test. All files live in one
folder that is removed when the test passes; FLEETUNE_KEEP=1 keeps it.
"""
import contextlib
import ctypes
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

SKIP = 77
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)

# Enough plain text for three nodes to differ: each takes another slice of these sentences.
_WORDS = ("the kettle hums while rain counts the slates and nobody hurries "
          "a ledger of small debts is kept under the third stair by the window "
          "measure twice then cut the board once and sweep before the lamp is lit "
          "seven hens two geese and a stubborn goat were sold at the autumn fair "
          "she wrote the recipe backwards so that only the patient could read it").split()


class Failure(Exception):
    pass


def check(condition, text):
    if not condition:
        raise Failure(text)


def skip(text):
    print(f"skipped: {text}")
    sys.exit(SKIP)


def free_port():
    """A port below those the system hands out, so that nobody's outgoing connection takes it."""
    rng = random.Random()
    for _ in range(200):
        port = rng.randrange(20000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise Failure("no free port")


def wait_for(what, condition, seconds=20.0, every=0.02):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise Failure(f"not within {seconds:.0f} s: {what}")


def text_of(seed, size):
    rng = random.Random(seed)
    out = []
    while sum(map(len, out)) < size:
        out.append(" ".join(rng.choice(_WORDS) for _ in range(rng.randrange(6, 14))) + ".\n")
        if rng.random() < 0.2:
            out.append("\n")
    return "".join(out)


def _die_with_parent():
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """One program that runs until it is told to stop; its log is a file."""

    def __init__(self, args, log, env=None):
        self.args = [str(a) for a in args]
        self.log = pathlib.Path(log)
        self.env = dict(os.environ, **(env or {}))
        self.child = None

    def start(self):
        with open(self.log, "ab") as out:
            self.child = subprocess.Popen(self.args, stdin=subprocess.DEVNULL, stdout=out,
                                          stderr=out, env=self.env, preexec_fn=_die_with_parent)

    def alive(self):
        return self.child is not None and self.child.poll() is None

    def kill(self):
        if self.alive():
            self.child.kill()
        if self.child is not None:
            self.child.wait()

    def stop(self, seconds=60):
        """SIGTERM; returns the exit status."""
        if self.alive():
            self.child.terminate()
        return self.wait(seconds)

    def wait(self, seconds):
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.args[0]} {self.args[1]} is still running") from None

    def text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Fleet:
    """One coordinator and its nodes, in a folder of its own."""

    def __init__(self, bin_dir, prefix=()):
        self.bin = pathlib.Path(bin_dir).resolve()
        self.node_bin = self.bin / "fleetune-node"
        self.coordinator_bin = self.bin / "fleetune-coordinator"
        self.prefix = list(prefix)  # put before every long-running program
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="fleetune-e2e-"))
        self.home = self.dir / "home"
        self.processes = []
        self.coordinator = None
        self.nodes = {}
        self.port = free_port()

    # ---- short commands

    def run(self, program, *args, env=None, timeout=60):
        done = subprocess.run([str(program), *map(str, args)], capture_output=True, timeout=timeout,
                              env=dict(os.environ, **(env or {})), check=False, cwd=self.dir,
                              stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
        done.out = done.stdout.decode(errors="replace")
        done.err = done.stderr.decode(errors="replace")
        return done

    def ok(self, program, *args, **kw):
        done = self.run(program, *args, **kw)
        check(done.returncode == 0,
              f"{pathlib.Path(program).name} {' '.join(map(str, args))}: status {done.returncode}: "
              f"{done.err.strip()}")
        return done

    def node_json(self, *args):
        return json.loads(self.ok(self.node_bin, *args, "--json").out)

    def coordinator_json(self, command, *args):
        return json.loads(self.ok(self.coordinator_bin, command, self.home, *args, "--json").out)

    # ---- parts of a fleet

    def tiny_model(self, *args, bits=4):
        """A compressed random model; the same arguments give the same bytes."""
        plain, packed = self.dir / "plain.gguf", self.dir / "model.gguf"
        self.ok(self.bin / "make_tiny_model", plain, *args)
        self.ok(self.node_bin, "compress", plain, "--out", packed, "--bits", bits,
                "--policy", "uniform", "--calibration-tokens", 256, "--threads", 1)
        return packed

    def init(self, model, *settings):
        if "--rule" not in settings: # what brute_force.py works out is the plain mean of all rounds
            settings = ("--rule", "mean", "--rollback", 0, *settings)
        self.ok(self.coordinator_bin, "init", self.home, "--model", model,
                "--listen", f"tcp://127.0.0.1:{self.port}",
                "--advertise", f"127.0.0.1:{self.port}", "--seed", 7, *settings)
        self.coordinator = Process([*self.prefix, self.coordinator_bin, "run", self.home],
                                   self.dir / "coordinator.log")
        self.processes.append(self.coordinator)

    def start_coordinator(self):
        before = self.coordinator.text().count("coordinator.started")
        self.coordinator.start()
        wait_for("the coordinator listens", lambda: self.coordinator.text().count(
            "coordinator.started") > before or not self.coordinator.alive(), 150)
        check(self.coordinator.alive(), f"no coordinator: {self.coordinator.text()[-400:]}")

    def token(self, *args):
        return self.coordinator_json("token", *args)["url"]

    def join(self, name, url, wait=20):
        return self.run(self.node_bin, "join", url, "--name", name, "--state", self.state(name),
                        "--wait", wait, "--json")

    def state(self, name):
        return self.dir / f"node-{name}"

    def node(self, name, text=None, *args):
        """Makes the agent's process, not started. text: what it learns from."""
        data = self.dir / f"{name}.txt"
        data.write_text(text if text is not None else text_of(name, 12000))
        process = Process([*self.prefix, self.node_bin, "run", "--state", self.state(name), "--data",
                           data, "--threads", 1, *args], self.dir / f"{name}.log")
        self.processes.append(process)
        self.nodes[name] = process
        return process

    def events(self, kind=None):
        import sqlite3  # here alone: the log of events as it is on the disk
        with contextlib.closing(sqlite3.connect(f"file:{self.home}/state.db?mode=ro", uri=True,
                                                timeout=10)) as db:
            rows = db.execute("SELECT kind, node, text FROM events ORDER BY id").fetchall()
        return [r for r in rows if kind is None or r[0] == kind]

    # ---- end

    def close(self, failed):
        for p in self.processes:
            p.kill()
        if failed:
            for p in self.processes:
                print(f"---- end of {p.log.name}\n{p.text()[-2500:]}", file=sys.stderr)
        if os.environ.get("FLEETUNE_KEEP"):
            print(f"kept: {self.dir}", file=sys.stderr)
        else:
            shutil.rmtree(self.dir, ignore_errors=True)


def main(test, prefix=()):
    """Runs test(fleet) with the folder of programs named on the command line."""
    fleet = Fleet(sys.argv[1], prefix)
    failed = True
    started = time.monotonic()
    try:
        test(fleet)
        failed = False
        print(f"passed in {time.monotonic() - started:.1f} s")
    except Failure as e:
        print(f"FAILED: {e}", file=sys.stderr)
    finally:
        fleet.close(failed)
    sys.exit(1 if failed else 0)
