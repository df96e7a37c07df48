"""Recorded weights, by tensor, by element, by step: exact bits as they were on the training device."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbdyn.errors import Incompatible, NotRecorded
from nbdyn.store.backend import reading
from nbdyn.store.names import Selection, check_indices, locate, select
from nbdyn.store.provenance import with_provenance

if TYPE_CHECKING:
    from nbdyn.store.store import Store

RUN_GAP = 64
"""Selected parameters nearer than this are read as one range (a tile holds at least 1,024)."""


class Weights:
    """The weights of a run: `weights[t]` are those before step t, `weights[T]` the final ones.

    >>> # run.weights["fc1.weight", 0:100]        -> ndarray (stored steps, *shape of fc1.weight)
    >>> # run.weights["fc1.weight[3,5]"]          -> ndarray (stored steps,)
    >>> # run.weights[41_025]                     -> the same by global parameter index
    >>> # run.weights["fc1.*"], run.weights["all", 5]
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def steps(self) -> np.ndarray:
        """The steps t whose row weights[t] is stored, (n,) int64."""
        store, every = self._store, self._store.config["every"]
        end = store.steps_committed
        steps = np.arange(0, end, 1 if store.config["weights"] == "every" else every, dtype=np.int64)
        # The row after the last step exists once the run was closed; resumed runs have one at each seam.
        seams = np.array([s for s in store.config.get("seams", []) if s <= end], dtype=np.int64)
        return np.union1d(steps, seams)

    def read(self, indices: np.ndarray, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Values of some parameters at all stored steps of start <= t < stop.

        Args:
            indices: global parameter indices, (k,).
            start: first step.
            stop: end of the half-open range; None for all.

        Returns:
            The steps (n,) and the values (n, k), float32 (float64 for float64 models).

        Raises:
            Incompatible: if an index lies outside the model.
            CorruptRun: if the files are damaged.
        """
        check_indices(indices, self._store.config["tensors"])
        steps = self.steps
        steps = steps[(steps >= start) & (steps < (stop if stop is not None else np.inf))]
        values = np.empty((len(steps), len(indices)), dtype=self._store.config["row_dtype"])
        if values.size == 0:
            return steps, values
        unique, back = np.unique(indices, return_inverse=True)
        back = slice(None) if np.array_equal(unique, indices) else back
        pieces = np.split(unique, np.nonzero(np.diff(unique) > RUN_GAP)[0] + 1)
        with self._store.open("weights") as array, reading(array.uri):
            for place, a, b in _ranges(steps):
                blocks = [_read_piece(array, a, b, piece) for piece in pieces]
                block = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
                values[place : place + b - a] = block[:, back].view(values.dtype)
        return steps, values

    def row(self, step: int) -> np.ndarray:
        """The whole vector weights[step], (parameters,).

        Raises:
            NotRecorded: if that row is not stored; the message names the nearest that is.
        """
        self.require(step)
        with self._store.open("weights") as array, reading(array.uri):
            return array[step, :]["bits"].view(self._store.config["row_dtype"])

    def require(self, step: int) -> None:
        """Raise NotRecorded, naming the nearest stored step, unless weights[step] is stored."""
        steps = self.steps
        if step in steps:
            return
        store = self._store
        if not len(steps) or not 0 <= step <= store.steps_committed:
            raise NotRecorded(f"{store.name} holds weights of steps 0..{steps[-1] if len(steps) else '-'}, not {step}.")
        near = int(steps[np.abs(steps - step).argmin()])
        raise NotRecorded(
            f"{store.name} holds snapshots every {store.config['every']} steps, not weights[{step}]; the nearest is "
            f"weights[{near}]. Type run.replay({step}, {step}, model, loss_fn, data) to rebuild it, "
            'or record with weights="every".'
        )

    def __getitem__(self, key: Any) -> np.ndarray:
        """Values by selector and steps; see the class. A slice takes the stored rows among its steps.

        Raises:
            NotRecorded: if a single step is asked for whose row is not stored.
            UnknownName: if the selector names no tensor.
            Incompatible: if the key is no selector, or no selector and steps.
        """
        selection, steps = self._parse(key)
        if isinstance(steps, int):
            steps = steps + self._store.steps_committed + 1 if steps < 0 else steps
            self.require(steps)
            return self.read(selection.indices, steps, steps + 1)[1].reshape(selection.shape)
        values = self._rows(selection.indices, steps)[1]
        return values.reshape(len(values), *selection.shape)

    def _rows(self, indices: np.ndarray, steps: slice) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the stored rows among the steps of a slice, in its direction."""
        wanted = range(*steps.indices(self._store.steps_committed + 1))
        if not wanted:
            return self.read(indices, 0, 0)
        found, values = self.read(indices, min(wanted), max(wanted) + 1)
        if abs(wanted.step) > 1:
            kept = (found - wanted.start) % wanted.step == 0
            found, values = found[kept], values[kept]
        return (found, values) if wanted.step > 0 else (found[::-1], values[::-1])

    def frame(self, selector: str | int = "all", steps: slice = slice(None)) -> pd.DataFrame:
        """A tidy frame: step, parameter (global index), tensor, index (its label), value.

        Cost: n_steps x n_parameters rows; select before asking.
        """
        selection, steps = self._parse((selector, steps))
        found, values = self._rows(selection.indices, steps)
        owner, labels = locate(selection.indices, self._store.config["tensors"])
        names = np.array([t["name"] for t in self._store.config["tensors"]], dtype=object)[owner]
        n, k = values.shape
        frame = pd.DataFrame(
            {
                "step": np.repeat(found, k),
                "parameter": np.tile(selection.indices, n),
                "tensor": np.tile(names, n),
                "index": np.tile(np.array(labels, dtype=object), n),
                "value": values.reshape(-1),
            }
        )
        return with_provenance(frame, self._store, f"weights of {selection.text}")

    def _parse(self, key: Any) -> tuple[Selection, Any]:
        """A key's selection and its steps."""
        selector, steps = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
        tensors = self._store.config["tensors"]
        if isinstance(selector, (int, np.integer)):
            indices = np.array([selector], dtype=np.int64)
            owner, labels = locate(indices, tensors)
            return Selection(labels[0], (tensors[owner[0]]["name"],), indices, ()), _step(steps)
        if selector is Ellipsis or (isinstance(selector, slice) and selector == slice(None)):
            selector = "all"
        if not isinstance(selector, str):
            raise Incompatible(
                f'{selector!r} selects no weights; type weights["fc1.weight", 0:100] or weights[41_025].'
            )
        return select(selector, tensors), _step(steps)

    def __repr__(self) -> str:
        return f"weights of {self._store.name}: {len(self.steps)} stored steps x {self._store.parameters:,} parameters"

    def _ipython_key_completions_(self) -> list[str]:
        return [t["name"] for t in self._store.config["tensors"]]


def _step(steps: Any) -> Any:
    """One step as an int, or a slice of whole numbers."""
    if isinstance(steps, (int, np.integer)):
        return int(steps)
    try:
        steps.indices(1)
    except (AttributeError, TypeError, ValueError):
        raise Incompatible(f"{steps!r} is neither a step nor a slice of steps, such as 0:100.") from None
    return steps


def _ranges(steps: np.ndarray) -> list[tuple[int, int, int]]:
    """(place, start, stop) of each range of consecutive steps: rows that are not stored must not be read as fill."""
    cuts = np.concatenate([[0], np.nonzero(np.diff(steps) > 1)[0] + 1, [len(steps)]])
    return [(int(a), int(steps[a]), int(steps[b - 1]) + 1) for a, b in itertools.pairwise(cuts)]


def _read_piece(array: Any, start: int, stop: int, piece: np.ndarray) -> np.ndarray:
    first = int(piece[0])
    block = array[start:stop, first : int(piece[-1]) + 1]["bits"]
    return block if block.shape[1] == len(piece) else block[:, piece - first]
