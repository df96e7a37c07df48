"""Per-sample losses and correctness, from the very outputs and targets that the loss function was given."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class LossProbe:
    """Watches one loss function.

    A `torch.nn` loss module is hooked: what the loop passes to it is what is recorded. A plain function cannot
    be hooked; it is evaluated once more on the model's output and the last element of the batch.

    Definition: loss_s is the mean (for reduction "sum": the sum) of the sample's elements of the unreduced loss,
    so that the batch's loss is sum_s loss_s / scale, with scale = B for "mean", the sum of the class weights met
    for weighted cross-entropy, the share of targets not ignored times B for ignore_index, and 1 for "sum".

    Args:
        loss_fn: the module or function.
        seen: called as seen(loss, outputs, targets) at every evaluation that has a gradient.
    """

    def __init__(self, loss_fn: Any, seen: Callable[[torch.Tensor, Any, Any], None]) -> None:
        self.loss_fn = loss_fn
        self._seen = seen
        self._handle = None
        self.unreduced = unreduced_form(loss_fn)
        if isinstance(loss_fn, nn.Module):
            self._handle = loss_fn.register_forward_hook(self._hook)

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

    @torch.no_grad()
    def per_sample(self, outputs: torch.Tensor, targets: Any, size: int) -> tuple[torch.Tensor, Any] | None:
        """Losses (size,) and the scale; None where the loss has no unreduced form or no sample axis."""
        if self.unreduced is None:
            return None
        elements = self.unreduced(outputs.detach(), targets)
        if not isinstance(elements, torch.Tensor) or elements.numel() % size or elements.ndim == 0:
            return None
        is_sum = reduction_of(self.loss_fn) == "sum"
        if elements.ndim > 1 or len(elements) != size:
            table = elements.reshape(size, -1)
            elements = table.sum(1) if is_sum else table.mean(1)
        return elements, 1.0 if is_sum else self._scale(targets, size)

    def _scale(self, targets: Any, size: int) -> Any:
        """See the class; a tensor where it depends on the targets (the writer takes its value)."""
        weight = getattr(self.loss_fn, "weight", None)
        ignored = getattr(self.loss_fn, "ignore_index", None)
        if ignored is None or torch.is_floating_point(targets):
            return float(size)
        # nn losses have ignore_index = -100 also where it was never asked for; then this is size, exactly.
        kept = targets != ignored
        if weight is not None:
            kept = kept * weight.double()[targets.clamp(min=0)]
        return kept.sum() if targets.numel() == size else kept.sum() * (size / targets.numel())


def reduction_of(loss_fn: Any) -> str:
    """The reduction of a loss: its attribute, its keyword in a partial, or "mean"."""
    keywords = getattr(loss_fn, "keywords", {})
    return getattr(loss_fn, "reduction", keywords.get("reduction", "mean"))


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


@torch.no_grad()
def correctness(outputs: Any, targets: Any, size: int) -> torch.Tensor | None:
    """Whether each sample is classified right, (size,) bool; None unless outputs are (B, C), targets (B,) classes."""
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor) or len(targets) != size:
        return None
    if outputs.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point() and outputs.shape[1] > 1:
        return outputs.argmax(1) == targets
    return None
