"""Small tensors that wait for the writer, in memory that is used again and again."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

MOST_KINDS = 64
MOST_BYTES = 64_000_000


class TensorPool:
    """Copies of tensors, kept for their like once they are given back.

    The few hundred bytes that a step leaves would not matter, but where they lie does: taken from the heap between
    training's own tensors, and held for a second, they keep the holes around them from being joined, and the
    process grew by 0.7 MB a step.
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = {}
        self._bytes = 0  # given back and not in use
        self._lock = threading.Lock()

    def copy(self, t: Tensor) -> Tensor:
        """A copy of a tensor, on the host; one on a GPU is only detached."""
        t = t.detach()
        if not t.is_cpu or t.layout != torch.strided:
            return t
        with self._lock:
            free = self._free.get(_kind(t))
            kept = free.pop() if free else None
            self._bytes -= 0 if kept is None else kept.nbytes
        return t.clone(memory_format=torch.contiguous_format) if kept is None else kept.copy_(t)

    def give_back(self, t: Any) -> None:
        """What `copy` returned is not needed any more (called on the writer's thread)."""
        if not isinstance(t, Tensor) or not t.is_cpu:
            return
        with self._lock:
            if self._bytes + t.nbytes <= MOST_BYTES and (_kind(t) in self._free or len(self._free) < MOST_KINDS):
                self._free.setdefault(_kind(t), []).append(t)
                self._bytes += t.nbytes


def _kind(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype
