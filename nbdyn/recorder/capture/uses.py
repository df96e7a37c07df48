"""Watches functions at work on bare parameters: what modules without a closed form do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nbdyn.recorder.capture.calls import Stored
from nbdyn.recorder.capture.maps import SiteTable
from nbdyn.recorder.capture.mode import watch
from nbdyn.recorder.capture.nodes import Node, Root, Watched, reason_of
from nbdyn.recorder.capture.rules import Share, Split
from nbdyn.recorder.capture.split import contributions
from nbdyn.store.sites import Site

CONTAINERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)
"""Modules that are never called: what they hold is used by the module that has them."""


class Uses:
    """Watches the bare parameters of one module, from `begin` to `end`.

    Each torch function that takes one of them, or a tensor made of them alone, is noted; when the gradient at its
    output arrives, in the backward pass, what each sample contributed is emitted. Results, the autograd graph and
    random numbers stay as they would be.

    While several are between `begin` and `end`, all go on to watch until the outermost ends: a parent that begins
    sees what is done with tensors that its children made of their parameters.

    Args:
        name: the module's name.
        module: the module; its own parameters are watched, and those of the lists and dictionaries in it; for
            nn.MultiheadAttention those of out_proj too.
        firsts: id(parameter) -> global index of its first element, for the recorded parameters.
        emit: is given what is to be stored of a use, in the backward pass.
        cannot: is told which parameters have a use that cannot be split into samples, and why.
        sequence_first: whether tensors of three dimensions are (time, sample, feature).
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        firsts: dict[int, int],
        emit: Callable[[Stored], None],
        cannot: Callable[[list[nn.Parameter | None], str], None],
        sequence_first: bool = False,
    ) -> None:
        attention = isinstance(module, nn.MultiheadAttention)
        self._emit, self._cannot = emit, cannot
        self.time_first = sequence_first or attention
        self._own = self._watched(name, module, firsts)
        # The child's forward pass is never called: its parameters are watched inside the attention's function only.
        self._inner = self._watched(f"{name}.out_proj", module.out_proj, firsts) if attention else []
        watched = {id(w.parameter) for w in self._own + self._inner}
        self._constants = [p for p in module.parameters() if id(p) not in watched]
        self._buffers = [m._buffers for m in module.modules()]
        self._attributes = vars(module)
        self.sites = SiteTable()
        self.cuts: dict[Any, Any] = {}
        self.size = 0

    def _watched(self, layer: str, module: nn.Module, firsts: dict[int, int]) -> list[Watched]:
        own = [(name, p) for name, p in module._parameters.items() if p is not None and id(p) in firsts]
        found = [Watched(name, layer, p, firsts[id(p)], self.time_first) for name, p in own]
        for name, child in module.named_children():
            if isinstance(child, CONTAINERS):
                found += self._watched(f"{layer}.{name}" if layer else name, child, firsts)
        return found

    def begin(self, size: int) -> None:
        """A forward pass of the module begins, for a batch of `size` samples; may be nested."""
        self.size = size
        watch().begin(self)

    def end(self) -> None:
        """It is over; without a `begin` nothing happens."""
        watch().end(self)

    def roots(self, inner: bool) -> list[tuple[Tensor, Node]]:
        """The watched parameters that require a gradient, as nodes; `inner`: those of an attention's out_proj."""
        watched = self._inner if inner else self._own
        return [(w.parameter, Root(w, self)) for w in watched if w.parameter.requires_grad and not w.given_up]

    def constants(self) -> Iterable[Tensor]:
        """Tensors that do not depend on the batch: other parameters, buffers, attributes."""
        yield from self._constants
        yield from (w.parameter for w in self._own if w.given_up or not w.parameter.requires_grad)
        for buffers in self._buffers:
            yield from (t for t in buffers.values() if t is not None)
        yield from (t for t in self._attributes.values() if isinstance(t, Tensor))

    def give_up(self, nodes: Iterable[Node], reason: str) -> None:
        """Some nodes have a use that cannot be split: their parameters are watched no more."""
        watched = [w for node in nodes for w in node.parameters]
        for w in watched:
            w.given_up = True
        self._cannot([w.parameter for w in watched], reason)

    def arrived(self, nodes: list[Node], function: Any, size: int, split: Split, gradient: Tensor) -> None:
        """The gradient at a function's output is there: emit what each sample contributed."""
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                for part in split(gradient.detach()):
                    pieces = contributions(part, size) if isinstance(part, Share) else (part,)
                    for piece in pieces:
                        self._emit(self._dense(*piece) if len(piece) == 3 else piece)
        except Exception as error:  # training goes on; what is missing is said
            self.give_up(nodes, reason_of(function, error))

    def _dense(self, watched: Watched, offset: int, g: Tensor) -> Stored:
        ranges = ((watched.first + offset, g.shape[1]),)
        site = Site(watched.site, watched.layer, "dense", ranges=ranges)
        return self.sites.same(site), {"g": g.contiguous()}
