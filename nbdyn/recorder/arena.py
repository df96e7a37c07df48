"""Memory that captured tensors are copied into at once, and that goes to the journal as it is."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbdyn.store.direct import PAGE, pages

CHUNK_BYTES = 4 * 2**20
ALIGNMENT = 64


@dataclass(slots=True, eq=False)
class Chunk:
    """A piece of memory, whole pages.

    Attributes:
        memory: (bytes,) uint8.
        pinned: the same memory as a tensor, where a GPU copies into it.
        used: bytes given out.
        holders: how many spans of it wait for the writer.
    """

    memory: np.ndarray
    pinned: Tensor | None
    used: int = 0
    holders: int = 0


@dataclass(slots=True, eq=False)
class Span:
    """The pages of a chunk that one record's tensors lie in."""

    chunk: Chunk
    start: int
    stop: int


class Arena:
    """Hands out memory one tensor after the other; a chunk is used again once no record holds a span of it.

    Tensors are copied at once, by the training thread: torch uses their memory again, still in the cache, nobody can
    change what waits for the writer, and the writer has whole pages to hand to the system and nothing to gather.
    (Keeping torch's own tensors instead spares the copy, 0.07 ms of a step of 1.7 ms; the loop took 1.6 times as
    long, as the writer then needs the interpreter's lock for each tensor, and training memory never touched before.)

    Args:
        device: where the tensors come from. From a GPU they travel on a stream of their own into pinned memory;
            training waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Chunk] = []
        self._spans: list[Span] = []
        self._current: Chunk | None = None
        self._start = 0  # where the current record's span begins
        self._kept: dict[Hashable, tuple[Tensor, np.ndarray]] = {}
        self._lock = threading.Lock()
        self.holds = 0
        """How often `hold` was called."""

    def keep(self, t: Tensor, shared: bool) -> np.ndarray:
        """A tensor's values for the writer: complete at once, from a GPU after `event`. bfloat16 as its bits.

        Args:
            t: the tensor.
            shared: several sites may see it, as an input; it is then kept once until `forget_shared` or `hold`.
        """
        t = t.detach()
        key = (t.data_ptr(), t._version, t.shape, t.stride(), t.dtype) if shared else None
        if key in self._kept:
            return self._kept[key][1]
        bits = t.view(torch.int16) if t.dtype == torch.bfloat16 else t
        size = t.nbytes
        chunk = self._room(size)
        start, chunk.used = chunk.used, chunk.used + -(-size // ALIGNMENT) * ALIGNMENT
        chunk.memory[start + size : chunk.used] = 0  # what memory held before must not reach a file
        host = chunk.memory[start : start + size].view(_NUMPY[t.dtype]).reshape(t.shape)
        if self._side is None or not t.is_cuda:
            np.copyto(host, bits.numpy(), casting="unsafe")
        else:
            assert chunk.pinned is not None
            self._side.wait_stream(torch.cuda.current_stream(t.device))
            with torch.cuda.stream(self._side):
                chunk.pinned[start : start + size].view(bits.dtype).view(t.shape).copy_(bits, non_blocking=True)
            t.record_stream(self._side)
        if shared:
            self._kept[key] = t, host  # with the tensor, so that its address stays its own
        return host

    def _room(self, size: int) -> Chunk:
        chunk = self._current
        if chunk is None or chunk.used + size > len(chunk.memory):
            self._end_span()
            with self._lock:
                if chunk is not None and not chunk.holders:
                    self._reuse(chunk)
                chunk = self._current = self._take(size)
            self._start = 0
        return chunk

    def _take(self, size: int) -> Chunk:
        for place, chunk in enumerate(self._free):
            if len(chunk.memory) >= size:
                return self._free.pop(place)
        if self._side is None:
            return Chunk(pages(max(CHUNK_BYTES, size)), None)
        pinned = torch.empty(max(CHUNK_BYTES, -(-size // PAGE) * PAGE), dtype=torch.uint8, pin_memory=True)
        return Chunk(pinned.numpy(), pinned)

    def _reuse(self, chunk: Chunk) -> None:
        chunk.used = 0
        self._free.append(chunk)

    def _end_span(self) -> None:
        """What was kept in the current chunk becomes a span of whole pages."""
        chunk, start = self._current, self._start
        if chunk is None or chunk.used == start:
            return
        stop = -(-chunk.used // PAGE) * PAGE
        chunk.memory[chunk.used : stop] = 0
        with self._lock:
            chunk.holders += 1
        self._spans.append(Span(chunk, start, stop))
        self._start = chunk.used = stop

    def forget_shared(self) -> None:
        """Let go of shared tensors, whose copies stay: inputs of a later batch are others."""
        self._kept.clear()

    def hold(self) -> list[Span]:
        """The memory that tensors were kept in since the last call; whoever gets it must `release` it."""
        self._end_span()
        self.forget_shared()
        self.holds += 1
        spans, self._spans = self._spans, []
        return spans

    def event(self) -> Any:
        """What to wait for before tensors kept so far are read; None where they are complete."""
        return None if self._side is None else self._side.record_event()

    def wait(self) -> None:
        """Wait until what was kept is complete; training waits, too."""
        if self._side is not None:
            self._side.synchronize()

    def release(self, spans: list[Span]) -> None:
        """A record's tensors are written (called on the writer's thread)."""
        with self._lock:
            for span in spans:
                chunk = span.chunk
                chunk.holders -= 1
                if not chunk.holders and chunk is not self._current:
                    self._reuse(chunk)


_NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.bfloat16: np.uint16,
    torch.int32: np.int32, torch.int64: np.int64,
}  # fmt: skip


def joined(spans: list[Span]) -> list[np.ndarray]:
    """The memory of some spans, neighbours as one piece."""
    pieces: list[Span] = []
    for span in spans:
        last = pieces[-1] if pieces else None
        if last is not None and last.chunk is span.chunk and last.stop == span.start:
            pieces[-1] = Span(span.chunk, last.start, span.stop)
        else:
            pieces.append(span)
    return [piece.chunk.memory[piece.start : piece.stop] for piece in pieces]
