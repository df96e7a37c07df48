"""How much of a network helps: shares of helping parameters and steps, oscillations, and layers over runs.

Allocations below 0 help, above 0 hurt, and exact zeros do neither (dead pixels, saturated units). Shares of all count
zeros in the denominator; shares of the non-zero do not. Both are given throughout, for they answer other questions:
published values are of the non-zero (LCA, arXiv 1909.01440, table 1, as far as can be told).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible, UnknownName
from nbdyn.statistics.bootstrap import block_length, block_means
from nbdyn.statistics.testing import EQUAL, holm, one_sample

HALF = 50.0
"""Percent: the null of helping shares, as many helping as hurting."""


# Steps ----------------------------------------------------------------------------------------------------------


def percent_helping(
    helping: ArrayLike, hurting: ArrayLike, size: ArrayLike, groups: Sequence[str] | None = None
) -> pd.DataFrame:
    """Shares of the parameters that help at each step, of all and of the non-zero.

    Args:
        helping: number of allocations below 0, (T,) or (T, groups).
        hurting: number above 0, the same shape.
        size: number of parameters, one or (groups,).
        groups: names, such as layers; by default numbers from 0.

    Returns:
        By step (from 0), and by group if there are groups: size, nonzero, helping_percent, zero_percent and
        hurting_percent (of size), helping_of_nonzero_percent (NaN where all are zero).

    Raises:
        Incompatible: if shapes do not fit, or more help and hurt than there are.

    >>> percent_helping([3], [1], 8).iloc[0, 3:].tolist()
    [37.5, 50.0, 12.5, 75.0]
    """
    help_, hurt, whole, names = _counts(helping, hurting, size, groups)
    nonzero = help_ + hurt
    steps, width = help_.shape
    frame = {
        "step": np.repeat(np.arange(steps), width), "group": np.tile(np.asarray(names), steps),
        "size": np.tile(whole, steps), "nonzero": nonzero.reshape(-1),
        "helping_percent": (100 * help_ / whole).reshape(-1),
        "zero_percent": (100 * (whole - nonzero) / whole).reshape(-1),
        "hurting_percent": (100 * hurt / whole).reshape(-1),
        "helping_of_nonzero_percent": _of(help_, nonzero).reshape(-1),
    }  # fmt: skip
    if np.ndim(helping) == 1:
        del frame["group"]
    return pd.DataFrame(frame)


def helping_test(
    helping: ArrayLike,
    hurting: ArrayLike,
    size: ArrayLike,
    groups: Sequence[str] | None = None,
    level: float = 0.05,
    draws: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean share of helping parameters over steps, with its confidence interval, against one half.

    Steps are correlated: intervals and p-values are of a circular block bootstrap whose blocks suit the series'
    lag-one correlation (`nbdyn.statistics.bootstrap`), percentiles and a centred two-sided test. Approximate: they take
    the share for stationary, and mean other trainings of these steps, not other seeds.

    Args:
        helping: number of allocations below 0, (T,) or (T, groups).
        hurting: number above 0, the same shape.
        size: number of parameters, one or (groups,).
        groups: names, such as layers; by default numbers from 0.
        level: intervals cover 1 - level.
        draws: of the bootstrap.
        seed: of the draws.

    Returns:
        Rows by group (if there are groups) and measure, which is "helping_of_nonzero_percent" or "helping_percent":
        mean, low, high, n (steps where it is defined), block (steps), null (50, as many helping as hurting; of
        helping_percent NaN, for zeros shift it), effect (mean - null), p, p_holm (over groups). Of a share that never
        changes p is NaN.

    Raises:
        Incompatible: if shapes do not fit, or more help and hurt than there are.
    """
    help_, hurt, whole, names = _counts(helping, hurting, size, groups)
    measures = {
        "helping_of_nonzero_percent": (_of(help_, help_ + hurt), HALF),
        "helping_percent": (100 * help_ / whole, math.nan),
    }
    found = pd.DataFrame(
        {"group": name, "measure": measure, **_mean_row(share, null, level, draws, seed)}
        for measure, (shares, null) in measures.items()
        for name, share in zip(names, shares.T, strict=True)
    )
    found["p_holm"] = holm(found["p"])  # a measure without a null has no p and counts for nothing
    return found.drop(columns="group") if np.ndim(helping) == 1 else found


