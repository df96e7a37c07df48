"""Param groups of frozen and delayed layers: what torch's SGD makes of them, against closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nbdyn.analysis.lca.layerwise import delay_of_momentum, delayed, frozen, momentum_of_delay, param_groups
from nbdyn.errors import Incompatible, NbdynError, UnknownName
from tests import problems

CURVATURE, STEPS = 0.7, 30


def network() -> nn.Sequential:
    return problems.mlp(4, 5, 3, 2).double()


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[np.ndarray]:
    """Weights before each step and after the last on L = curvature/2 |w|^2."""
    seen = [problems.flat(model).numpy()]
    for _ in range(steps):
        optimizer.zero_grad()
        sum((CURVATURE / 2 * (p**2).sum() for p in model.parameters()), torch.zeros(())).backward()
        optimizer.step()
        seen.append(problems.flat(model).numpy())
    return seen


def closed_form(start: np.ndarray, lr: float, momentum: float, steps: int = STEPS) -> list[np.ndarray]:
    """w[t+1] = (1 + m - lr c) w[t] - m w[t-1]: the heavy ball on a quadratic, by powers of its 2 x 2 matrix."""
    matrix = np.array([[1 + momentum - lr * CURVATURE, -momentum], [1.0, 0.0]])
    return [np.linalg.matrix_power(matrix, t)[0].sum() * start for t in range(steps + 1)]


def names(model: nn.Module, groups: list[dict[str, Any]]) -> list[list[str]]:
    found = {id(p): name for name, p in model.named_parameters()}
    return [[found[id(p)] for p in group["params"]] for group in groups]


def test_groups_by_layer_tensor_and_pattern() -> None:
    model = network()
    groups = param_groups(model, {"4": {"lr": 0.01}, "0.w*": {"momentum": 0.5}}, lr=0.1, momentum=0.9)
    assert names(model, groups) == [["0.bias", "2.weight", "2.bias"], ["4.weight", "4.bias"], ["0.weight"]]
    assert [(g["lr"], g["momentum"]) for g in groups] == [(0.1, 0.9), (0.01, 0.9), (0.1, 0.5)]
    assert names(model, param_groups(model, {"all": {}}, lr=0.1)) == [[n for n, _ in model.named_parameters()]]


def test_sgd_takes_the_steps_of_each_group() -> None:
    model = network()
    groups = param_groups(model, {"4.*": {"lr": 0.01}, "0": {"momentum": 0.5}}, lr=0.1, momentum=0.9)
    seen = descend(model, torch.optim.SGD(groups))
    rates = [(0.1, 0.5, slice(0, 25)), (0.1, 0.9, slice(25, 43)), (0.01, 0.9, slice(43, 51))]
    for lr, momentum, where in rates:
        expected = closed_form(seen[0][where], lr, momentum)
        np.testing.assert_allclose([row[where] for row in seen], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_frozen_layers_do_not_move(kind: Any) -> None:
    model = network()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    groups = frozen(model, "0", "4.weight", lr=0.1, weight_decay=0.3, **options)
    assert names(model, groups) == [["2.weight", "2.bias", "4.bias"], ["0.weight", "0.bias"], ["4.weight"]]
    seen = descend(model, kind(groups))
    still = np.r_[0:25, 43:49]
    assert all(np.array_equal(row[still], seen[0][still]) for row in seen)
    assert (np.delete(seen[-1], still) != np.delete(seen[0], still)).all()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_mean_age_of_the_gradients_in_an_update() -> None:
    """One gradient of 1, then none: the shares of its momentum tell how old it is in each later update."""
    for delay in (0, 1, 2.5, 9):
        p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([p], 1.0, momentum=momentum_of_delay(delay))
        moves = []
        for step in range(800):
            before = p.item()
            p.grad = torch.full((1,), float(step == 0), dtype=torch.float64)
            optimizer.step()
            moves.append(before - p.item())
        assert np.average(np.arange(800), weights=moves) == pytest.approx(delay, abs=1e-9)
        assert delay_of_momentum(momentum_of_delay(delay)) == pytest.approx(delay)


@pytest.mark.parametrize("matched", [False, True])
def test_delayed(matched: bool) -> None:
    model = network()
    groups = delayed(model, "4", 3, 0.1, 0.9, matched)
    assert names(model, groups)[1] == ["4.weight", "4.bias"]
    rate = 0.1 * (1 - 0.75) / (1 - 0.9) if matched else 0.1
    assert groups[1]["momentum"] == 0.75 and groups[1]["lr"] == pytest.approx(rate)
    # a constant gradient: in the end every weight moves by lr / (1 - m) a step
    optimizer, before = torch.optim.SGD(groups), problems.flat(model)
    for _ in range(400):
        before = problems.flat(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = (before - problems.flat(model)).numpy()
    np.testing.assert_allclose(moved[:43], 1.0, rtol=1e-9)
    np.testing.assert_allclose(moved[43:], 1.0 if matched else 0.4, rtol=1e-9)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight


def test_tied_parameters_are_in_one_group() -> None:
    model = Tied()
    groups = param_groups(model, {"decoder": {"lr": 0.01}}, lr=0.1)
    assert names(model, groups) == [["encoder.weight", "decoder.bias"]]  # the first name of the tied one
    assert names(model, param_groups(model, {"encoder": {}}, lr=0.1)) == [["decoder.bias"], ["encoder.weight"]]
    with pytest.raises(Incompatible, match=r'"encoder" and "decoder" both name encoder\.weight = decoder\.weight'):
        param_groups(model, {"encoder": {}, "decoder": {}}, lr=0.1)


def test_wrong_names_and_numbers() -> None:
    model = network()
    with pytest.raises(UnknownName, match=r'no parameter tensor "4\.wieght"; did you mean "4\.weight"'):
        frozen(model, "4.wieght", lr=0.1)
    with pytest.raises(UnknownName, match=r'"4" sets momentm.*did you mean "momentum"'):
        param_groups(model, {"4": {"momentm": 0.5}}, lr=0.1, momentum=0.9)
    with pytest.raises(UnknownName, match=r"param_groups\(model, layers, \.\.\., momentum=\.\.\.\)"):
        param_groups(model, {"4": {"momentum": 0.5}}, lr=0.1)
    with pytest.raises(Incompatible, match=r'"4\.weight\[0,:\]" names a part of a tensor'):
        frozen(model, "4.weight[0,:]", lr=0.1)
    for delay in (-1, float("inf"), float("nan")):
        with pytest.raises(NbdynError, match="delay="):
            momentum_of_delay(delay)
    for momentum in (-0.1, 1.0):
        with pytest.raises(NbdynError, match="momentum="):
            delay_of_momentum(momentum)
