"""What is fitted: values without zeros and gaps, and what a reader must know about them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible
from nbdyn.statistics.heavy_tail.dependence import depends

CLEARLY = 1e-3
"""Values depend on each other clearly if the p-value of their independence is below this."""
FEW = 50
"""Fewer values than this bring a warning."""


class Sample(NamedTuple):
    """Values to fit.

    Attributes:
        values: finite and not zero, in their order, float64 (n,).
        zeros: exact zeros, left out.
        missing: NaN and infinite values, left out.
    """

    values: np.ndarray
    zeros: int
    missing: int


def clean(values: ArrayLike, least: int, positive: str = "") -> Sample:
    """Flat values, zeros and what is not finite set apart.

    Args:
        values: real, any shape; what is masked is missing.
        least: values that the fit takes.
        positive: the family, where it takes positive values only.

    Raises:
        Incompatible: if values are complex, too few are left, all are equal, or some are negative where they may not
            be.
    """
    if np.iscomplexobj(values):
        raise Incompatible("the values are complex: give np.abs(values), or the real and imaginary parts, one by one.")
    if isinstance(values, np.ma.MaskedArray):
        values = np.ma.filled(values.astype(np.float64), np.nan)
    given = np.asarray(values, np.float64).reshape(-1)
    finite = given[np.isfinite(given)]
    kept = finite[finite != 0]
    found = Sample(kept, len(finite) - len(kept), len(given) - len(finite))
    if len(kept) < least:
        raise Incompatible(
            f"{len(kept)} values are finite and not zero (zeros {found.zeros}, missing {found.missing}); "
            f"this fit takes {least}."
        )
    if positive and (kept < 0).any():
        raise Incompatible(
            f"{int((kept < 0).sum())} values are negative, and a {positive} has positive ones only; "
            "give np.abs(values), or one tail: values[values > 0]."
        )
    if np.ptp(kept) == 0:
        raise Incompatible(f"all {len(kept)} values are {kept[0]:g}: there is no spread to fit.")
    return found


def remarks(sample: Sample, block: int | None) -> list[str]:
    """Warnings that hold for any fit of the sample."""
    x, found = sample.values, []
    n = len(x)
    if sample.zeros:
        found.append(
            f"{sample.zeros:,} of {n + sample.zeros:,} finite values are exactly zero and set apart: the fit is of the "
            "others."
        )
    if sample.missing:
        found.append(f"{sample.missing:,} values are NaN or infinite and left out.")
    if n < FEW:
        found.append(f"only {n} values: intervals rest on formulas for many, and few alternatives can be told apart.")
    distinct = len(np.unique(x))
    if distinct < 0.9 * n:
        found.append(f"only {distinct:,} of {n:,} values are distinct: the goodness of fit takes them for continuous.")
    p = depends(x) if block is None else 1.0
    if p < CLEARLY:
        found.append(
            f"neighbouring values depend on each other (Ljung-Box on ranks, p = {p:.1g}): intervals are too narrow and "
            "the goodness of fit too strict. Give block=..., or thin(values)."
        )
    if block is not None and block > 1:
        found.append("the goodness of fit takes values for independent; where they are not, its p is too small.")
    return found
