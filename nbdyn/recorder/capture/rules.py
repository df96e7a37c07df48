"""How functions of the batch and of parameters are split: closed forms of linear maps, and of what broadcasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbdyn.recorder.capture.affine import wide
from nbdyn.recorder.capture.calls import Stored
from nbdyn.recorder.capture.embedding import rows_added
from nbdyn.recorder.capture.linear import outer_sums
from nbdyn.recorder.capture.local import Cut, exact
from nbdyn.recorder.capture.maps import Block
from nbdyn.recorder.capture.nodes import Application, Node, Place, place_of
from nbdyn.store.convolve import weight_gradient
from nbdyn.store.sites import Site


@dataclass
class Share:
    """What each sample contributed to a node.

    Attributes:
        node: the node.
        c: (B, *shape); with `dim`, (B, *shape without this dimension): sample s contributed to its row s only.
        dim: the dimension of the node's rows.
    """

    node: Node
    c: Tensor
    dim: int | None = None


Part = Stored | Share
Split = Callable[[Tensor], Iterable[Part]]
"""Given the gradient at a function's output: what the call leaves."""
Rule = Callable[[Application, torch.Size, Cut], Split | None]
"""Given a call, its output's shape and where the samples are; None where the rule does not apply."""

REVERSED = {"__rsub__": "sub", "rsub": "sub", "__rdiv__": "div", "__rtruediv__": "div"}
SAME = {"multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div"}
BROADCASTING = frozenset({"add", "sub", "mul", "div", *REVERSED, *SAME})


