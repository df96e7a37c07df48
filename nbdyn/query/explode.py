"""When gradients explode: the threshold of each layer and step, and what recorded norms already tell of it."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from nbdyn.query.evaluate import Array
from nbdyn.query.source import Source
from nbdyn.schema import PART_GRADIENT
from nbdyn.store import state
from nbdyn.store.seen_gradients import loop_factors

TIMES, WINDOW, LEAST = 10.0, 100, 10
"""A gradient explodes at TIMES the layer's root-mean-square gradient, as the median over the last WINDOW steps, of
which there must be LEAST. The median of |grad| itself would not do: ReLU makes most gradients 0."""

NEVER = float(np.finfo(np.float32).max)
"""No finite gradient is larger; an infinite one is."""


@dataclass(frozen=True)
class Thresholds:
    """Of each step start <= t < stop and tensor; Inf and NaN are beyond any of them.

    Attributes:
        start: first step.
        limits: (steps, tensors): NEVER where fewer than LEAST steps came before.
        norms: (steps, tensors) Euclidean norm of the tensor's gradient as backward left it; NaN where not recorded, and
            where the loop replaced the gradient (clipping by value, noise): its norm is that of what replaced it.
        firsts, sizes: (tensors,) of the parameters.
    """

    start: int
    limits: Array
    norms: Array
    firsts: Array
    sizes: Array

    def of(self, steps: Array, indices: Array) -> Array:
        """The threshold of some steps and parameters, (steps, parameters)."""
        tensor = np.searchsorted(self.firsts, indices, side="right") - 1
        return self.limits[steps - self.start][:, tensor]


def thresholds(source: Source, start: int, stop: int) -> Thresholds:
    """The thresholds of some steps, from the recorded norms of the steps before each.

    explode(t, layer) = 10 median over u = t-100..t-1 of RMS(layer, u), RMS = |grad| / sqrt(parameters of the layer).
    Steps whose gradient is not finite count as infinitely large; skipped steps count as any; of steps at which the loop
    replaced the gradient the norm of the replacement counts.
    """
    norms, replaced = raw_norms(source)
    sizes = np.array([t["size"] for t in source.tensors], dtype=np.float64)
    layer = pd.factorize(np.array([str(t["layer"]) for t in source.tensors], dtype=object))[0]
    square = np.where(np.isnan(norms), np.inf, norms) ** 2
    rms = np.stack([np.sqrt(square[:, layer == k].sum(1) / sizes[layer == k].sum()) for k in range(layer.max() + 1)], 1)
    median = pd.DataFrame(rms).replace(np.inf, np.finfo(float).max).rolling(WINDOW, min_periods=LEAST).median()
    limits = np.full_like(rms, NEVER)
    limits[1:] = TIMES * median.fillna(NEVER).clip(upper=NEVER / TIMES).to_numpy()[:-1]
    firsts = np.array([t["first"] for t in source.tensors], dtype=np.int64)
    norms[replaced] = np.nan
    return Thresholds(start, limits[start:stop][:, layer], norms[start:stop], firsts, sizes)


def raw_norms(source: Source) -> tuple[Array, Array]:
    """Norms of every step's gradient, (steps, tensors), and the steps at which they are those of another gradient.

    A recorded factor (clipping) is taken back, so that they are norms of sums of contributions.
    """
    frame = source.read("norms", 0, source.steps)
    norms = frame["grad_norm"].to_numpy(copy=True).reshape(source.steps, len(source.tensors))
    replaced = state.places(source.store, PART_GRADIENT)
    factor = loop_factors(source.store, 0, source.steps)
    norms /= np.where(np.isnan(factor) | (factor == 0), 1.0, factor)[:, None]
    return norms, replaced[replaced < source.steps]
