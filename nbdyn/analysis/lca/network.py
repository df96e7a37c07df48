"""A network taken by itself: a copy whose weights and gradients are flat vectors, unseen by a recorder."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nbdyn.errors import Incompatible
from nbdyn.recorder.describe import clean_name, named_parameters


def live_buffers(model: nn.Module) -> frozenset[str]:
    """The buffers that the loss may depend on: all but the running statistics of norms that use those of the batch."""
    idle = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
        if module.training or name == "num_batches_tracked"
    }
    return frozenset(clean_name(name) for name, buffer in model.named_buffers() if id(buffer) not in idle)


def copied(model: nn.Module) -> nn.Module:
    """A copy of the network, without gradients."""
    try:
        copied = copy.deepcopy(model)
    except (TypeError, RuntimeError) as error:
        raise Incompatible(
            f"this {type(model).__name__} cannot be copied ({error}); while it is recorded, use record(..., lca=...)."
        ) from error
    copied.zero_grad(set_to_none=True)
    return copied


def unhooked(loss_fn: Any) -> Any:
    """The loss function, none of whose hooks (a recorder's) sees what is evaluated here."""
    if not isinstance(loss_fn, nn.Module):
        return loss_fn
    form = copy.copy(loss_fn)
    form._forward_hooks = type(loss_fn._forward_hooks)()
    return form


def flatten(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a model's parameters and their gradients views of two flat tensors."""
    named = named_parameters(model)
    kinds = {p.dtype for _, p in named}
    devices = {p.device for _, p in named}
    if len(kinds) > 1 or len(devices) > 1:
        raise Incompatible(f"the parameters are of several types or devices: {kinds | devices}; LCA needs one of each.")
    flat = torch.cat([p.detach().reshape(-1) for _, p in named])
    grad = torch.zeros_like(flat)
    place = 0
    for _, p in named:
        piece = slice(place, place + p.numel())
        p.requires_grad_(True)
        p.data, p.grad = flat[piece].view(p.shape), grad[piece].view(p.shape)
        place += p.numel()
    return flat, grad
