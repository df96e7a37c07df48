"""What per-sample gradients cost: the founding session, other networks, and what else computes them.

    python -m tests.benchmarks.per_sample founding      # 506,530 parameters, 100,000 samples: 200 GB as dense float32
    python -m tests.benchmarks.per_sample networks      # LeNet, ResNet-20, a 6-layer transformer, a character LSTM
    python -m tests.benchmarks.per_sample others        # beside Opacus, BackPACK, vmap(grad) and sparse cells

Each prints Markdown. Contestants are interleaved and medians of ratios within a repeat are shown. `--warm GB` touches
memory before each measurement: on virtual machines the first touch of a page may cost ten times the copy into it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import nbdyn
from nbdyn import datasets
from nbdyn.errors import NbdynError
from tests import networks
from tests.benchmarks import gradients

# Problems --------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A network and its data.

    Attributes:
        make: a fresh model, seeded.
        data: (inputs, targets).
        batch: batch size.
        rate: learning rate of SGD with momentum 0.9.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], TensorDataset]
    batch: int
    rate: float = 0.01


def images() -> tuple[torch.Tensor, torch.Tensor, str]:
    """MNIST's 70,000 images (n, 1, 28, 28) in [0, 1] and labels; random ones of that shape where it is not at hand."""
    try:
        parts = [datasets.mnist(split) for split in ("train", "test")]
        x = torch.cat([torch.from_numpy(images)[:, None].float() / 255 for images, _ in parts])
        return x, torch.cat([torch.from_numpy(labels) for _, labels in parts]), "MNIST"
    except NbdynError:
        rng = torch.Generator().manual_seed(0)
        return (
            torch.rand(70_000, 1, 28, 28, generator=rng),
            torch.randint(10, (70_000,), generator=rng),
            "random images",
        )


def founding_data(samples: int = 100_000) -> TensorDataset:
    """MNIST's 70,000 images and, behind them, the first ones again, shifted by one pixel each way."""
    x, y, _ = images()
    rest = max(0, samples - len(x))
    shifted = torch.roll(x[:rest], (1, 1), dims=(2, 3))
    return TensorDataset(torch.cat([x, shifted]).flatten(1)[:samples], torch.cat([y, y[:rest]])[:samples])


def small_images(n: int, size: int, channels: int) -> TensorDataset:
    """MNIST enlarged to size x size."""
    x, y, _ = images()
    x = nn.functional.interpolate(x[:n], size=(size, size)).expand(-1, channels, -1, -1).contiguous()
    return TensorDataset(x, y[:n])


def text(n: int, length: int) -> TensorDataset:
    """Stretches of this very repository's documentation, as characters; targets are the characters that follow."""
    root = Path(__file__).parents[2]
    body = "".join(path.read_text(encoding="utf-8") for path in sorted(root.rglob("docs/*.md")))
    letters = {c: i % 65 for i, c in enumerate(sorted(set(body)))}
    codes = torch.tensor([letters[c] for c in body])
    starts = torch.randint(len(codes) - length - 1, (n,), generator=torch.Generator().manual_seed(0))
    places = starts[:, None] + torch.arange(length)
    return TensorDataset(codes[places], codes[places + 1])


FOUNDING = Problem(lambda: networks.mlp(784, 512, 200, 10), founding_data, 100, 0.05)
NETWORKS = {
    "MLP 784-512-200-10": Problem(lambda: networks.mlp(784, 512, 200, 10), lambda: founding_data(10_000), 100, 0.05),
    "LeNet": Problem(networks.LeNet, lambda: small_images(6_000, 28, 1), 100),
    "ResNet-20, 32 x 32": Problem(networks.ResNet, lambda: small_images(1_280, 32, 3), 128),
    "transformer, 6 layers": Problem(networks.Transformer, lambda: text(128, 128), 16),
    "char-LSTM": Problem(networks.CharLSTM, lambda: text(1_280, 64), 32, 0.1),
}


