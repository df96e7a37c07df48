"""Bare parameters: contributions equal autograd's, whatever functions do with them, or it is said why they cannot."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nbdyn.recorder.capture.calls import Stored
from nbdyn.recorder.capture.mode import abandon
from nbdyn.recorder.capture.uses import Uses
from tests.recorder.capture import references

B = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So many small tensors are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Custom(nn.Module):
    """Parameters and a function of them and of the input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self._function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        references.scaled(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


class Watching:
    """Hooks as a recorder has them, on all modules with parameters or on those named."""

    def __init__(self, model: nn.Module, size: int = B, names: Sequence[str] | None = None) -> None:
        self.stored: list[Stored] = []
        self.reasons: dict[str, str] = {}
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._handles: list[Any] = []
        self.uses: dict[str, Uses] = {}
        for name, module in model.named_modules():
            if name in names if names is not None else list(module.parameters(recurse=False)):
                uses = Uses(name, module, references.firsts_of(model), self.stored.append, self._cannot)
                before = module.register_forward_pre_hook(lambda module, args, uses=uses: uses.begin(size))
                after = module.register_forward_hook(lambda module, args, out, uses=uses: uses.end(), always_call=True)
                self._handles += [before, after]
                self.uses[name] = uses

    def _cannot(self, parameters: list[nn.Parameter | None], reason: str) -> None:
        for p in parameters:
            self.reasons.setdefault(self._names[id(p)], reason)

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        assert torch._C._len_torch_function_stack() == 0


def _in(x: Tensor, model: nn.Module) -> Tensor:
    return x.to(next(model.parameters()).dtype) if x.is_floating_point() else x


def check(
    model: nn.Module,
    x: Tensor,
    size: int = B,
    dim: int = 0,
    names: Sequence[str] | None = None,
    each: float = 5e-6,
    total: float = 1e-6,
    **options: Any,
) -> list[Stored]:
    """Watch a forward and backward pass, compare with one sample at a time, and with the same without watching."""
    torch.manual_seed(3)
    plain = model(_in(x, model))
    with Watching(model, size, names) as watching:
        torch.manual_seed(3)
        output = model(_in(x, model))
        state = torch.get_rng_state()
        assert torch.equal(output, plain)
        (gradient,) = references.gradients_for([output])
        output.backward(gradient)
    assert torch.equal(state, torch.get_rng_state())
    assert not watching.reasons, watching.reasons
    expected = references.one_at_a_time(model, lambda m: [m(_in(x, m))], [gradient], size, [dim], **options)
    references.agree(model, references.cells(watching.stored, size, model), expected, each, total)
    return watching.stored


def _rnn(m: Any, x: Tensor, h: Tensor) -> Tensor:
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ m.w + h @ m.u + m.b)
    return h


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 6, dtype=x.dtype)


def _standardised(w: Tensor) -> Tensor:
    return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)


def _assigned(m: Any, y: Tensor, x: Tensor) -> Tensor:
    y[:, 0], y[:, 1] = m.w, x
    return y.relu_()


def _masked(m: Any, x: Tensor) -> Tensor:
    x[x[..., 0] > 0] = m.w
    x[:2, 1] = 3.0
    return x


def _expanded(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), 2, 5, dtype=x.dtype)
    y[:, 0], y[:, 1] = m.w.expand(len(x), 5), x
    return y


