"""Loss change allocation of single steps: exact where a rule is, of the right order, within the tolerance asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nbdyn.analysis.lca.engine import Allocator, StepAllocation
from nbdyn.analysis.lca.objective import Objective
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.rules import RULES
from nbdyn.analysis.lca.samples import samples_of
from nbdyn.errors import NbdynError

HIGHER = ("simpson", "boole", "gauss")


def points(count: int, size: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Weights at random, (count, size)."""
    return np.random.default_rng(seed).normal(size=(count, size)) * scale


def allocate(objective: Objective, weights: np.ndarray, precision: Precision) -> list[StepAllocation]:
    allocator = Allocator(objective, precision)
    return [allocator.step(a, b) for a, b in itertools.pairwise(weights)]


def regression() -> tuple[Objective, np.ndarray, np.ndarray]:
    """Linear regression without bias, and H, c of its loss w'Hw/2 - c'w + const."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False).double()
    hessian, linear = 2 * (x.T @ x).numpy() / 40, 2 * (x.T @ y).numpy()[:, 0] / 40
    return Objective(model, nn.MSELoss(), samples_of((x, y))), hessian, linear


class Cubic(nn.Module):
    """The mean output over samples is a cubic polynomial of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w) ** 3 + (x @ self.w) ** 2 - self.w[0] * self.w[1] * self.w[2] * x[:, 0]


