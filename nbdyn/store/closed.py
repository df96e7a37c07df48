"""What a block of factors says about parameters, in closed form where there is one: totals, cells, moments, norms.

All functions take a site and a block of its visits and return NumPy arrays whose columns follow `site.indices()` or
the indices asked for. They speak of one site and one call: where a parameter is used several times, contributions
add up over sites and calls (`nbdyn.store.gradients` does that), but moments, norms and top cells do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.errors import Incompatible
from nbdyn.store import closed_conv, closed_dense, closed_embedding, closed_linear
from nbdyn.store.closed_tools import Tensors, Tile, exact, filled, tensors_of
from nbdyn.store.closed_top import top_of
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from nbdyn.store.factors import Block

_FORMS: dict[str, ModuleType] = {
    "linear": closed_linear, "conv": closed_conv, "embedding": closed_embedding, "dense": closed_dense,
}  # fmt: skip


def total(site: Site, block: Block, dtype: np.dtype | type | None = None) -> np.ndarray:
    """The sum over all visits of the block, (n,): what they add to p.grad.

    For one batch with as many threads and a factor of 1 it equals p.grad bit for bit in Linear layers.

    Args:
        site: the site.
        block: its visits.
        dtype: float64 to compute in; by default the tensors' own.
    """
    with exact():
        return _FORMS[site.form].total(site, tensors_of(block, dtype)).numpy()


def cells(site: Site, block: Block, indices: np.ndarray) -> np.ndarray:
    """Contributions (V, k) of each visit to some parameters of the site, float32 (float64 where factors are).

    Cost: about V x k numbers; a whole matrix is never formed for a few of its cells.

    Args:
        site: the site.
        block: its visits.
        indices: global parameter indices, (k,), all of this site.

    Raises:
        Incompatible: if an index is none of the site's.
    """
    with exact():
        t = tensors_of(block)
        values = next(x for slot, x in t.items() if slot in ("d", "g"))
        out, found = None, 0
        for number, (first, size) in enumerate(site.runs):
            where = np.nonzero((indices >= first) & (indices < first + size))[0]
            if not len(where):
                continue
            part = _run_cells(site, t, number, indices[where] - first)
            found += len(where)
            if len(where) == len(indices):
                return part.numpy()
            out = np.empty((len(values), len(indices)), part.numpy().dtype) if out is None else out
            out[:, _slice(where)] = part.numpy()
    if found < len(indices):
        raise Incompatible(f"{len(indices) - found} of these parameters are none of {site.name}'s.")
    return np.empty((len(values), 0), values.numpy().dtype) if out is None else out


def _run_cells(site: Site, t: Tensors, number: int, places: np.ndarray) -> Tensor:
    if site.form == "dense":
        return closed_dense.run_cells(site, t, number, places)
    if number == 0 and site.first is not None:
        return _FORMS[site.form].weight_cells(site, t, places)
    return _FORMS[site.form].bias_cells(site, t)[:, places]


def narrowed(site: Site, indices: np.ndarray) -> tuple[Site, dict[str, np.ndarray] | None, np.ndarray]:
    """What of a site has to be read for some of its parameters; see `closed_linear.narrowed`."""
    return closed_linear.narrowed(site, indices) if site.form == "linear" else (site, None, indices)


def places(site: Site, indices: np.ndarray) -> np.ndarray:
    """Where parameters lie in the order of `site.indices()`, (k,) int64; -1 for those of other sites."""
    found, before = np.full(len(indices), -1, np.int64), 0
    for first, size in site.runs:
        here = (indices >= first) & (indices < first + size)
        found[here] = indices[here] - first + before
        before += size
    return found


def dense(site: Site, block: Block) -> np.ndarray:
    """All contributions, (V, n). Cost: `bytes_dense`."""
    with exact():
        t = tensors_of(block)
        if site.form == "dense":
            return t["g"].numpy().copy()
        values = filled(_tiles(site, t), t["d"].new_empty, len(block.step), site.size)
        return np.ascontiguousarray(values.numpy())


def bytes_dense(site: Site, block: Block) -> int:
    """Bytes of `dense`."""
    wide = any(array.dtype == np.float64 for array in block.tensors.values())
    return len(block.step) * site.size * (8 if wide else 4)


def moments(site: Site, block: Block, wanted: tuple[str, ...] = closed_linear.MOMENTS) -> dict[str, np.ndarray]:
    """Sums over the visits of c ("sum"), |c| ("sum_abs") and c^2 ("sum_sq"), each (n,) float64.

    One matrix product each for linear layers with one position per visit; elsewhere from the visits' summed cells.

    Args:
        site: the site.
        block: its visits.
        wanted: which of them; fewer save products of linear layers.
    """
    with exact():
        t = tensors_of(block)
        if site.form == "embedding":
            found = closed_embedding.moments(site, t)
        elif site.form == "linear" and closed_linear.one_each(t):
            found = closed_linear.moments(site, t, wanted)
        else:
            found = _moments(site, t)
        return {name: found[name].numpy() for name in wanted}


def _moments(site: Site, t: Tensors) -> dict[str, Tensor]:
    import torch

    out = {name: torch.zeros(site.size, dtype=torch.float64, device="cpu") for name in ("sum", "sum_abs", "sum_sq")}
    for _, places, values in _tiles(site, t):
        wide = values.double()
        out["sum"][places] += wide.sum(0)
        out["sum_abs"][places] += wide.abs().sum(0)
        out["sum_sq"][places] += wide.square().sum(0)
    return out


def norms(site: Site, block: Block) -> np.ndarray:
    """The squared Euclidean norm of each visit's contribution to the site, (V,) float64.

    Embeddings from the rows met, linear layers from products of positions where these take less work than the cells.
    """
    import torch

    with exact():
        t = tensors_of(block)
        if site.form == "embedding":
            return closed_embedding.norms(site, t).numpy()
        if site.form == "linear" and closed_linear.norms_need_no_cells(t):
            return closed_linear.norms(site, t).numpy()
        out = torch.zeros(len(block.step), dtype=torch.float64, device="cpu")
        for visits, _, values in _tiles(site, t):
            out[visits] += values.double().square().sum(1)
        return out.numpy()


def top(site: Site, block: Block, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k cells of largest |c| of each tensor of the site (weight, bias; each range) over the block's visits.

    NaN counts as largest; ties go by (parameter, position); zeros are no cells, so there may be fewer.

    Returns:
        Row of the visit in the block, global parameter index and value of each, tensor by tensor, largest first.
    """
    with exact():
        return top_of(site, tensors_of(block), block.position, np.array([0, len(block.step)]), k, _tiles)


def top_per_step(site: Site, block: Block, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`top` of every step of a block whose visits are in the order of steps: the same triples, step by step."""
    with exact():
        starts = np.nonzero(np.diff(block.step, prepend=-1))[0]
        return top_of(site, tensors_of(block), block.position, np.append(starts, len(block.step)), k, _tiles)


def _tiles(site: Site, t: Tensors, first_bytes: int | None = None) -> Iterator[Tile]:
    """All cells of a site in tiles; those of a linear site in the order of parameters, small ones first if asked."""
    if site.form == "linear":
        return closed_linear.tiles(site, t, first_bytes)
    return _FORMS[site.form].tiles(site, t)


def _slice(where: np.ndarray) -> slice | np.ndarray:
    return slice(where[0], where[-1] + 1) if where[-1] - where[0] == len(where) - 1 else where
