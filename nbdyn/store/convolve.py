"""Per-sample weight gradients of convolutions, from the maps that went in and the gradients that came back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from torch import Tensor


def weight_gradient(a: Tensor, d: Tensor, site: Site) -> Tensor:
    """The contribution of each visit to a convolution's weight; the bias's is d summed over positions.

    Works for any number of spatial dimensions, each with its stride, padding (zeros) and dilation, for groups and for
    transposed convolutions. Unfolds the maps (im2col) and multiplies matrices, a few visits at a time.

    Args:
        a: what went in, (B, C, *S).
        d: the gradient at the output, (B, O, *S').
        site: a site of form "conv"; its shape and options are used.

    Returns:
        (B, *site.shape), in float64 if an input has it, else in float32.
    """
    import torch

    options = site.options
    if options["transposed"]:  # the adjoint of a convolution with the same weight: input and output change places
        a, d = d, a
    dtype = torch.promote_types(torch.promote_types(a.dtype, d.dtype), torch.float32)
    kernel, groups, places = site.shape[2:], options["groups"], d.shape[2:]
    margins = [p for padding in reversed(options["padding"]) for p in (padding, padding)]
    cells, positions = math.prod(site.shape[1:]), math.prod(places)
    gradient = torch.empty((len(a) * groups, site.shape[0] // groups, cells), dtype=dtype, device=a.device)
    bytes_each = dtype.itemsize * groups * cells * positions
    patches: Tensor | None = None
    # Autocast would multiply in half precision; torch.bmm into a buffer needs tensors outside any graph.
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        for rows in portions(len(a), bytes_each, on_cpu=a.device.type == "cpu"):
            padded = torch.nn.functional.pad(a[rows].to(dtype), margins)
            count, strides = len(padded), padded.stride()[2:]
            within = [dilation * s for dilation, s in zip(options["dilation"], strides, strict=True)]
            across = [step * s for step, s in zip(options["stride"], strides, strict=True)]
            shape = (*padded.shape[:2], *kernel, *places)
            view = padded.as_strided(shape, (*padded.stride()[:2], *within, *across))
            if patches is None:  # one buffer for all portions: fresh memory costs more than the copy
                patches = torch.empty(shape, dtype=dtype, device=a.device)
            columns = patches[:count].copy_(view).view(count * groups, cells, positions)
            errors = d[rows].to(dtype).reshape(count * groups, -1, positions)
            block = gradient[rows.start * groups : (rows.start + count) * groups]
            torch.bmm(errors, columns.transpose(1, 2), out=block)
    return gradient.view(-1, *site.shape)


def portions(count: int, bytes_each: int, on_cpu: bool) -> Iterator[slice]:
    """Consecutive slices of `count` rows whose temporary tensors fit a processor's cache, or keep a GPU busy.

    >>> list(portions(5, 2_000_000, on_cpu=True))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, (4_000_000 if on_cpu else 64_000_000) // max(1, bytes_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
