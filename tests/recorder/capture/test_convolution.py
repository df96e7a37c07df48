"""Convolutions: maps and contributions equal per-sample autograd, for every option of torch's six modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall
from nbdyn.recorder.capture.convolution import HANDLERS
from nbdyn.store.convolve import weight_gradient
from nbdyn.store.sites import Site
from tests.recorder.capture import oracle

OPTIONS: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv1d, (11,), {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2}),
    (nn.Conv1d, (11,), {"kernel_size": 3, "groups": 2, "bias": False}),
    (nn.Conv1d, (11,), {"kernel_size": 4, "padding": "same", "dilation": 3}),
    (nn.Conv2d, (9, 7), {"kernel_size": 3}),
    (nn.Conv2d, (9, 7), {"kernel_size": 1, "stride": 2}),
    (nn.Conv2d, (9, 7), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2), "dilation": (3, 1)}),
    (nn.Conv2d, (9, 7), {"kernel_size": 3, "groups": 4, "padding": 1}),
    (nn.Conv2d, (9, 7), {"kernel_size": 3, "groups": 2, "stride": 2, "bias": False}),
    (nn.Conv2d, (9, 7), {"kernel_size": 3, "padding": "same", "dilation": 2}),
    (nn.Conv2d, (9, 7), {"kernel_size": (4, 2), "padding": "same"}),
    (nn.Conv2d, (9, 7), {"kernel_size": 2, "padding": "valid"}),
    (nn.Conv2d, (9, 7), {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}),
    (nn.Conv2d, (9, 7), {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate", "stride": 2}),
    (nn.Conv2d, (9, 7), {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"}),
    (nn.Conv3d, (5, 4, 6), {"kernel_size": (3, 1, 2), "stride": (1, 2, 2), "padding": (1, 0, 1), "groups": 2}),
    (nn.Conv3d, (5, 4, 6), {"kernel_size": 2, "padding": 1, "padding_mode": "replicate", "dilation": 2}),
    (nn.ConvTranspose1d, (6,), {"kernel_size": 4, "stride": 3, "padding": 2, "output_padding": 1}),
    (nn.ConvTranspose1d, (6,), {"kernel_size": 2, "dilation": 4, "output_padding": 3, "stride": 2}),
    (nn.ConvTranspose2d, (5, 4), {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2, "output_padding": (1, 0)}),
    (nn.ConvTranspose2d, (5, 4), {"kernel_size": (3, 2), "dilation": (1, 2), "bias": False, "groups": 4}),
    (nn.ConvTranspose3d, (3, 2, 4), {"kernel_size": 2, "stride": (2, 1, 3), "padding": (1, 0, 0), "groups": 2}),
]


def _layer(kind: Any, options: dict[str, Any], channels: tuple[int, int] = (4, 8)) -> nn.Module:
    torch.manual_seed(1)
    return kind(*channels, **options)


@pytest.fixture
def prefer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes one form the smaller one, whatever the sizes."""

    def choose(form: str) -> None:
        size = 10**9 if form == "conv" else 0
        monkeypatch.setattr("nbdyn.recorder.capture.convolution.numbers", lambda *parameters: size)

    return choose


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch's advice on even kernels
@pytest.mark.parametrize(("kind", "size", "options"), OPTIONS)
@pytest.mark.parametrize("form", ["conv", "dense"])
def test_equals_autograd(prefer: Any, kind: Any, size: tuple[int, ...], options: dict[str, Any], form: str) -> None:
    prefer(form)
    module = _layer(kind, options)
    stored = oracle.check(HANDLERS, module, [torch.randn(3, 4, *size, requires_grad=True)], 3)
    assert [site.form for site, _ in stored] == [form]
    site = Site.from_json(stored[0][0].to_json(), 10**6)
    assert site == stored[0][0]
    if form == "conv":
        tensors = stored[0][1]
        gradient = weight_gradient(tensors["a"], tensors["d"], site)
        expected = oracle.cells(stored, module, 3)["weight"]
        assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_smaller_form_is_stored() -> None:
    """A 1 x 1 convolution from I to O channels on P places: (I + O) P numbers as maps, O I + O written out."""
    for positions, form in ((4, "conv"), (5, "dense")):
        module = _layer(nn.Conv1d, {"kernel_size": 1}, (8, 8))
        (site, _), *_ = oracle.run(HANDLERS, module, [torch.randn(2, 8, positions)], 2)[0]
        assert site.form == form


