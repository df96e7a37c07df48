"""Batch gradients of some parameters at many steps, rebuilt from factors, and what the loop did to them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.errors import NotRecorded
from nbdyn.schema import GRAD_FACTOR, GRAD_NORM, LOSS_SCALE, PART_GRADIENT
from nbdyn.store import closed, state
from nbdyn.store.calls import STEP
from nbdyn.store.gradient_reader import sum_over_visits
from nbdyn.store.names import select
from nbdyn.store.projection import is_projected

if TYPE_CHECKING:
    from nbdyn.store.factors import Block
    from nbdyn.store.sites import Site
    from nbdyn.store.store import Store

FEW = 64
"""Sums of so many parameters are taken from cells of many steps at once; of more, step by step."""
READ_BYTES = 16_000_000
"""Factors read at a time: cells of FEW parameters take up to about five times as much."""
CHUNK_BYTES = 32_000_000
"""Of a window of steps: gradients of all its parameters, in float64."""


def loop_factors(store: Store, start: int, stop: int) -> np.ndarray:
    """What a loop multiplied its gradients with (clipping by norm) at steps start <= t < stop, (steps,) float64.

    A GradScaler's scale is left out: the recorded factor refers to the gradient as backward left it, with the scale,
    and takes that back as well. Contributions, and the gradients of a replay, never had it. Runs of an older nbdyn
    hold no scale: there it is that of what was captured of single samples, and 1 where nothing was.
    NaN where the gradient stayed as it was, or was replaced by another (PART_GRADIENT).
    """
    scalars = store.read_scalars(start, stop)
    nothing = np.full(stop - start, np.nan)
    factor, scale = scalars.get(GRAD_FACTOR, nothing), scalars.get(LOSS_SCALE, nothing)
    unknown = ~np.isnan(factor) & np.isnan(scale)
    if unknown.any():
        scale = np.where(unknown, 1.0 / store.factors.scales(start, stop), scale)
    return factor * scale


class SeenGradients:
    """Gradients of some parameters as the optimizer saw them: factor[t] * raw[t], or given[t].

    raw[t] is the sum of the contributions of step t's visits. Cost: of a few parameters their columns of the factors
    and about V x k multiplications for V visits; of whole tensors a matrix product a step and call.

    Args:
        store: the run.
        parameters: global indices, sorted and unique, (k,).
        start: first step.
        stop: end of the half-open range of steps.

    Attributes:
        tensors: numbers of the tensors that hold the parameters, (m,).
        columns: of each of them, where its parameters lie among `parameters`.
        owner: (k,), to which of `tensors` each parameter belongs.
        skipped: steps that GradScaler skipped, (n,) bool.
        present: whether a tensor had a gradient at a step (else p.grad was None), (n, m) bool.
        factor: (n,) float64: `loop_factors`, 1 for none.
        given: steps whose gradient was changed otherwise (clipping by value, noise) and is stored whole.

    Raises:
        NotRecorded: if the gradient of some step is neither given nor captured whole and exactly; the message says why.
    """

    def __init__(self, store: Store, parameters: np.ndarray, start: int, stop: int) -> None:
        self._store, self._parameters, self.start, self.stop = store, parameters, start, stop
        firsts = np.array([t["first"] for t in store.config["tensors"]], np.int64)
        owners = np.searchsorted(firsts, parameters, side="right") - 1
        self.tensors, self.owner = np.unique(owners, return_inverse=True)
        ends = np.searchsorted(owners, self.tensors, side="right")
        self.columns = [slice(a, b) for a, b in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
        self.skipped = store.read_steps(start, stop, ("skipped",))["skipped"].astype(bool)
        given = state.places(store, PART_GRADIENT)
        self.given = given[(given >= start) & (given < stop)]
        scalars = store.read_scalars(start, stop)
        nothing = np.full(stop - start, np.nan)
        norms = np.stack([scalars.get(GRAD_NORM.format(number), nothing) for number in self.tensors], 1)
        self.present = np.zeros(norms.shape, bool)
        self._sites = self._find_sites()
        factor = loop_factors(store, start, stop)
        self.factor = np.where(np.isnan(factor), 1.0, factor)
        rows = self.given - start
        self.present[rows] |= norms[rows] != 0  # of tensors not captured; a given gradient has zeros for none
        self._require(norms)

    def windows(self, height: int | None = None) -> Iterator[tuple[int, int]]:
        """The steps in ranges whose gradients take about CHUNK_BYTES, or of `height` steps."""
        height = height or max(1, CHUNK_BYTES // (8 * max(1, len(self._parameters))))
        for start in range(self.start, self.stop, height):
            yield start, min(start + height, self.stop)

    def read(self, start: int, stop: int, raw: bool = False) -> np.ndarray:
        """Gradients of steps start <= t < stop before the factor, (stop - start, k) float64.

        Args:
            start: first step.
            stop: end of the half-open range.
            raw: the sum of contributions also where another gradient is given.
        """
        values = np.zeros((stop - start, len(self._parameters)))
        for number, where in self._sites:
            whole = self._store.factors.sites[number]
            site, columns, places = closed.narrowed(whole, self._parameters[where])
            few = len(where) <= FEW and 4 * len(where) < whole.size
            for block in self._store.factors.blocks(number, start, stop, columns=columns, max_bytes=READ_BYTES):
                _add_sums(values, where, start, site, block, places, few)
        if not raw:
            self._put_given(values, start, stop)
        return values

    def _put_given(self, values: np.ndarray, start: int, stop: int) -> None:
        dtype = np.dtype(self._store.config["row_dtype"])
        height = max(1, CHUNK_BYTES // (dtype.itemsize * self._store.parameters))
        steps = self.given[(self.given >= start) & (self.given < stop)]
        for some in np.split(steps, range(height, len(steps), height)):
            if len(some):
                rows = state.read_range(self._store, PART_GRADIENT, int(some[0]), int(some[-1]) + 1)
                for step, data in rows.items():
                    values[step - start] = np.frombuffer(data, dtype)[self._parameters]

    def _find_sites(self) -> list[tuple[int, np.ndarray]]:
        """Sites of the parameters, each with the places of its own; fills `present`."""
        found, factors = [], self._store.factors
        names = [self._store.config["tensors"][number]["name"] for number in self.tensors]
        whole = np.array([name not in factors.batch_only for name in names])
        for number in factors.sites_of(self._parameters):
            bounds = [np.searchsorted(self._parameters, [a, a + size]) for a, size in factors.sites[number].runs]
            where = np.concatenate([np.arange(a, b) for a, b in bounds])
            held = np.unique(self.owner[where])
            rows = factors.calls_of(number, self.start, self.stop)[:, STEP] - self.start
            self.present[np.ix_(np.unique(rows), held[whole[held]])] = True
            found.append((number, where))
        return found

    def _require(self, norms: np.ndarray) -> None:
        """Refuse what the captures do not give; a gradient of norm 0 is one, or none at all."""
        needed = ~self.skipped
        needed[self.given - self.start] = False
        missing = needed[:, None] & ~self.present & (norms != 0)
        if missing.any():
            row, place = (int(x[0]) for x in np.nonzero(missing))
            self._refuse(self._why(self.start + row, self._store.config["tensors"][self.tensors[place]]["name"]))
        if not (needed[:, None] & self.present).any():
            return
        fraction = (self._store.config.get("per_sample") or {}).get("fraction", 1.0)
        if fraction < 1.0:
            self._refuse(f"per-sample gradients of a share of {fraction} of the samples only (fraction=)")
        if any(is_projected(self._store.factors.sites[number]) for number, _ in self._sites):
            self._refuse("random projections of them (project=), which are approximate")

    def _why(self, step: int, name: str) -> str:
        """Why the gradient of a tensor at a step was not captured."""
        options, factors = self._store.config.get("per_sample"), self._store.factors
        found = f"no per-sample gradients of {name} at step {step}"
        if options is None:
            return f"{found}: it was recorded without them (per_sample=False, or by an older nbdyn)"
        if name in factors.batch_only:
            return f"{found}: {factors.batch_only[name]}"
        layers = options.get("layers")
        if layers is not None and not any(name in select(text, self._store.config["tensors"]).names for text in layers):
            return f"{found}: layers={layers} left it out"
        every = options.get("every", 1)
        return (
            f"{found}: they were captured every {every} steps" if every > 1 else f"{found}: nothing was captured then"
        )

    def _refuse(self, found: str) -> None:
        raise NotRecorded(
            f"batch gradients of steps {self.start}..{self.stop - 1} come from all of their samples, exactly, but "
            f"{self._store.name} holds {found}. run.replay({self.start}, {self.stop}, model, loss_fn, data) rebuilds "
            "the weights with the model and the data."
        )


def _add_sums(
    values: np.ndarray, where: np.ndarray, start: int, site: Site, block: Block, places: np.ndarray, few: bool
) -> None:
    """Add each step's sum over the visits of a block to the rows of `values`, at the columns `where`."""
    first = np.nonzero(np.diff(block.step, prepend=-1))[0]
    rows = block.step[first] - start
    if few:
        cells = closed.cells(site, block, places)
        values[np.ix_(rows, where)] += np.add.reduceat(cells, first, axis=0, dtype=np.float64)
        return
    for row, a, b in zip(rows.tolist(), first.tolist(), [*first[1:].tolist(), len(block)], strict=True):
        values[row, where] += sum_over_visits(site, block.take(slice(a, b)), places)
