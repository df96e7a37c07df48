"""Loss change allocation beside the paper's figures and procedure.

    python -m tests.benchmarks.lca fc          # MNIST-FC with three optimizers beside the paper's tables S1 and S2
    python -m tests.benchmarks.lca classes     # the same by class: synchronization, specialization, ...; pictures
    python -m tests.benchmarks.lca cost        # gradients and time beside the paper's procedure, and bare gradients
    python -m tests.benchmarks.lca resnet      # which layers hurt: seeds by treatments of the last layer

MNIST-FC is 784-100-50-10 on 55,000 images, batch 250, 880 steps. The ResNet trains on 5,000 images; `--jobs 2` uses
both cores. Runs and results stay in `--folder`, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nbdyn
from nbdyn.analysis.lca.helping import layers_over_runs
from nbdyn.analysis.lca.layerwise import delayed, frozen, param_groups
from nbdyn.analysis.lca.learning import NULLS
from nbdyn.analysis.lca.objective import Objective
from nbdyn.analysis.lca.samples import samples_of
from nbdyn.plots import to_png
from nbdyn.statistics.testing import holm, one_sample
from nbdyn.store.allocations import Archive

FIGURES = Path(__file__).parents[2] / "docs" / "images"
BATCH = 250
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "SGD, no momentum": lambda p: torch.optim.SGD(p, lr=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.002),
}
PAPER = {
    "SGD": (1.08e-3, -171.10, 2.94e-6, 0.00459, 13.57, 11.68),
    "SGD, no momentum": (-0.27, -4249.64, 6.11e-5, 0.114, 3.49, 3.48),
    "Adam": (3.64e-3, -75.31, 2.31e-6, 0.00199, 12.68, 12.71),
}
"""Tables S1 and S2: error in total of RK4 and first order (%), mean absolute error a step of both, steps per turn of
the weights and per crossing of the gradient."""


def he_normal(model: nn.Module) -> None:
    """Keras' he_normal: a Gaussian cut at two standard deviations, with variance 2 / fan-in; biases 0."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            std = (2 / layer.weight[0].numel()) ** 0.5 / 0.87962566
            nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std)
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]


def fc(seed: int) -> nn.Module:
    """784-100-50-10."""
    torch.manual_seed(seed)
    sizes = 784, 100, 50, 10
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    he_normal(model)
    return model


