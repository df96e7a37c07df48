"""Statements from Python arguments, so that methods of a run and the language are one and the same."""

from __future__ import annotations

from collections.abc import Sequence

from nbdyn.errors import QueryError
from nbdyn.query.tree import number_text


def top(
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
) -> str:
    """The text of a `top` statement.

    >>> top(20, "samples", per="weight", of="fc1.*", by="sum |g|", epoch=7)
    'top 20 samples per weight of fc1.* by sum |g| during epoch 7'
    """
    head = f"top {count} {what}" + (f" per {per}" if per else "") + (f" of {of}" if of else "")
    return _join(f"{head} by {by}", scope(epoch, step), where, within)


def group(
    what: str,
    *,
    by: str,
    into: int = 8,
    of: str | None = None,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
    where: str | None = None,
    within: str | float | None = None,
) -> str:
    """The text of a `group` statement.

    >>> group("weights", by="sum |grad|")
    'group weights by sum |grad| into 8'
    """
    head = f"group {what}" + (f" of {of}" if of else "")
    return _join(f"{head} by {by} into {into}", scope(epoch, step), where, within)


def show(
    *items: str,
    per: str | Sequence[str] | None = None,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
    where: str | None = None,
    within: str | float | None = None,
) -> str:
    """The text of a `show` statement.

    >>> show("loss", "|grad|", epoch=3)
    'show loss, |grad| during epoch 3'
    """
    units = [per] if isinstance(per, str) else list(per or ())
    head = f"show {', '.join(items)}" + (f" per {', '.join(units)}" if units else "")
    return _join(head, scope(epoch, step), where, within)


def last(
    count: int,
    before: str,
    *,
    every: bool = False,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
) -> str:
    """The text of a `last` statement.

    >>> last(50, "share(|grad| > explode) > 10%", every=True)
    'last 50 samples before every share(|grad| > explode) > 10%'
    """
    return _join(f"last {count} samples before {'every ' * every}{before}", scope(epoch, step), None, None)


def compare(
    names: Sequence[str],
    by: str | Sequence[str],
    *,
    epoch: int | tuple[int, int] | None = None,
    step: int | tuple[int, int] | None = None,
) -> str:
    """The text of a `compare` statement.

    >>> compare(["a", "b"], by=["progress(loss)", "acc"], step=500)
    'compare `a`, `b` by progress(loss), acc at step 500'
    """
    measures = by if isinstance(by, str) else ", ".join(by)
    runs = ", ".join(f"`{name}`" for name in names)
    return _join(f"compare {runs} by {measures}", scope(epoch, step), None, None)


def scope(epoch: int | tuple[int, int] | None, step: int | tuple[int, int] | None) -> str:
    """The text of a scope: a number, or the first and last of a range, both included.

    Raises:
        QueryError: if both an epoch and a step are given.

    >>> scope(None, (0, 99)), scope(3, None), scope(None, None)
    ('during steps 0..99', 'during epoch 3', '')
    """
    if epoch is not None and step is not None:
        raise QueryError(f"epoch={epoch} and step={step}: a statement has one scope; give one of them.")
    if epoch is not None:
        return f"during epochs {epoch[0]}..{epoch[1]}" if isinstance(epoch, tuple) else f"during epoch {epoch}"
    if step is not None:
        return f"during steps {step[0]}..{step[1]}" if isinstance(step, tuple) else f"at step {step}"
    return ""


def _join(head: str, scope: str, where: str | None, within: str | float | None) -> str:
    words = [head, scope, f"where {where}" if where else ""]
    if within is not None:
        words.append(f"approximately within {within if isinstance(within, str) else number_text(100 * within) + '%'}")
    return " ".join(word for word in words if word)
