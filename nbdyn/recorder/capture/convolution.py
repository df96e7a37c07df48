"""Convolutions, also transposed ones: the map that went in and the gradient at the map that came out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from nbdyn.recorder.capture.affine import Affine, numbers, wide
from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored, by_sample
from nbdyn.store.convolve import weight_gradient
from nbdyn.store.sites import Site


class Convolution(Affine):
    """Handler of nn.Conv1d to 3d and nn.ConvTranspose1d to 3d: form "conv", or "dense" where the maps are larger.

    Where a sample has several maps, folded into the rows of the batch, they are one map with a further dimension,
    which the kernel covers one at a time.
    """

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        module: Any = call.module
        if x.ndim != 2 + len(module.kernel_size):
            raise CannotSplit("it was called without a batch dimension")
        padding = [0] * len(module.kernel_size)
        if weight is not None:
            x, padding = _padded(module, x)
        x, d = _maps(x, call).to(d.dtype), _maps(d, call)  # as autocast cast it
        if weight is None:
            return self._dense((bias, _over_positions(d)))
        site = self._conv(module, weight, bias, padding, folded=x.ndim - 2 - len(module.kernel_size))
        readable = x.ndim <= 5  # torch convolves over three dimensions at most
        if readable and x.numel() + d.numel() <= numbers(weight, bias) * call.size:
            return [(site, {"a": x.contiguous(), "d": d.contiguous()})]
        summed = None if bias is None else _over_positions(d)
        return self._dense((weight, weight_gradient(x, d, site)), (bias, summed))

    def _conv(
        self, module: Any, weight: nn.Parameter, bias: nn.Parameter | None, padding: list[int], folded: int
    ) -> Site:
        """The site of form "conv"; `folded`: how many dimensions the maps have before those of the module."""
        return self._site(
            "conv",
            weight,
            bias,
            (*weight.shape[:2], *[1] * folded, *weight.shape[2:]),
            stride=[1] * folded + list(module.stride),
            padding=[0] * folded + padding,
            dilation=[1] * folded + list(module.dilation),
            groups=module.groups,
            transposed=module.transposed,
        )


def _padded(module: Any, x: Tensor) -> tuple[Tensor, list[int]]:
    """The input and the zeros that the convolution adds on both sides; other padding is done here."""
    if module.padding == "valid":
        return x, [0] * len(module.kernel_size)
    if module.padding == "same":
        extents = [n * (k - 1) for n, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(extent // 2, extent - extent // 2) for extent in extents]
    else:
        sides = [(n, n) for n in module.padding]
    if module.padding_mode == "zeros" and all(before == after for before, after in sides):
        return x, [before for before, _ in sides]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, [n for pair in reversed(sides) for n in pair], mode=mode), [0] * len(sides)


def _maps(t: Tensor, call: ModuleCall) -> Tensor:
    """Maps by sample, (B, C, *S); (B, C, T, *S) where the rows hold T maps of each sample.

    Raises:
        CannotSplit: if the rows do not fit the batch.
    """
    if len(t) == call.size:
        return t
    rows = by_sample(t.flatten(1), call.size, call.sequence_first)
    return rows.reshape(call.size, -1, *t.shape[1:]).transpose(1, 2)


def _over_positions(d: Tensor) -> Tensor:
    """The bias's contributions, (B, O)."""
    return d.flatten(2).sum(2, dtype=wide(d.dtype))


HANDLERS: dict[type[nn.Module], type[Affine]] = dict.fromkeys(
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), Convolution
)
"""Handler classes by the class whose forward pass must be unchanged."""
