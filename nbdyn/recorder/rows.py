"""Rows of flat vectors (weights, gradients) copied out of the model into reused blocks of host memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from nbdyn.recorder import foreach


@dataclass(slots=True)
class Block:
    """Consecutive rows, (rows, parameters); `views[r]` are the tensors of row r, shaped like the model's."""

    values: np.ndarray
    views: list[list[torch.Tensor]] = field(default_factory=list)
    used: int = 0


class RowBlocks:
    """Hands out rows to copy into, in blocks of `per_block`, and takes written blocks back for reuse.

    Reuse matters: touching fresh memory costs a page fault every 4 KB, more than the copy itself.

    Args:
        shapes: shapes of the tensors, in order.
        dtype: numpy type of the rows.
        per_block: rows a block.
        pinned: page-locked memory, for asynchronous copies from a GPU.
    """

    def __init__(self, shapes: list[torch.Size], dtype: str, per_block: int, pinned: bool) -> None:
        self._shapes = shapes
        self._sizes = [shape.numel() for shape in shapes]
        self.width = sum(self._sizes)
        self.dtype = np.dtype(dtype)
        self.per_block = per_block
        self._pinned = pinned
        self._free: list[Block] = []
        self._lock = threading.Lock()
        self._current: Block | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def copy(self, tensors: list[torch.Tensor]) -> tuple[Block, int]:
        """Copy tensors into the next row; returns its block and place."""
        block = self._current
        if block is None:
            block = self._current = self._take()
        row = block.used
        block.used += 1
        if block.used == self.per_block:
            self._current = None  # a full block belongs to the writer, who gives it back once it is written
        with torch.no_grad():
            foreach.copy_(block.views[row], tensors)
        return block, row

    def give_back(self, block: Block) -> None:
        """Return a block whose rows are written."""
        block.used = 0
        with self._lock:
            self._free.append(block)

    def _take(self) -> Block:
        with self._lock:
            if self._free:
                return self._free.pop()
        flat = torch.empty((self.per_block, self.width), dtype=_torch_dtype(self.dtype), pin_memory=self._pinned)
        views = [
            [piece.view(shape) for piece, shape in zip(row.split(self._sizes), self._shapes, strict=True)]
            for row in flat
        ]
        return Block(flat.numpy(), views)


class Staged:
    """Tensors on their way from a GPU to the host: complete after `wait`.

    They are copied into pinned memory on the stream that made them, and an event tells the writer when they, and all
    rows copied before, have arrived: training never waits for the device.
    """

    __slots__ = ("event", "tensors")

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for host, t in zip(self.tensors, tensors, strict=True):
            host.copy_(t.detach(), non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host; blocks the caller (the writer's thread) until they are there."""
        self.event.synchronize()
        return self.tensors


def _torch_dtype(dtype: np.dtype) -> torch.dtype:
    return torch.float64 if dtype == np.float64 else torch.float32
