"""How heavy the tails of allocations are, step by step and pooled: a double Weibull fit and what else they may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from nbdyn.analysis.lca.concentration import tail_share
from nbdyn.errors import NotRecorded
from nbdyn.statistics.heavy_tail.result import TailFit
from nbdyn.statistics.heavy_tail.weibull import double_weibull

MOST = 100_000
"""Values of a fit, at most; of more a random sample is fitted."""


def places_of(steps: Sequence[int], count: int) -> list[int]:
    """Places among so many steps, negative ones counted from the end.

    Raises:
        NotRecorded: if one is not there, or none is asked for.

    >>> places_of([0, -1], 6)
    [0, 5]
    """
    off = [step for step in steps if not -count <= step < count]
    if off or not len(steps):
        raise NotRecorded(f"steps={list(steps)}: places 0..{count - 1} of this allocation can be asked for.")
    return [int(step) % count for step in steps]


def fit(cells: Callable[[int], np.ndarray], places: Sequence[int], bootstrap: int, seed: int) -> TailFit:
    """A double Weibull fitted to allocations of one step, or of several pooled.

    Of more than 100,000 values a random sample is fitted, of several steps as many of each. The
    scale of allocations changes over training: pooled values are a mixture of scales, whose tails are heavier than
    those of any step.

    Args:
        cells: place of a step -> A of it, (parameters,).
        places: of the steps.
        bootstrap: replicates of the goodness of fit.
        seed: of the samples and the bootstrap.
    """
    rng = np.random.default_rng(seed)
    most = max(1, MOST // len(places))
    found = []
    for place in places:
        values = cells(place)
        found.append(values if len(values) <= most else rng.choice(values, most, replace=False))
    return double_weibull(np.concatenate(found), bootstrap=bootstrap, seed=seed)


def table(
    cells: Callable[[int], np.ndarray], places: Sequence[int], labels: np.ndarray, bootstrap: int, seed: int
) -> pd.DataFrame:
    """A row for each step and one for all of them pooled; see `nbdyn.analysis.lca.result.Allocation.tails`."""
    rows = [_described(str(labels[place]), cells(place), fit(cells, [place], bootstrap, seed)) for place in places]
    pooled = fit(cells, places, bootstrap, seed)
    rows.append(_described("pooled", pooled.values, pooled))
    return pd.DataFrame(rows)


def _described(name: str, values: np.ndarray, fit: TailFit) -> dict[str, object]:
    """A row of the table."""
    shape, nearest = fit["shape"], fit.alternatives.iloc[0]
    best = nearest["alternative"] if nearest["R"] < 0 else fit.family
    return {
        "step": name, "n": fit.n_tail, "zeros": fit.zeros, "shape": shape.value, "low": shape.low,
        "high": shape.high, "ks": fit.ks, "p": fit.p, "best": best,
        "R_normal": _ratio(fit, "normal"), "R_Laplace": _ratio(fit, "Laplace"), "R_t": _ratio(fit, "Student t"),
        "R_stable": _ratio(fit, "stable"), "tail_ratio_2": float(tail_share(values)["ratio"].iloc[0]),
    }  # fmt: skip


def _ratio(fit: TailFit, name: str) -> float:
    """Log likelihood ratio to an alternative a value, in nats: above 0 the double Weibull is nearer."""
    table = fit.alternatives.set_index("alternative")
    return float(table.loc[name, "R"]) / fit.n_tail  # pyright: ignore
