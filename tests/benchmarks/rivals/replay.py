"""No gradients stored: weights of every step, and gradients computed again while asking, with vmap(grad)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.rivals.arrays import BLOCK, Arrays
from tests.benchmarks.rivals.dense import Rows
from tests.benchmarks.rivals.training import Problem, Step


class ReplayWriter:
    """Rows of weights in a raw file, and the visits."""

    needs_cells = False

    def create(self, folder: Path, problem: Problem) -> None:
        self._folder, self._rows, self._scales = folder, Rows(), []
        shape = (problem.steps + 1, problem.parameters)
        self._weights = np.lib.format.open_memmap(folder / "weights.npy", "w+", np.float32, shape)

    def write(self, step: Step) -> None:
        self._weights[step.number] = step.weights
        self._rows.visits.append(step.visits())
        self._scales.append(step.scale)

    def close(self, weights: np.ndarray) -> None:
        self._weights[-1] = weights
        self._weights.flush()
        columns = {str(name): column.to_numpy() for name, column in self._rows.table().items()}
        np.savez(self._folder / "visits.npz", **columns, scales=np.array(self._scales, np.float32))


class Replay(Arrays):
    """torch.func. The data set itself lies beside the runs, as it does for whoever trains again."""

    def __init__(self, folders: tuple[Path, Path], problem: Problem) -> None:
        import torch

        super().__init__(folders, problem)
        self._rows = [np.load(folder / "weights.npy", mmap_mode="r") for folder in folders]
        self._visits = [np.load(folder / "visits.npz") for folder in folders]
        self._data = [torch.from_numpy(np.load(folders[0].parents[1] / f"{name}.npy")) for name in ("inputs", "labels")]
        self._model = problem.model()
        self._names = [name for name, _ in self._model.named_parameters()]

    def _at(self, step: int, samples: np.ndarray, scale: float):
        """Parameters before a step, by name, and its batch."""
        import torch

        row, found, first = torch.from_numpy(np.array(self._rows[0][step])), {}, 0
        for name, p in self._model.named_parameters():
            found[name] = row[first : first + p.numel()].view_as(p)
            first += p.numel()
        return found, self._data[0][samples] * scale, self._data[1][samples]

    def _loss(self, parameters, x, y):
        from torch.func import functional_call
        from torch.nn.functional import cross_entropy

        return cross_entropy(functional_call(self._model, parameters, (x,)), y)

    def _batches(self, start: int, stop: int):
        size = self.problem.batch
        samples, scales = self._visits[0]["sample"], self._visits[0]["scales"]
        for step in range(start, stop):
            yield self._at(step, samples[step * size : (step + 1) * size], float(scales[step]))

    def gradients(self):
        import torch
        from torch.func import grad

        compute = grad(self._loss)
        for parameters, x, y in self._batches(0, self.problem.steps):
            found = compute(parameters, x, y)
            yield torch.cat([found[name].reshape(-1) for name in self._names]).numpy()

    def sums(self, start, stop, first, last):
        import torch
        from torch.func import grad, vmap

        def loss(weight, others, x, y):
            return self._loss({**others, "fc1.weight": weight}, x[None], y[None])

        each = vmap(grad(loss), in_dims=(None, None, 0, 0))
        ids, order, starts = self.order(start, stop)
        place = np.empty(len(order), np.int64)
        place[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(order)]))
        if len(starts) == len(order):
            place = np.arange(len(order))
        rows = torch.from_numpy(place).split(self.problem.batch)
        sums = torch.zeros(len(ids), last - first)
        for at, (parameters, x, y) in zip(rows, self._batches(start, stop), strict=True):
            weight = parameters.pop("fc1.weight")
            sums.index_add_(0, at, each(weight, parameters, x, y).flatten(1).abs_())
        for a in range(first, last, BLOCK):
            yield a, ids, sums[:, a - first : min(a + BLOCK, last) - first]

    def visits(self, run, columns, steps=slice(None)):
        size, table = self.problem.batch, self._visits[run]
        rows = slice(*(None if end is None else end * size for end in (steps.start, steps.stop)))
        return pd.DataFrame({name: table[name][rows] for name in columns})

    def weights(self, run, step):
        return self._rows[run][step]

    def trajectory(self, parameter):
        return self._rows[0][:, parameter]
