"""Linear sites: weight cell [o, i] of a visit is sum_t d[t, o] a[t, i], bias cell [o] is sum_t d[t, o]."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store import closed_tools
from nbdyn.store.closed_tools import Tensors, Tile, chunks, filled, picker, used_of
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from torch import Tensor


def is_transposed(site: Site) -> bool:
    """Whether the weight block is (I, O)."""
    return bool(site.options.get("transposed"))


def one_each(t: Tensors) -> bool:
    """Whether every visit has one position, so that its cells are single products."""
    return t["d"].shape[1] == 1


def total(site: Site, t: Tensors) -> Tensor:
    """Sum over the visits, (n,): the very product that autograd computes, equal to p.grad bit for bit."""
    import torch

    a, d = (t[slot].reshape(-1, t[slot].shape[-1]) for slot in ("a", "d"))
    weight = a.t() @ d if is_transposed(site) else d.t() @ a
    return weight.reshape(-1) if site.bias is None else torch.cat([weight.reshape(-1), d.sum(0)])


def weight_cells(site: Site, t: Tensors, places: np.ndarray) -> Tensor:
    """Contributions (V, k) to chosen elements of the weight block, by their places in it.

    Whole rows, columns and blocks come from products of the units they need; scattered elements one by one.
    """
    import torch

    rows, columns = np.divmod(places, site.shape[1])
    first, second = ("a", "d") if is_transposed(site) else ("d", "a")
    used, row_at = used_of(rows, site.shape[0])
    crossed, column_at = used_of(columns, site.shape[1])
    x, y, size = t[first], t[second], t[first].element_size()
    if len(used) * len(crossed) <= 4 * len(places):
        taken = picker(row_at * len(crossed) + column_at, len(used) * len(crossed))
        left, right = picker(used, x.shape[2]), picker(crossed, y.shape[2])
        parts = (
            (visits, slice(None), products(x[visits][:, :, left], y[visits][:, :, right]).flatten(1)[:, taken])
            for visits in chunks(len(x), len(used) * len(crossed) * size)
        )
        return filled(parts, x.new_empty, len(x), len(places))
    row, column = torch.from_numpy(rows), torch.from_numpy(columns)
    parts = (
        (v, some, (x[v].index_select(2, row[some]) * y[v].index_select(2, column[some])).sum(1))
        for v in chunks(len(x), 2 * size * x.shape[1] * len(places))
        for some in chunks(len(places), 2 * size * x.shape[1])
    )
    return filled(parts, x.new_empty, len(x), len(places))


def products(x: Tensor, y: Tensor) -> Tensor:
    """sum_t x[v, t, i] y[v, t, j], (V, i, j); for one position single products, rounded once."""
    import torch

    return x.transpose(1, 2) * y if x.shape[1] == 1 else torch.bmm(x.transpose(1, 2), y)


def bias_cells(site: Site, t: Tensors) -> Tensor:
    """Contributions (V, O) to the bias."""
    return t["d"][:, 0] if one_each(t) else t["d"].sum(1)


def tiles(site: Site, t: Tensors, first_bytes: int | None = None) -> Iterator[Tile]:
    """All cells, in the order of the parameters; the first tile is small if asked, each next one doubles."""
    limit = closed_tools.TILE_BYTES
    x, y = (t["a"], t["d"]) if is_transposed(site) else (t["d"], t["a"])
    row_bytes = y.shape[2] * x.element_size()
    for visits in chunks(len(x), row_bytes):
        start, budget = 0, first_bytes or limit
        while start < x.shape[2]:
            stop = min(x.shape[2], start + max(1, budget // max(1, row_bytes * (visits.stop - visits.start))))
            part = products(x[visits][:, :, start:stop], y[visits])
            yield visits, slice(start * y.shape[2], stop * y.shape[2]), part.flatten(1)
            start, budget = stop, min(2 * budget, limit)
    if site.bias is not None:
        yield slice(0, len(x)), slice(math.prod(site.shape), site.size), bias_cells(site, t)


def norms(site: Site, t: Tensors) -> Tensor:
    """Squared Euclidean norm of each visit's cells, (V,) float64: sum_{t,u} (a_t . a_u) (d_t . d_u)."""
    import torch

    a, d = t["a"], t["d"]
    out = torch.empty(len(d), dtype=torch.float64, device="cpu")
    for visits in chunks(len(d), 8 * (a[0].numel() + d[0].numel() + 2 * a.shape[1] ** 2) if len(d) else 1):
        x, y = a[visits].double(), d[visits].double()
        bias = y.sum(1).square().sum(1) if site.bias is not None else 0.0
        if one_each(t):
            out[visits] = x.square().sum((1, 2)) * y.square().sum((1, 2)) + bias
        else:
            # rounding may leave a sum that cancels a little below zero
            gram = torch.bmm(x, x.transpose(1, 2)) * torch.bmm(y, y.transpose(1, 2))
            out[visits] = gram.sum((1, 2)).clamp(min=0) + bias
    return out


