"""The five questions as numbers, the shapes of their answers, and whether two answers agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.rivals.training import Collector, Problem, Step, train


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        epoch: of question 1.
        top: samples per weight, of question 1.
        percent: of the weights, of question 2.
        bins: of question 2, equally wide in the logarithm from the smallest sum above 0 to the largest, which is in the
            last one.
        step: of question 3.
        share, factor, window, known: of question 4: alarm when more than `share` of |grad| exceed `factor` times the
            median of the layer's RMS gradient over the `window` steps before (at least `known`), or are NaN or Inf.
        parameter, weight, within: of question 5: the weight that becomes 0 within so much.
        count: samples before an event.
    """

    parameter: int
    weight: str
    step: int
    epoch: int = 1
    top: int = 20
    percent: float = 1.0
    bins: int = 8
    share: float = 0.1
    factor: float = 10.0
    window: int = 100
    known: int = 10
    within: float = 1e-3
    count: int = 50

    def steps_of_epoch(self, problem: Problem) -> tuple[int, int]:
        """First step and the one past the last."""
        return self.epoch * problem.steps_per_epoch, (self.epoch + 1) * problem.steps_per_epoch

    def many(self, problem: Problem) -> int:
        """How many weights `percent` are."""
        return math.ceil(problem.parameters * self.percent / 100)

    def statements(self) -> dict[int, tuple[str, ...]]:
        """The questions in nbdyn's language, of the runs "a" and "b"."""
        return {
            1: (f"top {self.top} samples per weight of fc1.weight by sum |g| during epoch {self.epoch}",),
            2: (
                f"top {self.percent:g}% weights by sum |grad| over all",
                f"group weights by sum |grad| into {self.bins} over all",
            ),
            3: (f"compare a, b by progress(loss), dist(w, init), acc at step {self.step}",),
            4: (f"last {self.count} samples before every share(|grad| > explode) > {100 * self.share:g}%",),
            5: (f"last {self.count} samples before {self.weight} becomes 0 within {self.within:g}",),
        }


QUESTIONS = {
    1: "top 20 samples of every weight of the first layer by sum of |g| during epoch 1",
    2: "top 1 % of the weights by sum of |grad|, and all weights in 8 groups",
    3: "two orderings of the data: progress, distance from the start and accuracy at a step",
    4: "last 50 samples before each step at which more than 10 % of the gradients explode",
    5: "last 50 samples before a weight becomes 0",
}
COLUMNS = {
    1: (("parameter", "sample", "value"),),
    2: (("parameter", "value"), ("parameter", "value", "group")),
    3: (("run", "step", "progress", "distance", "accuracy"),),
    4: (("event_step", "before", "step", "position", "sample"),),
    5: (("event_step", "before", "step", "position", "sample"),),
}
"""What the frames of each answer hold. Samples whose sum is 0 are no part of answer 1; group 0 of answer 2 are the
weights whose sum is 0, the others count from 1; its frame has all weights in order."""

Answer = tuple[pd.DataFrame, ...]


class _Weights:
    """Keeps the weights in memory."""

    needs_cells = False

    def create(self, folder: Path, problem: Problem) -> None: ...

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def write(self, step: Step) -> None:
        self.rows.append(step.weights.copy())

    def close(self, weights: np.ndarray) -> None:
        self.rows.append(weights)


