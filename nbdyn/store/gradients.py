"""The per-sample gradients of a run: a sparse array (step, parameter, sample), in factors or written out."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbdyn.errors import Incompatible, NotRecorded
from nbdyn.schema import RESIDUAL
from nbdyn.store.gradient_cells import Cells
from nbdyn.store.gradient_reader import Asked
from nbdyn.store.names import Selection, check_indices, locate, select
from nbdyn.store.projection import is_projected
from nbdyn.store.provenance import with_provenance
from nbdyn.store.written_cells import WrittenCells

if TYPE_CHECKING:
    from nbdyn.store.store import Store

_ALL = slice(None)


class Gradients:
    """Per-sample gradients: `run.gradients[step, parameter, sample]`.

    Each of the three is a number, a list of numbers, a half-open slice or `...` for all; steps may be negative (from
    the end); `parameter` also a selector. What is left out at the end means all; a selector alone means all steps.
    Every cell is there as soon as a step is committed: computed from factors, exactly, on read.

    >>> # run.gradients[100, "fc1.weight[3,5]"].frame()     -> who moved this weight at step 100, and by how much
    >>> # run.gradients[:, "fc3.*", 4711].coo()              -> what sample 4711 did to the last layer, always
    >>> # run.gradients["fc1.weight"].total()                -> p.grad of every step
    >>> # run.gradients.rebuild(100)["fc1.weight"]           -> p.grad of one step
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._written = WrittenCells(store)

    @property
    def steps(self) -> np.ndarray:
        """The steps of which anything is recorded, (n,) int64."""
        return np.union1d(self._captured, self._written.steps(0, self._store.steps_committed))

    @cached_property
    def _captured(self) -> np.ndarray:
        """The steps whose factors are stored."""
        return self._store.factors.steps

    @property
    def batch_only(self) -> dict[str, str]:
        """Tensor name -> why its gradients were not split into samples."""
        return dict(self._store.factors.batch_only)

    @property
    def residuals(self) -> pd.DataFrame:
        """How well contributions add up: a row a tensor and step at which the recorder compared them with p.grad.

        Columns: step, tensor, residual = max|sum of contributions - p.grad| / max|p.grad|. Float32 leaves about 1e-6
        (more where large contributions cancel), half precision about 1e-2.
        """
        store = self._store
        columns = store.read_scalars(0, store.steps_committed)
        parts = []
        for number, tensor in enumerate(store.config["tensors"]):
            values = columns.get(RESIDUAL.format(number), np.empty(0))
            steps = np.flatnonzero(~np.isnan(values))
            parts.append(pd.DataFrame({"step": steps, "tensor": tensor["name"], "residual": values[steps]}))
        frame = pd.concat(parts).sort_values("step", kind="stable", ignore_index=True)
        return with_provenance(frame, store, "sums of per-sample contributions against p.grad")

    def __getitem__(self, key: Any) -> Cells:
        """Cells by step, parameter and sample; see the class. Nothing is read yet.

        Raises:
            NotRecorded: if a step or tensor that is named was not captured; the message says why and what to type.
            UnknownName: if the selector names no tensor.
            Incompatible: if the key is no such key.
        """
        step, parameter, sample = _split(key)
        self._require_any()
        selection, every = self._selection(parameter)
        captured, written = self._steps(step)
        steps = np.union1d(captured, written)
        computed, missing = self._computed(selection, steps, every)
        kept = computed | ~np.isin(self._owners(selection.indices), list(missing))
        names = [t["name"] for t in self._store.config["tensors"]]
        left_out = {names[number]: reason for number, reason in sorted(missing.items())}
        samples = self._samples(sample, steps)
        return Cells(
            self._store,
            Asked(selection.text, selection.indices[kept], captured, written, computed[kept], samples, left_out),
        )

    def rebuild(self, step: int) -> dict[str, np.ndarray]:
        """The batch gradient p.grad of a step as backward left it, from factors: tensor name -> array of its shape.

        One matrix product a call of a layer; of Linear layers equal to p.grad bit for bit on the same machine with as
        many threads, if the step had one batch. Tensors recorded by batch only are left out.

        Raises:
            NotRecorded: if the step was not captured, or of a part of the samples, or in projections.
        """
        self._require_any()
        captured, _ = self._steps(int(step))
        fraction = (self._store.config.get("per_sample") or {}).get("fraction", 1.0)
        partly = {
            "only written-out cells": not len(captured),
            f"a share of {fraction} of the samples (fraction=)": fraction < 1.0,
            "random projections (project=)": any(is_projected(site) for site in self._store.factors.sites),
        }
        for what in [what for what, there in partly.items() if there]:
            raise NotRecorded(
                f"{self._store.name} holds {what} of step {step}: that does not make the batch gradient. "
                f"run.gradients[{step}].frame() gives what there is."
            )
        cells = self[int(step)]
        flat, found = cells.total()[0], {}
        for tensor in self._store.config["tensors"]:
            start, stop = np.searchsorted(cells.parameters, [tensor["first"], tensor["first"] + tensor["size"]])
            if stop > start:
                found[tensor["name"]] = flat[start:stop].reshape(tensor["shape"])
        return found

    # Reading a key ----------------------------------------------------------------------------------------------

    def _require_any(self) -> None:
        store = self._store
        if len(self._captured) or self._written.exists:
            return
        if store.config.get("per_sample") is None:
            raise NotRecorded(
                f"{store.name} was recorded without per-sample gradients (per_sample=False, or by an older nbdyn); "
                "record again with nbdyn.record(path, model, optimizer, loss_fn)."
            )
        raise NotRecorded(
            f"{store.name} holds no per-sample gradients yet ({store.steps_committed} steps are committed); "
            "run.refresh() looks again."
        )

    def _steps(self, key: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of the steps that a key names, sorted: those with factors, and those with written-out cells alone."""
        end = self._store.steps_committed
        if isinstance(key, slice):
            wanted = np.sort(np.arange(end)[key])
        else:
            wanted = np.unique(_numbers(key, "step"))
            wanted = np.unique(np.where(wanted < 0, wanted + end, wanted))
        captured = np.intersect1d(wanted, self._captured)
        written = np.empty(0, np.int64)
        if len(captured) < len(wanted):
            ends = max(0, int(wanted[0])), min(end, int(wanted[-1]) + 1)
            written = np.setdiff1d(np.intersect1d(wanted, self._written.steps(*ends)), captured)
        missing = np.setdiff1d(wanted, np.union1d(captured, written))
        if len(missing) and (not isinstance(key, slice) or len(missing) == len(wanted)):
            self._refuse_step(int(missing[0]))
        return captured, written

    def _refuse_step(self, step: int) -> None:
        store, captured = self._store, self._captured
        if not 0 <= step < store.steps_committed:
            raise NotRecorded(f"{store.name} holds steps 0..{store.steps_committed - 1}, not {step}.")
        near = f"; the nearest captured one is {captured[np.abs(captured - step).argmin()]}" if len(captured) else ""
        every = (store.config.get("per_sample") or {}).get("every", 1)
        why = f"they were captured every {every} steps" if every > 1 else "nothing was captured then"
        raise NotRecorded(
            f"{store.name} holds no per-sample gradients of step {step}: {why}{near}. To have every step, record with "
            "every=1."
        )

    def _selection(self, key: Any) -> tuple[Selection, bool]:
        """The parameters that a key names, and whether it names them all by naming none."""
        tensors, total = self._store.config["tensors"], self._store.parameters
        if isinstance(key, str):
            return select(key, tensors), key.strip() == "all"
        if isinstance(key, slice):
            every = key == _ALL
            chosen = np.arange(total, dtype=np.int64)[key]
            text = "all" if every else f"parameters {key.start or 0}:{total if key.stop is None else key.stop}"
        else:
            every, chosen = False, _numbers(key, "parameter")
            check_indices(chosen, tensors)
            text = locate(chosen, tensors)[1][0] if len(chosen) == 1 else f"{len(chosen):,} parameters"
        return Selection(text, (), chosen, chosen.shape), every

    def _owners(self, indices: np.ndarray) -> np.ndarray:
        firsts = np.array([t["first"] for t in self._store.config["tensors"]], dtype=np.int64)
        return np.searchsorted(firsts, indices, side="right") - 1

    def _computed(self, selection: Selection, steps: np.ndarray, every: bool) -> tuple[np.ndarray, dict[int, str]]:
        """Which of the parameters have factors, and the tensors of which nothing is recorded, with the reason.

        Raises:
            NotRecorded: if there are such, and they were asked for by name.
        """
        tensors, factors = self._store.config["tensors"], self._store.factors
        owners = self._owners(selection.indices)
        held = np.zeros(len(tensors), dtype=bool)
        for site in factors.sites:
            held[self._owners(np.array([first for first, _ in site.runs], dtype=np.int64))] = True
        held &= np.array([t["name"] not in factors.batch_only for t in tensors])
        computed, missing = held[owners], {}
        for number in np.unique(owners[~computed]).tolist():
            some = selection.indices[owners == number]
            if not len(self._written.read(steps, some, None).step):
                missing[number] = self._reason(tensors[number])
        if missing and (not every or not len(self._captured)):
            number, reason = next(iter(missing.items()))
            more = f" (and {len(missing) - 1} more tensors)" if len(missing) > 1 else ""
            raise NotRecorded(
                f"{self._store.name} holds no per-sample gradients of {tensors[number]['name']}{more}: {reason}. "
                "run.norms has the norm of its batch gradient at every step."
            )
        return computed, missing

    def _reason(self, tensor: Any) -> str:
        """Why a tensor has no factors."""
        name, tensors = tensor["name"], self._store.config["tensors"]
        layers = (self._store.config.get("per_sample") or {}).get("layers")
        if name in self._store.factors.batch_only:
            return f"it was recorded by batch only: {self._store.factors.batch_only[name]}"
        if not tensor.get("trainable", True):
            return "it was not trained"
        if layers is not None and not any(name in select(text, tensors).names for text in layers):
            return f"layers={layers} left it out; record with it among them"
        return "no use of it was captured"

    def _samples(self, key: Any, steps: np.ndarray) -> np.ndarray | None:
        """Sample ids that a key names, sorted; None for all visits, those of unknown samples too."""
        if not isinstance(key, slice):
            return np.unique(_numbers(key, "sample"))
        if key == _ALL:
            return None
        ends = [end for end in (key.start, key.stop) if end is not None]
        if any(end < 0 for end in ends) or (key.step or 1) < 1:
            raise Incompatible(f"{key} is no slice of samples: their ids count up from 0.")
        found = self._store.read_visits(int(steps[0]), int(steps[-1]) + 1)["sample"] if len(steps) else np.empty(0, int)
        ids = np.unique(found).astype(np.int64)
        start = key.start or 0
        ids = ids[(ids >= start) & (ids < (np.inf if key.stop is None else key.stop))]
        return ids[(ids - start) % (key.step or 1) == 0]

    def __repr__(self) -> str:
        store = self._store
        if not len(self._captured) and not self._written.exists:
            return f"gradients of {store.name}: none recorded by sample"
        return (
            f"gradients of {store.name}: {len(self._captured):,} captured steps x {store.parameters:,} parameters, by "
            'sample; type gradients[step, "name", sample]'
        )

    def _ipython_key_completions_(self) -> list[str]:
        return [t["name"] for t in self._store.config["tensors"]]


def _split(key: Any) -> tuple[Any, Any, Any]:
    """A key's step, parameter and sample; `...` and what is missing become slices of all."""
    parts = key if isinstance(key, tuple) else (_ALL, key) if isinstance(key, str) else (key,)
    if len(parts) > 3:
        raise Incompatible(f"{len(parts)} indices: write gradients[step, parameter, sample].")
    parts = [_ALL if part is Ellipsis else part for part in (*parts, *[_ALL] * (3 - len(parts)))]
    for part, what in zip(parts, ("step", "parameter", "sample"), strict=True):
        if isinstance(part, slice):
            _check_slice(part, what)
    return parts[0], parts[1], parts[2]


def _check_slice(key: slice, what: str) -> None:
    try:
        key.indices(1)
    except (TypeError, ValueError):
        raise Incompatible(f"{key} is no slice of {what}s; write whole numbers, such as 0:100.") from None


def _numbers(key: Any, what: str) -> np.ndarray:
    """One or several whole numbers, (n,) int64."""
    try:
        found = np.asarray(key)
        if found.size == 0 and found.ndim == 1:
            return np.empty(0, np.int64)
        if found.ndim > 1 or not np.issubdtype(found.dtype, np.integer):
            raise ValueError
    except ValueError:
        hint = ', or a selector such as "fc1.weight[3,:]"' if what == "parameter" else ""
        raise Incompatible(f"{key!r} is no {what}: write a whole number, a list of them or a slice{hint}.") from None
    return found.reshape(-1).astype(np.int64)