class Flat(nn.Module):
    """Cross-entropy over (B * T, C) outputs and (B, T) targets, or (B, C) and (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(outputs, targets.reshape(-1))


# One measurement, in a process of its own ------------------------------------------------------------------------


@dataclass
class Result:
    """Of one training: seconds of the loop and with close, bytes on disk, visits, MB of memory that it took at most."""

    loop: float
    whole: float
    n_bytes: int = 0
    visits: int = 0
    peak: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


def train(
    problem: Problem, data: TensorDataset, folder: Path | None, epochs: int, steps: int | None, **options: Any
) -> Result:
    """Train, recorded to a folder or plain."""
    torch.manual_seed(0)
    model, loss_fn = problem.make(), Flat()
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.rate, momentum=0.9)
    loader = batches_of(data, problem.batch)
    rec = None if folder is None else nbdyn.record(folder, model, optimizer, loss_fn, **options)
    memory = Memory()
    began, count, visits = time.perf_counter(), 0, 0
    for _ in range(epochs):
        for x, y in loader if rec is None else rec.watch(loader):
            loss = loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count, visits = count + 1, visits + len(x)
            if steps is not None and count >= steps:
                break
    looped = time.perf_counter()
    notes = {}
    if rec is not None:
        notes["journal"] = sum(f.stat().st_size for f in (folder / "journal").glob("*")) if folder else 0
        rec.close()
    whole = time.perf_counter()
    peak = memory.stop()
    n_bytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder else 0
    return Result(looped - began, whole - began, n_bytes, visits, peak, notes)


class Memory(threading.Thread):
    """Watches how much memory of its own the process has, 20 times a second: files that it maps are not counted."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._first = self._most = self._now()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> float:
        try:
            found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        except FileNotFoundError:  # not Linux
            found = None
        return int(found[1]) / 1000 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

    def stop(self) -> float:
        """How much more it has been than at first, in MB."""
        self._ended.set()
        self.join()
        return max(self._most, self._now()) - self._first


def batches_of(data: Dataset[Any], batch: int) -> DataLoader[Any]:
    """A shuffling loader that fetches a batch at once, as fast as loaders of tensors get."""
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data), batch, drop_last=True)
    return DataLoader(data, sampler=sampler, batch_size=None)


