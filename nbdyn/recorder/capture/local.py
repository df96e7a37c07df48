"""Vector-Jacobian products of one function, sample by sample: the last resort where no closed form is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbdyn.recorder.capture.affine import wide
from nbdyn.recorder.capture.calls import CannotSplit

TEMPORARY = 16_000_000
"""Bytes of temporary tensors that are aimed at; samples are taken in portions."""


@dataclass(frozen=True)
class Cut:
    """Where a tensor has its samples: whole dimensions, or rows of dimension 0 that hold `times` rows a sample.

    Attributes:
        size: how many samples, B.
        dim: the dimension of the samples.
        times: rows of one sample; 1 where the dimension is the samples'.
        time_major: whether folded rows are ordered (time, sample).
    """

    size: int
    dim: int = 0
    times: int = 1
    time_major: bool = False

    def __call__(self, t: Tensor) -> Tensor:
        """(B, *shape of one sample): its dimension `dim` has 1 element, or `times`."""
        if self.times == 1:
            return t.movedim(self.dim, 0).unsqueeze(self.dim + 1)
        if self.time_major:
            return t.unflatten(0, (self.times, self.size)).transpose(0, 1)
        return t.unflatten(0, (self.size, self.times))

    def rows(self, t: Tensor) -> Tensor:
        """(B, T, F) with the last dimension as features."""
        return self(t).reshape(self.size, -1, t.shape[-1])

    def fits(self, t: Tensor) -> bool:
        """Whether a tensor has the samples there."""
        return t.ndim > self.dim and t.shape[self.dim] == self.size * self.times


def find_cut(shape: Sequence[int], size: int, sequence_first: bool) -> Cut | None:
    """Where a tensor of some shape has its samples, by the rules of `by_sample`; None if nothing fits, or too much."""
    if len(shape) >= 3 and shape[1] == size and (sequence_first or shape[0] != size):
        return Cut(size, 1)
    if shape and shape[0] == size:
        return Cut(size)
    folded = len(shape) >= 2 and shape[0] and shape[0] % size == 0
    # Three dimensions may be (sample * k, time, feature) or (time, sample * heads, feature).
    if folded and not (len(shape) == 3 and shape[1] % size == 0 and size > 1):
        return Cut(size, 0, shape[0] // size, sequence_first)
    return Cut(size, 1) if len(shape) == 2 and shape[1] == size else None


Local = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
"""A function of (tensors to differentiate by, other tensors) for one sample: a tensor, or several."""


def local_gradients(
    function: Local,
    wanted: Sequence[Tensor],
    by_row: Sequence[bool],
    data: Sequence[Tensor],
    gradients: Any,
    size: int,
) -> tuple[Tensor, ...]:
    """Each sample's vector-Jacobian product.

    Args:
        function: of one sample; deterministic.
        wanted: tensors to differentiate by: the same for all samples, or (B, ...) where `by_row` says so.
        by_row: for each of them.
        data: (B, ...), the samples' own.
        gradients: (B, ...) at the output of the function, or a tuple of such.
        size: B.

    Returns:
        (B, ...) for each of `wanted`.

    Raises:
        CannotSplit: if torch cannot vectorise the function, or it draws random numbers.
    """

    def one(wanted: tuple[Tensor, ...], data: tuple[Tensor, ...], gradients: Any) -> tuple[Tensor, ...]:
        return torch.func.vjp(lambda *w: function(w, data), *wanted)[1](gradients)

    dims = (tuple(0 if own else None for own in by_row), (0,) * len(data), 0)
    arguments = (tuple(map(exact, wanted)), tuple(map(exact, data)), _each(gradients, exact))
    numbers = sum(t.numel() for t in data) // size
    numbers += sum(t.numel() // (size if own else 1) for t, own in zip(wanted, by_row, strict=True))
    with vectorised(arguments[0][0].device):
        return torch.func.vmap(one, dims, chunk_size=_portion(numbers, size))(*arguments)


def local_values(
    function: Local, wanted: Sequence[Tensor], by_row: Sequence[bool], data: Sequence[Tensor], size: int
) -> Any:
    """The function's outputs for each sample, (B, ...); arguments and errors as for `local_gradients`."""
    dims = (tuple(0 if own else None for own in by_row), (0,) * len(data))
    with vectorised(wanted[0].device):
        return torch.func.vmap(function, dims)(tuple(map(exact, wanted)), tuple(map(exact, data)))


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether what a function of single samples gave is what it gave for the batch, as far as rounding lets it."""
    if found.shape != expected.shape:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(found, expected)
    # Wide enough for TF32 on GPUs: samples that are mixed up differ by much more.
    tolerance = 0.05 if expected.dtype in (torch.float16, torch.bfloat16) else 0.01
    found, expected = found.double(), expected.double()
    close = (found - expected).abs() <= tolerance * (expected.abs() + expected[expected.isfinite()].abs().mean())
    return bool((close | (found == expected) | (found.isnan() & expected.isnan())).all())


def exact(t: Tensor) -> Tensor:
    """Half precision is computed with in float32."""
    return t.detach().to(wide(t.dtype)) if t.is_floating_point() else t


@contextmanager
def vectorised(device: torch.device) -> Iterator[None]:
    """Runs torch.func.vmap: quietly, without autocast and function modes.

    Raises:
        CannotSplit: for what vmap refuses.
    """
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    functorch._set_vmap_fallback_warning_enabled(False)  # that a function is slow here is not the user's concern
    try:
        with torch._C.DisableTorchFunction(), torch.autocast(device.type, enabled=False):
            yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if "randomness" in str(error):
            raise CannotSplit("it draws random numbers") from error
        raise CannotSplit(f"it cannot be applied to single samples ({str(error).splitlines()[0]})") from error
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _portion(numbers: int, size: int) -> int | None:
    """How many samples to take at once, given the numbers of one; None for all."""
    portion = max(1, TEMPORARY // (32 * max(1, numbers)))  # forward and backward hold about eight such tensors
    return None if portion >= size else portion


def _each(tensors: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return tuple(map(function, tensors)) if isinstance(tensors, tuple) else function(tensors)
