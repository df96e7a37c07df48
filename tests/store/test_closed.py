"""Closed forms against single-sample autograd in float64, and the largest cells against looking at all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from nbdyn.errors import Incompatible
from nbdyn.store import closed, closed_tools, closed_top
from nbdyn.store.factors import Block
from nbdyn.store.sites import Site

FIRST = 7
"""Global index of every site's weight: not 0, so that offsets matter."""


def block(tensors: dict[str, np.ndarray], factor: Any = 1.0, step: Any = 0, position: Any = None) -> Block:
    visits = len(next(iter(tensors.values())))
    position = np.arange(visits) if position is None else position
    return Block(
        0,
        0,
        np.broadcast_to(np.asarray(step, np.int64), (visits,)),
        np.asarray(position, np.int64),
        np.arange(visits) + 500,
        np.broadcast_to(np.asarray(factor, np.float64), (visits,)),
        tensors,
    )


def single_samples(module: nn.Module, inputs: torch.Tensor, d: torch.Tensor) -> np.ndarray:
    """Contributions (V, n) of single samples by autograd in float64: weight, then bias."""
    wide = module.double()
    rows = []
    for x, g in zip(inputs, d.double(), strict=True):
        wide.zero_grad()
        x = x[None].double() if x.is_floating_point() else x[None]
        wide(x).backward(g[None])
        rows.append(torch.cat([p.grad.reshape(-1) for p in wide.parameters() if p.grad is not None]))
    module.float()
    return torch.stack(rows).numpy()


def linear(
    positions: int, bias: bool = True, transposed: bool = False, visits: int = 6
) -> tuple[Site, Block, np.ndarray]:
    torch.manual_seed(positions)
    module = nn.Linear(5, 4, bias=bias)
    a, d = torch.randn(visits, positions, 5), torch.randn(visits, positions, 4)
    reference = single_samples(module, a, d)
    if transposed:
        weight = reference[:, :20].reshape(-1, 4, 5).transpose(0, 2, 1).reshape(-1, 20)
        reference = np.concatenate([weight, reference[:, 20:]], axis=1)
    shape = (5, 4) if transposed else (4, 5)
    site = Site("fc", "fc", "linear", FIRST, shape, FIRST + 30 if bias else None, {"transposed": transposed})
    return site, block({"a": a.numpy(), "d": d.numpy()}), reference


def conv(module: Any, *size: int, visits: int = 4) -> tuple[Site, Block, np.ndarray]:
    torch.manual_seed(0)
    a = torch.randn(visits, module.in_channels, *size)
    d = torch.randn_like(module(a))
    options = {name: list(getattr(module, name)) for name in ("stride", "padding", "dilation")}
    options |= {"groups": module.groups, "transposed": module.transposed}
    bias = None if module.bias is None else FIRST + 5000
    site = Site("conv", "conv", "conv", FIRST, tuple(module.weight.shape), bias, options)
    return site, block({"a": a.numpy(), "d": d.numpy()}), single_samples(module, a, d)


def embedding() -> tuple[Site, Block, np.ndarray]:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 1, 3], [0, -1, 6], [-1, -1, -1], [3, 1, 3]], dtype=torch.int32)
    d = torch.randn(4, 3, 5)
    module = nn.Embedding(9, 5, padding_idx=8)
    reference = single_samples(module, torch.where(ids < 0, 8, ids), d)
    return Site("e", "e", "embedding", FIRST, (9, 5)), block({"ids": ids.numpy(), "d": d.numpy()}), reference


def dense() -> tuple[Site, Block, np.ndarray]:
    g = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    return Site("norm", "norm", "dense", ranges=((40, 4), (FIRST, 5))), block({"g": g}), g.astype(np.float64)


CASES: dict[str, Callable[[], tuple[Site, Block, np.ndarray]]] = {
    "linear": lambda: linear(1),
    "linear without bias": lambda: linear(1, bias=False),
    "linear transposed": lambda: linear(1, transposed=True),
    "linear of sequences": lambda: linear(3),
    "linear of long sequences": lambda: linear(40),
    "linear of sequences, transposed": lambda: linear(3, transposed=True),
    "conv1d": lambda: conv(nn.Conv1d(2, 3, 3), 8),
    "conv2d": lambda: conv(nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), 7, 6),
    "conv2d of groups": lambda: conv(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), 5, 5),
    "conv2d by channel": lambda: conv(nn.Conv2d(4, 8, 3, groups=4), 5, 5),
    "conv3d": lambda: conv(nn.Conv3d(2, 2, 2, stride=2), 4, 4, 5),
    "conv1d transposed": lambda: conv(nn.ConvTranspose1d(3, 2, 4, stride=3, padding=1, output_padding=2), 5),
    "conv2d transposed": lambda: conv(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), 3, 4),
    "conv2d transposed, dilated": lambda: conv(nn.ConvTranspose2d(2, 3, 2, dilation=3, output_padding=2), 3, 3),
    "embedding": embedding,
    "dense": dense,
}
cases = pytest.mark.parametrize("case", list(CASES))


