"""One run on disk, opened for reading: what is committed, its metadata, its logbook."""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import CorruptRun, Incompatible, NbdynError
from nbdyn.schema import ARRAYS, CAPTURE, SCHEMA_VERSION
from nbdyn.settings import say
from nbdyn.store import lock
from nbdyn.store.backend import basename, context, is_local, join, normalize, object_type, reading, tiledb
from nbdyn.store.journal import Journal
from nbdyn.store.metadata import check_config, compacted, read_group
from nbdyn.store.writer import now_ns, write_notes

if TYPE_CHECKING:
    from nbdyn.store.factors import Factors


KEPT_STEPS, KEPT_VISITS, KEPT_SCALARS = 200_000, 2_000_000, 4_000_000
"""What was read of runs of so many steps, visits and scalars is kept in memory (16, 60 and 32 MB at most)."""


class Store:
    """A handle on one run: a snapshot of all steps committed when it was opened or last refreshed.

    Args:
        uri: a folder or any TileDB URI.

    Raises:
        NbdynError: if nothing is there.
        CorruptRun: if the run is damaged or its creation was cut short.
        Incompatible: if a newer nbdyn wrote it.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = normalize(uri)
        self.name = basename(self.uri)
        kind = object_type(self.uri)
        if kind != "group":
            there = "something else is there" if is_local(self.uri) and os.path.exists(self.uri) else "nothing is there"
            found = there if kind is None else f"a TileDB {kind} is there"
            raise NbdynError(f"no run at {self.uri}: {found}. `nbdyn.runs(folder)` lists the runs of a folder.")
        self.steps_committed = 0
        self.timestamp = 0
        self._state: tuple[Any, ...] = ()
        self.neighbours: dict[str, Store] = {}  # runs that statements compared this one with, by their names and paths
        self.refresh()

    def refresh(self) -> bool:
        """Look again at what is committed; True if there are new steps."""
        self.config, self._status = self._read_metadata()
        before = self.steps_committed
        with reading(join(self.uri, "steps")), tiledb().open(join(self.uri, "steps"), ctx=context(self.uri)) as array:
            extent = array.nonempty_domain()
            if extent is not None:
                self.steps_committed = int(extent[0][1]) + 1
                last = array.query(attrs=["segment"])[self.steps_committed - 1]
                self.timestamp = int(last["segment"])
        self.columns = self._read_columns() if self.timestamp else []
        state = (self.config.get("created"), self.steps_committed, self.timestamp, self.read_compacted())
        if state != self._state:  # what was read of the same steps stays in memory
            self.__dict__.pop("factors", None)
            self._visits: tuple[int, int, dict[str, np.ndarray]] | None = None
            self._columns: dict[str, np.ndarray] = {}
            self._scalars: np.ndarray | None = None
            self._state = state
        return self.steps_committed > before

    def _read_columns(self) -> list[str]:
        """Names of the columns of `scalars`, in order."""
        with self.open("scalars") as array, reading(array.uri):
            text = array.meta.get("columns", "[]")
            width = array.domain.dim("column").size
        try:
            columns = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptRun(f"the names of the columns of {array.uri} are damaged ({error}).") from error
        if not isinstance(columns, list) or len(columns) > width or not all(isinstance(c, str) for c in columns):
            raise CorruptRun(f"the names of the columns of {array.uri} are damaged; restore it from a copy.")
        return columns

    @property
    def status(self) -> str:
        """One of "recording", "complete", "interrupted", "stopped" (disk full, budget reached), "killed"."""
        if self._status == "recording" and not lock.is_held(self.uri):
            return "killed"
        return self._status

    @property
    def parameters(self) -> int:
        """How many parameters a row of weights has."""
        return int(self.config["parameters"])

    def open(self, name: str) -> Any:
        """One of the run's arrays, as of the last committed segment; of those of captures, as of the last compacted."""
        uri = join(self.uri, name)
        last = self.read_compacted() if name.split("/")[0] in CAPTURE else self.timestamp
        with reading(uri):
            return tiledb().open(uri, ctx=context(self.uri), timestamp=(0, last))

    def read_steps(self, start: int, stop: int, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Columns of the `steps` array for steps start..stop-1; `names`: only these."""
        if stop <= start:
            from nbdyn.store.layout import STEP_ATTRIBUTES

            return {name: np.empty(0, dtype) for name, dtype in STEP_ATTRIBUTES if names is None or name in names}
        small = stop <= self.steps_committed <= KEPT_STEPS
        kept = self._columns if small else {}
        first, last = (0, self.steps_committed) if small else (start, stop)
        if names is None or not set(names) <= set(kept):
            with self.open("steps") as array, reading(array.uri):
                # One attribute at a time: TileDB 2.30 corrupts memory if one of several it reads at once is truncated.
                names = names or tuple(array.attr(number).name for number in range(array.nattr))
                kept |= {name: array.query(attrs=[name])[first:last][name] for name in names if name not in kept}
        return {name: kept[name][start - first : stop - first].copy() for name in names}

    def read_scalars(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Column name -> values (stop - start,) float64."""
        if stop <= start or not self.columns:
            return {name: np.empty(0) for name in self.columns}
        small = stop <= self.steps_committed and self.steps_committed * len(self.columns) <= KEPT_SCALARS
        first, last = (0, self.steps_committed) if small else (start, stop)
        table = self._scalars
        if not small or table is None:
            with self.open("scalars") as array, reading(array.uri):
                table = array[first:last, : len(self.columns)]["value"]
            self._scalars = table if small else None
        return {name: table[start - first : stop - first, place].copy() for place, name in enumerate(self.columns)}

    def read_visits(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Columns of `visits` for steps start..stop-1, each (visits,), sorted by (step, position).

        They are step, position, sample, target (the class; -1 for none, and all over runs of an older nbdyn, which
        did not record it), loss, correct.
        """
        names = ("step", "position", "sample", "target", "loss", "correct")
        if stop <= start:
            return {name: np.empty(0, np.int64) for name in names}
        if self._visits is not None and self._visits[0] <= start and stop <= self._visits[1]:
            kept = self._visits[2]
            rows = slice(*np.searchsorted(kept["step"], [start, stop]).tolist())
            return {name: kept[name][rows].copy() for name in names}
        with self.open("visits") as array, reading(array.uri):
            # Unordered reading and our own sort: 15 times faster than TileDB's ordered reader.
            cells = array.query(order="U").multi_index[start : stop - 1]
        if "target" not in cells:
            cells["target"] = np.full(len(cells["step"]), -1, np.int32)
        order = np.lexsort((cells["position"], cells["step"]))
        found = {name: np.asarray(cells[name])[order] for name in names}
        if len(order) <= KEPT_VISITS and stop <= self.steps_committed:
            self._visits = (start, stop, {name: column.copy() for name, column in found.items()})
        return found

    def sample_ids(self, steps: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Ids of the samples at some positions of some steps' batches, (n,) int64.

        Cost: reads the visits of all steps between the first and the last.

        Raises:
            CorruptRun: if there was no such visit.
        """
        if not len(steps):
            return np.empty(0, np.int64)
        visits = self._visits_of(int(steps.min()), int(steps.max()) + 1)
        places = np.searchsorted(visits["step"], steps) + positions
        inside = places.min() >= 0 and places.max() < len(visits["step"])
        if not (inside and (visits["step"][places] == steps).all() and (visits["position"][places] == positions).all()):
            raise CorruptRun(f"{self.uri} holds per-sample gradients of visits that it does not know; restore it.")
        return visits["sample"][places].astype(np.int64)

    def _visits_of(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """`read_visits`, remembered until the next one: one site after the other is asked for the same steps."""
        if self._visits is None or self._visits[:2] != (start, stop):
            found = self.read_visits(start, stop)
            if self._visits is not None and self._visits[0] <= start and stop <= self._visits[1]:
                return found
            self._visits = (start, stop, found)
        return self._visits[2]

    def write_note(self, step: int, kind: str, text: str) -> None:
        """Append a line to the run's logbook; any process may, a live recorder or not.

        Raises:
            NbdynError: if the place cannot be written.
        """
        try:
            write_notes(self.uri, context(self.uri), [(step, now_ns(), kind, text)])
        except tiledb().TileDBError as error:
            raise NbdynError(f"cannot write to the logbook of {self.name}: {error}") from error

    def log_look(self, what: str) -> None:
        """Write into the logbook that data was looked at, as statements are; where it cannot be written, say so.

        Cost: some 10 ms.
        """
        try:
            self.write_note(self.steps_committed, "statement", what)
        except (NbdynError, OSError, RuntimeError) as error:
            say(f"not logged with {self.name}: {str(error).splitlines()[0]}")

    @property
    def weights(self) -> Any:
        """The recorded weights; see `nbdyn.store.weights.Weights`."""
        from nbdyn.store.weights import Weights

        return Weights(self)

    @cached_property
    def factors(self) -> Factors:
        """What was captured of single samples; see `nbdyn.store.factors.Factors`."""
        from nbdyn.store.factors import Factors

        return Factors(self)

    @property
    def has_factors(self) -> bool:
        """Whether anything was captured of single samples."""
        return bool(self.read_compacted() or Journal(self).segments())

    def read_compacted(self) -> int:
        """The last segment whose journal is compacted by now, 0 for none."""
        return compacted(self.uri, read_group(self.uri)[0])

    def _read_metadata(self) -> tuple[dict[str, Any], str]:
        entries, members = read_group(self.uri)
        if "schema" not in entries:
            raise CorruptRun(
                f"{self.uri} is a TileDB group but no run of nbdyn, or its creation was cut short; "
                "delete it and record again."
            )
        schema = entries["schema"]
        if not isinstance(schema, (int, np.integer)):
            raise CorruptRun(f"the metadata of {self.uri} is damaged (schema {schema!r}); restore it from a copy.")
        if schema > SCHEMA_VERSION:
            raise Incompatible(
                f"{self.name} was written by a newer nbdyn (schema {schema}; this one reads up to "
                f"{SCHEMA_VERSION}); type `pip install --upgrade nbdyn`."
            )
        missing = [name for name in ARRAYS if name not in members]
        if missing:
            raise CorruptRun(f"{self.uri} lacks its array {', '.join(missing)}; restore it from a copy.")
        config = check_config(self.uri, entries.get("config", ""))
        self._check_width(config["parameters"])
        return config, str(entries.get("status", ""))

    def _check_width(self, parameters: int) -> None:
        """The number of parameters, on which much is allocated, must be that of the array."""
        uri = join(self.uri, "weights")
        with reading(uri):
            width = tiledb().ArraySchema.load(uri, ctx=context(self.uri)).domain.dim(1).size
        if int(width) != parameters:
            raise CorruptRun(
                f"the metadata of {self.uri} speaks of {parameters:,} parameters, its array of {int(width):,}; "
                "restore it from a copy."
            )
