"""A rerun without change is the run itself; with samples left out or reordered it is what a plain loop gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import wilcoxon
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nbdyn
from nbdyn.datasets import digits
from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.recorder.schedule import id_ranges, ids_of_ranges
from tests import problems

LOSS = nn.CrossEntropyLoss()
END = 25


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(nbdyn.options, "quiet", True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)


def _noise(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad += 1e-3 * torch.randn_like(p)


def _record(
    tmp_path: Path, model: nn.Module, optimizer: Any, change: Any = None, loss_fn: Any = LOSS, **options: Any
) -> nbdyn.Run:
    """25 steps in 5 epochs of 120 samples (batches of 25, the last of 20), the learning rate scheduled."""
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=END + 1)
    options = {"snapshot_every": 7, "per_sample": False, **options}
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, **options) as rec:
        for _ in range(5):
            for x, y in rec.watch(DataLoader(problems.data(), 25, shuffle=True)):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                if change is not None:
                    change(model)
                optimizer.step()
                schedule.step()
    return nbdyn.open(tmp_path / "run", model, problems.data())


def _plain(tmp_path: Path, rate: float = 0.1, momentum: float = 0.9, **options: Any) -> nbdyn.Run:
    """A small run of an ordinary MLP."""
    model = problems.mlp(12, 16, 4)
    return _record(tmp_path, model, torch.optim.SGD(model.parameters(), rate, momentum=momentum), **options)


def _by_hand(run: nbdyn.Run, t: int, batches: list[np.ndarray]) -> torch.Tensor:
    """Final weights of a plain loop in float64 with SGD and momentum from weights[t]."""
    x, y = problems.data().tensors
    model = problems.mlp(12, 16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    run.at(t).load_into(model, optimizer)
    buffers = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    model.double()
    slow = [p.detach().clone().requires_grad_() for p in model.parameters()]
    velocity = [torch.zeros_like(p) if b is None else b.double() for p, b in zip(slow, buffers, strict=True)]
    frame = run.steps
    for step, ids in enumerate(batches, start=t):
        if not len(ids):
            continue
        hidden = torch.relu(x[ids].double() @ slow[0].T + slow[1])
        logits = hidden @ slow[2].T + slow[3]
        chosen = torch.log_softmax(logits, 1)[torch.arange(len(ids)), y[ids]]
        gradients = torch.autograd.grad(-chosen.mean(), slow)
        momentum = _momentum(run, step)
        velocity = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
        slow = [(p - frame.loc[step, "lr"] * v).detach().requires_grad_() for p, v in zip(slow, velocity, strict=True)]
    return problems.flat(nn.ParameterList(slow))


def _momentum(run: nbdyn.Run, step: int) -> float:
    """The momentum of a step: OneCycleLR changes it, too."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=END + 1)
    for _ in range(step):
        optimizer.step()
        schedule.step()
    return optimizer.param_groups[0]["momentum"]


def _batches(run: nbdyn.Run, t: int, stop: int) -> list[np.ndarray]:
    visits = run.visits
    return [visits.loc[visits["step"] == step, "sample"].to_numpy(copy=True) for step in range(t, stop)]


