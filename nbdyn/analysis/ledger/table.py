"""The ledger as people read it: a frame, one hypothesis as text or HTML, and Markdown."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from nbdyn.analysis.ledger.records import CONFIRMATORY, EXPLORATORY, Hypothesis, Outcome
from nbdyn.schema import PROVENANCE

COLUMNS = (
    "name", "version", "claim", "kind", "state", "n", "effect", "low", "high", "d", "p", "p_holm", "p_bh", "p_anytime",
    "level", "verdict", "declared", "tested",
)  # fmt: skip
NOTE = (
    "verdicts are those over the ledger as it is now: further declarations can turn them back; who declares in view of "
    "outcomes reads p_anytime; confirmatory is what was declared before the logbooks of the runs tell of a look, and "
    "frames taken by hand are not in them"
)


def frame(found: Sequence[Hypothesis], folder: str, doubts: Sequence[str] = ()) -> pd.DataFrame:
    """One row a version of a hypothesis, confirmatory ones first.

    Columns: name, version, claim, kind, state, n (runs; pairs), effect (in the unit of the measure), low, high (its
    interval at 1 - level), d (Cohen's), p (of the test alone), p_holm, p_bh, p_anytime (over the family of its kind;
    see `nbdyn.analysis.ledger.family`), level, verdict, declared, tested (UTC).
    """
    rows = [_row(one) for kind in (CONFIRMATORY, EXPLORATORY) for one in found if one.kind == kind]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["n"] = table["n"].astype("Int64")
    table[["declared", "tested"]] = table[["declared", "tested"]].apply(pd.to_datetime, utc=True)
    table.attrs[PROVENANCE] = {"what": "ledger of hypotheses", "uri": folder, "note": "; ".join([NOTE, *doubts])}
    return table


def _row(one: Hypothesis) -> dict[str, Any]:
    done = one.outcome
    row = {name: getattr(one, name) for name in COLUMNS if hasattr(one, name)}
    if done is not None:
        row |= {name: getattr(done, name) for name in ("n", "effect", "low", "high", "d", "p")}
    return row | {"tested": None if done is None else done.time}


def describe(one: Hypothesis) -> list[tuple[str, str]]:
    """What is to be said of a hypothesis, line by line."""
    title = one.name + (f", version {one.version}" if one.version > 1 else "")
    lines = [
        ("hypothesis", title),
        ("claim", one.claim),
        ("measure", one.measure),
        ("test", f"{one.test}, level {one.level:g}"),
        ("runs", f"{one.runs}; at the declaration {', '.join(run['run'] for run in one.found) or 'none'}"),
        ("declared", one.declared),
        ("kind", one.kind + (f": {'; '.join(one.reasons)}" if one.reasons else "")),
        ("state", one.state),
    ]
    if one.outcome is not None:
        lines += [("outcome", sentence(one, one.outcome)), ("verdict", f"{one.verdict}; {_adjusted(one)}")]
    elif not one.withdrawn:
        lines.append(("next", "run the cell again, or ledger.test(name): nothing was computed yet"))
    for number, again in enumerate(one.replications, 1):
        kind = f" ({'; '.join(again.reasons)})" if again.reasons else ""
        lines.append((f"replication {number}", f"{again.kind}{kind}: {sentence(one, again)}"))
    return lines


def sentence(one: Hypothesis, done: Outcome) -> str:
    """Effect, interval, n and p of a test, in words."""
    percent = f"{100 * (1 - one.level):g} %"
    text = (
        f"effect {done.effect:.4g}, {percent} interval {done.low:.4g} .. {done.high:.4g}, d {done.d:.3g}, "
        f"n = {done.n}, p = {done.p:.3g}"
    )
    if done.pairing:
        text += f", {done.pairing}"
    if done.least > one.level:
        text += f"; with n = {done.n} this test cannot give p below {done.least:.2g}, whatever the data"
    return text


def _adjusted(one: Hypothesis) -> str:
    if math.isnan(one.p_holm):
        return f"it counts in its family of {one.family} {one.kind} hypotheses as p = 1"
    return (
        f"over {one.family} {one.kind} hypothes{'e' if one.family > 1 else 'i'}s now: p {one.p_holm:.3g} (Holm), "
        f"{one.p_bh:.3g} (Benjamini-Hochberg), {one.p_anytime:.3g} (at any time)"
    )


def as_html(one: Hypothesis) -> str:
    """`describe` as an HTML table; everything is escaped."""
    rows = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{html.escape(key)}</th>"
        f"<td style='text-align:left;white-space:pre-wrap'>{html.escape(value)}</td></tr>"
        for key, value in describe(one)[1:]
    )
    return f"<div class='nbdyn-hypothesis'><b>{html.escape(describe(one)[0][1])}</b><table>{rows}</table></div>"


def markdown(found: Sequence[Hypothesis], head: str, doubts: Sequence[str] = ()) -> str:
    """A table for each kind and a section for each hypothesis.

    Args:
        found: the hypotheses.
        head: the hash of the ledger's last entry, which names the state that was exported.
        doubts: sentences on what the logbooks of runs leave in doubt.
    """
    parts = ["# Hypotheses", f"State of the ledger: `{head or 'empty'}`. {NOTE[0].upper()}{NOTE[1:]}."]
    parts += [f"**{_escaped(sentence)}.**" for sentence in doubts]
    for kind in (CONFIRMATORY, EXPLORATORY):
        mine = [one for one in found if one.kind == kind]
        if mine:
            parts += [f"## {kind.capitalize()}", _table(mine), *map(_section, mine)]
    return "\n\n".join(parts) + "\n"


def _table(found: Sequence[Hypothesis]) -> str:
    names = ("name", "version", "state", "n", "effect", "low", "high", "p", "p_holm", "p_bh", "p_anytime", "level",
             "verdict")  # fmt: skip
    rows = [[_cell(_row(one).get(name)) for name in names] for one in found]
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _escaped(str(value))


def _section(one: Hypothesis) -> str:
    lines = [f"- **{key}**: {_escaped(value)}" for key, value in describe(one)[1:]]
    source = f"\n\n    {one.source.rstrip().replace(chr(10), chr(10) + '    ')}" if one.source else ""
    return f"### {_escaped(describe(one)[0][1])}\n\n" + "\n".join(lines) + source


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for sign in ("\\", "`", "*", "_", "[", "]", "<", ">", "|", "#"):
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
