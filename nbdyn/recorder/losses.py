"""Per-sample losses and correctness, from the very outputs and targets that the loss function was given."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn


class LossProbe:
    """Watches one loss function.

    A `torch.nn` loss module is hooked: what the loop passes to it is what is recorded. A plain function cannot
    be hooked; it is evaluated once more on the model's output and the last element of the batch.

    Args:
        loss_fn: the module or function.
        seen: called as seen(loss, outputs, targets) at every evaluation that has a gradient.
    """

    def __init__(self, loss_fn: Any, seen: Callable[[torch.Tensor, Any, Any], None]) -> None:
        self.loss_fn = loss_fn
        self._seen = seen
        self._handle = loss_fn.register_forward_hook(self._hook) if isinstance(loss_fn, nn.Module) else None

    @property
    def is_hooked(self) -> bool:
        """Whether the loss function itself reports its evaluations."""
        return self._handle is not None

    def _hook(self, module: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> None:
        if len(args) == 2 and isinstance(result, torch.Tensor) and result.requires_grad:
            self._seen(result, args[0], args[1])

    def remove(self) -> None:
        """Unhook."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is known of each sample of one or more batches, each (samples,) or None where it cannot be known.

    Definition: losses[s] is the mean (for the reductions "sum" and "batchmean": the sum) of the sample's elements of
    the unreduced loss, and the loss of a batch is sum_s losses[s] / scale. For "sum" the scale is 1, else it is sum_s
    shares[s]: 1 for an ordinary sample, its class weight in weighted cross-entropy, the part of its targets that
    ignore_index leaves. classes[s] is the target (int32) of a classification, -1 where the loss ignores it.
    """

    losses: torch.Tensor | None
    shares: torch.Tensor | None
    correct: torch.Tensor | None
    classes: torch.Tensor | None


EVALUATED = tuple(field.name for field in fields(Evaluation))
"""What a batch keeps of its evaluation, each under the same name."""


class Evaluator:
    """Evaluates a loss function sample by sample.

    Args:
        loss_fn: the module or function, None for none.
    """

    def __init__(self, loss_fn: Any) -> None:
        self._loss_fn = loss_fn
        self.is_sum = reduction_of(loss_fn) == "sum"
        self.adds_up = reduction_of(loss_fn) in ("sum", "batchmean")  # a sample's elements
        self._ignored = setting(loss_fn, "ignore_index")
        self.unreduced = None if loss_fn is None else unreduced_form(loss_fn)

    @torch.no_grad()
    def __call__(self, outputs: Any, targets: Any, size: int) -> Evaluation:
        """Evaluate `size` samples, of one batch or of several joined along the first dimension."""
        known = self._classification(outputs, targets, size)
        if self.unreduced is None or not size:
            return Evaluation(None, None, *known)
        elements = self.unreduced(outputs, targets)
        if not isinstance(elements, torch.Tensor) or elements.ndim == 0 or elements.numel() % size:
            return Evaluation(None, None, *known)
        if elements.ndim > 1 or len(elements) != size:
            table = elements.reshape(size, -1)
            elements = table.sum(1) if self.adds_up else table.mean(1)
        return Evaluation(elements, None if self.is_sum else self.shares(targets, size), *known)

    def _classification(
        self, outputs: Any, targets: Any, size: int
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Which samples are classified right, (size,) bool, and their classes, (size,) int32; else (None, None)."""
        if not is_classification(outputs, targets, size):
            return None, None
        classes = targets.long()
        left_out = (classes < 0) | (classes >= outputs.shape[1])
        if self._ignored is not None:
            left_out |= classes == self._ignored
        return outputs.argmax(1) == targets, classes.masked_fill(left_out, -1).int()

    def shares(self, targets: Any, size: int) -> torch.Tensor:
        """What each of some samples counts in a mean, (size,) float64; see `Evaluation`."""
        if self._ignored is None or targets.is_floating_point():
            return torch.ones(size, dtype=torch.float64, device=targets.device)
        left_out = targets == self._ignored
        kept = (~left_out).double()
        weight = setting(self._loss_fn, "weight")
        if weight is not None:  # an ignored target need not be the number of a class
            kept = kept * weight.double()[targets.masked_fill(left_out, 0).long()]
        return kept.reshape(size, -1).mean(1)


def reduction_of(loss_fn: Any) -> str:
    """The reduction of a loss, "mean" where it names none."""
    return setting(loss_fn, "reduction") or "mean"


def setting(loss_fn: Any, name: str) -> Any:
    """What a loss is set to: its attribute, its keyword in a partial, or the default of a function; None for none.

    >>> setting(nn.functional.cross_entropy, "ignore_index")
    -100
    """
    if isinstance(loss_fn, nn.Module) or hasattr(loss_fn, name):
        return getattr(loss_fn, name, None)
    try:
        parameter = inspect.signature(loss_fn).parameters.get(name)  # of a partial, with its keywords as defaults
    except (TypeError, ValueError):  # None, or a builtin without a signature
        return None
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def unreduced_form(loss_fn: Any) -> Callable[[Any, Any], torch.Tensor] | None:
    """The loss with reduction "none", or None where there is no such form."""
    if isinstance(loss_fn, nn.Module):
        if not hasattr(loss_fn, "reduction"):
            return None
        form = copy.copy(loss_fn)
        # A shallow copy shares the hook tables of the original: its own evaluations must not be seen.
        form._forward_hooks = type(loss_fn._forward_hooks)()
        form.reduction = "none"  # type: ignore[assignment]
        return form
    try:
        named = "reduction" in inspect.signature(loss_fn).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        named = False
    return (lambda outputs, targets: loss_fn(outputs, targets, reduction="none")) if named else None


def is_classification(outputs: Any, targets: Any, size: int) -> bool:
    """Whether outputs are scores (size, C) of C > 1 classes, and targets the classes (size,)."""
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor) or targets.shape != (size,):
        return False
    return outputs.ndim == 2 and outputs.shape[1] > 1 and not targets.is_floating_point()
