"""The cockpit: loss, learning rate, gradient norm and update/weight ratio, live while a cell trains, and afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import traitlets
from numpy.typing import ArrayLike

from nbdyn.errors import NbdynError, NotRecorded, did_you_mean
from nbdyn.plots import panel, show_number, stack
from nbdyn.schema import PROVENANCE
from nbdyn.store.envelope import Envelope
from nbdyn.widgets import _assets
from nbdyn.widgets._base import Widget

INTERVAL = 0.2
"""Seconds between two pictures sent to the browser, at least."""


@dataclass(frozen=True)
class _Quantity:
    """How one quantity is named, coloured and scaled."""

    name: str
    label: str
    phrase: str
    """Its name in the query language."""
    color: str
    log: bool


QUANTITIES = (
    _Quantity("loss", "loss", "loss", "#3f7fd0", log=False),
    _Quantity("lr", "learning rate", "lr", "#b07d18", log=False),
    _Quantity("grad_norm", "gradient norm", "|grad|", "#c8553d", log=True),
    _Quantity("update_ratio", "update / weight ratio", "update_ratio", "#2a9483", log=True),
)
"""The panels, from top to bottom; the colours read on a light and on a dark ground."""

_NAMES = tuple(quantity.name for quantity in QUANTITIES)


class Cockpit(Widget):
    """Four small panels over one step axis; the band spans the least and greatest value, the line is the mean.

    Each series is kept as an `Envelope`, so that memory and what is sent to the browser (at most 77 KB, five times a
    second) stay the same however long the run, and no spike is lost. While a cell trains, values only flow from
    Python to the browser; pointing at a step is answered by the browser itself.

    Args:
        title: what is shown, usually the path of the run.
        uri: where the run lies, for `code()`; None if it lies nowhere.
        **unknown: nothing else is taken.

    Raises:
        TypeError: for an unknown keyword.

    >>> cockpit = Cockpit("runs/fc")
    >>> cockpit.feed({"step": np.arange(3), "loss": np.array([2.0, 1.0, 0.5])})
    >>> cockpit.finish("complete")
    >>> cockpit.frame().high.tolist()
    [2.0, 1.0, 0.5]
    """

    _esm = _assets.join("cockpit.js")
    _arguments = ("title", "uri")

    wire = traitlets.Dict(help="the frame on its way to the browser: meta (JSON) and data (bytes)").tag(sync=True)

    def __init__(self, title: str, uri: str | None = None, **unknown: Any) -> None:
        """Make an empty cockpit; `feed` fills it."""
        self.title = title
        self.uri = uri
        self.status = "live"
        self._envelopes = {name: Envelope() for name in _NAMES}
        self._size, self._first, self._last = 0, 0, 0
        self._pushed = -INTERVAL
        self._timer: threading.Timer | None = None
        super().__init__(wire=self._pack(), **unknown)

    @classmethod
    def from_frame(cls, steps: pd.DataFrame, title: str, uri: str | None = None, status: str = "complete") -> Cockpit:
        """The cockpit of a run that is over.

        Args:
            steps: a frame with the columns of `run.steps`; a quantity that is NaN throughout counts as not recorded.
            title: what is shown, usually the path of the run.
            uri: where the run lies, for `code()`.
            status: how the run ended: "complete", "interrupted", "killed", "stopped", or "recording".

        >>> Cockpit.from_frame(pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]}), "runs/fc").query
        'show loss'
        """
        cockpit = cls(title, uri=uri)
        present = [name for name in _NAMES if name in steps and not np.isnan(steps[name].to_numpy(dtype=float)).all()]
        cockpit.feed({name: steps[name].to_numpy() for name in ("step", *present)})
        cockpit.finish(status)
        return cockpit

    def feed(self, columns: Mapping[str, ArrayLike]) -> None:
        """Take in more steps; safe from any thread, at any rate.

        Args:
            columns: "step" and any of loss, lr, grad_norm, update_ratio, each of shape (n,). NaN is shown as such,
                only in update_ratio it means that the ratio was not measured at this step.

        Raises:
            NbdynError: if "step" is missing or a name is unknown.
        """
        for name in columns:
            if name not in ("step", *_NAMES):
                raise NbdynError(f"The cockpit shows no {name!r}; {did_you_mean(name, _NAMES)}")
        if "step" not in columns:
            raise NbdynError(f'The cockpit needs "step" beside {", ".join(columns) or "its values"}.')
        with self._lock:
            self._take(columns)
            wait = self._pushed + INTERVAL - time.monotonic()
            if wait <= 0:
                self._drop_timer()
                self._push()
            elif self._timer is None:
                # Nothing may follow for minutes (validation): a timer brings what came last.
                self._timer = threading.Timer(wait, self._push_late)
                self._timer.daemon = True
                self._timer.start()

    def finish(self, status: str) -> None:
        """Show all that was fed, and how the recording ended; in a notebook, renew the picture that is saved with it.

        Args:
            status: "complete", "interrupted", "killed" or "stopped" ("recording" for a run of another process).
        """
        with self._lock:
            self.status = status
            self._drop_timer()
            self._push()
        if threading.current_thread() is threading.main_thread():
            self._renew_picture()

    def frame(self) -> pd.DataFrame:
        """Exactly what is drawn (there as float32): one row a bin, in steps.

        Columns: quantity, step_first, step_last, low, high, mean, nan_count (NaN and infinite values).
        """
        with self._lock:
            used = [name for name in _NAMES if self._envelopes[name].size] or _NAMES[:1]
            frame = pd.concat([self._table(name) for name in used], ignore_index=True)
        frame.attrs[PROVENANCE] = {"run": self.title, "uri": self.uri or "", "what": "cockpit", "steps": self._reach()}
        return frame

    @property
    def query(self) -> str:
        """The statement that gives the same quantities, step by step."""
        return "show " + ", ".join(q.phrase for q in QUANTITIES if self._envelopes[q.name].size)

    def code(self) -> str:
        """Python text that opens the same view again.

        Raises:
            NotRecorded: if the cockpit was fed by hand, from no run on disk.
        """
        if self.uri is None:
            raise NotRecorded("This cockpit shows no run on disk; make one with nbdyn.record(path, model, optimizer).")
        return f"import nbdyn\n\nnbdyn.open({self.uri!r}).cockpit()\n"

    def chart(self) -> Any:
        """The same panels as an altair chart; it shows itself without network.

        Raises:
            NotRecorded: if there is no step yet.
        """
        with self._lock:
            shown = [q for q in QUANTITIES if self._envelopes[q.name].size]
            if not shown:
                raise NotRecorded("There is nothing to draw: the cockpit has no step yet.")
            tables = {q: self._table(q.name).rename(columns=lambda c: c.replace("step_", "x_")) for q in shown}
            notes = {q: show_number(self._envelopes[q.name].final) for q in shown}
            subtitle = f"steps {self._reach()}, {self.status}; band: min-max, line: mean"
        panels = [
            panel(
                tables[q], q.label, "step" if q is shown[-1] else None,
                color=q.color, log=q.log, size=(640, 120 if q is shown[0] else 66), note=notes[q],
            )
            for q in shown
        ]  # fmt: skip
        return stack(panels, self.title, subtitle)

    def _take(self, columns: Mapping[str, ArrayLike]) -> None:
        steps = np.asarray(columns["step"], dtype=np.int64)
        for name in _NAMES:
            if name in columns:
                values = np.asarray(columns[name], dtype=np.float64)
                kept = ~np.isnan(values) if name == "update_ratio" else slice(None)
                self._envelopes[name].add(steps[kept], values[kept])
        if steps.size:
            self._first = int(steps.min()) if self._size == 0 else self._first
            self._last = max(self._last, int(steps.max()))
            self._size += steps.size

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _push_late(self) -> None:
        with self._lock:
            if threading.current_thread() is self._timer:  # else it was dropped while it waited for the lock
                self._timer = None
                self._push()

    def _push(self) -> None:
        self._pushed = time.monotonic()
        self.wire = self._pack()

    def _pack(self) -> dict[str, Any]:
        """Meta as JSON values and one block of bytes; `decode` in core.js is the reverse."""
        limit = np.finfo(np.float32).max
        blocks, series = [], []
        for quantity in QUANTITIES:
            e = self._envelopes[quantity.name]
            blocks.append(np.stack([e.first - e.origin, e.last - e.origin, e.nan_count]).astype("<i4"))
            blocks.append(np.clip([e.low, e.high, e.mean], -limit, limit).astype("<f4"))
            series.append(
                {
                    "name": quantity.name, "label": quantity.label, "color": quantity.color, "log": quantity.log,
                    "n": e.size, "bins": len(e.low), "origin": e.origin, "width": e.width,
                    "last": e.final if np.isfinite(e.final) else None, "nan": int(e.nan_count.sum()),
                }
            )  # fmt: skip
        meta = {
            "title": self.title, "source": self.uri or "", "status": self.status,
            "first": self._first, "last": self._last, "n": self._size, "series": series,
        }  # fmt: skip
        return {"meta": meta, "data": b"".join(block.tobytes() for block in blocks)}

    def _table(self, name: str) -> pd.DataFrame:
        e = self._envelopes[name]
        return pd.DataFrame(
            {
                "quantity": np.full(len(e.low), name, dtype=object), "step_first": e.first, "step_last": e.last,
                "low": e.low, "high": e.high, "mean": e.mean, "nan_count": e.nan_count,
            }
        )  # fmt: skip

    def _reach(self) -> str:
        return f"{self._first}..{self._last}" if self._size else "none"

    def _caption(self) -> str:
        return f"cockpit of {self.title}, " + (f"steps {self._reach()}" if self._size else "no steps yet")

    def _has_picture(self) -> bool:
        return self._size > 0