def warm(gigabytes: float) -> None:
    """Touch so much memory once, in a process that ends."""
    code = f"import numpy as np; np.empty({int(gigabytes * 1e9)}, 'u1')[::4096] = 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def measured(arguments: list[str]) -> Result:
    """One training in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.per_sample", "measure", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def measure(chosen: argparse.Namespace) -> None:
    """Train once and print the result as JSON."""
    nbdyn.options.quiet = not chosen.talk
    problem = FOUNDING if chosen.problem == "founding" else NETWORKS[chosen.problem]
    options = {} if chosen.contestant == "plain" else CONTESTANTS[chosen.contestant]
    with tempfile.TemporaryDirectory(prefix="nbdyn-benchmark-") as scratch:
        folder = None if chosen.contestant == "plain" else Path(scratch) / "run"
        data = problem.data()
        train(problem, data, None, 1, 20)  # warms torch and the data
        if folder is not None:
            train(problem, data, Path(scratch) / "warm", 1, 5, **options)
        if chosen.warm:
            warm(chosen.warm)
        print(json.dumps(vars(train(problem, data, folder, chosen.epochs, chosen.steps, **options))))


CONTESTANTS: dict[str, dict[str, Any]] = {
    "nbdyn, per sample": {"budget": "200 GB"},
    "nbdyn, per sample, cells=None": {"cells": None, "budget": "200 GB"},
    "nbdyn, per_sample=False": {"per_sample": False},
}


def compare(problem: str, names: list[str], chosen: argparse.Namespace) -> dict[str, list[Result]]:
    """All contestants, interleaved."""
    found: dict[str, list[Result]] = {"plain": []} | {name: [] for name in names}
    for _ in range(chosen.repeats):
        for name, results in found.items():
            extra = [
                "--epochs",
                str(chosen.epochs),
                "--warm",
                str(chosen.warm),
                *([] if chosen.steps is None else ["--steps", str(chosen.steps)]),
            ]
            results.append(measured(["--problem", problem, "--contestant", name, *extra]))
    return found


def table(found: dict[str, list[Result]], parameters: int) -> str:
    """A Markdown table; ratios are medians of the ratios within a repeat."""
    lines = [
        "| | loop, s | loop / plain | (loop + close) / plain | KB a visit | dense / disk | memory over plain, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = found["plain"]
    for name, results in found.items():
        loop = statistics.median(a.loop / b.loop for a, b in zip(results, plain, strict=True))
        whole = statistics.median(a.whole / b.whole for a, b in zip(results, plain, strict=True))
        extra = statistics.median(a.peak - b.peak for a, b in zip(results, plain, strict=True))
        r = results[0]
        disk = (
            f"{r.n_bytes / r.visits / 1000:.2f} | {4 * parameters * r.visits / r.n_bytes:.1f}" if r.n_bytes else "- | -"
        )
        seconds = statistics.median(x.loop for x in results)
        lines.append(f"| {name} | {seconds:.2f} | {loop:.2f} | {whole:.2f} | {disk} | {extra:.0f} |")
    return "\n".join(lines)


def founding(chosen: argparse.Namespace) -> None:
    """The founding session."""
    found = compare("founding", list(CONTESTANTS), chosen)
    print(table(found, parameters_of(FOUNDING)))


def networks_table(chosen: argparse.Namespace) -> None:
    """The other networks, one table each."""
    for name in chosen.problems:
        count = parameters_of(NETWORKS[name])
        print(
            f"\n### {name}: {count:,} parameters\n\n{table(compare(name, list(CONTESTANTS)[:1], chosen), count)}",
            flush=True,
        )


def others(chosen: argparse.Namespace) -> None:
    """Other ways to per-sample gradients, on the founding network: milliseconds and bytes a step."""
    lacking = gradients.missing()
    seconds: dict[str, list[float]] = {}
    n_bytes: dict[str, int] = {}
    steps = chosen.steps or 40
    data = FOUNDING.data()
    for repeat in range(chosen.repeats + 1):  # the first one warms up
        for name, (run, _) in gradients.OTHERS.items():
            if name in lacking:
                continue
            torch.manual_seed(0)
            batches = itertools.islice(batches_of(data, FOUNDING.batch), 3 if "sparse" in name else steps)
            count = 3 if "sparse" in name else steps
            elapsed, n_bytes[name] = run(FOUNDING.make(), batches, FOUNDING.rate)
            if repeat:
                seconds.setdefault(name, []).append(elapsed / count)
        with tempfile.TemporaryDirectory(prefix="nbdyn-benchmark-") as scratch:
            nbdyn.options.quiet = True
            result = train(FOUNDING, data, Path(scratch) / "run", 1, steps)
            if repeat:
                seconds.setdefault("nbdyn, loop", []).append(result.loop / steps)
                seconds.setdefault("nbdyn, loop + close", []).append(result.whole / steps)
            n_bytes |= dict.fromkeys(("nbdyn, loop", "nbdyn, loop + close"), result.n_bytes // steps)
    print("| | ms a step | / plain | MB a step | kept on disk |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["plain loop"], strict=True))
        kept = "yes" if "nbdyn" in name or "sparse" in name else "no"
        print(f"| {name} | {1000 * statistics.median(values):.1f} | {ratio:.2f} | {n_bytes[name] / 1e6:.2f} | {kept} |")
    for name, package in lacking.items():
        print(f"| {name} | {package} is not installed | | | |")


def parameters_of(problem: Problem) -> int:
    """How many parameters a problem's model has."""
    return sum(p.numel() for p in problem.make().parameters())


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("founding", "networks", "others", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--epochs", type=int, default=1)
        command.add_argument("--steps", type=int)
        command.add_argument("--warm", type=float, default=0.0, help="touch so many GB of memory first")
        command.add_argument("--problems", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
        command.add_argument("--problem", default="founding")
        command.add_argument("--contestant", default="plain")
        command.add_argument("--talk", action="store_true", help="print what the recorder says")
    chosen = parser.parse_args(arguments)
    if chosen.command != "measure":
        print(
            f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, Python {platform.python_version()}, "
            f"torch {torch.__version__}, nbdyn {nbdyn.__version__}; {chosen.repeats} interleaved repeats."
        )
    {"founding": founding, "networks": networks_table, "others": others, "measure": measure}[chosen.command](chosen)


if __name__ == "__main__":
    main()
