"""Events over cells against p.grad as the training loop saw it: explosions, thresholds, what norms decide."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import nbdyn
from nbdyn import datasets
from nbdyn.query import exceeding, execute
from nbdyn.query.explode import raw_norms
from nbdyn.query.source import Source
from tests import networks
from tests.query import brute
from tests.query.brute import Trained

FORCED = (20, 31, 45, 52, 66, 79, 85, 97, 108, 115)
LAYERS = ((0, 780), (780, 910))
"""First parameter and the one after the last of each layer of the network below."""


def digits(count: int) -> TensorDataset:
    images, labels = datasets.digits()
    flat = torch.from_numpy(images[:count].reshape(count, -1)).float()
    return TensorDataset(flat / flat.max(), torch.from_numpy(labels[:count]))


def fit(path: Path, seed: int = 0, rate: float = 0.1, factor: Callable[[int], float] = lambda step: 1.0) -> Trained:
    """Four epochs of thirty steps."""
    torch.manual_seed(seed)
    return brute.train(path, networks.mlp(64, 12, 10), digits(300), nn.CrossEntropyLoss(), epochs=4, factor=factor,
                       optimizer=lambda p: torch.optim.SGD(p, lr=rate))  # fmt: skip


def limits(grads: np.ndarray) -> np.ndarray:
    """The threshold of every step and parameter, from p.grad: 10 x the layer's median RMS over the last 100 steps."""
    most = float(np.finfo(np.float32).max)
    out = np.full(grads.shape, most)
    for first, stop in LAYERS:
        rms = np.sqrt((grads[:, first:stop] ** 2).mean(1))
        rms[~np.isfinite(rms)] = np.finfo(float).max
        for step in range(10, len(grads)):
            median = np.median(rms[max(0, step - 100) : step])
            out[step, first:stop] = 10 * median if median < most / 10 else most
    return out


def share(grads: np.ndarray, limit: np.ndarray | float) -> np.ndarray:
    return (~(np.abs(grads) <= limit)).mean(1)


def edges(truth: np.ndarray) -> list[int]:
    return np.flatnonzero(truth & ~np.concatenate([[False], truth[:-1]])).tolist()


def events(run: Trained, event: str) -> list[int]:
    frame = execute(f"last 5 samples before every {event}", run.store)
    assert (frame["step"] < frame["event_step"]).all()
    return np.unique(frame["event_step"]).tolist()


