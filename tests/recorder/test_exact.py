"""What is recorded is what happened: weights bit for bit, losses, norms, learning rates, logs."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import nbdyn
from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.recorder.losses import Evaluator
from tests import problems


def _run(tmp_path: Path, model: nn.Module, optimizer: Any, loss_fn: Any, epochs: int = 3, **options: Any) -> tuple:
    rec = nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, **options)
    loader = DataLoader(problems.data(), 25, shuffle=True)
    seen = problems.train(rec, model, optimizer, loss_fn, loader, epochs)
    rec.close()
    return nbdyn.open(rec), seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 4, None])
def test_weights_equal_clones_bit_for_bit(tmp_path: Path, dtype: torch.dtype, every: int | None) -> None:
    model = problems.mlp(12, 8, 4).to(dtype)
    data = problems.data().tensors[0].to(dtype), problems.data().tensors[1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    options = {"weights": "every"} if every is None else {"snapshot_every": every}
    rec = nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, **options)
    clones = []
    for step in range(70):
        rec.batch(ids=range(step, step + 20))
        clones.append(problems.flat(model))
        optimizer.zero_grad()
        loss_fn(model(data[0][step : step + 20]), data[1][step : step + 20]).backward()
        optimizer.step()
    rec.close()
    clones.append(problems.flat(model))
    run = nbdyn.open(rec)
    expected = sorted({*range(0, 70, every or 1), 70})
    assert run.weights.steps.tolist() == expected
    stored = run.weights["all"]
    for row, step in enumerate(expected):
        assert np.array_equal(stored[row], clones[step].to(torch.float64).numpy().astype(stored.dtype)), step
    assert np.array_equal(run.weights["0.weight", expected[-1]].reshape(-1), stored[-1][:96])
    assert np.array_equal(run.weights["2.bias[1]"], stored[:, 8 * 12 + 8 + 32 + 1])


def test_losses_norms_and_rates_equal_what_the_loop_saw(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    head = [{"params": list(model[2].parameters()), "lr": 0.2}]
    optimizer = torch.optim.SGD([{"params": list(model[0].parameters())}, *head], 0.1, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loss_fn = nn.CrossEntropyLoss()
    seen = []
    rec = nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, snapshot_every=2)
    for x, y in rec.watch(DataLoader(problems.data(), 25, shuffle=True)):
        before = problems.flat(model)
        optimizer.zero_grad()
        outputs = model(x)
        loss = loss_fn(outputs, y)
        loss.backward()
        norms = [float(p.grad.norm()) for p in model.parameters()]
        each = functional.cross_entropy(outputs.detach(), y, reduction="none")
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        ratio = float((problems.flat(model) - before).norm() / before.norm())
        seen.append((loss.item(), each.numpy(), (outputs.argmax(1) == y).numpy(), norms, rates, ratio))
        schedule.step()
    rec.close()
    run = nbdyn.open(rec)
    steps, visits, norms = run.steps, run.visits, run.norms
    for t, (loss, each, right, grad_norms, rates, ratio) in enumerate(seen):
        rows = visits[visits["step"] == t]
        assert steps["loss"][t] == loss
        assert np.array_equal(rows["loss"], each)
        assert np.array_equal(rows["correct"], right)
        assert steps["accuracy"][t] == right.mean()
        np.testing.assert_allclose(norms[norms["step"] == t]["grad_norm"], grad_norms, rtol=1e-6)
        np.testing.assert_allclose(steps["grad_norm"][t], np.linalg.norm(grad_norms), rtol=1e-6)
        assert [steps["lr"][t], steps["lr_1"][t]] == rates
        if t % 2 == 0:
            np.testing.assert_allclose(steps["update_ratio"][t], ratio, rtol=1e-5)
        else:
            assert np.isnan(steps["update_ratio"][t])


@pytest.mark.parametrize(
    ("loss_fn", "reference"),
    [
        (nn.CrossEntropyLoss(), lambda e: e.mean()),
        (nn.CrossEntropyLoss(reduction="sum"), lambda e: e.sum()),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0])), None),
        (nn.CrossEntropyLoss(ignore_index=2), None),
        (nn.CrossEntropyLoss(label_smoothing=0.1), lambda e: e.mean()),
        (functional.cross_entropy, lambda e: e.mean()),
    ],
)
def test_per_sample_losses_add_up_to_the_loss(tmp_path: Path, loss_fn: Any, reference: Any) -> None:
    model = problems.mlp(12, 8, 4)
    run, seen = _run(tmp_path, model, torch.optim.SGD(model.parameters(), 0.05), loss_fn, epochs=1)
    rows = run.store.read_steps(0, len(run))
    for t, (_, _, _, loss) in enumerate(seen):
        each = run.visits.query(f"step == {t}")["loss"].to_numpy().astype(np.float64)
        assert run.steps["loss"][t] == float(loss)
        np.testing.assert_allclose(each.sum() / rows["scale"][t], float(loss), rtol=1e-6)
        if reference is not None:
            np.testing.assert_allclose(reference(each), float(loss), rtol=1e-6)


WEIGHT = torch.tensor([1.0, 0.2, 3.0, 0.5])


@pytest.mark.parametrize(
    ("loss_fn", "ignored", "options"),
    [
        (functional.cross_entropy, -100, {}),
        (partial(functional.cross_entropy, ignore_index=2), 2, {"ignore_index": 2}),
        (partial(functional.cross_entropy, weight=WEIGHT), -100, {"weight": WEIGHT}),
        (partial(partial(functional.cross_entropy, weight=WEIGHT), ignore_index=255), 255, {"weight": WEIGHT}),
        (nn.CrossEntropyLoss(WEIGHT, ignore_index=255), 255, {"weight": WEIGHT}),
        (partial(functional.cross_entropy, reduction="sum"), -100, {}),
        (lambda x, y, reduction="sum": functional.cross_entropy(x, y, reduction=reduction), -100, {}),
        (partial(functional.cross_entropy, label_smoothing=0.3), -100, {"label_smoothing": 0.3}),
    ],
)
def test_own_gradients_are_autograds_on_single_samples(
    tmp_path: Path, loss_fn: Any, ignored: int, options: dict[str, Any]
) -> None:
    """Of losses with targets that they leave out: a functional one has ignore_index=-100 unless told otherwise."""
    x, y = problems.data().tensors
    y = torch.where(torch.arange(len(y)) % 3 == 0, ignored, y)
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        seen = problems.train(rec, model, optimizer, loss_fn, DataLoader(TensorDataset(x, y), 25, shuffle=True), 1)
    run = nbdyn.open(rec)
    scales = run.store.read_steps(0, len(run))["scale"]
    for t, (before, inputs, targets, loss) in enumerate(seen):
        nn.utils.vector_to_parameters(before, model.parameters())
        each = run.visits.query(f"step == {t}")["loss"].to_numpy().astype(np.float64)
        np.testing.assert_allclose(each.sum() / scales[t], float(loss), rtol=1e-6)
        own = run.gradients[t].own().dense().values
        for cells, sample, target in zip(own, inputs, targets, strict=True):
            alone = {"ignore_index": ignored, **options}
            value = functional.cross_entropy(model(sample[None]), target[None], reduction="sum", **alone)
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(model.parameters()))])
            np.testing.assert_allclose(cells, gradient, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize(
    "loss_fn", [lambda r: nn.KLDivLoss(reduction=r), lambda r: partial(functional.kl_div, reduction=r)]
)
def test_losses_of_distributions_add_up(loss_fn: Any, reduction: str) -> None:
    outputs, targets = torch.rand(5, 3).log_softmax(1), torch.rand(5, 3).softmax(1)
    found = Evaluator(loss_fn(reduction))(outputs, targets, 5)
    assert found.losses is not None and (found.shares is None) == (reduction == "sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends batchmean
        loss = loss_fn(reduction)(outputs, targets)
    torch.testing.assert_close(found.losses.sum() / (1 if found.shares is None else 5), loss)


def test_regression_has_losses_and_no_accuracy(tmp_path: Path) -> None:
    x = problems.data().tensors[0]
    model = problems.mlp(12, 8, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.MSELoss()
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for (batch,) in rec.watch(DataLoader(torch.utils.data.TensorDataset(x), 30)):
            optimizer.zero_grad()
            outputs = model(batch)
            loss_fn(outputs, batch[:, :3]).backward()
            expected = ((outputs - batch[:, :3]) ** 2).mean(1).detach()
            optimizer.step()
    run = nbdyn.open(tmp_path / "run")
    assert run.steps["accuracy"].isna().all()
    np.testing.assert_allclose(run.visits["loss"][-30:], expected, rtol=1e-6)


def test_a_validation_pass_leaves_no_trace(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    x, y = problems.data().tensors
    losses = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for inputs, targets in rec.watch(DataLoader(problems.data(), 30)):
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            loss_fn(model(x), y)  # with gradients enabled, after the step
    assert nbdyn.open(tmp_path / "run").steps["loss"].tolist() == losses


def test_logs_belong_to_the_batch_that_went_out_last(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for epoch in range(2):
            for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 40))):
                rec.log(before=number)
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
                rec.log(after=torch.tensor(10.0 * number))
            rec.log(epoch_end=epoch)
    steps = nbdyn.open(tmp_path / "run").steps
    assert steps["before"].tolist() == [0, 1, 2, 0, 1, 2]
    assert steps["after"].tolist() == [0, 10, 20, 0, 10, 20]
    np.testing.assert_array_equal(steps["epoch_end"], [np.nan, np.nan, 0, np.nan, np.nan, 1])


def test_standard_names_cannot_be_logged(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with nbdyn.record(tmp_path / "run", model, optimizer) as rec:
        with pytest.raises(NbdynError, match='"lr" is recorded already; log it under another name, such as "my_lr"'):
            rec.log(lr=3)
        with pytest.raises(NbdynError, match='"lr_1" is recorded already'):
            rec.log(lr_1=3)
        rec.batch(ids=[0])
        model(torch.rand(1, 12)).sum().backward()
        optimizer.step()
        rec.log(loss=0.5)
    assert nbdyn.open(tmp_path / "run").steps["loss"].tolist() == [0.5]


def test_samples_count_learning_and_forgetting(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    loss_fn = nn.CrossEntropyLoss()
    x, y = torch.eye(2), torch.tensor([0, 1])
    right = {0: [0, 1, 0, 1, 0], 1: [0, 0, 0, 0, 0]}
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for t in range(5):
            for sample in (0, 1):
                with torch.no_grad():  # columns of the weight decide each sample's class alone
                    sign = 1.0 if right[sample][t] == (1 - sample) else -1.0
                    model.weight[:, sample] = torch.tensor([sign, -sign])
            rec.batch(ids=[0, 1], epoch=t)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    samples = nbdyn.open(tmp_path / "run").samples.set_index("sample")
    correct = nbdyn.open(tmp_path / "run").visits.pivot(index="step", columns="sample", values="correct")
    assert correct[0].tolist() == [0, 1, 0, 1, 0]
    assert samples["times_seen"].tolist() == [5, 5]
    assert samples.loc[0, "first_learned"] == 1 and samples.loc[0, "forgotten"] == 2
    flips = (correct[1].diff() < 0).sum()
    assert samples.loc[1, "forgotten"] == flips


def test_buffers_are_those_before_the_forward_pass(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4, batch_norm=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    means = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, weights="every") as rec:
        for _ in range(3):
            for x, y in rec.watch(DataLoader(problems.data(), 30)):
                means.append({k: v.clone() for k, v in model.state_dict().items()})
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
    means.append(model.state_dict())
    run = nbdyn.open(tmp_path / "run")
    for step in (0, 5, 11, 12, -1):
        other = problems.mlp(12, 8, 4, batch_norm=True, seed=9)
        run.at(step).load_into(other)
        for name, value in means[step].items():
            assert torch.equal(other.state_dict()[name], value), (step, name)


def test_only_recorded_steps_can_be_loaded(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    run, _ = _run(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), snapshot_every=4)
    with pytest.raises(NotRecorded, match=r"snapshots every 4 steps, not weights\[6\]; the nearest is weights\[4\]"):
        run.at(6).load_into(model)
    with pytest.raises(Incompatible, match=r"0\.weight has shape \[9, 12\], not \[8, 12\]"):
        run.at(4).load_into(problems.mlp(12, 9, 4))


def test_what_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], 0.1)
    with pytest.raises(Incompatible, match=r"updates 2 tensors that the model does not list.*ModuleList"):
        nbdyn.record(tmp_path / "run", model, optimizer)
    with pytest.raises(Incompatible, match="has no parameters"):
        nbdyn.record(tmp_path / "run", nn.ReLU(), optimizer)
    assert not (tmp_path / "run").exists()


def test_training_is_the_same_with_and_without_the_recorder(tmp_path: Path) -> None:
    def final(record: bool) -> torch.Tensor:
        model = problems.mlp(12, 16, 4, dropout=0.3)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        loss_fn = nn.CrossEntropyLoss()
        torch.manual_seed(5)
        loader = DataLoader(problems.data(), 25, shuffle=True)
        rec = nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, snapshot_every=3) if record else None
        for _ in range(3):
            for x, y in loader if rec is None else rec.watch(loader):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
        if rec is not None:
            rec.close()
        return problems.flat(model)

    assert torch.equal(final(False), final(True))
