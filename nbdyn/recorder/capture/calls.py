"""One call of a module: what went in, which gradients came back; and how its tensors are laid out by sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nbdyn.store.sites import Site

Stored = tuple[Site, dict[str, Tensor]]
"""What is to be stored of a call: the site, and its tensors by slot ("a" and "d"; "ids" and "d"; "g"), sample first."""


@dataclass(slots=True, eq=False)
class ModuleCall:
    """A forward pass of one module, completed by the gradients at its outputs.

    Attributes:
        module: the module.
        args, kwargs: what it was called with (references; data tensors are copies).
        outputs: its output tensors, in order of their appearance (None once they are not needed).
        grads: the gradient at each output; None where none arrived.
        size: how many samples the batch has.
        sequence_first: whether tensors of three dimensions are (time, sample, feature).
        rng: torch's CPU generator before the forward pass, for modules that draw random numbers.
        uses: what a `Uses` mode saw inside, for modules whose bare parameters are used by functions.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor] | None
    grads: list[Tensor | None]
    size: int
    sequence_first: bool = False
    rng: Tensor | None = None
    uses: list[Any] = field(default_factory=list)


class Handler(Protocol):
    """Turns completed calls of one module into what is stored. Called under `torch.no_grad()`, weights still unchanged.

    Raises:
        CannotSplit: if the call cannot be split into samples; the message says why.
    """

    def __call__(self, call: ModuleCall) -> list[Stored]:
        """The site and tensors of each part of the call."""
        ...


class CannotSplit(Exception):
    """A call that says nothing about single samples; its parameters are recorded by batch only."""


def by_sample(t: Tensor, size: int, sequence_first: bool = False) -> Tensor:
    """A tensor of rows as (size, T, F): the last dimension holds features, T whatever lies between.

    (B, F), (B, ..., F), (T, B, F) where it is told apart by its size or `sequence_first` says so, and rows folded
    as (B * T, F): sample by sample, or, where `sequence_first`, time by time.

    Raises:
        CannotSplit: if no dimension fits the batch.
    """
    features = t.shape[-1]
    if t.ndim >= 3 and t.shape[1] == size and (sequence_first or t.shape[0] != size):
        return t.transpose(0, 1).reshape(size, -1, features)
    if t.ndim >= 2 and t.shape[0] == size:
        return t.reshape(size, -1, features)
    if t.ndim >= 2 and size and t.shape[0] % size == 0:
        if sequence_first:
            return t.reshape(-1, size, features).transpose(0, 1)
        return t.reshape(size, -1, features)
    raise CannotSplit(f"it saw a tensor of shape {list(t.shape)} for a batch of {size} samples")


def runs_of(parameters: list[nn.Parameter | None], firsts: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """(first, size) of each recorded, trainable parameter among some; `firsts`: id(parameter) -> global index."""
    known = [p for p in parameters if p is not None and p.requires_grad and id(p) in firsts]
    return tuple((firsts[id(p)], p.numel()) for p in known)


def joined(pieces: list[Tensor], size: int) -> Tensor:
    """Materialised pieces (B, ...) side by side as (B, n)."""
    return torch.cat([piece.reshape(size, -1) for piece in pieces], dim=1)