def test_float64_and_output_size() -> None:
    module: Any = _layer(nn.ConvTranspose2d, {"kernel_size": 3, "stride": 3}).double()
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    for size in ([15, 12], [17, 14]):
        stored, d = oracle.run(HANDLERS, module, [x], 3, output_size=size)
        assert list(d.shape[2:]) == size and stored[0][1]["g"].dtype == torch.float64
        expected = oracle.cells(stored, module, 3)
        assert torch.allclose(expected["weight"].sum(0), module.weight.grad, rtol=1e-12)
        for sample in range(3):
            module.zero_grad()
            module(x[sample : sample + 1], output_size=size).backward(d[sample : sample + 1])
            assert torch.allclose(expected["weight"][sample], module.weight.grad, rtol=1e-12)


@pytest.mark.parametrize("form", ["conv", "dense"])
@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (6,)), (nn.Conv2d, (5, 4)), (nn.ConvTranspose2d, (5, 4))])
def test_several_maps_of_a_sample_folded_into_rows(prefer: Any, kind: Any, size: tuple[int, ...], form: str) -> None:
    prefer(form)
    module = _layer(kind, {"kernel_size": 3, "stride": 2, "padding": 1})
    x = torch.randn(3 * 2, 4, *size, requires_grad=True)
    oracle.check(HANDLERS, module, [x], 3, oracle.folded(2))
    stored, d = oracle.run(HANDLERS, module, [x], 3, sequence_first=True)
    together = torch.tensor([0, 3, 1, 4, 2, 5])  # the rows of a sample, where rows stand time by time
    expected = oracle.one_by_one(module, [x[together]], d[together], 3, oracle.folded(2))
    oracle.agree(oracle.cells(stored, module, 3), expected, module)


def test_folded_maps_of_three_dimensions_are_written_out(prefer: Any) -> None:
    """With the dimension of the maps they would have four, which torch does not convolve."""
    prefer("conv")
    module = _layer(nn.Conv3d, {"kernel_size": 2, "stride": (2, 1, 1), "padding": 1})
    stored = oracle.check(HANDLERS, module, [torch.randn(3 * 2, 4, 3, 4, 2, requires_grad=True)], 3, oracle.folded(2))
    assert stored[0][0].form == "dense"


@pytest.mark.parametrize("shape", [(4, 9, 7), (5, 4, 9, 7), (1, 4, 9, 7)])
def test_what_is_no_batch(shape: tuple[int, ...]) -> None:
    with pytest.raises(CannotSplit, match="batch"):
        oracle.run(HANDLERS, _layer(nn.Conv2d, {"kernel_size": 3}), [torch.randn(shape)], 4)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("form", ["conv", "dense"])
def test_frozen_parameters_take_no_part(prefer: Any, frozen: str, form: str) -> None:
    prefer(form)
    module = _layer(nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"})
    getattr(module, frozen).requires_grad_(False)
    (site, _), *_ = oracle.check(HANDLERS, module, [torch.randn(3, 4, 6, 5, requires_grad=True)], 3)
    assert site.form == (form if frozen == "bias" else "dense")


def test_the_same_site_each_time() -> None:
    module = _layer(nn.Conv2d, {"kernel_size": 3}, (16, 16))
    handler = oracle.handler_for(HANDLERS, module)
    sites = [
        oracle.run(HANDLERS, module, [torch.randn(2, 16, n, n)], 2, handler=handler)[0][0][0] for n in (4, 20, 6, 30)
    ]
    assert sites[0] is sites[2] and sites[1] is sites[3] and sites[0].form == "conv" and sites[1].form == "dense"


def test_channels_last() -> None:
    module: Any = _layer(nn.Conv2d, {"kernel_size": 3, "padding": 1}, (16, 16))
    module.to(memory_format=torch.channels_last)
    for n in (4, 20):
        x = torch.randn(3, 16, n, n, requires_grad=True).to(memory_format=torch.channels_last)
        oracle.check(HANDLERS, module, [x], 3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("size", [4, 16])
def test_half_precision(half: torch.dtype, mode: str, size: int) -> None:
    module: Any = _layer(nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": mode}, (16, 16))
    x = torch.randn(3, 16, size, size)
    stored, d = oracle.run(HANDLERS, module, [x], 3, dtype=half)
    assert d.dtype == half and {t.dtype for t in stored[0][1].values()} == {half if size == 4 else torch.float32}
    expected = oracle.one_by_one(module, [x.to(half)], d, 3)
    oracle.agree(oracle.cells(stored, module, 3), expected, module, total=2e-2)


def test_autocast_does_not_reach_contributions() -> None:
    """A backward pass inside autocast: its matrix products would round to half precision."""
    module: Any = _layer(nn.Conv2d, {"kernel_size": 3})
    x = torch.randn(3, 4, 9, 9)
    _, d = oracle.run(HANDLERS, module, [x], 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        stored = oracle.handler_for(HANDLERS, module)(ModuleCall(module, (x,), {}, None, [d], 3))
    oracle.agree(oracle.cells(stored, module, 3), oracle.one_by_one(module, [x], d, 3), module)
