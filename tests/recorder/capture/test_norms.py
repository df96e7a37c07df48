"""Normalisation layers and PReLU: contributions equal per-sample autograd; BatchNorm's, autograd of the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall
from nbdyn.recorder.capture.norms import HANDLERS
from tests.recorder.capture import oracle

BATCH = 6


def _layer(module: nn.Module) -> nn.Module:
    """With weights and biases of all sizes, and statistics as after training; what is drawn later is seeded too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape))
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                values = torch.randn(buffer.shape)
                buffer.copy_(values.exp() if name == "running_var" else values)
    return module


LAST = [
    (nn.LayerNorm(8), (BATCH, 8), oracle.batch_first, False),
    (nn.LayerNorm(8), (BATCH, 5, 8), oracle.batch_first, False),
    (nn.LayerNorm(8), (5, BATCH, 8), oracle.time_first, False),
    (nn.LayerNorm(8), (BATCH, BATCH, 8), oracle.time_first, True),
    (nn.LayerNorm(8), (BATCH * 2, 8), oracle.folded(2), False),
    (nn.LayerNorm([3, 4], eps=0.1), (BATCH, 2, 3, 4), oracle.batch_first, False),
    (nn.LayerNorm([2, 3, 4]), (BATCH, 2, 3, 4), oracle.batch_first, False),
    (nn.LayerNorm(8, bias=False), (BATCH, 5, 8), oracle.batch_first, False),
    (nn.RMSNorm(8), (BATCH, 5, 8), oracle.batch_first, False),
    (nn.RMSNorm([3, 4], eps=0.1), (BATCH, 5, 3, 4), oracle.batch_first, False),
    (nn.RMSNorm(8), (5, BATCH, 8), oracle.time_first, False),
]

BY_CHANNEL = [
    (nn.GroupNorm(2, 4), (BATCH, 4), oracle.batch_first),
    (nn.GroupNorm(2, 4), (BATCH, 4, 5), oracle.batch_first),
    (nn.GroupNorm(4, 4, eps=0.1), (BATCH, 4, 5, 3), oracle.batch_first),
    (nn.GroupNorm(1, 4), (BATCH, 4, 2, 5, 3), oracle.batch_first),
    (nn.GroupNorm(2, 4), (BATCH * 2, 4, 5), oracle.folded(2)),
    (nn.InstanceNorm1d(4, affine=True), (BATCH, 4, 5), oracle.batch_first),
    (nn.InstanceNorm2d(4, affine=True, eps=0.1), (BATCH, 4, 5, 3), oracle.batch_first),
    (nn.InstanceNorm3d(4, affine=True, track_running_stats=True), (BATCH, 4, 2, 5, 3), oracle.batch_first),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), (BATCH, 4, 5, 3), oracle.batch_first),
    (nn.BatchNorm1d(4).eval(), (BATCH, 4), oracle.batch_first),
    (nn.BatchNorm1d(4).eval(), (BATCH, 4, 5), oracle.batch_first),
    (nn.BatchNorm2d(4, eps=0.1).eval(), (BATCH, 4, 5, 3), oracle.batch_first),
    (nn.BatchNorm3d(4).eval(), (BATCH * 2, 4, 2, 5, 3), oracle.folded(2)),
    (nn.PReLU(), (BATCH, 4, 5, 3), oracle.batch_first),
    (nn.PReLU(), (BATCH,), oracle.batch_first),
    (nn.PReLU(), (5, BATCH, 4), oracle.time_first),
    (nn.PReLU(4), (BATCH, 4), oracle.batch_first),
    (nn.PReLU(4), (BATCH, 4, 5, 3), oracle.batch_first),
    (nn.PReLU(4), (BATCH * 2, 4, 5), oracle.folded(2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("module", "shape", "take", "sequence_first"),
    [*LAST, *[(*case, False) for case in BY_CHANNEL]],
    ids=lambda value: getattr(value, "__qualname__", None) or str(value),  # str of a function has its address
)
def test_equals_autograd(module: Any, shape: Any, take: Any, sequence_first: bool, dtype: torch.dtype) -> None:
    module = _layer(copy.deepcopy(module)).to(dtype)
    x = (1 + 2 * torch.randn(shape, dtype=dtype)).requires_grad_()
    site, tensors = oracle.check(HANDLERS, module, [x], BATCH, take, sequence_first)[0]
    assert site.form == "dense" and site.note == "" and tensors["g"].dtype == dtype


BATCH_NORMS = [
    (nn.BatchNorm1d(4), (BATCH, 4)),
    (nn.BatchNorm1d(4), (BATCH, 4, 5)),
    (nn.BatchNorm2d(4, eps=0.1, momentum=None), (BATCH, 4, 5, 3)),
    (nn.BatchNorm3d(4), (BATCH, 4, 2, 5, 3)),
    (nn.BatchNorm2d(4, track_running_stats=False), (BATCH, 4, 5, 3)),
    (nn.BatchNorm2d(4, track_running_stats=False).eval(), (BATCH, 4, 5, 3)),
    (nn.BatchNorm2d(4), (BATCH * 2, 4, 5, 3)),
]


def _expanded(module: Any, x: Tensor, d: Tensor) -> dict[str, Tensor]:
    """Autograd in float64 with a weight and a bias of its own for every sample, all of the same value."""
    shape = (BATCH, 4, *[1] * (x.ndim - 2))
    weight = module.weight.detach().double().expand(BATCH, 4).clone().requires_grad_()
    bias = module.bias.detach().double().expand(BATCH, 4).clone().requires_grad_()
    normalised = functional.batch_norm(x.detach().double(), None, None, training=True, eps=module.eps)
    times = len(x) // BATCH
    wide = [p.reshape(shape).repeat_interleave(times, 0) for p in (weight, bias)]
    grads = torch.autograd.grad(normalised * wide[0] + wide[1], [weight, bias], d.double())
    return {"weight": grads[0], "bias": grads[1]}


@pytest.mark.parametrize(("module", "shape"), BATCH_NORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_statistics(module: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    module = _layer(copy.deepcopy(module)).to(dtype)
    x = (1 + 2 * torch.randn(shape, dtype=dtype)).requires_grad_()
    stored, d = oracle.run(HANDLERS, module, [x], BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), _expanded(module, x, d), module)
    assert [site.note for site, _ in stored] == ["batch-coupled"]


def test_training_and_evaluation_are_two_sites() -> None:
    module: Any = _layer(nn.BatchNorm2d(4))
    handler = oracle.handler_for(HANDLERS, module)
    sites = []
    for training in (True, False, True, False):
        module.train(training)
        sites.append(oracle.run(HANDLERS, module, [torch.randn(BATCH, 4, 5, 3)], BATCH, handler=handler)[0][0][0])
    assert sites[0] is sites[2] and sites[1] is sites[3]
    assert [site.note for site in sites[:2]] == ["batch-coupled", ""]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("module", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4).eval()], ids=str)