def norms_need_no_cells(t: Tensors) -> bool:
    """Whether the products of positions take less work than the cells do."""
    positions, inputs, outputs = t["a"].shape[1], t["a"].shape[2], t["d"].shape[2]
    return positions == 1 or positions * (inputs + outputs) <= inputs * outputs


MOMENTS = ("sum", "sum_abs", "sum_sq")


def moments(site: Site, t: Tensors, wanted: tuple[str, ...] = MOMENTS) -> dict[str, Tensor]:
    """Sums of c, |c| and c^2 over visits of one position each, (n,) float64, by one product each.

    |d a| = |d| |a| and (d a)^2 = d^2 a^2 hold for single products only: where a visit has several positions its
    cells are sums, and this would be too large.
    """
    found = {}
    if "sum" in wanted:
        found["sum"] = total(site, t).double()
    if "sum_abs" in wanted:
        found["sum_abs"] = total(site, {slot: t[slot].abs() for slot in ("a", "d")}).double()
    if "sum_sq" in wanted:
        found["sum_sq"] = _squares(site, t)
    return found


def _squares(site: Site, t: Tensors) -> Tensor:
    scaled, scales = zip(*(_scaled(t[slot]) for slot in ("a", "d")), strict=True)
    squares = total(site, {slot: x.square() for slot, x in zip("ad", scaled, strict=True)}).double()
    a, d = (scale.square() for scale in scales)
    weight = a[:, None] * d if is_transposed(site) else d[:, None] * a
    squares[: weight.numel()] *= weight.reshape(-1)
    squares[weight.numel() :] *= d[: len(squares) - weight.numel()]
    return squares


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each unit's column divided by a power of two that brings it to 1, and these powers, (units,) float64.

    The squares of float32 numbers leave its range below 1e-19 and above 1e19; the division is exact.
    """
    import torch

    largest = x.abs().amax((0, 1)) if x.shape[0] else x.new_zeros(x.shape[2])
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent.clamp(-120, 120)
    scale = torch.ldexp(torch.ones(len(exponent), dtype=torch.float64, device="cpu"), exponent)
    return x / scale.to(x.dtype), scale


def narrowed(site: Site, indices: np.ndarray) -> tuple[Site, dict[str, np.ndarray] | None, np.ndarray]:
    """What of a site some of its parameters need: for one weight of a layer one unit of a and one of d.

    Returns:
        The site as it is when only some units of its slots are read (parameters counted from 0), these units by
        slot, and the parameters in its numbers; the site itself, None and the indices where all units are needed.
    """
    size, width = math.prod(site.shape), site.shape[1]
    if 2 * len(indices) > size:
        return site, None, indices
    first = site.first if site.first is not None else -1
    of_weight = (indices >= first) & (indices < first + size)
    rows, columns = np.divmod(indices[of_weight] - first, width)
    inputs, outputs = (rows, columns) if is_transposed(site) else (columns, rows)
    units = indices[~of_weight] - (site.bias or 0)
    i, o = (0, 1) if is_transposed(site) else (1, 0)
    used_d, place = used_of(np.concatenate([outputs, units]), site.shape[o])
    used_a, input_at = used_of(inputs, site.shape[i])
    if not len(used_a):  # a bias needs no inputs, but a block has them
        used_a = np.zeros(1, np.int64)
    if len(used_a) > site.shape[i] // 2 and len(used_d) > site.shape[o] // 2:
        return site, None, indices
    shape = (len(used_a), len(used_d)) if is_transposed(site) else (len(used_d), len(used_a))
    found = np.empty(len(indices), np.int64)
    output_at, unit_at = place[: len(outputs)], place[len(outputs) :]
    row, column = (input_at, output_at) if is_transposed(site) else (output_at, input_at)
    found[of_weight] = row * shape[1] + column
    found[~of_weight] = math.prod(shape) + unit_at
    bias = None if site.bias is None else math.prod(shape)
    return replace(site, first=0, shape=shape, bias=bias), {"a": used_a, "d": used_d}, found
