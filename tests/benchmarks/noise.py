"""Gradient noise of MLPs of several widths on MNIST, beside what has been claimed of it.

    python -m tests.benchmarks.noise run --widths 8 32 128 512    # trains, measures, keeps the tables
    python -m tests.benchmarks.noise report                       # prints them as Markdown, draws the panel
    python -m tests.benchmarks.noise kinds                        # what each kind of sample reads, on one run

Networks 784-w-w-10 with ReLU, SGD, learning rate 0.1, batch 100, on 60,000 images in standard units; noise at the
weights before steps 0, 100, 500 and 2000. Runs and tables stay in `--folder`, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nbdyn
from nbdyn.analysis.noise import measures

FIGURES = Path(__file__).parents[2] / "docs" / "images"
STEPS = (0, 100, 500, 2000)
BATCHES = (1, 10, 100, 600)
BATCH, DRAWS = 100, 39
MEAN, STD = 0.1307, 0.3081
MEASURES = ("index", "kurtosis", "normality", "scale")


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """60,000 images, (n, 784), in standard units, and labels."""
    images, labels = nbdyn.datasets.mnist("train")
    x = torch.tensor(np.asarray(images, np.float32).reshape(len(images), -1))
    return (x / x.max() - MEAN) / STD, torch.tensor(np.asarray(labels)).long()


def network(width: int) -> nn.Module:
    """784-w-w-10."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


def trained(folder: Path, width: int, samples: Any, per_sample: bool = False) -> nbdyn.Run:
    """A recorded run of 2,001 steps, of which step 2000 is the last; trained unless it was."""
    path, model, loss_fn = folder / f"w{width}{'-factors' * per_sample}", network(width), nn.CrossEntropyLoss()
    if not path.exists():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(*samples), BATCH, shuffle=True)
        with nbdyn.record(path, model, optimizer, loss_fn, per_sample=per_sample, snapshot_every=100) as rec:
            step = 0
            while step <= STEPS[-1]:
                for x, y in rec.watch(loader):
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    optimizer.step()
                    step += 1
                    if step > STEPS[-1]:
                        break
    return nbdyn.open(path, model, samples)


def run(folder: Path, widths: list[int], batches: int) -> None:
    """Train and measure each width; one JSON file a width and measure."""
    samples = data()
    for width in widths:
        tables = {name: folder / f"w{width}-{name}.json" for name in (*MEASURES, "surrogate")}
        if all(path.exists() for path in tables.values()):
            continue
        began = time.perf_counter()
        found = trained(folder, width, samples).noise(steps=STEPS, progress=False)
        gathered = time.perf_counter() - began
        for name in MEASURES:
            found.usual(name).to_json(tables[name], orient="table", index=False)
        surrogates = found.surrogate(batch=BATCH, batches=batches, draws=DRAWS)
        surrogates.to_json(tables["surrogate"], orient="table", index=False)
        for sentence in found.verdict(surrogates):
            print(sentence)
        if width == 128:
            found.plot().save(FIGURES / "noise-panel.svg")
        print(f"width {width}: gathered in {gathered:.0f} s, {time.perf_counter() - began:.0f} s in all", flush=True)


def read(folder: Path, name: str) -> Any:
    """A measure of all widths."""
    parts = []
    for path in sorted(folder.glob(f"w*-{name}.json"), key=lambda p: int(p.name[1:].partition("-")[0])):
        table: Any = pd.read_json(path, orient="table")
        parts.append(table.assign(width=int(path.name[1:].partition("-")[0])))
    return pd.concat(parts, ignore_index=True)