# Nothing changed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["every", "snapshots"])
@pytest.mark.parametrize(("t", "until"), [(7, None), (10, 23)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_control_is_the_run_itself_bit_for_bit(
    tmp_path: Path, weights: str, t: int, until: int | None, batch_norm: bool
) -> None:
    model = problems.mlp(12, 16, 8, 4, dropout=0.25, batch_norm=batch_norm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3, nesterov=True)
    run = _record(tmp_path, model, optimizer, _clip, weights=weights)
    untouched, state = problems.flat(model), torch.get_rng_state()
    found = run.at(t).rerun(loss_fn=LOSS, until=until)
    stop = until or END
    expected = run.replay(t, stop, loss_fn=LOSS).weights
    assert found.distance == 0
    assert np.array_equal(found.w_from, expected[0]) and np.array_equal(found.w_rerun, expected[-1])
    new = nbdyn.open(found.uri)
    steps, rows = new.weights.read(np.arange(new.store.parameters))
    assert np.array_equal(rows, expected[steps]) and steps[-1] == stop - t == len(new)
    assert new.steps["loss"].tolist() == run.steps["loss"][t:stop].tolist() == found.losses.tolist()
    assert new.steps["lr"].tolist() == run.steps["lr"][t:stop].tolist()
    assert new.visits["sample"].tolist() == np.concatenate(_batches(run, t, stop)).tolist()
    stored = np.isin(np.arange(t, stop), run.weights.steps)
    assert (found.distances[stored] == 0).all() and np.isnan(found.distances[~stored]).all() and stored.any()
    assert torch.equal(problems.flat(model), untouched) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_a_control_with_the_state_of_other_optimizers(tmp_path: Path, name: str) -> None:
    model = problems.mlp(12, 16, 4)
    run = _record(tmp_path, model, getattr(torch.optim, name)(model.parameters(), 0.01))
    assert run.at(16).rerun(loss_fn=LOSS).distance == 0


def test_a_replaced_gradient_serves_a_control_only(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    run = _record(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1), _noise)
    assert run.at(7).rerun(loss_fn=LOSS).distance == 0
    with pytest.raises(
        NotRecorded, match=r"the gradient of step 7 was replaced before .* So are those of the steps after it"
    ):
        run.at(7).rerun(loss_fn=LOSS, order=0)
    sample = run.visits.query("step == 11")["sample"].iloc[0]
    first = run.visits.query("sample == @sample and step >= 7")["step"].iloc[0]
    with pytest.raises(
        NotRecorded, match=rf"the gradient of step {first} .* To get around it, end before it, until={first}\."
    ):
        run.at(7).rerun(loss_fn=LOSS, without=[sample])


def test_the_first_clipped_step_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    run = _record(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1), _clip)
    with pytest.raises(NotRecorded, match=r"begin after it, run\.at\(1\)\.rerun\(\.\.\.\)\."):
        run.at(0).rerun(loss_fn=LOSS, order=0)
    changed = run.at(1).rerun(loss_fn=LOSS, order=0)
    factors = run.store.read_scalars(0, END)["grad_factor"]
    again = nbdyn.open(changed.uri).store.read_scalars(0, END - 1)["grad_factor"]
    assert np.array_equal(again[~np.isnan(again)], factors[1:][~np.isnan(again)]) and (~np.isnan(again)).sum() > 5


# Samples left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [7, 14])
def test_samples_left_out_as_in_a_plain_loop(tmp_path: Path, t: int) -> None:
    run = _plain(tmp_path)
    ids = pd.Series([3, 50, 77, 77, 119])
    found = run.at(t).rerun(loss_fn=LOSS, without=ids)
    kept = [batch[~np.isin(batch, ids)] for batch in _batches(run, t, END)]
    expected = _by_hand(run, t, kept).numpy()
    assert np.abs(found.w_rerun - expected).max() <= 5e-6 * np.abs(expected).max()
    assert found.distance > 1e-3
    new = nbdyn.open(found.uri)
    assert new.visits["sample"].tolist() == np.concatenate(kept).tolist()
    assert found.left_out.tolist() == [25 - len(b) if s % 5 < 4 else 20 - len(b) for s, b in enumerate(kept, t)]
    assert new.steps["batch_size"].tolist() == [len(batch) for batch in kept]
    assert new.steps["epoch"].tolist() == (run.steps["epoch"][t:] - run.steps["epoch"][t]).tolist()


def test_a_sum_stays_a_sum(tmp_path: Path) -> None:
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    model = problems.mlp(12, 16, 4)
    run = _record(tmp_path, model, torch.optim.SGD(model.parameters(), 1e-3), loss_fn=loss_fn)
    out = run.visits.query("step == 7")["sample"].iloc[:5].tolist()
    found = run.at(7).rerun(loss_fn=loss_fn, without=out, until=8)
    lost = run.visits.query("step == 7 and sample in @out")["loss"].sum()
    assert found.losses[0] == pytest.approx(run.steps["loss"][7] - lost, rel=1e-5)


def test_a_step_whose_batch_becomes_empty_is_not_taken(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    batches = _batches(run, 7, END)
    empty = batches[2]  # step 9, the last of its epoch, of 20 samples
    found = run.at(7).rerun(loss_fn=LOSS, without=empty)
    kept = [batch[~np.isin(batch, empty)] for batch in batches]
    expected = _by_hand(run, 7, kept).numpy()
    assert np.abs(found.w_rerun - expected).max() <= 5e-6 * np.abs(expected).max()
    assert found.notes == ("not taken: 1 of the steps, as all samples of their batch were left out",)
    assert np.isnan(found.losses[2]) and np.isfinite(np.delete(found.losses, 2)).all()
    new = nbdyn.open(found.uri)
    assert len(new) == END - 8 and ids_of_ranges(new.config["rerun"]["omitted"]).tolist() == [9]
    assert found.frame()["n_left_out"][2] == 20
    assert any("not taken: 1 of the steps" in text for text in new.notes["text"])


def test_steps_that_a_scaler_skipped_are_skipped_again(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=2.0**-110)
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, per_sample=False) as rec:
        for x, y in rec.watch(DataLoader(problems.data(), 25)):
            optimizer.zero_grad()
            scaler.scale(loss_fn(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
    run = nbdyn.open(tmp_path / "run", model, problems.data())
    assert run.steps["skipped"].tolist() == [True, False, False, False, False]
    found = run.at(0).rerun(loss_fn=loss_fn)
    assert found.notes == ("not taken: 1 of the steps, which GradScaler skipped in the first run, too",)
    assert found.distance < 5e-6 * np.linalg.norm(found.w)  # the scaler rounds
    assert np.isnan(found.losses[0]) and nbdyn.open(found.uri).visits["sample"].tolist() == list(range(25, 120))


def test_ids_that_do_not_occur(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    found = run.at(21).rerun(loss_fn=LOSS, without=[*_batches(run, 21, 22)[0][:2], 5000])
    assert found.notes == ("not visited in these steps: 1 of the samples in without= (5000)",)
    example = _batches(run, 21, 22)[0][0]
    with pytest.raises(
        NotRecorded, match=rf"no sample of without= \(5000, 5001\) .* 21\.\.24 of run; sample {example} is"
    ):
        run.at(21).rerun(loss_fn=LOSS, without=[5000, 5001, 5001])
    assert run.at(21).rerun(loss_fn=LOSS, without=[]).distance == 0


# Another order ---------------------------------------------------------------------------------------------------


def test_a_seed_permutes_each_epoch(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    found = run.at(7).rerun(loss_fn=LOSS, order=3)
    new = nbdyn.open(found.uri)
    first = run.visits.query("step >= 7")
    assert new.steps["batch_size"].tolist() == run.steps["batch_size"][7:].tolist()
    for epoch in sorted(set(first["epoch"])):
        visits = first[first["epoch"] == epoch]
        ours = new.visits.loc[new.visits["epoch"] == epoch - 1, "sample"]
        assert sorted(ours) == sorted(visits["sample"]) and ours.tolist() != visits["sample"].tolist()
    expected = _by_hand(run, 7, _batches(new, 0, END - 7)).numpy()
    assert np.abs(found.w_rerun - expected).max() <= 5e-6 * np.abs(expected).max()
    assert np.array_equal(run.at(7).rerun(loss_fn=LOSS, order=3).w_rerun, found.w_rerun)
    assert run.at(7).rerun(loss_fn=LOSS, order=4).distance != found.distance


def test_a_given_order_and_samples_left_out_of_it(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    order = np.concatenate(_batches(run, 14, END))[::-1]
    found = run.at(14).rerun(loss_fn=LOSS, order=order, without=order[:2])
    kept = order[~np.isin(order, order[:2])]
    assert nbdyn.open(found.uri).visits["sample"].tolist() == kept.tolist()
    assert found.left_out[0] >= 2 and found.change == "without 2 samples, in a given order"
    assert run.at(14).rerun(loss_fn=LOSS, order=order[::-1]).distance == 0


# What comes back -------------------------------------------------------------------------------------------------


def test_the_frames(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    found = run.at(10).rerun(loss_fn=LOSS, order=1, until=18)
    frame = found.frame()
    assert list(frame) == ["step", "loss", "loss_rerun", "distance", "n_left_out"]
    assert frame["step"].tolist() == list(range(10, 18))
    assert frame["loss"].tolist() == run.steps["loss"][10:18].tolist()
    rows = nbdyn.open(found.uri).steps
    assert frame["loss_rerun"].tolist() == rows["loss"].tolist()
    assert np.flatnonzero(frame["distance"].notna()).tolist() == [4]  # weights[14], which the first run stored
    assert frame.attrs["nbdyn"]["run"] == "run" and frame.attrs["nbdyn"]["rerun"] == found.uri
    replayed = run.replay(10, 18, loss_fn=LOSS).weights.astype(np.float64)
    table = found.weights("0.weight[3,:]")
    places = slice(36, 48)
    assert list(table) == [
        "parameter", "tensor", "w_from", "w", "w_rerun", "moved", "moved_rerun", "difference",
    ]  # fmt: skip
    assert table["parameter"].tolist() == list(range(36, 48)) and set(table["tensor"]) == {"0.weight"}
    final = nbdyn.open(found.uri).weights["all", -1].astype(np.float64)
    assert np.array_equal(table["moved"], (replayed[-1] - replayed[0])[places])
    assert np.array_equal(table["moved_rerun"], (final - replayed[0])[places])
    assert np.array_equal(table["difference"], (final - replayed[-1])[places])
    assert found.distance == pytest.approx(np.linalg.norm(final - replayed[-1]), rel=1e-12)
    assert "steps 10..17, order=1: |w_rerun - w| = " in repr(found)


def test_the_new_run_is_linked_to_the_first(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    found = run.at(7).rerun(loss_fn=LOSS, without=[3, 4, 5, 9], order=2, until=20)
    assert Path(found.uri).name == "run-rerun"
    new = nbdyn.open(found.uri)
    assert new.status == "complete" and new.config["every"] == run.config["every"]
    assert new.config["rerun"] == {
        "of": run.uri, "from_step": 7, "until": 20, "without": 4, "without_ids": "3-5,9", "order": 2, "omitted": "",
    }  # fmt: skip
    assert new.notes["text"].tolist() == ["rerun of steps 7..19 of run, without 4 samples, order=2"]
    note = run.notes.iloc[-1]
    assert note["step"] == 7 and note["text"].endswith(found.uri) and "without 4 samples, order=2" in note["text"]
    assert Path(run.at(7).rerun(loss_fn=LOSS, until=8).uri).name == "run-rerun-2"
    assert Path(run.at(7).rerun(loss_fn=LOSS, until=8, path=tmp_path / "mine").uri).name == "mine"
    again = nbdyn.open(found.uri, run.model, run.data).at(7).rerun(loss_fn=LOSS)  # a rerun can be rerun
    assert again.distance == 0 and nbdyn.open(again.uri).config["rerun"]["of"] == found.uri


def test_single_samples_are_recorded_when_asked(tmp_path: Path) -> None:
    run = _plain(tmp_path, per_sample=True, layers="2", cells=nbdyn.WriteOut(top=3, around="loss > 1"))
    found = run.at(20).rerun(loss_fn=LOSS, per_sample=True)
    new = nbdyn.open(found.uri)
    assert new.config["per_sample"] == run.config["per_sample"]
    assert np.allclose(new.gradients[:, "2.bias"].total(), run.gradients[20:, "2.bias"].total(), atol=1e-7)
    plain = nbdyn.open(run.at(20).rerun(loss_fn=LOSS).uri)
    with pytest.raises(NotRecorded, match="without per-sample gradients"):
        plain.gradients[0]


def test_a_plain_loss_function_and_a_function_of_ids(tmp_path: Path) -> None:
    run = _plain(tmp_path, loss_fn=F.cross_entropy)
    x, y = problems.data().tensors
    found = run.at(7).rerun(run.model, F.cross_entropy, lambda ids: (x[ids], y[ids]))
    new = nbdyn.open(found.uri)
    assert found.distance == 0
    assert new.steps["loss"].tolist() == run.steps["loss"][7:].tolist()
    assert new.visits["loss"].tolist() == run.visits.query("step >= 7")["loss"].tolist()
    assert run.at(7).rerun(run.model, F.cross_entropy, (x, y)).distance == 0


# What cannot be done ---------------------------------------------------------------------------------------------


def test_another_loss_is_noticed(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    found = run.at(7).rerun(loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1))
    assert len(found.notes) == 1 and found.notes[0].startswith("the loss of step 7 is ")
    assert "loss_fn, model, data or loop are not those of the run" in found.notes[0]


def test_another_gradient_is_noticed(tmp_path: Path) -> None:
    """Here the recorded one is ten times that of the loss, as if the loop scaled it."""

    class Tenfold(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 10 * grad

    run = _plain(tmp_path, loss_fn=lambda outputs, targets: LOSS(Tenfold.apply(outputs), targets))
    found = run.at(7).rerun(loss_fn=LOSS)
    assert len(found.notes) == 1 and found.notes[0].startswith("the gradient's norm of step 7 is ")


@pytest.mark.parametrize(
    ("t", "arguments", "kind", "message"),
    [
        (7, {"until": 40}, NotRecorded, r"has steps 0\.\.24; a rerun from step 7 needs until= from 8 to 25, not 40"),
        (7, {"until": 7}, NotRecorded, r"from 8 to 25, not 7"),
        (25, {}, NotRecorded, r"none begins at 25"),
        (7, {"order": [1, 2]}, Incompatible, r"order= holds 2 samples, the steps to rerun 430 visits"),
        (7, {"order": -1}, Incompatible, r"a seed is a whole number from 0"),
        (7, {"order": True}, Incompatible, r"order= is a bool"),
        (7, {"without": [0.5]}, Incompatible, r'without=frame\["sample"\]'),
        (7, {"without": range(120)}, Incompatible, r"every sample that steps 7\.\.24 visit"),
        (24, {"order": [500] * 20}, Incompatible, r"sample 500 is to be visited, and data holds 120 samples, 0\.\.119"),
    ],
)
def test_what_cannot_be_rerun(tmp_path: Path, t: int, arguments: Any, kind: Any, message: str) -> None:
    run = _plain(tmp_path)
    with pytest.raises(kind, match=message):
        run.at(t).rerun(loss_fn=LOSS, **arguments)
    assert not (tmp_path / "run-rerun").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    _plain(tmp_path)
    run = nbdyn.open(tmp_path / "run")
    with pytest.raises(NbdynError, match=r"rerun needs model, loss_fn, data: run\.at\(7\)\.rerun\(model"):
        run.at(7).rerun()
    with pytest.raises(NotRecorded, match=r"not 26"):
        run.at(26)
    with pytest.raises(Incompatible, match=r"0\.weight has shape"):
        run.at(7).rerun(problems.mlp(12, 9, 4), LOSS, problems.data())


def test_steps_that_cannot_be_repeated(tmp_path: Path) -> None:
    x, y = problems.data().tensors
    for name in ("unknown", "accumulated"):
        model = problems.mlp(12, 16, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with nbdyn.record(tmp_path / name, model, optimizer, LOSS, per_sample=False) as rec:
            for _ in range(3):
                optimizer.zero_grad()
                for part in (slice(0, 50), slice(50, 120)) if name == "accumulated" else (slice(0, 120),):
                    if name == "accumulated":
                        rec.batch(ids=np.arange(120)[part])
                    LOSS(model(x[part]), y[part]).backward()
                optimizer.step()
        message = "accumulates 2 batches" if name == "accumulated" else "samples of step 0 are unknown"
        with pytest.raises(NotRecorded, match=message):
            nbdyn.open(tmp_path / name).at(0).rerun(model, LOSS, problems.data(), order=0)


def test_an_error_in_the_loop_leaves_an_interrupted_run(tmp_path: Path) -> None:
    run = _plain(tmp_path)
    x, y = problems.data().tensors
    calls = []

    def fetch(ids: np.ndarray) -> Any:
        calls.append(ids)
        if len(calls) == 4:
            raise RuntimeError("the disk is gone")
        return x[ids], y[ids]

    with pytest.raises(RuntimeError, match="the disk is gone"):
        run.at(7).rerun(loss_fn=LOSS, data=fetch)
    new = nbdyn.open(tmp_path / "run-rerun")
    assert new.status == "interrupted" and len(new) == 2 and len(run.notes) == 0


@pytest.mark.parametrize("ids", [[], [7], [1, 2, 3], [0, 2, 3, 9, 10, 11, 40]])
def test_ids_as_text(ids: list[int]) -> None:
    assert ids_of_ranges(id_ranges(np.array(ids[::-1], np.int64))).tolist() == ids


# Cause, not only association -------------------------------------------------------------------------------------


def test_the_samples_that_moved_a_weight_most_are_a_cause_of_it(tmp_path: Path) -> None:
    """Without the ten samples that moved a weight most, it moves less than without ten random ones."""
    images, labels = digits()
    data = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    t, until, rate = 100, 250, 0.1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with nbdyn.record(tmp_path / "digits", model, optimizer, LOSS, snapshot_every=50) as rec:
        while rec.step < until:
            for x, y in rec.watch(DataLoader(data, 32, shuffle=True)):
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                optimizer.step()
                if rec.step == until:
                    break
    run = nbdyn.open(tmp_path / "digits", model, data)
    before, after = (run.weights["all", step].astype(np.float64) for step in (t, until))
    moved = after - before
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(np.flatnonzero(np.abs(moved) > np.median(np.abs(moved))), 10, replace=False))
    sign = np.sign(moved[chosen])

    cells = run.gradients[t:until, chosen.tolist()].dense()
    samples = cells.visits["sample"].to_numpy()
    pushes = np.zeros((len(data), 10))  # how far each sample moved each weight: plain SGD, so they add up to `moved`
    np.add.at(pushes, samples, -rate * cells.values)
    assert np.abs(pushes.sum(axis=0) - moved[chosen]).max() < 1e-6

    def moves(ids: np.ndarray) -> np.ndarray:
        """How far the ten weights move without some samples, in the direction in which they moved with them."""
        return run.at(t).rerun(loss_fn=LOSS, without=ids).weights("all")["moved_rerun"].to_numpy()[chosen] * sign

    most = np.argsort(-pushes * sign, axis=0, kind="stable")[:10]
    without_most = np.array([moves(most[:, place])[place] for place in range(10)])
    visited = np.unique(samples)
    without_random = np.stack([moves(rng.choice(visited, 10, replace=False)) for _ in range(5)])
    table = pd.DataFrame(
        {"moved": np.abs(moved[chosen]), "most": without_most, "random": without_random.mean(axis=0)}, index=chosen
    )
    print(table)
    assert wilcoxon(table["most"], table["random"], alternative="less").pvalue < 0.01
    assert wilcoxon(table["most"].abs(), table["random"].abs(), alternative="less").pvalue < 0.01
    assert (table["random"] / table["moved"]).between(0.8, 1.2).all()  # ten random ones of 1,797 matter little