ROWS, FLAT, IMAGE, LINE = (B, 3, 5), (B, 5), (B, 3, 7, 7), (B, 3, 4)
F = functional
FUNCTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], dict[str, tuple[int, ...]], str]] = {
    # Linear maps: factors, or contributions where these are smaller.
    "linear": (lambda m, x: F.linear(x, m.w, m.b), FLAT, {"w": (6, 5), "b": (6,)}, "linear"),
    "linear of rows": (lambda m, x: F.linear(x, m.w, m.b), ROWS, {"w": (6, 5), "b": (6,)}, "linear"),
    "linear, dense": (lambda m, x: F.linear(x, m.w, m.b), (B, 9, 5), {"w": (6, 5), "b": (6,)}, "dense"),
    "x @ W": (lambda m, x: x @ m.w, FLAT, {"w": (5, 6)}, "transposed"),
    "x @ W, dense": (lambda m, x: x @ m.w, (B, 9, 5), {"w": (5, 6)}, "dense"),
    "x @ W.T": (lambda m, x: x @ m.w.T, FLAT, {"w": (6, 5)}, "linear"),
    "x @ W.mT": (lambda m, x: torch.mm(x, m.w.mT), FLAT, {"w": (6, 5)}, "linear"),
    "W @ x": (lambda m, x: m.w @ x, (B, 8, 2), {"w": (6, 8)}, "linear"),
    "W @ x.T": (lambda m, x: (m.w @ x.T).T, FLAT, {"w": (6, 5)}, "linear"),
    "x @ vector": (lambda m, x: x @ m.w, ROWS, {"w": (5,)}, "dense"),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), FLAT, {"w": (5, 6), "b": (6,)}, "transposed"),
    "addmm of folded rows": (
        lambda m, x: torch.addmm(m.b, x.reshape(-1, 5), m.w).view(B, 3, 9),
        ROWS, {"w": (5, 9), "b": (9,)}, "transposed",
    ),
    "addmm, scaled": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2.0), FLAT, {"w": (5, 6), "b": (6,)}, "dense"),
    "einsum, heads": (lambda m, x: torch.einsum("btd,dhk->bthk", x, m.w), (B, 2, 8), {"w": (8, 2, 4)}, "transposed"),
    "einsum, heads first": (lambda m, x: torch.einsum("hdk,btd->bhtk", m.w, x), ROWS, {"w": (2, 5, 3)}, "dense"),
    "einsum, heads last": (lambda m, x: torch.einsum("hkd,btd->bhkt", m.w, x), (B, 2, 8), {"w": (2, 4, 8)}, "linear"),
    "einsum, dots": (lambda m, x: torch.einsum("...d,ed->...e", x, m.w), FLAT, {"w": (6, 5)}, "linear"),
    "einsum, no map": (lambda m, x: torch.einsum("btd,td->bt", x, m.w), ROWS, {"w": (3, 5)}, "dense"),
    "einsum, new letter": (lambda m, x: torch.einsum("bt,d->btd", x, m.w), FLAT, {"w": (3,)}, "dense"),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), ROWS, {"w": (5, 3)}, "dense"),
    "batched matmul": (lambda m, x: x.unsqueeze(1) @ m.w, ROWS, {"w": (2, 5, 3)}, "dense"),
    "bmm, expanded": (lambda m, x: torch.bmm(x, m.w.expand(B, -1, -1)), ROWS, {"w": (5, 3)}, "dense"),
    "some rows": (lambda m, x: x @ m.w[1:6] + m.w[0], FLAT, {"w": (6, 6)}, "transposed"),
    "some columns": (lambda m, x: x @ m.w[:, 1:4], FLAT, {"w": (5, 6)}, "dense"),
    "chunks": (lambda m, x: F.linear(F.linear(x, m.w.chunk(2)[0]), m.w.chunk(2)[1]), FLAT, {"w": (10, 5)}, "linear"),
    "one of two chunks": (lambda m, x: F.linear(x, m.w.chunk(2)[1]), FLAT, {"w": (12, 5)}, "linear"),
    # Lookups and convolutions.
    "embedding": (lambda m, x: F.embedding(x, m.w), (B, 3, 0), {"w": (7, 5)}, "embedding"),
    "embedding, padding": (lambda m, x: F.embedding(x, m.w, padding_idx=2), (B, 3, 0), {"w": (7, 5)}, "embedding"),
    "embedding, dense": (lambda m, x: F.embedding(x, m.w), (B, 9, 0), {"w": (7, 5)}, "dense"),
    "W[ids]": (lambda m, x: m.w[x - 7], (B, 3, 0), {"w": (7, 5)}, "embedding"),
    "index_select": (lambda m, x: torch.index_select(m.w, 0, x.flatten()).view(B, 3, 5), (B, 3, 0), {"w": (7, 5)}, ""),
    "conv": (lambda m, x: F.conv1d(x, m.w, m.b), LINE, {"w": (8, 3, 3), "b": (8,)}, "conv"),
    "conv, dense": (
        lambda m, x: F.conv2d(x, m.w, m.b, padding=1, stride=(2, 1)), IMAGE, {"w": (8, 3, 3, 3), "b": (8,)}, "dense",
    ),
    "conv, same": (lambda m, x: F.conv1d(x, m.w, m.b, padding="same"), LINE, {"w": (8, 3, 3), "b": (8,)}, "dense"),
    "conv, groups": (lambda m, x: F.conv1d(x, m.w, groups=3, dilation=2), (B, 3, 6), {"w": (6, 1, 2)}, "dense"),
    "conv, standardised": (lambda m, x: F.conv2d(x, _standardised(m.w)), IMAGE, {"w": (8, 3, 3, 3)}, "dense"),
    "conv transposed": (lambda m, x: F.conv_transpose1d(x, m.w, m.b), LINE, {"w": (3, 8, 3), "b": (8,)}, "dense"),
    # What broadcasts.
    "scale and shift": (lambda m, x: x * m.w + m.b, ROWS, {"w": (5,), "b": (3, 1)}, "dense"),
    "a number": (lambda m, x: x * m.a - m.b, ROWS, {"a": (), "b": (1,)}, "dense"),
    "quotients": (
        lambda m, x: (m.a - x) / m.b + m.a / (x * x + 1) - (1 - m.b) * x, ROWS, {"a": (5,), "b": (3, 1)}, "dense",
    ),
    "in place": (lambda m, x: (x * 1).add_(m.b).mul_(m.w).sub_(m.b).relu_(), ROWS, {"w": (5,), "b": (5,)}, "dense"),
    "output changed": (lambda m, x: (x * m.w).mul_(2).relu_(), ROWS, {"w": (5,)}, "dense"),
    "alpha": (lambda m, x: torch.add(x, m.b, alpha=2), ROWS, {"b": (5,)}, "dense"),
    "where": (lambda m, x: torch.where(x > 0, x, m.b), ROWS, {"b": (1, 1, 5)}, "dense"),
    "power": (lambda m, x: x.abs() ** m.w, ROWS, {"w": (5,)}, "dense"),
    "rows of the batch": (lambda m, x: x + m.w, FLAT, {"w": (B, 5)}, "dense"),
    "folded rows": (lambda m, x: (x.reshape(-1, 5) * m.w + m.b).view(B, 3, 5), ROWS, {"w": (5,), "b": (5,)}, "dense"),
    # Other functions: their own vector-Jacobian product.
    "layer_norm": (lambda m, x: F.layer_norm(x, (5,), m.w, m.b), ROWS, {"w": (5,), "b": (5,)}, "dense"),
    "group_norm": (lambda m, x: F.group_norm(x, 1, m.w, m.b), ROWS, {"w": (3,), "b": (3,)}, "dense"),
    "rms_norm": (lambda m, x: F.rms_norm(x, (5,), m.w), ROWS, {"w": (5,)}, "dense"),
    "prelu": (lambda m, x: F.prelu(x, m.w), ROWS, {"w": (3,)}, "dense"),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w, m.b), FLAT, {"w": (3, 5, 5), "b": (3,)}, "dense"),
    "cdist": (lambda m, x: torch.cdist(x, m.w), FLAT, {"w": (6, 5)}, "dense"),
    "gru_cell": (lambda m, x: torch.gru_cell(x, _zeros(x), m.a, m.b), FLAT, {"a": (18, 5), "b": (18, 6)}, "dense"),
    # Tensors made of parameters alone.
    "made": (lambda m, x: x @ (m.w.sigmoid() * m.m), FLAT, {"w": (5, 6), "m": (5, 6)}, "dense"),
    "mixture": (lambda m, x: (x * m.w.softmax(0).view(1, 3, 1)).sum(1), ROWS, {"w": (3,)}, "dense"),
    "noise": (lambda m, x: x @ (m.w + m.v * torch.ones_like(m.v)), FLAT, {"w": (5, 6), "v": (5, 6)}, "dense"),
    "two results": (lambda m, x: x * m.w.sort(0)[0], FLAT, {"w": (5,)}, "dense"),
    "token and positions": (
        lambda m, x: torch.cat([m.c.expand(len(x), -1, -1), x], 1) + m.p[:, :4],
        ROWS, {"c": (1, 1, 5), "p": (1, 9, 5)}, "",
    ),
    "repeated token": (lambda m, x: torch.cat([m.c.repeat(len(x), 1, 1), x], 1), ROWS, {"c": (1, 2, 5)}, "dense"),
    "prompt": (lambda m, x: torch.cat([m.c.unsqueeze(0).expand(B, -1, -1), x], 1), ROWS, {"c": (2, 5)}, "dense"),
    "stacked token": (lambda m, x: torch.stack([m.c.expand(B, 5), x], 1), FLAT, {"c": (5,)}, "dense"),
    "token of a function": (
        lambda m, x: torch.cat([m.c.tanh().expand(len(x), -1, -1), x], 1), ROWS, {"c": (1, 1, 5)}, "dense",
    ),
    "expand_as": (lambda m, x: F.mse_loss(x, m.c.expand_as(x), reduction="none"), FLAT, {"c": (5,)}, "dense"),
    "assigned token": (lambda m, x: _assigned(m, x.new_zeros(B, 2, 5), x), FLAT, {"w": (5,)}, "dense"),
    "assigned by a mask": (lambda m, x: _masked(m, x * 1), ROWS, {"w": (5,)}, "dense"),
    "assigned, expanded": (lambda m, x: _expanded(m, x), FLAT, {"w": (1, 5)}, "dense"),
    # As long as the batch, yet not the batch.
    "as many positions": (lambda m, x: x + m.p[:4], (B, 4, 5), {"p": (9, 5)}, "dense"),
    "as many ids": (lambda m, x: x + F.embedding(torch.arange(4), m.p), (B, 4, 5), {"p": (9, 5)}, "dense"),
    "as many features": (lambda m, x: x @ m.w + m.b, (B, B), {"w": (B, B), "b": (B,)}, "transposed"),
    # A recurrent network by hand.
    "rnn from zeros": (lambda m, x: _rnn(m, x, _zeros(x)), ROWS, {"w": (5, 6), "u": (6, 6), "b": (6,)}, ""),
    "rnn from a state": (
        lambda m, x: _rnn(m, x, m.h.expand(len(x), -1)), ROWS, {"w": (5, 6), "u": (6, 6), "b": (6,), "h": (1, 6)}, "",
    ),
    "rnn from an added state": (
        lambda m, x: _rnn(m, x, _zeros(x) + m.h), ROWS, {"w": (5, 6), "u": (6, 6), "b": (6,), "h": (6,)}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, shape, parameters, form = FUNCTIONS[name]
    torch.manual_seed(2)
    x = torch.randint(0, 7, shape[:-1]) if shape[-1] == 0 else torch.randn(shape)
    stored = check(Custom(function, **parameters), x)
    forms = {"transposed" if site.options.get("transposed") else site.form for site, _ in stored}
    assert form in forms | {""}
    assert form != "dense" or forms == {"dense"}


def test_a_batch_of_one() -> None:
    model = Custom(
        lambda m, x: torch.cat([m.c.expand(len(x), -1, -1), x], 1) @ m.w + m.b, c=(1, 1, 5), w=(5, 6), b=(6,)
    )
    check(model, torch.randn(1, 3, 5), size=1)


def test_time_before_samples() -> None:
    check(Custom(lambda m, x: x @ m.w + m.p, w=(5, 6), p=(3, 1, 6)), torch.randn(3, B, 5), dim=1)


ATTENTION: dict[str, dict[str, Any]] = {
    "self": {},
    "without bias": {"bias": False},
    "cross": {"given": "kv"},
    "three inputs": {"given": "k, v"},
    "other widths": {"given": "k, v", "kdim": 5, "vdim": 6},
    "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
    "dropout": {"dropout": 0.3},
    "dropout, fused": {"dropout": 0.3, "need_weights": False},
    "fused": {"need_weights": False},
    "masked": {"masked": True},
}


class Attention(nn.Module):
    """nn.MultiheadAttention on inputs (B, T, 8)."""

    def __init__(
        self, batch_first: bool, given: str = "", need_weights: bool = True, masked: bool = False, **options: Any
    ):
        super().__init__()
        self.given, self.need_weights, self.masked = given, need_weights, masked
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        references.scaled(self)

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        module = self.attention
        key = torch.randn(len(x), 5, module.kdim, generator=generator).to(x)
        value = torch.randn(len(x), 5, module.vdim, generator=generator).to(x)
        q, k, v = {"": (x, x, x), "kv": (x, key, key), "k, v": (x, key, value)}[self.given]
        if not module.batch_first:
            turned = {id(t): t.transpose(0, 1) for t in (q, k, v)}
            q, k, v = (turned[id(t)] for t in (q, k, v))
        mask = torch.tensor([[False, False, True]] * len(x)) if self.masked else None
        output, _ = module(q, k, v, key_padding_mask=mask, need_weights=self.need_weights)
        return output if module.batch_first else output.transpose(0, 1)


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize(("batch_first", "size"), [(True, 4), (False, 4), (False, 3), (False, 1)])
def test_attention(case: str, batch_first: bool, size: int) -> None:
    """Also where time and batch are equally long."""
    model = Attention(batch_first, **ATTENTION[case])
    options = {"dtype": torch.float32, "each": 2e-5} if "dropout" in case else {}
    stored = check(model, torch.randn(size, 3, 8), size, names=["attention"], **options)
    assert {site.layer for site, _ in stored} == {"attention", "attention.out_proj"}


def test_attention_of_which_only_out_proj_is_trained() -> None:
    model = Attention(True)
    for p in (model.attention.in_proj_weight, model.attention.in_proj_bias):
        p.requires_grad_(False)
    stored = check(model, torch.randn(B, 3, 8), names=["attention"])
    assert [site.name for site, _ in stored] == ["attention.out_proj:weight"]


def test_out_proj_called_as_a_module_is_left_to_its_own_handler() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(functional.linear(x, self.in_proj_weight[:8]))

    with Watching(model := Own(8, 2), names=[""]) as watching:
        model(torch.randn(B, 8)).sum().backward()
    assert {site.name for site, _ in watching.stored} == {"in_proj_weight[0:64]"}


class Transformer(nn.Module):
    """A vision transformer's parts: class token, positions, attention with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(8, 3)
        references.scaled(self)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1) + self.positions
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(h[:, 0])


@pytest.mark.parametrize("size", [1, 4])
def test_a_vision_transformer(size: int) -> None:
    check(Transformer(), torch.randn(size, 4, 6), size, dtype=torch.float32, each=2e-5, total=5e-6)


class Positions(nn.Module):
    """Gives away a view of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 9, 5))

    def forward(self, count: int) -> Tensor:
        return self.table[:, :count]


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = Positions()
        self.scales = nn.ParameterList([nn.Parameter(torch.zeros(5)) for _ in range(2)])
        references.scaled(self)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scales[0] + self.positions(x.shape[1])) * self.scales[1]


