"""Goal: a cut network is noticed on both sides, nodes are back at once when it heals, a round counts
whoever can be reached, and a restart with hundreds of sessions is over soon. Method: the real
coordinator and real sessions in network namespaces: nft drops packets, tbf limits the rate. This
needs root; without, it is skipped. FL_TEST_LARGE=1 adds a cut of a minute.
"""
import os
import pathlib
import resource
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
import fleet  # noqa: E402
import swarm  # noqa: E402

COUNT = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
SLACK = 1.0 if os.environ.get("FL_TEST_STRICT") else 1.3  # for machines that do other things too
NOTICED_S, BACK_S, STORM_S, STORM_BYTES = 3.5, 2.0, 15.0, 256e6
LOSS_PERCENT = 5
HOME, NEAR, FAR = (f"fl{os.getpid()}{x}" for x in "hnf")


def sh(*args):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, check=False)
    fleet.check(done.returncode == 0, f"{' '.join(map(str, args))}: {done.stderr.strip()}")


def inside(namespace, *args):
    sh("ip", "netns", "exec", namespace, *args)


def report(what, value, bound, unit="s"):
    print(f"  {what}: {value:.2f} {unit} (at most {bound:g})", flush=True)
    fleet.check(value <= bound * SLACK, f"{what}: {value:.2f} {unit}, more than {bound:g}")


def lay_cables():
    """HOME has a cable to NEAR (10.77.0.0/24) and one to FAR (10.78.0.0/24)."""
    for ns in (HOME, NEAR, FAR):
        sh("ip", "netns", "add", ns)
        inside(ns, "ip", "link", "set", "lo", "up")
    for ns, net, end in ((NEAR, 77, "a"), (FAR, 78, "b")):
        sh("ip", "link", "add", f"{end}h", "netns", HOME, "type", "veth", "peer", "name", f"{end}n",
           "netns", ns)
        inside(HOME, "ip", "addr", "add", f"10.{net}.0.1/24", "dev", f"{end}h")
        inside(HOME, "ip", "link", "set", f"{end}h", "up")
        inside(ns, "ip", "addr", "add", f"10.{net}.0.2/24", "dev", f"{end}n")
        inside(ns, "ip", "link", "set", f"{end}n", "up")
        inside(HOME, "nft", f"add table inet {end}; "
               f"add chain inet {end} in {{ type filter hook input priority 0; }}; "
               f"add chain inet {end} out {{ type filter hook output priority 0; }}")
    inside(FAR, "ip", "route", "add", "10.77.0.0/24", "via", "10.78.0.1")


def drop(end, rule=""):
    """Packets of a cable are lost in both directions: all of them, or those that fit the rule."""
    inside(HOME, "nft", f'add rule inet {end} in iifname "{end}h" {rule} drop; '
           f'add rule inet {end} out oifname "{end}h" {rule} drop')


def heal(end):
    inside(HOME, "nft", f"flush table inet {end}")


def established(f):
    """Connections that the coordinator's side takes for alive."""
    rows = pathlib.Path(f"/proc/{f.coordinator.child.pid}/net/tcp").read_text().splitlines()[1:]
    words = [r.split() for r in rows]
    return sum(w[1].endswith(f":{f.port:04X}") and w[3] == "01" for w in words)


def timed(what, condition, seconds):
    start = time.monotonic()
    fleet.wait_for(what, condition, seconds, 0.01)
    return time.monotonic() - start


def begin(programs, *settings):
    f = fleet.Fleet(programs)
    f.ok(f.coordinator_bin, "init", f.home, "--model", f.tiny_model("--layers", 4), "--listen",
         f"tcp://0.0.0.0:{f.port}", "--advertise", f"10.77.0.1:{f.port}", "--seed", 7, "--exits", 2,
         "--rank", 2, "--retry", 500, "--nodes-max", 600, *settings)
    f.coordinator = fleet.Process(["ip", "netns", "exec", HOME, f.coordinator_bin, "run", f.home],
                                  f.dir / "coordinator.log")
    f.processes.append(f.coordinator)
    f.start_coordinator()
    return f


def nodes_in(f, namespace, nodes, rounds, name):
    s = swarm.Swarm(f, nodes, COUNT, rounds, name, prefix=("ip", "netns", "exec", namespace))
    s.start()
    s.wait(20 + nodes / 5, sessions=nodes)
    return s


