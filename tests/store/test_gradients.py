"""Per-sample gradients of small networks against single-sample autograd in float64, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiledb
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import Incompatible, NbdynError, NotRecorded, UnknownName
from nbdyn.store import gradient_reader
from nbdyn.store.factors import Block
from nbdyn.store.gradients import Gradients
from nbdyn.store.layout import gradients_schema
from nbdyn.store.sites import Site
from nbdyn.store.written_cells import WrittenCells
from tests import problems

# Small networks, and what a recorder would have kept of them ------------------------------------------------------


class Text(nn.Module):
    """Token ids (B, T): an embedding, a layer at every token, and that layer once more."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inner(self.words(ids)))
        return self.head(torch.tanh(self.inner(x)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].weight = model[0].weight  # two sites of one tensor
    return model


INPUTS = {
    mlp: lambda: torch.randn(12, 6),
    tied: lambda: torch.randn(12, 6),
    image: lambda: torch.randn(12, 1, 5, 5),
    Text: lambda: torch.randint(0, 9, (12, 7)),
}
IDS = [[0, 1, 2, 3], [4, 5, 6, 7], [3, 9, 3, 8], [10, 11, 0, 1], [5, 2, 2, 4], [7, 6, 11]]
"""Samples of each step; steps 2 and 4 have one twice."""


@dataclass
class Made:
    """A trained network: its store, and single-sample contributions (visits, parameters) of each step in float64."""

    store: Any
    reference: list[np.ndarray]
    batch: list[dict[str, torch.Tensor]]


class FakeFactors:
    """What `nbdyn.store.factors.Factors` is, over lists."""

    def __init__(self, sites: list[Site], blocks: list[Block]) -> None:
        self.sites, self._blocks = sites, blocks
        self.batch_only: dict[str, str] = {}
        self.read: list[tuple[int, int]] = []

    @property
    def steps(self) -> np.ndarray:
        return np.unique([b.step[0] for b in self._blocks]).astype(np.int64)

    def sites_of(self, indices: np.ndarray) -> list[int]:
        return [n for n, site in enumerate(self.sites) if np.isin(indices, site.indices()).any()]

    def blocks(
        self,
        site: int,
        start: int,
        stop: int,
        *,
        samples: np.ndarray | None = None,
        columns: dict[str, np.ndarray] | None = None,
        max_bytes: int = 0,
    ) -> Iterator[Block]:
        self.read.append((start, stop))
        kinds: dict[tuple[Any, ...], list[Block]] = {}
        for b in self._blocks:
            if b.site == site and start <= b.step[0] < stop:
                some = b.take(np.isin(b.sample, b.sample if samples is None else samples))
                chosen = {slot: x[..., columns[slot]] if columns else x for slot, x in some.tensors.items()}
                key = (b.call, *(x.shape[1:] for x in chosen.values()))
                kinds.setdefault(key, []).append(replace(some, tensors=chosen))
        for (call, *_), found in kinds.items():
            columns_of = zip(*((b.step, b.position, b.sample, b.factor) for b in found), strict=True)
            tensors = {slot: np.concatenate([b.tensors[slot] for b in found]) for slot in found[0].tensors}
            yield Block(site, call, *(np.concatenate(c) for c in columns_of), tensors)


class FakeStore:
    """What Gradients asks of a `nbdyn.store.Store`."""

    name = "made"

    def __init__(self, config: dict[str, Any], factors: FakeFactors, sizes: list[int], uri: str) -> None:
        self.config, self.factors, self.uri = config, factors, uri
        self.steps_committed, self.sizes = len(sizes), sizes
        self.scale = np.array(sizes, float)

    @property
    def parameters(self) -> int:
        return self.config["parameters"]

    def read_steps(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"scale": self.scale[start:stop], "batch_size": np.array(self.sizes[start:stop])}

    def read_visits(self, start: int, stop: int) -> dict[str, np.ndarray]:
        rows = [(t, p, s) for t in range(start, stop) for p, s in enumerate(IDS[t])]
        return dict(zip(("step", "position", "sample"), np.array(rows).reshape(-1, 3).T, strict=True))

    def open(self, name: str) -> Any:
        return tiledb.open(f"{self.uri}/{name}")


def site_of(name: str, module: Any, firsts: dict[int, int]) -> Site:
    first, shape = firsts[id(module.weight)], tuple(module.weight.shape)
    bias = firsts.get(id(getattr(module, "bias", None)))
    form = {nn.Linear: "linear", nn.Conv2d: "conv", nn.Embedding: "embedding"}[type(module)]
    options: dict[str, Any] = {}
    if form == "conv":
        options = {key: list(getattr(module, key)) for key in ("stride", "padding", "dilation")}
        options |= {"groups": module.groups, "transposed": False}
    return Site(name, name, form, first, shape, bias, options)


def made(kind: Any, uri: str = "/nowhere", batches: int = 1, factor: float = 1.0) -> Made:
    """Train a network by hand for len(IDS) steps; `batches`: in so many parts a step; d is kept as d / factor."""
    torch.manual_seed(0)
    model, inputs, targets = kind(), INPUTS[kind](), torch.arange(12) % 3
    named, first, firsts, tensors = list(model.named_parameters()), 0, {}, []
    for name, p in named:
        firsts[id(p)] = first
        entry = {"name": name, "layer": name.rpartition(".")[0], "shape": list(p.shape), "trainable": True}
        tensors.append(entry | {"first": first, "size": p.numel()})
        first += p.numel()
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))]
    sites = [site_of(n, m, firsts) for n, m in modules]
    optimizer, blocks, reference, batch = torch.optim.SGD(model.parameters(), 0.5), [], [], []
    for step, ids in enumerate(IDS):
        reference.append(by_single_samples(model, inputs[ids], targets[ids]))
        optimizer.zero_grad()
        for positions in np.array_split(np.arange(len(ids)), batches):
            calls: list[tuple[int, Any, torch.Tensor]] = []
            hooks = [m.register_forward_hook(keep(number, calls)) for number, (_, m) in enumerate(modules)]
            out = model(inputs[ids][positions])
            (nn.functional.cross_entropy(out, targets[ids][positions], reduction="sum") / len(ids)).backward()
            for hook in hooks:
                hook.remove()
            seen: dict[int, int] = {}
            for number, x, y in calls:
                call = seen[number] = seen.get(number, -1) + 1
                blocks.append(block_of(sites[number], number, call, step, positions, ids, x, y, factor))
        batch.append({name: p.grad.clone() for name, p in named})  # type: ignore[union-attr]
        optimizer.step()
    capture = {"layers": None, "every": 1, "fraction": 1.0, "project": None}
    config = {"tensors": tensors, "parameters": first, "row_dtype": "f4", "per_sample": capture}
    return Made(FakeStore(config, FakeFactors(sites, blocks), [len(i) for i in IDS], uri), reference, batch)