def cubic() -> tuple[Objective, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(30, 4, dtype=torch.float64)
    return Objective(Cubic(), lambda outputs, _: outputs.mean(), samples_of((x, torch.zeros(30)))), x


def network(kind: type[nn.Module] = nn.Tanh, seed: int = 0) -> Objective:
    """A small classifier, float64."""
    torch.manual_seed(seed)
    x, y = torch.randn(60, 4, dtype=torch.float64), torch.randint(0, 3, (60,))
    model = nn.Sequential(nn.Linear(4, 6), kind(), nn.Linear(6, 3)).double()
    return Objective(model, nn.CrossEntropyLoss(), samples_of((x, y)))


# Exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["trapezoid", *HIGHER, "adaptive"])
@pytest.mark.parametrize("splits", [1, 3])
def test_quadratic_losses_are_exact_for_each_parameter(rule: str, splits: int) -> None:
    objective, hessian, linear = regression()
    weights = points(6, 5)
    precision = Precision(rule) if rule == "adaptive" else Precision(rule, splits)
    steps = allocate(objective, weights, precision)
    for step, a, b in zip(steps, weights, weights[1:], strict=False):
        expected = (hessian @ (a + b) / 2 - linear) * (b - a)  # the gradient is linear: its mean is that in the middle
        assert np.abs(step.cells - expected).max() < 1e-12
        assert abs(step.residual) < 1e-12 and step.met
        assert np.array_equal(step.motion, b - a) and step.loss == objective(a).loss
    if rule == "adaptive":  # the ends suffice; all but one are shared with a neighbour
        assert [step.gradients for step in steps] == [2, 1, 1, 1, 1] and {step.nodes for step in steps} == {2}


def test_first_order_misses_half_the_curvature() -> None:
    objective, hessian, linear = regression()
    a, b = points(2, 5)
    (step,) = allocate(objective, np.stack([a, b]), Precision("first order"))
    assert np.allclose(step.cells, (hessian @ a - linear) * (b - a), rtol=0, atol=1e-12)
    assert step.residual == pytest.approx((b - a) @ hessian @ (b - a) / 2, abs=1e-12)
    assert np.isnan(step.error).all()  # it has no coarser rule


@pytest.mark.parametrize("rule", [*HIGHER, "adaptive"])
def test_cubic_losses_are_exact_from_simpson_on(rule: str) -> None:
    objective, x = cubic()
    a, b = points(2, 4)
    precision = Precision(rule, tolerance=1e-12) if rule == "adaptive" else Precision(rule)
    (step,) = allocate(objective, np.stack([a, b]), precision)
    # The mean of each component of the gradient, a quadratic of s, by exact integration of its polynomial.
    xs, d = x.numpy(), b - a
    u, v = np.polynomial.Polynomial, np.polynomial.Polynomial
    expected = np.zeros(4)
    w = [v([a[i], d[i]]) for i in range(4)]
    for row in xs:
        z = u([row @ a, row @ d])
        slope = 3 * z**2 + 2 * z
        for i in range(4):
            expected[i] += (slope * row[i]).integ()(1.0) / len(xs)
    for i, (j, k) in enumerate(((1, 2), (0, 2), (0, 1))):
        expected[i] -= (w[j] * w[k]).integ()(1.0) * xs[:, 0].mean()
    assert np.abs(step.cells - expected * d).max() < 1e-12 * 10
    assert abs(step.residual) < 1e-11 and step.met
    (rough,) = allocate(objective, np.stack([a, b]), Precision("trapezoid"))
    assert abs(rough.residual) > 1e-3 and np.abs(rough.cells - expected * d).max() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_orders_of_convergence(rule: str) -> None:
    objective = network()
    a, b = points(2, objective.parameters)
    b = a + 0.3 * (b - a)
    finest = allocate(objective, np.stack([a, b]), Precision("gauss", 40))[0].cells
    sums, cells = [], []
    for splits in (1, 2, 4, 8, 16):
        (step,) = allocate(objective, np.stack([a, b]), Precision(rule, splits))
        sums.append(abs(step.residual))
        cells.append(np.abs(step.cells - finest).max())
    order = RULES[rule][2]
    for errors in (sums, cells):
        rates = np.log2(np.array(errors[:-1]) / errors[1:])
        assert rates[-1] == pytest.approx(order, abs=0.3) and (rates[1:] > order - 1).all(), errors


@pytest.mark.parametrize("rule", [*RULES, "adaptive"])
def test_a_step_that_does_not_move_changes_nothing(rule: str) -> None:
    objective = network()
    a, b = points(2, objective.parameters)
    steps = allocate(objective, np.stack([a, a, b, b, b]), Precision(rule))
    assert [step.cells.any() for step in steps] == [False, True, False, False]
    assert all(step.residual == 0 and step.met for step in steps if not step.motion.any())
    assert steps[1].cells.tobytes() == allocate(objective, np.stack([a, b]), Precision(rule))[0].cells.tobytes()


# The trap of the ends -------------------------------------------------------------------------------------------


def test_rules_that_only_see_one_end_mislead() -> None:
    """On a convex loss the left end overstates the decrease at every step; the right end turns its very sign."""
    objective, hessian, linear = regression()
    rate, momentum = 1.9 / np.linalg.eigvalsh(hessian).max(), 0.9
    w, velocity = points(1, 5, 3.0)[0], np.zeros(5)
    path = [w]
    for _ in range(60):
        velocity = momentum * velocity + hessian @ w - linear
        w = w - rate * velocity
        path.append(w)
    weights = np.array(path)
    exact = allocate(objective, weights, Precision("trapezoid"))
    left = allocate(objective, weights, Precision("first order"))
    change = objective(weights[-1]).loss - objective(weights[0]).loss
    assert change < -1 and sum(step.cells.sum() for step in exact) == pytest.approx(change, abs=1e-10)
    assert all(step.residual > 0 for step in left)
    assert sum(step.cells.sum() for step in left) < 1.5 * change  # overstated by more than half
    gradients = weights @ hessian - linear
    right = (gradients[1:] * np.diff(weights, axis=0)).sum()
    assert right > 0 > change  # the loss fell, and this says that the parameters hurt
    for step, gradient in zip(exact, gradients[1:], strict=True):
        assert step.grad_after is not None and np.allclose(step.grad_after, gradient, atol=1e-10)


# Adaptive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Tanh, nn.ReLU])
def test_tolerances_are_honoured(kind: type[nn.Module]) -> None:
    objective = network(kind)
    start = points(1, objective.parameters, 0.5)[0]
    path = start + np.concatenate([np.zeros((1, len(start))), points(25, len(start), 0.15, 5)]).cumsum(0)
    precision = Precision(tolerance=1e-4, total=1e-3, most=257)
    steps = allocate(objective, path, precision)
    losses = np.array([objective(w, gradient=False).loss for w in path])
    residuals = np.diff(losses) - [step.cells.sum() for step in steps]
    assert all(step.met for step in steps)
    assert np.abs(residuals).max() <= 1e-4 * (1 + 1e-9)
    assert abs(residuals.sum()) <= 1e-3 * np.abs(losses - losses[0]).max()
    fine = allocate(objective, path, Precision("trapezoid", 400))
    off = np.array([np.abs(a.cells - b.cells).sum() for a, b in zip(steps, fine, strict=True)])
    scale = np.array([np.abs(b.cells).sum() for b in fine])
    assert (off <= 0.02 * scale + 1e-3).all()
    assert max(step.nodes for step in steps) > 2  # that it had to refine at all


def test_a_smaller_tolerance_costs_more_and_gives_more() -> None:
    objective = network(nn.ReLU)
    weights = points(2, objective.parameters)
    found = [allocate(objective, weights, Precision(tolerance=t, total=1.0, most=2000))[0] for t in (1e-1, 1e-3, 1e-5)]
    assert all(abs(step.residual) <= t for step, t in zip(found, (1e-1, 1e-3, 1e-5), strict=True))
    assert found[0].nodes < found[1].nodes < found[2].nodes
    fine = allocate(objective, weights, Precision("trapezoid", 2000))[0].cells
    off = [np.abs(step.cells - fine).max() for step in found]
    assert off[0] > off[1] > off[2] and off[2] < 1e-4


@pytest.mark.parametrize("most", [3, 5, 9])
def test_the_cap_on_nodes_is_kept_and_told(most: int) -> None:
    objective = network(nn.ReLU)
    (step,) = allocate(objective, points(2, objective.parameters, 2.0), Precision(tolerance=1e-12, most=most))
    assert not step.met and step.nodes <= most
    assert abs(step.residual) > 1e-12


@pytest.mark.parametrize("rule", ["trapezoid", "simpson", "boole", "gauss", "adaptive"])
def test_the_error_of_each_parameter_is_covered(rule: str) -> None:
    objective = network()
    path = points(1, objective.parameters) + np.concatenate(
        [np.zeros((1, objective.parameters)), points(12, objective.parameters, 0.1, 7)]
    ).cumsum(0)
    steps = allocate(objective, path, Precision(rule))
    fine = allocate(objective, path, Precision("gauss", 8))
    covered = [np.abs(a.cells - b.cells) <= a.error for a, b in zip(steps, fine, strict=True)]
    assert np.mean(covered) >= 0.9


@pytest.mark.parametrize("where", [0, 1, 2, 4])
@pytest.mark.parametrize("rule", ["simpson", "gauss", "adaptive"])
def test_a_loss_that_is_no_number_ends_nothing(rule: str, where: int) -> None:
    objective, _ = cubic()
    path = points(5, 4)
    path[where] = 1e150  # the loss overflows there and on the way
    steps = allocate(objective, path, Precision(rule, most=65))
    broken = [not np.isfinite(step.residual) for step in steps]
    assert broken == [where in (n, n + 1) for n in range(4)]
    assert [step.met for step in steps] == [not b for b in broken]
    assert all(np.isfinite(step.cells).all() for step, b in zip(steps, broken, strict=True) if not b)
    assert objective.gradients < 300


def test_gradients_are_counted_and_shared() -> None:
    objective = network()
    path = points(4, objective.parameters)
    for rule, counts in {
        "first order": [2, 1, 1], "trapezoid": [2, 1, 1], "simpson": [3, 2, 2], "boole": [5, 4, 4], "gauss": [3, 3, 3]
    }.items():  # fmt: skip
        before = objective.gradients
        steps = allocate(objective, path, Precision(rule))
        assert [step.gradients for step in steps] == counts and objective.gradients - before == sum(counts)
        assert [step.loss for step in steps[1:]] == [step.loss_after for step in steps[:-1]]


def test_what_is_no_precision_is_refused() -> None:
    for options, match in (
        ({"integrator": "simson"}, "simpson"), ({"splits": 2}, "splits"), ({"tolerance": 0.0}, "positive"),
        ({"total": -1.0}, "positive"), ({"most": 2}, "at least 3"), ({"integrator": "boole", "splits": 0}, "splits"),
        ({"tolerance": float("nan")}, "positive"),
    ):  # fmt: skip
        with pytest.raises(NbdynError, match=match):
            Precision(**options)
