"""Moments of learning: the steps at which a series of allocations falls furthest (LCA, arXiv 1909.01440, section 5)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible


def moments(series: ArrayLike, top: int = 20) -> np.ndarray:
    """Where a series of allocations has its deepest strict local minima: a[t] < a[t-1], a[t] < a[t+1] and a[t] < 0.

    Ends are no minima, so moments are in 1..T-2. Of equal depth the earlier comes first. NaN is never a moment.

    Args:
        series: sums of allocations a step, (..., T), in nats, such as (layers, T) or (classes, layers, T).
        top: the number of minima that are kept a series, those of the largest |a|; fewer if there are fewer.

    Returns:
        bool, the shape of `series`.

    Raises:
        Incompatible: if `top` is below 1 or the series has no axis.

    >>> moments([0.0, -3.0, -1.0, -2.0, 0.0, -1.0, 0.0], top=2).nonzero()[0].tolist()
    [1, 3]
    """
    a = _series(series)
    return _largest(-a, _peaks(-a) & (a < 0), top)


def peaks(series: ArrayLike, top: int = 20) -> np.ndarray:
    """Where a series such as a layer's norm has its highest strict local maxima: a[t] > a[t-1] and a[t] > a[t+1].

    Args:
        series: (..., T), such as norms of gradients or motion by layer.
        top: the number of maxima that are kept a series, the largest; fewer if there are fewer.

    Returns:
        bool, the shape of `series`.

    Raises:
        Incompatible: if `top` is below 1 or the series has no axis.

    >>> peaks([0.0, 3.0, 1.0, 2.0, 0.0, 1.0, 0.0], top=2).nonzero()[0].tolist()
    [1, 3]
    """
    a = _series(series)
    return _largest(a, _peaks(a), top)


def _series(series: ArrayLike) -> np.ndarray:
    """As floats, so that integers may be negated."""
    a = np.asarray(series)
    if a.ndim == 0:
        raise Incompatible("a series has an axis of steps; a single number has no moments.")
    return a if np.issubdtype(a.dtype, np.floating) else a.astype(np.float64)


def _peaks(a: np.ndarray) -> np.ndarray:
    """Where a is larger than both its neighbours."""
    found = np.zeros(a.shape, bool)
    if a.shape[-1] > 2:
        found[..., 1:-1] = (a[..., 1:-1] > a[..., :-2]) & (a[..., 1:-1] > a[..., 2:])
    return found


def _largest(a: np.ndarray, among: np.ndarray, top: int) -> np.ndarray:
    """The `top` largest a of those `among` along the last axis."""
    if top < 1:
        raise Incompatible(f"top = {top}: give the number of moments to keep, 1 or more.")
    order = np.argsort(np.where(among, -a, np.inf), axis=-1, kind="stable")[..., :top]
    found = np.zeros(a.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found & among