def keep(number: int, calls: list) -> Any:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        calls.append((number, args[0].detach(), output))

    return hook


def block_of(
    site: Site, number: int, call: int, step: int, positions: np.ndarray, ids: list, x: Any, y: Any, factor: float
) -> Block:
    d, size = y.grad / factor, len(positions)
    if site.form == "linear":
        tensors = {"a": x.reshape(size, -1, x.shape[-1]), "d": d.reshape(size, -1, d.shape[-1])}
    else:
        tensors = {"ids" if site.form == "embedding" else "a": x, "d": d}
    samples = np.array(ids)[positions]
    arrays = {slot: t.numpy() for slot, t in tensors.items()}
    return Block(number, call, np.full(size, step), positions, samples, np.full(size, factor), arrays)


def by_single_samples(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    wide, rows = copy.deepcopy(model).double(), []
    for one, target in zip(x, y, strict=True):
        wide.zero_grad()
        out = wide(one[None].double() if one.is_floating_point() else one[None])
        (nn.functional.cross_entropy(out, target[None]) / len(x)).backward()
        rows.append(torch.cat([p.grad.reshape(-1) for p in wide.parameters()]))  # type: ignore[union-attr]
    return torch.stack(rows).numpy()


def close(found: Any, expected: Any) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0.0) <= 5e-6 * np.abs(expected).max(initial=0.0)


kinds = pytest.mark.parametrize("kind", list(INPUTS))


