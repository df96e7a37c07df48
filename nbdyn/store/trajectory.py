"""Weights between snapshots, for a few parameters or whole tensors, without the model and the data.

weights[t+1] = optimizer(weights[t], grad[t]): the gradient of every step is rebuilt from factors, and torch's own
optimizer class takes the steps on flat tensors that hold the wanted weights alone, its state cut from the snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.schema import PART_SNAPSHOT
from nbdyn.settings import format_size, parse_size
from nbdyn.store import optimizer_state, state
from nbdyn.store.names import check_indices
from nbdyn.store.seen_gradients import CHUNK_BYTES, SeenGradients

if TYPE_CHECKING:
    import torch

    from nbdyn.store.optimizer_state import Snapshot
    from nbdyn.store.store import Store

ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD",
)  # fmt: skip
"""The optimizers of torch.optim whose update of a weight depends on that weight's own gradients alone."""
OFF_TOLERANCE = 1e-5
"""max|rebuilt - stored| / max|stored| at a snapshot beyond what rounding leaves: the optimizer's state is then read
again, too, not only the weights."""


@dataclass(frozen=True)
class Trajectory:
    """weights[t] of some parameters at consecutive steps.

    Attributes:
        steps: t, (n,) int64.
        values: (n, k) in the run's type of rows; as stored where they are stored, else rebuilt.
        parameters: global parameter indices, (k,).
        residuals: stored step -> max |rebuilt - stored|, for every stored row that was met on the way; the trajectory
            went on from the stored one.
        rebuilt: how many of the steps were not stored.
    """

    steps: np.ndarray
    values: np.ndarray
    parameters: np.ndarray
    residuals: dict[int, float]
    rebuilt: int

    @property
    def residual(self) -> float:
        """The largest of `residuals`; 0 if everything was stored, NaN if a rebuilt part met no stored row."""
        return max(self.residuals.values(), default=math.nan if self.rebuilt else 0.0)

    def __repr__(self) -> str:
        ends = f"[{self.steps[0]}..{self.steps[-1]}]" if len(self.steps) else "[]"
        met = f"residual {self.residual:.3g} at {len(self.residuals)} stored rows"
        how = f"{self.rebuilt} steps rebuilt, {met}" if self.rebuilt else "all stored"
        return f"<Trajectory of {len(self.parameters)} parameters, weights{ends}: {how}>"


def trajectory(store: Store, indices: np.ndarray, start: int, stop: int, max_bytes: str | int = "2 GB") -> Trajectory:
    """weights[t] of some parameters for start <= t < stop, rebuilt where they are not stored.

    Whole tensors of Linear layers: bit for bit on the same machine with as many threads. Else equal within fp32
    rounding (under AMP: of half precision), which `residual` tells; larger where Adam or its like divides a gradient
    that is rounding alone (a bias before a normalization), or a hook on a parameter changed its gradient.
    Cost: the factors of these parameters from the last snapshot before `start` on, about 50 us a step; memory n x k.

    Args:
        store: the run.
        indices: global parameter indices, (k,).
        start: first t.
        stop: end of the half-open range, at most the number of steps + 1.
        max_bytes: a larger result is refused.

    Raises:
        NotRecorded: if the optimizer is not elementwise, or a step's gradient was not captured whole and exactly.
        Incompatible: if an index lies outside the model.
        NbdynError: if the result would be larger than `max_bytes`.
    """
    indices = np.asarray(indices, np.int64).reshape(-1)
    _check(store, indices, start, stop)
    dtype = np.dtype(store.config["row_dtype"])
    nbytes = (stop - start) * len(indices) * dtype.itemsize
    if nbytes > parse_size(max_bytes):
        raise NbdynError(
            f"{stop - start:,} rows of {len(indices):,} weights take {format_size(nbytes)}, max_bytes={max_bytes}; "
            "ask for fewer steps or weights, or go through trajectory_chunks."
        )
    residuals: dict[int, float] = {}
    values = np.empty((stop - start, len(indices)), dtype)
    for steps, rows in trajectory_chunks(store, indices, start, stop, residuals=residuals):
        values[steps[0] - start : steps[-1] + 1 - start] = rows
    steps = np.arange(start, stop)
    rebuilt = len(np.setdiff1d(steps, store.weights.steps))
    return Trajectory(steps, values, indices, residuals, rebuilt)


