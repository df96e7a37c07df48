"""Rows of the data set, each distinct one kept once: told apart by the sample's id and two hashes of the content."""

from __future__ import annotations

import functools

import numpy as np

KNOWN_MOST = 2**22
"""So many of the rows stored last are looked for among new ones (100 MB of keys), where a data set has more."""
CHUNK_BYTES = 1_000_000
"""Rows are hashed in chunks that fit a processor's cache: 4 GB/s."""


@functools.lru_cache(maxsize=4)
def _factors(count: int) -> np.ndarray:
    """Odd 64-bit numbers, (2, count), the same everywhere and always: SplitMix64 (Steele et al. 2014) of 1, 2, ..."""
    with np.errstate(over="ignore"):
        z = np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.ascontiguousarray(((z ^ (z >> np.uint64(31))) | np.uint64(1)).reshape(count, 2).T)


def keys_of(samples: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A key for each visit: equal for the same sample and the same bytes, else different but for a chance of 2**-90.

    Two multilinear hashes modulo 2**64 (Lemire and Kaser 2014, arXiv 1202.4961) of the row's 32-bit words, the
    sample's id and the length. The bytes of the words are reversed for one of them: a difference in the high bits
    of a word is weak in one of the two, never in both.

    Args:
        samples: (V,) ids of the samples.
        rows: (V, ...) of any type; its bits are hashed, so that -0.0 differs from 0.0 and NaNs by their payload.

    Returns:
        (V, 2) uint64.
    """
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    if flat.shape[1] % 4:
        flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 4)))
    words = flat.view(np.uint32)
    width = words.shape[1]
    # The factors of the head come first, so that those of a word do not depend on the length.
    factors = _factors(width + 3)
    head = np.empty((len(words), 3), np.uint64)
    head[:, :2] = np.ascontiguousarray(samples, np.int64).view(np.uint32).reshape(-1, 2)
    head[:, 2] = flat.shape[1]
    keys = np.einsum("vw,hw->vh", head, factors[:, :3])
    step = max(1, CHUNK_BYTES // max(1, 8 * width))
    for start in range(0, len(words), step):
        some = words[start : start + step]
        keys[start : start + step, 0] += np.einsum("vw,w->v", some.astype(np.uint64), factors[0, 3:])
        keys[start : start + step, 1] += np.einsum("vw,w->v", some.byteswap().astype(np.uint64), factors[1, 3:])
    return keys


class Distinct:
    """The distinct rows of a stream that are stored already.

    Args:
        table: (n, 3) uint64: the two halves of each key, and the number of the (first) row stored for it.
    """

    def __init__(self, table: np.ndarray) -> None:
        self._table = table[np.argsort(table[:, 0], kind="stable")]

    def place(self, keys: np.ndarray, end: int, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each visit's content lies; contents not yet known are given places from row `end` on.

        Args:
            keys: (V, 2) of the visits.
            end: the number of rows stored.
            height: rows of a visit.

        Returns:
            (V,) the first row of each visit; the visits whose content is new, in order (each content once); and the
            (new, 3) table to store for them.
        """
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        ordered = keys[order]
        fresh = np.ones(len(keys), dtype=bool)
        fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        firsts = order[fresh]  # lexsort is stable: of equal keys the first visit
        rows = self._find(keys[firsts])
        new = np.nonzero(rows < 0)[0]
        new = new[np.argsort(firsts[new])]
        rows[new] = end + height * np.arange(len(new))
        places = np.empty(len(keys), np.int64)
        places[order] = rows[np.cumsum(fresh) - 1]
        table = np.column_stack([keys[firsts[new]], rows[new].astype(np.uint64)])
        self._add(table)
        return places, firsts[new], table

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each known key, -1 for others."""
        rows = np.full(len(keys), -1, np.int64)
        place = np.searchsorted(self._table[:, 0], keys[:, 0])
        waiting = np.arange(len(keys))
        while len(waiting):  # more than once only where first halves collide
            waiting = waiting[place[waiting] < len(self._table)]
            found = self._table[place[waiting]]
            alike = found[:, 0] == keys[waiting, 0]
            waiting, found = waiting[alike], found[alike]
            same = found[:, 1] == keys[waiting, 1]
            rows[waiting[same]] = found[same, 2].astype(np.int64)
            waiting = waiting[~same]
            place[waiting] += 1
        return rows

    def _add(self, table: np.ndarray) -> None:
        both = np.concatenate([self._table, table[np.argsort(table[:, 0], kind="stable")]])
        if len(both) > KNOWN_MOST:
            both = both[np.sort(np.argsort(both[:, 2], kind="stable")[-KNOWN_MOST:])]
        self._table = both[np.argsort(both[:, 0], kind="stable")]  # a merge: both parts are sorted
