"""Captured tensors on their way to the writer: kept as they are, or copied into reused host memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 16_000_000
ALIGNMENT = 64


@dataclass(slots=True, eq=False)
class Chunk:
    """A piece of memory, (bytes,) uint8; `holders`: how many step records have tensors in it."""

    memory: Tensor
    used: int = 0
    holders: int = 0


class Arena:
    """Hands out memory one tensor after the other; a chunk is used again once no record holds it.

    Reuse matters as for `RowBlocks`: fresh memory costs a page fault every 4 KB, more than the copy itself.

    Args:
        device: where the tensors come from. From a GPU they travel on a stream of their own into pinned memory;
            training waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Chunk] = []
        self._touched: list[Chunk] = []
        self._current: Chunk | None = None
        self._lock = threading.Lock()

    def keep(self, t: Tensor, own: bool) -> Tensor:
        """A tensor's values for the writer, contiguous: complete at once, from a GPU after `event`.

        Args:
            t: the tensor.
            own: nobody else will change it: on the host it is kept as it is, where others are copied.
        """
        t = t.detach()
        if own and self._side is None and t.is_contiguous():
            t.nbdyn_version = t._version  # type: ignore[attr-defined]
            return t
        size = t.numel() * t.element_size()
        chunk = self._room(size)
        host = chunk.memory[chunk.used : chunk.used + size].view(t.dtype).view(t.shape)
        chunk.used += -(-size // ALIGNMENT) * ALIGNMENT
        if self._side is None or not t.is_cuda:
            return host.copy_(t)
        self._side.wait_stream(torch.cuda.current_stream(t.device))
        with torch.cuda.stream(self._side):
            host.copy_(t, non_blocking=True)
        t.record_stream(self._side)
        return host

    def _room(self, size: int) -> Chunk:
        chunk = self._current
        if chunk is None or chunk.used + size > len(chunk.memory):
            with self._lock:
                if chunk is not None and not chunk.holders:
                    self._reuse(chunk)
                chunk = self._current = self._take(size)
        if not self._touched or self._touched[-1] is not chunk:
            with self._lock:  # held from the first tensor on: the writer may release earlier records meanwhile
                chunk.holders += 1
            self._touched.append(chunk)
        return chunk

    def _take(self, size: int) -> Chunk:
        for place, chunk in enumerate(self._free):
            if len(chunk.memory) >= size:
                return self._free.pop(place)
        size = max(CHUNK_BYTES, -(-size // ALIGNMENT) * ALIGNMENT)
        return Chunk(torch.empty(size, dtype=torch.uint8, pin_memory=self._side is not None))

    def _reuse(self, chunk: Chunk) -> None:
        chunk.used = 0
        self._free.append(chunk)

    def hold(self) -> list[Chunk]:
        """The chunks that tensors were kept in since the last call; whoever gets them must `release` them."""
        touched, self._touched = self._touched, []
        return touched

    def event(self) -> Any:
        """What to wait for before tensors kept so far are read; None where they are complete."""
        return None if self._side is None else self._side.record_event()

    def release(self, chunks: list[Chunk]) -> None:
        """A record's tensors are written (called on the writer's thread)."""
        with self._lock:
            for chunk in chunks:
                chunk.holders -= 1
                if not chunk.holders and chunk is not self._current:
                    self._reuse(chunk)


def was_changed(t: Tensor) -> bool:
    """Whether a tensor that was kept as it is has been changed in place since."""
    return getattr(t, "nbdyn_version", t._version) != t._version
