"""Layers that scale and shift, element by element: normalisation and PReLU. Their contributions are materialised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbdyn.recorder.capture.affine import Affine, wide
from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored, by_sample
from nbdyn.store.convolve import portions

Scaled = Callable[[Tensor], Tensor]
"""Rows of the input -> what the weight multiplies."""

BATCH_COUPLED = "batch-coupled"
"""Note of a site whose contributions depend on the other samples of the batch, by its mean and variance."""


class LayerNorm(Affine):
    """Handler of nn.LayerNorm, which normalises the last dimensions."""

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        module: Any = call.module
        dims = len(module.normalized_shape)
        x = by_sample(x.flatten(-dims), call.size, call.sequence_first)
        d = by_sample(d.flatten(-dims), call.size, call.sequence_first)
        scaled = None if weight is None else _products(x, d, lambda rows: self._normalised(module, rows), 1)
        shifted = None if bias is None else d.sum(1, dtype=wide(d.dtype))
        return self._dense((weight, scaled), (bias, shifted))

    def _normalised(self, module: Any, rows: Tensor) -> Tensor:
        return functional.layer_norm(rows, rows.shape[-1:], eps=module.eps)


class RMSNorm(LayerNorm):
    """Handler of nn.RMSNorm."""

    def _normalised(self, module: Any, rows: Tensor) -> Tensor:
        return functional.rms_norm(rows, rows.shape[-1:], eps=module.eps)


class _ByChannel(Affine):
    """Base for modules with one weight and one bias a channel; channels are dimension 1."""

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        x, d = x.reshape(*x.shape[:2], -1), d.reshape(*d.shape[:2], -1)
        scaled = None if weight is None else self._by_sample(call, self._scaled(call.module, x, d))
        shifted = None if bias is None else self._by_sample(call, d.sum(2, dtype=wide(d.dtype)))
        return self._dense((weight, scaled), (bias, shifted), note=self._note(call.module))

    def _by_sample(self, call: ModuleCall, rows: Tensor) -> Tensor:
        """Contributions of rows to channels, (R, C), as those of samples, (B, C)."""
        return by_sample(rows, call.size, call.sequence_first).sum(1)

    def _scaled(self, module: Any, x: Tensor, d: Tensor) -> Tensor:
        """Contributions of rows to the weight, (R, C), from x and d (R, C, positions)."""
        raise NotImplementedError

    def _note(self, module: Any) -> str:
        return ""


class GroupNorm(_ByChannel):
    """Handler of nn.GroupNorm."""

    def _scaled(self, module: Any, x: Tensor, d: Tensor) -> Tensor:
        return _products(x, d, lambda rows: torch.group_norm(rows, module.num_groups, eps=module.eps), 2)


class InstanceNorm(_ByChannel):
    """Handler of nn.InstanceNorm1d to 3d."""

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        module: Any = call.module
        if x.ndim == module._get_no_batch_dim():
            raise CannotSplit("it was called without a batch dimension")
        return super()._split(call, x, d, weight, bias)

    def _scaled(self, module: Any, x: Tensor, d: Tensor) -> Tensor:
        if module.training or not module.track_running_stats:
            return _products(x, d, lambda rows: torch.group_norm(rows, rows.shape[1], eps=module.eps), 2)
        return _products(x, d, _standardised(module), 2)


class BatchNorm(_ByChannel):
    """Handler of nn.BatchNorm1d to 3d; coupled by the batch's mean and variance where these are used."""

    def _scaled(self, module: Any, x: Tensor, d: Tensor) -> Tensor:
        return _batch_products(x, d, module.eps) if self._note(module) else _products(x, d, _standardised(module), 2)

    def _note(self, module: Any) -> str:
        return BATCH_COUPLED if module.training or module.running_mean is None else ""


class PReLU(_ByChannel):
    """Handler of nn.PReLU: the weight, one or one a channel, multiplies what is below zero."""

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        if weight is not None and weight.numel() == 1:  # then dimension 1 need not hold channels
            x, d = (by_sample(t.unsqueeze(-1) if t.ndim == 1 else t, call.size, call.sequence_first) for t in (x, d))
            x, d = x.reshape(call.size, 1, -1), d.reshape(call.size, 1, -1)
        return super()._split(call, x.to(d.dtype), d, weight, bias)  # as autocast cast it

    def _scaled(self, module: Any, x: Tensor, d: Tensor) -> Tensor:
        return _products(x, d, lambda rows: rows.clamp(max=0), 2)


def _standardised(module: Any) -> Scaled:
    """By running statistics. Subtracting first keeps the digits of what is small beside its mean."""
    mean, scale = module.running_mean.unsqueeze(1), torch.rsqrt(module.running_var + module.eps).unsqueeze(1)
    return lambda rows: (rows - mean.to(rows.dtype)) * scale.to(rows.dtype)


def _batch_products(x: Tensor, d: Tensor, eps: float) -> Tensor:
    """The gradients d times x normalised over all rows, summed over positions: (R, C) from x and d (R, C, positions).

    One pass gives the products and the variance; torch.var_mean takes ten times as long as the rest.
    """
    dtype = wide(d.dtype)
    count = x.numel() // x.shape[1]
    mean = (x.sum(2, dtype=dtype).sum(0) / count).unsqueeze(1)
    squares, products = torch.zeros_like(mean), []
    for rows in _portions(x, dtype):
        centred = x[rows].to(dtype) - mean
        products.append((centred * d[rows]).sum(2))
        squares += centred.square_().sum((0, 2)).unsqueeze(1)
    return torch.cat(products) * torch.rsqrt(squares / count + eps).squeeze(1)


def _products(x: Tensor, d: Tensor, scale: Scaled, dim: int) -> Tensor:
    """The gradients d times what the weight multiplies, summed over one dimension; both have three, rows first."""
    dtype = wide(d.dtype)
    return torch.cat([scale(x[rows].to(dtype)).mul_(d[rows]).sum(dim) for rows in _portions(x, dtype)])


def _portions(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    return portions(len(x), 3 * dtype.itemsize * x[0].numel(), on_cpu=x.device.type == "cpu")


HANDLERS: dict[type[nn.Module], type[Affine]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.GroupNorm: GroupNorm,
    nn.InstanceNorm1d: InstanceNorm,
    nn.InstanceNorm2d: InstanceNorm,
    nn.InstanceNorm3d: InstanceNorm,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.BatchNorm3d: BatchNorm,
    nn.PReLU: PReLU,
}
"""Handler classes by the class whose forward pass must be unchanged."""
