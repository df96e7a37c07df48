"""`top`, `group` and `show MEASURE of` on really recorded runs, against plain NumPy over dense cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nbdyn import datasets
from nbdyn.errors import NotRecorded, QueryError
from nbdyn.query import execute
from nbdyn.query.reduce import ranking
from nbdyn.store import Store
from nbdyn.store.attribution import coefficients
from nbdyn.store.gradients import Gradients
from tests import networks
from tests.query import brute
from tests.query.brute import Trained, check


def digits(count: int = 60) -> TensorDataset:
    images, labels = datasets.digits()
    flat = torch.from_numpy(images[:count].reshape(count, -1)).float()
    return TensorDataset(flat / flat.max(), torch.from_numpy(labels[:count]))


def tokens(count: int = 30) -> TensorDataset:
    """Six of eleven tokens a sample, many of them repeated, and the next tokens."""
    rows = torch.randint(0, 11, (count, 7), generator=torch.Generator().manual_seed(5))
    return TensorDataset(rows[:, :-1], rows[:, 1:])


class Conv(nn.Module):
    """Two convolutions and a linear layer on 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 5, 2), nn.Linear(20, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv1(x.view(-1, 1, 8, 8)))
        return self.fc(torch.relu(self.conv2(nn.functional.max_pool2d(x, 2))).flatten(1))


class Sequences(nn.Module):
    """Logits (B * T, tokens) of a network as (B, tokens, T), which the loss takes by sample."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).unflatten(0, x.shape).transpose(1, 2)


def mlp() -> nn.Module:
    return networks.mlp(64, 12, 10)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))


def words() -> TensorDataset:
    rows = torch.randint(0, 20, (40, 5), generator=torch.Generator().manual_seed(1))
    return TensorDataset(rows, torch.arange(40) % 4)


def rows() -> TensorDataset:
    """No classes: the inputs are the targets; a bias away from 0, so that every cell counts."""
    x = digits(30).tensors[0][:, 10:22]
    return TensorDataset(x, x)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


Case = tuple[Callable[[], nn.Module], Callable[[], TensorDataset], dict[str, Any]]
CASES: dict[str, Case] = {
    "mlp": (mlp, digits, {"weights": "every"}),
    "wide": (lambda: networks.mlp(64, 20, 10), lambda: digits(90), {"batch": 15}),
    "momentum": (mlp, digits, {"snapshot_every": 5, "optimizer": momentum}),
    "adam": (mlp, digits, {"snapshot_every": 5, "optimizer": adam}),
    "conv": (Conv, digits, {}),
    "transformer": (lambda: Sequences(networks.Transformer(11, 6, 8, 1, 2)), tokens, {"snapshot_every": 4}),
    "lstm": (lambda: Sequences(networks.CharLSTM(11, 5, 6)), tokens, {}),
    "batch norm": (batch_norm, digits, {}),
    "tied": (networks.TiedAutoencoder, rows, {"loss": nn.MSELoss()}),
    "bag": (lambda: networks.BagOfWords(20, 6, 4), words, {}),
    "fraction": (mlp, digits, {"fraction": 0.5}),
    "every 2": (mlp, digits, {"every": 2, "weights": "every"}),
    "layers": (mlp, digits, {"layers": ["2"], "weights": "every"}),
    "accumulation": (mlp, digits, {"accumulate": 2}),
    "bf16": (mlp, digits, {"autocast": True}),
    "sum": (mlp, digits, {"loss": nn.CrossEntropyLoss(reduction="sum"), "factor": lambda step: 0.1}),
    "NaN": (mlp, digits, {"factor": lambda step: np.nan if step == 14 else 1.0}),
}
UNTOLD = ("transformer", "lstm", "tied")
"""Runs without a class for each visit."""

OF_VISITS = [
    "top 3 samples per weight by sum |g|",
    "top 2 classes per unit by norm g during epoch 1",
    "top 4 samples by |sum g| during steps 3..9",
    "top 30% samples per layer by mean |g| where loss > 1.5",
    "top 5 weights per epoch by max |g|",
    "top 1% weights by sum g at step 4",
    "top 2 samples per class by max g",
    "top 3 units per class by mean g where correct = 0",
    "top 1 batches per weight by max g where sample in (1, 5, 9, 17, 22)",
    "top 2 layers per sample by var g",
    "top 10% weights per layer by var |g| during epoch 1",
    "group weights by sum g into 5",
    "group samples by norm g",
    "show mean |g| of all per class, layer",
    "show share(|g| > 1e-3) of all per sample, unit during epoch 2",
    "show count g of all per step",
    "show |mean g| of all",
]
OF_STEPS = [
    "top 3 weights per layer by sum |grad|",
    "top 2 epochs per weight by max grad",
    "top 10% batches per unit by |sum grad|",
    "top 5 units by norm grad during epoch 1",
    "group weights by sum |grad| into 8 over all",
    "show var grad of all per epoch, weight",
    "show share(|grad| > 1e-3) of all per step, layer",
    "top 2 weights per batch by sum grad",
]
OF_WEIGHTS = [
    "show max |w| of all per step, layer",
    "show var w of all per epoch",
    "top 5 weights per epoch by sum dw",
    "top 5 weights by net dw",
    "top 2 units per epoch by path dw",
    "group weights by path dw during steps 3..9",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A run of CASES by name, trained when it is first asked for."""
    runs: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in runs:
            model, data, options = CASES[name]
            torch.manual_seed(0)
            options = {"loss": nn.CrossEntropyLoss()} | options
            loss = options.pop("loss")
            path = tmp_path_factory.mktemp("runs") / name.replace(" ", "_")
            runs[name] = brute.train(path, model(), data(), loss, **options)
        return runs[name]

    return get