def close(found: np.ndarray, expected: np.ndarray, factor: float = 5e-6) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0.0) <= factor * np.abs(expected).max(initial=0.0)


# Contributions ---------------------------------------------------------------------------------------------------


@cases
def test_dense_is_what_single_samples_give(case: str) -> None:
    site, b, reference = CASES[case]()
    found = closed.dense(site, b)
    assert found.dtype == np.float32
    assert found.nbytes == closed.bytes_dense(site, b)
    close(found, reference)


@cases
def test_total_and_norms_and_moments(case: str) -> None:
    site, b, reference = CASES[case]()
    close(closed.total(site, b), reference.sum(0))
    close(closed.total(site, b, np.float64), reference.sum(0), 1e-12)
    close(closed.norms(site, b), np.square(reference).sum(1))
    found = closed.moments(site, b)
    close(found["sum"], reference.sum(0))
    close(found["sum_abs"], np.abs(reference).sum(0))
    close(found["sum_sq"], np.square(reference).sum(0))


@cases
def test_chosen_cells(case: str) -> None:
    site, b, reference = CASES[case]()
    indices, rng = site.indices(), np.random.default_rng(1)
    row = math.prod(site.shape[1:]) if site.shape else 4
    picks = [
        np.array([0]), np.array([site.size - 1]), np.arange(site.size), np.arange(row), np.arange(row) + row // 2,
        np.arange(0, site.size, row), rng.permutation(site.size), rng.integers(0, site.size, 5), np.array([], int),
    ]  # fmt: skip
    for pick in picks:
        found = closed.cells(site, b, indices[pick])
        assert found.shape == (len(reference), len(pick))
        assert np.abs(found - reference[:, pick]).max(initial=0) <= 5e-6 * np.abs(reference).max()


@cases
def test_each_visit_has_its_factor(case: str) -> None:
    site, b, reference = CASES[case]()
    factor = np.linspace(-2, 3, len(reference))
    scaled = block(b.tensors, factor)
    expected = reference * factor[:, None]
    close(closed.dense(site, scaled), expected)
    close(closed.cells(site, scaled, site.indices()[::3]), expected[:, ::3])
    close(closed.total(site, scaled), expected.sum(0))
    close(closed.norms(site, scaled), np.square(expected).sum(1))
    close(closed.moments(site, scaled)["sum_abs"], np.abs(expected).sum(0))
    row, _, value = closed.top(site, scaled, 1)
    assert abs(abs(value[0]) - np.abs(expected).max()) < 1e-5 or len(value) > 1
    assert len(row)


@cases
def test_double_precision_stays(case: str) -> None:
    site, b, reference = CASES[case]()
    wide = block({slot: x if slot == "ids" else x.astype(np.float64) for slot, x in b.tensors.items()})
    found = closed.dense(site, wide)
    assert found.dtype == np.float64 and found.nbytes == closed.bytes_dense(site, wide)
    close(found, reference, 1e-13)
    close(closed.cells(site, wide, site.indices()[::2]), reference[:, ::2], 1e-13)
    assert closed.top(site, wide, 2)[2].dtype == np.float64


@cases
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_stay_as_they_were(case: str, dtype: Any) -> None:
    site, b, _ = CASES[case]()
    b = block({slot: x if slot == "ids" else x.astype(dtype) for slot, x in b.tensors.items()})
    before = {slot: x.copy() for slot, x in b.tensors.items()}
    made = [closed.dense(site, b), closed.cells(site, b, site.indices()), closed.total(site, b), closed.norms(site, b)]
    made += [*closed.moments(site, b).values(), *closed.top(site, b, 3)]
    made += [closed.cells(site, b, np.arange(first, first + size)) for first, size in site.runs]
    for x in made:
        assert not any(np.shares_memory(x, tensor) for tensor in b.tensors.values())
        x[:] = 0
    assert all(np.array_equal(before[slot], x) for slot, x in b.tensors.items())


