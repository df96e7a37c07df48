"""What a replay needs beside the weights: optimizer state, random generators, buffers, train/eval modes."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from nbdyn.errors import Incompatible
from nbdyn.recorder.describe import as_json, clean_name, groups_as_json, python_rng
from nbdyn.store.optimizer_state import Snapshot, set_groups


def take(model: nn.Module, optimizer: torch.optim.Optimizer, rng: dict[str, Any]) -> Snapshot:
    """Copy the optimizer's state and note generators and modes. Cost: one pass over the optimizer's state."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    place = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{place}/{key}"] = value.detach().clone()
                else:
                    values[f"{place}/{key}"] = as_json(value)
            place += 1
    entries = {
        "groups": groups_as_json(optimizer),
        "optimizer_values": values,
        "training": [clean_name(name) for name, module in model.named_modules() if module.training],
        "python_rng": rng.get("python"),
    }
    if "numpy" in rng:
        name, keys, *rest = rng["numpy"]
        tensors["rng/numpy"] = torch.from_numpy(keys.astype(np.int64))
        entries["numpy_rng"] = [name, *rest]
    for number, state in enumerate(rng.get("cuda", [])):
        tensors[f"rng/cuda/{number}"] = state
    return Snapshot(tensors, entries)


def generators(full: bool) -> dict[str, Any]:
    """States of the random generators right now; all but torch's CPU generator (slow to read) only if `full`."""
    states: dict[str, Any] = {"torch": torch.get_rng_state()}
    if full:
        if torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
        states["python"] = python_rng()
        states["numpy"] = np.random.get_state()
    return states


def to_bytes(snapshot: Snapshot) -> bytes:
    """The snapshot in the safetensors format (no pickle), its other entries as JSON in the header."""
    from safetensors.torch import save

    tensors = {name: t.to("cpu").contiguous() for name, t in snapshot.tensors.items()}
    tensors["entries"] = torch.frombuffer(bytearray(json.dumps(snapshot.entries).encode()), dtype=torch.uint8)
    return save(tensors)


def restore_optimizer(optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
    """Put recorded state and param-group options into an optimizer over the same parameters.

    Raises:
        Incompatible: if the param groups differ in number.
    """
    groups = snapshot.entries["groups"]
    if len(groups) != len(optimizer.param_groups):
        raise Incompatible(f"the run has {len(groups)} param groups, this optimizer {len(optimizer.param_groups)}.")
    set_groups(optimizer, groups)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for name, value in snapshot.tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            place, _, key = rest.partition("/")
            p = parameters[int(place)]
            # Step counters stay where they were (on the CPU, unless capturable); moments live beside the parameter.
            optimizer.state[p][key] = value.clone() if value.ndim == 0 else value.to(p.device, copy=True)
    for name, value in snapshot.entries["optimizer_values"].items():
        place, _, key = name.partition("/")
        optimizer.state[parameters[int(place)]][key] = value


def restore_generators(snapshot: Snapshot) -> None:
    """Set Python's, NumPy's and CUDA's generators as recorded (torch's CPU generator is kept per step)."""
    if snapshot.entries.get("python_rng"):
        version, numbers, gauss = snapshot.entries["python_rng"]
        random.setstate((version, tuple(numbers), gauss))
    if "rng/numpy" in snapshot.tensors:
        name, *rest = snapshot.entries["numpy_rng"]
        np.random.set_state((name, snapshot.tensors["rng/numpy"].numpy().astype(np.uint32), *rest))
    states = [t for name, t in sorted(snapshot.tensors.items()) if name.startswith("rng/cuda/")]
    if states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Leave every random generator as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def set_modes(model: nn.Module, snapshot: Snapshot) -> None:
    """Put every module into train or eval mode, as recorded."""
    training = set(snapshot.entries["training"])
    for name, module in model.named_modules():
        module.training = clean_name(name) in training
