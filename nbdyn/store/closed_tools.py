"""What the closed forms share: a block's tensors as torch's, tiles of bounded memory, ragged products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from nbdyn.store.factors import Block

TILE_BYTES = 64_000_000
"""Temporaries are cut into tiles of about this size."""

Tensors = dict[str, Any]
"""Slot -> torch tensor of a block, visits first; the gradient's slot is multiplied by the block's factors."""

Tile = tuple[slice, slice, Any]
"""(visits, places in the order of site.indices(), their contributions (visits, places)); all in one tensor."""


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Arithmetic in the tensors' own precision, whatever the notebook has switched on around it."""
    import torch

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def tensors_of(block: Block, dtype: np.dtype | type | None = None) -> Tensors:
    """A block's tensors, in one floating dtype (`dtype`, by default the widest among them), times its factors."""
    import torch

    found = {slot: torch.from_numpy(writable(array)) for slot, array in block.tensors.items()}
    floating = [t.dtype for t in found.values() if t.is_floating_point()]
    wide = torch.float64 if torch.float64 in floating or dtype == np.float64 else torch.float32
    found = {slot: t.to(wide) if t.is_floating_point() else t for slot, t in found.items()}
    if (block.factor != 1.0).any():
        slot = "g" if "g" in found else "d"
        factor = torch.from_numpy(writable(block.factor)).to(wide)
        found[slot] = found[slot] * factor.reshape(-1, *[1] * (found[slot].ndim - 1))
    return found


def writable(array: np.ndarray) -> np.ndarray:
    """The array, or a copy where it may not be written: torch warns about memory that it could change."""
    return array if array.flags.writeable else array.copy()


def chunks(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of 0..count whose items together stay below TILE_BYTES, or are one; a single empty one for none.

    >>> list(chunks(5, 30_000_000))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = max(1, TILE_BYTES // max(1, bytes_each))
    for start in range(0, max(count, 1), size):
        yield slice(start, min(count, start + size))


def filled(tiles: Iterable[Tile], empty: Callable[..., Any], visits: int, width: int) -> Any:
    """Tiles put into one tensor (visits, width) that `empty` makes; a tile that is all of it is not copied."""
    out = None
    for rows, columns, values in tiles:
        if values.shape == (visits, width):
            return values
        out = empty(visits, width) if out is None else out
        out[rows, columns] = values
    return empty(visits, width) if out is None else out


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For items that own counts[i] things each: the owner of every thing, and its number among the owner's.

    >>> import torch
    >>> expand(torch.tensor([2, 0, 3]))
    (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    import torch

    owner = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    before = torch.cumsum(counts, 0) - counts
    return owner, torch.arange(len(owner), device="cpu") - before[owner]


def used_of(numbers: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers among some below `size`, sorted, and where each lies: np.unique, 30 times faster.

    >>> used_of(np.array([7, 2, 7]), 9)
    (array([2, 7]), array([1, 0, 1]))
    """
    there = np.zeros(size, dtype=bool)
    there[numbers] = True
    return np.nonzero(there)[0], (np.cumsum(there) - 1)[numbers]


def picker(places: np.ndarray, size: int) -> slice | Tensor:
    """An index for torch: a slice where the places are consecutive, for that copies nothing."""
    import torch

    if len(places) and places[-1] - places[0] == len(places) - 1 and (np.diff(places) == 1).all():
        first = int(places[0])
        return slice(None) if len(places) == size else slice(first, first + len(places))
    return torch.from_numpy(places)
