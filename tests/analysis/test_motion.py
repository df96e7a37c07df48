"""The motion of a step in parts: against torch.optim itself, run beside the recorded loop on one part at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.analysis.lca.layerwise import frozen
from nbdyn.analysis.lca.motion import PARTS, Motion, MotionParts
from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.store import Store
from tests import problems

SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.7},
    "dampening": {"momentum": 0.7, "dampening": 0.4},
    "nesterov": {"momentum": 0.7, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "momentum and decay": {"momentum": 0.7, "weight_decay": 0.05, "dampening": 0.2},
    "nesterov and decay": {"momentum": 0.7, "weight_decay": 0.05, "nesterov": True},
    "maximize": {"momentum": 0.7, "weight_decay": 0.05, "maximize": True, "lr": 1e-3},
}
ADAM: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {}),
    "Adam decay": (torch.optim.Adam, {"weight_decay": 0.05}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.05}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "betas": (0.6, 0.8), "weight_decay": 0.05}),
    "maximize": (torch.optim.AdamW, {"maximize": True}),
}
LOSS = nn.CrossEntropyLoss()


@dataclass
class Seen:
    """What a loop saw, a row a step: weights (n + 1), minibatch and full gradients, states after each step (n)."""

    weights: np.ndarray
    batch: np.ndarray
    full: np.ndarray
    states: list[dict[str, np.ndarray]]
    rates: np.ndarray


def full_gradient(model: nn.Module, dtype: torch.dtype) -> np.ndarray:
    """Of the mean loss over all samples, by autograd on a copy, so that no hook sees it."""
    twin = copy.deepcopy(model)
    x, y = problems.data().tensors
    loss = nn.functional.cross_entropy(twin(x.to(dtype)), y)
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    return torch.cat([g.reshape(-1) for g in grads]).double().numpy()


def train(
    path: Path,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    change: Callable[[nn.Module], None] | None = None,
    dtype: torch.dtype = torch.float64,
    model: nn.Module | None = None,
    made: torch.optim.Optimizer | None = None,
    **options: Any,
) -> tuple[Store, Seen]:
    """Record an MLP of 380 parameters, 2 epochs of 8 steps, with a learning rate that falls."""
    model = problems.mlp(12, 16, 8, 4).to(dtype) if model is None else model
    optim = made or optimizer(model)
    rates = torch.optim.lr_scheduler.ExponentialLR(optim, 0.95)
    clean = copy.deepcopy(model)  # without the recorder's hooks
    found: dict[str, list[Any]] = {"weights": [], "batch": [], "full": [], "states": [], "rates": []}
    with nbdyn.record(
        path, model, optim, LOSS, **{"weights": "every", "snapshot_every": 5, "cells": None} | options
    ) as r:
        for _ in range(2):
            for x, y in r.watch(DataLoader(problems.data(), 15, shuffle=True)):
                found["weights"].append(problems.flat(model))
                clean.load_state_dict(model.state_dict())
                found["full"].append(full_gradient(clean, dtype))
                optim.zero_grad()
                LOSS(model(x.to(dtype)), y).backward()
                if change is not None:
                    change(model)
                found["batch"].append(
                    torch.cat([gradient_of(p).reshape(-1).clone() for p in model.parameters()]).numpy()
                )
                found["rates"].append([group["lr"] for group in optim.param_groups])
                optim.step()
                rates.step()
                found["states"].append(flat_state(optim))
    weights = torch.stack([*found["weights"], problems.flat(model)]).numpy()
    batch, full = np.stack(found["batch"]), np.stack(found["full"])
    return Store(path), Seen(weights, batch, full, found["states"], np.array(found["rates"]))


def gradient_of(p: nn.Parameter) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


def flat_state(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    keys = [key for key, value in states[0].items() if isinstance(value, torch.Tensor) and value.ndim]
    keys = [key for key in keys if all(key in s for s in states)]  # frozen layers have no buffer
    return {key: torch.cat([s[key].detach().reshape(-1).clone() for s in states]).numpy() for key in keys}


def divide(store: Store, seen: Seen, start: int = 0) -> list[MotionParts]:
    motion = Motion(store, start)
    return [parts_of(motion, seen, t) for t in range(start, len(seen.full))]


def parts_of(motion: Motion, seen: Seen, t: int) -> MotionParts:
    return motion.parts(t, seen.weights[t], seen.weights[t + 1], seen.full[t])


def replayed(options: dict[str, Any], seen: Seen, gradients: np.ndarray, last: np.ndarray | None = None) -> np.ndarray:
    """The moves that torch's SGD makes of a sequence of gradients; with `last`, of each step's history and last[t]."""
    options = {key: value for key, value in options.items() if key != "weight_decay"}

    def moves(sequence: np.ndarray) -> np.ndarray:
        p = nn.Parameter(torch.zeros(sequence.shape[1], dtype=torch.float64))
        optimizer = torch.optim.SGD([p], **{"lr": 0.1, **options})
        rows = [p.detach().numpy().copy()]
        for rate, gradient in zip(seen.rates[:, 0], sequence, strict=False):
            optimizer.param_groups[0]["lr"] = rate
            p.grad = torch.from_numpy(gradient.copy())
            optimizer.step()
            rows.append(p.detach().numpy().copy())
        return np.diff(rows, axis=0)

    if last is None:
        return moves(gradients)
    return np.stack([moves(np.stack([*gradients[:t], last[t]]))[t] for t in range(len(gradients))])


@pytest.mark.parametrize("name", SGD)
def test_sgd(tmp_path: Path, name: str) -> None:
    """SGD is linear in its gradients: each part is what it makes of that part of them, by itself."""
    options = SGD[name]
    store, seen = train(tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), **{"lr": 0.1, **options}))
    found = divide(store, seen)
    parts = {name: np.stack([row[name] for row in found]) for name in PARTS[:-1]}
    assert all(row.names == PARTS[:4] and row.values.shape == (4, 380) and row.scale == 1.0 for row in found)
    np.testing.assert_allclose(sum(parts.values()), np.diff(seen.weights, axis=0), atol=1e-15)
    assert max(row.residual for row in found) < 1e-15

    sign = -1.0 if options.get("maximize") else 1.0  # torch adds the decay after it turned the gradient
    pull = sign * options.get("weight_decay", 0.0) * seen.weights[:-1]
    momentum = replayed(options, seen, seen.batch, last=np.zeros_like(seen.batch))
    gradient = replayed(options, seen, seen.batch, last=seen.full) - momentum
    noise = replayed(options, seen, seen.batch, last=seen.batch - seen.full) - momentum
    np.testing.assert_allclose(parts["weight decay"], replayed(options, seen, pull), atol=1e-15)
    np.testing.assert_allclose(parts["momentum"], momentum, atol=1e-15)
    np.testing.assert_allclose(parts["gradient"], gradient, atol=1e-15)
    np.testing.assert_allclose(parts["noise"], noise, atol=1e-15)
    assert not parts["momentum"][0].any()
    assert bool(parts["momentum"][1:].any()) == ("momentum" in options)
    assert bool(parts["weight decay"].any()) == ("weight_decay" in options)
    assert np.abs(parts["noise"]).max() > 0.1 * np.abs(parts["gradient"]).max()


def expected_adam(seen: Seen, kind: Any, options: dict[str, Any], t: int, decayed: np.ndarray) -> np.ndarray:
    """The parts of step t of Adam (Kingma and Ba 2015) from the states that torch had; `decayed`: L2's first moment."""
    (b1, b2), sign = options.get("betas", (0.9, 0.999)), -1.0 if options.get("maximize") else 1.0
    decay = options.get("weight_decay", 0.01 if kind is torch.optim.AdamW else 0.0)
    lr, w = seen.rates[t, 0], seen.weights[t]
    second = seen.states[t]["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"]
    step = lr / (1 - b1 ** (t + 1)) / (np.sqrt(second) / np.sqrt(1 - b2 ** (t + 1)) + 1e-8)
    m = seen.states[t]["exp_avg"]
    common = np.linalg.norm(step * m) / np.linalg.norm(m)
    older = b1 * seen.states[t - 1]["exp_avg"] if t else np.zeros_like(m)
    l2 = decay * w if kind is torch.optim.Adam else np.zeros_like(w)
    own = (1 - b1) * l2 + b1 * decayed
    return np.stack(
        [
            -common * (1 - b1) * sign * seen.full[t],
            -common * (1 - b1) * sign * (seen.batch[t] - seen.full[t]),
            -common * (older - b1 * decayed),
            -common * own - (lr * decay * w if kind is torch.optim.AdamW else 0.0),
            -(step - common) * m,
        ]
    )