# Exactness -------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(("batches", "factor"), [(1, 1.0), (2, 1.0), (1, 0.25)])
def test_all_cells_are_those_of_single_samples(kind: Any, batches: int, factor: float) -> None:
    run = made(kind, batches=batches, factor=factor)
    found = Gradients(run.store)[:].dense()
    close(found.values, np.concatenate(run.reference))
    assert found.visits["sample"].tolist() == [s for ids in IDS for s in ids]
    assert found.visits["position"].tolist() == [p for ids in IDS for p in range(len(ids))]
    assert found.parameters.tolist() == list(range(run.store.parameters))
    assert found.values.nbytes == Gradients(run.store)[:].nbytes


@kinds
def test_chosen_steps_parameters_and_samples(kind: Any) -> None:
    run = made(kind)
    gradients, every = Gradients(run.store), np.concatenate(run.reference)
    step = np.repeat(np.arange(len(IDS)), [len(ids) for ids in IDS])
    sample = np.array([s for ids in IDS for s in ids])
    name = run.store.config["tensors"][0]["name"]
    first = run.store.config["tensors"][0]["size"]
    cases = [
        ((2, name, ...), step == 2, np.arange(first)),
        ((-1, 3, ...), step == 5, np.array([3])),
        ((slice(1, 4), [5, 0, 11], ...), (step >= 1) & (step < 4), np.array([5, 0, 11])),
        ((slice(None, None, -2), slice(2, 40, 7), ...), step % 2 == 1, np.arange(2, 40, 7)),
        (([0, 4, -2], f"{name}[1]", slice(2, 6)), np.isin(step, [0, 4]) & (sample >= 2) & (sample < 6), None),
        ((..., slice(-3, None), [3, 0, 3]), np.isin(sample, [0, 3]), np.arange(every.shape[1])[-3:]),
        ((slice(None), 7, 2), sample == 2, np.array([7])),
    ]
    for key, rows, columns in cases:
        cells = gradients[key]
        columns = cells.parameters if columns is None else columns
        found = cells.dense()
        assert found.parameters.tolist() == columns.tolist()
        assert found.visits["step"].tolist() == step[rows].tolist()
        assert np.abs(found.values - every[rows][:, columns]).max() <= 5e-6 * np.abs(every).max()
        assert len(cells.visits) == cells.shape[0] == len(found.values)


@kinds
def test_totals_are_the_batch_gradient(kind: Any) -> None:
    run = made(kind)
    gradients = Gradients(run.store)
    expected = np.stack([rows.sum(0) for rows in run.reference])
    close(gradients[:].total(), expected)
    close(gradients[:].total("all"), expected.sum(0))
    found = gradients[1:5, [4, 2]].total()
    assert np.abs(found - expected[1:5, [4, 2]]).max() <= 5e-6 * np.abs(expected).max()
    close(gradients[2, :, 3].total(), run.reference[2][[0, 2]].sum(0)[None])
    for step in (0, 5):
        rebuilt = gradients.rebuild(step)
        assert list(rebuilt) == [t["name"] for t in run.store.config["tensors"]]
        for name, grad in run.batch[step].items():
            close(rebuilt[name], grad.numpy())


def test_the_rebuilt_gradient_of_linear_layers_is_the_same_bit_for_bit() -> None:
    run = made(mlp)
    for step in range(len(IDS)):
        for name, found in Gradients(run.store).rebuild(step).items():
            assert torch.equal(torch.from_numpy(found), run.batch[step][name])


@kinds
def test_pieces_of_any_size_hold_the_same_cells(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_reader, "READ_BYTES", 3000)
    run = made(kind)
    whole = Gradients(run.store)[:].dense()
    for max_bytes in (10, 1000, 5000):
        found = np.full(whole.values.shape, np.nan)
        for piece in Gradients(run.store)[:].blocks(max_bytes):
            assert piece.values.nbytes <= max(max_bytes, 4 * len(piece.visits))
            steps = piece.visits["step"].unique()
            rows = np.isin(whole.visits["step"], steps)
            assert piece.visits.equals(whole.visits[rows].reset_index(drop=True)), "a piece has whole steps"
            assert np.isnan(found[rows][:, piece.parameters]).all()
            found[np.ix_(rows, piece.parameters)] = piece.values
        close(found, whole.values)


