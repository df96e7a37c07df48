"""Weights between snapshots without model and data: what the loop itself saw, or an error that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.store import Store, state
from nbdyn.store.trajectory import trajectory, trajectory_chunks
from tests import problems

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=1e-3),
    "SGD nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "SGD maximize": lambda p: torch.optim.SGD(p, 1e-3, maximize=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    **{
        name: lambda p, name=name: getattr(torch.optim, name)(p, lr=0.01)
        for name in ("Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "Rprop", "ASGD")
    },
}
FEW = np.array([200, 50, 308, 379, 50])
"""Weights of every tensor of the MLP, in no order, one of them twice."""
ROUNDING = 3e-7
"""Of weights of about 1, after some steps of float32."""


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def noise(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad += 1e-3 * torch.randn_like(p)


def train(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    change: Callable[[nn.Module], None] | None = None,
    epochs: int = 5,
    schedule: Any = None,
    **options: Any,
) -> tuple[Store, np.ndarray]:
    """Record a plain loop of 5 steps an epoch; the run, and the weights that the loop saw before each step."""
    loss_fn = nn.CrossEntropyLoss()
    dtype = next(model.parameters()).dtype
    weights = []
    with nbdyn.record(path, model, optimizer, loss_fn, **{"snapshot_every": 7, **options}) as rec:
        for _ in range(epochs):
            for x, y in rec.watch(DataLoader(problems.data(), 25, shuffle=True)):
                weights.append(problems.flat(model))
                optimizer.zero_grad()
                loss_fn(model(x.to(dtype)), y).backward()
                if change is not None:
                    change(model)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
    rows = torch.stack([*weights, problems.flat(model)])
    return Store(path), (rows.float() if dtype == torch.bfloat16 else rows).numpy()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def all_of(store: Store) -> np.ndarray:
    return np.arange(store.parameters)


def check(store: Store, weights: np.ndarray, few: np.ndarray = FEW, tolerance: float = ROUNDING) -> None:
    """Whole tensors bit for bit, single weights within rounding."""
    whole = trajectory(store, all_of(store), 0, len(weights))
    assert np.array_equal(whole.values, weights)
    assert whole.residual == 0.0 and whole.values.dtype == weights.dtype
    part = trajectory(store, few, 3, len(weights) - 1)
    assert np.abs(part.values - weights[3:-1][:, few]).max() <= tolerance
    assert part.residual <= tolerance and part.steps.tolist() == list(range(3, len(weights) - 1))
    stored = np.intersect1d(part.steps, store.weights.steps)
    assert np.array_equal(part.values[stored - 3], weights[stored][:, few])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_elementwise_optimizer(tmp_path: Path, name: str) -> None:
    model = problems.mlp(12, 16, 8, 4)
    store, weights = train(tmp_path / "run", model, OPTIMIZERS[name](model.parameters()))
    check(store, weights)


@pytest.mark.parametrize("change", [clip_norm, clip_value, noise])
@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_changed_gradients_schedules_and_two_groups(tmp_path: Path, name: str, change: Any) -> None:
    model = problems.mlp(12, 16, 8, 4)
    first, *rest = list(model.parameters())
    optimizer = OPTIMIZERS[name]([{"params": rest, "weight_decay": 0.1}, {"params": [first]}])
    # cycles learning rates and momenta, those of two groups apart
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.05, 0.1], total_steps=30)
    store, weights = train(tmp_path / "run", model, optimizer, change, schedule=schedule)
    assert len(state.places(store, 3)) > 5  # options changed
    check(store, weights)


def test_a_float64_network(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4).double()
    store, weights = train(tmp_path / "run", model, OPTIMIZERS["AdamW"](model.parameters()))
    check(store, weights, tolerance=1e-15)


def test_a_bfloat16_network(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4).bfloat16()
    store, _ = train(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1))
    found = trajectory(store, FEW, 0, 26)
    assert found.residual <= 2.0**-8  # one unit in the last place of a weight near 1


def test_layers_other_than_linear(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (3, 4)),
        nn.Conv1d(3, 5, 2, bias=False),
        nn.Flatten(),
        nn.BatchNorm1d(15),
        nn.ReLU(),
        nn.Linear(15, 4),
    )
    store, weights = train(tmp_path / "run", model, torch.optim.Adam(model.parameters(), 0.01))
    for indices in (all_of(store), np.array([0, 7, 29, 36, 50, 70, 100])):
        found = trajectory(store, indices, 0, 26)
        np.testing.assert_allclose(found.values, weights[:, indices], atol=3e-6)
        assert found.residual < 3e-6


class Partial(nn.Module):
    """A frozen layer, one that nothing uses, one that is used now and then, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.unused, self.seldom, self.head = (nn.Linear(12, 12) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.frozen(x)
        return self.gain * self.head(self.seldom(x) if self.calls % 3 else x)


@pytest.mark.parametrize("name", ["SGD momentum", "Adam"])
def test_tensors_without_a_gradient(tmp_path: Path, name: str) -> None:
    model = Partial()
    store, weights = train(tmp_path / "run", model, OPTIMIZERS[name](model.parameters()))
    names = [t["name"] for t in store.config["tensors"]]
    gain = names.index("gain")
    indices = np.delete(all_of(store), store.config["tensors"][gain]["first"])
    found = trajectory(store, indices, 0, 26)
    assert found.residual == 0.0 and np.array_equal(found.values, weights[:, indices])
    scalar = trajectory(store, [store.config["tensors"][gain]["first"]], 0, 26)
    assert np.abs(scalar.values[:, 0] - weights[:, store.config["tensors"][gain]["first"]]).max() < ROUNDING


@pytest.mark.parametrize("clip", [False, True])
def test_skipped_steps_and_scaled_gradients(tmp_path: Path, clip: bool) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    weights = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, snapshot_every=20) as rec:
        for epoch in range(4):
            for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 30))):
                weights.append(problems.flat(model))
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):  # shows the recorder that losses may be scaled
                    loss = loss_fn(model(x), y) * (float("inf") if number == 1 and epoch % 2 else 1.0)
                scaler.scale(loss).backward()
                if clip:
                    scaler.unscale_(optimizer)
                    clip_norm(model)
                scaler.step(optimizer)
                scaler.update()
    store, truth = Store(tmp_path / "run"), torch.stack(weights).numpy()
    assert store.read_steps(0, 16)["skipped"].sum() == 2
    moved = np.abs(truth[-1] - truth[0]).max()
    for indices in (all_of(store), FEW[[1, 4]]):
        found = trajectory(store, indices, 0, 16)
        assert np.abs(found.values - truth[:, indices]).max() < 1e-2 * moved