@pytest.mark.parametrize("name", ADAM)
def test_adam(tmp_path: Path, name: str) -> None:
    kind, options = ADAM[name]
    store, seen = train(tmp_path / "run", lambda m: kind(m.parameters(), 0.01, **options))
    decayed, b1 = np.zeros(380), options.get("betas", (0.9,))[0]
    for t, row in enumerate(divide(store, seen)):
        assert row.names == PARTS and row.residual < 1e-9  # torch keeps the count of steps in float32
        expected = expected_adam(seen, kind, options, t, decayed)
        np.testing.assert_allclose(row.values, expected, atol=1e-9)
        if kind is torch.optim.Adam:
            decayed = b1 * decayed + (1 - b1) * options.get("weight_decay", 0.0) * seen.weights[t]
        decoupled = expected[3] if kind is torch.optim.AdamW else 0.0
        common, own = row.values[:4].sum(axis=0) - decoupled, row.values.sum(axis=0) - decoupled
        assert np.linalg.norm(common) == pytest.approx(np.linalg.norm(own))  # as long as Adam's own step
        assert row.scale * seen.rates[t, 0] * np.linalg.norm(seen.states[t]["exp_avg"]) == pytest.approx(
            np.linalg.norm(own), rel=1e-6
        )
        assert bool(row["momentum"].any()) == (t > 0)


