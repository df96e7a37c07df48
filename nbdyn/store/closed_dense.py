"""Sites whose contributions are stored themselves: g (V, n), the columns of `site.ranges` side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store.closed_tools import Tensors, Tile, chunks, picker
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from torch import Tensor


def total(site: Site, t: Tensors) -> Tensor:
    """Sum over the visits, (n,)."""
    return t["g"].sum(0)


def starts(site: Site) -> np.ndarray:
    """The first column of each range, and the end of the last."""
    return np.cumsum([0, *(size for _, size in site.ranges)])


def run_cells(site: Site, t: Tensors, number: int, places: np.ndarray) -> Tensor:
    """Contributions (V, k) to chosen parameters of one range."""
    return t["g"][:, picker(places + starts(site)[number], site.size)].clone()


def tiles(site: Site, t: Tensors) -> Iterator[Tile]:
    """All cells: the tensor itself, range by range."""
    for first, (_, size) in zip(starts(site)[:-1].tolist(), site.ranges, strict=True):
        for visits in chunks(len(t["g"]), size * t["g"].element_size()):
            yield visits, slice(first, first + size), t["g"][visits, first : first + size]
