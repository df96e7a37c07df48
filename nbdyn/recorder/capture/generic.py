"""The last resort for modules whose inside is unknown: their vector-Jacobian product for each sample."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored, joined
from nbdyn.recorder.capture.local import Cut, agree, exact, find_cut, local_gradients, local_values
from nbdyn.recorder.capture.maps import SiteTable
from nbdyn.store.sites import Site


class Generic:
    """Handler of deterministic modules; their own parameters' contributions are computed at once, form "dense".

    The forward pass runs once more, without hooks, for each sample as a batch of one. Children's parameters are left
    to the children. If the call has its outputs, they are compared, the first time.

    Args:
        name: the module's name.
        module: the module.
        firsts: id(parameter) -> global index of its first element, for the recorded parameters.
    """

    def __init__(self, name: str, module: nn.Module, firsts: dict[int, int]) -> None:
        self._name = name
        self._firsts = firsts
        self._sites = SiteTable()
        self._checked = False

    def __call__(self, call: ModuleCall) -> list[Stored]:
        """One site for all parameters of the module itself.

        Raises:
            CannotSplit: if samples cannot be told apart, or the module is not a deterministic function of each.
        """
        module = call.module
        own = {
            name: p
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad and id(p) in self._firsts
        }
        arrived = [place for place, grad in enumerate(call.grads) if grad is not None]
        if not own or not arrived:
            return []
        _refuse_coupled(module)
        leaves, spec = tree_flatten((call.args, call.kwargs))
        cuts = {place: _cut(leaf, call) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        cut_places = [place for place, cut in cuts.items() if cut is not None]
        wrapped = _Forward(module)
        state = {f"module.{name}": exact(p) for name, p in module.named_parameters()}
        buffers = {f"module.{name}": exact(b) for name, b in module.named_buffers()}

        def function(wanted: Sequence[Tensor], data: Sequence[Tensor]) -> tuple[Tensor, ...]:
            changed = [exact(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for place, t in zip(cut_places, data, strict=True):
                changed[place] = t
            replaced = state | {f"module.{name}": t for name, t in zip(own, wanted, strict=True)}
            replaced |= {name: b.clone() for name, b in buffers.items()}  # the pass may write into them
            args, kwargs = tree_unflatten(changed, spec)
            outputs = list(tensors_of(torch.func.functional_call(wrapped, replaced, args, kwargs)))
            if len(outputs) != len(call.grads):
                raise CannotSplit(f"it gave {len(outputs)} tensors for a sample and {len(call.grads)} for the batch")
            return tuple(outputs[place] for place in arrived)

        wanted, by_row = [p.detach() for p in own.values()], [False] * len(own)
        data = [cuts[place](leaves[place]) for place in cut_places]  # type: ignore[misc]
        if not data:
            raise CannotSplit("none of its arguments has the samples of the batch")
        with _without_hooks(module):
            if call.outputs is not None and not self._checked:
                self._check(call, local_values(function, wanted, by_row, data, call.size), arrived)
            gradients = tuple(self._of_output(call.grads[place], call) for place in arrived)
            found = local_gradients(function, wanted, by_row, data, gradients, call.size)
        ranges = tuple((self._firsts[id(p)], p.numel()) for p in own.values())
        site = self._sites.same(Site(self._name, self._name, "dense", ranges=ranges))
        return [(site, {"g": joined(list(found), call.size)})]

    def _of_output(self, t: Any, call: ModuleCall) -> Tensor:
        """An output, or the gradient at it, by sample."""
        cut = _cut(t, call)
        if cut is None:
            raise CannotSplit(f"its output of shape {list(t.shape)} is not one by sample, of {call.size}")
        return exact(cut(t))

    def _check(self, call: ModuleCall, found: tuple[Tensor, ...], arrived: list[int]) -> None:
        assert call.outputs is not None
        for place, t in zip(arrived, found, strict=True):
            if not agree(t, self._of_output(call.outputs[place], call)):
                raise CannotSplit("its output for a sample depends on other samples")
        self._checked = True


class _Forward(nn.Module):
    """Calls a module's `forward` past its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module.forward(*args, **kwargs)


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Children's forward passes are to be seen by nobody."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    kept = [(child, name, child.__dict__[name]) for child in module.modules() for name in names]
    for child, name, hooks in kept:
        if hooks:
            child.__dict__[name] = OrderedDict()
    try:
        yield
    finally:
        for child, name, hooks in kept:
            child.__dict__[name] = hooks


def _cut(t: Tensor, call: ModuleCall) -> Cut | None:
    return find_cut(t.shape, call.size, call.sequence_first)


def _refuse_coupled(module: nn.Module) -> None:
    """Raise CannotSplit for what makes samples depend on each other, or on other parameters than the module's own."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (child.training or child.running_mean is None):
            raise CannotSplit("batch normalisation inside it couples the samples")
    if any(hasattr(hook, "compute_weight") for hook in module._forward_pre_hooks.values()):
        raise CannotSplit("its weight is computed of parameters outside its forward pass")


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, dict)):
        for item in output.values() if isinstance(output, dict) else output:
            yield from tensors_of(item)


HANDLERS: dict[type[nn.Module], type[Generic]] = {nn.Bilinear: Generic}
"""Handler classes by the class whose forward pass must be unchanged."""