@cases
def test_no_visits(case: str) -> None:
    site, b, _ = CASES[case]()
    none = block({slot: x[:0] for slot, x in b.tensors.items()})
    assert closed.dense(site, none).shape == (0, site.size)
    assert closed.cells(site, none, site.indices()[:3]).shape == (0, 3)
    assert not closed.total(site, none).any() and len(closed.total(site, none)) == site.size
    assert not closed.moments(site, none)["sum_abs"].any()
    assert len(closed.norms(site, none)) == len(closed.top(site, none, 4)[0]) == 0


@cases
def test_small_tiles_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site, b, reference = CASES[case]()
    expected = closed.top(site, b, 6)
    monkeypatch.setattr(closed_tools, "TILE_BYTES", 50)
    close(closed.dense(site, b), reference)
    close(closed.cells(site, b, site.indices()[::3]), reference[:, ::3])
    close(closed.cells(site, b, site.indices()[[0, -1, 5]]), reference[:, [0, -1, 5]])
    close(closed.norms(site, b), np.square(reference).sum(1))
    close(closed.moments(site, b)["sum_sq"], np.square(reference).sum(0))
    for found, known in zip(closed.top(site, b, 6), expected, strict=True):
        close(found, known, 1e-6)


def test_scattered_cells_of_a_large_layer_form_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, d = rng.standard_normal((3, 2, 300)).astype(np.float32), rng.standard_normal((3, 2, 200)).astype(np.float32)
    site = Site("fc", "fc", "linear", 0, (200, 300))
    indices = rng.integers(0, 60_000, 50)
    monkeypatch.setattr("nbdyn.store.closed_linear.products", None)
    o, i = np.divmod(indices, 300)
    close(closed.cells(site, block({"a": a, "d": d}), indices), (d[:, :, o] * a[:, :, i]).sum(1))


def test_few_cells_of_a_convolution_go_through_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    site, b, reference = conv(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), 6, 6)
    monkeypatch.setattr("nbdyn.store.closed_conv._weights", None)
    close(closed.cells(site, b, FIRST + np.array([40, 7])), reference[:, [40, 7]])


def test_read_only_factors_and_a_notebook_in_half_precision() -> None:
    site, b, reference = linear(3)
    for x in b.tensors.values():
        x.flags.writeable = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(closed.dense(site, b), reference)
        close(closed.total(site, b), reference.sum(0))


@cases
def test_a_notebook_whose_tensors_are_made_elsewhere(case: str) -> None:
    site, b, reference = CASES[case]()
    with torch.device("meta"):
        close(closed.cells(site, b, site.indices()[[0, -1]]), reference[:, [0, -1]])
        close(closed.dense(site, b), reference)
        close(closed.norms(site, b), np.square(reference).sum(1))
        close(closed.moments(site, b)["sum_sq"], np.square(reference).sum(0))
        agrees(site, b, 5)


def test_cells_of_other_sites_are_refused() -> None:
    site, b, _ = linear(1)
    with pytest.raises(Incompatible, match="1 of these parameters are none of fc's"):
        closed.cells(site, b, np.array([FIRST, 3]))


# Totals are p.grad -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32, 48), (8, 7, 48), (4, 3, 5, 48)])
def test_the_total_of_a_linear_layer_is_its_gradient_bit_for_bit(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(48, 31, bias=bias)
    x = torch.randn(*shape)
    out = module(x)
    d = torch.randn_like(out)
    out.backward(d)
    site = Site("fc", "fc", "linear", 0, (31, 48), 31 * 48 if bias else None)
    tensors = {"a": x.reshape(len(x), -1, 48).numpy(), "d": d.reshape(len(x), -1, 31).numpy()}
    found = torch.from_numpy(closed.total(site, block(tensors)))
    assert torch.equal(found[: 31 * 48].view(31, 48), module.weight.grad)
    assert not bias or torch.equal(found[31 * 48 :], module.bias.grad)


def test_the_total_of_a_transposed_weight_is_its_gradient_bit_for_bit() -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(20, 30)), nn.Parameter(torch.randn(30))
    x, d = torch.randn(16, 20), torch.randn(16, 30)
    torch.addmm(bias, x, weight).backward(d)
    site = Site("c", "c", "linear", 0, (20, 30), 600, {"transposed": True})
    found = torch.from_numpy(closed.total(site, block({"a": x[:, None].numpy(), "d": d[:, None].numpy()})))
    assert torch.equal(found, torch.cat([weight.grad.reshape(-1), bias.grad]))  # type: ignore[union-attr]


