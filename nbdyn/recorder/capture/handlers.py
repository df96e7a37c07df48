"""Which handler captures which module."""

from __future__ import annotations

from torch import nn

from nbdyn.recorder.capture import convolution, embedding, generic, linear, norms, recurrent
from nbdyn.recorder.capture.calls import Handler
from nbdyn.recorder.capture.uses import CONTAINERS

HANDLERS: dict[type[nn.Module], type] = {
    **linear.HANDLERS, **convolution.HANDLERS, **embedding.HANDLERS, **norms.HANDLERS, **recurrent.HANDLERS,
    **generic.HANDLERS,
}  # fmt: skip
"""By the class whose `forward` a module must have unchanged."""


def handler_of(name: str, module: nn.Module, firsts: dict[int, int]) -> Handler | None:
    """The handler of a module, None if it has no closed form: its bare parameters are then watched at work."""
    for kind, handler in HANDLERS.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return handler(name, module, firsts)
    return None


def holds_parameters(module: nn.Module, firsts: dict[int, int]) -> bool:
    """Whether a module owns recorded parameters, itself or in lists and dictionaries, which are never called."""
    if isinstance(module, CONTAINERS):
        return False
    holders = [module, *(child for child in module.children() if isinstance(child, CONTAINERS))]
    return any(p is not None and id(p) in firsts for holder in holders for p in holder._parameters.values())


def sequence_first(model: nn.Module) -> bool:
    """Whether the model's sequence modules all have the time before the sample (torch's default)."""
    orders = {
        bool(module.batch_first) for module in model.modules() if isinstance(getattr(module, "batch_first", None), bool)
    }
    return orders == {False}
