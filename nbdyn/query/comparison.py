"""Runs side by side: `compare ... by ...`, each measure with how sure it is."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

import numpy as np
import pandas as pd

from nbdyn.errors import NotRecorded
from nbdyn.query.evaluate import Array
from nbdyn.query.plan import ComparePlan
from nbdyn.query.rows import chunks
from nbdyn.query.source import Source
from nbdyn.store import frames

_COLUMNS = {"loss": "loss", "acc": "accuracy", "|grad|": "grad_norm", "lr": "lr"}


def compare(plan: ComparePlan) -> tuple[pd.DataFrame, list[str]]:
    """The frame of `compare` (one row a run and step) and its notes."""
    measures = plan.statement.measures
    notes: list[str] = []
    losses = {}
    if "progress(loss)" in measures:
        losses = {source.store.uri: frames.steps(source.store)["loss"].to_numpy() for source in plan.sources}
    lowest = min((np.nanmin(v) for v in losses.values() if np.isfinite(v).any()), default=np.nan)
    starts: list[Array] = []
    parts: list[pd.DataFrame] = []
    for source, (start, stop) in zip(plan.sources, plan.ranges, strict=True):
        part = _scalars(source, measures, start, stop)
        if losses:
            part["progress(loss)"] = _progress(losses[source.store.uri], lowest, start, stop)
        part = pd.concat([part, _sureness(source, measures, start, stop)], axis=1)
        if "dist(w, init)" in measures:
            part["dist(w, init)"], part["w_step"], init = distances(source, start, stop)
            starts.append(init)
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True).reindex(columns=list(plan.columns))
    if losses:
        notes.append(f"Lmin = {lowest:.6g}, over all steps of all compared runs")
        if np.isnan(frame["progress(loss)"].to_numpy()).any():
            notes.append("progress is NaN where the loss is, or where a run never came below its first loss")
    notes += _distance_notes(frame, starts)
    return frame, notes


def _scalars(source: Source, measures: tuple[str, ...], start: int, stop: int) -> pd.DataFrame:
    steps = np.arange(start, stop, dtype=np.int64)
    part = pd.DataFrame({"run": [source.name] * len(steps), "step": steps})
    wanted = [name for name in _COLUMNS if name in measures]
    if wanted:
        table = frames.steps(source.store, start, stop)
        for name in wanted:
            part[name] = table[_COLUMNS[name]].to_numpy()
    return part


def _progress(loss: Array, lowest: float, start: int, stop: int) -> Array:
    """(L0 - Lt) / (L0 - Lmin)."""
    room = loss[0] - lowest if len(loss) else np.nan
    with np.errstate(all="ignore"):
        return (loss[0] - loss[start:stop]) / room if room > 0 else np.full(stop - start, np.nan)


def _sureness(source: Source, measures: tuple[str, ...], start: int, stop: int) -> pd.DataFrame:
    """Standard error of the batch's loss, interval of its accuracy, and the number of visits: one row a step."""
    result: dict[str, Array] = {}
    losses = {"loss", "progress(loss)"} & set(measures)
    if not losses and "acc" not in measures:
        return pd.DataFrame(index=range(stop - start))
    visits = frames.visits(source.store, start, stop)
    group = visits["step"].to_numpy() - start
    count = stop - start
    if losses:
        grouped = visits["loss"].astype(np.float64).groupby(group)
        error = grouped.std(ddof=1) / np.sqrt(grouped.count())
        result["loss_se"] = np.asarray(error.reindex(range(count)), dtype=np.float64)
    if "acc" in measures:
        correct = visits["correct"].to_numpy()
        right = np.bincount(group[correct == 1], minlength=count)
        known = np.bincount(group[correct >= 0], minlength=count)
        result["acc_low"], result["acc_high"] = wilson(right, known)
    result["n"] = np.bincount(group, minlength=count)
    return pd.DataFrame(result)


NORMAL_95 = 1.959963984540054
"""The standard normal quantile of 0.975."""


def wilson(right: Array, known: Array) -> tuple[Array, Array]:
    """Ends of the 95 % Wilson score interval of a share; NaN where nothing is known.

    Wilson (1927), without continuity correction, as scipy's `binomtest(k, n).proportion_ci(method="wilson")`, whose
    import would take two seconds of a question's first answer.

    Args:
        right: successes, (n,).
        known: trials, (n,).

    >>> low, high = wilson(np.array([8]), np.array([10]))
    >>> round(float(low[0]), 3), round(float(high[0]), 3)
    (0.49, 0.943)
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        share, z2 = right / known, NORMAL_95**2
        center = (share + z2 / (2 * known)) / (1 + z2 / known)
        half = NORMAL_95 * np.sqrt(share * (1 - share) / known + z2 / (4 * known**2)) / (1 + z2 / known)
    return center - half, center + half


def distances(source: Source, start: int, stop: int) -> tuple[Array, Array, Array]:
    """Euclidean distance of weights[t] from weights[0], over all parameters.

    Where weights[t] is not stored the nearest earlier row is taken. Cost: one pass over the stored rows.

    Returns:
        Distances (n,), the step of the row that was taken (n,), and weights[0] (parameters,).
    """
    stored = np.asarray(source.store.weights.steps)
    everything = np.arange(source.parameters, dtype=np.int64)
    if not len(stored) or stored[0] != 0:
        raise NotRecorded(f"{source.name} holds no weights[0]; dist(w, init) needs them.")
    init = source.store.weights.read(everything, 0, 1)[1][0].astype(np.float64)
    steps = np.arange(start, stop)
    taken = stored[np.searchsorted(stored, steps, side="right") - 1]
    if not len(taken):
        return np.empty(0), taken, init
    length = np.full(int(taken[-1]) + 1, np.nan)
    for rows, values in chunks(source.store, everything, int(taken[0]), int(taken[-1]) + 1):
        length[rows] = np.linalg.norm(values.astype(np.float64) - init, axis=1)
    return length[taken], taken, init


def _distance_notes(frame: pd.DataFrame, starts: list[Array]) -> list[str]:
    notes: list[str] = []
    if "w_step" in frame and (frame["w_step"].to_numpy() != frame["step"].to_numpy()).any():
        notes.append("weights are snapshots: where w_step < step, dist is that of the nearest earlier one")
    if len({len(start) for start in starts}) > 1:
        notes.append("the runs have models of different size")
    elif any(not np.array_equal(start, starts[0]) for start in starts[1:]):
        notes.append("the runs start from different weights")
    return notes
