"""Embeddings: row ids[t] of the weight receives d[t]; a visit that meets a row several times adds up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store.closed_tools import Tensors, Tile, chunks, expand
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from torch import Tensor


def total(site: Site, t: Tensors) -> Tensor:
    """Sum over the visits, (n,), in the order of the tokens, as autograd adds them."""
    import torch

    ids, d = t["ids"].reshape(-1).long(), t["d"].reshape(-1, site.shape[1])
    return torch.ops.aten.embedding_dense_backward(d, ids, site.shape[0], -1, False).reshape(-1)


def weight_cells(site: Site, t: Tensors, places: np.ndarray) -> Tensor:
    """Contributions (V, k) to chosen elements of the weight, by their places in it: only tokens that meet them."""
    import torch

    rows, columns = np.divmod(places, site.shape[1])
    order = np.argsort(rows, kind="stable")
    used, first, count = np.unique(rows[order], return_index=True, return_counts=True)
    out = t["d"].new_zeros(len(t["d"]), len(places))
    ids = t["ids"].numpy()
    at = np.minimum(np.searchsorted(used, ids), max(0, len(used) - 1))
    visit, token = np.nonzero(used[at] == ids) if len(used) else (np.empty(0, int), np.empty(0, int))
    if not len(visit):
        return out
    at = at[visit, token]
    flat = out.view(-1)
    for some in chunks(len(visit), 40 * int(count.max())):
        owner, number = (x.numpy() for x in expand(torch.from_numpy(count[at[some]])))
        cell = order[first[at[some]][owner] + number]
        v, w = visit[some][owner], token[some][owner]
        flat.index_add_(0, torch.from_numpy(v * len(places) + cell), t["d"][v, w, columns[cell]])
    return out


def rows_met(site: Site, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that each visit met: visit (m,), row (m,), the visit's contribution to that row (m, E)."""
    import torch

    visit, token = torch.nonzero(t["ids"] >= 0, as_tuple=True)
    key, place = torch.unique(visit * site.shape[0] + t["ids"][visit, token], return_inverse=True)
    summed = t["d"].new_zeros(len(key), site.shape[1]).index_add_(0, place, t["d"][visit, token])
    return torch.div(key, site.shape[0], rounding_mode="floor"), key % site.shape[0], summed


def tiles(site: Site, t: Tensors) -> Iterator[Tile]:
    """All cells, zeros too, a tile of visits and rows at a time."""
    row_bytes = site.shape[1] * t["d"].element_size()
    for visits in chunks(len(t["d"]), row_bytes):
        part = {slot: x[visits] for slot, x in t.items()}
        for rows in chunks(site.shape[0], row_bytes * max(1, visits.stop - visits.start)):
            places = np.arange(rows.start * site.shape[1], rows.stop * site.shape[1])
            yield visits, slice(int(places[0]), int(places[-1]) + 1), weight_cells(site, part, places)


def norms(site: Site, t: Tensors) -> Tensor:
    """Squared Euclidean norm of each visit's cells, (V,) float64."""
    import torch

    out = torch.zeros(len(t["d"]), dtype=torch.float64, device="cpu")
    for visits in chunks(len(out), 16 * t["d"].shape[1] * t["d"].shape[2]):
        visit, _, summed = rows_met(site, {slot: x[visits] for slot, x in t.items()})
        out[visits].index_add_(0, visit, summed.double().square().sum(1))
    return out


def moments(site: Site, t: Tensors) -> dict[str, Tensor]:
    """Sums of c, |c| and c^2 over the visits, (n,) float64, from the rows that they met."""
    import torch

    out = {name: torch.zeros(site.shape, dtype=torch.float64, device="cpu") for name in ("sum", "sum_abs", "sum_sq")}
    for visits in chunks(len(t["d"]), 32 * t["d"].shape[1] * t["d"].shape[2]):
        _, row, summed = rows_met(site, {slot: x[visits] for slot, x in t.items()})
        summed = summed.double()
        for name, values in (("sum", summed), ("sum_abs", summed.abs()), ("sum_sq", summed.square())):
            out[name].index_add_(0, row, values)
    return {name: values.reshape(-1) for name, values in out.items()}
