"""What recording costs, beside what people do today: training time, bytes a step, and two typical reads.

Run `python tests/benchmarks/recording.py` (options: --steps, --repeats, --models, --loader); it prints Markdown. All
contestants train the same network on the same data, one after the other in each repeat (interleaved, so that drift
hits all alike), and medians are shown. Reads come from a warm page cache for every contestant.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import nbdyn
from nbdyn import datasets
from nbdyn.errors import NbdynError

MODELS = {"784-100-50-10": (784, 100, 50, 10), "784-512-200-10": (784, 512, 200, 10)}
BATCH = 250


# Contestants -----------------------------------------------------------------------------------------------------


class Plain:
    """The ordinary loop: nothing is kept."""

    def start(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module, n: int) -> None:
        """Prepare to record n steps of this training under path."""
        self.path, self.model, self.n = path, model, n

    def batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The batches of one epoch."""
        return loader

    def stepped(self, step: int) -> None:
        """After optimizer.step(); weights are those of step + 1."""

    def close(self) -> None:
        """Wait until everything is on disk."""

    def trajectory(self, index: int) -> np.ndarray | None:
        """One parameter at every step; None where that is not kept."""
        return None

    def vector(self, step: int) -> np.ndarray | None:
        """All parameters before a step."""
        return None

    def row(self) -> np.ndarray:
        """The flat weights as they are now."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().numpy()


class Nbdyn(Plain):
    """nbdyn: weights every step or as snapshots, with losses, samples, norms and what a replay needs."""

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def start(self, path, model, optimizer, loss_fn, n) -> None:
        super().start(path, model, optimizer, loss_fn, n)
        self.recorder = nbdyn.record(str(path), model, optimizer, loss_fn, weights=self.weights, per_sample=False)

    def batches(self, loader):
        return self.recorder.watch(loader)

    def close(self) -> None:
        self.recorder.close()

    def trajectory(self, index):
        return nbdyn.open(str(self.path)).weights[index] if self.weights == "every" else None

    def vector(self, step):
        return nbdyn.open(str(self.path)).weights.row(step - step % 50 if self.weights == "snapshots" else step)


class TorchSave(Plain):
    """torch.save of the state_dict, one file a step."""

    def start(self, path, model, optimizer, loss_fn, n) -> None:
        super().start(path, model, optimizer, loss_fn, n)
        path.mkdir(parents=True)
        self.stepped(-1)

    def stepped(self, step: int) -> None:
        torch.save(self.model.state_dict(), self.path / f"{step + 1:06}.pt")

    def trajectory(self, index):
        return np.array([self.vector(t)[index] for t in range(self.n + 1)])

    def vector(self, step):
        state = torch.load(self.path / f"{step:06}.pt", weights_only=True)
        return torch.cat([tensor.reshape(-1) for tensor in state.values()]).numpy()


class Hdf5(Plain):
    """h5py: one gzip-compressed row of a (steps, parameters) data set a step."""

    def start(self, path, model, optimizer, loss_fn, n) -> None:
        import h5py

        super().start(path, model, optimizer, loss_fn, n)
        path.mkdir(parents=True)
        self.file = h5py.File(path / "weights.h5", "w")
        width = len(self.row())
        self.rows = self.file.create_dataset("w", (n + 1, width), "f4", chunks=(1, width), compression="gzip")
        self.stepped(-1)

    def stepped(self, step: int) -> None:
        self.rows[step + 1] = self.row()

    def close(self) -> None:
        self.file.close()

    def read(self, key: Any) -> np.ndarray:
        """A slice of the rows, from a file opened for it."""
        import h5py

        with h5py.File(self.path / "weights.h5", "r") as file:
            return file["w"][key]

    def trajectory(self, index):
        return self.read((slice(None), index))

    def vector(self, step):
        return self.read(step)


class Zarr(Plain):
    """zarr: one row of a (steps, parameters) array a step, its default compression."""

    def start(self, path, model, optimizer, loss_fn, n) -> None:
        import zarr

        super().start(path, model, optimizer, loss_fn, n)
        width = len(self.row())
        self.rows = zarr.create_array(store=str(path), shape=(n + 1, width), chunks=(1, width), dtype="f4")
        self.stepped(-1)

    def stepped(self, step: int) -> None:
        self.rows[step + 1] = self.row()

    def trajectory(self, index):
        import zarr

        return zarr.open_array(str(self.path), mode="r")[:, index]

    def vector(self, step):
        import zarr

        return zarr.open_array(str(self.path), mode="r")[step]


CONTESTANTS: dict[str, tuple[Callable[[], Plain], str | None]] = {
    "plain loop": (Plain, None),
    "nbdyn, snapshots every 50": (lambda: Nbdyn("snapshots"), None),
    "nbdyn, weights every step": (lambda: Nbdyn("every"), None),
    "torch.save every step": (TorchSave, None),
    "h5py rows, gzip": (Hdf5, "h5py"),
    "zarr rows": (Zarr, "zarr"),
}
"""How to make each contestant, and the package that it needs."""


# Measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of one contestant, one entry a repeat, and what it left on disk."""

    start: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)  # loop + close
    trajectory: list[float] = field(default_factory=list)
    vector: list[float] = field(default_factory=list)
    n_bytes: int = 0


def training_data() -> tuple[TensorDataset, str]:
    """MNIST where it is at hand, else noise of the same shape; and which of the two it is."""
    try:
        images, labels = datasets.mnist("train")
        name = "MNIST"
    except NbdynError:
        rng = np.random.default_rng(0)
        images, labels = rng.integers(0, 256, (60_000, 28, 28), dtype=np.uint8), rng.integers(0, 10, 60_000)
        name = "random images of MNIST's shape (MNIST itself is not at hand)"
    pixels = torch.from_numpy(images.reshape(len(images), -1)).float() / 255
    return TensorDataset(pixels, torch.from_numpy(labels)), name


