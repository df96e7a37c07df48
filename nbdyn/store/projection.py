"""Seeded random projections of the factors of linear sites: smaller, and approximate in a known way."""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import numpy as np

from nbdyn.store.sites import Site


def is_projected(site: Site) -> bool:
    """Whether the site's factors are stored projected."""
    return "project" in site.options


@functools.lru_cache(maxsize=256)
def matrix(name: str, slot: str, size: int, k: int) -> np.ndarray:
    """The projection of one slot of a site, (size, k) float32 of +-1/sqrt(k); the same wherever the name is the same.

    Its rows have length 1, and rows i != j the inner product 0 +- 1/sqrt(k): for any x, x P P^T is an unbiased
    estimate of x whose element i has the variance sum_{j != i} x_j^2 / k (Achlioptas 2003).
    """
    seed = zlib.crc32(f"{slot} {name}".encode())
    signs = np.random.Generator(np.random.PCG64(seed)).integers(0, 2, (size, k), dtype=np.int8)
    return ((2 * signs - 1) / np.float32(math.sqrt(k))).astype(np.float32)


def stored_width(site: Site, slot: str) -> int:
    """How many numbers a position of a slot has in store."""
    return min(width(site, slot), int(site.options["project"]))


def width(site: Site, slot: str) -> int:
    """How many units a slot of a linear site has."""
    inputs_first = bool(site.options.get("transposed"))
    return site.shape[0 if (slot == "a") == inputs_first else 1]


def expand(site: Site, tensors: dict[str, np.ndarray], columns: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """Estimates (V, T, units) of a site's factors from what is stored of them; of some `columns` only, if given."""
    found = {}
    for slot, values in tensors.items():
        chosen = None if columns is None else columns.get(slot)
        size = width(site, slot)
        if size > int(site.options["project"]):
            p = matrix(site.name, slot, size, int(site.options["project"]))
            found[slot] = values @ (p if chosen is None else p[chosen]).T.astype(values.dtype)
        else:
            found[slot] = values if chosen is None else values[..., chosen]
    return found


def relative_error(site: Site) -> float:
    """sqrt(E|G' - G|^2) / |G| of a visit's gradient G (one position) and its estimate G' from the stored factors.

    >>> site = Site("fc", "fc", "linear", 0, (10, 100), options={"project": 50})
    >>> round(relative_error(site), 3)
    1.407
    """
    k = int(site.options["project"])
    parts = [1 + (width(site, slot) - 1) / k if width(site, slot) > k else 1.0 for slot in ("a", "d")]
    return math.sqrt(math.prod(parts) - 1)
