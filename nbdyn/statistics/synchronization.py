"""Do several series have their moments at the same steps more often than chance would have it?

Moments are boolean arrays (series, steps) or (classes, series, steps), such as (layers, T), as detectors of moments
return them. The statistic is the number of steps at which at least `least` series have a moment, summed over classes.
Each null moves the series against each other; what it keeps differs:

    shift_test           steps -2..2: keeps everything but the fine timing, such as a common trend over training
    circular_shift_test  any shift: keeps the order of a series' own moments; a common trend counts as synchrony
    block_permutation    whole blocks change places: keeps what happens within a block only
    phase_test           series of the same power spectrum, in which moments are searched anew: their number may differ

All nulls are circular: what leaves the range comes in at its other end. Were it dropped, the null would have fewer
moments than what was observed, and the test would find too much.

Classes of one run are not independent: they share the weights' path. Moved independently (the default), they give a
null that is too narrow where classes go together; `together=True` moves all classes of a series alike and keeps what
holds between them. What it cannot do is give a small p by `shift_test` for few series: 0.04 at best for three.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible
from nbdyn.statistics.arrangements import (
    CHUNK,
    Events,
    Synchronization,
    across,
    at_least,
    by_class,
    checked,
    from_all,
    from_draws,
    in_turn,
)
from nbdyn.statistics.surrogates import randomized
from nbdyn.statistics.testing import one_sample

SHIFTS = (-2, -1, 0, 1, 2)
"""Of `shift_test`; 0 is among them, for what was observed must be one of the arrangements that it is compared with."""
MOST_ARRANGEMENTS = 1_000
"""A class's arrangements up to which all are counted: five series with five shifts have 625."""


def synchronized(moments: ArrayLike, least: int | None = None) -> int:
    """The number of steps at which at least `least` series have a moment, summed over classes.

    Args:
        moments: bool, (series, T) or (classes, series, T).
        least: 2..series; by default all series.

    Raises:
        Incompatible: for other shapes or types; if `least` is out of range.

    >>> synchronized(np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]], bool)), \
        synchronized(np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]], bool), least=2)
    (1, 3)
    """
    found = checked(moments)
    return int(by_class(found, at_least(least, found.shape[1])).sum())


# The nulls ------------------------------------------------------------------------------------------------------


def shift_test(
    moments: ArrayLike,
    least: int | None = None,
    shifts: Sequence[int] = SHIFTS,
    draws: int = 10_000,
    seed: int = 0,
    together: bool = False,
) -> Synchronization:
    """Against series shifted by a few steps, each on its own: is the fine timing common?

    After LCA (arXiv 1909.01440, section 5). The first series stays. Up to 1,000 arrangements a class (five series by
    default) all are counted, and the distribution of the sum over classes is the convolution of the classes'; else
    arrangements are drawn. Where all are counted, each class brings p down to (number of shifts)^-(series - 1) at most,
    however clear the synchrony; together, all classes do.

    The shifts are no group, so the level is approximate. In simulations (two or three series, moments their top 20 or
    40 local minima, 300 trials a case) 0 to 4 % of independent series were at p <= 0.05, the fewest where counts are
    small; 8 % if ten classes depended on each other, and 10 % with a common trend that is strong at the start
    (together: 3 and 4 %).

    Args:
        moments: bool, (series, T) or (classes, series, T).
        least: series that a synchronized step takes, 2..series; by default all.
        shifts: distinct numbers of steps, 0 among them.
        draws: of arrangements, where not all are counted.
        seed: of the draws.
        together: whether a series has one shift in all classes; by default one in each.

    Raises:
        Incompatible: for other shapes; if 0 is not among the shifts, or one is there twice modulo T.
    """
    found = checked(moments)
    least = at_least(least, found.shape[1])
    classes, series, steps = found.shape
    among = np.asarray(shifts, np.int64)
    if 0 not in shifts or len(np.unique(among % steps)) < len(among):
        raise Incompatible(f"shifts are {tuple(shifts)}; give distinct ones (modulo {steps} steps), 0 among them.")
    sentence = (
        f"each series but the first is shifted by one of {', '.join(map(str, shifts))} steps, circularly"
        + across(together, classes)
    )
    events = Events.of(found)
    if len(among) ** (series - 1) <= MOST_ARRANGEMENTS:
        grid = np.array([(0, *rest) for rest in itertools.product(shifts, repeat=series - 1)], np.int64)
        counts = events.counts(len(grid), least, in_turn(events, grid))
        return from_all(found, least, counts, together, "small shifts", sentence)
    rng = np.random.default_rng(seed)

    def shifted(size: int) -> np.ndarray:
        drawn = rng.choice(among, size=(size, 1 if together else classes, series))
        drawn[..., 0] = 0
        return events.shifted(drawn)

    return from_draws(found, least, events.counts(draws, least, shifted), "small shifts", sentence)


