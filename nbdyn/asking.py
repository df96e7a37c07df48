"""Statements of the language as methods of a run: `run.top`, `.group`, `.show`, `.last`, `.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import pandas as pd


class Asked(Protocol):
    """What can be asked: a `nbdyn.Run`."""

    @property
    def uri(self) -> str:
        """Where the run lies."""
        ...

    def query(self, text: str) -> pd.DataFrame:
        """The answer to a statement."""
        ...


def top(
    run: Asked,
    count: int | str,
    what: str,
    *,
    by: str,
    per: str | None = None,
    of: str | None = None,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
    where: str | None = None,
    within: str | float | None = None,
) -> pd.DataFrame:
    """The members of largest measure: `run.top(20, "samples", per="weight", of="fc1.*", by="sum |g|", epoch=7)`.

    The same as the statement `top 20 samples per weight of fc1.* by sum |g| during epoch 7`; see docs/query.md.
    A range of epochs or steps is a pair, both ends included.
    """
    from nbdyn.query import statements  # the whole language, which opening a run does without

    scope = {"epoch": epoch, "step": step}
    return run.query(statements.top(count, what, by=by, per=per, of=of, where=where, within=within, **scope))


def group(
    run: Asked,
    what: str,
    *,
    by: str,
    into: int = 8,
    of: str | None = None,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
    where: str | None = None,
) -> pd.DataFrame:
    """Members in bins of their measure: `run.group("weights", by="sum |grad|", into=8)`, as `group weights ...`."""
    from nbdyn.query import statements  # the whole language, which opening a run does without

    return run.query(statements.group(what, by=by, into=into, of=of, epoch=epoch, step=step, where=where))


def show(
    run: Asked,
    *items: str,
    per: str | Sequence[str] | None = None,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
    where: str | None = None,
) -> pd.DataFrame:
    """Values as recorded or measured: `run.show("loss", "|grad|", epoch=3)`, as `show loss, |grad| ...`."""
    from nbdyn.query import statements  # the whole language, which opening a run does without

    return run.query(statements.show(*items, per=per, epoch=epoch, step=step, where=where))


def last(
    run: Asked,
    count: int,
    before: str,
    *,
    every: bool = False,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
) -> pd.DataFrame:
    """The samples before an event: `run.last(50, "fc1.weight[3,5] becomes 0 within 1e-6")`, as `last 50 ...`."""
    from nbdyn.query import statements  # the whole language, which opening a run does without

    return run.query(statements.last(count, before, every=every, epoch=epoch, step=step))


def compare(
    run: Asked,
    *others: str | Asked,
    by: str | Sequence[str],
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
) -> pd.DataFrame:
    """This run beside others: `run.compare(other, by="progress(loss)", step=500)`, as `compare ... by ...`."""
    from nbdyn.query import statements  # the whole language, which opening a run does without

    names = [run.uri, *(other if isinstance(other, str) else other.uri for other in others)]
    return run.query(statements.compare(names, by, epoch=epoch, step=step))