def test_a_parent_sees_what_becomes_of_its_childrens_parameters() -> None:
    stored = check(Parent(), torch.randn(B, 3, 5), names=["", "positions"])
    assert {site.layer for site, _ in stored} == {"positions", "scales"}


def test_what_leaves_the_watched_forward_pass_is_said() -> None:
    with Watching(model := Parent(), names=["positions"]) as watching:
        model(torch.randn(B, 3, 5)).sum().backward()
    assert list(watching.reasons) == ["positions.table"] and "outside" in watching.reasons["positions.table"]


def test_parametrised_weights() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), nn.Tanh())
    check(references.scaled(model), torch.randn(B, 5), names=["", "0", "0.parametrizations.weight"])


CANNOT: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]], str]] = {
    "random": (lambda m, x: F.linear(x, F.dropout(m.w, 0.5)), {"w": (6, 5)}, "linear: it draws random numbers"),
    "written": (lambda m, x: x * m.w.clone().mul_(2), {"w": (5,)}, "mul_: a tensor made of it is written to"),
    "assigned": (lambda m, x: _assigned(m, torch.zeros(B, 2, 5), x), {"w": (5,)}, "__setitem__: .* not the batch's"),
    "added rows": (lambda m, x: torch.cat([x, m.w]), {"w": (1, 5)}, r"cat: its result of shape \[5, 5\]"),
    "mixed samples": (lambda m, x: m.w @ x, {"w": (B, B)}, "matmul"),
    "mixed, alike": (lambda m, x: F.batch_norm(x, None, None, m.w, training=True), {"w": (5,)}, "batch_norm"),
    "coupled": (lambda m, x: F.gelu(torch.addcmul(x, m.w, x.mean(0))), {"w": (B, 5)}, "addcmul"),
    "one number": (lambda m, x: torch.dist(x, m.w), {"w": (5,)}, r"dist: its result of shape \[\]"),
    "written into a constant": (lambda m, x: x * torch.ones(5).mul_(m.w).add_(m.w), {"w": (5,)}, "add_: "),
    "for others": (lambda m, x: x.unsqueeze(1) + m.w.expand(B, 5), {"w": (1, 5)}, "expanded to as many rows"),
    "an lstm": (lambda m, x: _lstm(m, x), {"w": (20, 5)}, "lstm: its result of shape"),
    "a function of one's own": (lambda m, x: torch.func.vmap(lambda row: row * m.w)(x), {"w": (5,)}, "mul"),
}


