"""How long questions take on the founding session: 506,530 parameters, 100,000 visits, 5e10 cells.

    python -m tests.benchmarks.answers [--run PATH] [--repeats 3] [--explain]

Records the session first, unless the path of one is given. Each statement is asked cold (a new process that has opened
the run, nothing of it in memory; the operating system may have its files) and then warm, the result frame included;
medians over repeats. numba's compiled code is on disk already: its first use on a machine takes some seconds once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn

STATEMENTS = {
    "one weight: its 20 samples": "top 20 samples of 0.weight[205,213] by sum |g|",
    "one weight: its classes": "top 3 classes per weight of 0.weight[205,213] by sum |g|",
    "one weight: what moved it": "top 20 samples of 4.weight[3,5] by net dw during steps 400..499",
    "one weight: towards zero": "last 50 samples before 4.weight[3,5] crosses 0",
    "one unit: its samples": "top 20 samples per unit of 0.weight[205,:] by sum |g|",
    "one step: its largest cells": "top 20 weights by max |g| at step 500",
    "one event: explosion": "last 50 samples before every share(|grad| > explode) > 10%",
    "weights that changed most": "top 1% weights by sum |grad| over all",
    "weights in 8 groups": "group weights by sum |grad| into 8 over all",
    "classes of every weight": "top 3 classes per weight of all by sum |g| during epoch 0",
    "20 samples of each of 401,920 weights": "top 20 samples per weight of 0.* by sum |g| during epoch 0",
}

_CHILD = """
import json, sys, time
import altair, numba, pandas, scipy, torch, nbdyn
import nbdyn.query.reduce.kernels
run = nbdyn.open(sys.argv[1])
times = []
for _ in range(int(sys.argv[3])):
    begin = time.perf_counter()
    frame = run.query(sys.argv[2])
    times.append(time.perf_counter() - begin)
print(json.dumps([times, len(frame)]))
"""


def record(path: Path) -> None:
    """Record the session: one epoch, batch 100, SGD with momentum, snapshots every 50 steps."""
    from tests.benchmarks.per_sample import FOUNDING

    torch.manual_seed(0)
    model, loss_fn = FOUNDING.make(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=FOUNDING.rate, momentum=0.9)
    with nbdyn.record(path, model, optimizer, loss_fn) as rec:
        for x, y in rec.watch(DataLoader(FOUNDING.data(), batch_size=FOUNDING.batch, shuffle=True)):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()


def ask(run: str, statement: str, times: int = 4) -> tuple[float, float, int]:
    """Seconds of the first answer of a new process, median of the later ones, rows."""
    command = [sys.executable, "-c", _CHILD, run, statement, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, rows = json.loads(done.stdout.splitlines()[-1])
    return seconds[0], statistics.median(seconds[1:]), rows


def main() -> None:
    """Record, ask, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of the founding session that is there already")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--explain", action="store_true", help="print each statement's plan, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.run or str(Path(folder) / "founding")
        if not options.run:
            begin = time.perf_counter()
            record(Path(path))
            print(f"recorded in {time.perf_counter() - begin:.1f} s")
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in STATEMENTS}
        for _ in range(options.repeats):
            for name, statement in STATEMENTS.items():
                found[name].append(ask(path, statement))
        print("| question | statement | rows | cold, s | warm, s |\n|---|---|---|---|---|")
        for name, results in found.items():
            cold, warm = (statistics.median(result[place] for result in results) for place in (0, 1))
            statement = STATEMENTS[name].replace("|", "\\|")
            print(f"| {name} | `{statement}` | {results[0][2]:,} | {cold:.2f} | {warm:.2f} |")
        if options.explain:
            run = nbdyn.open(path)
            for statement in STATEMENTS.values():
                print(f"\nexplain {statement}")
                print(run.query(f"explain {statement}").drop(columns="run").to_string(index=False))


if __name__ == "__main__":
    main()
