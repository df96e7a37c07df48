"""From the gradient at a function's output to what each sample contributed to parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nbdyn.recorder.capture.affine import wide
from nbdyn.recorder.capture.calls import CannotSplit, Stored
from nbdyn.recorder.capture.local import Cut, agree, exact, find_cut, local_gradients, local_values
from nbdyn.recorder.capture.nodes import Application, Made, Node, Root, View, Watched
from nbdyn.recorder.capture.rules import RULES, Share, Split, own_dim

Contribution = tuple[Watched, int, Tensor]
"""A parameter, the first of its elements, and contributions (B, n) to n of them."""
Cuts = tuple[Cut | None, ...]
"""Where each tensor among a function's arguments has its samples; None where all samples share it."""


def plan(call: Application, output: Tensor, cut: Cut) -> Split:
    """How a call will be split once the gradient at its output is there.

    Raises:
        CannotSplit: if samples cannot be told apart.
    """
    rule = RULES.get(call.name)
    found = rule(call, output.shape, cut) if rule is not None else None
    return found if found is not None else by_vmap(call, output, cut)


def by_vmap(call: Application, output: Tensor, cut: Cut) -> Split:
    """The vector-Jacobian product of the function alone, for each sample alone.

    Raises:
        CannotSplit: if the function of single samples is not what it was for the batch.
    """
    places = [number for number, leaf in enumerate(call.leaves) if isinstance(leaf, (Tensor, Node))]
    nodes = [leaf for leaf in call.leaves if isinstance(leaf, Node)]
    key = (call.function, cut, output.shape, *(_signature(leaf) for leaf in call.leaves))
    known: dict[object, Cuts] = nodes[0].owner.cuts
    if key not in known:
        known[key] = _checked(call, places, output, cut)
    cuts = known[key]
    local = _Local(call, places, cuts)

    def split(gradient: Tensor) -> Iterator[Share]:
        found = local_gradients(local, *local.arguments(), cut(exact(gradient)), cut.size)
        for node, c, own in zip(nodes, found, local.own, strict=True):
            yield Share(node, c) if own is None else Share(node, c.squeeze(own.dim + 1), own.dim)

    return split


class _Local:
    """A call as a function of one sample."""

    def __init__(self, call: Application, places: list[int], cuts: Cuts) -> None:
        self._call = call
        pairs = list(zip(places, cuts, strict=True))
        is_node = [isinstance(call.leaves[place], Node) for place in places]
        self._nodes = [pair for pair, node in zip(pairs, is_node, strict=True) if node]
        self._data = [(place, c) for (place, c), node in zip(pairs, is_node, strict=True) if not node and c is not None]
        self.own = [c for _, c in self._nodes]

    def __call__(self, wanted: Sequence[Tensor], data: Sequence[Tensor]) -> Tensor:
        leaves = [exact(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._call.leaves]
        for (place, _), t in zip(self._nodes + self._data, [*wanted, *data], strict=True):
            leaves[place] = t
        result = self._call.repeated(leaves)
        return result.to(wide(result.dtype)) if result.is_floating_point() else result

    def arguments(self) -> tuple[list[Tensor], list[bool], list[Tensor]]:
        """Nodes and whether they have rows of their own for samples, and data."""
        leaves = self._call.leaves
        wanted = [leaves[place].tensor if c is None else c(leaves[place].tensor) for place, c in self._nodes]
        data = [c(leaves[place]) for place, c in self._data if c is not None]
        return wanted, [c is not None for _, c in self._nodes], data


def _checked(call: Application, places: list[int], output: Tensor, cut: Cut) -> Cuts:
    """The first guess for which the function of single samples gives what it gave for the batch."""
    expected, reason = cut(output), "its result for a sample depends on other samples"
    for others, rows in itertools.product((True, False), (False, True)):
        cuts = tuple(_guess(call.leaves[place], output.shape, cut, others, rows) for place in places)
        local = _Local(call, places, cuts)
        wanted, own, data = local.arguments()
        if not data and not any(own):
            continue
        try:
            if agree(local_values(local, wanted, own, data, cut.size), expected):
                return cuts
        except CannotSplit as error:
            reason = str(error)
    raise CannotSplit(reason)


def _guess(leaf: Tensor | Node, shape: torch.Size, cut: Cut, others: bool, rows: bool) -> Cut | None:
    """Where an argument may have its samples.

    Args:
        leaf: the argument.
        shape: the output's.
        cut: where the output has its samples.
        others: whether tensors of another number of dimensions may have samples.
        rows: whether nodes may have a row for each sample.
    """
    if isinstance(leaf, Node):
        dim = own_dim(leaf, shape, cut) if rows and not isinstance(leaf, Root) else None
        return None if dim is None else Cut(cut.size, dim)
    if leaf.ndim == len(shape):
        return cut if cut.fits(leaf) else None
    return find_cut(leaf.shape, cut.size, cut.dim == 1 or cut.time_major) if others else None


def contributions(share: Share, size: int) -> Iterator[Contribution | Stored]:
    """Brings contributions at a node back to its parameters.

    Raises:
        CannotSplit: if a function on the way cannot be applied to single samples.
    """
    node, c, dim = share.node, share.c, share.dim
    if isinstance(node, View):
        yield from _through_view(node, c, dim, size)
    elif isinstance(node, Made):
        yield from _through_function(node, c, dim, size)
    elif dim is None:
        assert isinstance(node, Root)
        yield node.watched, 0, c.reshape(size, -1)
    else:
        yield from _through_view(View(node.tensor, node), c, dim, size)


def _through_view(node: View, c: Tensor, dim: int | None, size: int) -> Iterator[Contribution | Stored]:
    if dim is not None and node.index is None and node.tensor.stride(dim) == 0:  # all rows are the same elements
        node, dim = View(node.tensor.select(dim, 0), node.base), None
    if dim is None and node.offset is not None and isinstance(node.base, Root):
        yield node.base.watched, node.offset, c.reshape(size, -1)
        return
    places = node.places()
    places = places.reshape(1, -1) if dim is None else places.movedim(dim, 0).reshape(size, -1)
    base = node.base.tensor
    whole = c.new_zeros(size, base.numel()).scatter_add_(1, places.expand(size, -1), c.reshape(size, -1))
    yield from contributions(Share(node.base, whole.reshape(size, *base.shape)), size)


def _through_function(node: Made, c: Tensor, dim: int | None, size: int) -> Iterator[Contribution | Stored]:
    if dim is not None:
        parts = plan(node.call, node.tensor, Cut(size, dim))(c.movedim(0, dim))
    else:
        places = [number for number, leaf in enumerate(node.call.leaves) if isinstance(leaf, (Tensor, Node))]
        local = _Local(node.call, places, (None,) * len(places))
        found = local_gradients(local, *local.arguments(), exact(c), size)
        nodes = [leaf for leaf in node.call.leaves if isinstance(leaf, Node)]
        parts = [Share(node, c) for node, c in zip(nodes, found, strict=True)]
    for part in parts:
        if isinstance(part, Share):
            yield from contributions(part, size)
        else:
            yield part


def _signature(leaf: Any) -> Any:
    """What tells calls of a function apart that may hold samples in different places."""
    tensor = leaf.tensor if isinstance(leaf, Node) else leaf
    return (type(leaf), tensor.shape) if isinstance(tensor, Tensor) else repr(leaf)