def report(folder: Path) -> None:
    """The tables of the docs: a row a width and step, a column a layer."""
    keys = ["width", "step"]
    index, normality, kurtosis, surrogates = (read(folder, n) for n in ("index", "normality", "kurtosis", "surrogate"))
    print("Stable index of means over 1 / 10 / 100 / 600 samples; share not normal at 0.01, 100 / 600\n")
    found: Any = index.sort_values("batch").groupby([*keys, "layer"])["median"].agg(_joined).unstack("layer")
    some: Any = normality[normality["batch"] > 10].sort_values("batch")
    shares = some.groupby([*keys, "layer"])["share"].agg(_joined).unstack("layer")
    show(found.add_prefix("index, ").join(shares.add_prefix("not normal, ")).reset_index())
    print("Means over 600: index with its 95 % interval\n")
    last: Any = index[index["batch"] == BATCHES[-1]]
    last = last.assign(alpha=[_interval(r) for r in last[["median", "low", "high"]].to_numpy()])
    show(last.pivot(index=keys, columns="layer", values="alpha").reset_index())
    print("Excess kurtosis of 600 / 60,000 samples; the power of n that it grows with\n")
    ends: Any = kurtosis[kurtosis["n"].isin([600, 60_000])].sort_values("n")
    ends = ends.groupby([*keys, "layer"])["median"].agg(lambda x: " / ".join(f"{v:.3g}" for v in x)).unstack("layer")
    slopes: Any = kurtosis.drop_duplicates([*keys, "layer"])
    slopes = slopes.assign(slope=[_interval(r) for r in slopes[["slope", "slope_low", "slope_high"]].to_numpy()])
    slopes = slopes.pivot(index=keys, columns="layer", values="slope")
    show(ends.add_prefix("kurtosis, ").join(slopes.add_prefix("slope, ")).reset_index())
    print("The gradient-noise paper's estimator, batches of 100, beside Gaussian noise of the same covariance\n")
    moments: Any = surrogates[surrogates["statistic"] == "block log-moments"]
    show(moments[[*keys, "layer", "n", "observed", "null_mean", "null_low", "null_high", "p"]])
    print("Noise scale of the network, in samples\n")
    scale: Any = read(folder, "scale")
    show(scale[scale["layer"] == "all"][[*keys, "scale", "low", "high", "of_these"]])
    control()


def _joined(values: Any) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def control(n: int = 60_000, coordinates: int = 50) -> None:
    """A stable law of index 1.5 and Student's t of three degrees of freedom through the same measures."""
    rng = np.random.default_rng(0)
    drawn = {
        "stable, 1.5": stats.levy_stable.rvs(1.5, 0, size=(n, coordinates), random_state=rng),
        "Student t, 3": rng.standard_t(3, (n, coordinates)),
        "Gaussian": rng.standard_normal((n, coordinates)),
    }
    rows = []
    for name, values in drawn.items():
        order = np.arange(n)
        row: dict[str, Any] = {"law": name}
        for size in BATCHES:
            found = measures.index(measures.in_batches(values, size, order), coordinates)
            row[f"index, {size}"] = f"{found.median:.2f}"
        for size in (600, 6_000, n):
            row[f"kurtosis, {size}"] = measures.kurtosis_at(values, size, coordinates)[0].median
        growth = measures.growth(values)
        rows.append(row | {"slope": f"{growth.slope:.2f} ({growth.low:.2f}..{growth.high:.2f})"})
    print(f"Control: the same measures of laws that are known, n = {n:,}\n")
    show(pd.DataFrame(rows))


def kinds(folder: Path, width: int) -> None:
    """What the index of the first weights reads, whatever is sampled."""
    samples = data()
    recorded = trained(folder, width, samples, per_sample=True)
    asked: dict[str, dict[str, Any]] = {
        "samples": {"steps": STEPS[-1]}, "batch": {"steps": STEPS[-1]},
        "mini-batches": {"steps": STEPS[-1], "batch": BATCH}, "steps": {"steps": (0, STEPS[-1])},
        "iterates": {"steps": (1000, STEPS[-1])}, "coordinates": {"steps": STEPS[-1]},
    }  # fmt: skip
    parts = []
    for name, options in asked.items():
        found = recorded.noise(sampled=name, progress=False, **options)
        index, normality = found.usual("index").query("batch == 1"), found.usual("normality").query("batch == 1")
        table: Any = index[["layer", "n", "median", "low", "high"]].assign(
            sampled=found.sampled, kurtosis=normality["kurtosis"].to_numpy(), not_normal=normality["share"].to_numpy()
        )
        parts.append(table)
    show(pd.concat(parts)[["sampled", "layer", "median", "low", "high", "kurtosis", "not_normal"]])


def _interval(ends: Any) -> str:
    value, low, high = ends
    return f"{value:.2f} ({low:.2f}..{high:.2f})"


def show(table: Any) -> None:
    """Print a table as Markdown."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    print("| " + " | ".join(map(str, table.columns)) + " |\n|" + "---|" * len(table.columns))
    for row in table.to_numpy().tolist():
        print("| " + " | ".join(map(text, row)) + " |")
    print()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report", "kinds", "control"))
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path("runs/noise"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    nbdyn.options.quiet = True
    match given.what:
        case "run":
            run(given.folder, given.widths, given.batches)
        case "report":
            report(given.folder)
        case "kinds":
            kinds(given.folder, given.widths[0])
        case "control":
            control()


if __name__ == "__main__":
    main()
