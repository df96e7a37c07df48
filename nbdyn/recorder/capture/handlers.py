"""Which handler captures which module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nbdyn.recorder.capture import convolution, embedding, generic, linear, norms, recurrent
from nbdyn.recorder.capture.calls import Handler, Stored
from nbdyn.recorder.capture.uses import Uses

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


def uses_of(
    name: str,
    module: nn.Module,
    firsts: dict[int, int],
    emit: Callable[[Stored], None],
    cannot: Callable[[list[nn.Parameter | None], str], None],
) -> Uses:
    """The watch over the bare parameters of a module during its forward pass."""
    return Uses(name, module, firsts, emit, cannot)


def sequence_first(model: nn.Module) -> bool:
    """Whether the model's sequence modules all have the time before the sample (torch's default)."""
    orders = {
        bool(module.batch_first) for module in model.modules() if isinstance(getattr(module, "batch_first", None), bool)
    }
    return orders == {False}