@pytest.mark.parametrize("change", [None, clip_norm])
def test_a_scaler_without_half_precision(tmp_path: Path, change: Callable[[nn.Module], None] | None) -> None:
    """Its scale is a power of two: nothing rounds, and contributions are recorded without it."""
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    loss_fn, weights = nn.CrossEntropyLoss(), []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, snapshot_every=9) as rec:
        for _ in range(3):
            for x, y in rec.watch(DataLoader(problems.data(), 30)):
                weights.append(problems.flat(model))
                optimizer.zero_grad()
                scaler.scale(loss_fn(model(x), y)).backward()
                scaler.unscale_(optimizer)
                if change is not None:
                    change(model)
                scaler.step(optimizer)
                scaler.update()
    store = Store(tmp_path / "run")
    found = trajectory(store, all_of(store), 0, 12)
    assert found.residual == 0.0 and np.array_equal(found.values, torch.stack(weights).numpy())


def test_accumulated_batches(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    weights = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 12))):
            (loss_fn(model(x), y) / 2).backward()
            if number % 2:
                weights.append(problems.flat(model))
                optimizer.step()
                optimizer.zero_grad()
    found = trajectory(Store(tmp_path / "run"), np.arange(276), 0, 5)
    assert np.abs(found.values - torch.stack(weights).numpy()).max() < ROUNDING


def test_a_run_that_was_resumed(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    _, first = train(tmp_path / "run", model, optimizer, epochs=2)
    store, second = train(tmp_path / "run", model, optimizer, epochs=2, mode="resume")
    found = trajectory(store, all_of(store), 0, 21)
    assert np.array_equal(found.values, np.concatenate([first[:-1], second]))
    assert sorted(found.residuals) == [7, 10, 14, 20] and found.residual == 0.0


def test_stored_rows_are_read(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4)
    optimizer = torch.optim.LBFGS(model.parameters())
    loss_fn = nn.CrossEntropyLoss()
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, weights="every", per_sample=False) as rec:
        for x, y in rec.watch(DataLoader(problems.data(), 60)):

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    store = Store(tmp_path / "run")
    found = trajectory(store, FEW, 0, 3)
    assert np.array_equal(found.values, store.weights.read(FEW)[1])
    assert found.rebuilt == 0 and found.residual == 0.0 and "all stored" in repr(found)


def test_the_last_row_of_a_run_that_goes_on(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4)
    store, weights = train(tmp_path / "run", model, OPTIMIZERS["Adam"](model.parameters()), weights="every")
    store.config["seams"] = []  # as before it is closed
    found = trajectory(store, all_of(store), 0, 26)
    assert np.array_equal(found.values, weights) and found.rebuilt == 1
    assert sorted(found.residuals) == [22, 23, 24] and found.residual == 0.0


