"""The GradScaler of a loop: contributions are recorded as the optimizer's gradient has them, without its scale."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler


class LossScale:
    """Finds the GradScaler that a loop uses, and what it multiplied the loss of a batch with.

    A scaler leaves no trace on the optimizer, and its first steps are often the ones that it skips. So the scales of
    all live scalers are noted at each backward pass; which of them was at work is known at the next step that is taken:
    inside `scaler.step(optimizer)` the scaler knows the optimizer.

    Scalers are looked for among all objects of the process (about 0.1 s): the first time that they are asked for, and
    when half precision is first seen, as a loop may make its scaler then. One that is made later is not found.
    """

    def __init__(self) -> None:
        self._live: list[GradScaler] | None = None
        self._used: GradScaler | None = None
        self._half = False

    def now(self, half: bool = False) -> dict[int, Tensor]:
        """The scale of each live scaler, by its id: copies, not read.

        Args:
            half: whether half precision has been seen.
        """
        if half and not self._half:
            self._half, self._live = True, None
        scales: list[tuple[GradScaler, Any]] = [(scaler, scaler._scale) for scaler in self._scalers()]
        return {id(scaler): scale.detach().clone() for scaler, scale in scales if scale is not None}

    def confirm(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to step: the scaler that knows it, having unscaled its gradients, is used."""
        used = [scaler for scaler in self._scalers() if id(optimizer) in scaler._per_optimizer_states]
        self._used = used[0] if used else None

    def _scalers(self) -> list[GradScaler]:
        if self._live is None:
            self._live = [o for o in gc.get_objects() if issubclass(type(o), GradScaler) and o.is_enabled()]
        return self._live

    def of(self, scales: dict[int, Tensor]) -> Tensor | float:
        """The number that a loss was multiplied with, of those noted at its backward pass; 1 without a scaler."""
        return scales.get(id(self._used), 1.0)
