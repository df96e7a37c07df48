"""nn.Linear: the input and the gradient at the output, whose outer products are the contributions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nbdyn.recorder.capture.affine import Affine, numbers, wide
from nbdyn.recorder.capture.calls import ModuleCall, Stored, by_sample
from nbdyn.store.convolve import portions


class Linear(Affine):
    """Handler of nn.Linear: form "linear", or "dense" where T positions hold more numbers than the layer does."""

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        d = by_sample(d, call.size, call.sequence_first)
        if weight is None:
            return self._dense((bias, d.sum(1, dtype=wide(d.dtype))))
        a = by_sample(x, call.size, call.sequence_first).to(d.dtype)  # as autocast cast it
        if d.shape[1] * (a.shape[2] + d.shape[2]) <= numbers(weight, bias):
            return [(self._site("linear", weight, bias), {"a": a.contiguous(), "d": d.contiguous()})]
        summed = None if bias is None else d.sum(1, dtype=wide(d.dtype))
        return self._dense((weight, outer_sums(a, d)), (bias, summed))


def outer_sums(a: Tensor, d: Tensor) -> Tensor:
    """Sums of outer products over T: a (B, T, I), d (B, T, O) -> (B, O, I), in float32 at least.

    >>> outer_sums(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]))
    tensor([[[3., 6.]]])
    """
    dtype = wide(d.dtype)
    sums = torch.empty((len(d), d.shape[2], a.shape[2]), dtype=dtype, device=d.device)
    bytes_each = dtype.itemsize * d.shape[1] * (a.shape[2] + d.shape[2])
    with torch.autocast(d.device.type, enabled=False):  # which would multiply in half precision
        for rows in portions(len(d), bytes_each, on_cpu=d.device.type == "cpu"):
            torch.bmm(d[rows].to(dtype).transpose(1, 2), a[rows].to(dtype), out=sums[rows])
    return sums


HANDLERS: dict[type[nn.Module], type[Affine]] = {nn.Linear: Linear}
"""Handler classes by the class whose forward pass must be unchanged."""
