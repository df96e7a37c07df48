"""Does the ledger keep its promise? Simulated researchers who test nothing but true nulls, and how they peek.

`python -m tests.benchmarks.ledger` prints the family-wise error with its 95 % interval for each way to work, and the
time that the ledger itself takes. Nothing here is part of the tests.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.analysis.ledger.decide import one_group
from nbdyn.analysis.ledger.family import judge
from nbdyn.query.comparison import wilson
from nbdyn.settings import options
from tests import problems

LEVEL = 0.05


def p_values(researchers: int, nulls: int, runs: int, seed: int) -> np.ndarray:
    """One-sided t-tests of `runs` Gaussian values of mean 0, (researchers, nulls), as the ledger makes them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(researchers, nulls, runs))
    p = np.asarray(stats.ttest_1samp(values, 0.0, axis=-1, alternative="greater").pvalue)
    for place in np.ndindex(min(researchers, 25), nulls):  # the ledger's own code gives the same
        assert abs(one_group(values[place], 0.0, ">", "t", LEVEL).p - p[place]) < 1e-12
    return p


def all_declared_first(p: np.ndarray, rng: np.random.Generator) -> bool:
    """Declares all, tests all."""
    return bool(judge(p, LEVEL).supported.any())


def looks_after_each(p: np.ndarray, rng: np.random.Generator) -> bool:
    """Declares all, tests one after the other, looks at the table each time, and stops when something is supported."""
    seen = np.full(len(p), np.nan)
    for place in range(len(p)):
        seen[place] = p[place]
        if judge(seen, LEVEL).supported.any():
            return True
    return False


def levels_differ(p: np.ndarray, rng: np.random.Generator) -> bool:
    """Declares all, with levels from 0.1 % to 5 %."""
    return bool(judge(p, rng.choice([0.001, 0.01, 0.05], len(p))).supported.any())


def gives_up_some(p: np.ndarray, rng: np.random.Generator) -> bool:
    """Declares all, tests a half; the rest is given up in view of the outcomes. It still counts."""
    seen = np.where(np.arange(len(p)) < len(p) // 2, p, np.nan)
    return bool(judge(seen, LEVEL).supported.any())


def declares_until_found(p: np.ndarray, rng: np.random.Generator) -> bool:
    """Declares one, tests it on fresh runs, and goes on until one is supported. Not covered by the verdict."""
    return any(judge(p[: count + 1], LEVEL).supported[count] for count in range(len(p)))


def declares_until_found_anytime(p: np.ndarray, rng: np.random.Generator) -> bool:
    """The same, but reads p_anytime."""
    return bool((judge(p, LEVEL).anytime <= LEVEL).any())


def no_ledger(p: np.ndarray, rng: np.random.Generator) -> bool:
    """Takes each p at its word."""
    return bool((p <= LEVEL).any())


WAYS = (all_declared_first, looks_after_each, levels_differ, gives_up_some, declares_until_found,
        declares_until_found_anytime, no_ledger)  # fmt: skip


def simulate(researchers: int, nulls: int, runs: int, seed: int) -> None:
    """Print a Markdown table: the share of researchers with one false finding or more."""
    p = p_values(researchers, nulls, runs, seed)
    rng = np.random.default_rng(seed + 1)
    print(f"{researchers:,} researchers, {nulls} true nulls each, t over {runs} runs, level {LEVEL:g}\n")
    print("| way to work | family-wise error | 95 % interval | seconds |\n|---|---|---|---|")
    for way in WAYS:
        start = time.perf_counter()
        wrong = np.array([sum(way(row, rng) for row in p)])
        low, high = wilson(wrong, np.array([researchers]))
        spent = time.perf_counter() - start
        print(
            f"| {way.__name__} | {wrong[0] / researchers:.2%} | {low[0]:.2%} .. {high[0]:.2%} | {spent:.1f} |",
            flush=True,
        )


def record(path: Path, seed: int) -> None:
    """A small run."""
    model = problems.mlp(12, 5, 4, seed=seed)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.3), nn.CrossEntropyLoss()
    loader = DataLoader(problems.data(60), 20, shuffle=True, generator=torch.Generator().manual_seed(seed))
    with nbdyn.record(path, model, optimizer, loss_fn, per_sample=False) as rec:
        for x, y in rec.watch(loader):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()


def whole(researchers: int, nulls: int) -> None:
    """The same with ledgers on disk, each with its own runs: the measure is noise, so that every null is true."""
    rng, wrong, start = np.random.default_rng(7), 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(researchers):
            mine = Path(folder) / str(number)
            for run in range(4):
                record(mine / f"a-{run}", 100 * number + run)
            begun = time.perf_counter()
            ledger = nbdyn.ledger(mine)

            def noise(run: nbdyn.Run) -> float:
                return float(rng.normal())

            for one in range(nulls):
                ledger.declare(f"h{one}", "A true null.", noise, "> 0, t over runs", "a-*", LEVEL)
            for one in range(nulls):
                ledger.test(f"h{one}", measure=noise)
            table = ledger.frame()
            assert (table["kind"] == "confirmatory").all() and len(table) == nulls
            wrong += bool((table["verdict"] == "supported").any())
            start += time.perf_counter() - begun
    each = start / researchers / nulls
    print(f"\nledgers on disk: {wrong} of {researchers} with a false finding; {each:.3f} s a hypothesis on 4 runs")


def main() -> None:
    """Run the simulation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--researchers", type=int, default=20_000)
    parser.add_argument("--nulls", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ledgers", type=int, default=10, help="of them on disk, with real runs")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    options.quiet = True
    simulate(asked.researchers, asked.nulls, asked.runs, asked.seed)
    whole(asked.ledgers, asked.nulls)


if __name__ == "__main__":
    main()