@pytest.mark.parametrize("module", [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(3, 8, 3, stride=2)])
def test_the_total_of_a_convolution_is_its_gradient(module: Any) -> None:
    site, b, _ = conv(module, 9, 9)
    module.zero_grad()
    module(torch.from_numpy(b.tensors["a"])).backward(torch.from_numpy(b.tensors["d"]))
    close(closed.total(site, b), torch.cat([p.grad.reshape(-1) for p in module.parameters()]).numpy(), 1e-6)


def test_the_total_of_an_embedding_is_its_gradient_bit_for_bit() -> None:
    torch.manual_seed(0)
    module, ids = nn.Embedding(50, 6, padding_idx=4), torch.randint(0, 50, (30, 9))
    d = torch.randn(30, 9, 6)
    module(ids).backward(d)
    kept = torch.where(ids == 4, -1, ids)
    found = closed.total(Site("e", "e", "embedding", 0, (50, 6)), block({"ids": kept.numpy(), "d": d.numpy()}))
    assert torch.equal(torch.from_numpy(found).view(50, 6), module.weight.grad)


# What cells are not needed for -----------------------------------------------------------------------------------


def test_products_of_absolute_values_are_too_large_where_a_visit_has_several_positions() -> None:
    site, b, reference = linear(40)
    a, d = (b.tensors[slot].reshape(-1, b.tensors[slot].shape[2]) for slot in ("a", "d"))
    shortcut, true = (np.abs(d).T @ np.abs(a)).reshape(-1), np.abs(reference[:, :20]).sum(0)
    assert (shortcut > 2 * true).all()
    close(closed.moments(site, b)["sum_abs"][:20], true)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_beyond_single_precision(scale: float) -> None:
    site, b, reference = linear(1)
    found = closed.moments(site, block({"a": b.tensors["a"], "d": (b.tensors["d"] * scale).astype(np.float32)}))
    close(found["sum_sq"], np.square(reference * scale).sum(0))


def test_nothing_of_a_sample_reaches_the_rows_of_others() -> None:
    site, b, reference = embedding()
    broken = {"ids": b.tensors["ids"], "d": b.tensors["d"].copy()}
    broken["d"][1, 0] = np.nan
    found = closed.dense(site, block(broken))
    assert np.isnan(found[1, :5]).all() and np.isnan(found).sum() == 5
    close(np.nan_to_num(found[[0, 2, 3]]), reference[[0, 2, 3]])


# The largest cells -----------------------------------------------------------------------------------------------


def all_looked_at(site: Site, b: Block, k: int) -> list[tuple[int, int]]:
    """(visit, parameter) of the largest cells of each tensor of each step, by sorting all."""
    values = closed.dense(site, b)
    found = []
    for step in np.unique(b.step):
        column = 0
        for first, size in site.runs:
            cells = [
                (-(np.inf if math.isnan(v) else abs(v)), not math.isnan(v), first + p, b.position[row], row)
                for row in np.nonzero(b.step == step)[0]
                for p, v in enumerate(values[row, column : column + size].tolist())
                if v != 0
            ]
            found += [(int(row), p) for _, _, p, _, row in sorted(cells)[:k]]
            column += size
    return found


def agrees(site: Site, b: Block, k: int) -> None:
    row, parameter, value = closed.top_per_step(site, b, k)
    assert list(zip(row.tolist(), parameter.tolist(), strict=True)) == all_looked_at(site, b, k)
    column = {int(p): c for c, p in enumerate(site.indices())}
    expected = closed.dense(site, b)[row, [column[int(p)] for p in parameter]]
    assert np.array_equal(value, expected, equal_nan=True)


STEPS = np.array([2, 2, 2, 3, 5, 5, 5, 8, 8, 8])
POSITIONS = np.array([0, 1, 2, 0, 2, 0, 1, 4, 5, 9])