def some(texts: list[str], name: str, every: int) -> list[str]:
    """A part of the statements, another one for the next run; all of them for the first."""
    number = list(CASES).index(name)
    return texts[number % every :: every] if number else texts


def tolerances(name: str) -> dict[str, float]:
    """Under bf16 cells are recomputed in float32; of p.grad rounding decides whether what is 0 in theory is 0."""
    return {"rtol": 2e-2 if name == "bf16" else brute.TIE, "share_atol": 0.05 if name == "bf16" else 3e-3}


@pytest.mark.parametrize("name", CASES)
def test_cells_of_visits(trained: Callable[[str], Trained], name: str):
    run = trained(name)
    cells = brute.own_cells(run.store, 0, run.store.steps_committed)
    for text in some(OF_VISITS, name, 5):
        if "class" not in text or name not in UNTOLD:
            check(run, text, cells, **tolerances(name))


@pytest.mark.parametrize("name", [name for name in CASES if name != "fraction"])
def test_cells_of_batches(trained: Callable[[str], Trained], name: str):
    for text in some(OF_STEPS, name, 4):
        check(trained(name), text, **tolerances(name))


@pytest.mark.parametrize("name", ["mlp", "momentum", "adam", "conv", "transformer", "layers", "every 2"])
def test_weights_and_their_changes(trained: Callable[[str], Trained], name: str):
    for text in some(OF_WEIGHTS, name, 3):
        check(trained(name), text, rtol=1e-4)


def test_a_skipped_step_moves_nothing(tmp_path: Path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)  # pyright: ignore
    torch.manual_seed(0)
    run = brute.train(
        tmp_path / "run", mlp(), digits(), nn.CrossEntropyLoss(), autocast=True, scaler=scaler, weights="every",
        factor=lambda step: np.inf if step == 5 else 1.0,
    )  # fmt: skip
    assert run.store.read_steps(0, 18)["skipped"].nonzero()[0].tolist() == [5]
    for text in OF_WEIGHTS:
        check(run, text, rtol=1e-4)
    frame = execute("show path dw of all per step", run.store)
    assert frame["path dw"][5] == 0 and (frame["path dw"].drop(5) > 0).all()


def test_a_single_sample_alone_by_autograd(trained: Callable[[str], Trained]):
    """Cells from nothing but the weights of each step and torch.autograd in float64."""
    run = trained("mlp")
    model, data = mlp().double(), digits()
    visits = brute.own_cells(run.store, 0, 18)[0]
    values = []
    for step, sample in zip(visits["step"], visits["sample"], strict=True):
        nn.utils.vector_to_parameters(torch.from_numpy(run.weights[step]), model.parameters())
        x, y = data[sample]
        loss = nn.functional.cross_entropy(model(x[None].double()), y[None])
        values.append(brute.flat(torch.autograd.grad(loss, list(model.parameters()))))
    for text in OF_VISITS[::3]:
        check(run, text, (visits, np.array(values)), share_atol=3e-3)