def trajectory_chunks(
    store: Store,
    indices: np.ndarray,
    start: int,
    stop: int,
    overlap: int = 0,
    residuals: dict[int, float] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`trajectory` in pieces that stay small in memory.

    Args:
        store: the run.
        indices: global parameter indices, (k,).
        start: first t.
        stop: end of the half-open range.
        overlap: how many rows of a piece are given again at the head of the next one.
        residuals: is filled with stored step -> max |rebuilt - stored| as the pieces go by.

    Yields:
        Steps (n,) and values (n, k).

    Raises:
        NotRecorded, Incompatible: as `trajectory`.
    """
    indices = np.asarray(indices, np.int64).reshape(-1)
    _check(store, indices, start, stop)
    if start >= stop or not len(indices):
        if stop - start > overlap:
            yield np.arange(start, stop), np.empty((stop - start, 0), store.config["row_dtype"])
        return
    unique, back = np.unique(indices, return_inverse=True)
    height = max(overlap + 1, CHUNK_BYTES // (8 * len(unique)))
    pieces = _pieces(store, unique, start, stop, height - overlap, {} if residuals is None else residuals)
    kept = np.empty((0, len(unique)), store.config["row_dtype"])
    for first, rows in pieces:
        whole = np.concatenate([kept, rows]) if len(kept) else rows
        yield np.arange(first - len(kept), first + len(rows)), whole[:, back]
        kept = whole[len(whole) - min(overlap, len(whole)) :].copy()


def _check(store: Store, indices: np.ndarray, start: int, stop: int) -> None:
    check_indices(indices, store.config["tensors"])
    last = store.steps_committed
    if start < 0 or stop > last + 1:
        raise NotRecorded(f"{store.name} has weights[0] to weights[{last}]; {start}..{stop - 1} is not among them.")


def _pieces(
    store: Store, parameters: np.ndarray, start: int, stop: int, height: int, residuals: dict[int, float]
) -> Iterator[tuple[int, np.ndarray]]:
    """First step and rows (n, k) of consecutive ranges of at most `height` steps."""
    missing = np.setdiff1d(np.arange(start, stop), store.weights.steps)
    rebuilt = int(missing[0]) if len(missing) else stop
    for first in range(start, rebuilt, height):
        yield first, store.weights.read(parameters, first, min(first + height, rebuilt))[1]
    if not len(missing):
        return
    anchor = state.last_snapshot(store, rebuilt)
    if anchor is None:
        raise NotRecorded(f"{store.name} holds no snapshot at or before step {rebuilt} to begin from.")
    rebuilder = _Rebuilder(store, parameters, anchor, stop, residuals)
    for first in range(anchor, stop, height):
        rows = rebuilder.advance(first, min(first + height, stop))
        if first + len(rows) > rebuilt:
            cut = max(0, rebuilt - first)
            yield first + cut, rows[cut:]


class _Rebuilder:
    """An optimizer over some parameters alone, taking the recorded steps from a snapshot on.

    Args:
        store: the run.
        parameters: global indices, sorted and unique, (k,).
        anchor: step of the snapshot.
        stop: weights[stop - 1] are the last that are wanted.
        residuals: is filled with stored step -> max |rebuilt - stored|.
    """

    def __init__(
        self, store: Store, parameters: np.ndarray, anchor: int, stop: int, residuals: dict[int, float]
    ) -> None:
        import torch

        self._store, self._parameters, self._residuals = store, parameters, residuals
        self._anchor, self._last = anchor, stop - 1
        self._places = optimizer_state.places(store)
        kind = self._kind()
        self._seen = SeenGradients(store, parameters, anchor, self._last)
        self._snapshots = set(state.places(store, PART_SNAPSHOT).tolist())
        self._tensors = [store.config["tensors"][number] for number in self._seen.tensors]
        self._weights = [
            torch.zeros([c.stop - c.start] if t["shape"] else [], dtype=getattr(torch, t["dtype"]), requires_grad=True)
            for t, c in zip(self._tensors, self._seen.columns, strict=True)
        ]
        self._met = np.empty(0)  # the stored row that was met last
        self._set: Any = None  # the options that the optimizer has
        self._optimizer = self._build(kind)
        self._start_from(anchor)

    def _kind(self) -> Any:
        """The class of torch.optim of the recorded name."""
        import torch

        name = self._store.config["optimizer"]["name"]
        if name not in ELEMENTWISE:
            raise NotRecorded(
                f"{self._store.name} was trained with {name}; weights between snapshots are rebuilt without the model "
                f"for {', '.join(ELEMENTWISE)} only. Type run.replay({self._anchor}, {self._last}, model, loss_fn, "
                'data), or record with weights="every".'
            )
        return getattr(torch.optim, name)

    def _build(self, kind: Any) -> torch.optim.Optimizer | None:
        """The optimizer over those of the tensors that it updates, in their groups; None if there are none."""
        groups: list[dict[str, Any]] = [{"params": [], "lr": 0.0} for _ in self._store.config["optimizer"]["order"]]
        for tensor, weights in zip(self._tensors, self._weights, strict=True):
            if tensor["name"] in self._places:
                groups[self._places[tensor["name"]][0]]["params"].append(weights)
        return kind(groups) if any(group["params"] for group in groups) else None

    def _start_from(self, step: int) -> None:
        """Read the snapshot at a step: options from there on, the optimizer's state."""
        snapshot = optimizer_state.read_snapshot(self._store, step)
        self._first = step
        self._options = optimizer_state.options(self._store, snapshot, step, self._last)
        if self._optimizer is not None:
            self._optimizer.state.clear()
            self._put_state(self._optimizer, snapshot)

    def _put_state(self, optimizer: torch.optim.Optimizer, snapshot: Snapshot) -> None:
        numbers = {self._places[t["name"]][1]: n for n, t in enumerate(self._tensors) if t["name"] in self._places}
        for name, value in snapshot.tensors.items():
            kind, _, rest = name.partition("/")
            place, _, key = rest.partition("/")
            if kind == "optimizer" and int(place) in numbers:
                number = numbers[int(place)]
                optimizer.state[self._weights[number]][key] = self._cut(value, number)
        for name, value in snapshot.entries["optimizer_values"].items():
            place, _, key = name.partition("/")
            if int(place) in numbers:
                optimizer.state[self._weights[numbers[int(place)]]][key] = value

    def _cut(self, value: torch.Tensor, number: int) -> torch.Tensor:
        """Of a tensor of state the part of the wanted parameters; numbers, such as a count of steps, are whole."""
        import torch

        tensor = self._tensors[number]
        if value.ndim == 0:
            return value.clone()
        if list(value.shape) != tensor["shape"]:
            raise Incompatible(
                f"the optimizer's state of {tensor['name']} has the shape {list(value.shape)}, not {tensor['shape']}; "
                f"type run.replay({self._anchor}, {self._last}, model, loss_fn, data)."
            )
        local = self._parameters[self._seen.columns[number]] - tensor["first"]
        return value.reshape(-1)[torch.from_numpy(local)]

    def advance(self, start: int, stop: int) -> np.ndarray:
        """weights[start..stop-1], (n, k); the step from stop - 1 on is taken, too, if there is one."""
        gradients = self._gradients(start, min(stop, self._last))
        steps, rows = self._store.weights.read(self._parameters, start, stop)
        stored = dict(zip(steps.tolist(), rows, strict=True))
        found = np.empty((stop - start, len(self._parameters)), rows.dtype)
        for step in range(start, stop):
            row = found[step - start]
            for columns, weights in zip(self._seen.columns, self._weights, strict=True):
                row[columns] = _as_numpy(weights)
            if step in stored:
                self._meet(step, row, stored[step])
                row[:] = stored[step]
            if step < self._last and not self._seen.skipped[step - self._anchor]:
                self._step(step, [tensor[step - start] for tensor in gradients])
        return found

    def _gradients(self, start: int, stop: int) -> list[tuple[torch.Tensor, ...]]:
        """Of each tensor the gradient of each step as the optimizer saw it."""
        import torch

        values = torch.from_numpy(self._seen.read(start, stop))
        factor = torch.from_numpy(self._seen.factor[start - self._anchor : stop - self._anchor])
        found = []
        for columns, weights in zip(self._seen.columns, self._weights, strict=True):
            # First rounded as p.grad is, then multiplied, as clipping does.
            gradient = values[:, columns].to(weights.dtype) * factor.to(weights.dtype)[:, None]
            found.append(gradient.reshape(-1, *weights.shape).unbind())
        return found

    def _step(self, step: int, gradients: list[torch.Tensor]) -> None:
        """One step of the optimizer, with the options of that step."""
        if self._optimizer is None:
            return
        present = self._seen.present[step - self._anchor]
        for weights, gradient, there in zip(self._weights, gradients, present, strict=True):
            weights.grad = gradient if there else None
        options = self._options[step - self._first]
        if options is not self._set:
            # Both change how a step is computed, not what: one needs a GPU, the other keeps a graph.
            plain = {"capturable": False, "differentiable": False}
            known = self._optimizer.defaults
            simple = [group | {key: value for key, value in plain.items() if key in known} for group in options]
            optimizer_state.set_groups(self._optimizer, simple)
            self._set = options
        self._optimizer.step()

    def _meet(self, step: int, rebuilt: np.ndarray, stored: np.ndarray) -> None:
        """Go on from a stored row; from the stored state of the optimizer, too, where the rebuilt one cannot be right.

        Elsewhere the state goes on as it was rebuilt: to read a snapshot is to read all of the network's.
        """
        import torch

        if step != self._anchor:
            residual = self._residuals[step] = _difference(rebuilt, stored)
            size = max(np.abs(stored).max(), np.abs(stored - self._met).max())
            off = not residual <= OFF_TOLERANCE * size
            if (off or step in self._store.config.get("seams", [])) and step in self._snapshots:
                self._start_from(step)
        self._met = stored
        with torch.no_grad():
            for columns, weights in zip(self._seen.columns, self._weights, strict=True):
                weights.copy_(torch.from_numpy(stored[columns]).reshape(weights.shape))


def _as_numpy(weights: torch.Tensor) -> np.ndarray:
    """Weights as NumPy has them: bfloat16 as float32, without loss."""
    import torch

    detached = weights.detach()
    return (detached.float() if detached.dtype == torch.bfloat16 else detached).numpy()


def _difference(rebuilt: np.ndarray, stored: np.ndarray) -> float:
    """The largest |rebuilt - stored|; equal infinities and two NaN differ by nothing."""
    apart = (rebuilt != stored) & ~(np.isnan(rebuilt) & np.isnan(stored))
    return float(np.max(np.abs(rebuilt[apart].astype(np.float64) - stored[apart]), initial=0.0))
