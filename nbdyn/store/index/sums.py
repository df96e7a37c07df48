"""Running sums of one group of parameters over the steps of a span, and histograms of its batch gradients."""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store.index import exponents
from nbdyn.store.index.plan import Group, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from nbdyn.store.store import Store


class Histograms:
    """Histograms of the batch gradients of every step, tensor by tensor; groups add what they hold of a tensor.

    Attributes:
        of: number of a tensor -> (steps, BINS) int32; -1 at steps that were not captured.
    """

    def __init__(self, store: Store, plan: Plan) -> None:
        self._plan = plan
        self._sizes = [tensor["size"] for tensor in store.config["tensors"]]
        firsts = [tensor["first"] for tensor in store.config["tensors"]]
        self._parts = [_cut(group.runs, firsts) for group in plan.groups]
        self.of: dict[int, np.ndarray] = {}

    def begin(self, number: int) -> None:
        """Prepare for the group of a number: until something is added, all gradients of its tensors are zero."""
        for tensor, _ in self._parts[number]:
            if tensor not in self.of:
                self.of[tensor] = np.full((self._plan.stop - self._plan.start, exponents.BINS), -1, np.int32)
                at = self._plan.captured - self._plan.start
                self.of[tensor][at] = 0
                self.of[tensor][at, exponents.ZERO] = self._sizes[tensor]

    def add(self, number: int, step: int, grad: Tensor) -> None:
        """Add the batch gradient of a step, (n,) in the order of the group's runs."""
        before = 0
        for tensor, size in self._parts[number]:
            row = self.of[tensor][step - self._plan.start]
            row += exponents.counts(grad[before : before + size])
            row[exponents.ZERO] -= size
            before += size

    def finished(self, number: int) -> dict[int, np.ndarray]:
        """Take out the tensors of which no later group holds anything."""
        later = {tensor for parts in self._parts[number + 1 :] for tensor, _ in parts}
        return {tensor: self.of.pop(tensor) for tensor in {tensor for tensor, _ in self._parts[number]} - later}


def _cut(runs: tuple[tuple[int, int], ...], firsts: list[int]) -> list[tuple[int, int]]:
    """Runs of parameters cut where tensors begin: the tensor and the size of each part.

    >>> _cut(((0, 10), (20, 5)), [0, 6, 12, 20])
    [(0, 6), (1, 4), (3, 5)]
    """
    found = []
    for first, size in runs:
        inside = [start for start in firsts if first < start < first + size]
        for start, stop in itertools.pairwise([first, *inside, first + size]):
            found.append((bisect.bisect_right(firsts, start) - 1, stop - start))
    return found


class Sums:
    """Sums over the visits and steps of a span, float64; parameters in the order of the group's runs."""

    def __init__(self, plan: Plan, group: Group) -> None:
        self._plan = plan
        names = ("sum_grad", "sum_abs_grad", "sum_sq_grad", "sum_g", "sum_abs_g", "sum_sq_g")
        self._of = {name: np.zeros(group.size) for name in names}
        self._of_class = {name: np.zeros((plan.classes, group.size)) for name in ("sum_g", "sum_abs_g")}

    @property
    def wanted(self) -> tuple[str, ...]:
        """The moments to `add` for the visits of one class; c^2 is not told apart by class."""
        return ("sum_abs",) if self._plan.grads and not self._plan.classes else ("sum", "sum_abs")

    def add_grad(self, step: int, grad: Tensor) -> None:
        """Add a step: what its captured visits add to p.grad, (n,)."""
        import torch

        scale = float(self._plan.scale[step - self._plan.start])
        names = ("sum_g", "sum_grad", "sum_sq_grad", "sum_abs_grad")
        columns = zip(*(torch.from_numpy(self._of[name]).split(exponents.CHUNK) for name in names), strict=True)
        for part, (own, plain, square, absolute) in zip(grad.split(exponents.CHUNK), columns, strict=True):
            wide = part.double()
            own.add_(wide, alpha=scale)
            plain.add_(wide)
            square.addcmul_(wide, wide)
            absolute.add_(wide.abs_())

    def add(self, label: int, moments: dict[str, np.ndarray]) -> None:
        """Add sums over some visits of one class (-1 for none): "sum", "sum_abs", "sum_sq" of g, any of them."""
        for name, values in moments.items():
            if name != "sum" or not self._plan.grads:
                self._of[name + "_g"] += values
            if name != "sum_sq" and 0 <= label < self._plan.classes:
                self._of_class[name + "_g"][label] += values

    def take(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What is stored of the span, float32, squares as their roots: (n,) each and (classes, n) each; begin anew."""
        found = {name.replace("sum_sq", "norm"): _narrow(x, name.startswith("sum_sq")) for name, x in self._of.items()}
        if not self._plan.grads:
            found |= {name: np.full_like(x, np.nan) for name, x in found.items() if name.endswith("grad")}
        of_class = {name: _narrow(values) for name, values in self._of_class.items()}
        for values in (*self._of.values(), *self._of_class.values()):
            values[:] = 0
        return found, of_class


def _narrow(values: np.ndarray, is_square: bool = False) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.sqrt(values) if is_square else values).astype(np.float32)
