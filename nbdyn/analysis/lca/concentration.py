"""Do few parameters do most of the work? Gini coefficients, shares of the largest, heavy tails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible

GAUSSIAN_GINI = math.sqrt(2) - 1
"""The Gini coefficient of |x| of a Gaussian of mean 0."""


def gini(amounts: ArrayLike) -> float:
    """The Gini coefficient: 0 if all amounts are equal, 1 - 1/n if one has all; NaN of nothing.

    sum_i (2 i - n - 1) x_(i) / (n sum x), x ascending, i from 1.

    Args:
        amounts: not negative, taken flat.

    Raises:
        Incompatible: if an amount is negative, infinite or NaN.

    >>> gini([0.0, 0.0, 0.0, 2.0]), gini([1.0, 1.0])
    (0.75, 0.0)
    """
    x = np.sort(_amounts(amounts))
    n, total = len(x), float(x.sum())
    return float((2 * np.arange(1, n + 1) - n - 1) @ x) / (n * total) if total else math.nan


def share_of_top(amounts: ArrayLike, percent: float) -> float:
    """The share of the sum that the largest `percent` % have (their number rounded up); NaN of nothing.

    Args:
        amounts: not negative, taken flat.
        percent: above 0, up to 100.

    Raises:
        Incompatible: if an amount is negative, infinite or NaN, or the percent is out of range.

    >>> share_of_top([1.0, 1.0, 2.0, 4.0], 25)
    0.5
    """
    if not 0 < percent <= 100:
        raise Incompatible(f"the top {percent} % of parameters: give a percentage above 0, up to 100.")
    x = np.sort(_amounts(amounts))[::-1]
    total = float(x.sum())
    number = math.ceil(round(len(x) * percent / 100, 9))
    return float(x[:number].sum()) / total if total else math.nan


def fraction_doing(amounts: ArrayLike, share: float = 0.9) -> float:
    """The smallest fraction of the parameters that has at least `share` of the sum; NaN of nothing.

    Args:
        amounts: not negative, taken flat.
        share: above 0, up to 1.

    Raises:
        Incompatible: if an amount is negative, infinite or NaN, or the share is out of range.

    >>> fraction_doing([1.0, 1.0, 2.0, 4.0], 0.75)
    0.5
    """
    if not 0 < share <= 1:
        raise Incompatible(f"a share of {share}: give one above 0, up to 1.")
    x = np.sort(_amounts(amounts))[::-1]
    done = np.cumsum(x)
    if not len(x) or not done[-1]:
        return math.nan
    enough = share * done[-1] * (1 - 1e-12)  # rounding of the sum must not ask for one more
    return (int(np.searchsorted(done, enough)) + 1) / len(x)


def concentration(totals: ArrayLike, top: Sequence[float] = (1, 10)) -> pd.DataFrame:
    """How the help and the hurt that parameters did are spread over them.

    Args:
        totals: allocation of each parameter summed over steps, in nats, taken flat: below 0 it helped.
        top: percentages, one column each.

    Returns:
        Rows "helped" and "hurt": amount (nats, positive), n (parameters), nonzero (those with an amount), gini (over
        all n), gini_nonzero, gini_gaussian (0.414: what `gini_nonzero` is if totals are Gaussian of mean 0),
        top_<x>_percent (share of the amount that the x % of all n with the largest have), fraction_90 (of all n that
        has 90 % of the amount).

    Raises:
        Incompatible: if a total is infinite or NaN.
    """
    a = np.asarray(totals, np.float64).reshape(-1)
    rows = []
    for side, sign in (("helped", -1.0), ("hurt", 1.0)):
        amounts = np.maximum(sign * a, 0.0)
        row = {
            "side": side, "amount": float(amounts.sum()), "n": len(a), "nonzero": int((amounts > 0).sum()),
            "gini": gini(amounts), "gini_nonzero": gini(amounts[amounts > 0]), "gini_gaussian": GAUSSIAN_GINI,
        }  # fmt: skip
        row |= {f"top_{percent:g}_percent": share_of_top(amounts, percent) for percent in top}
        rows.append({**row, "fraction_90": fraction_doing(amounts)})
    return pd.DataFrame(rows)


def tail_share(values: ArrayLike, kappas: Sequence[float] = (2.0, 3.0)) -> pd.DataFrame:
    """How much of the sum of |a| is in the tails, compared with a Gaussian: the tail ratio R.

    R(kappa) = [sum of |a| over |a| > kappa sigma / sum of |a|] / exp(-kappa^2 / 2), the latter being a Gaussian's share
    exactly: R = 1 if allocations are Gaussian of mean 0. Zeros are no part of it; sigma is the root mean square of the
    others. (LCA, section 4, says "about three times"; its cut-off is unknown.)

    Args:
        values: single allocations, any shape, taken flat; or a sample of them.
        kappas: where tails begin, in sigma; not negative.

    Returns:
        By kappa: share, gaussian_share (the null), ratio, n (non-zero values), zeros, sigma.

    Raises:
        Incompatible: if a value is infinite or NaN, or a kappa negative.
    """
    a = np.abs(np.asarray(values)).reshape(-1)
    zeros = int((a == 0).sum())
    a = _amounts(a[a != 0])
    if min(kappas, default=0.0) < 0:
        raise Incompatible(f"kappa = {min(kappas)}: tails begin at 0 sigma or more.")
    largest = float(a.max(initial=0.0))
    sigma = largest * math.sqrt(float(np.square(a / largest).mean())) if len(a) else math.nan  # no underflow
    rows = []
    for kappa in kappas:
        share = float(a[a > kappa * sigma].sum() / a.sum()) if len(a) else math.nan
        normal = math.exp(-(kappa**2) / 2)
        rows.append({"kappa": float(kappa), "share": share, "gaussian_share": normal, "ratio": share / normal})
    return pd.DataFrame(rows).assign(n=len(a), zeros=zeros, sigma=sigma)


def _amounts(amounts: ArrayLike) -> np.ndarray:
    """Flat float64."""
    x = np.asarray(amounts, np.float64).reshape(-1)
    off = x[~((x >= 0) & np.isfinite(x))]
    if len(off):
        raise Incompatible(f"{len(off)} amounts such as {off[0]:g} are negative or not finite; leave them out.")
    return x