def test_reading_is_bounded_and_leaves_out_what_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_reader, "READ_BYTES", 400)
    run = made(mlp)
    list(Gradients(run.store)[:, "0.weight"].blocks())
    assert run.store.factors.read == [(0, 1), (1, 3), (3, 5), (5, 6)]
    run.store.factors.read.clear()
    Gradients(run.store)[[0, 1, 4], "0.weight"].total()
    assert run.store.factors.read == [(0, 1), (1, 2), (4, 5)]


# Forms of the answer ---------------------------------------------------------------------------------------------


def test_frame_is_tidy_and_leaves_zeros_out() -> None:
    run = made(mlp)
    cells = Gradients(run.store)[1:4, "0.weight[2,:]"]
    full = cells.frame(zeros=True)
    assert list(full.columns) == ["step", "position", "sample", "parameter", "value"]
    assert [str(t) for t in full.dtypes] == ["int64"] * 4 + ["float32"]
    close(full["value"].to_numpy(), np.concatenate([r[:, 12:18] for r in run.reference[1:4]]).reshape(-1))
    assert full["parameter"].tolist() == list(range(12, 18)) * 12
    frame = cells.frame(names=True)
    assert 0 < len(frame) < len(full), "a ReLU leaves zeros"
    pd.testing.assert_frame_equal(frame.iloc[:, :5], full[full["value"] != 0].reset_index(drop=True))
    assert set(frame["tensor"]) == {"0.weight"}
    assert frame["index"].tolist() == [f"0.weight[2,{p - 12}]" for p in frame["parameter"]]
    about = frame.attrs["nbdyn"]
    assert about["what"] == "contributions (their sum is p.grad) of 0.weight[2,:]"
    assert about["source"] == "factors" and about["run"] == "made"


def test_frame_of_a_step_that_comes_in_pieces_is_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(mlp)
    expected = Gradients(run.store)[0:2].frame()
    cells = Gradients(run.store)[0:2]
    monkeypatch.setattr(cells, "_pieces", lambda: type(cells)._pieces(cells, 100))
    found = cells.frame()
    assert (np.diff(found["step"] * 10 + found["position"]) >= 0).all()
    keys = ["step", "position", "parameter"]
    pd.testing.assert_frame_equal(
        found.sort_values(keys, ignore_index=True), expected.sort_values(keys, ignore_index=True)
    )


def test_two_visits_of_a_sample_are_two_rows_and_one_coordinate() -> None:
    run = made(mlp)
    cells = Gradients(run.store)[2, "2.bias"]
    frame = cells.frame()
    assert frame.loc[frame["sample"] == 3, "position"].tolist() == [0, 0, 0, 2, 2, 2]
    coo = cells.coo()
    assert (coo.step == 2).all() and len(coo.step) == 9
    close(coo.value[coo.sample == 3], run.reference[2][[0, 2], -3:].sum(0))
    close(coo.value[coo.sample == 9], run.reference[2][1, -3:])
    assert coo.parameter[coo.sample == 9].tolist() == [50, 51, 52]


def test_own_gradients_are_those_of_the_samples_loss_alone() -> None:
    run = made(mlp)
    cells = Gradients(run.store)[:].own()
    scale = np.repeat([len(ids) for ids in IDS], [len(ids) for ids in IDS])
    expected = np.concatenate(run.reference) * scale[:, None]
    close(cells.dense().values, expected)
    close(cells.total(), np.stack([r.sum(0) * len(r) for r in run.reference]))
    close(cells.total("all"), expected.sum(0))
    assert cells.frame().attrs["nbdyn"]["what"].startswith("own gradients (scale * contribution) of all")
    assert repr(cells).startswith("<own gradients to all: 6 steps, 23 visits x 53 parameters, 4.9 KB dense")
    run.store.scale[3] = np.nan
    with pytest.raises(NotRecorded, match="not known at step 3 of made: its loss function was not"):
        Gradients(run.store)[:].own()
    assert len(Gradients(run.store)[0:3].own().frame())


