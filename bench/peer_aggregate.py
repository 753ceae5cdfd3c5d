"""The weighted mean of 64 updates of 42 048 float32 values: Flower's, numpy's, and ours beside them.

usage: peer_aggregate.py BENCH_AGGREGATE [RUNS]

All run alone, one after the other, in one process each, on one thread. Flower's is the function that its
strategies call (flwr.server.strategy.aggregate.aggregate); numpy's is numpy.average with weights over
one stacked array, the fastest that plain numpy has. Ours is exact and is folded update by update.
"""
import subprocess
import sys
import time

import flwr
import numpy
from flwr.server.strategy.aggregate import aggregate

UPDATES, COUNT = 64, 41472 + 576


def best(run, runs):
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def show(name, seconds):
    print(f"{name}: {seconds * 1e3:.3f} ms, {4 * UPDATES * COUNT / seconds * 1e-9:.2f} GB/s")


def main():
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 11
    draw = numpy.random.default_rng(1)
    updates = [draw.uniform(-1, 1, COUNT).astype(numpy.float32) for _ in range(UPDATES)]
    weights = [1000 + k for k in range(UPDATES)]
    results = [([u], w) for u, w in zip(updates, weights)]
    stacked = numpy.stack(updates)
    show(f"flwr {flwr.__version__}", best(lambda: aggregate(results), runs))
    show(f"numpy {numpy.__version__} average",
         best(lambda: numpy.average(stacked, axis=0, weights=weights), runs))
    show(f"numpy {numpy.__version__} matmul in float32",
         best(lambda: numpy.asarray(weights, numpy.float32) @ stacked / sum(weights), runs))
    sys.stdout.flush()
    subprocess.run([sys.argv[1], "--only=nothing"], check=True)


main()
