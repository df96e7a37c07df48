"""Factors kept in memory once they were read whole, so that the next question about them need not read them again."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.settings import options, parse_size
from nbdyn.store.factors import Block

if TYPE_CHECKING:
    from nbdyn.store.factors import Factors


class Warm:
    """The blocks of some sites, those asked for last, up to `nbdyn.options.cache` bytes.

    What was committed of a run never changes, so that nothing kept here grows stale.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        self._kept: OrderedDict[int, tuple[int, int, list[Block]]] = OrderedDict()
        self._finite: dict[int, bool] = {}
        self._asked: set[int] = set()

    def holds(self, site: int, start: int, stop: int) -> bool:
        """Whether the visits of a site at steps start <= t < stop are in memory."""
        kept = self._kept.get(site)
        return kept is not None and kept[0] <= start and stop <= kept[1]

    def blocks(self, site: int, start: int, stop: int) -> Iterator[Block]:
        """`Factors.blocks` of whole tensors and all samples; in as few blocks as there are kinds of calls, if they fit.

        Raises:
            CorruptRun: if the run is damaged.
        """
        self._asked.add(site)
        if not self.holds(site, start, stop):
            if self._factors.nbytes(site, start, stop) > cache_bytes():
                yield from self._factors.blocks(site, start, stop)
                return
            self._read(site, start, stop)
        self._kept.move_to_end(site)
        for block in self._kept[site][2]:
            rows = slice(*np.searchsorted(block.step, [start, stop]).tolist())
            if rows.stop > rows.start:
                yield block.take(rows)

    def was_asked(self, site: int) -> bool:
        """Whether a site was asked for before; it is from now on."""
        known = site in self._asked
        self._asked.add(site)
        return known

    def is_finite(self, site: int) -> bool:
        """Whether the blocks kept of a site hold no NaN and no infinity; looked at once."""
        if site not in self._finite:
            tensors = [x for block in self._kept[site][2] for x in block.tensors.values() if x.dtype.kind == "f"]
            # Sums by column: a NaN or an infinity stays in them, and they overflow for nothing smaller than 1e33.
            self._finite[site] = all(bool(np.isfinite(x.sum(axis=0, dtype=np.float64)).all()) for x in tensors)
        return self._finite[site]

    def _read(self, site: int, start: int, stop: int) -> None:
        self._kept.pop(site, None)
        self._finite.pop(site, None)
        found = _merged(list(self._factors.blocks(site, start, stop)))
        self._kept[site] = (start, stop, found)
        sizes = {number: _nbytes(blocks) for number, (_, _, blocks) in self._kept.items()}
        while sum(sizes.values()) > cache_bytes() and len(sizes) > 1:
            number, _ = self._kept.popitem(last=False)
            self._finite.pop(number, None)
            del sizes[number]


def cache_bytes() -> int:
    """How much may be kept: `nbdyn.options.cache`, but no more than an eighth of the machine's memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return parse_size(options.cache)
    return min(parse_size(options.cache), memory // 8)


def _nbytes(blocks: list[Block]) -> int:
    return sum(x.nbytes for block in blocks for x in block.tensors.values())


def _merged(blocks: list[Block]) -> list[Block]:
    """Blocks of the same call and shapes joined, in the order of steps; the parts are let go of one by one."""
    kinds: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        shapes = tuple((slot, x.shape[1:], x.dtype.str) for slot, x in block.tensors.items())
        kinds.setdefault((block.call, shapes), []).append(block)
    blocks.clear()
    return [_joined(parts) if len(parts) > 1 else parts[0] for parts in kinds.values()]


def _joined(parts: list[Block]) -> Block:
    tensors = {slot: np.concatenate([part.tensors.pop(slot) for part in parts]) for slot in list(parts[0].tensors)}
    step, position, sample, factor = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("step", "position", "sample", "factor")
    )
    return Block(parts[0].site, parts[0].call, step, position, sample, factor, tensors)
