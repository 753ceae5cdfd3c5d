"""Goal: whatever is killed, and whenever, nothing that was acknowledged is lost or counted twice,
and every layer ever published is, bit for bit, the mean of exactly the updates in the ledger.

Method: a coordinator and three nodes train a tiny model. Again and again, thirty times, one of them gets SIGKILL, at
moments drawn from a seed: half of them anywhere, half just after a line of its log that says that
something is on its way to the disk. Meanwhile the coordinator's spool is hard-linked away, so that
the deltas stay readable after their round is closed. At the end the run is judged from what is on
the disk: the ledger against what the nodes saw acknowledged, and every version of every layer
against an exact recomputation (brute_force.py). FLEETUNE_KILLS says how many, for runs of hours.
"""
import collections
import os
import random
import re
import time

import fleet
import judge

KILLS = int(os.environ.get("FLEETUNE_KILLS", "30"))
NAMES = ("ada", "bert", "cleo")


def wait_for_line(process, pattern, seconds):
    """Until a new line of its log matches, or the time is up: then anywhere is as good."""
    seen, end = len(process.text()), time.monotonic() + seconds
    while time.monotonic() < end and not re.search(pattern, process.text()[seen:]):
        time.sleep(0.002)


def one_kill(f, rng, number):
    on_line = number % 2 == 0
    if number % 4 < 2:
        victim = f.coordinator
        if on_line:
            wait_for_line(victim, r"update\.accepted|round\.closed|task\.given", 1.0)
    else:
        victim = f.nodes[rng.choice(NAMES)]
        if on_line:
            wait_for_line(victim, r"task\.(started|done)|update\.acknowledged|session\.up", 1.0)
    time.sleep(rng.uniform(0, 0.03) if on_line else rng.uniform(0, 0.5))
    fleet.check(victim.alive(), f"{victim.args[1:3]} ended by itself before kill {number}")
    victim.kill()
    time.sleep(rng.uniform(0, 0.3))
    if victim is f.coordinator:
        f.start_coordinator()
    else:
        victim.start()


def run_and_kill(f, rng):
    for number in range(KILLS):
        one_kill(f, rng, number)
    before = f.coordinator.text().count("round.closed")
    fleet.wait_for("three more rounds after the last kill: the fleet still works",
                   lambda: f.coordinator.text().count("round.closed") >= before + 3, 150)
    for node in f.nodes.values():
        fleet.check(node.stop() == 0, "a node told to stop ends with status 0")
    fleet.check(f.coordinator.stop() == 0, "a coordinator told to stop ends with status 0")


def check_acknowledged(f, ledger):
    """What a node was told is in the ledger is in the ledger, once."""
    keys = collections.Counter((ledger.nodes[u["node"]], u["layer"], u["base"])
                               for u in ledger.updates)
    fleet.check(all(n == 1 for n in keys.values()), "an update is in the ledger twice")
    count = 0
    for name, process in f.nodes.items():
        told = re.findall(r"update\.acknowledged: layer (\d+) of version (\d+)", process.text())
        for layer, base in told:
            count += 1
            fleet.check((name, int(layer), int(base)) in keys,
                        f"{name} was told that layer {layer} of version {base} counts: it is lost")
    return count


def test(f):
    seed = int(os.environ.get("FLEETUNE_SEED", "20240615"))
    rng = random.Random(seed)
    print(f"seed {seed}")
    f.init(f.tiny_model("--layers", 4), "--steps", 3, "--sequence", 16, "--eval-tokens", 64,
           "--exits", 2, "--rank", 2, "--windows", "even", "--retry", 50, "--deadline", 2,
           "--versions-kept", 1000)
    keeper = judge.Keeper(f)
    f.start_coordinator()
    url = f.token("--uses", len(NAMES), "--auto-approve")
    for name in NAMES:
        fleet.check(f.join(name, url).returncode == 0, f"{name} joins")
        f.node(name).start()
    keeper.start()
    run_and_kill(f, rng)
    keeper.stop()
    ledger = judge.Ledger(f.home)
    acknowledged = check_acknowledged(f, ledger)
    rounds = judge.check_rounds(ledger)
    judge.check_layers(f.home, ledger, f.dir / "kept")
    verified = f.coordinator_json("verify")
    fleet.check(verified["whole"], f"verify: {verified}")
    print(f"{KILLS} kills, {rounds} rounds, {len(ledger.updates)} updates in the ledger, "
          f"{acknowledged} acknowledged, {len(ledger.history)} versions of layers recomputed")
    fleet.check(acknowledged > 0 and len(ledger.history) >= 6, "the run was too short to judge")


if __name__ == "__main__":
    fleet.main(test)
