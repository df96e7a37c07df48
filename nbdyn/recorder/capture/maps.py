"""Linear maps y = x W^T + b inside larger modules, stored in the smaller exact form; and each site made once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nbdyn.recorder.capture.affine import wide
from nbdyn.recorder.capture.calls import Stored, joined
from nbdyn.recorder.capture.linear import outer_sums
from nbdyn.store.sites import Site


@dataclass(frozen=True)
class Block:
    """The parameters of a linear map from I to O features, by their global indices.

    Attributes:
        name: the site's name.
        layer: the module that owns the parameters.
        inputs, outputs: I and O.
        weight: index of the weight block's first element; None where the weight takes no part.
        bias: index of the bias's first element; None for none.
        transposed: whether the block is (I, O) instead of (O, I).
    """

    name: str
    layer: str
    inputs: int
    outputs: int
    weight: int | None
    bias: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight block."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(first, size) of weight and bias, as far as they take part."""
        weight = () if self.weight is None else ((self.weight, math.prod(self.shape)),)
        return weight + (() if self.bias is None else ((self.bias, self.outputs),))


class SiteTable:
    """Gives the same object for sites of the same content."""

    def __init__(self) -> None:
        self._sites: dict[tuple[Any, ...], Site] = {}

    def same(self, site: Site) -> Site:
        """The first site with this content."""
        key = (site.name, site.form, site.first, site.shape, site.bias, repr(site.options), site.ranges)
        return self._sites.setdefault(key, site)

    def linear(self, block: Block, a: Tensor, d: Tensor) -> Stored:
        """What a call of a linear map leaves; half precision is kept in factors, contributions have float32 at least.

        Args:
            block: the parameters; weight or bias at least.
            a: (B, T, I) inputs.
            d: (B, T, O) gradients at the outputs.
        """
        parameters = sum(n for _, n in block.ranges)
        if block.weight is not None and a.shape[1] * (block.inputs + block.outputs) <= parameters:
            options = {"transposed": True} if block.transposed else {}
            site = Site(block.name, block.layer, "linear", block.weight, block.shape, block.bias, options)
            return self.same(site), {"a": a.to(d.dtype).contiguous(), "d": d.contiguous()}
        pieces = []
        if block.weight is not None:
            a = a.to(d.dtype)
            pieces.append(outer_sums(d, a) if block.transposed else outer_sums(a, d))
        if block.bias is not None:
            pieces.append(d.sum(1, dtype=wide(d.dtype)))
        site = Site(block.name, block.layer, "dense", ranges=block.ranges)
        return self.same(site), {"g": joined(pieces, len(d))}
