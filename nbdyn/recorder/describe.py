"""What a run's metadata says of the model, the optimizer and the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import random
from typing import Any

import torch
from torch import nn

from nbdyn.errors import Incompatible
from nbdyn.store.provenance import package_version


def clean_name(name: str) -> str:
    """A parameter's name without the prefix that torch.compile adds."""
    return name.replace("_orig_mod.", "")


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters, tied ones once, in the order of `model.named_parameters()`.

    Raises:
        Incompatible: if a parameter is lazy, complex or not floating point, or there is none.
    """
    found = [(clean_name(name), p) for name, p in model.named_parameters()]
    for name, p in found:
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise Incompatible(f"{name} has no shape yet (a lazy module); run one batch through the model first.")
        if not p.is_floating_point():
            raise Incompatible(f"{name} is {p.dtype}; nbdyn records real floating-point parameters.")
    if not found:
        raise Incompatible(f"{type(model).__name__} has no parameters to record.")
    return found


def row_dtype(parameters: list[tuple[str, nn.Parameter]]) -> str:
    """The type of a row of weights, lossless for every tensor: "f4", or "f8" if one is float64."""
    return "f8" if any(p.dtype == torch.float64 for _, p in parameters) else "f4"


def tensor_entries(parameters: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Where each tensor stands in a flat row of weights, and what it is (JSON-able)."""
    entries, first = [], 0
    for name, p in parameters:
        size = math.prod(p.shape)
        entries.append(
            {
                "name": name,
                "layer": name.rpartition(".")[0],
                "shape": list(p.shape),
                "dtype": str(p.dtype).removeprefix("torch."),
                "first": first,
                "size": size,
                "trainable": p.requires_grad,
            }
        )
        first += size
    return entries


def describe(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, weights: str, every: int, extent: int
) -> dict[str, Any]:
    """The configuration stored with a run (JSON-able)."""
    parameters = named_parameters(model)
    owner = group_of_parameter(parameters, optimizer)
    names = {id(p): name for name, p in parameters}
    tensors = [entry | {"group": owner[entry["name"]]} for entry in tensor_entries(parameters)]
    owners = {t["layer"] for t in tensors}
    modules = ((clean_name(name), m) for name, m in model.named_modules())
    return {
        "model": type(getattr(model, "_orig_mod", model)).__name__,
        "tensors": tensors,
        "layers": [{"name": name, "type": type(m).__name__} for name, m in modules if name in owners],
        "buffers": [{"name": clean_name(n), "dtype": str(b.dtype), "shape": list(b.shape)} for n, b in buffers(model)],
        "parameters": sum(t["size"] for t in tensors),
        "row_dtype": row_dtype(parameters),
        "row_extent": extent,
        "optimizer": {
            "name": type(optimizer).__name__,
            "groups": groups_as_json(optimizer),
            "order": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        },
        "loss": None if loss_fn is None else getattr(loss_fn, "__name__", type(loss_fn).__name__),
        "weights": weights,
        "every": every,
        "sources": [],
        "seams": [],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seeds": {"torch": torch.initial_seed()},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def group_of_parameter(parameters: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The param group that owns each named parameter, -1 for none.

    Raises:
        Incompatible: if the optimizer updates tensors that the model does not list.
    """
    groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    owner = {name: groups.pop(id(p), -1) for name, p in parameters}
    if groups:
        raise Incompatible(
            f"the optimizer updates {len(groups)} tensors that the model does not list; pass the module that "
            "owns them all, such as nn.ModuleList([encoder, decoder])."
        )
    return owner


def groups_as_json(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of every param group, without the parameters."""
    return [
        {key: as_json(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def as_json(value: Any) -> Any:
    """A JSON value for an option of an optimizer; text for what has none."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The model's buffers in a fixed order."""
    return list(model.named_buffers())


def versions() -> dict[str, str]:
    """Versions that a number of this run may depend on."""
    found = {"nbdyn": package_version(), "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "numpy", "tiledb", "pandas"):
        found[name] = importlib.metadata.version(name)
    return found


def python_rng() -> list[Any]:
    """Python's generator state as JSON-able lists."""
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]