@pytest.fixture(scope="module")
def exploding(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp("runs") / "exploding"
    return fit(path, rate=1e-3, factor=lambda step: 1000.0 if step in FORCED else 1.0)


def test_an_alarm_at_each_of_ten_forced_explosions(exploding: Trained):
    found = events(exploding, "share(|grad| > explode) > 10%")
    assert found == edges(share(exploding.grads, limits(exploding.grads)) > 0.1)
    assert all(any(0 <= step - forced <= 2 for step in found) for forced in FORCED)
    assert len(found) == len(FORCED)


@pytest.mark.parametrize("seed", range(5))
def test_no_alarm_in_a_healthy_run(tmp_path: Path, seed: int):
    run = fit(tmp_path / "run", seed)
    assert not (share(run.grads, limits(run.grads)) > 0.1).any()
    frame = execute("last 50 samples before every share(|grad| > explode) > 10%", run.store)
    assert frame.empty and "no step in 0..119" in frame.attrs["nbdyn"]["note"]


def test_the_shares_of_every_step(exploding: Trained):
    frame = execute("show share(|grad| > explode) of all per step", exploding.store)
    expected = share(exploding.grads, limits(exploding.grads))
    np.testing.assert_allclose(frame.iloc[:, -1], expected, atol=1.5 / exploding.grads.shape[1])
    frame = execute("show share(|grad| > explode) of 2 per step, unit during steps 15..60", exploding.store)
    beyond = ~(np.abs(exploding.grads) <= limits(exploding.grads))[15:61]
    for unit in range(10):
        places = [*range(780 + 12 * unit, 792 + 12 * unit), 900 + unit]
        got = frame.loc[frame["unit"] == unit].sort_values("step").iloc[:, -1]
        np.testing.assert_allclose(got, beyond[:, places].mean(1), atol=1.01 / 13)


EVENTS = {
    "share(|grad| > 0.05) > 10%": lambda g: share(g, 0.05) > 0.1,
    "share(|grad| > 0.001) <= 40%": lambda g: share(g, 0.001) <= 0.4,
    "share(|grad| > 2) of 0.weight > 1%": lambda g: share(g[:, :768], 2) > 0.01,
    "share(|grad| > 0.05) of 0.weight[3,:] >= 25%": lambda g: share(g[:, 192:256], 0.05) >= 0.25,
    "share(|grad| < 0.001) < 60%": lambda g: (np.abs(g) < 0.001).mean(1) < 0.6,
    "max |grad| > 1": lambda g: np.abs(g).max(1) > 1,
    "max |grad| of 2 < 0.1": lambda g: np.abs(g[:, 780:]).max(1) < 0.1,
    "max grad > 1": lambda g: g.max(1) > 1,
    "norm grad > 2": lambda g: np.linalg.norm(g, axis=1) > 2,
    "sum |grad| >= 20": lambda g: np.abs(g).sum(1) >= 20,
    "mean |grad| of 0.* > 0.01": lambda g: np.abs(g[:, :780]).mean(1) > 0.01,
    "|sum grad| of 0.* > 1": lambda g: np.abs(g[:, :780].sum(1)) > 1,
}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same run with indexes."""
    path = tmp_path_factory.mktemp("runs") / "indexed"
    run = fit(path, rate=1e-3, factor=lambda step: 1000.0 if step in FORCED else 1.0)
    nbdyn.recording.index(str(path))
    return run


@pytest.mark.parametrize("has_index", [False, True], ids=["norms", "index"])
@pytest.mark.parametrize("event", EVENTS)
def test_thresholds(exploding: Trained, indexed: Trained, event: str, has_index: bool):
    run = indexed if has_index else exploding
    expected = edges(EVENTS[event](run.grads))
    found = np.unique(execute(f"last 5 samples before every {event}", run.store)["event_step"]).tolist()
    assert found == [step for step in expected if step > 0]  # nothing comes before step 0


@pytest.mark.parametrize("has_index", [False, True], ids=["norms", "index"])
def test_what_norms_decide_is_what_cells_say(
    exploding: Trained, indexed: Trained, monkeypatch: pytest.MonkeyPatch, has_index: bool
):
    run = indexed if has_index else exploding
    some = [*list(EVENTS)[:: 3 if has_index else 2], "share(|grad| > explode) > 10%"]
    texts = [f"last 5 samples before every {event}" for event in some]
    pruned = [execute(text, run.store) for text in texts]

    def none(plan: exceeding.CellPlan, source: object) -> tuple[np.ndarray, np.ndarray]:
        return np.full(plan.stop - plan.start, -np.inf), np.full(plan.stop - plan.start, np.inf)

    monkeypatch.setattr(exceeding, "_bounds", none)
    for text, frame in zip(texts, pruned, strict=True):
        whole = execute(text, run.store)
        assert whole["event_step"].tolist() == frame["event_step"].tolist(), text
        assert whole["sample"].tolist() == frame["sample"].tolist(), text


def test_a_scope_begins_after_what_was_true_before(exploding: Trained):
    text = "last 5 samples before every share(|grad| > explode) > 10% during steps 31..79"
    assert np.unique(execute(text, exploding.store)["event_step"]).tolist() == [31, 45, 52, 66, 79]
    text = "last 5 samples before share(|grad| > explode) > 10% during steps 32..79"
    assert np.unique(execute(text, exploding.store)["event_step"]).tolist() == [45]


@pytest.mark.parametrize("step", [4, 40])
@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_nan_and_inf_explode_from_the_first_steps_on(tmp_path: Path, step: int, factor: float):
    run = fit(tmp_path / "run", factor=lambda t: factor if t == step else 1.0)
    assert np.isnan(run.weights[-1]).any()
    frame = execute("last 8 samples before every share(|grad| > explode) > 10%", run.store)
    assert np.unique(frame["event_step"]).tolist() == [step]
    shares = execute("show share(|grad| > explode) of all per step", run.store).iloc[:, -1]
    assert (shares[:step] < 0.1).all() and shares[step] > 0.1


def test_the_final_weights_count(tmp_path: Path):
    """w has one value more than there are steps."""
    run = fit(tmp_path / "run")
    largest = np.abs(run.weights).max(1)
    value = float(largest[:-1].max() + largest[-1]) / 2
    frame = execute("show max |w| of all per step", run.store)
    np.testing.assert_allclose(frame.iloc[:, -1], largest, rtol=1e-5)
    assert frame["step"].tolist() == list(range(121))
    found = execute(f"last 5 samples before every max |w| > {value:.6f}", run.store)["event_step"]
    assert np.unique(found).tolist() == [step for step in edges(largest > value) if step > 0]


def _by_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def _by_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


@pytest.mark.parametrize("change", [_by_value, _by_norm])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
def test_norms_of_changed_gradients_decide_nothing_wrong(
    tmp_path: Path, change: Callable[[nn.Module], None], scaled: bool
):
    """What is recorded is the norm of the gradient that the optimizer saw; cells are of what backward left."""
    torch.manual_seed(0)
    model, loss_fn, grads = networks.mlp(64, 12, 10), nn.CrossEntropyLoss(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for _ in range(4):
            for x, y in rec.watch(torch.utils.data.DataLoader(digits(300), 10, shuffle=True)):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=scaled):
                    loss = loss_fn(model(x), y)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                assert all(p.grad is not None for p in model.parameters())
                grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).clone())
                change(model)
                scaler.step(optimizer)
                scaler.update()
    raw, store = torch.stack(grads).double().numpy(), nbdyn.open(tmp_path / "run").store
    every = {
        "max |grad| > {:.6f}": np.abs(raw).max(1),
        "norm grad > {:.6f}": np.sqrt((raw**2).sum(1)),
        "share(|grad| > 0.01) > {:.6f}": (np.abs(raw) > 0.01).mean(1),
    }
    for event, values in every.items():
        ordered = np.sort(values)
        place = int(np.argmax(np.diff(ordered[30:90]))) + 30  # where half precision moves no value across the number
        number = (ordered[place] + ordered[place + 1]) / 2
        found = execute(f"last 5 samples before every {event.format(number)}", store)["event_step"]
        assert np.unique(found).tolist() == [step for step in edges(values > number) if step > 0], event


@pytest.mark.parametrize("options", [{"per_sample": False}, {}], ids=["no samples", "samples"])
def test_norms_of_what_backward_left_do_not_need_samples(tmp_path: Path, options: dict):
    """A GradScaler's scale is known of steps that were not captured, too."""
    model, loss_fn, norms = networks.mlp(64, 12, 10), nn.CrossEntropyLoss(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, **options) as rec:
        for x, y in rec.watch(torch.utils.data.DataLoader(digits(200), 10)):
            optimizer.zero_grad()
            scaler.scale(loss_fn(model(x), y)).backward()
            scaler.unscale_(optimizer)
            norms.append([float(p.grad.norm()) for p in model.parameters() if p.grad is not None])
            _by_norm(model)
            scaler.step(optimizer)
            scaler.update()
    found, replaced = raw_norms(Source(nbdyn.open(tmp_path / "run").store, ""))
    assert replaced.tolist() == [0]  # the first changed gradient of a loop is kept whole
    np.testing.assert_allclose(found[1:], norms[1:], rtol=1e-5)
