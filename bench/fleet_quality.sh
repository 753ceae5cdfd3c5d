#!/usr/bin/env bash
# What a fleet learns, over several seeds: runs deploy/demo.sh once a seed and prints, for each node,
# the mean held-out losses and the 95 % interval of the gain (Student's t over the seeds).
#
#   bench/fleet_quality.sh [SEEDS] [arguments of deploy/demo.sh ...]      default: 3 seeds
set -euo pipefail
cd "$(dirname "$0")/.."
seeds="${1:-3}"
[ $# -gt 0 ] && shift
results="$(mktemp -d)"
trap 'rm -rf "$results"' EXIT
for seed in $(seq "$seeds"); do
    deploy/demo.sh --seed "$seed" --json "$results/$seed.json" "$@"
done
python3 - "$results" <<'PYTHON'
import json, math, pathlib, sys
runs = [json.loads(p.read_text())["nodes"] for p in sorted(pathlib.Path(sys.argv[1]).iterdir())]
t95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
mean = lambda xs: sum(xs) / len(xs)
print(f"| node | base | local only | fleet, voted | gain over base, 95 % interval of {len(runs)} seeds |")
print("| --- | --- | --- | --- | --- |")
for rows in zip(*runs):
    gains = [r["base"] - r["fleet"] for r in rows]
    sd = math.sqrt(sum((g - mean(gains)) ** 2 for g in gains) / max(len(gains) - 1, 1))
    half = t95.get(len(gains), float("nan")) * sd / math.sqrt(len(gains))
    print(f"| {rows[0]['node']} | {mean([r['base'] for r in rows]):.3f} | "
          f"{mean([r['local'] for r in rows]):.3f} | {mean([r['fleet'] for r in rows]):.3f} | "
          f"{mean(gains):.3f} ± {half:.3f} |")
others = [mean([q["base"] - q["fleet"] for q in run if q is not r]) for run in runs for r in run]
print(f"\nMean gain on the other nodes' domains, worst of all nodes and seeds: {min(others):.3f} nat.")
print(f"Bytes a node sent: {mean([r['bytes_up'] for run in runs for r in run]) / 1e6:.2f} MB; "
      f"received: {mean([r['bytes_down'] for run in runs for r in run]) / 1e6:.1f} MB; "
      f"peak memory: {max(r['peak_rss_bytes'] for run in runs for r in run) / 1e6:.0f} MB.")
PYTHON
