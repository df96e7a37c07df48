"""What the handlers of modules with a weight and a bias share: which of the two take part, and their sites."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored, joined
from nbdyn.store.sites import Site


class Affine:
    """Base of the handlers of modules with a weight and, perhaps, a bias, one input and one output.

    Args:
        name: the module's name.
        module: the module.
        firsts: id(parameter) -> global index of its first element, for the recorded parameters.
    """

    def __init__(self, name: str, module: nn.Module, firsts: dict[int, int]) -> None:
        self._name = name
        self._firsts = {id(p): firsts[id(p)] for p in module.parameters(recurse=False) if id(p) in firsts}
        others = [key for key, p in module._parameters.items() if id(p) in firsts and key not in ("weight", "bias")]
        self._others = ", ".join(others)
        self._sites: dict[Any, Site] = {}

    def __call__(self, call: ModuleCall) -> list[Stored]:
        """The site of a call, with its tensors; nothing where no gradient arrived or no parameter takes part.

        Raises:
            CannotSplit: if the call cannot be split into samples.
        """
        if self._others:  # as of nn.utils.weight_norm, which makes the weight of them before the call
            raise CannotSplit(f"its {self._others} are used outside its forward pass")
        d, module = call.grads[0], call.module
        weight, bias = self._taking_part(module, "weight"), self._taking_part(module, "bias")
        if d is None or (weight is None and bias is None):
            return []
        x = call.args[0] if call.args else call.kwargs["input"]
        return self._split(call, x.detach(), d.detach(), weight, bias)

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        """What is stored of a call with input x and gradient d at its output."""
        raise NotImplementedError

    def _taking_part(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """A parameter that is recorded and trained at present; weights computed from others are none."""
        p = module._parameters.get(name)
        return p if p is not None and p.requires_grad and id(p) in self._firsts else None

    def _first(self, parameter: nn.Parameter | None) -> int | None:
        return None if parameter is None else self._firsts[id(parameter)]

    def _site(
        self,
        form: str,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        shape: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Site:
        """The site in one of the closed forms, the same object each time; `shape`: the weight's unless given."""
        shape = tuple(weight.shape) if shape is None else shape
        key = (form, bias is None, shape, repr(options))
        if key not in self._sites:
            first = self._firsts[id(weight)]
            self._sites[key] = Site(self._name, self._name, form, first, shape, self._first(bias), options)
        return self._sites[key]

    def _dense(self, *pieces: tuple[nn.Parameter | None, Tensor | None], note: str = "") -> list[Stored]:
        """The site of materialised contributions: (parameter, contributions (B, ...)), the parameter None to omit."""
        present = [(self._firsts[id(p)], p.numel(), g) for p, g in pieces if p is not None and g is not None]
        ranges = tuple((first, size) for first, size, _ in present)
        key = ("dense", ranges, note)
        if key not in self._sites:
            self._sites[key] = Site(self._name, self._name, "dense", ranges=ranges, note=note)
        gradients = [g for _, _, g in present]
        return [(self._sites[key], {"g": joined(gradients, len(gradients[0]))})]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The precision in which contributions are materialised: float32 at least.

    >>> wide(torch.float16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def numbers(*parameters: nn.Parameter | None) -> int:
    """How many elements some parameters have."""
    return sum(p.numel() for p in parameters if p is not None)
