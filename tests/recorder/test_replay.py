"""Replay from a snapshot gives the next one bit for bit; where it cannot, it says so."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from tests import problems

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
}


def _clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)


def _clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def _noise(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad += 1e-3 * torch.randn_like(p)


def _train(
    tmp_path: Path,
    model: nn.Module,
    optimizer: Any,
    change: Any = None,
    epochs: int = 5,
    clear: bool = True,
    **options: Any,
) -> tuple[nbdyn.Run, list[torch.Tensor]]:
    loss_fn = nn.CrossEntropyLoss()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5 * epochs + 1)
    weights = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, **{"snapshot_every": 7, **options}) as rec:
        for _ in range(epochs):
            for x, y in rec.watch(DataLoader(problems.data(), 25, shuffle=True)):
                weights.append(problems.flat(model))
                optimizer.zero_grad(set_to_none=clear)
                loss_fn(model(x), y).backward()
                if change is not None:
                    change(model)
                optimizer.step()
                schedule.step()
    return nbdyn.open(tmp_path / "run"), [*weights, problems.flat(model)]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("change", [None, _clip_norm, _clip_value, _noise])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_is_exact(tmp_path: Path, name: str, change: Any, clear: bool) -> None:
    model = problems.mlp(12, 16, 8, 4, dropout=0.25)
    run, weights = _train(tmp_path, model, OPTIMIZERS[name](model.parameters()), change, clear=clear)
    untouched = problems.flat(model)
    state = torch.get_rng_state()
    replay = run.replay(7, 25, model, nn.CrossEntropyLoss(), problems.data())
    assert replay.exact, replay
    assert sorted(replay.residuals) == [14, 21, 25]
    assert np.array_equal(replay.weights, torch.stack(weights[7:26]).numpy())
    assert torch.equal(problems.flat(model), untouched) and torch.equal(torch.get_rng_state(), state)


def test_clipping_by_norm_is_kept_as_one_number_a_step(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    run, _ = _train(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1), _clip_norm)
    factors = run.store.read_scalars(0, len(run))["grad_factor"]
    with run.store.open("state") as array:
        gradients = array.multi_index[:, 2]["step"]
    # The first changed gradient comes before raw copies are kept; the others are a factor below 1, or were short.
    assert gradients.tolist() == [0]
    assert np.isnan(factors[0]) and (~np.isnan(factors)).sum() > 5
    assert (factors[~np.isnan(factors)] < 1).all()


def _train_scaled(path: Path, change: Any, **options: Any) -> tuple[nbdyn.Run, nn.Module, list[torch.Tensor]]:
    """A GradScaler whose scale, a power of two, doubles every 4 steps, and float32: nothing rounds."""
    model, loss_fn = problems.mlp(12, 16, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4)
    weights = []
    with nbdyn.record(path / "run", model, optimizer, loss_fn, snapshot_every=7, **options) as rec:
        for epoch in range(5):
            for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 25, shuffle=True))):
                weights.append(problems.flat(model))
                optimizer.zero_grad()
                loss = loss_fn(model(x), y) * (float("inf") if (epoch, number) == (2, 1) else 1.0)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if change is not None:
                    change(model)
                scaler.step(optimizer)
                scaler.update()
    return nbdyn.open(path / "run"), model, [*weights, problems.flat(model)]


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("change", [None, _clip_norm, _clip_value])
def test_replay_of_a_loop_with_a_scaler_is_exact(tmp_path: Path, change: Any, per_sample: bool) -> None:
    """The recorded factor holds 1 / scale, which a replay without a scaler must not multiply by."""
    run, model, weights = _train_scaled(tmp_path, change, per_sample=per_sample)
    assert run.steps["skipped"].to_numpy().nonzero()[0].tolist() == [11]
    replay = run.replay(7, 25, model, nn.CrossEntropyLoss(), problems.data())
    assert replay.exact, replay
    assert np.array_equal(replay.weights, torch.stack(weights[7:26]).numpy())
    if change is _clip_norm:
        scalars = run.store.read_scalars(0, 25)
        known = ~np.isnan(scalars["grad_factor"])
        assert known.sum() > 15 and np.array_equal(known, ~np.isnan(scalars["loss_scale"]))
        clipped = (scalars["grad_factor"] * scalars["loss_scale"])[known]
        assert set(scalars["loss_scale"][known]) >= {2.0**8, 2.0**9, 2.0**10}
        assert (clipped <= 1).all() and (clipped > 0.05).all()


def test_replay_of_an_older_run_takes_the_scale_from_its_captures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model, _ = _train_scaled(tmp_path, _clip_norm)
    monkeypatch.setattr("nbdyn.store.seen_gradients.LOSS_SCALE", "not recorded then")
    assert run.replay(7, 25, model, nn.CrossEntropyLoss(), problems.data()).exact


def test_a_rerun_of_a_clipped_loop_with_a_scaler(tmp_path: Path) -> None:
    run, model, weights = _train_scaled(tmp_path, _clip_norm, per_sample=False)
    found = nbdyn.open(run.uri, model, problems.data()).at(13).rerun(loss_fn=nn.CrossEntropyLoss())
    assert found.notes == () and found.distance == 0.0
    assert np.array_equal(found.w_rerun, weights[-1].numpy())


def test_batch_norm_replays_with_its_buffers(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4, batch_norm=True)
    run, weights = _train(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    replay = run.replay(0, 25, model, nn.CrossEntropyLoss(), problems.data().tensors)
    assert replay.exact and np.array_equal(replay.weights[-1], weights[-1].numpy())


def test_from_a_step_between_snapshots_and_for_some_parameters(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    run, weights = _train(tmp_path, model, torch.optim.Adam(model.parameters(), 0.01))
    replay = run.replay(10, 12, model, nn.CrossEntropyLoss(), problems.data(), of="0.weight[3,5]")
    assert replay.steps.tolist() == [10, 11, 12]
    assert replay.weights[:, 0].tolist() == [float(weights[t][3 * 12 + 5]) for t in (10, 11, 12)]
    assert not replay.exact  # no recorded row was met, so nothing was checked
    assert "nothing to check against" in repr(replay)


def test_a_wrong_loss_shows_in_the_residual(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    run, _ = _train(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1))
    replay = run.replay(0, 7, model, nn.CrossEntropyLoss(label_smoothing=0.1), problems.data())
    assert not replay.exact and replay.residuals[7] > 1e-4
    assert float(replay.frame().attrs["nbdyn"]["residual"]) > 1e-4


def test_a_function_of_ids_can_stand_for_the_data(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    run, _ = _train(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1))
    x, y = problems.data().tensors
    assert run.replay(0, 7, model, nn.CrossEntropyLoss(), lambda ids: (x[ids], y[ids])).exact


def test_the_model_and_data_of_open_are_used(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    _train(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1))
    run = nbdyn.open(tmp_path / "run", model, problems.data())
    assert run.replay(0, 7, loss_fn=nn.CrossEntropyLoss()).exact
    with pytest.raises(NbdynError, match="replay needs loss_fn"):
        run.replay(0, 7)


def test_an_optimizer_that_torch_does_not_have(tmp_path: Path) -> None:
    class Mine(torch.optim.SGD):
        pass

    model = problems.mlp(12, 16, 4)
    run, _ = _train(tmp_path, model, Mine(model.parameters(), 0.1, momentum=0.9))
    with pytest.raises(Incompatible, match=r"the run used Mine, which torch\.optim does not have"):
        run.replay(0, 7, model, nn.CrossEntropyLoss(), problems.data())
    assert run.replay(0, 7, model, nn.CrossEntropyLoss(), problems.data(), optimizer=Mine).exact


def test_steps_that_were_not_recorded(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    run, _ = _train(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(NotRecorded, match=r"has steps 0\.\.25; 20\.\.40 is not among them"):
        run.replay(20, 40, model, nn.CrossEntropyLoss(), problems.data())


def test_generators_are_recorded_at_snapshots(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    random.seed(3)
    np.random.seed(4)
    expected = random.getstate(), np.random.get_state()
    run, _ = _train(tmp_path, model, optimizer)
    random.seed(99)
    np.random.seed(99)
    run.at(0).load_into(model, optimizer)
    assert random.getstate() == expected[0]
    assert np.array_equal(np.random.get_state()[1], expected[1][1])
