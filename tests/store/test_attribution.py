"""Displacement attributed to samples: against torch.optim itself, run again with one gradient changed."""

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
from nbdyn.store import Store
from nbdyn.store.attribution import Attribution, coefficients
from nbdyn.store.gradients import Gradients
from tests import problems

STEPS = 40
SGD = {
    "plain": {},
    "momentum": {"momentum": 0.6},
    "dampening": {"momentum": 0.6, "dampening": 0.4},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "momentum and decay": {"momentum": 0.6, "weight_decay": 0.05, "nesterov": True},
    "maximize": {"maximize": True, "momentum": 0.3, "weight_decay": 0.05, "lr": 1e-3},
}
ADAM: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"betas": (0.4, 0.9)}),
    "Adam decay": (torch.optim.Adam, {"betas": (0.4, 0.9), "weight_decay": 0.05}),
    "AdamW": (torch.optim.AdamW, {"betas": (0.4, 0.9), "weight_decay": 0.05}),
    "amsgrad": (torch.optim.Adam, {"betas": (0.4, 0.9), "amsgrad": True, "maximize": True}),
}
SOME = np.array([308, 50, 108, 379, 50])


def train(
    path: Path,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    change: Callable[[nn.Module], None] | None = None,
    schedule: bool = False,
    **options: Any,
) -> tuple[Store, np.ndarray]:
    """A float64 MLP of 380 parameters, 40 steps of 12 samples; the run and weights before each step."""
    model = problems.mlp(12, 16, 8, 4).double()
    made, loss_fn = optimizer(model), nn.CrossEntropyLoss()
    rates = torch.optim.lr_scheduler.ExponentialLR(made, 0.95)
    weights = []
    with nbdyn.record(path, model, made, loss_fn, **{"snapshot_every": 7, "cells": None, **options}) as rec:
        for _ in range(4):
            for x, y in rec.watch(DataLoader(problems.data(), 12, shuffle=True)):
                weights.append(problems.flat(model))
                made.zero_grad()
                loss_fn(model(x.double()), y).backward()
                if change is not None:
                    change(model)
                made.step()
                if schedule:
                    rates.step()
    return Store(path), torch.stack([*weights, problems.flat(model)]).numpy()


def shares(store: Store, found: Attribution, indices: np.ndarray) -> np.ndarray:
    """Sum over all visits of coefficient times contribution, from the cells: (k,)."""
    cells = Gradients(store)[found.steps.tolist(), np.unique(indices)].dense()
    values = cells.values[:, np.searchsorted(np.unique(indices), indices)]
    table = found.coefficients if found.coefficients.ndim == 2 else found.coefficients[:, None]
    return (table[np.searchsorted(found.steps, cells.visits["step"])] * values).sum(axis=0)


def displacement(make: Any, gradients: np.ndarray, start: int, stop: int, weights: float = 0.0) -> float:
    """What torch's optimizer makes of a sequence of gradients of one weight."""
    p = nn.Parameter(torch.tensor([weights], dtype=torch.float64))
    optimizer = make([p])
    for step, gradient in enumerate(gradients[:stop]):
        if step == start:
            before = float(p.detach())
        p.grad = torch.tensor([gradient])
        optimizer.step()
    return float(p.detach()) - before


def check(store: Store, weights: np.ndarray, found: Attribution, start: int, stop: int, tolerance: float) -> None:
    """Shares, decay and the buffer's rest add up to what the weights really did."""
    moved = weights[stop] - weights[start]
    np.testing.assert_allclose(found.moved, moved[SOME], atol=1e-14)
    np.testing.assert_allclose(shares(store, found, SOME), found.explained, atol=1e-14)
    assert found.residual <= tolerance
    np.testing.assert_allclose(found.explained + found.decay + found.before, moved[SOME], atol=tolerance)
    np.testing.assert_allclose(found.rest, found.moved - found.explained)


@pytest.mark.parametrize("name", SGD)
def test_sgd(tmp_path: Path, name: str) -> None:
    options = SGD[name]
    store, weights = train(
        tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), **{"lr": 0.1, **options}), schedule=True
    )
    for start, stop in [(0, 1), (0, 40), (30, 40), (33, 38)]:
        found = coefficients(store, SOME, start, stop)
        check(store, weights, found, start, stop, 1e-13)
        assert found.coefficients.ndim == 1 and found.steps[-1] == stop - 1
        assert np.abs(found.before).max() <= 1e-5 * np.abs(found.moved).max()
    if name == "plain":
        rates = store.read_scalars(33, 38)["lr/0"]
        assert found.kind == "exact" and found.steps.tolist() == [33, 34, 35, 36, 37]
        assert np.array_equal(found.coefficients, -rates)
    if "momentum" in options:
        assert found.kind == "geometric tail"
        assert 0 < found.steps[0] <= 30 and abs(found.coefficients[0]) < 1e-5 * np.abs(found.coefficients).max()