def test_weights_that_never_had_a_gradient_do_not_set_the_scale(tmp_path: Path) -> None:
    """A dead input: v = 0, so that Adam's own scaling of its weights is lr / eps, a million times that of others."""

    def kill(model: nn.Module) -> None:
        gradient_of(next(iter(model.parameters())))[:, :3] = 0.0

    store, seen = train(tmp_path / "run", lambda m: torch.optim.Adam(m.parameters(), 0.01), kill)
    dead = np.arange(192).reshape(16, 12)[:, :3].reshape(-1)
    for row in divide(store, seen):
        assert row.residual < 1e-9
        assert np.abs(row.values).sum(axis=1).max() < 100 * np.abs(row.values.sum(axis=0)).sum()
        np.testing.assert_allclose(row["gradient"][dead], -row["noise"][dead])  # nothing moved them
        assert not row["adaptive scaling"][dead].any() and not row["momentum"][dead].any()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_from_a_later_step_on(tmp_path: Path, kind: Any) -> None:
    """The state is gone through from the record, L2 decay in the buffer included."""
    options: dict[str, Any] = {"momentum": 0.7} if kind is torch.optim.SGD else {}
    store, seen = train(tmp_path / "run", lambda m: kind(m.parameters(), lr=0.01, weight_decay=0.05, **options))
    whole, motion = divide(store, seen), Motion(store)
    for start in (1, 7, 13):
        for one, other in zip(whole[start:], divide(store, seen, start), strict=True):
            np.testing.assert_allclose(one.values, other.values, atol=1e-9)
    for step in (0, 2, 9, 15):  # steps left out in between
        found = parts_of(motion, seen, step)
        np.testing.assert_array_equal(found.values, whole[step].values)


def test_a_buffer_of_which_only_the_tail_is_divided(tmp_path: Path) -> None:
    """Looking back ends at a snapshot before which nothing is left of momentum 0.1: later than step 0."""
    store, seen = train(
        tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.1, weight_decay=0.05)
    )
    motion = Motion(store, 13)
    assert motion._carrier.anchor == 5
    found = parts_of(motion, seen, 13)
    assert found.residual < 1e-15
    np.testing.assert_allclose(found.values, divide(store, seen)[13].values, atol=1e-10)


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.2)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


