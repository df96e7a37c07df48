"""What captured calls must agree with: autograd of the network, in float64, one sample's gradient at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbdyn.recorder.capture.calls import Stored
from nbdyn.store.sites import Site

Forward = Callable[[nn.Module], Sequence[Tensor]]
"""Runs a model on the batch: the outputs that get gradients."""


def firsts_of(model: nn.Module) -> dict[int, int]:
    """Global indices, with gaps so that a mistaken offset shows."""
    firsts, first = {}, 5
    for p in model.parameters():
        firsts[id(p)] = first
        first += p.numel() + 3
    return firsts


def total_of(model: nn.Module) -> int:
    return 5 + sum(p.numel() + 3 for p in model.parameters())


def cells(stored: list[Stored], size: int, model: nn.Module) -> Tensor:
    """(B, all parameters) contributions in float64, added up over sites and calls, as the forms say."""
    found = torch.zeros(size, total_of(model), dtype=torch.float64)
    for site, tensors in stored:
        assert all(t.is_contiguous() and len(t) == size for t in tensors.values())
        tensors = {slot: t.double() if t.is_floating_point() else t for slot, t in tensors.items()}
        flat = {"linear": _linear, "embedding": _embedding, "conv": _conv, "dense": _dense}[site.form](site, tensors)
        found.index_add_(1, torch.from_numpy(site.indices()), flat.reshape(size, site.size))
    return found


def _dense(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    return tensors["g"]


def _linear(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    order = "bti,bto->bio" if site.options.get("transposed") else "bti,bto->boi"
    weight = torch.einsum(order, tensors["a"], tensors["d"])
    assert weight.shape[1:] == site.shape
    return weight.flatten(1) if site.bias is None else torch.cat([weight.flatten(1), tensors["d"].sum(1)], 1)


def _embedding(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    ids, d = tensors["ids"], tensors["d"]
    return torch.einsum("btv,bte->bve", functional.one_hot(ids + 1, site.shape[0] + 1)[..., 1:].double(), d)


def _conv(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    a, d, options = tensors["a"], tensors["d"], site.options
    settings = {key: options[key] for key in ("stride", "padding", "dilation", "groups")}
    rows = []
    for a_s, d_s in zip(a.split(1), d.split(1), strict=True):
        weight = torch.zeros(site.shape, dtype=torch.float64, requires_grad=True)
        output = getattr(functional, f"conv{a.ndim - 2}d")(a_s, weight, None, **settings)
        (grad,) = torch.autograd.grad(output, weight, d_s)
        bias = [] if site.bias is None else [d_s.flatten(2).sum(2)[0]]
        rows.append(torch.cat([grad.flatten(), *bias]))
    return torch.stack(rows)


def one_at_a_time(
    model: nn.Module,
    forward: Forward,
    gradients: Sequence[Tensor | None],
    size: int,
    dims: Sequence[int] = (0,),
    dtype: torch.dtype = torch.float64,
    seed: int = 3,
) -> Tensor:
    """(B, all parameters): the batch runs again for each sample, and only this sample's outputs get a gradient.

    Args:
        model: the model; a copy in `dtype` runs.
        forward: runs it.
        gradients: at its outputs.
        size: B.
        dims: the dimension of the samples in each output.
        dtype: float64; float32 where random numbers may depend on it.
        seed: of the random numbers, the same each time.
    """
    exact = copy.deepcopy(model).to(dtype)
    firsts, found = firsts_of(exact), torch.zeros(size, total_of(model), dtype=torch.float64)
    parameters = [p for p in exact.parameters() if p.requires_grad]
    for sample in range(size):
        torch.manual_seed(seed)
        triples = [t for t in zip(forward(exact), gradients, dims, strict=True) if t[1] is not None]
        ends = [_only(g.to(dtype), sample, size, dim) for _, g, dim in triples]
        grads = torch.autograd.grad([o for o, _, _ in triples], parameters, ends, allow_unused=True)
        for p, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                found[sample, firsts[id(p)] : firsts[id(p)] + p.numel()] = grad.double().flatten()
    return found


def _only(gradient: Tensor, sample: int, size: int, dim: int) -> Tensor:
    """Zero but for one sample, which may have several rows."""
    mask = torch.zeros(size, dtype=gradient.dtype)
    mask[sample] = 1
    mask = mask.repeat_interleave(gradient.shape[dim] // size)
    return gradient * mask.reshape(-1, *[1] * (gradient.ndim - dim - 1))


def agree(model: nn.Module, found: Tensor, expected: Tensor, each: float = 5e-6, total: float = 1e-6) -> None:
    """Each sample's cells equal the reference, and their sum p.grad, relative to the tensor's largest cell."""
    firsts = firsts_of(model)
    others = torch.ones(found.shape[1], dtype=torch.bool)
    for name, p in model.named_parameters():
        own = slice(firsts[id(p)], firsts[id(p)] + p.numel())
        others[own] = False
        error, scale = (found[:, own] - expected[:, own]).abs().max(), expected[:, own].abs().max()
        assert error <= each * scale, f"{name}: {error / scale:.1e}"
        grad = torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
        error, scale = (found[:, own].sum(0) - grad).abs().max(), grad.abs().max()
        assert error <= total * scale, f"sum of {name}: {error / scale:.1e}"
    assert not found[:, others].any()


def gradients_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients at outputs, the same each time."""
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]


def scaled(model: Any, std: float = 0.4) -> Any:
    """A model with random parameters, biases too, the same each time."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=std)
    return model
