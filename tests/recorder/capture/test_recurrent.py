"""Recurrent modules: layers, directions, states, packed sequences, dropout and cells equal per-sample autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored
from nbdyn.recorder.capture.generic import tensors_of
from nbdyn.recorder.capture.recurrent import HANDLERS, Recurrent
from tests.recorder.capture import references

SIZE = 4
KINDS = [nn.RNN, nn.LSTM, nn.GRU]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So many small tensors are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _like(t: Any, model: nn.Module) -> Any:
    """An argument in the model's precision."""
    if isinstance(t, PackedSequence):
        return PackedSequence(_like(t.data, model), *t[1:])
    if isinstance(t, Tensor):
        return t.to(next(model.parameters()).dtype)
    return tuple(_like(part, model) for part in t)


def _run(module: nn.Module, args: Sequence[Any], used: Sequence[bool], handler: Any = None) -> tuple[list[Stored], Any]:
    """What the handler makes of a call of which some outputs get gradients; and all gradients at outputs."""
    module.zero_grad()
    handler = handler or HANDLERS[type(module)]("rnn", module, references.firsts_of(module))
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    outputs = list(tensors_of(module(*args)))
    gradients = references.gradients_for([o for o in outputs if o.requires_grad])
    grads: list[Tensor | None] = [gradients.pop(0) if o.requires_grad else None for o in outputs]
    floating = iter(used)
    grads = [g if g is not None and next(floating) else None for g in grads]
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    state = torch.get_rng_state()
    with torch.no_grad():
        stored = handler(ModuleCall(module, tuple(args), {}, None, grads, SIZE, rng=rng))
    assert torch.equal(state, torch.get_rng_state())
    return stored, grads


def _check(
    module: nn.Module, args: Sequence[Any], dims: Sequence[int], used: Sequence[bool] | None = None, **options: Any
) -> list[Stored]:
    used = [True] * len(dims) if used is None else used
    stored, grads = _run(module, args, used)

    def forward(model: nn.Module) -> list[Tensor]:
        outputs = tensors_of(model(*(_like(arg, model) for arg in args)))
        return [o for o in outputs if o.requires_grad]

    given = [g for o, g in zip(tensors_of(module(*args)), grads, strict=True) if o.requires_grad]
    expected = references.one_at_a_time(module, forward, given, SIZE, dims, **options)
    references.agree(module, references.cells(stored, SIZE, module), expected, total=2e-6)
    return stored