def _mean_row(share: np.ndarray, null: float, level: float, draws: int, seed: int) -> dict[str, float]:
    """The mean of a series by block bootstrap against a null."""
    x = share[~np.isnan(share)]
    nan = math.nan
    row: dict[str, float] = {"mean": nan, "low": nan, "high": nan, "n": len(x), "block": 0, "null": null}
    row |= {"effect": nan, "p": nan}
    if not len(x):
        return row
    block = block_length(x)
    means = block_means(x, block, draws, seed)
    mean = float(x.mean())
    low, high = np.quantile(means, [level / 2, 1 - level / 2])
    row |= {"mean": mean, "low": float(low), "high": float(high), "block": block, "effect": mean - null}
    if not math.isnan(null) and x.std() > EQUAL * abs(mean):
        row["p"] = (1 + int((np.abs(means - mean) >= abs(mean - null)).sum())) / (1 + draws)
    return row


def _counts(
    helping: ArrayLike, hurting: ArrayLike, size: ArrayLike, groups: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str] | list[int]]:
    """Counts as (T, groups), sizes (groups,), names."""
    help_, hurt = np.asarray(helping), np.asarray(hurting)
    if help_.shape != hurt.shape or help_.ndim not in (1, 2):
        raise Incompatible(f"helping {help_.shape} and hurting {hurt.shape} are not both (steps,) or (steps, groups).")
    help_, hurt = (counts.astype(np.int64).reshape(len(counts), -1) for counts in (help_, hurt))
    width = help_.shape[1]
    names = list(range(width)) if groups is None else list(groups)
    if np.size(size) not in (1, width) or len(names) != width:
        raise Incompatible(f"{np.size(size)} sizes and {len(names)} names do not fit {width} groups of parameters.")
    whole = np.broadcast_to(np.asarray(size, np.int64).reshape(-1), (width,))
    if not (whole > 0).all():
        raise Incompatible(f"sizes are {whole.tolist()}; a share needs one parameter or more.")
    if len(help_) and ((help_ + hurt > whole).any() or min(help_.min(), hurt.min()) < 0):
        raise Incompatible(f"{(help_ + hurt).max()} parameters help or hurt, of {whole.max()}: counts are in 0..size.")
    return help_, hurt, whole, names


