"""The five questions over arrays, in NumPy: for stores that hand out blocks of cells, weights and visits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.rivals.asked import Asked
from tests.benchmarks.rivals.training import Problem

BLOCK = 4096
"""Parameters of a chunk, and of a block that is worked on."""


def top_of_columns(values: Any, ids: np.ndarray, first: int, count: int) -> pd.DataFrame:
    """The largest values above 0 of each column.

    Args:
        values: (samples, width): an array or a tensor.
        ids: of the samples.
        first: parameter of the first column.
        count: at most so many of each.
    """
    import torch  # its topk is many times faster than numpy.partition

    found, rows = torch.as_tensor(values).topk(min(count, len(ids)), dim=0)
    found, rows = found.t().reshape(-1).numpy(), rows.t().reshape(-1).numpy()
    kept = found > 0
    parameters = np.repeat(np.arange(first, first + values.shape[1]), len(found) // values.shape[1])
    return pd.DataFrame({"parameter": parameters[kept], "sample": ids[rows[kept]], "value": found[kept]})


def by_sample(cells: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of |cells| over the visits of each sample, (samples, width).

    Args:
        cells: (visits, width), changed in place.
        order: of the visits by sample.
        starts: where each sample's begin in that order.
    """
    np.abs(cells, out=cells)
    return cells if len(starts) == len(order) else np.add.reduceat(cells[order], starts, axis=0)


def grouped(sums: np.ndarray, bins: int) -> np.ndarray:
    """The group of each value: 1..bins are equally wide in the logarithm, zeros are group 0."""
    moved = sums > 0
    ends = np.geomspace(sums[moved].min(), sums[moved].max(), bins + 1)
    groups = np.zeros(len(sums), np.int64)
    groups[moved] = np.clip(np.searchsorted(ends, sums[moved], side="right"), 1, bins)
    return groups


class Explosions:
    """Whether more than a share of the gradients explodes, step by step."""

    def __init__(self, problem: Problem, asked: Asked) -> None:
        self._layers = problem.layers
        self._asked = asked
        self._rms: deque[list[float]] = deque(maxlen=asked.window)

    def take(self, gradient: np.ndarray) -> bool:
        """Look at the batch gradient of the next step, (parameters,)."""
        asked, exploded = self._asked, 0
        known = len(self._rms) >= asked.known
        thresholds = asked.factor * np.median(self._rms, axis=0) if known else np.full(len(self._layers), np.inf)
        norms = []
        for layer, threshold in zip(self._layers, thresholds, strict=True):
            part = gradient[layer.first : layer.stop]
            norm = float(np.sqrt(np.mean(part * part, dtype=np.float64)))
            norms.append(norm if np.isfinite(norm) else np.inf)
            exploded += np.count_nonzero(~(np.abs(part) <= threshold))  # NaN is not <= anything
        self._rms.append(norms)
        return known and exploded / len(gradient) > asked.share


def samples_before(visits: pd.DataFrame, events: np.ndarray, count: int) -> pd.DataFrame:
    """The last visits of the steps before each event.

    Args:
        visits: step, position and sample in the order of training.
        events: their steps.
        count: at most so many.
    """
    parts = []
    for event in events:
        end = int(np.searchsorted(visits["step"].to_numpy(), event))
        part = visits.iloc[max(0, end - count) : end][["step", "position", "sample"]]
        parts.append(part.assign(event_step=event, before=np.arange(len(part), 0, -1)))
    frame = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return frame.reindex(columns=["event_step", "before", "step", "position", "sample"])


class Arrays:
    """Answers out of arrays; who derives from it reads its own files.

    Attributes:
        folders: of the two runs.
        problem: what was trained.
    """

    def __init__(self, folders: tuple[Path, Path], problem: Problem) -> None:
        self.folders = folders
        self.problem = problem

    def gradients(self) -> Iterator[np.ndarray]:
        """The batch gradient of every step, (parameters,)."""
        raise NotImplementedError

    def sums(self, start: int, stop: int, first: int, last: int) -> Iterator[tuple[int, np.ndarray, Any]]:
        """Sums of |g| of steps start..stop and parameters first..last, by sample.

        Yields:
            First parameter of a block, ids of the samples (n,), and the sums (n, width).
        """
        raise NotImplementedError

    def visits(self, run: int, columns: tuple[str, ...], steps: slice = slice(None)) -> pd.DataFrame:
        """Some columns of the visits of a run, in order, of all or of some steps."""
        raise NotImplementedError

    def weights(self, run: int, step: int) -> np.ndarray:
        """All weights before a step, (parameters,)."""
        raise NotImplementedError

    def trajectory(self, parameter: int) -> np.ndarray:
        """One weight before every step and at the end, (steps + 1,)."""
        raise NotImplementedError

    def order(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples of some steps: their ids, the order of the visits by sample, and where each sample begins."""
        samples = self.visits(0, ("sample",), slice(start, stop))["sample"].to_numpy()
        ids, starts = np.unique(np.sort(samples), return_index=True)
        order = np.argsort(samples, kind="stable")
        return (samples, order, starts) if len(ids) == len(samples) else (ids, order, starts)

    def q1(self, asked: Asked) -> pd.DataFrame:
        """Samples of largest sum of |g| per weight of the first layer."""
        layer, steps = self.problem.layers[0], asked.steps_of_epoch(self.problem)
        blocks = self.sums(*steps, layer.first, layer.bias)
        return pd.concat(
            [top_of_columns(sums, ids, first, asked.top) for first, ids, sums in blocks], ignore_index=True
        )

    def q2(self, asked: Asked) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Weights of largest sum of |grad|, and groups of all."""
        total = np.zeros(self.problem.parameters)
        for gradient in self.gradients():
            total += np.abs(gradient)
        best = np.argpartition(total, -asked.many(self.problem))[-asked.many(self.problem) :]
        best = best[np.argsort(-total[best])]
        groups = {"parameter": np.arange(len(total)), "value": total, "group": grouped(total, asked.bins)}
        return pd.DataFrame({"parameter": best, "value": total[best]}), pd.DataFrame(groups)

    def q3(self, asked: Asked) -> pd.DataFrame:
        """The two runs at a step."""
        tables = [self.visits(run, ("step", "loss", "correct")).groupby("step", sort=True).mean() for run in range(2)]
        lowest = min(table["loss"].min() for table in tables)
        rows = []
        for run, table in enumerate(tables):
            loss = table["loss"].to_numpy()
            moved = self.weights(run, asked.step).astype(np.float64) - self.weights(run, 0)
            rows.append(
                {
                    "run": "ab"[run],
                    "step": asked.step,
                    "progress": (loss[0] - loss[asked.step]) / (loss[0] - lowest),
                    "distance": float(np.linalg.norm(moved)),
                    "accuracy": float(table["correct"].iloc[asked.step]),
                }
            )
        return pd.DataFrame(rows)

    def q4(self, asked: Asked) -> pd.DataFrame:
        """Samples before explosions."""
        explosions = Explosions(self.problem, asked)
        alarms = np.array([explosions.take(gradient) for gradient in self.gradients()])
        events = np.flatnonzero(alarms & ~np.r_[False, alarms[:-1]])
        return samples_before(self.visits(0, ("step", "position", "sample")), events, asked.count)

    def q5(self, asked: Asked) -> pd.DataFrame:
        """Samples before a weight becomes 0."""
        near = np.abs(self.trajectory(asked.parameter).astype(np.float64)) <= asked.within
        event = np.flatnonzero(near & ~np.r_[False, near[:-1]])[:1]
        return samples_before(self.visits(0, ("step", "position", "sample")), event, asked.count)
