"""What handlers of modules must agree with: autograd in float64, one sample at a time; and p.grad of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nbdyn.recorder.capture.calls import ModuleCall, Stored
from nbdyn.store.sites import Site

Take = Callable[[Tensor, int], Tensor]


def batch_first(t: Tensor, sample: int) -> Tensor:
    return t[sample : sample + 1]


def time_first(t: Tensor, sample: int) -> Tensor:
    return t[:, sample : sample + 1]


def folded(times: int) -> Take:
    """Rows of one sample that stand together."""
    return lambda t, sample: t[sample * times : (sample + 1) * times]


def firsts_of(module: nn.Module) -> dict[int, int]:
    """Global indices with a gap before each parameter, so that a mistaken offset shows."""
    firsts, first = {}, 0
    for p in module.parameters():
        firsts[id(p)] = first + 3
        first += 3 + p.numel()
    return firsts


def run(
    handlers: dict[Any, Any],
    module: nn.Module,
    args: Sequence[Any],
    size: int,
    sequence_first: bool = False,
    dtype: torch.dtype | None = None,
    handler: Any = None,
    **kwargs: Any,
) -> tuple[list[Stored], Tensor]:
    """One forward and backward pass: what the handler stores, and the output's gradient (random, seeded).

    `dtype`: of autocast, None for none.
    """
    for p in module.parameters():
        p.grad = None
    handler = handler or handler_for(handlers, module)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        output = module(*args, **kwargs)
    torch.manual_seed(11)
    d = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    stored: list[Stored] = []
    call = ModuleCall(module, tuple(args), kwargs, None, [None], size, sequence_first)

    def arrived(grad: Tensor) -> None:
        call.grads[0] = grad
        before = torch.get_rng_state()
        with torch.no_grad():
            stored.extend(handler(call))
        assert torch.equal(before, torch.get_rng_state())

    output.register_hook(arrived)
    output.backward(d)
    torch.set_rng_state(state)
    return stored, d


def handler_for(handlers: dict[Any, Any], module: nn.Module) -> Any:
    for kind, handler in handlers.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return handler("layer", module, firsts_of(module))
    raise AssertionError(f"no handler for {module}")


def cells(stored: list[Stored], module: nn.Module, size: int) -> dict[str, Tensor]:
    """Every parameter's contributions (B, *shape) in float64, from what is stored, cell by cell as the forms say."""
    names = {id(p): name for name, p in module.named_parameters()}
    firsts = {first: names[key] for key, first in firsts_of(module).items()}
    parameters = dict(module.named_parameters())
    found: dict[str, Tensor] = {}
    for site, tensors in stored:
        assert all(t.is_contiguous() and len(t) == size for t in tensors.values())
        flat = _FORMS[site.form](site, {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()})
        assert flat.shape == (size, site.size)
        column = 0
        for first, count in site.runs:
            name = firsts[first]
            assert count == parameters[name].numel()
            found[name] = flat[:, column : column + count].reshape(size, *parameters[name].shape)
            column += count
    return found


def _linear(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    a, d = tensors["a"], tensors["d"]
    weight = torch.einsum("bto,bti->boi", d, a).flatten(1)
    return weight if site.bias is None else torch.cat([weight, d.sum(1)], 1)


def _conv(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    """By autograd through the convolution itself, one sample at a time."""
    a, d, options = tensors["a"], tensors["d"], site.options
    dims = len(site.shape) - 2
    kind = ("_transpose" if options["transposed"] else "") + f"{dims}d"
    settings = {key: options[key] for key in ("stride", "padding", "dilation", "groups")}
    rows = []
    for a_s, d_s in zip(a.split(1), d.split(1), strict=True):
        weight = torch.zeros(site.shape, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            if options["transposed"]:
                settings["output_padding"] = _output_padding(a_s, d_s, site)
            output = getattr(functional, "conv" + kind)(a_s, weight, None, **settings)
            rows.append(torch.autograd.grad(output, weight, d_s)[0].flatten())
    weights = torch.stack(rows)
    return weights if site.bias is None else torch.cat([weights, d.flatten(2).sum(2)], 1)


def _output_padding(a: Tensor, d: Tensor, site: Site) -> list[int]:
    o = site.options
    parts = zip(a.shape[2:], d.shape[2:], site.shape[2:], o["stride"], o["padding"], o["dilation"], strict=True)
    return [after - ((n - 1) * stride - 2 * pad + dil * (k - 1) + 1) for n, after, k, stride, pad, dil in parts]


def _embedding(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    ids, d = tensors["ids"], tensors["d"]
    table = torch.zeros(len(ids), *site.shape, dtype=torch.float64)
    for s, t in (ids >= 0).nonzero().tolist():
        table[s, ids[s, t]] += d[s, t]
    return table.flatten(1)


def _dense(site: Site, tensors: dict[str, Tensor]) -> Tensor:
    return tensors["g"]


_FORMS = {"linear": _linear, "conv": _conv, "embedding": _embedding, "dense": _dense}


def one_by_one(
    module: nn.Module, args: Sequence[Any], d: Tensor, size: int, take: Take = batch_first, **kwargs: Any
) -> dict[str, Tensor]:
    """Contributions by autograd in float64: each sample alone."""
    exact = copy.deepcopy(module).double()
    parameters = dict(exact.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name, p in parameters.items() if p.requires_grad}
    for sample in range(size):
        taken = [_exact(take(t, sample)) for t in args]
        output = exact(*taken, **{key: _exact(take(t, sample)) for key, t in kwargs.items()})
        grads = torch.autograd.grad(output, [parameters[name] for name in rows], take(d, sample).double())
        for name, grad in zip(rows, grads, strict=True):
            rows[name].append(grad.to_dense() if grad.is_sparse else grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


def _exact(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def agree(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    module: nn.Module,
    each: float = 5e-6,
    total: float = 1e-6,
) -> None:
    """Every sample's cells agree with the reference, and their sum with p.grad, relative to the largest cell.

    On one thread PyTorch adds up tens of thousands of rows with an error above `total`: then the sum has to be nearer
    to the float64 one than p.grad is.
    """
    assert found.keys() == expected.keys() and found
    for name, p in module.named_parameters():
        if name not in expected:
            continue
        reference = expected[name]
        largest = reference.abs().max()
        assert largest > 0
        assert (found[name] - reference).abs().max() <= each * largest, name
        grad = p.grad
        assert grad is not None
        grad = (grad.to_dense() if grad.is_sparse else grad).double()
        summed, exact = found[name].sum(0), reference.sum(0)
        close = (summed - grad).abs().max() <= total * max(largest, grad.abs().max())
        assert close or (summed - exact).abs().max() < (grad - exact).abs().max(), name


def check(
    handlers: dict[Any, Any],
    module: nn.Module,
    args: Sequence[Any],
    size: int,
    take: Take = batch_first,
    sequence_first: bool = False,
    **kwargs: Any,
) -> list[Stored]:
    """Run a module, compare what is stored with both references; returns it."""
    stored, d = run(handlers, module, args, size, sequence_first, **kwargs)
    agree(cells(stored, module, size), one_by_one(module, args, d, size, take, **kwargs), module)
    return stored