@pytest.mark.parametrize("name", ["mlp", "wide", "conv"])
def test_every_way_to_a_ranking_gives_the_same(
    trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch, name: str
):
    """The threshold algorithm with and without lists of rare columns, products, and tiles of a few targets."""
    run = trained(name)
    cells = brute.own_cells(run.store, 0, run.store.steps_committed)
    texts = [
        f"top {k} samples per weight by {measure} {scope}"
        for measure in ("sum |g|", "sum g", "|sum g|", "max g", "max |g|", "norm g")
        for k, scope in ((3, ""), (70, "during epoch 1"))
    ]
    for settings in ({"MANY": 1}, {"MANY": 1, "RARE": -1}, {"MANY": 10**9}, {"MANY": 10**9, "MATRIX_CELLS": 6000}):
        with monkeypatch.context() as patch:
            for word, value in settings.items():
                patch.setattr(ranking, word, value)
            for text in texts[list(CASES).index(name) :: 4]:
                check(run, text, cells)


@pytest.mark.parametrize("name", ["mlp", "momentum"])
@pytest.mark.parametrize("scope", ["", "during steps 7..11"])
def test_displacements_by_samples_under_sgd(trained: Callable[[str], Trained], name: str, scope: str):
    """The share of a visit is -lr times its contribution, with momentum times a geometric sum."""
    run, rate, keep = trained(name), 0.1, 0.9 if name == "momentum" else 0.0
    start, stop = (7, 12) if scope else (0, 18)
    dense = Gradients(run.store)[:stop, :].dense()
    t = dense.visits["step"].to_numpy()
    first = np.maximum(t, start)
    share = -rate * (keep ** (first - t) - keep ** (stop - t)) / (1 - keep) if keep else -rate * (t >= start)
    visits = brute.own_cells(run.store, 0, stop)[0]
    moved = dense.values * share[:, None]
    for measure in ("net dw", "path dw"):
        text = f"top 4 samples per unit by {measure} {scope}"
        _check_shares(run, text, visits, moved)
    if not (scope and keep):  # what came before the scope, too, is in the buffer
        size = np.abs(moved).sum(0).max()
        np.testing.assert_allclose(moved.sum(0), run.weights[stop] - run.weights[start], atol=2e-6 * size)


@pytest.mark.parametrize("scope", ["", "during steps 7..11"])
def test_displacements_by_samples_under_adam(
    trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch, scope: str
):
    run = trained("adam")
    start, stop = (7, 12) if scope else (0, 18)
    found = coefficients(run.store, np.arange(run.store.parameters), start, stop)
    dense = Gradients(run.store)[found.steps, :].dense()
    moved = dense.values * found.coefficients[dense.visits["step"].to_numpy() - found.steps[0]]
    visits = brute.own_cells(run.store, 0, stop)[0]
    visits = visits.loc[visits["step"].isin(found.steps)].reset_index(drop=True)
    for tiles in (ranking.MATRIX_CELLS, 5000):
        monkeypatch.setattr(ranking, "MATRIX_CELLS", tiles)
        for measure in ("net dw", "path dw"):
            _check_shares(run, f"top 3 samples per weight by {measure} {scope}", visits, moved)
            _check_shares(run, f"top 2 classes per layer by {measure} {scope}", visits, moved)


def _check_shares(run: Trained, text: str, visits: pd.DataFrame, moved: np.ndarray) -> None:
    """Compare with the sums of shares; the scope is that of the displacement, not of the visits."""
    whole = Trained(run.path, run.weights, run.grads)
    frame = execute(text, whole.store)
    as_g = text.replace("net dw", "|sum g|").replace("path dw", "sum |g|").split(" during ")[0]
    table = brute.table_of(whole, as_g, (visits, moved))
    value = str(frame.columns[-1])
    brute.check_lists(frame, value, table, brute.parse(text), brute.TIE * table.scale, text)


