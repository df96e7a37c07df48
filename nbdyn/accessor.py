"""`df.dyn`: what can be done next with any frame that has steps or samples, or that answers a statement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError, UnknownName, did_you_mean
from nbdyn.schema import PROVENANCE
from nbdyn.thumbnails import Thumbnails, thumbnails

if TYPE_CHECKING:
    from nbdyn.statistics.heavy_tail.result import TailFit

_LINES = ("run", "layer", "tensor", "weight", "parameter")
"""Columns that say which line a row belongs to, when the frame holds several."""
_POSITIONS = ("step", "epoch", "position", "sample", "batch_size", "seconds", "skipped", *_LINES)
"""Columns that say where a value stands; they are neither smoothed nor drawn unless asked for."""
_AT_EVERY_STEP = ("loss", "lr", "grad_norm", "|grad|")
"""Quantities whose NaN is news; in all others (logged now and then, measured every 50 steps) it means: no value."""


@pd.api.extensions.register_dataframe_accessor("dyn")
class Dyn:
    """The next steps of a frame: draw it, show its samples, smooth it, pivot it.

    A frame needs a column (or index level) "step", or a column "sample", or to be one that nbdyn made. It may be wide
    (one column a quantity) or tidy (columns "quantity" and "value"). Nothing is kept between two calls, and the
    frame is never changed; `smooth` and `wide` give new frames, so that they chain.

    Args:
        frame: the frame; `nbdyn.dyn(frame)` is the same as `frame.dyn`, for type checkers.

    Raises:
        AttributeError: if it is none of these.

    >>> frame = pd.DataFrame({"step": [0, 1], "loss": [2.0, 1.0]})
    >>> frame.dyn.smooth(window=2).loss.tolist()
    [2.0, 1.5]
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        """Check the columns; pandas makes the accessor anew at every use, so nothing else happens here."""
        known = {"step", "sample"} & {*frame.columns, *frame.index.names}
        if not known and not frame.attrs.get(PROVENANCE):
            present = ", ".join(map(str, frame.columns[:12])) or "no columns"
            example = next((str(c) for c in frame.columns if str(c) in ("iter", "iteration", "t", "batch")), "iter")
            # pandas shows an AttributeError to the user and leaves `dyn` out of completion.
            raise AttributeError(
                f"df.dyn needs a 'step' column; this frame has {present}. "
                f"Use df.rename(columns={{'{example}': 'step'}}) or nbdyn.as_frame(df, step='{example}')."
            )
        self._frame = frame

    def plot(self, y: str | Sequence[str] | None = None, x: str | None = None, color: str | None = None) -> Any:
        """A picture, as an altair chart that shows itself without network.

        Without arguments, an answer of `top`, `group`, `last`, `compare ... at step` or `show ... per` gets the picture
        that fits it, see `nbdyn.plots.picture`: bars, heat maps, maps of the weights, strips of samples.

        All else is small multiples over one axis. More rows than a chart can hold are reduced to bins that keep their
        least and greatest value (the band) and their mean (the line), so that no spike is lost. Infinite values are
        marked along the top, and so is NaN in loss, lr and gradient norm; elsewhere NaN means that there was no value
        at this step.

        Args:
            y: one quantity or several; None takes all that hold finite numbers and are no positions (step, epoch, ...).
            x: the column of the shared axis; None takes "step", or "epoch" or "sample" where there is no step.
            color: the column that tells lines apart; None takes the first of run, layer, tensor, weight, parameter.

        Raises:
            UnknownName: if a quantity or column does not exist.
            NbdynError: if there is nothing to draw, no picture of it, or more lines than a chart can hold.
        """
        frame = self._flat()
        from nbdyn import plots  # altair takes a second or more to import

        if y is None and x is None and color is None and (chart := plots.picture(frame)) is not None:
            return chart
        x = x or next((name for name in ("step", "epoch", "sample") if name in frame), "step")
        wide = _pivot(frame, [c for c in (*_POSITIONS, color, x) if c and c in frame]) if _is_tidy(frame) else frame
        if y is None:
            names = [name for name in _quantities(wide, (x, color)) if _any_finite(wide[name])]
        else:
            names = [y] if isinstance(y, str) else list(y)
        color = color or next((c for c in _LINES if c in wide), None)
        for name in filter(None, (x, color, *names)):
            if name not in wide:
                raise UnknownName(f"The frame has no {name!r}; {did_you_mean(name, map(str, wide.columns))}")
        for name in names:
            if not _any_finite(wide[name]):
                raise NbdynError(f"There is nothing to draw: {name!r} holds no finite number.")
        if not names:
            raise NbdynError("There is nothing to draw: beside positions no column of this frame holds a number.")
        wide.attrs = dict(self._frame.attrs)
        return plots.lines(wide, names, x, color, every=_AT_EVERY_STEP)

    def thumbnails(self, data: Any, columns: int = 10) -> Thumbnails:
        """The samples of the frame as small pictures with rank, class, loss or value below them.

        Args:
            data: the data set that was recorded; see `nbdyn.thumbnails.thumbnails` for what it may be.
            columns: pictures in a row.

        Raises:
            NbdynError: if there is no column "sample", a sample is not in `data`, or samples are no pictures.
        """
        return thumbnails(self._flat(), data, columns)

    def smooth(self, *, ema: float | None = None, window: int | None = None) -> pd.DataFrame:
        """A new frame whose quantities are averaged over earlier steps; positions and `attrs` stay.

        With `ema` = a, the exponential moving average without the bias of its start:
        m[t] = a m[t-1] + (1 - a) x[t], m[-1] = 0, y[t] = m[t] / (1 - a^(t+1)). With `window` = n, the mean over the
        last n rows. NaN and infinite values stay where they are and enter no average. Frames with several runs, layers,
        tensors or quantities are averaged one by one.

        Args:
            ema: the weight of the past, 0 <= a < 1.
            window: the number of rows, at least 1.

        Raises:
            NbdynError: unless exactly one of the two is given, in its range.
        """
        if (ema is None) == (window is None):
            raise NbdynError("smooth needs one of the two: smooth(ema=0.9) or smooth(window=25).")
        if ema is not None and not 0 <= ema < 1:
            raise NbdynError(f"ema is the weight of the past, from 0 up to (not including) 1, such as 0.9; not {ema}.")
        if window is not None and (window < 1 or window != int(window)):
            raise NbdynError(f"window is a number of steps, at least 1, not {window}.")

        frame = self._over_steps().copy()
        keys = [c for c in (*_LINES, "quantity") if c in frame]
        ordered = frame.sort_values("step", kind="stable")
        for name in _quantities(frame, ()):
            if keys:
                groups = ordered.groupby(keys, sort=False, dropna=False)[name]
                frame[name] = groups.transform(_average, ema=ema, window=window)
            else:
                frame[name] = _average(ordered[name], ema, window)
        frame = frame.set_index(self._frame.index.names) if "step" in self._frame.index.names else frame
        frame.attrs = dict(self._frame.attrs)
        return frame

    def tail(self, y: str, family: str = "power law", **options: Any) -> TailFit:
        """How heavy is the tail of a column? A fit with intervals, goodness of fit, alternatives; `.plot()` draws it.

        Args:
            y: the column.
            family: a name of `nbdyn.statistics.heavy_tail.FAMILIES`: "power law", "stable", "double Weibull", ...
            options: those of the fit, such as bootstrap=200.

        Raises:
            UnknownName: if there is no such column or family.
            Incompatible: for values that the family does not take.

        >>> frame = pd.DataFrame({"step": range(1_000), "x": np.random.default_rng(0).standard_normal(1_000)})
        >>> frame.dyn.tail("x", "stable", bootstrap=0)["alpha"].value > 1.9
        True
        """
        from nbdyn.statistics.heavy_tail import FAMILIES

        frame = self._flat()
        for name, known in ((y, map(str, frame.columns)), (family, FAMILIES)):
            if name not in (known := list(known)):
                raise UnknownName(f"There is no {name!r}; {did_you_mean(name, known)}")
        return FAMILIES[family](frame[y].to_numpy(np.float64), **options)

    def trend(self, y: str) -> pd.DataFrame:
        """Does a quantity go up or down over the steps? One row a run, and one over the runs.

        The null keeps the dependence of neighbouring steps; see `nbdyn.statistics.trends.trends` for the columns.

        Raises:
            UnknownName: if there is no such column.
            Incompatible: for a run of fewer than ten values.

        >>> frame = pd.DataFrame({"step": range(40), "loss": np.arange(40) * -0.1 + np.tile([0.0, 1.0, 0.5, -1.0], 10)})
        >>> frame.dyn.trend("loss")[["n", "slope"]].round(2).values.tolist()
        [[40.0, -0.1]]
        """
        from nbdyn.statistics.trends import trends

        return trends(self._over_steps(), y)

    def suggest(self) -> pd.DataFrame:
        """Which quantities go together? Pairs ranked on one half of the runs or steps; the other half is held back.

        What is found is exploratory: many pairs were looked at. `confirm(x, y)` asks the held-back half about one of
        them. See `nbdyn.statistics.associations.suggest` for the columns, the halves and the null.

        Raises:
            Incompatible: if fewer than two quantities vary, rows are too few, or a step is there twice in a run.

        >>> rng = np.random.default_rng(0)
        >>> frame = pd.DataFrame({"step": range(400), "a": rng.normal(size=400)})
        >>> frame.assign(b=frame.a + rng.normal(size=400)).dyn.suggest().loc[0, ["x", "y", "half"]].tolist()
        ['a', 'b', 'explored: every second of 8 blocks of steps']
        """
        from nbdyn.statistics.associations import suggest

        return suggest(*self._associated())

    def confirm(self, x: str, y: str) -> pd.DataFrame:
        """A pair that `suggest` found, on the half that it held back: one row, whose p is for one pair chosen before.

        Raises:
            UnknownName: if there is no such quantity.
            Incompatible: as `suggest`.
        """
        from nbdyn.statistics.associations import confirm

        return confirm(*self._associated(), x, y)

    def _associated(self) -> tuple[pd.DataFrame, list[str]]:
        """The frame, one column a quantity, and the quantities."""
        frame = self._flat()
        wide = _pivot(frame, [c for c in _POSITIONS if c in frame]) if _is_tidy(frame) else frame.reset_index()
        wide.attrs = dict(self._frame.attrs)
        return wide, [name for name in _quantities(wide, ("index", "level_0"))]

    def wide(self) -> pd.DataFrame:
        """A tidy frame (columns "quantity", "value") with one column a quantity; the index is the step, after the run.

        Raises:
            NbdynError: if the frame is not tidy, or holds two values of one quantity at one place.

        >>> tidy = pd.DataFrame({"step": [0, 0], "quantity": ["loss", "lr"], "value": [2.0, 0.1]})
        >>> tidy.dyn.wide().loc[0].tolist()
        [2.0, 0.1]
        """
        frame = self._over_steps()
        if not _is_tidy(frame):
            raise NbdynError(f"wide needs the columns quantity and value; this frame has {', '.join(frame.columns)}.")
        index = [c for c in (*_LINES, "step") if c in frame]
        wide = _pivot(frame, index).set_index(index)
        wide.attrs = dict(self._frame.attrs)
        return wide

    def _flat(self) -> pd.DataFrame:
        """The frame with steps and samples as columns."""
        there = {"step", "sample"} & set(self._frame.index.names)
        return self._frame.reset_index() if there - set(self._frame.columns) else self._frame

    def _over_steps(self) -> pd.DataFrame:
        frame = self._flat()
        if "step" not in frame.columns:
            raise NbdynError(
                f"There is no column 'step' to go along; this frame has {', '.join(map(str, frame.columns))}."
            )
        return frame


