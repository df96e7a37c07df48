"""Modules whose inside is unknown: contributions equal autograd's; what couples samples or is random is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbdyn.recorder.capture import local
from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored
from nbdyn.recorder.capture.generic import HANDLERS, Generic, tensors_of
from tests.recorder.capture import references

B = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So many small tensors are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Opaque(nn.Module):
    """Parameters of its own around a child's, several inputs and outputs, a buffer that counts."""

    count: Tensor

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.zeros(4))
        self.mix = nn.Parameter(torch.zeros(4, 3))
        self.register_buffer("count", torch.zeros(()))
        references.scaled(self)

    def forward(self, x: Tensor, *, factor: float = 1.0, mask: Tensor | None = None) -> dict[str, Tensor]:
        self.count += 1
        h = self.inner(x * self.scale) * factor
        if mask is not None:
            h = h * mask
        return {"mixed": h.tanh() @ self.mix, "sums": (x * self.scale).sum(-1)}


def _run(
    module: nn.Module,
    args: Sequence[Any],
    used: Sequence[bool],
    handler: Any = None,
    compare: bool = False,
    **kwargs: Any,
) -> tuple[list[Stored], list[Tensor | None]]:
    module.zero_grad()
    handler = handler or Generic("opaque", module, references.firsts_of(module))
    outputs = list(tensors_of(module(*args, **kwargs)))
    grads = [g if use else None for g, use in zip(references.gradients_for(outputs), used, strict=True)]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    state = torch.get_rng_state()
    call = ModuleCall(module, tuple(args), kwargs, outputs if compare else None, grads, B)
    with torch.no_grad():
        stored = handler(call)
    assert torch.equal(state, torch.get_rng_state())
    return stored, grads


def _agree(module: nn.Module, stored: list[Stored], forward: Callable[[Any], Any], grads: Any, own: list[str]) -> None:
    expected = references.one_at_a_time(module, lambda m: list(tensors_of(forward(m))), grads, B, [0] * len(grads))
    found, firsts = references.cells(stored, B, module), references.firsts_of(module)
    for name, p in module.named_parameters():
        if name in own:
            columns = slice(firsts[id(p)], firsts[id(p)] + p.numel())
            assert (found[:, columns] - expected[:, columns]).abs().max() <= 5e-6 * expected[:, columns].abs().max()
            assert p.grad is not None
            assert (found[:, columns].sum(0) - p.grad.flatten()).abs().max() <= 1e-6 * p.grad.abs().max()
    assert sum(site.size for site, _ in stored) == sum(dict(module.named_parameters())[name].numel() for name in own)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(B,), (B, 3)])
def test_bilinear(bias: bool, shape: Any) -> None:
    module = references.scaled(nn.Bilinear(4, 6, 3, bias=bias))
    x, y = torch.randn(*shape, 4), torch.randn(*shape, 6)
    stored, grads = _run(module, [x, y], [True], HANDLERS[nn.Bilinear]("pair", module, references.firsts_of(module)))
    assert [(site.name, site.form) for site, _ in stored] == [("pair", "dense")]
    _agree(module, stored, lambda m: m(x.double(), y.double()), grads, ["weight", "bias"] if bias else ["weight"])


@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("compare", [True, False])
def test_own_parameters_of_a_module_with_children(used: Any, compare: bool) -> None:
    module, x, mask = Opaque(), torch.randn(B, 2, 4), torch.rand(4)
    stored, grads = _run(module, [x], used, compare=compare, factor=2.0, mask=mask)
    assert module.count == 1  # the forward pass that is repeated leaves no trace
    if not used[0]:
        module.mix.grad = torch.zeros_like(module.mix)
    _agree(module, stored, lambda m: m(x.double(), factor=2.0, mask=mask.double()), grads, ["scale", "mix"])


def test_hooks_are_not_called_again() -> None:
    module, seen = Opaque(), []
    module.register_forward_hook(lambda *args: seen.append("after"))
    module.inner.register_forward_pre_hook(lambda *args: seen.append("before"))
    _run(module, [torch.randn(B, 4)], [True, True])
    assert seen == ["before", "after"] and module.inner._forward_pre_hooks


def test_portions_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Opaque(), torch.randn(B, 2, 4)
    whole, _ = _run(module, [x], [True, True])
    monkeypatch.setattr(local, "TEMPORARY", 32 * 20 * 2)
    portions, _ = _run(module, [x], [True, True])
    assert torch.allclose(whole[0][1]["g"], portions[0][1]["g"], rtol=1e-6)


def test_frozen_and_unrecorded_parameters_and_the_same_site() -> None:
    module = Opaque()
    handler = Generic("opaque", module, references.firsts_of(module))
    x = torch.randn(B, 4)
    both = _run(module, [x], [True, True], handler)[0][0][0]
    module.scale.requires_grad_(False)
    one = _run(module, [x.requires_grad_()], [True, True], handler)[0][0][0]
    assert one.ranges == ((references.firsts_of(module)[id(module.mix)], 12),)
    module.scale.requires_grad_(True)
    assert _run(module, [x], [True, True], handler)[0][0][0] is both
    assert _run(module, [x], [True, True], Generic("opaque", module, {}))[0] == []
    assert handler(ModuleCall(module, (x,), {}, None, [None, None], B)) == []


def test_half_precision_gives_float32() -> None:
    module = references.scaled(nn.Bilinear(4, 6, 3)).bfloat16()
    x, y = torch.randn(B, 4).bfloat16(), torch.randn(B, 6).bfloat16()
    stored, _ = _run(module, [x, y], [True])
    g = stored[0][1]["g"]
    assert g.dtype == torch.float32
    assert (g[:, :72].sum(0) - module.weight.grad.flatten()).abs().max() <= 2e-2 * module.weight.grad.abs().max()


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (nn.Dropout(0.5), "draws random numbers"),
        (nn.BatchNorm1d(4), "couples the samples"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "couples the samples"),
        (Centred(), "depends on other samples"),
    ],
)
def test_what_is_refused(inner: nn.Module, reason: str) -> None:
    with pytest.raises(CannotSplit, match=reason):
        _run(Opaque(inner), [torch.randn(B, 4)], [True, True], compare=True)


def test_the_same_in_evaluation_is_split() -> None:
    for inner in (nn.Dropout(0.5).eval(), nn.BatchNorm1d(4).eval()):
        assert _run(Opaque(inner), [torch.randn(B, 4)], [True, True], compare=True)[0]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(CannotSplit, match="none of its arguments"):
        _run(Opaque(), [torch.randn(3, 4)], [True, True])

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).sum(0)

    with pytest.raises(CannotSplit, match="is not one by sample"):
        _run(Summed(), [torch.randn(B, 4)], [True])


def test_weight_norm_is_not_split() -> None:
    with pytest.warns(FutureWarning):
        module = torch.nn.utils.weight_norm(nn.Bilinear(4, 6, 3))
    with pytest.raises(CannotSplit, match="outside its forward pass"):
        _run(module, [torch.randn(B, 4), torch.randn(B, 6)], [True])