def _of(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Percent, NaN of nothing."""
    return np.divide(100.0 * part, whole, out=np.full(part.shape, math.nan), where=whole != 0)


# Parameters -----------------------------------------------------------------------------------------------------


def helping_share(helping: ArrayLike, steps: int, hurting: ArrayLike | None = None) -> np.ndarray:
    """Percent of steps at which each parameter helps (LCA, figure 3d).

    Args:
        helping: steps at which the allocation is below 0, by parameter, any shape.
        steps: steps in all.
        hurting: steps at which it is above 0; if given, the share is of the steps at which it is not zero, and NaN
            where it always is.

    Returns:
        float64, the shape of `helping`.

    Raises:
        Incompatible: if counts are not in 0..steps.

    >>> helping_share([3, 0], 8).tolist(), helping_share([3, 0], 8, hurting=[1, 0]).tolist()
    ([37.5, 0.0], [75.0, nan])
    """
    help_ = np.asarray(helping)
    hurt = np.zeros_like(help_) if hurting is None else np.asarray(hurting)
    if help_.shape != hurt.shape:
        raise Incompatible(f"helping {help_.shape} and hurting {hurt.shape} are not of the same parameters.")
    moving = help_.astype(np.int64) + hurt
    if help_.size and (min(help_.min(), hurt.min()) < 0 or moving.max() > steps):
        raise Incompatible(f"counts go from {min(help_.min(), hurt.min())} to {moving.max()}; of {steps} steps.")
    return _of(help_, np.full(help_.shape, steps) if hurting is None else moving)


def share_histogram(share: ArrayLike, bins: int = 50) -> pd.DataFrame:
    """How many parameters help at which percent of steps.

    Args:
        share: percent by parameter, of `helping_share`; NaN are left out.
        bins: equal ones of 0..100; each holds its lower end, the last also 100. 50 begins a bin if `bins` is even.

    Returns:
        By bin: low, high (percent), count, percent (of the parameters that are not NaN).
    """
    x = np.asarray(share, np.float64).reshape(-1)
    x = x[~np.isnan(x)]
    count, edges = np.histogram(x, bins, (0.0, 100.0))
    percent = _of(count, np.full(bins, len(x)))
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": count, "percent": percent})


# Oscillations ---------------------------------------------------------------------------------------------------


def crossings(x: ArrayLike, axis: int = 0) -> np.ndarray:
    """How often a series changes its sign from one step to the next: sum over t of [x_t x_(t+1) < 0] (LCA, table S2).

    Strict: a step at exactly zero is no change, nor is what comes before and after it. Signs are compared, for
    products of small numbers vanish.

    Args:
        x: such as full gradients by step and parameter, (T, K).
        axis: of steps.

    Returns:
        int64, without that axis.

    >>> crossings([1.0, -1.0, 0.0, 1.0, -1e-300, 1e-300]).item()
    3
    """
    x = np.moveaxis(np.asarray(x), axis, 0)
    down, up = x < 0, x > 0
    return ((down[:-1] & up[1:]) | (up[:-1] & down[1:])).sum(axis=0, dtype=np.int64)


def turns(weights: ArrayLike, axis: int = 0) -> np.ndarray:
    """How often weights change the direction in which they move: crossings of their differences (LCA, table S2).

    A step at which a weight stays is no turn, nor is what comes before and after it.

    Args:
        weights: by step and parameter, (T + 1, K); floating.
        axis: of steps.

    Returns:
        int64, without that axis.

    >>> turns([0.0, 1.0, 0.5, 0.7]).item()
    2
    """
    return crossings(np.diff(np.asarray(weights), axis=axis), axis)


def per_event(counts: ArrayLike, steps: int, alive: ArrayLike | None = None) -> pd.DataFrame:
    """Steps per crossing or turn: steps / mean count over parameters (LCA, table S2).

    Args:
        counts: crossings or turns by parameter, any shape.
        steps: steps over which they were counted.
        alive: which parameters' series is ever non-zero, the shape of `counts`; counts cannot tell, for a series of
            one sign has none either. If not given, there is no row of them.

    Returns:
        Rows for the parameters "all" and "ever non-zero": n (parameters), mean_events, steps_per_event (inf of none),
        null_steps_per_event: 2, of signs that are independent from step to step, both as likely.

    Raises:
        Incompatible: if shapes differ.
    """
    events = np.asarray(counts)
    kinds = {"all": events.reshape(-1)}
    if alive is not None:
        which = np.asarray(alive, bool)
        if which.shape != events.shape:
            raise Incompatible(f"alive {which.shape} and counts {events.shape} are not of the same parameters.")
        kinds["ever non-zero"] = events[which]
    rows = []
    for kind, found in kinds.items():
        mean = float(found.mean()) if len(found) else math.nan
        per = steps / mean if mean else math.inf
        rows.append({"parameters": kind, "n": len(found), "mean_events": mean, "steps_per_event": per})
    return pd.DataFrame(rows).assign(null_steps_per_event=2.0)


# Layers over runs -----------------------------------------------------------------------------------------------


def layers_over_runs(frame: pd.DataFrame, level: float = 0.05) -> pd.DataFrame:
    """Which layers hurt, over runs that differ by their seed: a layer's total allocation against 0 (LCA, figure 4).

    Args:
        frame: columns run, layer, lca (the layer's total, in nats); one row a run and layer.
        level: of the verdicts and, as 1 - level, of the intervals (which are of one layer each, uncorrected).

    Returns:
        By layer, in the order of the frame: n (runs), mean, std, low, high (Student's t), effect (Cohen's d), hurts
        (share of the runs with lca > 0), t, p (two-sided), p_holm (over the layers), p_wilcoxon, and verdict: "hurts"
        or "helps" where p_holm <= level, else "undecided". Of a single run, or of equal values, tests are NaN.

    Raises:
        UnknownName: if a column is missing.
        Incompatible: if a run has a layer twice.
    """
    missing = [name for name in ("run", "layer", "lca") if name not in frame]
    if missing:
        raise UnknownName(f'the frame has no column "{missing[0]}"; it needs run, layer and lca.')
    twice = frame[frame.duplicated(["run", "layer"])]
    if len(twice):
        run, layer = twice.iloc[0][["run", "layer"]]
        raise Incompatible(f"{run} has {layer} more than once; give one row a run and layer (sum over its tensors).")
    rows = []
    for layer, part in frame.groupby("layer", sort=False):
        lca = part["lca"].dropna().to_numpy(np.float64)
        hurts = float((lca > 0).mean()) if len(lca) else math.nan
        rows.append({"layer": layer, "hurts": hurts, **one_sample(lca, level=level)._asdict()})
    columns = ["layer", "n", "mean", "std", "low", "high", "effect", "hurts", "t", "p", "p_holm", "p_wilcoxon"]
    found = pd.DataFrame(rows, columns=[name for name in columns if name != "p_holm"])
    found["p_holm"] = holm(found["p"])
    decided = np.where(found["mean"] > 0, "hurts", "helps")
    return found[columns].assign(verdict=np.where(found["p_holm"] <= level, decided, "undecided"))
