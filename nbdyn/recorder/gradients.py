"""Did something change the gradient between backward and the optimizer, and is it just one factor (clipping)?"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class GradientWatch:
    """Hooks after each parameter's gradient is accumulated.

    It tells the recorder that a batch had its backward pass (`on_backward(fresh)`: `fresh` if the gradients had
    been cleared since the last one, so that this batch begins a new accumulation), and remembers the version of
    each raw gradient, so that a later change (clipping, unscaling, noise) is noticed without comparing values.
    `on_accumulated(p, fresh)` hears of every backward pass that adds to a parameter's gradient, and whether that
    gradient had been cleared since the last one.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        on_backward: Callable[[bool], None],
        on_accumulated: Callable[[torch.Tensor, bool], None] | None = None,
    ) -> None:
        self._parameters = parameters
        self._on_backward = on_backward
        self._on_accumulated = on_accumulated
        self._raw: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._place = {id(p): place for place, p in enumerate(parameters)}
        self._handles: dict[int, Any] = {}
        self._hook_new()
        self.waiting = True
        self.copies: list[torch.Tensor] | None = None

    def _hook_new(self) -> None:
        """Hook parameters that require a gradient and are not hooked yet (frozen ones may thaw)."""
        for p in self._parameters:
            if p.requires_grad and id(p) not in self._handles:
                self._handles[id(p)] = p.register_post_accumulate_grad_hook(self._after_accumulation)

    def keep_copies(self) -> None:
        """From now on keep a copy of each raw gradient: this loop changes gradients before the step."""
        self.copies = [torch.zeros_like(p) for p in self._parameters]

    def _after_accumulation(self, p: torch.Tensor) -> None:
        grad = p.grad
        if grad is None:
            return
        key = id(p)
        known = self._raw.get(key)
        if self.waiting:
            self.waiting = False
            self._on_backward(known is not None and known[0]() is not grad)
        if self._on_accumulated is not None:
            # Added in place, a gradient is one version further; zeroed in place before that, it is two.
            self._on_accumulated(p, known is None or known[0]() is not grad or grad._version > known[1] + 1)
        self._raw[key] = (weakref.ref(grad), grad._version)
        if self.copies is not None and not grad.is_sparse:
            self.copies[self._place[key]].copy_(grad)

    def changed(self) -> bool:
        """Whether any gradient is not what the last backward pass left."""
        self._hook_new()
        for p in self._parameters:
            if p.grad is not None:
                known = self._raw.get(id(p))
                if known is None or known[0]() is not p.grad or known[1] != p.grad._version:
                    return True
        return False

    def remove(self) -> None:
        """Unhook."""
        for handle in self._handles.values():
            handle.remove()


def single_factor(raw: np.ndarray, seen: np.ndarray) -> float | None:
    """The number c with seen == c * raw, bit for bit in the gradients' own precision; None if there is none.

    c is sought among the few floats around the quotient of the largest element; rounding leaves no others.

    >>> raw = np.array([3.0, -0.1, 7.7], np.float32)
    >>> bool(single_factor(raw, raw * np.float32(0.3)) == np.float32(0.3))
    True
    """
    if np.array_equal(raw, seen):
        return 1.0
    if not (np.isfinite(raw).all() and np.isfinite(seen).all()):
        return None
    # The quotient of one element leaves several candidates; more large elements narrow them down.
    order = np.argpartition(np.abs(raw), -min(64, len(raw)))[-min(64, len(raw)) :]
    center = raw.dtype.type(np.median(seen[order].astype(np.float64) / raw[order])) if raw[order].all() else None
    if center is None:
        return None
    candidates: list[Any] = [center]
    up = down = center
    for _ in range(4):
        up, down = np.nextafter(up, raw.dtype.type(np.inf)), np.nextafter(down, raw.dtype.type(-np.inf))
        candidates += [up, down]
    for c in candidates:
        if np.array_equal(raw[order] * c, seen[order]) and np.array_equal(raw * c, seen):
            return float(c)
    return None
