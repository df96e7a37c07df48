"""One pass through the steps of an RNN, LSTM or GRU: the linear maps inside, and the gradients at their outputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nbdyn.recorder.capture.calls import CannotSplit, Stored
from nbdyn.recorder.capture.maps import Block, SiteTable
from nbdyn.recorder.capture.nodes import site_name

USED = r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?"
"""What the parameters of these modules are called."""


@dataclass
class Layer:
    """One direction of one layer, unrolled: the linear maps' inputs and the tensors whose gradients are wanted.

    Shapes: T steps, N sequences; G gates of H units; P = proj_size, or H.

    Attributes:
        suffix: ends the parameters' names, such as `_l0_reverse`; empty for cells.
        x: (T, N, I) inputs.
        gates: (T, N, GH) input projections; their gradient is the one at the gates.
        before: (T, N, P) hidden state before each step.
        reset: (T, N, H) reset gates of a GRU.
        unprojected: (T, N, H) inputs of weight_hr.
        projected: (T, N, P) zeros added to its outputs.
    """

    suffix: str
    x: Tensor
    gates: Tensor
    before: Tensor
    reset: Tensor | None
    unprojected: Tensor | None
    projected: Tensor | None


@dataclass
class Batch:
    """The input of a call, time first and in sorted order for packed sequences.

    Attributes:
        x: (T, N, I).
        active: (T, N, 1) where a sequence has not ended; None where all have T steps.
        rows: which of the TN rows of x are those of the packed sequence.
        order: which sequence of the caller stands where; None for the caller's order.
    """

    x: Tensor
    active: Tensor | None = None
    rows: Tensor | None = None
    order: Tensor | None = None

    def padded(self, packed: Tensor) -> Tensor:
        """Packed rows as (T, N, F), zero where a sequence has ended."""
        assert self.active is not None and self.rows is not None
        shape = (*self.active.shape[:2], packed.shape[-1])
        return packed.new_zeros(shape).flatten(0, 1).index_copy_(0, self.rows, packed).view(shape)


class Unrolled:
    """Shared by the layers and the cells: the parameters, their sites, and one direction of a layer."""

    def __init__(self, name: str, module: nn.Module, firsts: dict[int, int], kind: str) -> None:
        self._name = name
        self._module = module
        self._firsts = firsts
        self._kind = kind
        self._relu = getattr(module, "nonlinearity", "tanh") == "relu"
        self._sites = SiteTable()
        recorded = [key for key, p in module._parameters.items() if id(p) in firsts]
        self._others = ", ".join(key for key in recorded if not re.fullmatch(USED, key))

    def refuse_others(self) -> None:
        """Raise CannotSplit if the module has parameters of which something else makes its weights."""
        if self._others:  # as of nn.utils.weight_norm
            raise CannotSplit(f"its {self._others} are used outside its forward pass")

    def _parameter(self, name: str) -> Tensor | None:
        return getattr(self._module, name, None)

    def _values(self, suffix: str, dtype: torch.dtype) -> list[Tensor | None]:
        """W_ih, W_hh, b_ih, b_hh, W_hr as they are now, without history."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        found = [self._parameter(name + suffix) for name in names]
        return [None if p is None else p.detach().to(dtype) for p in found]

    def direction(
        self, suffix: str, batch: Batch, h: Tensor, c: Tensor | None, reverse: bool = False
    ) -> tuple[Layer, Tensor, Tensor, Tensor | None]:
        """Runs one direction: the layer, its outputs (T, N, P), and the last h and c (N, P), (N, H)."""
        x = batch.x
        w_ih, w_hh, b_ih, b_hh, w_hr = self._values(suffix, x.dtype)
        assert w_ih is not None and w_hh is not None
        # A GRU multiplies W_hn h + b_hn by the reset gate, so b_hh cannot be added to b_ih beforehand.
        b_early = b_ih if self._kind == "GRU" or b_ih is None or b_hh is None else b_ih + b_hh
        gates = nn.functional.linear(x, w_ih, b_early)
        if not gates.requires_grad:
            gates.requires_grad_()
        w_hh = w_hh.t()
        projected = None if w_hr is None else x.new_zeros(*x.shape[:2], len(w_hr)).requires_grad_()
        offsets = None if projected is None else projected.unbind(0)
        steps, before, kept = gates.unbind(0), [], []
        outputs: list[Any] = [None] * len(x)
        for t in reversed(range(len(x))) if reverse else range(len(x)):
            before.append(h)
            if self._kind == "GRU":
                new, extra = _gru(steps[t], h, w_hh, b_hh)
                new_c = None
            elif self._kind == "LSTM":
                assert c is not None
                extra, new_c = _lstm(steps[t], h, c, w_hh)
                new = extra if offsets is None or w_hr is None else offsets[t].addmm(extra, w_hr.t())
            else:
                new_c = extra = None
                z = torch.addmm(steps[t], h, w_hh)
                new = z.relu() if self._relu else z.tanh()
            if batch.active is None:
                h, c = new, new_c
            else:
                h = torch.where(batch.active[t], new, h)
                c = new_c if new_c is None or c is None else torch.where(batch.active[t], new_c, c)
            outputs[t] = h
            kept.append(extra)
        turn = slice(None, None, -1) if reverse else slice(None)
        extras = None if kept[0] is None else torch.stack([k.detach() for k in kept[turn]])
        layer = Layer(
            suffix,
            x.detach(),
            gates,
            torch.stack([b.detach() for b in before[turn]]),
            extras if self._kind == "GRU" else None,
            extras if projected is not None else None,
            projected,
        )
        return layer, torch.stack(outputs), h, c

    def stored(
        self, layer: Layer, d: Tensor, at_projection: Tensor | None, rows: Callable[[Tensor], Tensor]
    ) -> list[Stored]:
        """What one direction leaves, given the gradients at its gates and at its projection.

        Args:
            layer: the direction.
            d: (T, N, GH).
            at_projection: (T, N, P); None without a projection.
            rows: brings (T, N, F) into samples (B, T, F).
        """
        at_hidden = d
        if layer.reset is not None:
            rz, n = d.split([2 * layer.reset.shape[-1], layer.reset.shape[-1]], dim=-1)
            at_hidden = torch.cat([rz, n * layer.reset], dim=-1)
        # The same tensor for both maps wherever the gradients agree: whoever stores it may notice.
        d_rows = rows(d).contiguous()
        hidden_rows = d_rows if at_hidden is d else rows(at_hidden)
        parts = [("ih", layer.x, d_rows), ("hh", layer.before, hidden_rows)]
        if layer.unprojected is not None and at_projection is not None:
            parts.append(("hr", layer.unprojected, rows(at_projection)))
        stored = []
        for part, a, at_output in parts:
            weight = self._first(f"weight_{part}{layer.suffix}")
            bias = self._first(f"bias_{part}{layer.suffix}")
            if weight is not None or bias is not None:
                name = site_name(self._name, f"weight_{part}{layer.suffix}")
                block = Block(name, self._name, a.shape[-1], at_output.shape[-1], weight, bias)
                stored.append(self._sites.linear(block, rows(a), at_output))
        return stored

    def _first(self, name: str) -> int | None:
        p = self._parameter(name)
        return self._firsts.get(id(p)) if p is not None and p.requires_grad else None


def _lstm(gates: Tensor, h: Tensor, c: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = torch.addmm(gates, h, w_hh).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gates: Tensor, h: Tensor, w_hh: Tensor, b_hh: Tensor | None) -> tuple[Tensor, Tensor]:
    """The new state, and the reset gates."""
    hidden = h @ w_hh if b_hh is None else torch.addmm(b_hh, h, w_hh)
    i_rz, i_n = gates.split([2 * h.shape[-1], h.shape[-1]], dim=-1)
    h_rz, h_n = hidden.split([2 * h.shape[-1], h.shape[-1]], dim=-1)
    r, z = (i_rz + h_rz).sigmoid().chunk(2, dim=-1)
    n = (i_n + r * h_n).tanh()
    return n + z * (h - n), r


def gradients(
    layers: list[Layer], outputs: list[Tensor | None], grads: list[Tensor | None]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """The gradient at each layer's gates and projection, from those at the outputs; None where none arrives."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if o is not None and g is not None]
    wanted = [t for layer in layers for t in (layer.gates, layer.projected) if t is not None]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [(next(found), None if layer.projected is None else next(found)) for layer in layers]