def test_frozen_parameters_take_no_part(module: Any, frozen: str) -> None:
    module = _layer(copy.deepcopy(module))
    getattr(module, frozen).requires_grad_(False)
    oracle.check(HANDLERS, module, [torch.randn(BATCH, 4)], BATCH)


def test_without_parameters_nothing_is_stored() -> None:
    module = nn.LayerNorm(4, elementwise_affine=False)
    call = ModuleCall(module, (torch.randn(BATCH, 4),), {}, None, [torch.randn(BATCH, 4)], BATCH)
    assert oracle.handler_for(HANDLERS, module)(call) == []


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.InstanceNorm1d(4, affine=True), (4, 6)),
        (nn.InstanceNorm2d(6, affine=True), (6, 5, 3)),
        (nn.LayerNorm(6), (6,)),
        (nn.LayerNorm(4), (5, 4)),
        (nn.GroupNorm(2, 4), (1, 4, 6)),
        (nn.PReLU(), (5, 7)),
    ],
)
def test_what_is_no_batch(module: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(CannotSplit, match="batch"):
        oracle.run(HANDLERS, module, [torch.randn(shape)], BATCH)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch on RMSNorm's speed
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm([4, 7]), nn.RMSNorm([4, 7]), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.PReLU(4)],
    ids=str,
)
def test_half_precision(module: Any, half: torch.dtype, autocast: bool) -> None:
    module = _layer(copy.deepcopy(module))
    x = torch.randn(BATCH, 4, 7).to(half)
    stored, d = oracle.run(
        HANDLERS, module if autocast else module.to(half), [x], BATCH, dtype=half if autocast else None
    )
    assert stored[0][1]["g"].dtype == torch.float32
    expected = oracle.one_by_one(module, [x], d, BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), expected, module, total=2e-2)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_batch_statistics_of_half_precision(half: torch.dtype) -> None:
    module: Any = _layer(nn.BatchNorm2d(4))
    x = (3 + torch.randn(BATCH, 4, 5, 3)).to(half)
    stored, d = oracle.run(HANDLERS, module, [x], BATCH)
    assert d.dtype == half
    oracle.agree(oracle.cells(stored, module, BATCH), _expanded(module, x, d), module, total=2e-2)


def test_a_mean_far_from_zero() -> None:
    """What is small beside its mean keeps the digits that float32 has of it."""
    module: Any = _layer(nn.BatchNorm1d(4))
    x = (1000 + torch.randn(BATCH, 4)).requires_grad_()
    stored, d = oracle.run(HANDLERS, module, [x], BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), _expanded(module, x, d), module, each=1e-4, total=1e-4)


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.LayerNorm(64), (BATCH, 9000, 64)), (nn.GroupNorm(2, 8), (BATCH, 8, 250, 250))], ids=str
)
def test_many_portions(module: Any, shape: tuple[int, ...]) -> None:
    """More samples than one portion of temporary memory holds."""
    module = _layer(copy.deepcopy(module))
    x = torch.randn(shape)
    stored, d = oracle.run(HANDLERS, module, [x], BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), oracle.one_by_one(module, [x], d, BATCH), module, total=5e-6)
