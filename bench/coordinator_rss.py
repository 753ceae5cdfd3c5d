"""Memory of the coordinator by the number of nodes that are connected and send updates.

  coordinator_rss.py FOLDER_OF_PROGRAMS [NODES ...]      (10 100 when none is given)

1000 take a minute or more, most of it for joining.

For each number a fresh coordinator gets as many real sessions (CURVE connections with keys of their
own, one process), each of which carries out ROUNDS tasks and sends a sealed update for every layer
of its window; then resident memory is read, and its peak. Fails when the peak is above 3 x the
trainable bytes + 64 MB, or when one more node costs more than PER_NODE_MAX.
"""
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/e2e"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/net"))
import fleet  # noqa: E402
import swarm  # noqa: E402

ROUNDS = 2
LAYERS, RANK = 4, 16
COUNT = RANK * (64 + 32 + 32 + 64 + 96 + 96 + 64)  # rows of q, k, v, o, gate, up, down
ALLOWED = 64e6
PER_NODE_MAX = 96 * 1024  # bytes; nearly all is libzmq's: two pipes of 16 to 32 kB, buffers of 8 kB


def measure(programs, nodes):
    f = fleet.Fleet(programs)
    failed = True
    try:
        f.init(f.tiny_model("--layers", LAYERS), "--exits", 2, "--rank", RANK, "--retry", 500,
               "--nodes-max", 1024, "--deadline", 600)
        f.start_coordinator()
        before = swarm.memory(f.coordinator)
        s = swarm.Swarm(f, nodes, COUNT, ROUNDS)
        s.start()
        started = time.monotonic()
        # Each task has a layer for each of its window's two; a full round needs every node.
        s.wait(20 + nodes, joined=nodes, sessions=nodes, acked=nodes * 2 * ROUNDS)
        seconds = time.monotonic() - started
        rss, peak = swarm.memory(f.coordinator)
        fleet.check(f.coordinator.stop() == 0, "the coordinator ends well")
        failed = False
        return {"nodes": nodes, "start": before[0], "rss": rss, "peak": peak, "seconds": seconds}
    finally:
        f.close(failed)


def main():
    rows = []
    for nodes in [int(a) for a in sys.argv[2:]] or [10, 100]:
        try:
            rows.append(measure(sys.argv[1], nodes))
        except fleet.Failure as e:
            print(f"FAILED: {e}", file=sys.stderr)
            sys.exit(1)
    trainable = 4 * LAYERS * COUNT
    print(f"{trainable} trainable bytes, {ROUNDS} tasks of each node\n"
          "| nodes | RSS at start, MB | RSS, MB | peak, MB | allowed, MB | bytes a node more | s |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    worst = 0
    for last, r in zip([None] + rows, rows):
        more = (r["peak"] - last["peak"]) / (r["nodes"] - last["nodes"]) if last else None
        worst = max(worst, more or 0)
        print(f"| {r['nodes']} | {r['start'] / 1e6:.1f} | {r['rss'] / 1e6:.1f} | "
              f"{r['peak'] / 1e6:.1f} | {(3 * trainable + ALLOWED) / 1e6:.1f} | "
              f"{'' if more is None else f'{more:.0f}'} | {r['seconds']:.1f} |")
    bad = [r for r in rows if r["peak"] > 3 * trainable + ALLOWED]
    if bad or worst > PER_NODE_MAX:
        print(f"FAILED: above the bound: {bad}, or a node costs {worst:.0f} bytes", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