@pytest.mark.parametrize("name", [name for name, options in SGD.items() if "weight_decay" not in options])
def test_coefficients_are_what_the_optimizer_does_with_a_gradient(tmp_path: Path, name: str) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, **{"lr": 0.1, **SGD[name]})

    store, _ = train(tmp_path / "run", lambda m: make(m.parameters()))
    gradients = Gradients(store)[:, [50]].total()[:, 0]
    for start, stop in [(0, 12), (25, 31)]:
        found = coefficients(store, [50], start, stop)
        base = displacement(make, gradients, start, stop)
        expected = np.zeros(stop)
        for step in range(stop):
            changed = gradients.copy()
            changed[step] += 1.0
            expected[step] = displacement(make, changed, start, stop) - base
        given = np.zeros(stop)
        given[found.steps] = found.coefficients
        np.testing.assert_allclose(given, expected, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("name", ADAM)
def test_adam(tmp_path: Path, name: str) -> None:
    kind, options = ADAM[name]
    store, weights = train(tmp_path / "run", lambda m: kind(m.parameters(), 0.01, **options), schedule=True)
    for start, stop in [(0, 1), (0, 40), (30, 37)]:
        found = coefficients(store, SOME, start, stop)
        # Adam's count of steps is kept in float32, its rounding is part of the update
        check(store, weights, found, start, stop, 1e-9)
        assert found.kind == "first order" and found.coefficients.shape == (len(found.steps), 5)
    assert 0 < found.steps[0] < 30


def test_adam_with_the_second_moment_as_it_was(tmp_path: Path) -> None:
    """Without momentum the coefficient is -lr / (sqrt(v_hat) + eps), by the textbook (Kingma and Ba 2015, alg. 1)."""
    store, _ = train(tmp_path / "run", lambda m: torch.optim.Adam(m.parameters(), 0.01, betas=(0.0, 0.9)))
    gradients, v = Gradients(store)[:, [50]].total()[:, 0], 0.0
    found = coefficients(store, [50], 0, STEPS)
    for step, gradient in enumerate(gradients):
        v = 0.9 * v + 0.1 * gradient**2
        expected = -0.01 / (np.sqrt(v / (1 - 0.9 ** (step + 1))) + 1e-8)
        np.testing.assert_allclose(found.coefficients[step, 0], expected, rtol=1e-10)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_clipping_by_norm_and_two_groups(tmp_path: Path, kind: Any) -> None:
    options = {"momentum": 0.6} if kind is torch.optim.SGD else {"betas": (0.4, 0.9)}

    def make(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = list(model.parameters())
        return kind(
            [{"params": rest, "weight_decay": 0.1}, {"params": [first], "lr": 0.05, "weight_decay": 0}],
            lr=0.02,
            **options,
        )

    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)

    store, weights = train(tmp_path / "run", make, clip, schedule=True)
    assert (~np.isnan(store.read_scalars(0, STEPS)["grad_factor"])).sum() > 20
    for start, stop in [(0, 40), (30, 37)]:
        found = coefficients(store, SOME, start, stop)
        check(store, weights, found, start, stop, 1e-9)
        assert found.coefficients.shape == (len(found.steps), 5)  # the groups differ
        assert not found.decay[[1, 2, 4]].any() and found.decay[[0, 3]].all()


def test_steps_that_the_scaler_skipped(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.6)
    loss_fn = nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, weights="every") as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 12))):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_fn(model(x), y) * (float("inf") if number in (0, 4) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    store = Store(tmp_path / "run")
    assert store.read_steps(0, 10)["skipped"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    found = coefficients(store, [3, 100], 0, 10)
    assert found.residual < 2e-2 * np.abs(found.moved).max()  # half precision
    assert (
        found.coefficients[0] == 0 and found.coefficients[4] == 0 and (np.delete(found.coefficients, [0, 4]) < 0).all()
    )


def test_gradients_changed_by_more_than_a_factor(tmp_path: Path) -> None:
    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_value_(model.parameters(), 0.01)

    store, _ = train(tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), 0.1), clip)
    with pytest.raises(NotRecorded, match=r"before step 7 .*changed by more than one factor.*sum \|g\|"):
        coefficients(store, SOME, 8, 10)


def test_other_optimizers_and_wrong_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = train(tmp_path / "rms", lambda m: torch.optim.RMSprop(m.parameters(), 0.01))
    with pytest.raises(NotRecorded, match=r"trained with RMSprop; .* for SGD, Adam, AdamW\."):
        coefficients(store, SOME, 0, 5)
    store, _ = train(tmp_path / "adam", lambda m: torch.optim.Adam(m.parameters(), 0.01))
    with pytest.raises(NotRecorded, match=r"has steps 0\.\.39; 30\.\.49 are not among them"):
        coefficients(store, SOME, 30, 50)
    with pytest.raises(Incompatible, match="no weights are named"):
        coefficients(store, [], 0, 5)
    monkeypatch.setattr("nbdyn.store.attribution.MAX_BYTES", 1000)
    with pytest.raises(NbdynError, match="4 weights at 40 steps would take"):
        coefficients(store, SOME, 30, 40)
