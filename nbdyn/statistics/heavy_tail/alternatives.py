"""Other distributions of the same values, and what their likelihoods say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from nbdyn.statistics.heavy_tail.ecf import STABLE
from nbdyn.statistics.heavy_tail.family import Family
from nbdyn.statistics.heavy_tail.likelihood import DOUBLE_WEIBULL, LOGNORMAL, PARETO, STUDENT, WEIBULL
from nbdyn.statistics.heavy_tail.result import UNDECIDED, Distribution


@dataclass(frozen=True)
class Alternative:
    """Another distribution fitted to the same values.

    Attributes:
        name: of its family.
        law: the `Distribution`, as fitted (Any, for SciPy's types say that it might be discrete).
        parameters: how many were fitted.
        nested: "" if it is no special case of the fit; "inside" if it is one in the range of parameters, "edge" if at
            the end of that range.
    """

    name: str
    law: Any
    parameters: int
    nested: str = ""


def ranking(
    values: np.ndarray, law: Distribution, parameters: int, others: Sequence[Alternative]
) -> tuple[pd.DataFrame, Mapping[str, Distribution]]:
    """The fit against others by likelihood, the nearest first: the table of `TailFit.alternatives`, and the laws.

    R is the sum of differences l of log densities. Not nested: R / (sqrt(n) sd(l)) is standard normal if both are
    equally far from the truth (Vuong 1989, theorem 5.1), p two-sided. Nested: 2 R is chi-squared of the parameters'
    difference (Wilks 1938); at the edge it is so half of the times and 0 else (Self and Liang 1987). `aic` is the
    alternative's less the fit's: above 0 the fit is preferred. A law that has no density at a value has lost: R is
    infinite.
    """
    rows, n = [], len(values)
    own = law.logpdf(values)
    for other in others:
        theirs = other.law.logpdf(values)
        # Where neither has a density, neither is better.
        differences = np.subtract(own, theirs, out=np.zeros(n), where=own != theirs)
        total = float(differences.sum())
        spread = float(differences.std()) if math.isfinite(total) else math.inf
        if other.nested:
            statistic = 2 * max(total, 0.0)
            p = float(stats.chi2.sf(statistic, parameters - other.parameters))
            p = p / 2 if other.nested == "edge" and statistic > 0 else p
        else:
            statistic = total if spread == math.inf else total / (math.sqrt(n) * spread) if spread > 0 else 0.0
            p = float(2 * stats.norm.sf(abs(statistic)))
        verdict = "undecided" if not p < UNDECIDED else "fit" if total > 0 else "alternative"
        rows.append({
            "alternative": other.name, "R": total, "statistic": statistic, "p": p, "n": n, "nested": bool(other.nested),
            "verdict": verdict, "aic": 2 * total + 2 * (other.parameters - parameters),
        })  # fmt: skip
    table = pd.DataFrame(rows, columns=["alternative", "R", "statistic", "p", "n", "nested", "verdict", "aic"])
    return table.sort_values("R", ignore_index=True), {other.name: other.law for other in others}


def of_signed(ordered: np.ndarray, name: str) -> list[Alternative]:
    """What values of either sign are compared with, but for the family itself.

    Args:
        ordered: (n,), sorted upwards.
        name: of the family that was fitted.
    """
    row, x = ordered[None], ordered
    centre = 0.0 if name == DOUBLE_WEIBULL.name else float(np.median(x))
    # A double Weibull of shape 1 is a Laplace; SciPy's own has no density below exp(-745).
    laplace = stats.dweibull(1.0, centre, float(np.abs(x - centre).mean()))
    found = [
        Alternative("normal", stats.norm(x.mean(), _size(x - x.mean())), 2, "edge" if name == STUDENT.name else "")
    ]
    if name == DOUBLE_WEIBULL.name:
        found.append(Alternative("Laplace", laplace, 1, "inside"))
    else:
        found.append(Alternative("Laplace", laplace, 2))
    return found + _fitted(row, name, STUDENT, DOUBLE_WEIBULL, STABLE)


def of_positive(ordered: np.ndarray, name: str) -> list[Alternative]:
    """What positive values are compared with, but for the family itself; as `of_signed`."""
    row, x = ordered[None], ordered
    shape, _, scale = stats.gamma.fit(x, floc=0)
    within = "inside" if name in (WEIBULL.name, PARETO.name) else ""
    found = [
        Alternative("exponential", stats.expon(scale=x.mean()), 1, within),
        Alternative("half-normal", stats.halfnorm(scale=_size(x)), 1),
        Alternative("gamma", stats.gamma(shape, scale=scale), 2),
    ]
    return found + _fitted(row, name, LOGNORMAL, WEIBULL, PARETO)


def _size(x: np.ndarray) -> float:
    """The root of the mean square, without overflow."""
    top = float(np.abs(x).max())
    return top * math.sqrt(float(np.square(x / top).mean()))


def _fitted(row: np.ndarray, name: str, *kinds: Family) -> list[Alternative]:
    """The families but one, fitted to (1, n); without those that too few values, or equal ones, have no fit of."""
    fits = [(kind, kind.fit(row)[0]) for kind in kinds if kind.name != name]
    return [Alternative(kind.name, kind.law(found), len(found)) for kind, found in fits if np.isfinite(found).all()]