def test_a_tensor_without_a_gradient_at_some_steps_has_its_own_coefficients(tmp_path: Path):
    """Momentum moves weights after their gradient, but not at steps at which they have none."""
    torch.manual_seed(0)
    model = mlp()
    first: Any = model[0]  # pyright: ignore[reportIndexIssue]

    def freeze(step: int) -> None:
        first.weight.requires_grad_(step % 3 != 2)

    run = brute.train(tmp_path / "run", model, digits(), nn.CrossEntropyLoss(), optimizer=momentum, before=freeze,
                      weights="every")  # fmt: skip
    found = coefficients(run.store, np.arange(run.store.parameters), 0, 18)
    assert found.coefficients.ndim == 2
    dense = Gradients(run.store)[:, :].dense()
    moved = dense.values * found.coefficients[dense.visits["step"].to_numpy()]
    _check_shares(run, "top 3 samples per unit by path dw", brute.own_cells(run.store, 0, 18)[0], moved)


def test_tokens_and_positions(tmp_path: Path):
    """A cell of a position is the product of its factors alone."""
    torch.manual_seed(0)
    model, layer = Sequences(networks.Transformer(11, 6, 32, 1, 2)), "network.head"
    store = brute.train(tmp_path / "run", model, tokens(), nn.CrossEntropyLoss()).store
    number = next(n for n, site in enumerate(store.factors.sites) if site.name == layer)
    visits = brute.own_cells(store, 0, store.steps_committed)[0]
    for block in store.factors.warm.blocks(number, 0, store.steps_committed):
        a, d = block.tensors["a"].astype(float), block.tensors["d"].astype(float) * block.factor[:, None, None]
        scale = store.read_steps(0, store.steps_committed)["scale"][block.step]
        sizes = np.abs(d).sum(-1) * (np.abs(a).sum(-1) + 1) * scale[:, None]
        assert (block.position == visits["position"]).all()
    table = pd.DataFrame(sizes).groupby(block.sample).sum()  # pyright: ignore
    frame = execute(f"top 12 tokens of {layer} by sum |g|", store)
    expected = table.stack().sort_values(ascending=False).head(12)
    np.testing.assert_allclose(frame["sum |g|"], expected.to_numpy(), rtol=1e-5)
    found = [table.loc[sample, token] for sample, token in zip(frame["sample"], frame["token"], strict=True)]
    np.testing.assert_allclose(found, expected.to_numpy(), rtol=1e-5)
    frame = execute(f"top 6 positions of {layer} by sum |g|", store)
    np.testing.assert_allclose(frame["sum |g|"], table.sum()[frame["token"]], rtol=1e-5)
    assert (np.diff(frame["sum |g|"]) <= 0).all() and len(frame) == 6
    with pytest.raises(NotRecorded, match=r"these are: .*network\.head"):
        execute("top 5 tokens by sum |g|", store)
    with pytest.raises(QueryError, match="ranked by sum, norm, max or count"):
        execute(f"top 5 tokens of {layer} by mean |g|", store)


def test_what_is_left_out_is_said(trained: Callable[[str], Trained]):
    def note(name: str, text: str) -> str:
        return execute(text, trained(name).store).attrs["nbdyn"].get("note", "")

    assert "visits left out" in note("fraction", "top 3 samples by sum |g|")
    assert "9 of 18 steps left out" in note("every 2", "top 3 epochs by sum |grad|")
    assert "780 parameters left out" in note("layers", "top 3 weights by sum |g|")
    assert "NaN" in note("NaN", "show sum g of all per epoch")
    with pytest.raises(NotRecorded, match="all of its samples"):
        execute("top 3 weights by sum |grad|", trained("fraction").store)
    with pytest.raises(NotRecorded, match="no classes"):
        execute("top 3 classes by sum |g|", trained("tied").store)


def test_ties_go_to_the_smaller_sample(tmp_path: Path):
    """Twins: each sample twice in the data, ids n and n + 20, in one batch a step, so that their cells are equal."""
    x, y = digits(20).tensors
    torch.manual_seed(0)
    data = TensorDataset(torch.cat([x, x]), torch.cat([y, y]))
    run = brute.train(tmp_path / "run", mlp(), data, nn.CrossEntropyLoss(), batch=40, epochs=2)
    for text in ("top 7 samples per unit by sum |g|", "top 5 samples per weight by max g", "top 40 samples by norm g"):
        frame = execute(text, Store(str(run.path)))
        keys = [name for name in ("layer", "unit", "parameter") if name in frame]
        value = str(frame.columns[-1])
        for _, part in frame.groupby(keys) if keys else [((), frame)]:
            for _, equal in part.groupby(value):
                assert equal["sample"].is_monotonic_increasing, text
                assert (equal["sample"] < 20).any(), text
