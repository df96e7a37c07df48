"""Embeddings and bags of embeddings: ids and rows, or the contributions, equal per-sample autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nbdyn.recorder.capture.calls import CannotSplit
from nbdyn.recorder.capture.embedding import HANDLERS
from tests.recorder.capture import oracle

BATCH = 6


def _embedding(**options: Any) -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(options.pop("rows", 50), 4, **options)


def _ids(*shape: int, rows: int = 50) -> Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("shape", "take", "sequence_first"),
    [
        ((BATCH,), oracle.batch_first, False),
        ((BATCH, 5), oracle.batch_first, False),
        ((BATCH, 1), oracle.batch_first, False),
        ((BATCH, 2, 3), oracle.batch_first, False),
        ((5, BATCH), oracle.time_first, False),
        ((BATCH, BATCH), oracle.time_first, True),
        ((BATCH, BATCH), oracle.batch_first, False),
        ((BATCH * 2,), oracle.folded(2), False),
    ],
)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"sparse": True, "padding_idx": 0}, {"max_norm": 1.0}])
@pytest.mark.parametrize("rows", [50, 5])
def test_equals_autograd(shape: Any, take: Any, sequence_first: bool, options: dict[str, Any], rows: int) -> None:
    module = _embedding(rows=rows, **options)
    stored = oracle.check(HANDLERS, module, [_ids(*shape, rows=rows)], BATCH, take, sequence_first)
    times = _ids(*shape).numel() // BATCH
    assert stored[0][0].form == ("embedding" if times * 5 <= rows * 4 else "dense")


@pytest.mark.parametrize("rows", [50, 5])
@pytest.mark.parametrize("padding", [None, 2])
def test_gradients_scaled_by_frequency(rows: int, padding: int | None) -> None:
    """The count of an id is that of the whole batch: what a sample alone would count is no reference."""
    module = _embedding(rows=rows, padding_idx=padding)
    ids = _ids(BATCH, 5, rows=rows)
    counts = torch.bincount(ids.flatten(), minlength=rows).clamp(min=1)
    _, d = oracle.run(HANDLERS, module, [ids], BATCH)
    expected = oracle.one_by_one(module, [ids], d, BATCH)["weight"] / counts.unsqueeze(1)
    module.scale_grad_by_freq = True
    stored, _ = oracle.run(HANDLERS, module, [ids], BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), {"weight": expected}, module)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_keep_their_type(dtype: torch.dtype) -> None:
    ids = _ids(BATCH, 5).to(dtype)
    tensors = oracle.check(HANDLERS, _embedding(padding_idx=3), [ids], BATCH)[0][1]
    assert tensors["ids"].dtype == dtype and tensors["ids"].shape == (BATCH, 5)


@pytest.mark.parametrize("shape", [(BATCH,), (2 * BATCH,), (7,), (1, BATCH), (BATCH, 1), (1, 2 * BATCH)])
def test_positions_are_not_split(shape: tuple[int, ...]) -> None:
    positions = torch.arange(max(shape)).reshape(shape)
    with pytest.raises(CannotSplit, match="positions"):
        oracle.run(HANDLERS, _embedding(), [positions], BATCH)


def test_positions_of_each_sample_are_split() -> None:
    positions = torch.arange(5).expand(BATCH, 5)
    oracle.check(HANDLERS, _embedding(), [positions], BATCH)
    oracle.check(HANDLERS, _embedding(), [torch.arange(5)], 1, lambda t, sample: t)


def test_ids_that_do_not_fit_the_batch() -> None:
    with pytest.raises(CannotSplit, match="batch of 6 samples"):
        oracle.run(HANDLERS, _embedding(), [_ids(7, 4)], BATCH)


def test_the_same_site_each_time_and_a_frozen_weight() -> None:
    module = _embedding()
    handler = oracle.handler_for(HANDLERS, module)
    stored = [oracle.run(HANDLERS, module, [_ids(BATCH, n)], BATCH, handler=handler)[0] for n in (2, 90, 3, 80)]
    sites = [sites[0][0] for sites in stored]
    assert sites[0] is sites[2] and sites[1] is sites[3] and sites[0] is not sites[1]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [50, 4])
def test_half_precision(half: torch.dtype, rows: int) -> None:
    module, ids = _embedding(rows=rows).to(half), _ids(BATCH, 5, rows=rows)
    stored, d = oracle.run(HANDLERS, module, [ids], BATCH)
    assert stored[0][1]["d" if rows == 50 else "g"].dtype == (half if rows == 50 else torch.float32)
    expected = oracle.one_by_one(module, [ids], d, BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), expected, module, total=2e-2)


# Bags -----------------------------------------------------------------------------------------------------------


def _bag(**options: Any) -> nn.EmbeddingBag:
    torch.manual_seed(1)
    return nn.EmbeddingBag(options.pop("rows", 50), 4, **options)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("rows", [50, 5])
def test_bags_of_one_length(mode: str, padding: int | None, rows: int) -> None:
    module = _bag(mode=mode, padding_idx=padding, rows=rows)
    ids = _ids(BATCH, 5, rows=rows)
    ids[2] = 3
    oracle.check(HANDLERS, module, [ids], BATCH)
    stored, d = oracle.run(HANDLERS, module, [ids.repeat_interleave(2, 0)], BATCH)
    assert stored[0][0].form == ("embedding" if rows == 50 else "dense")
    expected = oracle.one_by_one(module, [ids.repeat_interleave(2, 0)], d, BATCH, oracle.folded(2))
    oracle.agree(oracle.cells(stored, module, BATCH), expected, module)


def _bags(offsets: list[int], count: int) -> list[slice]:
    return [slice(a, b) for a, b in zip(offsets, [*offsets[1:], count], strict=True)]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("rows", [50, 5])
@pytest.mark.parametrize("by_name", [False, True])
def test_bags_of_many_lengths(mode: str, last: bool, padding: int | None, rows: int, by_name: bool) -> None:
    """An empty bag in the middle and one at the end; one that holds but padding."""
    module = _bag(mode=mode, include_last_offset=last, padding_idx=padding, rows=rows)
    ids, offsets = _ids(17, rows=rows), [0, 3, 3, 4, 11, 17]
    ids[3] = 3
    given = torch.tensor([*offsets, 17] if last else offsets)
    if by_name:
        stored, d = oracle.run(HANDLERS, module, [ids], BATCH, offsets=given)
    else:
        stored, d = oracle.run(HANDLERS, module, [ids, given], BATCH)
    module_of_one = _bag(mode=mode, padding_idx=padding, rows=rows)
    expected = torch.zeros(BATCH, rows, 4, dtype=torch.float64)
    for sample, bag in enumerate(_bags(offsets, 17)):
        if bag.start < bag.stop:
            one = oracle.one_by_one(module_of_one, [ids[bag].unsqueeze(0)], d[sample : sample + 1], 1)
            expected[sample] = one["weight"][0]
    oracle.agree(oracle.cells(stored, module, BATCH), {"weight": expected}, module)


@pytest.mark.parametrize("ragged", [False, True])
def test_weights_of_the_samples_of_a_bag(ragged: bool) -> None:
    module = _bag(mode="sum", padding_idx=3)
    ids = _ids(BATCH, 5)
    weights = torch.randn(BATCH, 5)
    stored, d = oracle.run(HANDLERS, module, [ids], BATCH, per_sample_weights=weights)
    expected = oracle.one_by_one(module, [ids], d, BATCH, per_sample_weights=weights)
    if ragged:
        offsets = torch.arange(0, 5 * BATCH, 5)
        stored, _ = oracle.run(HANDLERS, module, [ids.flatten(), offsets, weights.flatten()], BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), expected, module)


def test_bags_scaled_by_frequency_are_not_split() -> None:
    with pytest.raises(CannotSplit, match="frequency"):
        oracle.run(HANDLERS, _bag(scale_grad_by_freq=True), [_ids(BATCH, 5)], BATCH)


def test_sparse_bags() -> None:
    oracle.check(HANDLERS, _bag(mode="sum", sparse=True), [_ids(BATCH, 5)], BATCH)


def test_bags_without_ids() -> None:
    stored, _ = oracle.run(HANDLERS, _bag(mode="sum"), [_ids(0), torch.zeros(BATCH, dtype=torch.long)], BATCH)
    assert stored == []


def test_bags_that_do_not_fit_the_batch() -> None:
    with pytest.raises(CannotSplit, match="batch of 6 samples"):
        oracle.run(HANDLERS, _bag(mode="sum"), [_ids(7, 4)], BATCH)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_bags_in_half_precision(half: torch.dtype) -> None:
    module, ids = _bag(mode="mean").to(half), _ids(BATCH, 5)
    stored, d = oracle.run(HANDLERS, module, [ids], BATCH)
    expected = oracle.one_by_one(module, [ids], d, BATCH)
    oracle.agree(oracle.cells(stored, module, BATCH), expected, module, each=2e-2, total=2e-2)