def _dims(module: Any) -> list[int]:
    return [0 if module.batch_first else 1, 1, 1][: 3 if isinstance(module, nn.LSTM) else 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("layers", "batch_first", "bias", "given"), [(1, True, True, False), (2, False, False, True), (3, True, True, True)]
)
def test_equals_autograd(
    kind: Any, batch_first: bool, bidirectional: bool, layers: int, bias: bool, given: bool
) -> None:
    module = kind(5, 6, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn((SIZE, 3, 5) if batch_first else (3, SIZE, 5))
    states = torch.randn(2, layers * (1 + bidirectional), SIZE, 6)
    hx = (states[0], states[1]) if kind is nn.LSTM else states[0]
    _check(references.scaled(module), [x, hx] if given else [x], _dims(module))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "used", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_some_outputs_have_gradients(kind: Any, used: Any) -> None:
    module = references.scaled(kind(5, 6, 2, bidirectional=True))
    if any(used[: len(_dims(module))]):
        _check(module, [torch.randn(3, SIZE, 5)], _dims(module), used)


def test_no_gradient_nothing_stored() -> None:
    assert _run_without(nn.LSTM(5, 6)) == [] and _run_without(nn.GRUCell(5, 6)) == []


def _run_without(module: nn.Module) -> list[Stored]:
    handler = HANDLERS[type(module)]("rnn", module, references.firsts_of(module))
    x = torch.randn(SIZE, 5) if "Cell" in type(module).__name__ else torch.randn(3, SIZE, 5)
    return handler(ModuleCall(module, (x,), {}, None, [None, None, None], SIZE))


def test_nonlinearity_and_projection() -> None:
    _check(references.scaled(nn.RNN(5, 6, 2, nonlinearity="relu")), [torch.randn(3, SIZE, 5)], [1, 1])
    module = references.scaled(nn.LSTM(5, 6, 2, proj_size=3, bidirectional=True))
    stored = _check(module.double(), [torch.randn(3, SIZE, 5).double()], [1, 1, 1])
    assert {site.name for site, _ in stored} >= {"rnn:weight_hr_l0", "rnn:weight_hr_l1_reverse"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(kind: Any, enforce_sorted: bool) -> None:
    module = references.scaled(kind(5, 6, 2, bidirectional=True))
    lengths = [4, 3, 3, 1] if enforce_sorted else [2, 4, 1, 3]
    packed = pack_padded_sequence(torch.randn(4, SIZE, 5), lengths, enforce_sorted=enforce_sorted)
    states = torch.randn(2, 4, SIZE, 6)
    hx = (states[0], states[1]) if kind is nn.LSTM else states[0]
    stored, grads = _run(module, [packed, hx], [True, True, True])

    def padded(rows: Tensor) -> Tensor:
        return pad_packed_sequence(PackedSequence(rows, *packed[1:]))[0]

    def forward(model: nn.Module) -> list[Tensor]:
        output, end = model(_like(packed, model), _like(hx, model))
        return [padded(output.data), *tensors_of(end)]

    given = [padded(grads[0]), *grads[-len(_dims(module)) + 1 :]]
    expected = references.one_at_a_time(module, forward, given, SIZE, [1, 1, 1][: len(given)])
    references.agree(module, references.cells(stored, SIZE, module), expected, total=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("bidirectional", "batch_first", "p"), [(False, False, 0.3), (True, True, 0.4), (False, True, 1.0)]
)
def test_dropout_between_layers(kind: Any, bidirectional: bool, batch_first: bool, packed: bool, p: float) -> None:
    """The masks are drawn again: the same outputs, and the contributions of autograd with the same masks."""
    module = references.scaled(kind(5, 6, 3, bidirectional=bidirectional, batch_first=batch_first, dropout=p))
    x: Any = torch.randn((SIZE, 4, 5) if batch_first else (4, SIZE, 5))
    if packed:
        x = pack_padded_sequence(x, [2, 4, 1, 3], batch_first=batch_first, enforce_sorted=False)
    used = [not packed, True, True][: len(_dims(module))]
    _check(module, [x], _dims(module), used, dtype=torch.float32)
    torch.manual_seed(3)
    call = ModuleCall(module, (x,), {}, None, [], SIZE, rng=torch.get_rng_state())
    handler = Recurrent("rnn", module, {})
    batch = handler._batch(x)
    with torch.no_grad():
        own = list(tensors_of(module(x)))
        output = handler._unroll(batch, [], handler._masks(call, batch))[1][0]
    assert output is not None
    rows = output.flatten(0, 1)[batch.rows] if packed else output.transpose(0, 1) if batch_first else output
    assert (rows - own[0]).abs().max() <= 1e-6


def test_dropout_of_many_numbers() -> None:
    """So many that torch draws them on several threads."""
    torch.set_num_threads(2)
    module = references.scaled(nn.LSTM(16, 64, 2, dropout=0.5), std=0.1)
    x = torch.randn(40, SIZE * 8, 16)
    stored, _ = _run(module, [x], [True, True, True])
    total = references.cells(stored, SIZE, module).sum(0)
    for p in module.parameters():
        first = references.firsts_of(module)[id(p)]
        assert p.grad is not None
        assert (total[first : first + p.numel()] - p.grad.flatten()).abs().max() <= 5e-6 * p.grad.abs().max()
    torch.set_num_threads(1)


def test_dropout_that_cannot_be_repeated() -> None:
    module = nn.LSTM(5, 6, 2, dropout=0.5)
    handler = Recurrent("rnn", module, references.firsts_of(module))
    call = ModuleCall(module, (torch.randn(3, SIZE, 5),), {}, None, [torch.randn(3, SIZE, 6), None, None], SIZE)
    with pytest.raises(CannotSplit, match="state of the random generator"):
        handler(call)
    module.eval()
    assert handler(call)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize(("bias", "given"), [(True, True), (False, False)])
def test_cells(kind: Any, bias: bool, given: bool) -> None:
    module = references.scaled(kind(5, 6, bias=bias))
    states = torch.randn(2, SIZE, 6)
    hx = (states[0], states[1]) if kind is nn.LSTMCell else states[0]
    args = [torch.randn(SIZE, 5), hx] if given else [torch.randn(SIZE, 5)]
    dims = [0, 0] if kind is nn.LSTMCell else [0]
    _check(module, args, dims)
    if len(dims) == 2:
        _check(module, args, dims, [False, True])


def test_one_sequence_without_a_batch_dimension() -> None:
    for module, args in [
        (nn.GRU(5, 6, 2), [torch.randn(3, 5), torch.randn(2, 6)]),
        (nn.LSTM(5, 6, bidirectional=True), [torch.randn(3, 5)]),
        (nn.LSTMCell(5, 6), [torch.randn(5)]),
    ]:
        handler = HANDLERS[type(module)]("rnn", module, references.firsts_of(module))
        outputs = list(tensors_of(module(*args)))
        grads = references.gradients_for(outputs)
        torch.autograd.backward(outputs, grads)
        with torch.no_grad():
            stored = handler(ModuleCall(module, tuple(args), {}, None, list(grads), 1))
        found = references.cells(stored, 1, module)
        references.agree(module, found, found, total=2e-6)


def test_several_sequences_of_a_sample() -> None:
    module = references.scaled(nn.GRU(5, 6, batch_first=True))
    _check(module, [torch.randn(SIZE * 2, 3, 5)], [0, 1])


@pytest.mark.parametrize("shape", [(3, SIZE + 1, 5), (SIZE, SIZE * 3, 5)])
def test_sequences_that_do_not_fit_the_batch(shape: Any) -> None:
    """The second looks as if `batch_first` had been forgotten."""
    with pytest.raises(CannotSplit, match=f"batch of {SIZE} samples"):
        _run(nn.LSTM(5, 6), [torch.randn(shape)], [True, True, True])


def test_frozen_and_unrecorded_parameters() -> None:
    module = references.scaled(nn.LSTM(5, 6))
    module.weight_ih_l0.requires_grad_(False)
    module.bias_hh_l0.requires_grad_(False)
    handler = Recurrent("rnn", module, references.firsts_of(module))
    stored, _ = _run(module, [torch.randn(3, SIZE, 5)], [True, True, True], handler)
    assert [(site.name, site.form, site.bias is None) for site, _ in stored] == [
        ("rnn:weight_ih_l0", "dense", True),
        ("rnn:weight_hh_l0", "linear", True),
    ]
    module.weight_ih_l0.requires_grad_(True)
    stored, _ = _run(module, [torch.randn(3, SIZE, 5)], [True, True, True], handler)
    assert stored[0][0].form == "linear" and stored[0][0].bias is not None


def test_the_smaller_form_and_the_same_sites() -> None:
    """The site of weight_ih has 4H (I + 1) numbers, its factors T (I + 4H)."""
    module = nn.LSTM(20, 20)
    handler = Recurrent("rnn", module, references.firsts_of(module))
    seen = [_run(module, [torch.randn(t, SIZE, 20)], [True] * 3, handler)[0][0][0] for t in (16, 17, 16, 30)]
    assert [site.form for site in seen] == ["linear", "dense", "linear", "dense"]
    assert seen[0] is seen[2] and seen[1] is seen[3]


def test_gradients_that_agree_are_one_tensor() -> None:
    """At the gates of an LSTM the gradient for both maps is the same, so that it need be stored only once."""
    stored, _ = _run(nn.LSTM(5, 6), [torch.randn(3, SIZE, 5)], [True] * 3)
    assert stored[0][1]["d"] is stored[1][1]["d"]


@pytest.mark.parametrize("times", [2, 40])
def test_half_precision(times: int) -> None:
    module = references.scaled(nn.GRU(5, 6)).bfloat16()
    stored, _ = _run(module, [torch.randn(times, SIZE, 5).bfloat16()], [True, True])
    dtypes = {t.dtype for _, tensors in stored for t in tensors.values()}
    assert dtypes == {torch.bfloat16 if times == 2 else torch.float32}
    found = references.cells(stored, SIZE, module)
    references.agree(module, found, found, total=5e-2)


def test_weight_norm_is_not_split() -> None:
    with pytest.warns(FutureWarning):
        module = torch.nn.utils.weight_norm(nn.GRU(5, 6), "weight_hh_l0")
    with pytest.raises(CannotSplit, match="weight_hh_l0_g, weight_hh_l0_v"):
        _run(module, [torch.randn(3, SIZE, 5)], [True, True])
