"""Which columns go together? Ranked on one half of the runs, steps or rows; the other half is held back to check.

Many pairs are looked at, so what is found is exploratory, whatever its p. A pair that was chosen is then asked of the
other half: `confirm`, or a hypothesis declared in the ledger for runs that are recorded afterwards.

Along a training path nearly everything goes up or down, so that any two columns are correlated. Where rows are steps,
ranks are freed of what their straight line over the steps explains: rho is the partial rank correlation given the step.
The null shifts one of the columns circularly against the other, which keeps the dependence of neighbouring steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nbdyn.errors import Incompatible, UnknownName, did_you_mean
from nbdyn.schema import PROVENANCE
from nbdyn.statistics.testing import benjamini_hochberg

DRAWS = 1_999
"""Rearrangements of the null; of one series, all shifts where there are fewer."""
RUNS, BLOCKS, ROWS = 4, 8, 40
"""Runs from which on half of them is held back; blocks of steps, of which every second is; rows a half needs."""
MOST_BINS = 10
CHUNK = 4_000_000
"""Values rearranged at once."""

EXPLORED, HELD_BACK = "explored", "held back"


class _Half(NamedTuple):
    """The rows of one half.

    Attributes:
        table: their columns, (n, columns), finite.
        series: slices of rows that belong together in order; None: rows are independent.
        steps: of each row, (n,); used where there are series.
        words: what half it is.
    """

    table: np.ndarray
    series: list[slice] | None
    steps: np.ndarray
    words: str


def suggest(frame: pd.DataFrame, columns: Sequence[str], seed: int = 0) -> pd.DataFrame:
    """Pairs of columns on the explored half, the clearest first. Exploratory.

    Held back is every second run where there are four or more; else every second of eight blocks of steps; else, in a
    frame without steps, a random half of the rows. Series of several runs are ranked within each run.

    rho is Spearman's rank correlation, given the step where rows are steps (mean over runs). low and high are its 95 %
    interval by Fisher's z with the variance of Bonett and Wright (2000), n being replaced by n / (1 + 2 sum r_x r_y)
    over lags where neighbours depend (Bartlett 1935): approximate. mi is the mutual information of ranks in n^(1/3)
    equal bins, in nats, less the bias (b - 1)^2 / 2n (Miller 1955); it also sees what is no monotone relation. p is the
    smaller one of both, times two: (1 + k) / (1 + B) over circular shifts, of independent rows permutations.

    Of independent series p is at most 0.05 in 5 % (independent rows; autoregressions of 0.8 and 0.95, 400 and 1,000
    steps, and six runs of 150; 300 frames each), and the interval covers 93 to 95 %. A shift keeps each series' own
    dependence, not what both share: where both fall exponentially at the start it is 12 %, and intervals cover 86 %.

    Args:
        frame: the rows; columns "run" and "step" say where they belong.
        columns: names of columns of numbers; those that are constant, or NaN in half of the rows, are left out, then
            rows that are not finite.
        seed: of halves (of rows) and rearrangements.

    Returns:
        x, y, rho, low, high, rho_plain (without "given the step"), mi, p_rho, p_mi, p, p_bh (Benjamini-Hochberg over
        the pairs), n (rows), half. Cost: a second for 15 columns of 1,000 rows.

    Raises:
        Incompatible: if fewer than two columns, or too few rows, are left; if a step is there twice in a run; if a
            column holds no numbers.
        UnknownName: if there is no such column.

    >>> rng = np.random.default_rng(0); a = rng.normal(size=200)
    >>> found = suggest(pd.DataFrame({"a": a, "b": a**2, "c": rng.normal(size=200)}), ["a", "b", "c"])
    >>> found[["x", "y"]].values[0].tolist(), bool(found["p_mi"][0] < 0.01)
    (['a', 'b'], True)
    """
    kept, usable = _usable(frame, columns)
    half = _half(usable, kept, explored=True, seed=seed)
    pairs = list(itertools.combinations(range(len(kept)), 2))
    found = _associations(half, kept, pairs, seed)
    found.insert(len(found.columns) - 2, "p_bh", benjamini_hochberg(found["p"]))
    found = found.sort_values(["p", "mi"], ascending=[True, False], kind="stable", ignore_index=True)
    left_out = [name for name in columns if name not in kept]
    note = f"exploratory: {len(pairs)} pairs were looked at ({half.words}); the other half is held back: confirm(x, y)"
    return _framed(found, frame, note + (f"; left out: {', '.join(left_out)}" if left_out else ""))


def confirm(frame: pd.DataFrame, columns: Sequence[str], x: str, y: str, seed: int = 0) -> pd.DataFrame:
    """One pair on the half that `suggest` held back. p is valid for a pair that was chosen on the other half alone.

    Args:
        frame: the same frame.
        columns: the same columns as for `suggest`: they decide which rows are left.
        x: the first of the pair.
        y: the second.
        seed: the same as for `suggest`.

    Returns:
        One row with the columns of `suggest` but p_bh. Who confirms several pairs corrects for their number.

    Raises:
        UnknownName: if x or y is not among the columns that are left.
        Incompatible: as `suggest`.
    """
    kept, usable = _usable(frame, columns)
    for name in (x, y):
        if name not in kept:
            raise UnknownName(f"there is no column {name!r} to associate; {did_you_mean(name, kept)}")
    if x == y:
        raise Incompatible(f"{x!r} goes with itself; give two columns.")
    half = _half(usable, kept, explored=False, seed=seed)
    found = _associations(half, kept, [(kept.index(x), kept.index(y))], seed)
    return _framed(found, frame, f"one pair ({half.words}); for several pairs correct p for their number")


def _framed(found: pd.DataFrame, frame: pd.DataFrame, note: str) -> pd.DataFrame:
    origin = dict(frame.attrs.get(PROVENANCE, {}))
    found.attrs[PROVENANCE] = {**origin, "what": "associations", "note": note}
    return found


# Halves -----------------------------------------------------------------------------------------------------------


def _usable(frame: Any, columns: Sequence[str]) -> tuple[list[str], Any]:
    """The columns that vary and are mostly there, and the rows in which all are finite, by run and step."""
    unfit = [name for name in columns if name in ("run", "step") or columns.count(name) > 1]
    if unfit:
        raise Incompatible(f"{unfit[0]!r} is no quantity, or named twice: columns are quantities; steps are given.")
    for name in columns:
        if name not in frame:
            raise UnknownName(f"the frame has no column {name!r}; {did_you_mean(name, map(str, frame.columns))}")
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise Incompatible(f"{name!r} holds {frame[name].dtype}, no numbers; leave it out.")
    table = frame[list(columns)].astype(np.float64)
    table = table.where(np.isfinite(table))
    kept = [str(name) for name in columns if table[name].notna().mean() > 0.5 and table[name].nunique() > 1]
    if len(kept) < 2:
        raise Incompatible(f"an association takes two columns of numbers that vary; there are {len(kept)}.")
    places = [name for name in ("run", "step") if name in frame]
    rows = pd.concat([frame[places], table[kept]], axis=1).dropna()
    if "step" in places:
        twice = rows.duplicated(places)
        if twice.any():
            raise Incompatible(
                f"step {rows.loc[twice, 'step'].iloc[0]} is there twice: rows of several layers or classes? "
                "Take one of them first, such as df[df.layer == 'fc1']."
            )
        order = {name: place for place, name in enumerate(rows["run"].unique())} if "run" in rows else {}
        rows = rows.sort_values(places, key=lambda c: c.map(order) if c.name == "run" else c, kind="stable")
    elif "run" in places and rows["run"].duplicated().any():
        raise Incompatible("there are several rows of a run and no column 'step' that orders them; add one.")
    return kept, rows.reset_index(drop=True)


def _half(rows: Any, kept: list[str], *, explored: bool, seed: int) -> _Half:
    """One half of the rows, and which it is."""
    runs = rows["run"].unique() if "run" in rows else np.array([None])
    ordered = "step" in rows and len(rows) > len(runs)  # else a row is a run, or a sample
    if len(runs) >= RUNS:
        chosen = runs[(0 if explored else 1) :: 2]
        mine, words = rows["run"].isin(chosen).to_numpy(), f"{len(chosen)} of {len(runs)} runs"
    elif ordered:
        blocks = _blocks(rows)
        mine, words = (blocks % 2 == 0) == explored, f"every second of {BLOCKS} blocks of steps"
    else:
        order = np.random.default_rng(seed).permutation(len(rows))
        mine, words = (order % 2 == 0) == explored, "a random half of the rows"
    part = rows[mine].reset_index(drop=True)
    least = RUNS // 2 if len(runs) >= RUNS and not ordered else ROWS // 4 if len(runs) >= RUNS else ROWS // 2
    if len(part) < max(least, 4):
        raise Incompatible(f"{len(part)} rows are left in a half ({words}); {max(least, 4)} are needed.")
    steps = part["step"].to_numpy(np.float64) if ordered else np.zeros(len(part))
    series = _series(part) if ordered else None
    kind = EXPLORED if explored else HELD_BACK
    return _Half(part[kept].to_numpy(np.float64), series, steps, f"{kind}: {words}")


def _blocks(rows: Any) -> np.ndarray:
    """The block of each row within its run, (n,)."""
    groups = rows.groupby("run", sort=False) if "run" in rows else None
    place = np.arange(len(rows)) if groups is None else groups.cumcount().to_numpy()
    size = np.full(len(rows), len(rows)) if groups is None else groups["step"].transform("size").to_numpy()
    return place * BLOCKS // size


def _series(part: Any) -> list[slice]:
    """The rows of each run."""
    if "run" not in part:
        return [slice(0, len(part))]
    ends = np.cumsum(part.groupby("run", sort=False).size().to_numpy()).tolist()
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


# Measures of association ------------------------------------------------------------------------------------------


def _associations(half: _Half, names: list[str], pairs: list[tuple[int, int]], seed: int) -> pd.DataFrame:
    """One row a pair."""
    groups = half.series or [slice(0, len(half.table))]
    ranks = np.concatenate([stats.rankdata(half.table[group], axis=0) for group in groups])
    free = ranks if half.series is None else _given_steps(ranks, half.steps, groups)
    z, plain = _standardized(free, groups), _standardized(ranks, groups)
    bins = int(np.clip(round(len(z) ** (1 / 3)), 2, MOST_BINS))
    codes = _binned(free, groups, bins)
    bias = (bins - 1) ** 2 / (2 * len(z))
    seen = np.array([
        (z[:, first] @ z[:, second], _information(codes[None, :, first], codes[:, second], bins)[0])
        for first, second in pairs
    ])  # fmt: skip
    p = _p_values(seen, pairs, _null(half, groups, z, codes, bins, pairs, seed))
    rows = []
    for (first, second), (rho, mi), (p_rho, p_mi) in zip(pairs, seen.tolist(), p.tolist(), strict=True):
        low, high = _interval(rho, [z[group][:, [first, second]] for group in groups], half.series is not None)
        rows.append({
            "x": names[first], "y": names[second], "rho": rho, "low": low, "high": high,
            "rho_plain": float(plain[:, first] @ plain[:, second]), "mi": mi - bias, "p_rho": p_rho, "p_mi": p_mi,
            "p": min(1.0, 2 * min(p_rho, p_mi)), "n": len(z), "half": half.words,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _given_steps(ranks: np.ndarray, steps: np.ndarray, groups: list[slice]) -> np.ndarray:
    """What a straight line over the ranks of the steps leaves of ranks, within each group."""
    rest = np.empty_like(ranks)
    for group in groups:
        time = stats.rankdata(steps[group])
        time = time - time.mean()
        here = ranks[group] - ranks[group].mean(axis=0)
        rest[group] = here - np.outer(time, time @ here / max(time @ time, 1e-300))
    return rest


def _standardized(values: np.ndarray, groups: list[slice]) -> np.ndarray:
    """Scaled so that the product of two columns is the mean over groups of their correlation; constants give 0."""
    z = np.zeros_like(values)
    for group in groups:
        here = values[group] - values[group].mean(axis=0)
        length = np.sqrt((here * here).sum(axis=0))
        np.divide(here, length * math.sqrt(len(groups)), out=z[group], where=length > 1e-9 * len(here))
    return z


def _binned(values: np.ndarray, groups: list[slice], bins: int) -> np.ndarray:
    """Ranks within each group in equal bins, (n, columns) int64."""
    codes = np.empty(values.shape, np.int64)
    for group in groups:
        rank = stats.rankdata(values[group], axis=0)
        codes[group] = np.minimum((rank - 0.5) * bins // len(rank), bins - 1)
    return codes


def _information(x: np.ndarray, y: np.ndarray, bins: int) -> np.ndarray:
    """Mutual information in nats of codes x (rearrangements, n) with y (n,), (rearrangements,)."""
    cells = bins * bins
    places = x * bins + y + cells * np.arange(len(x))[:, None]
    return _of_tables(np.bincount(places.reshape(-1), minlength=cells * len(x)).reshape(-1, bins, bins))


def _of_tables(counts: np.ndarray) -> np.ndarray:
    """Mutual information in nats of tables of counts (rearrangements, bins, bins), (rearrangements,)."""
    share = counts / counts[0].sum()
    expected = share.sum(axis=2, keepdims=True) * share.sum(axis=1, keepdims=True)
    ratio = np.divide(share, expected, out=np.ones_like(share), where=share > 0)
    return (share * np.log(ratio)).sum(axis=(1, 2))


# The null ---------------------------------------------------------------------------------------------------------

Null = Iterator[tuple[int, np.ndarray, np.ndarray]]
"""Numbers of pairs, with rho and mutual information of some rearrangements; a pair may come several times."""


def _null(
    half: _Half, groups: list[slice], z: np.ndarray, codes: np.ndarray, bins: int, pairs: list[tuple[int, int]],
    seed: int,
) -> Null:  # fmt: skip
    """Circular shifts within each series, permutations of independent rows."""
    n, rng = len(z), np.random.default_rng(seed)
    if half.series is not None:
        shifts = _shifts(groups, rng)
        for number, (first, second) in enumerate(pairs):
            yield number, *_shifted(z[:, [first, second]], codes[:, [first, second]], bins, groups, shifts)
        return
    rows = max(1, CHUNK // n)
    for start in range(0, DRAWS, rows):
        drawn = rng.permuted(np.tile(np.arange(n), (min(rows, DRAWS - start), 1)), axis=1)
        for number, (first, second) in enumerate(pairs):
            yield number, z[drawn, first] @ z[:, second], _information(codes[drawn, first], codes[:, second], bins)


def _shifts(groups: list[slice], rng: np.random.Generator) -> np.ndarray:
    """Steps that each series is shifted by, (draws, series): of one series all, where there are fewer than draws."""
    sizes = [group.stop - group.start for group in groups]
    if len(sizes) == 1 and sizes[0] - 1 <= DRAWS:
        return np.arange(1, sizes[0])[:, None]
    return np.column_stack([rng.integers(size, size=DRAWS) for size in sizes])


def _shifted(
    z: np.ndarray, codes: np.ndarray, bins: int, groups: list[slice], shifts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rho and mutual information of a pair (n, 2), its first column shifted, each (draws,).

    Products over all shifts of a series at once are convolutions; those of indicators count pairs of bins.
    """
    rho, counts = np.zeros(len(shifts)), np.zeros((len(shifts), bins, bins))
    for group, by in zip(groups, shifts.T, strict=True):
        size = group.stop - group.start
        x, y = np.fft.rfft(z[group].T)
        rho += np.fft.irfft(x * np.conj(y), size)[by]
        members = codes[group].T[:, None, :] == np.arange(bins)[:, None]
        x, y = np.fft.rfft(members.astype(np.float64))
        for place in range(bins):
            counts[:, place] += np.rint(np.fft.irfft(x[place] * np.conj(y), size)).T[by]
    return rho, _of_tables(counts)


