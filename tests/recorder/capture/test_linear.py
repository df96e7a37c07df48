"""Linear layers: factors and contributions equal per-sample autograd; layouts, frozen parameters, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall
from nbdyn.recorder.capture.linear import HANDLERS, Linear
from tests.recorder.capture import oracle


def _layer(*args: Any, **options: Any) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(*args, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "take", "sequence_first", "form"),
    [
        ((6, 12), oracle.batch_first, False, "linear"),
        ((6, 3, 12), oracle.batch_first, False, "linear"),
        ((6, 40, 12), oracle.batch_first, False, "dense"),
        ((6, 4, 10, 12), oracle.batch_first, False, "dense"),
        ((3, 6, 12), oracle.time_first, False, "linear"),
        ((6, 6, 12), oracle.time_first, True, "dense"),
        ((40, 6, 12), oracle.time_first, True, "dense"),
        ((18, 12), oracle.folded(3), False, "linear"),
    ],
)
def test_equals_autograd(shape: Any, take: Any, sequence_first: bool, form: str, dtype: Any, bias: bool) -> None:
    module = _layer(12, 9, bias=bias).to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    stored = oracle.check(HANDLERS, module, [x], 6, take, sequence_first)
    assert [site.form for site, _ in stored] == [form]
    assert all(t.dtype == dtype for t in stored[0][1].values())


def test_rows_folded_time_by_time() -> None:
    module, x = _layer(5, 4), torch.randn(3, 6, 5)
    stored, d = oracle.run(HANDLERS, module, [x.flatten(0, 1)], 6, sequence_first=True)
    expected = oracle.one_by_one(module, [x], d.reshape(3, 6, 4), 6, oracle.time_first)
    oracle.agree(oracle.cells(stored, module, 6), expected, module)


def test_the_smaller_form_is_stored() -> None:
    """Factors of T positions have T (I + O) numbers, the layer O I + O."""
    module = _layer(12, 12)
    assert oracle.run(HANDLERS, module, [torch.randn(2, 6, 12)], 2)[0][0][0].form == "linear"
    assert oracle.run(HANDLERS, module, [torch.randn(2, 7, 12)], 2)[0][0][0].form == "dense"


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("times", [2, 30])
def test_frozen_parameters_take_no_part(frozen: str, times: int) -> None:
    module = _layer(12, 9)
    getattr(module, frozen).requires_grad_(False)
    stored = oracle.check(HANDLERS, module, [torch.randn(6, times, 12, requires_grad=True)], 6)
    assert (stored[0][0].form == "linear") == (frozen == "bias" and times == 2)


def test_a_thawed_weight_makes_a_new_site() -> None:
    module = _layer(12, 9)
    handler = oracle.handler_for(HANDLERS, module)
    x = torch.randn(4, 12, requires_grad=True)
    both = oracle.run(HANDLERS, module, [x], 4, handler=handler)[0][0][0]
    module.weight.requires_grad_(False)
    bias = oracle.run(HANDLERS, module, [x], 4, handler=handler)[0][0][0]
    assert bias.ranges == ((oracle.firsts_of(module)[id(module.bias)], 9),)
    assert oracle.run(HANDLERS, module, [x], 4, handler=handler)[0][0][0] is bias
    module.weight.requires_grad_(True)
    assert oracle.run(HANDLERS, module, [x], 4, handler=handler)[0][0][0] is both


def test_the_same_site_for_each_form() -> None:
    module = _layer(12, 9)
    handler = oracle.handler_for(HANDLERS, module)
    seen = [
        oracle.run(HANDLERS, module, [torch.randn(4, times, 12)], 4, handler=handler)[0][0][0]
        for times in (1, 30, 2, 50)
    ]
    assert seen[0] is seen[2] and seen[1] is seen[3] and seen[0].form != seen[1].form


def test_only_recorded_parameters_take_part() -> None:
    module = _layer(12, 9)
    handler = Linear("layer", module, {id(module.bias): 5})
    site, tensors = oracle.run(HANDLERS, module, [torch.randn(4, 12)], 4, handler=handler)[0][0]
    assert site.form == "dense" and site.ranges == ((5, 9),)
    assert module.bias.grad is not None and torch.allclose(tensors["g"].sum(0), module.bias.grad)
    assert oracle.run(HANDLERS, module, [torch.randn(4, 12)], 4, handler=Linear("layer", module, {}))[0] == []


def test_no_gradient_nothing_stored() -> None:
    module = _layer(3, 2)
    call = ModuleCall(module, (torch.randn(4, 3),), {}, None, [None], 4)
    assert Linear("layer", module, oracle.firsts_of(module))(call) == []


@pytest.mark.parametrize("shape", [(12,), (5, 12), (1, 12)])
def test_rows_that_do_not_fit_the_batch(shape: Any) -> None:
    with pytest.raises(CannotSplit, match="batch of 6 samples"):
        oracle.run(HANDLERS, _layer(12, 9), [torch.randn(shape)], 6)


def test_the_input_by_its_name() -> None:
    module, x = _layer(12, 9), torch.randn(6, 12)
    stored, _ = oracle.run(HANDLERS, module, [], 6, input=x)
    assert torch.equal(stored[0][1]["a"][:, 0], x)


@pytest.mark.parametrize("times", [2, 40])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(half: torch.dtype, times: int, autocast: bool) -> None:
    """Factors keep the precision of training, contributions have float32, exact for the rounded factors."""
    module, x = _layer(12, 9), torch.randn(6, times, 12)
    if not autocast:
        module, x = module.to(half), x.to(half)
    stored, d = oracle.run(HANDLERS, module, [x], 6, dtype=half if autocast else None)
    assert {t.dtype for t in stored[0][1].values()} == {half if times == 2 else torch.float32}
    expected = oracle.one_by_one(module, [x.to(half)], d, 6)
    oracle.agree(oracle.cells(stored, module, 6), expected, module, each=5e-6, total=2e-2)


def test_autocast_does_not_reach_contributions() -> None:
    """A backward pass inside autocast: its matrix products would round to half precision."""
    module, x = _layer(12, 9), torch.randn(6, 40, 12)
    d = torch.randn(6, 40, 9)
    call = ModuleCall(module, (x,), {}, None, [d], 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        (_, tensors), *_ = oracle.handler_for(HANDLERS, module)(call)
    exact = torch.einsum("bto,bti->boi", d.double(), x.double()).flatten(1)
    assert (tensors["g"][:, : 12 * 9] - exact).abs().max() < 5e-6 * exact.abs().max()


def test_many_portions() -> None:
    """More samples than one portion of temporary memory holds."""
    module = _layer(40, 30)
    oracle.check(HANDLERS, module, [torch.randn(60, 700, 40)], 60)


def test_weight_norm_is_not_split() -> None:
    with pytest.warns(FutureWarning):
        module = torch.nn.utils.weight_norm(_layer(3, 2))
    with pytest.raises(CannotSplit, match="weight_g, weight_v"):
        oracle.run(HANDLERS, module, [torch.randn(4, 3)], 4)
