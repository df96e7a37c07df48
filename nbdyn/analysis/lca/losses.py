"""The loss function of a run, where the user does not give it."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from nbdyn.errors import Incompatible
from nbdyn.store import Store


def loss_of(store: Store, loss_fn: Any) -> Any:
    """The loss function given, or the one of the recorded name with its default options.

    A run knows its loss by name alone. That of `torch.nn` (CrossEntropyLoss) and of `torch.nn.functional`
    (cross_entropy) are taken with their defaults.

    Raises:
        Incompatible: if the name says nothing.
    """
    if loss_fn is not None:
        return loss_fn
    name = store.config["loss"]
    kind = getattr(nn, name or "", None)
    if inspect.isclass(kind) and issubclass(kind, nn.modules.loss._Loss):
        return kind()
    function = getattr(nn.functional, name or "", None)
    if function is not None and "reduction" in inspect.signature(function).parameters:
        return function
    raise Incompatible(f"the run's loss is called {name}, which torch.nn does not have; run.lca(data, loss_fn).")
