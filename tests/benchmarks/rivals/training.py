"""The training that everybody records for `questions.py`: a small MLP on images, with three forced explosions."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import torch
    from torch import nn

# torch is imported where it is used: those who answer from files do not need it.


class Layer(NamedTuple):
    """A linear layer's place among all parameters: its weight is first..bias, its bias bias..stop."""

    name: str
    first: int
    bias: int
    stop: int


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        data: "mnist" or "digits".
        samples: of the data set, the first ones; a multiple of `batch`.
        widths: of the MLP.
        explosions: steps whose inputs are multiplied by 100 (and the learning rate by 1e-4, so that training goes on).
    """

    data: str
    samples: int
    epochs: int
    batch: int
    widths: tuple[int, ...]
    explosions: tuple[int, ...]
    rate: float = 0.1

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.epochs * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return self.samples // self.batch

    @property
    def visits(self) -> int:
        """Samples that the steps saw, again and again."""
        return self.epochs * self.samples

    @property
    def layers(self) -> list[Layer]:
        """The layers in order."""
        layers, first = [], 0
        for number, (a, b) in enumerate(itertools.pairwise(self.widths), 1):
            layers.append(Layer(f"fc{number}", first, first + a * b, first + a * b + b))
            first = layers[-1].stop
        return layers

    @property
    def parameters(self) -> int:
        """How many there are."""
        return self.layers[-1].stop

    def model(self) -> nn.Sequential:
        """A fresh model, always the same."""
        import torch
        from torch import nn

        torch.manual_seed(0)
        modules: list[tuple[str, nn.Module]] = []
        for number, (a, b) in enumerate(itertools.pairwise(self.widths), 1):
            modules += [(f"fc{number}", nn.Linear(a, b)), (f"relu{number}", nn.ReLU())]
        return nn.Sequential(OrderedDict(modules[:-1]))

    def batches(self, seed: int) -> np.ndarray:
        """The ids of an ordering of the data, (epochs, steps, batch)."""
        rng = np.random.default_rng(seed)
        epochs = [rng.permutation(self.samples) for _ in range(self.epochs)]
        return np.stack(epochs).reshape(self.epochs, -1, self.batch)


SIZES = {
    "full": Problem("mnist", 4032, 2, 64, (784, 32, 16, 10), (40, 75, 110)),
    "small": Problem("digits", 160, 2, 8, (64, 12, 8, 10), (14, 22, 34)),
}
"""2.1e8 cells, and 3e5 for tests."""


def prepare(problem: Problem, folder: Path) -> None:
    """Put the data set into a folder, as every loop and everyone who trains again reads it: (n, pixels) and (n,)."""
    from nbdyn import datasets

    if problem.data == "mnist":
        images, labels = datasets.mnist("train")
        inputs = images[: problem.samples].reshape(problem.samples, -1).astype(np.float32) / 255
    else:
        inputs, labels = datasets.digits()
    np.save(folder / "inputs.npy", inputs[: problem.samples])
    np.save(folder / "labels.npy", labels[: problem.samples])


@dataclass
class Step:
    """One step as a rival gets it, before the weights change.

    Attributes:
        number: from 0.
        epoch: from 0.
        scale: what the inputs were multiplied by.
        samples, classes, losses, correct: (batch,) each.
        weights: (parameters,) float32.
        cells: gradient of each sample's own loss, (batch, parameters) float32; None where none are recorded.
    """

    number: int
    epoch: int
    scale: float
    samples: np.ndarray
    classes: np.ndarray
    losses: np.ndarray
    correct: np.ndarray
    weights: np.ndarray
    cells: np.ndarray | None

    def visits(self) -> pd.DataFrame:
        """One row a sample: step, position, epoch, sample, class, loss, correct."""
        size = len(self.samples)
        return pd.DataFrame(
            {
                "step": np.full(size, self.number, np.int32),
                "position": np.arange(size, dtype=np.int32),
                "epoch": np.full(size, self.epoch, np.int32),
                "sample": self.samples.astype(np.int32),
                "class": self.classes.astype(np.int32),
                "loss": self.losses,
                "correct": self.correct.astype(np.int8),
            }
        )


class Writer(Protocol):
    """Who stores steps in a folder that is there."""

    needs_cells: bool

    def create(self, folder: Path, problem: Problem) -> None:
        """Begin."""
        ...

    def write(self, step: Step) -> None:
        """Store one step."""
        ...

    def close(self, weights: np.ndarray) -> None:
        """Store the final weights and end."""
        ...


class Plain:
    """The ordinary loop: nothing is kept."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: nn.Module) -> None:
        """Before the first step."""

    def batches(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The batches of one epoch."""
        return loader

    def backward(self, number: int, epoch: int, scale: float, ids: np.ndarray, y: Any, logits: Any) -> None:
        """After loss.backward(), before optimizer.step()."""

    def close(self) -> None:
        """Wait until everything is on disk."""


class Collector(Plain):
    """Gets the gradient of every sample out of the one ordinary backward pass, and hands steps to a writer.

    For linear layers that is what Opacus does, and the cheapest way that there is: input x error at the output. The
    training stays bit for bit that of the plain loop.
    """

    def __init__(self, writer: Writer, cells: bool = True) -> None:
        self._writer = writer
        self._cells = cells and writer.needs_cells

    def begin(self, model, optimizer, loss_fn):
        import torch
        from torch import nn

        self._model, self._seen = model, []
        self._parameters = sum(p.numel() for p in model.parameters())
        self._cross_entropy, self._vector = nn.functional.cross_entropy, nn.utils.parameters_to_vector
        self._outer = torch.einsum
        if self._cells:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        place = len(self._seen)
        self._seen.append([inputs[0].detach(), None])

        def error(gradient: torch.Tensor) -> None:
            self._seen[place][1] = gradient

        output.register_hook(error)

    def _gradients(self) -> np.ndarray:
        """Own gradients of the batch's samples: their parts of the mean, times the batch size."""
        size = len(self._seen[0][0])
        cells, first = np.empty((size, self._parameters), np.float32), 0
        for a, d in self._seen:
            d = d * size
            for part in (self._outer("bi,bj->bij", d, a).flatten(1), d):
                cells[:, first : first + part.shape[1]] = part
                first += part.shape[1]
        self._seen.clear()
        return cells

    def backward(self, number, epoch, scale, ids, y, logits):
        outputs = logits.detach()
        self._writer.write(
            Step(
                number,
                epoch,
                scale,
                ids,
                y.numpy(),
                self._cross_entropy(outputs, y, reduction="none").numpy(),
                (outputs.argmax(1) == y).numpy(),
                self._vector(self._model.parameters()).detach().numpy(),
                self._gradients() if self._cells else None,
            )
        )

    def close(self):
        self._writer.close(self._vector(self._model.parameters()).detach().numpy())


def train(problem: Problem, seed: int, observer: Plain, folder: Path) -> float:
    """Train with an ordering of the data that lies in `folder`; seconds, with all that the observer does."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(*(torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("inputs", "labels")))
    model, loss_fn = problem.model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.rate)
    number = 0
    began = time.perf_counter()
    observer.begin(model, optimizer, loss_fn)
    for epoch, ids in enumerate(problem.batches(seed)):
        loader = DataLoader(data, sampler=ids.tolist(), batch_size=None)
        for chosen, (x, y) in zip(ids, observer.batches(loader), strict=True):
            scale = 100.0 if number in problem.explosions else 1.0
            optimizer.param_groups[0]["lr"] = problem.rate / scale**2
            logits = model(x * scale)
            loss = loss_fn(logits, y)
            optimizer.zero_grad()
            loss.backward()
            observer.backward(number, epoch, scale, chosen, y, logits)
            optimizer.step()
            number += 1
    observer.close()
    return time.perf_counter() - began