def test_empty_answers_are_empty() -> None:
    run = made(mlp)
    gradients = Gradients(run.store)
    for cells in (gradients[2:2], gradients[2, "all", 11], gradients[0, []], gradients[1, :, 100:]):
        assert len(cells.frame(names=True)) == len(cells.coo().value) == cells.dense().values.size == 0
        assert list(cells.frame().columns) == ["step", "position", "sample", "parameter", "value"]
        assert cells.nbytes == 0
    assert gradients[2, "all", 11].total().tolist() == [[0.0] * 53]


def test_nan_is_kept() -> None:
    run = made(mlp)
    run.store.factors._blocks[-1].tensors["d"][1] = np.nan
    frame = Gradients(run.store)[5, "2.weight"].frame()
    assert frame["value"].isna().sum() == 15 and set(frame.loc[frame["value"].isna(), "position"]) == {1}


def test_notes_of_a_site_travel_with_the_frame() -> None:
    run = made(mlp)
    run.store.factors.sites[0] = replace(run.store.factors.sites[0], note="batch-coupled")
    assert Gradients(run.store)[0, "0.bias"].frame().attrs["nbdyn"]["note"] == "batch-coupled"
    assert "note" not in Gradients(run.store)[0, "2.bias"].frame().attrs["nbdyn"]


def test_projected_factors_are_said_to_be_approximate() -> None:
    run = made(mlp)
    run.store.factors.sites[0] = replace(run.store.factors.sites[0], options={"project": 2})
    cells = Gradients(run.store)[0, "0.bias"]
    assert cells.frame().attrs["nbdyn"]["note"].startswith("0: approximate (project=2), unbiased")
    assert "0: approximate (project=2), unbiased" in repr(cells)
    with pytest.raises(NotRecorded, match=r"made holds random projections \(project=\) of step 0: that does not make"):
        Gradients(run.store).rebuild(0)