def _p_values(seen: np.ndarray, pairs: list[tuple[int, int]], null: Null) -> np.ndarray:
    """P-values of rho (two-sided) and mutual information, which are seen, both (pairs, 2)."""
    beyond, draws = np.zeros((len(pairs), 2)), np.zeros((len(pairs), 1))
    for number, rho, mi in null:
        beyond[number, 0] += np.count_nonzero(np.abs(rho) >= abs(seen[number, 0]) - 1e-12)
        beyond[number, 1] += np.count_nonzero(mi >= seen[number, 1] - 1e-12)
        draws[number] += len(rho)
    return (1 + beyond) / (1 + draws)


# The interval -----------------------------------------------------------------------------------------------------


def _interval(rho: float, series: list[np.ndarray], ordered: bool) -> tuple[float, float]:
    """The 95 % interval of a rank correlation."""
    freedom = sum(max(_effective(pair) if ordered else len(pair), 0) - 3 - ordered for pair in series)
    if freedom < 1 or abs(rho) >= 1:
        return math.nan, math.nan
    half = 1.959963984540054 * math.sqrt((1 + rho**2 / 2) / freedom)
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def _effective(pair: np.ndarray) -> float:
    """Independent values that tell as much of a correlation as n dependent ones; (n, 2), centred."""
    n = len(pair)
    size = 1 << (2 * n - 1).bit_length()
    power = np.abs(np.fft.rfft(pair, size, axis=0)) ** 2
    past = np.fft.irfft(power, size, axis=0)[:n]
    if not (past[0] > 0).all():
        return float(n)
    product = np.prod(past / past[0], axis=1)[1 : n // 4]
    ends = np.flatnonzero(product <= 0)
    kept = product[: ends[0]] if len(ends) else product
    return n / (1 + 2 * float(kept.sum()))