@pytest.mark.parametrize("weights", ["snapshots", "every"])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: int, weights: str) -> None:
    model = problems.mlp(12, 16, 8, 4)
    options = {"weights": weights, "snapshot_every": 7}
    store, truth = train(tmp_path / "run", model, OPTIMIZERS["SGD momentum"](model.parameters()), **options)
    monkeypatch.setattr("nbdyn.store.trajectory.CHUNK_BYTES", 8 * 380 * 5)
    residuals: dict[int, float] = {}
    pieces = list(trajectory_chunks(store, all_of(store), 9, 26, overlap, residuals))
    assert len(pieces) > 3 and all(len(steps) <= max(5, overlap + 1) for steps, _ in pieces)
    seen: list[int] = []
    for steps, values in pieces:
        assert np.array_equal(values, truth[steps])
        again = seen[len(seen) - min(overlap, len(seen)) :]
        assert steps[: len(again)].tolist() == again
        seen += [step for step in steps.tolist() if not seen or step > seen[-1]]
    assert seen == list(range(9, 26))
    assert sorted(residuals) == ([14, 21, 25] if weights == "snapshots" else [])


def test_a_gradient_that_a_hook_changed_shows_in_the_residual(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4)
    next(model.parameters()).register_hook(lambda grad: 2 * grad)
    store, weights = train(tmp_path / "run", model, OPTIMIZERS["SGD momentum"](model.parameters()))
    found = trajectory(store, all_of(store), 0, 26)
    assert found.residual > 1e-3
    stored = store.weights.steps
    assert np.array_equal(found.values[stored], weights[stored])  # it goes on from the stored ones


def test_nothing_met_nothing_checked(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4)
    store, _ = train(tmp_path / "run", model, OPTIMIZERS["SGD"](model.parameters()))
    assert np.isnan(trajectory(store, FEW, 8, 12).residual)
    assert trajectory(store, FEW, 5, 5).values.shape == (0, 5)
    assert trajectory(store, [], 5, 9).values.shape == (4, 0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"every": 2}, r"captured every 2 steps"),
        ({"fraction": 0.5}, r"a share of 0\.5 of the samples"),
        ({"project": 4}, r"random projections"),
        ({"layers": "2.*"}, r"no per-sample gradients of 0\.weight at step 0: layers=\['2\.\*'\] left it out"),
        ({"per_sample": False}, r"recorded without them"),
    ],
)
def test_gradients_that_were_not_captured(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    model = problems.mlp(12, 16, 8, 4)
    store, _ = train(tmp_path / "run", model, OPTIMIZERS["SGD"](model.parameters()), **options)
    with pytest.raises(NotRecorded, match=rf"(?s){reason}.*run\.replay\(0, 4, model, loss_fn, data\)"):
        trajectory(store, [5], 0, 5)
    assert trajectory(store, [5], 7, 8).residual == 0.0  # stored


def test_layers_that_were_captured_can_be_rebuilt(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4)
    store, weights = train(tmp_path / "run", model, OPTIMIZERS["SGD"](model.parameters()), layers="2.*")
    assert np.array_equal(trajectory(store, np.arange(208, 344), 0, 26).values, weights[:, 208:344])


def test_tensors_recorded_by_batch_only(tmp_path: Path) -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(12, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(x @ torch.exp(self.inner.weight.T) + self.inner.bias)

    model = Outside()
    store, _ = train(tmp_path / "run", model, OPTIMIZERS["SGD"](model.parameters()))
    assert store.factors.batch_only
    with pytest.raises(NotRecorded, match=r"inner\.weight at step 0: it is used outside.*run\.replay"):
        trajectory(store, [5], 0, 5)


def test_other_optimizers_are_refused(tmp_path: Path) -> None:
    class Mine(torch.optim.SGD):
        pass

    model = problems.mlp(12, 16, 8, 4)
    store, _ = train(tmp_path / "run", model, Mine(model.parameters(), 0.1))
    with pytest.raises(NotRecorded, match=r"trained with Mine; .*for SGD, .* only\. Type run\.replay\(0, 3,"):
        trajectory(store, FEW, 2, 4)


def test_wrong_questions(tmp_path: Path) -> None:
    model = problems.mlp(12, 16, 8, 4)
    store, _ = train(tmp_path / "run", model, OPTIMIZERS["SGD"](model.parameters()))
    with pytest.raises(NotRecorded, match=r"has weights\[0\] to weights\[25\]; 20\.\.29 is not among them"):
        trajectory(store, FEW, 20, 30)
    with pytest.raises(Incompatible):
        trajectory(store, [380], 0, 3)
    with pytest.raises(NbdynError, match=r"26 rows of 5 weights take .*trajectory_chunks"):
        trajectory(store, FEW, 0, 26, max_bytes=100)
