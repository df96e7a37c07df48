"""Heavy tails: distributions fitted to samples or their tails, with intervals, goodness of fit and alternatives.

from nbdyn.statistics import heavy_tail as ht

fit = ht.stable(values)             # a TailFit: fit["alpha"], fit.p, fit.alternatives, fit.warnings
fit.plot(), fit.methods()           # pictures; sentences for a paper

power_law                           a power law beyond a threshold that is found (Clauset, Shalizi, Newman)
stable, student_t, double_weibull   values of either sign
weibull, lognormal                  positive values
generalized_pareto, hill, moment_estimator   the largest values
log_moments                         the estimator of papers on gradient noise, beside its null
FAMILIES                            the fits of whole laws by name: FAMILIES["Student t"](values)
autocorrelation_time, thin          values that depend on their neighbours
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nbdyn.statistics.heavy_tail.dependence import AutocorrelationTime, autocorrelation_time, thin
from nbdyn.statistics.heavy_tail.extremes import generalized_pareto
from nbdyn.statistics.heavy_tail.hill import hill, hill_path, moment_estimator, moment_path
from nbdyn.statistics.heavy_tail.log_moments import LogMoments, log_moments
from nbdyn.statistics.heavy_tail.lognormal import lognormal
from nbdyn.statistics.heavy_tail.power_law import power_law
from nbdyn.statistics.heavy_tail.result import Distribution, Estimate, TailFit
from nbdyn.statistics.heavy_tail.stable import SymmetricStable, stable, stable_index, stable_sample
from nbdyn.statistics.heavy_tail.student import student_t
from nbdyn.statistics.heavy_tail.weibull import double_weibull, weibull

FAMILIES: Mapping[str, Callable[..., TailFit]] = MappingProxyType(
    {
        "power law": power_law,
        "stable": stable,
        "Student t": student_t,
        "double Weibull": double_weibull,
        "Weibull": weibull,
        "lognormal": lognormal,
        "generalized Pareto": generalized_pareto,
    }
)
"""The name of a family, as `TailFit.family` has it -> the function that fits it: f(values, **options) -> TailFit."""

__all__ = [
    "FAMILIES",
    "AutocorrelationTime",
    "Distribution",
    "Estimate",
    "LogMoments",
    "SymmetricStable",
    "TailFit",
    "autocorrelation_time",
    "double_weibull",
    "generalized_pareto",
    "hill",
    "hill_path",
    "log_moments",
    "lognormal",
    "moment_estimator",
    "moment_path",
    "power_law",
    "stable",
    "stable_index",
    "stable_sample",
    "student_t",
    "thin",
    "weibull",
]
