"""Judges a finished compose fleet by what the coordinator was told and what the engine knows.

docker_check.py finished < nodes.json    status 0 when all three nodes scored the last layers
docker_check.py fleet FOLDER PEAK        nodes.json, rounds.json, inspect.json; the small node's
                                         peak of memory as its cgroup counted it, 0 if unknown
"""
import json
import math
import sys

NODES, ROUNDS = 3, 3
MEMORY, HALF_A_CORE = 256 << 20, 500_000_000
GAIN_MIN = 0.02  # nats; three runs gave 0.12 to 0.20, and a fleet that does not learn gives 0
bad = []


def check(ok, what):
    if not ok:
        bad.append(what)


def is_finished(text):
    try:
        nodes = json.loads(text)["nodes"]
    except ValueError:
        return False  # the coordinator is not up yet
    return sum(n.get("report", {}).get("round", 0) > ROUNDS for n in nodes) == NODES


def check_nodes(nodes):
    check(len(nodes) == NODES, f"{len(nodes)} nodes, not {NODES}")
    print(f"{'node':>14} {'base nll':>9} {'voted nll':>9} {'gain':>7} {'RSS MB':>7} {'up kB':>7}"
          f" {'down MB':>8}")
    for n in nodes:
        r = n["report"]
        gain = r["nll_base"] - r["nll_voted"]
        print(f"{n['name']:>14} {r['nll_base']:9.4f} {r['nll_voted']:9.4f} {gain:7.4f}"
              f" {r['peak_rss_bytes'] / 1e6:7.1f} {n['bytes_up'] / 1e3:7.0f}"
              f" {n['bytes_down'] / 1e6:8.1f}")
        check(gain > GAIN_MIN, f"{n['name']}: held-out loss fell by {gain:.4f} only")


def check_rounds(rounds, nodes):
    done = sorted((r for r in rounds if not r["open"]), key=lambda r: r["round"])
    for r in done:
        print(f"round {r['round']}: {r['contributions']} nodes, {r['updates']} updates of"
              f" {r['layers']} layers, {r['bytes_up'] / 1e3:.0f} kB")
    check([r["round"] for r in done] == [1, 2, 3], "the closed rounds are not 1, 2, 3")
    check(all(r["contributions"] == NODES for r in done), "a round was closed without all nodes")
    tokens = sum(n["report"]["tokens"] for n in nodes)
    last = sum(n["report"]["nll_voted"] * n["report"]["tokens"] for n in nodes) / tokens
    losses = [r["loss"] for r in done] + [last]  # a round's loss is of the layers it began with
    print("the fleet's held-out loss, round by round:", " ".join(f"{x:.4f}" for x in losses))
    check(all(math.isfinite(x) for x in losses), "a loss is not finite")
    check(all(b < a for a, b in zip(losses, losses[1:])), "the loss did not fall in every round")


def check_container(c):
    name, host = c["Name"], c["HostConfig"]
    service = c["Config"]["Labels"]["com.docker.compose.service"]
    check(c["Config"]["User"] == "7878:7878", f"{name}: user {c['Config']['User']}")
    check(host["ReadonlyRootfs"], f"{name}: its root can be written")
    check(host["CapDrop"] == ["ALL"] and not host["CapAdd"], f"{name}: has capabilities")
    check("no-new-privileges:true" in host["SecurityOpt"], f"{name}: may gain privileges")
    check(not c["State"]["OOMKilled"], f"{name}: ran out of memory")
    check(c["RestartCount"] == 0, f"{name}: fell {c['RestartCount']} times")
    if service != "model":
        log = c["State"]["Health"]["Log"]
        check(any(h["ExitCode"] == 0 for h in log), f"{name}: was never healthy: {log[-1:]}")
    if service == "small":
        check(host["Memory"] == MEMORY and host["MemorySwap"] == MEMORY, "256 MB is not the limit")
        check(host["NanoCpus"] == HALF_A_CORE, "half a core is not the limit")
    return service


def check_fleet(folder, cgroup_peak):
    load = {}
    for name in ("nodes", "rounds", "inspect"):
        with open(f"{folder}/{name}.json", encoding="utf-8") as f:
            load[name] = json.load(f)
    nodes = load["nodes"]["nodes"]
    check_nodes(nodes)
    check_rounds(load["rounds"]["rounds"], nodes)
    services = sorted(check_container(c) for c in load["inspect"])
    check(services == ["coordinator", "model", "node", "node", "small"], f"containers: {services}")
    rss = max(n["report"]["peak_rss_bytes"] for n in nodes if n["name"] == "small")
    check(0 < rss < MEMORY, f"the small node's peak RSS is {rss}")
    print(f"the small node: peak RSS {rss / 1e6:.1f} MB; its cgroup's peak, page cache and all,"
          f" {cgroup_peak / 1e6:.1f} MB")


if __name__ == "__main__":
    if sys.argv[1] == "finished":
        sys.exit(0 if is_finished(sys.stdin.read()) else 1)
    check_fleet(sys.argv[2], int(sys.argv[3]))
    for b in bad:
        print("FAILED:", b)
    sys.exit(1 if bad else 0)