def mnist(split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Images in 0..1, (n, 784), and labels. For training the 55,000 that the paper's split leaves."""
    images, labels = nbdyn.datasets.mnist(split)
    x = torch.tensor(np.asarray(images, np.float32).reshape(len(images), -1))
    y = torch.tensor(np.asarray(labels)).long()
    if split == "train":
        chosen = np.random.RandomState(0).choice(60_000, 5_000, replace=False)  # as the paper's download script
        keep = torch.from_numpy(np.setdiff1d(np.arange(60_000), chosen))
        x, y = x[keep], y[keep]
    return x / x.max(), y


def trained(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, epochs: int) -> None:
    """Train and record weights of every step, unless that was done."""
    if path.exists():
        return
    loss_fn, loader = nn.CrossEntropyLoss(), DataLoader(TensorDataset(*data), BATCH, shuffle=True)
    with nbdyn.record(path, model, optimizer, loss_fn, weights="every", per_sample=False) as rec:
        for _ in range(epochs):
            for x, y in rec.watch(loader):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()


# The paper's tables -----------------------------------------------------------------------------------------------


def paper_tables(folder: Path, seeds: int) -> None:
    """MNIST-FC beside tables S1 and S2."""
    data, rows = mnist(), []
    for name, make in OPTIMIZERS.items():
        for seed in range(seeds if name == "SGD" else 1):
            path = folder / f"fc-{name}-{seed}".replace(", ", "-").replace(" ", "-")
            model = fc(seed)
            trained(path, model, make(model.parameters()), data, epochs=4)
            rows.append({"run": f"{name}, seed {seed}"} | table_row(path, model, data))
            print(pd.DataFrame(rows[-1:]).to_string(), flush=True)
        rows.append({"run": f"{name}, paper"} | dict(zip(list(rows[-1])[1:7], PAPER[name], strict=True)))
    show(pd.DataFrame(rows))


def table_row(path: Path, model: nn.Module, data: Any) -> dict[str, float]:
    """One run's errors, steps per event, and helping shares, by Simpson's rule."""
    run = nbdyn.open(path, model=model)
    simpson = run.lca(data, nn.CrossEntropyLoss(), name="simpson", precision=nbdyn.Precision("simpson"), cells=False)
    events = simpson.oscillations().query("parameters == 'all'").set_index("event")["steps_per_event"]
    helping = simpson.helping().query("layer == 'all'").set_index("measure")["mean"]
    check, steps = simpson.check().iloc[0], simpson.steps
    first = steps["loss_after"] - steps["loss"] - steps["first_order"]
    return {
        "RK4, total %": check["residual_percent"],
        "first order, total %": 100 * first.sum() / check["change"],
        "RK4, a step": check["mean_residual"],
        "first order, a step": first.abs().mean(),
        "steps per weight turn": events["weight turn"],
        "steps per gradient crossing": events["gradient crossing"],
        "helping %": helping["helping_percent"],
        "of non-zero %": helping["helping_of_nonzero_percent"],
        "layers that help": float((simpson.layers["lca"] < 0).mean()),
        "loss": check["loss"],
        "loss after": check["loss_after"],
    }


def classes(folder: Path) -> None:
    """Classes on MNIST-FC: synchronization against its nulls, specialization, correlation, concentration, pictures."""
    data, model = mnist(), fc(0)
    path = folder / "fc-SGD-0"
    trained(path, model, OPTIMIZERS["SGD"](model.parameters()), data, epochs=4)
    found = nbdyn.open(path, model=model).lca(data, nn.CrossEntropyLoss(), classes=True)
    print(found)
    for top in (20, 50):
        moments = found.moments(top=top)
        for null in NULLS:
            tests = [moments.synchronization(null, together=together) for together in (False, True)]
            show(pd.concat([test.frame().drop(columns="sentence") for test in tests]).assign(top=top, together=[0, 1]))
    for layer in found.layers_in_order:
        show(found.specialization(layer).tests.assign(layer=layer))
    for tensor in ("0.weight", "2.weight", "4.weight"):
        show(found.same_neuron(tensor).frame().assign(tensor=tensor))
    show(found.concentration())
    show(found.tail())
    show(found.tails())
    (FIGURES / "lca-tail.png").write_bytes(to_png(found.tail_fit(step=440).plot()))
    found.moments(top=20).plot().save(FIGURES / "lca-moments.svg")
    found.same_neuron("2.weight").plot().save(FIGURES / "lca-same-neuron.svg")
    found.specialization("2").plot().save(FIGURES / "lca-specialization.svg")
    (FIGURES / "lca-saliency.png").write_bytes(to_png(found.plot_saliency("0.weight", (28, 28))))
    found.plot().save(FIGURES / "lca-fc.svg")


# Cost -------------------------------------------------------------------------------------------------------------


def cost(folder: Path, steps: int) -> None:
    """Gradients that the tolerances take, beside Simpson's rule; and time beside the bare gradients."""
    data, model = mnist(), fc(0)
    path = folder / "fc-SGD-0"
    trained(path, model, OPTIMIZERS["SGD"](model.parameters()), data, epochs=4)
    run = nbdyn.open(path, model=model)
    overhead(run, model, data, steps)
    rows = []
    for name, precision in {"adaptive": nbdyn.Precision(), "simpson": nbdyn.Precision("simpson")}.items():
        found = run.lca(data, nn.CrossEntropyLoss(), name=name, cells=False, precision=precision, progress=False)
        check = found.check().iloc[0]
        rows.append({"rule": name, "gradients a step": check["gradients_per_step"],
                     "worst step": check["worst_residual"], "in total %": check["residual_percent"]})  # fmt: skip
    show(pd.DataFrame(rows))


def overhead(run: Any, model: nn.Module, data: Any, steps: int) -> None:
    """Everything, data and files included, with sums alone and with all cells, against the gradients alone, in turn."""
    samples, loss_fn = samples_of(data), nn.CrossEntropyLoss()
    weights = [run.weights.row(t) for t in range(steps)]
    for cells in (False, True):
        name, bare = f"timed-{cells}", Objective(model, loss_fn, samples, chunk=1024)
        began = time.perf_counter()
        found = run.lca(
            data, loss_fn, name=name, cells=cells, steps=(0, steps), replace=True, chunk=1024, progress=False
        )
        whole, count = time.perf_counter() - began, int(found.check()["gradients"].iloc[0])
        for n in range(count):
            bare(weights[n % steps])
        kilobytes = Archive(run.uri, name).nbytes() / steps / 1e3
        row = 4 * run.store.parameters / 1e3
        print(
            f"cells={cells}: {whole / bare.seconds:.3f} of {count} bare gradients ({bare.seconds / count:.3f} s each)"
        )
        print(f"{kilobytes:.1f} KB a step; a float32 row is {row:.1f} KB", flush=True)


# Layers that hurt -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch normalization, and a way past them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """Six blocks of 16, 32 and 64 channels on 7 x 7 positions, mean over positions, a linear layer (ResNet-14)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, 4, 1), nn.BatchNorm2d(16)
        shapes = (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.fc = nn.Linear(64, 10)
        he_normal(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.blocks(x).mean((2, 3)))


LR, MOMENTUM = 0.1, 0.9
TRAINED, ALLOCATED = 5_000, 2_500
"""Images that are trained on, and how many of these the allocated loss is taken over."""
TREATMENTS = ("plain", "frozen", *(f"delay-{d}" for d in range(9)), "matched-0", "matched-3")
"""Of the last layer; "plain" has a delay of 9. "matched": its lr keeps the effective step lr / (1 - momentum)."""


def groups_of(treatment: str, model: nn.Module) -> list[dict[str, Any]]:
    """The param groups of a treatment."""
    kind, _, delay = treatment.partition("-")
    if kind == "plain":
        return param_groups(model, {}, lr=LR, momentum=MOMENTUM)
    if kind == "frozen":
        return frozen(model, "fc.*", lr=LR, momentum=MOMENTUM)
    return delayed(model, "fc.*", float(delay), LR, MOMENTUM, matched=kind == "matched")


def resnet_run(folder: Path, treatment: str, seed: int, epochs: int) -> None:
    """Train one network, allocate its training loss, write what the figures need."""
    torch.set_num_threads(1)
    nbdyn.options.quiet = True
    x, y = mnist()
    data = x[:TRAINED].reshape(-1, 1, 28, 28), y[:TRAINED]
    torch.manual_seed(seed)
    model = ResNet()
    path = folder / f"resnet-{treatment}-{seed}"
    trained(path, model, torch.optim.SGD(groups_of(treatment, model), lr=LR), data, epochs)
    loss_fn, precision = nn.CrossEntropyLoss(), nbdyn.Precision(tolerance=2e-2, total=2e-3)
    part = data[0][:ALLOCATED], data[1][:ALLOCATED]
    run = nbdyn.open(path, model=model)
    found = run.lca(part, loss_fn, cells=False, precision=precision, progress=False)
    tx, ty = mnist("test")
    test = Objective(model, loss_fn, samples_of((tx[:5000].reshape(-1, 1, 28, 28), ty[:5000])))
    layers = dict(zip(found.layers["layer"], found.layers["lca"], strict=True))
    row = {
        "treatment": treatment, "seed": seed, "layers": layers,
        "check": found.check().iloc[0].to_dict(), "train": found.check()["loss_after"].iloc[0],
        "test": test(run.weights.row(len(run)), gradient=False).loss,
    }  # fmt: skip
    (folder / f"resnet-{treatment}-{seed}.json").write_text(json.dumps(row, default=float))


def resnet(folder: Path, seeds: int, epochs: int, jobs: int) -> None:
    """All treatments and seeds, in processes of one thread each; then the tables."""
    asked = [(t, s) for s in range(seeds) for t in TREATMENTS]
    missing = [(t, s) for t, s in asked if not (folder / f"resnet-{t}-{s}.json").exists()]
    command = [sys.executable, "-m", "tests.benchmarks.lca", "one", "--folder", str(folder), "--epochs", str(epochs)]

    def run(pair: tuple[str, int]) -> None:
        subprocess.run([*command, "--treatment", pair[0], "--seed", str(pair[1])], check=True)
        print(*pair, flush=True)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, missing))
    resnet_tables(folder)