def choose(problem: Problem, folder: Path) -> Asked:
    """The questions, with a weight of the first layer that comes to 0 as near as may be to the middle of the run."""
    kept = _Weights()
    train(problem, 0, Collector(kept), folder)
    first, bias = problem.layers[0][1:3]
    near = np.abs(np.stack(kept.rows)[:, first:bias]) <= Asked.within
    moments = np.where(near.any(axis=0) & ~near[0], near.argmax(axis=0), -problem.steps)
    parameter = int(np.abs(moments - problem.steps // 2).argmin())
    row, column = divmod(parameter, problem.widths[0])
    return Asked(first + parameter, f"fc1.weight[{row},{column}]", problem.steps * 3 // 4)


# Agreement -------------------------------------------------------------------------------------------------------

ROUNDING = 2e-5
"""Two sums agree when they differ by no more than this share of themselves ..."""
SOFTMAX = 1e-6
"""... or, for one sample, by this much times its largest input: softmax - target is at most 1, and rounded as such."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""What is smaller counts as 0: torch may or may not flush it."""


def _softmax_rounding(epoch: int, problem: Problem) -> np.ndarray:
    """What rounding of the softmax can do to a sample's gradient of the first layer during an epoch, (samples,)."""
    largest = np.ones(problem.samples)
    for step in problem.explosions:
        if step // problem.steps_per_epoch == epoch:
            largest[problem.batches(0)[epoch, step % problem.steps_per_epoch]] = 100.0
    return SOFTMAX * largest


def _ranked(ours: pd.DataFrame, theirs: pd.DataFrame, keys: list[str], full: int, rounding: np.ndarray | float) -> str:
    """How two rankings differ, "" where they agree: who is in one list only must tie with the last of a full one.

    Args:
        ours: keys and value.
        theirs: the same.
        keys: ("parameter", "sample") for a list a parameter, ("parameter",) for a single list.
        full: length of a full list.
        rounding: allowed difference, of all or by sample, besides that of ROUNDING.
    """
    frames = [frame[frame["value"] >= SMALLEST] for frame in (ours, theirs)]
    owners = [frame["parameter"].to_numpy() if len(keys) > 1 else np.zeros(len(frame), int) for frame in frames]
    lists = [frame["value"].groupby(owner).agg(["size", "min"]) for frame, owner in zip(frames, owners, strict=True)]
    both = frames[0].merge(frames[1], on=keys, how="outer", suffixes=("_a", "_b"))
    a, b = both["value_a"].to_numpy(), both["value_b"].to_numpy()
    owner = both["parameter"].to_numpy() if len(keys) > 1 else np.zeros(len(both), int)
    allowed = ROUNDING * np.fmax(a, b) + (rounding[both["sample"]] if isinstance(rounding, np.ndarray) else rounding)
    if not lists[0]["size"].equals(lists[1]["size"]):
        return "lists of different lengths"
    alone = np.isnan(a) | np.isnan(b)
    if (np.abs(a - b) > allowed)[~alone].any():
        return "different values"
    ends = lists[0].reindex(owner[alone])
    tied = np.abs(np.fmax(a, b)[alone] - ends["min"].to_numpy()) <= allowed[alone]
    return "" if (tied & (ends["size"].to_numpy() == full)).all() else "different members"


def check(question: int, ours: Answer, theirs: Answer, asked: Asked, problem: Problem) -> None:
    """Compare two answers.

    Raises:
        AssertionError: unless they agree to float32 rounding; members that tie with the last of a list may differ.
    """
    a, b, wrong = ours[0], theirs[0], ""
    if question == 1:
        wrong = _ranked(a, b, ["parameter", "sample"], asked.top, _softmax_rounding(asked.epoch, problem))
    elif question == 2:
        wrong = _ranked(a, b, ["parameter"], asked.many(problem), 0.0) or _grouped(ours[1], theirs[1], problem)
    elif question == 3:
        for column in ("progress", "distance", "accuracy"):
            if not np.allclose(a[column], b[column], rtol=ROUNDING, atol=1e-7):
                wrong = f"different {column}"
    elif len(a) == 0 or not np.array_equal(a.to_numpy(np.int64), b.to_numpy(np.int64)):
        wrong = "different samples, or none"
    if wrong:
        raise AssertionError(f"question {question}: {wrong}")


def _grouped(ours: pd.DataFrame, theirs: pd.DataFrame, problem: Problem) -> str:
    """How two groupings differ, "" where they agree: rounding may move one weight in 10,000 over an edge."""
    for frame in (ours, theirs):
        if not np.array_equal(frame["parameter"], np.arange(problem.parameters)):
            return "groups that are not all weights"
    if not np.allclose(ours["value"], theirs["value"], rtol=1e-3, atol=100 * SOFTMAX):
        return "different sums"
    moved = int((ours["group"].to_numpy() != theirs["group"].to_numpy()).sum())
    return "" if moved <= max(1, 1e-4 * problem.parameters) else f"{moved} weights in other groups"