def broadcast(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """Sums, differences, products and quotients."""
    if len(call.args) != 2 or call.kwargs:
        return None
    first, second = call.args
    name = SAME.get(call.name, call.name)
    if name in REVERSED:
        name, first, second = REVERSED[name], second, first
    parts: list[tuple[Node, Callable[[Tensor], Tensor], int | None]] = []
    for node, other, is_first in ((first, second, True), (second, first, False)):
        if isinstance(node, Node):
            dim = own_dim(node, shape, cut)
            if dim is None and not _shared(node, shape, cut):
                return None
            parts.append((node, _slope(name, node, other, is_first), dim))

    def split(gradient: Tensor) -> Iterator[Part]:
        gradient = exact(gradient)
        for node, slope, dim in parts:
            yield Share(node, _folded(slope(gradient), node, shape, cut, dim), dim)

    return split


def _slope(name: str, node: Node, other: Any, is_first: bool) -> Callable[[Tensor], Tensor]:
    """The gradient at one of the two operands, before it is summed to the operand's shape."""
    if name == "add":
        return lambda g: g
    if name == "sub":
        return (lambda g: g) if is_first else torch.neg
    value = other.tensor if isinstance(other, Node) else other
    if name == "mul":
        return lambda g: g * value
    if is_first:
        return lambda g: g / value
    return lambda g: -g * value / node.tensor.square()


def own_dim(node: Node, shape: torch.Size, cut: Cut) -> int | None:
    """The dimension in which a node has one row for each sample, if it is broadcast to some shape."""
    dim = cut.dim - (len(shape) - node.tensor.ndim)
    return dim if dim >= 0 and cut.times == 1 and cut.size > 1 and node.tensor.shape[dim] == cut.size else None


def _shared(node: Node, shape: torch.Size, cut: Cut) -> bool:
    dim = cut.dim - (len(shape) - node.tensor.ndim)
    return dim < 0 or cut.size == 1 or node.tensor.shape[dim] == 1


def _folded(gradient: Tensor, node: Node, shape: torch.Size, cut: Cut, dim: int | None) -> Tensor:
    """Summed over what was broadcast: (B, *shape of the node), without its own dimension of samples."""
    gradient = cut(gradient.expand(shape))
    target = (1,) * (len(shape) - node.tensor.ndim) + tuple(node.tensor.shape)
    over = [d + 1 for d, n in enumerate(target) if n == 1 and gradient.shape[d + 1] != 1]
    gradient = gradient.sum(over) if over else gradient
    return gradient.reshape(cut.size, *(n for d, n in enumerate(node.tensor.shape) if d != dim))


def concatenated(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """torch.cat along another dimension than the samples'."""
    args, kwargs = call.args, call.kwargs
    pieces = list(args[0] if args else kwargs["tensors"])
    along = (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % len(shape)
    parts, start = [], 0
    for piece in pieces:
        length = (piece.tensor if isinstance(piece, Node) else piece).shape[along]
        if isinstance(piece, Node):
            if along == cut.dim or cut.times > 1:
                return None
            parts.append((piece, start, length))
        start += length

    def split(gradient: Tensor) -> Iterator[Part]:
        for node, start, length in parts:
            c = cut(gradient.narrow(along, start, length))
            dim = own_dim(node, shape, cut)
            yield Share(node, c if dim is None else c.squeeze(cut.dim + 1), dim)

    return split


def assigned(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """x[index] = node, the index being anything: each element that was written has its sample and its element."""
    _, index, node = call.args
    if not isinstance(node, Node):
        return None

    def split(gradient: Tensor) -> Iterator[Part]:
        count, device = node.tensor.numel(), gradient.device
        rows = torch.arange(shape[cut.dim], device=device)
        rows = rows % cut.size if cut.time_major else rows.div(cut.times, rounding_mode="floor")
        samples = rows.reshape(-1, *[1] * (len(shape) - cut.dim - 1)).expand(shape)[index]
        elements = torch.arange(count, device=device).reshape(node.tensor.shape).expand(samples.shape)
        written = exact(gradient)[index]
        c = written.new_zeros(cut.size * count).index_add_(0, (samples * count + elements).flatten(), written.flatten())
        yield Share(node, c.reshape(cut.size, *node.tensor.shape))

    return split


def linear(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """F.linear(x, weight, bias)."""
    args, kwargs = call.args, call.kwargs
    x, weight, bias = (args + (None,) * 3)[:3]
    return _linear(kwargs.get("input", x), kwargs.get("weight", weight), kwargs.get("bias", bias), cut)


def matmul(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """Products x @ W, x @ v, and W @ x where the features of x are its last dimension but one."""
    x, weight = call.args if len(call.args) == 2 else (None, None)
    if call.name == "__rmatmul__":
        x, weight = weight, x
    if isinstance(x, Tensor) and isinstance(weight, Node):
        if weight.tensor.ndim == 1:
            return _linear(x, weight, None, cut, turn=lambda g: g.unsqueeze(-1))
        return _linear(x, weight, None, cut, transposed=True) if weight.tensor.ndim == 2 else None
    if not (isinstance(x, Node) and isinstance(weight, Tensor) and x.tensor.ndim == 2):
        return None
    if weight.ndim >= 3 and cut.dim < weight.ndim - 2:
        return _linear(weight.mT, x, None, cut, turn=lambda g: g.mT)
    if weight.ndim == 2 and weight.shape[1] == cut.size != weight.shape[0]:  # samples are columns
        return _linear(weight.mT, x, None, Cut(cut.size), turn=lambda g: g.mT)
    return None


def addmm(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """Bias + x @ W."""
    args, kwargs = call.args, call.kwargs
    if kwargs or len(args) != 3 or (isinstance(args[0], Node) and args[0].tensor.numel() != shape[-1]):
        return None
    return _linear(args[1], args[2], args[0], cut, transposed=True)


def einsum(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """Two operands, of which one is a node: a linear map if every letter of the node is summed or new."""
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    terms = left.split(",")
    if isinstance(operands[0], Node):
        operands, terms = operands[::-1], terms[::-1]
    (x, node), (seen, own) = operands, terms
    if not isinstance(x, Tensor) or not isinstance(node, Node):
        return None
    hidden = "".join(chr(0x4E00 + n) for n in range(x.ndim - len(seen.replace("...", ""))))
    seen, out = seen.replace("...", hidden), out.replace("...", hidden)
    summed = "".join(letter for letter in own if letter in seen and letter not in out)
    new = "".join(letter for letter in own if letter in out and letter not in seen)
    rest = "".join(letter for letter in out if letter not in new)
    plain = all(len(set(term)) == len(term) for term in (seen, own, out))
    if own not in (summed + new, new + summed) or set(seen) != set(rest + summed) or not plain:
        return None
    if out[cut.dim] not in rest:
        return None
    inputs = math.prod(x.shape[seen.index(letter)] for letter in summed)
    x = x.permute([seen.index(letter) for letter in rest + summed]).reshape(*_sizes(x, seen, rest), inputs)
    moved = Cut(cut.size, rest.index(out[cut.dim]), cut.times, cut.time_major)
    order = [out.index(letter) for letter in rest + new]
    return _linear(
        x,
        node,
        None,
        moved,
        own == summed + new,
        lambda g: g.permute(order).flatten(len(rest)) if new else g.unsqueeze(-1),
    )


def _sizes(x: Tensor, seen: str, letters: str) -> list[int]:
    return [x.shape[seen.index(letter)] for letter in letters]


def _linear(
    x: Any,
    weight: Any,
    bias: Any,
    cut: Cut,
    transposed: bool = False,
    turn: Callable[[Tensor], Tensor] = lambda g: g,
) -> Split | None:
    """A linear map of the last dimension of x.

    Args:
        x: the batch.
        weight: a node, or what is not watched.
        bias: likewise.
        cut: where x and the turned gradient have their samples.
        transposed: whether the weight is (I, O).
        turn: brings the gradient at the output into the layout of x, features last.
    """
    if not isinstance(x, Tensor):
        return None
    weight = weight if isinstance(weight, Node) else None
    bias = bias if isinstance(bias, Node) else None
    place, bias_place = (None if node is None else place_of(node) for node in (weight, bias))

    def split(gradient: Tensor) -> Iterator[Part]:
        d = cut.rows(turn(gradient))
        at_bias = bias is not None
        if weight is not None:
            a = cut.rows(x).to(d.dtype)
            if place is not None:
                at_bias = bias is not None and bias_place is None
                yield weight.owner.sites.linear(_block(place, weight, bias_place, a, d, transposed), a, d)
            else:
                c = outer_sums(d, a) if transposed else outer_sums(a, d)
                yield Share(weight, c.reshape(len(c), *weight.tensor.shape))
        if bias is not None and at_bias:
            yield Share(bias, d.sum(1, dtype=wide(d.dtype)).reshape(len(d), *bias.tensor.shape))

    return split


def _block(place: Place, node: Node, bias: Place | None, a: Tensor, d: Tensor, transposed: bool) -> Block:
    name = part_name(place, node)
    first = None if bias is None else bias.first
    turned = transposed != place.transposed
    return Block(name, place.watched.layer, a.shape[-1], d.shape[-1], place.first, first, turned)


def part_name(place: Place, node: Node) -> str:
    """Names a site: the parameter, and which of its elements if not all."""
    watched, size = place.watched, node.tensor.numel()
    part = "" if size == watched.parameter.numel() else f"[{place.offset}:{place.offset + size}]"
    return watched.site + part


def embedding(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """F.embedding(ids, weight), weight[ids] and torch.index_select(weight, 0, ids), ids of the batch."""
    args, kwargs = call.args, call.kwargs
    padding = None
    if call.name == "embedding":
        settings = dict(zip(("input", "weight", "padding_idx", "max_norm", "norm_type", "by_freq"), args, strict=False))
        settings |= kwargs
        ids, weight, padding = settings.get("input"), settings.get("weight"), settings.get("padding_idx")
        if settings.get("by_freq") or settings.get("scale_grad_by_freq"):
            return None
    elif call.name == "__getitem__":
        weight, ids = args
    else:
        weight, dim, ids = args if len(args) == 3 else (None, None, None)
        weight = weight if dim == 0 else None
    if not isinstance(weight, Node) or not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        return None
    if cut.dim >= ids.ndim:
        return None
    count = len(weight.tensor)
    place = place_of(weight)

    def split(gradient: Tensor) -> Iterator[Part]:
        rows = torch.where(ids < 0, ids + count, ids)
        if padding is not None:
            rows = rows.masked_fill(rows == padding % count, -1)
        rows = cut(rows).reshape(cut.size, -1)
        d = cut(gradient).reshape(cut.size, rows.shape[1], -1)
        if place is None or place.transposed or rows.numel() * (1 + d.shape[2]) > cut.size * weight.tensor.numel():
            yield Share(weight, rows_added(rows, d, count).reshape(cut.size, *weight.tensor.shape))
            return
        site = Site(part_name(place, weight), place.watched.layer, "embedding", place.first, (count, d.shape[2]))
        yield weight.owner.sites.same(site), {"ids": rows.contiguous(), "d": d.contiguous()}

    return split


def convolution(call: Application, shape: torch.Size, cut: Cut) -> Split | None:
    """F.conv1d to F.conv3d of a batch, padded by numbers of zeros."""
    args, kwargs = call.args, call.kwargs
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if not (isinstance(x, Tensor) and isinstance(weight, Node)) or x.ndim != len(shape) or cut != Cut(cut.size):
        return None
    options: dict[str, Any] = {"groups": given.get("groups", 1), "transposed": False}
    for key, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given.get(key, usual)
        if isinstance(value, str):
            return None
        value = [value] if isinstance(value, int) else list(value)
        options[key] = value * (len(shape) - 2) if len(value) == 1 else value
    place = place_of(weight)
    bias_place = place_of(bias) if isinstance(bias, Node) else None
    name = part_name(place, weight) if place is not None else "convolution"
    layer = weight.parameters[0].layer
    first, bias_first = (None if p is None else p.first for p in (place, bias_place))
    site = Site(name, layer, "conv", first, tuple(weight.tensor.shape), bias_first, options)

    def split(gradient: Tensor) -> Iterator[Part]:
        a = x.to(gradient.dtype)
        if first is not None and a[0].numel() + gradient[0].numel() <= site.size:
            yield weight.owner.sites.same(site), {"a": a.contiguous(), "d": gradient.contiguous()}
            if bias_first is not None:
                return
        else:
            yield Share(weight, weight_gradient(a, gradient, site))
        if isinstance(bias, Node):
            yield Share(bias, gradient.flatten(2).sum(2, dtype=wide(gradient.dtype)))

    return split


RULES: dict[str, Rule] = {
    **dict.fromkeys(BROADCASTING, broadcast),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenated),
    **dict.fromkeys(("matmul", "mm", "mv", "__rmatmul__"), matmul),
    **dict.fromkeys(("embedding", "__getitem__", "index_select"), embedding),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    "__setitem__": assigned,
    "linear": linear,
    "addmm": addmm,
    "einsum": einsum,
}
"""By the function's name."""