def check_cuts(programs):
    f, failed = begin(programs, "--deadline", 600), True
    try:
        s = nodes_in(f, NEAR, 5, 1, "cut")
        s.wait(20, acked=10)
        for length in (5, 12) + ((60,) if os.environ.get("FL_TEST_LARGE") else ()):
            print(f"a cut of {length} s")
            start = time.monotonic()
            drop("a")
            home = timed("the coordinator notices", lambda: established(f) == 0, 10)
            fleet.wait_for("the nodes notice", lambda: s.now["up"] == 0, 10, 0.01)
            report("noticed by the coordinator after", home, NOTICED_S)
            report("noticed by all nodes after", s.history[-1][0] - start, NOTICED_S)
            time.sleep(max(0, length - (time.monotonic() - start)))
            start = time.monotonic()
            heal("a")
            fleet.wait_for("all are back", lambda: s.now["sessions"] == 5, 10, 0.01)
            report("all sessions are back after", s.history[-1][0] - start, BACK_S)
        failed = False
    finally:
        heal("a")
        f.close(failed)


def check_rounds(programs):
    """A third of the nodes is cut off, the others' cable loses packets and is slow."""
    f, failed = begin(programs, "--deadline", 5, "--updates-per-round", 20), True
    try:
        near, far = nodes_in(f, NEAR, 14, 1000, "near"), nodes_in(f, FAR, 6, 1000, "far")
        far.wait(20, acked=12)
        drop("a", f"numgen random mod 100 < {LOSS_PERCENT}")
        for ns, dev in ((HOME, "ah"), (NEAR, "an")):
            inside(ns, "tc", "qdisc", "add", "dev", dev, "root", "tbf", "rate", "5mbit", "burst",
                   "32kb", "latency", "200ms")
        drop("b")
        fleet.wait_for("the cut is noticed", lambda: far.now["up"] == 0, 10)
        since = len(f.events("round.closed"))
        fleet.wait_for("three more rounds", lambda: len(f.events("round.closed")) >= since + 4, 40)
        counts = [int(t.split(" nodes")[0].split()[-1]) for _, _, t in
                  f.events("round.closed")[since + 1:]]
        print(f"14 nodes behind {LOSS_PERCENT} % loss and 5 Mbit/s, 6 cut off: rounds of {counts}")
        fleet.check(min(counts) >= 0.95 * 14, f"rounds counted {counts} of 14 reachable nodes")
        failed = False
    finally:
        heal("a")
        heal("b")
        for ns, dev in ((HOME, "ah"), (NEAR, "an")):
            subprocess.run(["ip", "netns", "exec", ns, "tc", "qdisc", "del", "dev", dev, "root"],
                           capture_output=True, check=False)
        f.close(failed)


def check_storm(programs, nodes=500):
    f, failed = begin(programs, "--deadline", 600), True
    try:
        s = nodes_in(f, NEAR, nodes, 1, "storm")
        s.wait(60, acked=2 * nodes)
        f.coordinator.kill()
        fleet.wait_for("all notice", lambda: s.now["up"] == 0, 10, 0.01)
        time.sleep(2)  # into the back-off
        start = time.monotonic()
        f.start_coordinator()
        fleet.wait_for("all are back", lambda: s.now["sessions"] == nodes, 30, 0.01)
        print(f"the coordinator restarts with {nodes} nodes")
        report("all sessions are back after", s.history[-1][0] - start, STORM_S)
        report("peak memory", swarm.memory(f.coordinator)[1] / 1e6, STORM_BYTES / 1e6, "MB")
        fleet.check(f.coordinator.stop() == 0, "the coordinator ends well")
        fleet.check(f.coordinator_json("verify")["whole"], "verify")
        failed = False
    finally:
        f.close(failed)


def main():
    if os.geteuid() != 0:
        fleet.skip("network namespaces need root")
    for tool in (("ip", "netns", "list"), ("nft", "--version"), ("tc", "-V")):
        try:
            subprocess.run(tool, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            fleet.skip(f"{tool[0]} is not here, or may not do this")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode != 0:
        fleet.skip("no network namespaces here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    status = 0
    try:
        lay_cables()
        for check in (check_cuts, check_rounds, check_storm):
            check(sys.argv[1])
    except fleet.Failure as e:
        print(f"FAILED: {e}", file=sys.stderr)
        status = 1
    finally:
        for ns in (HOME, NEAR, FAR):
            subprocess.run(["ip", "netns", "del", ns], capture_output=True, check=False)
    sys.exit(status)


if __name__ == "__main__":
    main()
