"""What a statement reads from: one run's frames, its columns by name, and steps of its epochs."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbdyn.errors import Incompatible, QueryError, UnknownName, did_you_mean, nearest
from nbdyn.query.evaluate import Array, rebuilt
from nbdyn.query.tokens import caret
from nbdyn.query.tree import Call, Expression, Field, In, Logic, Not, OneOf, Scope, Selector, field_text
from nbdyn.query.words import ALIASES, BOOLEAN_FIELDS, FIELDS, NORMS
from nbdyn.store import frames
from nbdyn.store.names import Selection, select

if TYPE_CHECKING:
    from nbdyn.store import Store

Names = Callable[[str], Any]

_ASKED_BY = {"samples": "show ... per sample", "norms": "show ... per tensor", "steps": "show ... per step"}
"""How the fields of another table are asked for."""


def logged(store: Store) -> list[str]:
    """The step fields that this run has besides the usual ones: further learning rates and logged values."""
    parts = [column.partition("/") for column in store.columns]
    rates = [f"lr_{name}" for kind, _, name in parts if kind == "lr" and name != "0"]
    return rates + [name for kind, _, name in parts if kind == "log"]


class Source:
    """One run as the query room sees it.

    Args:
        store: the run.
        text: the statement, for carets.
        names: gives what is called by a name, for `sample in hot`: a frame, a column, or numbers.
    """

    def __init__(self, store: Store, text: str, names: Names | None = None) -> None:
        self._names = names
        self.store = store
        self.text = text
        self.name: str = store.name
        self.steps: int = store.steps_committed
        self.tensors: list[dict[str, Any]] = store.config["tensors"]
        self.parameters = sum(int(tensor["size"]) for tensor in self.tensors)

    @cached_property
    def index(self) -> pd.DataFrame:
        """Epoch and batch size of every step."""
        return frames.steps(self.store).loc[:, ["epoch", "batch_size"]]

    def read(self, table: str, start: int, stop: int) -> pd.DataFrame:
        """Rows of a table for steps start..stop-1 (all samples for "samples")."""
        if table == "samples":
            return frames.samples(self.store)
        frame: pd.DataFrame = getattr(frames, table)(self.store, start, stop)
        if table == "norms":
            frame["epoch"] = self.index["epoch"].to_numpy()[frame["step"].to_numpy()]
        return frame

    def columns(self, frame: pd.DataFrame) -> dict[str, Array]:
        """A frame's columns as arrays for expressions: what is unknown (-1 of `correct`) is NaN."""
        columns: dict[str, Array] = {str(name): frame[name].to_numpy() for name in frame.columns}
        if "correct" in columns:
            correct = columns["correct"].astype(np.float64)
            columns["correct"] = np.where(correct < 0, np.nan, correct)
        return columns

    def fields(self, table: str) -> list[str]:
        """Names of the fields of a table of this run."""
        known = list(FIELDS[table])
        if table == "steps":
            known += logged(self.store)
        return known

    def error(self, message: str, position: int) -> QueryError:
        """An error about the statement, with a caret."""
        return QueryError(caret(self.text, position, message))

    def bind(self, node: Expression, table: str, *, condition: bool = False) -> Expression:
        """An expression with its names resolved to columns of a table.

        Raises:
            QueryError: for an unknown field (with the nearest one), or a field that is no condition.
        """
        known = self.fields(table)

        def change(part: Expression) -> Expression | None:
            match part:
                case Call("abs", Field(name)) if name in NORMS and NORMS[name] in known and name not in known:
                    return Field(NORMS[name], part.position)
                case Field(name):
                    return self._column(part, table, known)
                case In() | OneOf():
                    return self._among(part, table, known)
                case _:
                    return None

        bound = rebuilt(node, change)
        if condition:
            self._check_conditions(bound)
        return bound

    def _column(self, field: Field, table: str, known: list[str]) -> Field:
        name = field.name if field.name in known else ALIASES.get(field.name, field.name)
        if name == "tensor" and name in known:
            raise self.error("tensor is a name, no number; every result per tensor has it as a column.", field.position)
        if name in known:
            return Field(name, field.position)
        if name in NORMS:
            where = "" if NORMS[name] in known else " in show ... per tensor"
            message = f"{name} has one value a parameter; its norm is |{name}|{where}, its values: show w of fc1.*."
            raise self.error(message, field.position)
        raise self.error(f'unknown field "{name}" of {table}; {self._hint(name, table, known)}', field.position)

    def _among(self, node: In | OneOf, table: str, known: list[str]) -> OneOf:
        """A node with its numbers, of a field that the table has."""
        field = self._column(Field(node.field, node.position), table, known).name
        values = node.values if isinstance(node, OneOf) else self._numbers(node)
        return OneOf(field, values, node.position)

    def _numbers(self, node: In) -> tuple[int, ...]:
        """The whole numbers that a name stands for: a frame's column of the field, or the values themselves."""
        if self._names is None:
            raise self.error(f'no result is called "{node.name}" here; names are known to %%dyn.', node.position)
        found = self._names(node.name)
        if isinstance(found, pd.DataFrame):
            if node.field not in found:
                have = ", ".join(map(str, found.columns))
                raise self.error(f'"{node.name}" has no column {node.field}; it has {have}.', node.position)
            found = found[node.field]
        values = np.unique(np.asarray(found).reshape(-1))
        if len(values) and (values.dtype.kind not in "iuf" or (values != np.floor(values)).any()):
            raise self.error(f'"{node.name}" holds {values.dtype} values; whole numbers are needed.', node.position)
        return tuple(values.astype(np.int64).tolist())

    @staticmethod
    def _hint(name: str, table: str, known: list[str]) -> str:
        """Where a name is known: in another table, or the nearest one here, or the nearest one there."""
        for other, asked in _ASKED_BY.items():
            if other != table and name in FIELDS[other]:
                return f"ask {asked}."
        if nearest(name, known) is None:
            for other, asked in _ASKED_BY.items():
                guess = nearest(name, FIELDS[other])
                if guess is not None:
                    return f'did you mean "{guess}" ({asked})?'
        return did_you_mean(name, [field_text(word) for word in known])

    def _check_conditions(self, node: Expression) -> None:
        """A bare field is a condition only where it holds true and false."""
        match node:
            case Logic(_, left, right):
                self._check_conditions(left)
                self._check_conditions(right)
            case Not(operand):
                self._check_conditions(operand)
            case Field(name, position) if name not in BOOLEAN_FIELDS:
                raise self.error(f'"{name}" is a number; a condition compares it: {name} > 0.', position)
            case _:
                pass

    def select(self, selector: Selector) -> Selection:
        """The parameters of a selector.

        Raises:
            UnknownName: with a caret and the nearest name.
            Incompatible: where an index does not fit.
        """
        try:
            return select(selector.text, self.tensors)
        except (UnknownName, Incompatible) as error:
            raise type(error)(caret(self.text, selector.position, str(error))) from None

    def tensor_names(self, indices: Array) -> Array:
        """The tensor of each global parameter index."""
        firsts = np.array([tensor["first"] for tensor in self.tensors], dtype=np.int64)
        names = np.array([tensor["name"] for tensor in self.tensors], dtype=object)
        return names[np.searchsorted(firsts, indices, side="right") - 1]

    def range(self, scope: Scope, *, rows: int | None = None) -> tuple[int, int, str]:
        """Steps of a scope, half-open, and a note where it reaches past the end.

        Args:
            scope: the scope.
            rows: how many steps there are; one more for weights, whose last row is the final weights.

        Raises:
            QueryError: where nothing of the scope is recorded.
        """
        rows = self.steps if rows is None else rows
        if scope.kind == "all":
            return 0, rows, ""
        if scope.kind == "epochs":
            return self._epochs(scope, rows)
        if scope.first >= rows:
            last = f"the last step of {self.name} is {rows - 1}" if rows else f"{self.name} has no step yet"
            raise self.error(f"step {scope.first} is not recorded; {last}.", scope.position)
        if scope.last >= rows:
            return scope.first, rows, f"the last step of {self.name} is {rows - 1}"
        return scope.first, scope.last + 1, ""

    def _epochs(self, scope: Scope, rows: int) -> tuple[int, int, str]:
        epochs = self.index["epoch"].to_numpy()
        inside = np.flatnonzero((epochs >= scope.first) & (epochs <= scope.last))
        if not len(inside):
            have = f"{epochs.min()}..{epochs.max()}" if len(epochs) else "none"
            raise self.error(f"epoch {scope.first} is not recorded; {self.name} has epochs {have}.", scope.position)
        stop = int(inside[-1]) + 1
        # The final weights follow the last step and belong to no later epoch.
        stop = rows if stop == self.steps else stop
        note = f"the last epoch of {self.name} is {epochs.max()}" if scope.last > epochs.max() else ""
        return int(inside[0]), stop, note