def _lstm(m: Any, x: Tensor) -> Tensor:
    zeros = x.new_zeros(1, 1, 5)
    return torch._VF.lstm(x.unsqueeze(1), (zeros, zeros), [m.w, m.w.detach()], False, 1, 0.0, True, False, False)[0]


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_split_is_said_and_training_goes_on(name: str) -> None:
    function, parameters, reason = CANNOT[name]
    model = Custom(function, **parameters)
    torch.manual_seed(5)
    x = torch.randn(B, 5)
    torch.manual_seed(6)
    model(x).sum().backward()
    assert isinstance(model.w, nn.Parameter) and model.w.grad is not None
    plain, model.w.grad = model.w.grad, None
    with Watching(model) as watching:
        torch.manual_seed(6)
        model(x).sum().backward()
    assert torch.equal(plain, model.w.grad)
    assert re.search(reason, watching.reasons["w"])


def test_batch_norm_is_not_run_again() -> None:
    mean, variance = torch.zeros(3), torch.ones(3)
    model = Custom(lambda m, x: F.batch_norm(x, mean, variance, m.w, training=True), w=(3,))
    x = torch.randn(B, 3, 6, 6)
    with Watching(model) as watching:
        model(x).sum().backward()
    assert torch.allclose(mean, 0.1 * x.mean((0, 2, 3))) and "batch_norm" in watching.reasons["w"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing(reentrant: bool, inside: bool) -> None:
    """The forward pass runs twice, but every contribution is there once."""
    block = Custom(lambda m, x: torch.relu(x @ m.w + m.b), w=(5, 5), b=(5,))
    x = torch.randn(B, 5, requires_grad=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x * 1, use_reentrant=reentrant)

    model = Checkpointed()
    with Watching(model, names=["", "block"] if inside else ["block"]) as watching:
        output = model(x)
        (gradient,) = references.gradients_for([output])
        output.backward(gradient)
    expected = references.one_at_a_time(block, lambda m: [m(_in(x, m))], [gradient], B)
    references.agree(block, references.cells(watching.stored, B, model), expected)
    assert not watching.reasons


def test_autocast() -> None:
    """Factors keep half precision, contributions have float32."""
    model = references.scaled(Attention(True))
    model.scale = nn.Parameter(torch.ones(8))
    x = torch.randn(B, 3, 8)

    def forward(m: Any) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=m.scale.dtype == torch.float32):
            return [functional.layer_norm(m(_in(x, m)), (8,), m.scale) * m.scale]

    with Watching(model, names=["attention"]) as watching:
        uses = Uses("", model, references.firsts_of(model), watching.stored.append, lambda parameters, reason: None)
        uses.begin(B)
        (output,) = forward(model)
        uses.end()
        (gradient,) = references.gradients_for([output])
        output.backward(gradient)
    assert not watching.reasons
    dtypes = {(site.form, t.dtype) for site, tensors in watching.stored for t in tensors.values()}
    assert dtypes == {("linear", torch.bfloat16), ("dense", torch.float32)}
    expected = references.one_at_a_time(model, forward, [gradient], B)
    references.agree(model, references.cells(watching.stored, B, model), expected, each=5e-2, total=2e-2)