def random_sites() -> list[Any]:
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return np.maximum(rng.standard_normal((len(STEPS), *shape)), 0).astype(np.float32)

    options = {"stride": [1], "padding": [1], "dilation": [1], "groups": 1, "transposed": False}
    ids = rng.integers(-1, 6, (len(STEPS), 4))
    return [
        (Site("l", "l", "linear", 3, (5, 4), 40), {"a": normal(1, 4), "d": normal(1, 5)}),
        (Site("t", "t", "linear", 3, (4, 5), 40, {"transposed": True}), {"a": normal(1, 4), "d": normal(1, 5)}),
        (Site("s", "s", "linear", 3, (5, 4), 40), {"a": normal(3, 4), "d": normal(3, 5)}),
        (Site("c", "c", "conv", 3, (3, 2, 3), 40, options), {"a": normal(2, 6), "d": normal(3, 6)}),
        (Site("e", "e", "embedding", 3, (6, 3)), {"ids": ids, "d": normal(4, 3)}),
        (Site("d", "d", "dense", ranges=((9, 4), (3, 3))), {"g": normal(7)}),
    ]


@pytest.mark.parametrize("k", [1, 3, 64])
@pytest.mark.parametrize("site, tensors", random_sites(), ids=lambda x: getattr(x, "name", ""))
def test_top_of_every_step(site: Site, tensors: dict[str, np.ndarray], k: int) -> None:
    b = block(tensors, step=STEPS, position=POSITIONS)
    agrees(site, b, k)
    one = block({slot: x[:3] for slot, x in tensors.items()}, step=2)
    row, parameter, _ = closed.top(site, one, k)
    assert list(zip(row.tolist(), parameter.tolist(), strict=True)) == all_looked_at(site, one, k)


NUMBERS = st.sampled_from([0.0, 0.0, 1.0, -1.0, 2.0, 0.5, 1 / 3, 1e-30, 1e30, math.nan, math.inf, -math.inf])
FINITE = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.1, 0.7, 1 / 3, 1e-30, -1e30])


@given(st.data(), st.sampled_from([NUMBERS, FINITE]), st.sampled_from([1, 2]), st.integers(1, 12), st.booleans())
def test_top_with_ties_zeros_nan_and_infinity(data: Any, numbers: Any, positions: int, k: int, few: bool) -> None:
    a = data.draw(arrays(np.float32, (10, positions, 4), elements=numbers.map(np.float32)))
    d = data.draw(arrays(np.float32, (10, positions, 3), elements=numbers.map(np.float32)))
    with pytest.MonkeyPatch.context() as patch:
        if few:  # all ways through the search
            patch.setattr(closed_top, "MOST_CANDIDATES", 5)
            patch.setattr(closed_top, "FIRST_TILE", 1)
        agrees(Site("l", "l", "linear", 3, (3, 4), 40), block({"a": a, "d": d}, step=STEPS, position=POSITIONS), k)


@given(arrays(np.float32, (10, 7), elements=NUMBERS.map(np.float32)), st.integers(1, 9))
def test_top_of_stored_contributions(g: np.ndarray, k: int) -> None:
    agrees(Site("d", "d", "dense", ranges=((9, 4), (3, 3))), block({"g": g}, step=STEPS, position=POSITIONS), k)


def test_top_of_a_wide_layer_forms_few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, d = (np.maximum(rng.standard_normal((60, 1, n)), 0).astype(np.float32) for n in (90, 70))
    site, b = Site("l", "l", "linear", 0, (70, 90), 6300), block({"a": a, "d": d}, step=np.repeat([0, 1, 2], 20))
    formed: list[int] = []
    pairs = closed_top._pairs
    monkeypatch.setattr(closed_top, "_pairs", lambda *x: formed.append(len((found := pairs(*x))[0])) or found)
    agrees(site, b, 64)
    assert 3 * 64 <= sum(formed) < a.size * d.size // 60 // 20


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_top_where_all_cells_are_alike(value: float) -> None:
    site = Site("l", "l", "linear", 0, (300, 400), 200_000)
    b = block({"a": np.full((50, 1, 400), value, np.float32), "d": np.full((50, 1, 300), value, np.float32)})
    row, parameter, values = closed.top(site, b, 64)
    if value == 0.0:
        assert len(row) == 0
        return
    expected = [(p, s) for p in (0, 1) for s in range(50)][:64] + [(200_000 + p, s) for p in (0, 1) for s in range(50)][
        :64
    ]
    assert list(zip(parameter.tolist(), row.tolist(), strict=True)) == expected
    assert np.array_equal(values, np.full(128, value), equal_nan=True)