def make_loader(data: TensorDataset, kind: str) -> DataLoader[Any]:
    """An ordinary shuffling DataLoader, or one that slices whole batches (less work beside which to record)."""
    generator = torch.Generator().manual_seed(1)
    if kind == "ordinary":
        return DataLoader(data, batch_size=BATCH, shuffle=True, generator=generator)
    return DataLoader(data, sampler=BatchSampler(RandomSampler(data, generator=generator), BATCH, False))


def batches_of(contestant: Plain, loader: DataLoader[Any], steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Exactly `steps` batches, over as many epochs as that takes."""
    done = 0
    while done < steps:
        for x, y in contestant.batches(loader):
            yield x.reshape(-1, 784), y.reshape(-1)
            done += 1
            if done == steps:
                return


def train(contestant: Plain, path: Path, sizes: tuple[int, ...], loader: DataLoader[Any], steps: int) -> Times:
    """Train once; its seconds."""
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model, loss_fn = nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    begin = time.perf_counter()
    contestant.start(path, model, optimizer, loss_fn, steps)
    started = time.perf_counter()
    for step, (x, y) in enumerate(batches_of(contestant, loader, steps)):
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        contestant.stepped(step)
    looped = time.perf_counter()
    contestant.close()
    closed = time.perf_counter()
    return Times(start=[started - begin], loop=[looped - started], whole=[closed - started])


def timed(read: Callable[[int], np.ndarray | None], argument: int) -> list[float]:
    """Seconds of one read, as a list; empty where the contestant does not keep what it asks for."""
    begin = time.perf_counter()
    answer = read(argument)
    seconds = time.perf_counter() - begin
    return [] if answer is None else [seconds]


def measure(name: str, folder: Path, sizes: tuple[int, ...], loader: DataLoader[Any], steps: int) -> Times:
    """Train one contestant in a fresh folder, read twice from it, and remove it."""
    contestant, path = CONTESTANTS[name][0](), folder / "run"
    times = train(contestant, path, sizes, loader, steps)
    times.trajectory = timed(contestant.trajectory, 12_345)
    times.vector = timed(contestant.vector, steps // 2)
    times.n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path, ignore_errors=True)
    return times


def compare(model: str, names: list[str], loader: DataLoader[Any], steps: int, repeats: int) -> dict[str, Times]:
    """All contestants, interleaved, after one unmeasured repeat of few steps that warms everything up."""
    totals = {name: Times() for name in names}
    with tempfile.TemporaryDirectory(prefix="nbdyn-benchmark-") as folder:
        for repeat in range(repeats + 1):
            for name in names:
                times = measure(name, Path(folder), MODELS[model], loader, steps if repeat else min(steps, 100))
                if repeat == 0:
                    continue
                total = totals[name]
                total.start += times.start
                total.loop += times.loop
                total.whole += times.whole
                total.trajectory += times.trajectory
                total.vector += times.vector
                total.n_bytes = times.n_bytes
    return totals


# Printing --------------------------------------------------------------------------------------------------------


def milliseconds(seconds: list[float]) -> str:
    """The median in milliseconds, or a dash."""
    return f"{1000 * statistics.median(seconds):,.1f}" if seconds else "-"


def table(totals: dict[str, Times], missing: dict[str, str], steps: int) -> str:
    """A Markdown table, one contestant a line; ratios are medians of the ratios within a repeat."""
    plain = totals["plain loop"]
    lines = [
        "| contestant | start, ms | loop, ms/step | loop / plain | (loop + close) / plain | KB/step "
        "| one weight's trajectory, ms | one step's vector, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, times in totals.items():
        loop = statistics.median(a / b for a, b in zip(times.loop, plain.loop, strict=True))
        whole = statistics.median(a / b for a, b in zip(times.whole, plain.whole, strict=True))
        lines.append(
            f"| {name} | {milliseconds(times.start)} | {1000 * statistics.median(times.loop) / steps:.2f} "
            f"| {loop:.2f} | {whole:.2f} | {times.n_bytes / steps / 1000:,.1f} | {milliseconds(times.trajectory)} "
            f"| {milliseconds(times.vector)} |"
        )
    lines += [f"| {name} | {package} is not installed | | | | | | |" for name, package in missing.items()]
    return "\n".join(lines)


def missing_packages() -> dict[str, str]:
    """The contestants that cannot run here, and the package that each lacks."""
    needs = {name: package for name, (_, package) in CONTESTANTS.items() if package}
    return {name: package for name, package in needs.items() if importlib.util.find_spec(package) is None}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=880, help="training steps of each run (880)")
    parser.add_argument("--repeats", type=int, default=5, help="times that each contestant trains (5)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--loader", choices=["ordinary", "batched"], default="ordinary")
    chosen = parser.parse_args(arguments)
    nbdyn.options.quiet = True
    data, data_name = training_data()
    missing = missing_packages()
    names = [name for name in CONTESTANTS if name not in missing]
    print(
        f"{data_name}; batch {BATCH}, {chosen.steps} steps, SGD with momentum 0.9, {chosen.loader} DataLoader; "
        f"medians of {chosen.repeats} interleaved repeats; {os.cpu_count()} cores, {torch.get_num_threads()} torch "
        f"threads, Python {platform.python_version()}, torch {torch.__version__}, nbdyn {nbdyn.__version__}."
    )
    for model in chosen.models:
        totals = compare(model, names, make_loader(data, chosen.loader), chosen.steps, chosen.repeats)
        print(f"\n### {model}\n\n{table(totals, missing, chosen.steps)}", flush=True)


if __name__ == "__main__":
    main()