def test_two_backward_passes_count_twice() -> None:
    with Watching(model := Custom(lambda m, x: x @ m.w, w=(5, 6))) as watching:
        output = model(torch.randn(B, 5))
        output.sum().backward(retain_graph=True)
        output.sum().backward()
    assert model.w.grad is not None
    total = references.cells(watching.stored, B, model).sum(0)[5 : 5 + 30]
    assert (total - model.w.grad.flatten()).abs().max() < 1e-5


def test_sites_are_the_same_each_time() -> None:
    with Watching(model := Custom(lambda m, x: x @ m.w + m.b, w=(5, 6), b=(6,))) as watching:
        for times in (1, 1, 9, 1, 9):
            model(torch.randn(B, times, 5)).sum().backward()
    weights = [site for site, _ in watching.stored if site.name == "w"]
    assert [site.form for site in weights] == ["linear", "linear", "dense", "linear", "dense"]
    assert weights[0] is weights[1] is weights[3] and weights[2] is weights[4]
    assert len({id(site) for site, _ in watching.stored}) == 3


def test_frozen_parameters_and_no_grad() -> None:
    model = Custom(lambda m, x: F.linear(x, m.w, m.b), w=(6, 5), b=(6,))
    with Watching(model) as watching:
        with torch.no_grad():
            model(torch.randn(B, 5))
        model.w.requires_grad_(False)
        model(torch.randn(B, 5)).sum().backward()
        assert [(site.name, site.form) for site, _ in watching.stored] == [("b", "dense")]
        model.w.requires_grad_(True)
        model(torch.randn(B, 5)).sum().backward()
    assert [site.form for site, _ in watching.stored] == ["dense", "linear"]


