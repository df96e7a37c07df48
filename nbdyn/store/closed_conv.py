"""Convolutions: the weight cell of a kernel offset is the sum over positions of one map, shifted, times the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store.closed_tools import Tensors, Tile, chunks, filled, picker, used_of
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from torch import Tensor


def total(site: Site, t: Tensors) -> Tensor:
    """Sum over the visits, (n,): the very operation of autograd."""
    import torch

    a, d, o = t["a"], t["d"], site.options
    if not len(a):
        return a.new_zeros(site.size)
    spatial = d.ndim - 2
    excess = [0] * spatial
    if o["transposed"]:
        sizes = zip(d.shape[2:], a.shape[2:], site.shape[2:], o["stride"], o["padding"], o["dilation"], strict=True)
        excess = [out - ((n - 1) * s - 2 * p + e * (k - 1) + 1) for out, n, k, s, p, e in sizes]
    weight = a.new_empty(1).expand(site.shape)  # only its shape is looked at
    bias = None if site.bias is None else [site.bias_size]
    hyper = (o["stride"], o["padding"], o["dilation"], o["transposed"], excess, o["groups"])
    _, grad, summed = torch.ops.aten.convolution_backward(d, a, weight, bias, *hyper, (False, True, bias is not None))
    return grad.reshape(-1) if bias is None else torch.cat([grad.reshape(-1), summed])


def weight_cells(site: Site, t: Tensors, places: np.ndarray) -> Tensor:
    """Contributions (V, k) to chosen elements of the weight, by their places in it.

    Few elements are summed one by one; of an ungrouped convolution only the channels needed are gone through.
    """
    kernel = math.prod(site.shape[2:])
    if site.options["groups"] == 1:
        rows, columns = np.unravel_index(places // kernel, site.shape[:2])
        used, row_at = used_of(rows, site.shape[0])
        crossed, column_at = used_of(columns, site.shape[1])
        if len(used) * len(crossed) * kernel <= 8 * len(places):
            first, second = ("a", "d") if site.options["transposed"] else ("d", "a")
            narrow = replace(site, shape=(len(used), len(crossed), *site.shape[2:]))
            maps = {first: t[first][:, picker(used, site.shape[0])]}
            maps[second] = t[second][:, picker(crossed, site.shape[1])]
            taken = picker((row_at * len(crossed) + column_at) * kernel + places % kernel, math.prod(narrow.shape))
            return _from_all(narrow, maps, len(places), taken)
    elif math.prod(site.shape) <= 8 * len(places):
        return _from_all(site, t, len(places), picker(places, math.prod(site.shape)))
    return _one_by_one(site, t, places)


def _from_all(site: Site, t: Tensors, count: int, taken: slice | Tensor) -> Tensor:
    """Chosen cells from all those of a site, a tile of visits at a time."""
    tiles = ((visits, slice(None), values[:, taken]) for visits, values in _weights(site, t))
    return filled(tiles, t["d"].new_empty, len(t["d"]), count)


def _one_by_one(site: Site, t: Tensors, places: np.ndarray) -> Tensor:
    """Chosen cells, one kernel offset after another: a strided slice of the larger map times the smaller one."""
    import torch

    o = site.options
    row, column, *offsets = np.unravel_index(places, site.shape)
    still, moving = (t["a"], t["d"]) if o["transposed"] else (t["d"], t["a"])
    # within group g, the weight's second axis counts channels of the moving map
    column = row // (site.shape[0] // o["groups"]) * site.shape[1] + column
    margins = [p for padding in reversed(o["padding"]) for p in (padding, padding)]
    size = still.shape[2:]
    out = still.new_empty(len(still), len(places))
    for offset in itertools.product(*map(np.unique, offsets)):
        here = np.nonzero(np.all([k == values for k, values in zip(offset, offsets, strict=True)], axis=0))[0]
        starts = [int(k) * dilation for k, dilation in zip(offset, o["dilation"], strict=True)]
        window = tuple(
            slice(start, start + (n - 1) * step + 1, step)
            for start, n, step in zip(starts, size, o["stride"], strict=True)
        )
        bytes_each = 3 * max(1, len(here)) * still.element_size() * math.prod(moving.shape[2:])
        for visits in chunks(len(still), bytes_each):
            shifted = torch.nn.functional.pad(moving[visits][:, column[here]], margins)[:, :, *window]
            out[visits, here] = (shifted * still[visits][:, row[here]]).flatten(2).sum(2)
    return out


def bias_cells(site: Site, t: Tensors) -> Tensor:
    """Contributions (V, O) to the bias."""
    return t["d"].flatten(2).sum(2)


def _weights(site: Site, t: Tensors) -> Iterator[tuple[slice, Tensor]]:
    from nbdyn.store.convolve import weight_gradient

    for visits in chunks(len(t["d"]), t["d"].element_size() * math.prod(site.shape)):
        yield visits, weight_gradient(t["a"][visits], t["d"][visits], site).flatten(1)


def tiles(site: Site, t: Tensors) -> Iterator[Tile]:
    """All cells, a tile of visits at a time."""
    size = math.prod(site.shape)
    for visits, values in _weights(site, t):
        yield visits, slice(0, size), values
    if site.bias is not None:
        yield slice(0, len(t["d"])), slice(size, site.size), bias_cells(site, t)