dyn = Dyn
"""`nbdyn.dyn(df)`: the same as `df.dyn`."""


def as_frame(data: pd.DataFrame | Mapping[str, Any], step: str) -> pd.DataFrame:
    """A frame that `df.dyn` takes: the column `step` renamed to "step".

    Args:
        data: a frame, or a mapping from names to columns.
        step: the name of the column that counts the steps.

    Raises:
        UnknownName: if there is no such column.
        NbdynError: if there is another column called "step".

    >>> as_frame({"iter": [0, 1], "loss": [2.0, 1.0]}, step="iter").columns.tolist()
    ['step', 'loss']
    """
    frame = pd.DataFrame(data)
    if step not in frame:
        raise UnknownName(f"There is no column {step!r}; {did_you_mean(step, map(str, frame.columns))}")
    if step != "step" and "step" in frame:
        raise NbdynError(f"There is a column 'step' already; drop or rename it before {step!r} takes its name.")
    return frame.rename(columns={step: "step"})


def _average(values: Any, ema: float | None, window: int | None) -> Any:
    """A column averaged over earlier rows; what is not finite stays and enters no average."""
    values = values.astype("float64")
    finite = values.where(np.isfinite(values))
    if ema is not None:
        # ignore_na: a NaN does not age the past; adjust is the division by 1 - a^(t+1)
        mean = finite.ewm(alpha=1 - ema, adjust=True, ignore_na=True).mean()
    else:
        mean = finite.rolling(window, min_periods=1).mean()
    return mean.where(finite.notna(), values)


def _any_finite(column: Any) -> bool:
    from nbdyn.plots import numbers

    return pd.api.types.is_numeric_dtype(column) and bool(np.isfinite(numbers(column)).any())


def _is_tidy(frame: pd.DataFrame) -> bool:
    return "quantity" in frame and "value" in frame


def _quantities(frame: pd.DataFrame, besides: Sequence[str | None]) -> list[str]:
    """The columns of numbers that are not positions."""
    numbers = frame.select_dtypes(include=["number"]).columns
    return [str(name) for name in numbers if name not in _POSITIONS and name not in besides]


def _pivot(frame: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """Tidy to wide, with the index columns as columns; the quantities keep their order."""
    index = list(dict.fromkeys(index))
    twice = frame.duplicated([*index, "quantity"])
    if twice.any():
        first = frame.loc[twice.idxmax()]
        place = ", ".join(f"{c} {first[c]}" for c in index)
        raise NbdynError(f"There are two values of {first['quantity']!r} at {place}; aggregate them first.")
    wide = frame.pivot(index=index, columns="quantity", values="value")[list(frame["quantity"].unique())]
    wide.columns.name = None
    return wide.reset_index()