def resnet_tables(folder: Path) -> None:
    """Layers of the plain runs with tests; treatments against plain runs of the same seeds; the figure."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("resnet-*.json"))]
    plain = [{"run": r["seed"], "layer": k, "lca": v} for r in rows if r["treatment"] == "plain"
             for k, v in r["layers"].items()]  # fmt: skip
    show(layers_over_runs(pd.DataFrame(plain)))
    table = pd.DataFrame([
        {"treatment": r["treatment"], "seed": r["seed"], "last": r["layers"]["fc"], "first": r["layers"]["conv"],
         "others": sum(v for k, v in r["layers"].items() if k != "fc"), "train": r["train"], "test": r["test"],
         "residual %": r["check"]["residual_percent"], "gradients": r["check"]["gradients_per_step"]}
        for r in rows
    ])  # fmt: skip
    means = table.drop(columns="seed").groupby("treatment").mean()
    show(means.reset_index().assign(seeds=table.groupby("treatment").size().to_numpy()))
    show(against_plain(table))
    figure(table).save(FIGURES / "lca-delays.svg")


def against_plain(table: pd.DataFrame) -> pd.DataFrame:
    """Treatment less plain, seed by seed: Student's t and Wilcoxon, Holm's correction over all of these tests."""
    wide, found = table.pivot(index="seed", columns="treatment"), []
    for treatment in sorted(set(table["treatment"]) - {"plain"}):
        for what in ("last", "train", "test"):
            difference = (wide[what][treatment] - wide[what]["plain"]).dropna()
            test = one_sample(difference)._asdict() | {"difference": difference.mean()}
            found.append({"treatment": treatment, "of": what} | test)
    frame = pd.DataFrame(found)[["treatment", "of", "n", "difference", "low", "high", "p", "p_wilcoxon"]]
    return frame.assign(p_holm=holm(frame["p"]))


def figure(table: pd.DataFrame) -> Any:
    """The last layer's allocation over the delay of its momentum: a dot a seed, a line through the means."""
    delays = table[table["treatment"].str.match("plain|delay")].copy()
    delays["delay"] = delays["treatment"].str.extract(r"(\d+)")[0].fillna("9").astype(int)
    base = alt.Chart(delays).encode(x=alt.X("delay:Q", title="delay of the last layer's momentum, steps"))
    dots = base.mark_point(opacity=0.6).encode(y=alt.Y("last:Q", title="allocation of the last layer, nats"))
    line = base.mark_line().encode(y="mean(last):Q")
    zero = alt.Chart(pd.DataFrame({"y": [0]})).mark_rule(strokeDash=[4, 3]).encode(y="y:Q")
    return (zero + line + dots).properties(width=440, height=240)


def show(frame: pd.DataFrame) -> None:
    """Print a frame as Markdown."""
    text = frame.map(lambda x: f"{x:.4g}" if isinstance(x, float) else str(x))
    print("| " + " | ".join(map(str, text.columns)) + " |\n|" + "---|" * len(text.columns))
    print(*("| " + " | ".join(row) + " |" for row in text.itertuples(index=False)), sep="\n", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fc", "classes", "cost", "resnet", "one"))
    parser.add_argument("--folder", type=Path, default=Path("runs/lca"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of `resnet`")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100, help="of `cost`, timed")
    parser.add_argument("--treatment", default="plain")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.what == "fc":
        paper_tables(asked.folder, min(asked.seeds, 3))
    elif asked.what == "classes":
        classes(asked.folder)
    elif asked.what == "cost":
        cost(asked.folder, asked.steps)
    elif asked.what == "one":
        resnet_run(asked.folder, asked.treatment, asked.seed, asked.epochs)
    else:
        resnet(asked.folder, asked.seeds, asked.epochs, asked.jobs)


if __name__ == "__main__":
    main()