def test_repr_and_completions() -> None:
    run = made(mlp)
    gradients = Gradients(run.store)
    assert repr(gradients).startswith("gradients of made: 6 captured steps x 53 parameters")
    assert repr(gradients["0.weight"]).startswith(
        "<contributions to 0.weight: 6 steps, 23 visits x 30 parameters, 2.8 KB dense"
    )
    assert gradients._ipython_key_completions_() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert gradients.steps.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_recorded_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loss_fn, seen = problems.mlp(12, 8, 4), nn.CrossEntropyLoss(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for x, y in rec.watch(DataLoader(problems.data(), 20, shuffle=True)):
            reference = by_single_samples(model, x, y)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            seen.append((reference, {name: p.grad.clone() for name, p in model.named_parameters()}))
            optimizer.step()
    run = nbdyn.open(rec)
    close(run.gradients[:].dense().values, np.concatenate([reference for reference, _ in seen]))
    for step, (_, grads) in enumerate(seen):
        for name, found in run.gradients.rebuild(step).items():
            assert torch.equal(torch.from_numpy(found), grads[name])
    written = WrittenCells(run.store).read(np.arange(6), np.arange(run.store.parameters), None)
    known = run.gradients[:].coo()
    table = dict(zip(zip(*(c.tolist() for c in known[:3]), strict=True), known.value.tolist(), strict=True))
    assert len(written.step) and written.value.tolist() == [
        table[key] for key in zip(*(c.tolist() for c in written[:3]), strict=True)
    ]


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["frame", "coo", "dense", "total"])
def test_too_large_answers_are_refused_before_they_are_made(method: str) -> None:
    cells = Gradients(made(mlp).store)["0.weight"]
    message = r"would take over 500 B \(max_bytes\): 0.weight has 23 visits x 30 parameters here, 2.8 KB dense. Ask for"
    with pytest.raises(NbdynError, match=message):
        getattr(cells, method)(max_bytes=500)
    with pytest.raises(NbdynError, match="is no size"):
        getattr(cells, method)(max_bytes="many")


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ((1, "0.wieght"), UnknownName, 'did you mean "0.weight"'),
        ((1, 53), Incompatible, "go from 0 to 52; found 53"),
        ((1, "all", 2, 3), Incompatible, r"4 indices: write gradients\[step, parameter, sample\]"),
        ((1.5,), Incompatible, "1.5 is no step: write a whole number"),
        ((1, 2.5), Incompatible, "2.5 is no parameter.*or a selector such as"),
        ((1, "all", "cat"), Incompatible, "'cat' is no sample"),
        ((slice("a", 3),), Incompatible, r"slice\('a', 3, None\) is no slice of steps"),
        ((1, "all", slice(-3, None)), Incompatible, "is no slice of samples: their ids count up from 0"),
        ((6,), NotRecorded, r"made holds steps 0\.\.5, not 6"),
        ((-7,), NotRecorded, r"made holds steps 0\.\.5, not -1"),
        (([0, 9],), NotRecorded, r"made holds steps 0\.\.5, not 9"),
        ((slice(None), [[1, 2]]), Incompatible, "is no parameter"),
    ],
)
def test_wrong_keys_say_what_to_type(key: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Gradients(made(mlp).store)[key]
    with pytest.raises(NbdynError, match='per="step" or per="all"'):
        Gradients(made(mlp).store)[1].total("sample")


def test_steps_that_were_not_captured() -> None:
    run = made(mlp)
    run.store.factors._blocks = [b for b in run.store.factors._blocks if b.step[0] % 3 == 0]
    run.store.config["per_sample"]["every"] = 3
    gradients = Gradients(run.store)
    message = "no per-sample gradients of step 4: they were captured every 3 steps; the nearest captured one is 3."
    with pytest.raises(NotRecorded, match=message):
        gradients[4]
    with pytest.raises(NotRecorded, match="of step 1:"):
        gradients[1:3]
    with pytest.raises(NotRecorded, match="of step 2:"):
        gradients.rebuild(2)
    assert gradients[1:5].steps.tolist() == [3]
    close(gradients[:].total(), np.stack([run.reference[t].sum(0) for t in (0, 3)]))


def test_tensors_recorded_by_batch_only() -> None:
    run = made(mlp)
    run.store.factors.batch_only["0.weight"] = "it saw a tensor of shape [3]"
    gradients = Gradients(run.store)
    for key in ("0.weight[1,2]", "0.*", [0, 52], slice(0, 3)):
        with pytest.raises(NotRecorded, match=r"of 0.weight: it was recorded by batch only: it saw a tensor of shape"):
            gradients[1, key]
    cells = gradients[1]
    assert "without 0.weight: it was recorded by batch only" in repr(cells)
    close(cells.dense().values, run.reference[1][:, 30:])
    assert cells.frame().attrs["nbdyn"]["left_out"].startswith("0.weight: it was recorded by batch only")
    assert list(gradients.rebuild(1)) == ["0.bias", "2.weight", "2.bias"]


def test_layers_left_out_frozen_and_unused() -> None:
    run = made(mlp)
    run.store.factors.sites.pop()
    run.store.factors._blocks = [b for b in run.store.factors._blocks if b.site == 0]
    with pytest.raises(NotRecorded, match=r"of 2.weight \(and 1 more tensors\): no use of it was captured"):
        Gradients(run.store)[0, "2"]
    run.store.config["per_sample"]["layers"] = ["0"]
    with pytest.raises(NotRecorded, match=r"of 2.bias: layers=\['0'\] left it out"):
        Gradients(run.store)[0, "2.bias"]
    run.store.config["tensors"][3]["trainable"] = False
    with pytest.raises(NotRecorded, match=r"of 2.bias: it was not trained"):
        Gradients(run.store)[0, "2.bias"]


def test_runs_without_per_sample_gradients() -> None:
    run = made(mlp)
    run.store.factors = FakeFactors([], [])
    with pytest.raises(NotRecorded, match=r"made holds no per-sample gradients yet \(6 steps are committed\)"):
        Gradients(run.store)[0]
    run.store.config["per_sample"] = None
    with pytest.raises(NotRecorded, match=r"was recorded without per-sample gradients \(per_sample=False"):
        Gradients(run.store).rebuild(0)
    assert repr(Gradients(run.store)) == "gradients of made: none recorded by sample"


def test_a_part_of_the_samples_makes_no_batch_gradient() -> None:
    run = made(mlp)
    run.store.config["per_sample"]["fraction"] = 0.5
    run.store.factors._blocks = [b.take(b.sample % 2 == 0) for b in run.store.factors._blocks]
    run.store.factors._blocks = [b for b in run.store.factors._blocks if len(b.step)]
    with pytest.raises(NotRecorded, match=r"a share of 0.5 of the samples \(fraction=\) of step 0"):
        Gradients(run.store).rebuild(0)
    found = Gradients(run.store)[0].dense()
    close(found.values, run.reference[0][[0, 2]])
    assert found.visits["sample"].tolist() == [0, 2]


# Written-out cells -----------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> Made:
    """A run with factors of steps 0..3, and a few written-out cells of steps 2, 4 and 5."""
    run = made(mlp, str(tmp_path))
    run.store.factors._blocks = [b for b in run.store.factors._blocks if b.step[0] < 4]
    uri = str(tmp_path / "gradients")
    tiledb.Array.create(uri, gradients_schema(tiledb.default_ctx(), 53))
    cells = [(2, 0, 3, 99.0), (4, 1, 5, 1.0), (4, 7, 2, 2.0), (4, 7, 2, 2.5), (4, 7, 4, -3.0), (5, 50, 11, 4.0)]
    step, parameter, sample, value = zip(*cells, strict=True)
    with tiledb.open(uri, "w") as array:
        array[np.array(step), np.array(parameter), np.array(sample)] = np.array(value, np.float32)
    return run


def test_written_out_cells_are_given_where_there_are_no_factors(written: Made) -> None:
    gradients = Gradients(written.store)
    assert gradients.steps.tolist() == [0, 1, 2, 3, 4, 5]
    frame = gradients[4].frame(names=True)
    assert frame.iloc[:, :5].to_numpy().tolist() == [
        [4, 0, 5, 1, 1.0], [4, 1, 2, 7, 2.0], [4, 1, 2, 7, 2.5], [4, 3, 4, 7, -3.0],
    ]  # fmt: skip
    assert frame["index"].tolist() == ["0.weight[0,1]", *["0.weight[1,1]"] * 3]
    assert frame.attrs["nbdyn"]["source"] == "written-out cells only"
    coo = gradients[4:, "0.weight", 2].coo()
    assert (coo.step.tolist(), coo.parameter.tolist(), coo.value.tolist()) == ([4], [7], [4.5])
    assert gradients[4, 7].own().frame()["value"].tolist() == [8.0, 10.0, -12.0]
    with pytest.raises(NotRecorded, match=r"only written-out cells .* so dense\(\) cannot be given"):
        gradients[3:5].dense()
    with pytest.raises(NotRecorded, match=r"so total\(\) cannot be given"):
        gradients[4].total()
    with pytest.raises(NotRecorded, match="zeros=True cannot"):
        gradients[4].frame(zeros=True)
    with pytest.raises(NotRecorded, match="holds only written-out cells of step 4"):
        gradients.rebuild(4)


def test_factors_and_written_out_cells_are_united(written: Made) -> None:
    cells = Gradients(written.store)[2:6, "0.weight"]
    frame = cells.frame()
    computed = frame[frame["step"] < 4]
    expected = np.concatenate([r[:, :30] for r in written.reference[2:4]])
    close(computed["value"].to_numpy(), expected[expected != 0])
    assert 99.0 not in frame["value"].tolist(), "what has factors comes from them"
    assert frame.loc[frame["step"] >= 4, "value"].tolist() == [1.0, 2.0, 2.5, -3.0]
    assert frame.attrs["nbdyn"]["source"] == "factors; elsewhere written-out cells only"
    assert len(cells.coo().value) == len(computed.drop_duplicates(["step", "sample", "parameter"])) + 3


def test_written_out_cells_of_a_tensor_without_factors(written: Made) -> None:
    written.store.factors.batch_only["0.weight"] = "no reason"
    frame = Gradients(written.store)[2, "0.weight"].frame()
    assert frame.to_numpy().tolist() == [[2, 0, 3, 0, 99.0]]
    with pytest.raises(NotRecorded, match=r"of 0.weight: it was recorded by batch only: no reason"):
        Gradients(written.store)[1, "0.weight"]