def circular_shift_test(
    moments: ArrayLike, least: int | None = None, draws: int = 10_000, seed: int = 0, together: bool = False
) -> Synchronization:
    """Against series shifted by any number of steps, each on its own.

    Rotations are a group: the test keeps its level exactly for independent series of which each is as likely as its
    rotations. A trend that series share, such as moments early in training, is no such case and counts as synchrony.

    Args:
        moments: bool, (series, T) or (classes, series, T).
        least: series that a synchronized step takes, 2..series; by default all.
        draws: how many.
        seed: of the draws.
        together: whether a series has one shift in all classes; by default one in each.

    Raises:
        Incompatible: for other shapes.
    """
    found = checked(moments)
    least = at_least(least, found.shape[1])
    classes, series, steps = found.shape
    events, rng = Events.of(found), np.random.default_rng(seed)

    def shifted(size: int) -> np.ndarray:
        return events.shifted(rng.integers(steps, size=(size, 1 if together else classes, series)))

    sentence = f"each series is shifted by any of 0..{steps - 1} steps, circularly" + across(together, classes)
    return from_draws(found, least, events.counts(draws, least, shifted), "circular shifts", sentence)


def block_permutation(
    moments: ArrayLike,
    block: int,
    least: int | None = None,
    draws: int = 10_000,
    seed: int = 0,
    together: bool = False,
) -> Synchronization:
    """Against series cut into blocks that are put together in random order, each series on its own.

    Args:
        moments: bool, (series, T) or (classes, series, T).
        block: steps a block, 1..T/2; the last block may be shorter. 1 permutes single steps.
        least: series that a synchronized step takes, 2..series; by default all.
        draws: how many.
        seed: of the draws.
        together: whether a series has one order in all classes; by default one in each.

    Raises:
        Incompatible: for other shapes; if there are fewer than two blocks.
    """
    found = checked(moments)
    least = at_least(least, found.shape[1])
    classes, series, steps = found.shape
    if not 1 <= block <= steps / 2:
        raise Incompatible(f"blocks of {block} of {steps} steps cannot change places; give block = 1..{steps // 2}.")
    lengths = np.diff(np.append(np.arange(0, steps, block), steps))
    events, rng = Events.of(found), np.random.default_rng(seed)

    def permuted(size: int) -> np.ndarray:
        order = rng.random((size, 1 if together else classes, series, len(lengths))).argsort(axis=-1)
        ends = np.cumsum(lengths[order], axis=-1)
        starts = np.zeros(order.shape, np.int64)
        np.put_along_axis(starts, order, np.subtract(ends, lengths[order]), axis=-1)
        owner = np.zeros_like(events.owner) if together else events.owner
        return starts[:, owner, events.series, events.step // block] + events.step % block

    sentence = f"blocks of {block} steps of each series change places at random" + across(together, classes)
    cells = len(lengths) * series * classes
    return from_draws(found, least, events.counts(draws, least, permuted, cells), "block permutation", sentence)


def phase_test(
    values: ArrayLike,
    find: Callable[[np.ndarray], np.ndarray],
    least: int | None = None,
    draws: int = 1_000,
    seed: int = 0,
    together: bool = False,
) -> Synchronization:
    """Against moments of series with the same power spectrum and random phases (see `phase_randomized`).

    The null is of independent, stationary, Gaussian series: heavy tails or a trend may be what the test finds.

    Args:
        values: real, (series, T) or (classes, series, T).
        find: the moments of such an array, (..., T) -> bool of the same shape.
        least: series that a synchronized step takes, 2..series; by default all.
        draws: how many; `find` works on all values each time.
        seed: of the draws.
        together: whether a series has the same change of phases in all classes; by default one in each.

    Raises:
        Incompatible: for other shapes, or if `find` returns one.
    """
    x = np.asarray(values, np.float64)
    x = x[None] if x.ndim == 2 else x
    found = checked(find(x))
    if found.shape != x.shape:
        raise Incompatible(f"find makes {found.shape} of {x.shape}; it must return booleans of the same shape.")
    least = at_least(least, x.shape[1])
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // x.size)
    counts = [
        by_class(find(randomized(x, min(rows, draws - first), rng, together)), least) for first in range(0, draws, rows)
    ]
    sentence = "moments of series of the same power spectrum and random phases" + across(together, len(x))
    return from_draws(found, least, np.concatenate(counts), "phase randomized", sentence)


def paired(observed: ArrayLike, expected: ArrayLike, level: float = 0.05) -> pd.DataFrame:
    """Observed synchronized moments against what the null expects, over classes and runs: paired t-test and Wilcoxon.

    One-sided: more than expected. Classes of one run share its path, so the row over classes and runs counts more than
    there are independent values, and its p-values are too small; the row over runs takes a run's sum as one value.

    Args:
        observed: (runs, classes), such as `np.stack([test.observed for test in tests])`.
        expected: the same of `test.expected`.
        level: the confidence interval of the mean difference covers 1 - level.

    Returns:
        A row over "classes and runs" and one over "runs": n, observed (mean), expected (mean), difference (mean), std,
        low, high, effect (Cohen's d), t, p, p_wilcoxon; NaN where n is below two or all differences are equal.

    Raises:
        Incompatible: if the shapes differ or are not (runs, classes).
    """
    seen, null = np.asarray(observed, np.float64), np.asarray(expected, np.float64)
    if seen.shape != null.shape or seen.ndim != 2:
        raise Incompatible(f"observed {seen.shape} and expected {null.shape} are not both (runs, classes).")
    rows = []
    for over, a, b in (("classes and runs", seen, null), ("runs", seen.sum(axis=1), null.sum(axis=1))):
        test = one_sample(a - b, level=level, alternative="greater")._asdict()
        head = {"over": over, "n": test.pop("n"), "observed": a.mean(), "expected": b.mean()}
        rows.append({**head, "difference": test.pop("mean"), **test})
    return pd.DataFrame(rows)
