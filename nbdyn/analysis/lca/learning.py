"""Moments of learning of a network's layers, and whether the layers share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.analysis.lca.moments import moments, peaks
from nbdyn.errors import UnknownName, did_you_mean
from nbdyn.statistics.arrangements import Synchronization
from nbdyn.statistics.synchronization import circular_shift_test, phase_test, shift_test

NULLS = ("small shifts", "circular shifts", "random phases")


@dataclass(frozen=True)
class Moments:
    """The steps at which layers learned most: strict local minima of their allocation, below 0, the largest `top`.

    Or, as controls, the steps at which the norm of their gradient or motion was largest: strict local maxima.

    Attributes:
        series: by step, (classes or 1, layers, steps): the allocation, in units of the loss, or a norm.
        layers: names.
        classes: names; empty for the whole loss.
        steps: (steps,) of the run.
        top: moments of each series at most.
        of: "lca", "gradient" or "motion".
    """

    series: np.ndarray
    layers: list[str]
    classes: list[int]
    steps: np.ndarray
    top: int
    of: str = "lca"

    def _find(self, series: np.ndarray) -> np.ndarray:
        return moments(series, self.top) if self.of == "lca" else peaks(series, self.top)

    @property
    def marks(self) -> np.ndarray:
        """(classes or 1, layers, steps) bool."""
        return self._find(self.series)

    def frame(self) -> pd.DataFrame:
        """One row a moment: step, layer, class (where there are classes), the value of that step, shared.

        "shared" is the number of layers that have a moment at this step (in this class).
        """
        marks = self.marks
        group, layer, step = np.nonzero(marks)
        table = {
            "step": self.steps[step], "layer": np.asarray(self.layers, object)[layer],
            self.of: self.series[group, layer, step], "shared": marks.sum(1)[group, step],
        }  # fmt: skip
        if self.classes:
            table = {"class": np.asarray(self.classes)[group], **table}
        return pd.DataFrame(table)

    def synchronization(
        self,
        null: str = "small shifts",
        least: int | None = None,
        draws: int = 10_000,
        seed: int = 0,
        together: bool = False,
    ) -> Synchronization:
        """How many steps are moments of all layers at once, against what a null expects.

        Args:
            null: "small shifts" (of -2..2 steps, the paper's baseline; see `shift_test`), "circular shifts" of any
                length, or "random phases" (surrogate series of the same spectrum).
            least: layers that have to share a moment; by default all.
            draws: of the nulls that are not counted out.
            seed: of the draws.
            together: whether the null moves all classes of a layer alike. Classes of one run share the weights' path:
                taken as independent (the default), they make p too small.

        Raises:
            UnknownName: for another null.
        """
        if null == "small shifts":
            return shift_test(self.marks, least, draws=draws, seed=seed, together=together)
        if null == "circular shifts":
            return circular_shift_test(self.marks, least, draws, seed, together)
        if null == "random phases":
            return phase_test(self.series, self._find, least, min(draws, 1_000), seed, together)
        raise UnknownName(f"null={null!r}: {did_you_mean(null, NULLS)} It is one of {', '.join(NULLS)}.")

    def plot(self) -> Any:
        """A mark for each moment; red where all layers have one at the same step."""
        from nbdyn.analysis.lca import figures

        return figures.moments(self)

    def __repr__(self) -> str:
        of = f" x {len(self.classes)} classes" if self.classes else ""
        return f"<Moments: {int(self.marks.sum()):,} of {len(self.layers)} layers{of}, {len(self.steps):,} steps>"