@pytest.mark.parametrize("change", [clip_norm, clip_value])
def test_clipping_is_noise(tmp_path: Path, change: Any) -> None:
    store, seen = train(tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.5), change)
    for t, row in enumerate(divide(store, seen)):
        assert row.residual < 1e-14
        np.testing.assert_allclose(row["noise"], -seen.rates[t, 0] * (seen.batch[t] - seen.full[t]), atol=1e-14)
        np.testing.assert_allclose(row["gradient"], -seen.rates[t, 0] * seen.full[t], atol=1e-16)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_float32_and_frozen_layers(tmp_path: Path, kind: Any) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return kind(frozen(model, "2", lr=0.02, weight_decay=0.01, **options))

    store, seen = train(tmp_path / "run", make, dtype=torch.float32)
    still = np.r_[208:344]
    for row in divide(store, seen):
        assert row.residual < 2e-7 and row.values.dtype == np.float64
        assert not row.values[:, still].any()
        assert np.delete(row["gradient"], still).any()


def test_a_run_that_was_resumed(tmp_path: Path) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.05)

    model = problems.mlp(12, 16, 8, 4).double()
    _, first = train(tmp_path / "run", make, model=model)
    store, second = train(tmp_path / "run", make, model=model, mode="resume")
    assert store.steps_committed == 32
    motion, rows = Motion(store), []
    for t in range(32):
        seen, s = (first, t) if t < 16 else (second, t - 16)
        rows.append(motion.parts(t, seen.weights[s], seen.weights[s + 1], seen.full[s]))
    assert max(row.residual for row in rows) < 1e-14
    assert rows[16]["momentum"].any()  # the optimizer's state is taken up again


def test_steps_that_the_scaler_skipped_and_tensors_without_gradient(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    unused = nn.Linear(2, 2)
    whole = nn.ModuleList([model, unused])
    optimizer = torch.optim.SGD(whole.parameters(), 0.1, momentum=0.6, weight_decay=0.1)
    scaler, weights = torch.amp.GradScaler("cpu", init_scale=2.0**8), []
    with nbdyn.record(tmp_path / "run", whole, optimizer, LOSS, weights="every") as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 12))):
            weights.append(problems.flat(whole))
            optimizer.zero_grad()
            loss = LOSS(model(x), y) * (float("inf") if number in (0, 4) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    weights, store = torch.stack([*weights, problems.flat(whole)]).numpy(), Store(tmp_path / "run")
    assert store.read_steps(0, 10)["skipped"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    motion = Motion(store)
    for t in range(10):
        row = motion.parts(t, weights[t], weights[t + 1], np.ones(store.parameters))
        assert row.residual < 3e-7
        assert bool(row.values.any()) == (t not in (0, 4)) and not row.values[:, -6:].any()
        assert bool(row["momentum"].any()) == (t not in (0, 1, 4))


def test_what_is_refused(tmp_path: Path) -> None:
    store, seen = train(tmp_path / "rms", lambda m: torch.optim.RMSprop(m.parameters(), 0.01))
    with pytest.raises(Incompatible, match=r"trained with RMSprop; .* for SGD, Adam, AdamW of torch\.optim"):
        Motion(store)
    refused: list[dict[str, Any]] = [{"per_sample": False}, {"every": 2}, {"layers": "2"}]
    for number, options in enumerate(refused):
        store, seen = train(tmp_path / f"{number}", lambda m: torch.optim.SGD(m.parameters(), 0.1), **options)
        with pytest.raises(NotRecorded, match=r"record them with nbdyn\.record\(.*without per_sample=False, .*Found"):
            Motion(store)
    store, seen = train(tmp_path / "sgd", lambda m: torch.optim.SGD(m.parameters(), 0.1))
    with pytest.raises(NotRecorded, match=r"has steps 0\.\.15; 3\.\.19 are not among them"):
        Motion(store, 3, 20)
    motion = Motion(store, 3)
    w = seen.weights
    with pytest.raises(Incompatible, match=r"shape \(3,\); .*\(380,\)"):
        motion.parts(4, w[4], w[5], np.ones(3))
    motion.parts(4, w[4], w[5], seen.full[4])
    for step in (2, 4, 16):
        with pytest.raises(NbdynError, match=rf"step {step}: .*steps 3\.\.15, and is at 5"):
            motion.parts(step, w[4], w[5], seen.full[4])
