"""Some per-sample gradients of a run, not yet read: as a frame, an array, in coordinates, added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError, NotRecorded
from nbdyn.settings import format_size, parse_size
from nbdyn.store.gradient_reader import Asked, Piece, Reader
from nbdyn.store.names import locate
from nbdyn.store.projection import is_projected, relative_error
from nbdyn.store.provenance import with_provenance
from nbdyn.store.sites import Site
from nbdyn.store.written_cells import Coo, WrittenCells

if TYPE_CHECKING:
    from nbdyn.store.store import Store

ROW_BYTES = 40
"""Of a row of a frame: four integers and a number."""
PIECE_BYTES = 16_000_000
"""Of the cells from which a frame is made at a time; where they are not zero is several times as much."""
COLUMNS = ("step", "position", "sample", "parameter", "value")


@dataclass(frozen=True)
class Dense:
    """Cells of visits and parameters.

    Attributes:
        values: (visits, parameters).
        visits: a row each: step, position, sample.
        parameters: global parameter indices, (parameters,).
    """

    values: np.ndarray
    visits: pd.DataFrame
    parameters: np.ndarray


class Cells:
    """Per-sample gradients of some steps, parameters and samples; `run.gradients[...]` gives it, nothing is read yet.

    A cell is the contribution c of a visit (a sample at a position of a step's batch) to p.grad: the sum over a
    step's visits is p.grad as backward left it. `own` turns contributions into the samples' own gradients. In
    batch-coupled layers (BatchNorm) a sample's loss also depends on the others of its batch; a cell is then the
    part of p.grad that arrives through the sample's own row. Contributions of all uses of a parameter are added.

    Cells are computed from factors on every read, about one multiplication each; where there are no factors but cells
    that were written out, `frame` and `coo` give those.

    >>> # cells = run.gradients[100:110, "fc1.weight[3,:]"]
    >>> # cells.frame(names=True), cells.total(), cells.own().dense().values
    """

    def __init__(self, store: Store, asked: Asked, is_own: bool = False) -> None:
        self._store, self._asked, self.is_own = store, asked, is_own
        self._dtype = np.dtype(store.config["row_dtype"])
        self._reader = Reader(store, asked)

    @property
    def steps(self) -> np.ndarray:
        """The steps of which something is recorded, sorted (n,) int64."""
        return self._asked.steps

    @property
    def parameters(self) -> np.ndarray:
        """Global parameter indices, (k,) int64."""
        return self._asked.indices

    @property
    def visits(self) -> pd.DataFrame:
        """The visits asked for, a row each: step, position, sample. With `fraction=` not all of them were captured."""
        steps, samples = self.steps, self._asked.samples
        found = self._store.read_visits(int(steps[0]), int(steps[-1]) + 1) if len(steps) else {}
        columns = {name: np.asarray(found.get(name, []), np.int64) for name in COLUMNS[:3]}
        kept = np.isin(columns["step"], steps)
        if samples is not None:
            kept &= np.isin(columns["sample"], samples)
        return pd.DataFrame({name: column[kept] for name, column in columns.items()})

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Visits (those recorded; with `fraction=` fewer were captured) and parameters."""
        steps = self.steps
        if self._asked.samples is not None or not len(steps):
            return len(self.visits), len(self.parameters)
        sizes = self._store.read_steps(int(steps[0]), int(steps[-1]) + 1)["batch_size"]
        return int(sizes[steps - steps[0]].sum()), len(self.parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of `dense().values`, at most."""
        return self.shape[0] * self.shape[1] * self._dtype.itemsize

    def own(self) -> Cells:
        """The samples' own gradients g = scale * c, the scale being that of each step's loss.

        Raises:
            NotRecorded: if the scale of a step is not known, because its loss function was not.
        """
        self._scales(self.steps)
        return Cells(self._store, self._asked, is_own=True)

    def frame(self, names: bool = False, zeros: bool = False, max_bytes: str | int = "2 GB") -> pd.DataFrame:
        """A tidy frame, a row a cell: step, position, sample, parameter (global index), value.

        Sorted by step and position; a sample visited twice in a step has rows of both positions. Of written-out
        cells the position is that of the sample's first visit in the step.

        Args:
            names: add the columns tensor and index (a label such as `fc1.weight[3,5]`).
            zeros: keep cells that are zero.
            max_bytes: a frame larger than this is refused.

        Raises:
            NbdynError: if it would be larger; the message says what to ask for instead.
            NotRecorded: with `zeros`, if of some steps only chosen cells were written out.
        """
        if zeros:
            self._require_factors("zeros=True")
        limit, rows, is_sorted = parse_size(max_bytes), 0, True
        columns: list[list[np.ndarray]] = [[] for _ in COLUMNS]
        for piece in self._pieces():
            row, place = np.indices(piece.values.shape).reshape(2, -1) if zeros else np.nonzero(piece.values)
            rows += len(row)
            self._check_size("frame", "the frame", rows * ROW_BYTES, limit)
            parameter, value = self.parameters[piece.columns][place], piece.values[row, place]
            _append(columns, piece.step[row], piece.position[row], piece.sample[row], parameter, value)
            is_sorted &= piece.columns.start == 0
        written = self._written()
        if len(written.step) or not rows:
            position = self._first_positions(written)
            _append(columns, written.step, position, written.sample, written.parameter, written.value)
            is_sorted = False
        frame = pd.DataFrame({name: np.concatenate(columns.pop(0)) for name in COLUMNS}, copy=False)
        if not is_sorted:
            frame = frame.sort_values(["step", "position"], kind="stable", ignore_index=True)
        if names:
            self._add_names(frame)
        return self._with_provenance(frame)

    def coo(self, max_bytes: str | int = "2 GB") -> Coo:
        """Cells other than zeros as (step, parameter, sample, value), (n,) each; visits of one sample in a step added.

        Raises:
            NbdynError: if it would be larger than `max_bytes`.
        """
        limit, rows = parse_size(max_bytes), 0
        pieces = [_summed(self._written())]
        for piece in self._pieces():
            step, sample, values = _by_sample(piece)
            row, place = np.nonzero(values)
            rows += len(row)
            self._check_size("coo", "the coordinates", rows * ROW_BYTES, limit)
            parameter = self.parameters[piece.columns][place]
            pieces.append(Coo(step[row], parameter, sample[row], values[row, place]))
        return Coo.join(pieces, self._dtype)

    def dense(self, max_bytes: str | int = "2 GB") -> Dense:
        """All cells, zeros too: values (visits, parameters), the table of the visits, the parameters.

        Raises:
            NbdynError: if the values would be larger than `max_bytes`.
            NotRecorded: if of some steps only chosen cells were written out.
        """
        self._require_factors("dense()")
        self._check_size("dense", "the array", self.nbytes, parse_size(max_bytes))
        values, start, stop = np.empty(self.shape, self._dtype), 0, 0
        visits = [self.visits.iloc[:0]]
        for piece in self._pieces():
            if piece.columns.start == 0:  # later pieces of a step have the same visits
                start, stop = stop, stop + len(piece.step)
                visits.append(_visits(piece))
            values[start:stop, piece.columns] = piece.values
        table = pd.concat(visits[1:] or visits, ignore_index=True)
        return Dense(values[:stop], self._with_provenance(table), self.parameters)

    def blocks(self, max_bytes: str | int = "64 MB") -> Iterator[Dense]:
        """All cells in pieces whose values take at most `max_bytes`: whole steps, in order.

        A step that alone is larger comes in several pieces, each with all its visits and a part of the parameters.

        Raises:
            NotRecorded: if of some steps only chosen cells were written out.
        """
        self._require_factors("blocks()")
        pieces = self._pieces(parse_size(max_bytes))
        return (Dense(piece.values, _visits(piece), self.parameters[piece.columns]) for piece in pieces)

    def total(self, per: str = "step", max_bytes: str | int = "2 GB") -> np.ndarray:
        """Contributions added over visits: "step": p.grad of each step, (steps, k); "all": over all steps, (k,).

        Whole tensors by one matrix product a call, without cells. With samples asked for, their visits alone; with
        `fraction=`, the captured visits.

        Raises:
            NbdynError: if it would be larger than `max_bytes`, or for another `per`.
            NotRecorded: if of some steps only chosen cells were written out.
        """
        if per not in ("step", "all"):
            raise NbdynError(f'per={per!r}: contributions are added per="step" or per="all".')
        self._require_factors("total()")
        shape = (len(self.steps) if per == "step" else 1, len(self.parameters))
        self._check_size("total", "the array", shape[0] * shape[1] * self._dtype.itemsize, parse_size(max_bytes))
        out = np.zeros(shape, self._dtype)
        self._reader.totals(out, per == "step", self._scales(self.steps) if self.is_own else None)
        return out if per == "step" else out[0]

    def __repr__(self) -> str:
        kind = "own gradients" if self.is_own else "contributions"
        visits, parameters = self.shape
        more = [*self._notes(), *(f"without {name}: {reason}" for name, reason in self._asked.left_out.items())]
        tail = "".join(f"; {text}" for text in more)
        return (
            f"<{kind} to {self._asked.text}: {len(self.steps):,} steps, {visits:,} visits x {parameters:,} parameters, "
            f"{format_size(self.nbytes)} dense; .frame() .coo() .dense() .total() .blocks() .own(){tail}>"
        )

    def _pieces(self, max_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
        for piece in self._reader.pieces(max_bytes):
            if self.is_own:
                piece.values[:] *= self._scales(piece.step)[:, None].astype(self._dtype)
            yield piece

    def _scales(self, steps: np.ndarray) -> np.ndarray:
        """The scale of each step's loss: g = scale * c."""
        if not len(steps):
            return np.empty(0)
        first = int(steps.min())
        scales = self._store.read_steps(first, int(steps.max()) + 1)["scale"][steps - first]
        if np.isnan(scales).any():
            raise NotRecorded(
                f"the scale between contributions and own gradients is not known at step {steps[np.isnan(scales)][0]} "
                f"of {self._store.name}: its loss function was not. record with "
                "nbdyn.record(path, model, optimizer, loss_fn)."
            )
        return scales

    def _written(self) -> Coo:
        """The cells of which there are no factors."""
        asked, cells = self._asked, WrittenCells(self._store)
        found = [cells.read(asked.written, asked.indices, asked.samples)]
        if not asked.computed.all():
            found.append(cells.read(asked.captured, asked.indices[~asked.computed], asked.samples))
        joined = Coo.join(found, self._dtype)
        if self.is_own:
            joined = joined._replace(value=joined.value * self._scales(joined.step).astype(joined.value.dtype))
        return joined

    def _first_positions(self, cells: Coo) -> np.ndarray:
        """The position of the first visit of each cell's sample in its step."""
        if not len(cells.step):
            return cells.step
        found = self._store.read_visits(int(cells.step.min()), int(cells.step.max()) + 1)
        visits = pd.DataFrame({name: found[name].astype(np.int64) for name in COLUMNS[:3]})
        visits = visits.drop_duplicates(subset=["step", "sample"])
        asked = pd.DataFrame({"step": cells.step, "sample": cells.sample})
        return asked.merge(visits, how="left", on=["step", "sample"])["position"].fillna(-1).to_numpy(np.int64)

    def _require_factors(self, what: str) -> None:
        if self._asked.only_written:
            raise NotRecorded(
                f"{self._store.name} holds only written-out cells of some of these steps or tensors, not all cells, so "
                f"{what} cannot be given; .frame() and .coo() give those that are there."
            )

    def _check_size(self, method: str, what: str, nbytes: int, limit: int) -> None:
        if nbytes <= limit:
            return
        raise NbdynError(
            f"{what} would take over {format_size(limit)} (max_bytes): {self._asked.text} has {self.shape[0]:,} visits "
            f"x {self.shape[1]:,} parameters here, {format_size(self.nbytes)} dense. Ask for fewer steps, parameters "
            f"or samples, go through .blocks(), or type .{method}(max_bytes=...) with a larger size."
        )

    def _add_names(self, frame: pd.DataFrame) -> None:
        tensors = self._store.config["tensors"]
        unique, back = np.unique(frame["parameter"].to_numpy(), return_inverse=True)
        owner, labels = locate(unique, tensors)
        frame["tensor"] = np.array([t["name"] for t in tensors], dtype=object)[owner][back]
        frame["index"] = np.array(labels, dtype=object)[back]

    def _notes(self) -> list[str]:
        """What is to be known of the sites that the parameters belong to."""
        factors, indices = self._store.factors, self._asked.indices[self._asked.computed]
        sites = [factors.sites[number] for number in factors.sites_of(indices)]
        found = {site.note for site in sites if site.note}
        found |= {_approximation(site) for site in sites if is_projected(site)}
        return sorted(found)

    def _with_provenance(self, frame: pd.DataFrame) -> pd.DataFrame:
        asked, more = self._asked, {"source": "factors"}
        if asked.only_written:
            mixed = len(asked.captured) and asked.computed.any()
            more["source"] = ("factors; elsewhere " if mixed else "") + "written-out cells only"
        notes = self._notes()
        if notes:
            more["note"] = ", ".join(notes)
        if asked.left_out:
            more["left_out"] = "; ".join(f"{name}: {reason}" for name, reason in asked.left_out.items())
        kind = "own gradients (scale * contribution)" if self.is_own else "contributions (their sum is p.grad)"
        return with_provenance(frame, self._store, f"{kind} of {asked.text}", **more)


def _append(columns: list[list[np.ndarray]], *values: np.ndarray) -> None:
    for column, found in zip(columns, values, strict=True):
        column.append(found)


def _visits(piece: Piece) -> pd.DataFrame:
    return pd.DataFrame({"step": piece.step, "position": piece.position, "sample": piece.sample})


def _by_sample(piece: Piece) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, samples and values with several visits of one sample in a step added."""
    order = np.lexsort((piece.sample, piece.step))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(piece.step[order]) != 0) | (np.diff(piece.sample[order]) != 0)
    if new.all():
        return piece.step, piece.sample, piece.values
    first = np.nonzero(new)[0]
    return piece.step[order][first], piece.sample[order][first], np.add.reduceat(piece.values[order], first, axis=0)


def _summed(cells: Coo) -> Coo:
    """Cells with equal coordinates added; they are sorted by step, sample and parameter."""
    if not len(cells.step):
        return cells
    new = np.ones(len(cells.step), dtype=bool)
    new[1:] = np.any([np.diff(column) != 0 for column in cells[:3]], axis=0)
    first = np.nonzero(new)[0]
    return cells.take(first)._replace(value=np.add.reduceat(cells.value, first))


def _approximation(site: Site) -> str:
    return (
        f"{site.name}: approximate (project={site.options['project']}), unbiased, root-mean-square error of a visit's "
        f"gradient {relative_error(site):.2g} times its norm"
    )
