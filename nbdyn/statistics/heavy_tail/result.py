"""The result of a fit: estimates with intervals, goodness of fit, the ranking of alternatives, and its next steps."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from nbdyn.errors import UnknownName, did_you_mean

PLAUSIBLE = 0.1
"""A fit is called ruled out if p is at most this, a convention (Clauset, Shalizi and Newman 2009, section 4.1). As p is
(1 + k) / (1 + B), a true law is ruled out in one of ten samples if 1 + B is a multiple of 10, as of B = 199."""
UNDECIDED = 0.1
"""A difference in likelihood decides if its p-value is below this (the same, section 5)."""


class Estimate(NamedTuple):
    """A parameter of a fit.

    Attributes:
        value: the point estimate.
        low: lower end of its 95 % confidence interval; NaN where none was asked for.
        high: upper end.
        interval: how the interval was got: "asymptotic", "bootstrap, 200 replicates", "block bootstrap, blocks of 12";
            or why there is none.
    """

    value: float
    low: float
    high: float
    interval: str

    def __str__(self) -> str:
        """Such as "1.50 (1.46 to 1.54)"; the value alone where there is no interval."""
        ends = "" if math.isnan(self.low) else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.value:.4g}{ends}"


class Distribution(Protocol):
    """What a fit needs of its distribution; scipy's frozen distributions are such."""

    def logpdf(self, x: Any) -> Any:
        """The logarithm of the density."""
        ...

    def sf(self, x: Any) -> Any:
        """P(X > x)."""
        ...

    def ppf(self, q: Any) -> Any:
        """The x with P(X <= x) = q."""
        ...

    def rvs(self, size: Any = 1, random_state: Any = None) -> Any:
        """Random numbers."""
        ...