def test_unrecorded_parameters_are_not_watched() -> None:
    model = Custom(lambda m, x: x * m.w + m.b, w=(5,), b=(5,))
    stored: list[Stored] = []
    uses = Uses("layer", model, {id(model.b): 7}, stored.append, lambda parameters, reason: None)
    x = torch.randn(B, 5)
    uses.begin(B)
    output = model(x)
    uses.end()
    output.sum().backward()
    assert [(site.name, site.layer, site.ranges) for site, _ in stored] == [("layer:b", "layer", ((7, 5),))]


def test_an_error_in_the_forward_pass_ends_the_watch() -> None:
    with Watching(model := Custom(lambda m, x: x @ m.w, w=(7, 6))):
        with pytest.raises(RuntimeError):
            model(torch.randn(B, 5))
        assert torch._C._len_torch_function_stack() == 0


def test_what_an_interrupt_left_is_abandoned() -> None:
    """Forward hooks are not called after KeyboardInterrupt; another mode may stand above."""
    model = Custom(lambda m, x: x @ m.w, w=(5, 6))
    uses = Uses("", model, references.firsts_of(model), lambda stored: None, lambda parameters, reason: None)
    uses.begin(B)
    uses.begin(B)
    with torch.device("cpu"):
        abandon()
        assert torch._C._len_torch_function_stack() == 1
    uses.end()
    assert torch._C._len_torch_function_stack() == 0


def test_no_graph_is_kept_alive() -> None:
    """What hooks refer to must not lead back to the tensors that have them."""

    class Saved:
        def __init__(self, t: Tensor) -> None:
            self.tensor = t.detach()  # an output that held its own graph would be a cycle of the test

    alive: list[weakref.ref[Saved]] = []

    def pack(t: Tensor) -> Saved:
        saved = Saved(t)
        alive.append(weakref.ref(saved))
        return saved

    with Watching(model := Transformer()), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        x = torch.randn(B, 4, 6)
        gc.disable()  # counting references must suffice
        try:
            for backward in (False, True):
                output = model(x)
                if backward:
                    output.sum().backward()
                del output
                assert alive and not any(saved() for saved in alive)
        finally:
            gc.enable()


def test_noise_made_inside_is_not_taken_for_samples() -> None:
    """Nothing tells whether its rows are samples."""
    with Watching(model := Custom(lambda m, x: torch.randn(B, 5) * m.w, w=(5,))) as watching:
        model(torch.randn(B, 5)).sum().backward()
    assert "outside" in watching.reasons["w"] and not watching.stored