@dataclass(frozen=True, eq=False)
class TailFit:
    """A distribution fitted to a sample, or to its tail.

    Attributes:
        family: "power law", "Weibull", "double Weibull", "stable", "generalized Pareto", "Student t", ...
        method: how it was fitted, with the source.
        estimates: parameter -> estimate; the first is the one that the fit is about ("alpha").
        distribution: the fitted distribution of the values in the fit (of the tail's, where there is a threshold).
        values: what was fitted, whole: finite and not zero, sorted upwards, float64 (n,).
        xmin: the threshold of the tail; None where all values are in the fit.
        n_tail: values in the fit.
        zeros: exact zeros, counted and set apart.
        missing: NaN and infinite values, left out.
        ks: Kolmogorov-Smirnov distance of the fitted values from the fit.
        p: goodness of fit: the chance of a distance as large if the fit were true; NaN if not asked for.
        null: the null of p, in words, with the number of replicates.
        alternatives: one row for each other distribution on the same values: alternative, R (log likelihood ratio, the
            fit's less the alternative's, in nats), statistic (normalized), p, n, nested, verdict ("fit", "alternative",
            "undecided"); most fits add aic (the alternative's less the fit's).
        warnings: what a reader must know, in plain words.
        others: the fitted distributions of the alternatives, by the names in `alternatives`; for pictures.
    """

    family: str
    method: str
    estimates: Mapping[str, Estimate]
    distribution: Distribution
    values: np.ndarray
    xmin: float | None
    n_tail: int
    zeros: int
    missing: int
    ks: float
    p: float
    null: str
    alternatives: pd.DataFrame
    warnings: tuple[str, ...] = ()
    others: Mapping[str, Distribution] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Estimate:
        """An estimate by its name.

        Raises:
            UnknownName: if there is none of this name.
        """
        if name not in self.estimates:
            raise UnknownName(f"no estimate {name!r} of a {self.family} fit: {did_you_mean(name, self.estimates)}")
        return self.estimates[name]

    @property
    def tail(self) -> np.ndarray:
        """The values that are in the fit, sorted upwards, (n_tail,)."""
        return self.values[len(self.values) - self.n_tail :]

    def frame(self) -> pd.DataFrame:
        """One row an estimate: family, parameter, value, low, high, interval, n, n_tail, xmin, zeros, missing, ks, p.

        The fields are those of the fit, `n` all values.
        """
        rest = {
            "n": len(self.values), "n_tail": self.n_tail, "xmin": math.nan if self.xmin is None else self.xmin,
            "zeros": self.zeros, "missing": self.missing, "ks": self.ks, "p": self.p, "null": self.null,
        }  # fmt: skip
        rows = [{"family": self.family, "parameter": name, **e._asdict(), **rest} for name, e in self.estimates.items()]
        return pd.DataFrame(rows)

    def methods(self) -> str:
        """Sentences for a paper: what was fitted to what and how, estimates, goodness of fit, alternatives."""
        apart = [
            f"{count:,} {name}" for name, count in (("exact zeros", self.zeros), ("missing", self.missing)) if count
        ]
        which = f"{len(self.values):,} values"
        if self.xmin is not None:
            which = f"the {self.n_tail:,} of {which} beyond {self.xmin:.4g}"
        which += f" ({' and '.join(apart)} set apart)" if apart else ""
        found = "; ".join(f"{name} = {e} ({e.interval})" for name, e in self.estimates.items())
        return (
            f"A {self.family} distribution was fitted to {which} by {self.method}. Estimates with 95 % intervals: "
            f"{found}. The Kolmogorov-Smirnov distance is {self.ks:.3g}{self._goodness()}.{self._against()}"
        )

    def _goodness(self) -> str:
        if math.isnan(self.p):
            return f", without a goodness of fit ({self.null})"
        return f", p = {self.p:.2g} (null: {self.null})"

    def _against(self) -> str:
        """Which alternatives the likelihoods are for, against, or cannot tell."""
        words = {
            "alternative": "likelihood prefers over the fit:", "undecided": "likelihood cannot tell from the fit:",
            "fit": "likelihood prefers the fit over:",
        }  # fmt: skip
        parts = []
        for verdict, sentence in words.items():
            rows = self.alternatives[self.alternatives["verdict"] == verdict]
            if len(rows):
                listed = ", ".join(
                    f"{name} (R = {ratio:.3g}, p = {p:.2g})"
                    for name, ratio, p in zip(rows["alternative"], rows["R"], rows["p"], strict=True)
                )
                parts.append(f" Distributions that {sentence} {listed}.")
        test = " (Normalized log likelihood ratios, Vuong 1989; nested ones by chi-squared.)" if parts else ""
        return "".join(parts) + test

    def verdict(self) -> str:
        """What the fit carries, in a line: "plausible", "ruled out", and which alternatives are better or as good."""
        fit = "not tested" if math.isnan(self.p) else "ruled out" if self.p <= PLAUSIBLE else "plausible"
        by = {
            verdict: ", ".join(self.alternatives["alternative"][self.alternatives["verdict"] == verdict])
            for verdict in ("alternative", "undecided")
        }
        parts = [fit]
        parts += [f"better: {by['alternative']}"] if by["alternative"] else []
        parts += [f"as good: {by['undecided']}"] if by["undecided"] else []
        return "; ".join(parts)

    def plot(self) -> Any:
        """The tail on logarithmic axes with the fit and its alternatives, quantiles against quantiles, a Hill plot."""
        from nbdyn.statistics.heavy_tail import figures

        return figures.overview(self)

    def __repr__(self) -> str:
        name, first = next(iter(self.estimates.items()))
        tail = "" if self.xmin is None else f"{self.n_tail:,} beyond {self.xmin:.4g} of "
        p = "" if math.isnan(self.p) else f", p = {self.p:.2g}"
        warned = f"; warnings: {len(self.warnings)}" if self.warnings else ""
        return (
            f"<TailFit {self.family}, {tail}{len(self.values):,} values: {name} = {first}, "
            f"KS {self.ks:.3g}{p}: {self.verdict()}{warned}>"
        )

    def _repr_html_(self) -> str:
        shown = self.frame()[["parameter", "value", "low", "high", "interval"]]
        tables = [
            table.to_html(index=False, border=0, float_format="%.4g", na_rep="") for table in (shown, self.alternatives)
        ]
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.warnings)
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{''.join(tables)}<ul>{notes}</ul>"
