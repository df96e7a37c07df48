"""How the cost of each of the five questions grows with visits, parameters and steps, over two decades each.

    python -m tests.benchmarks.growth                # Markdown: seconds, and the slopes of log(seconds) in log(size)
    python -m tests.benchmarks.growth --figure       # and docs/images/growth.svg

The training is that of `questions.py`; one size is varied, the others stay. A slope of 1 is a cost that is
proportional, 0 one that does not depend on the size. Seconds are the medians of warm answers, the frame included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.questions import ask, machine, record
from tests.benchmarks.rivals.asked import QUESTIONS, choose
from tests.benchmarks.rivals.training import Problem, prepare

FIGURE = Path(__file__).parents[2] / "docs" / "images" / "growth.svg"


def problem(visits: int = 10_000, hidden: int = 32, steps: int = 100, data: str = "mnist") -> Problem:
    """A training of two epochs whose inputs explode at three steps: an MLP with one hidden layer.

    Args:
        visits: a multiple of `steps`.
        hidden: units; a unit has 795 parameters on MNIST.
        steps: even.
        data: "mnist" or "digits".
    """
    explosions = tuple(int(share * steps) for share in (0.6, 0.75, 0.9))
    widths = (784 if data == "mnist" else 64, hidden, 10)
    return Problem(data, visits // 2, 2, visits // steps, widths, explosions)


AXES: dict[str, list[Problem]] = {
    "visits": [problem(visits=n) for n in (1_000, 3_200, 10_000, 32_000, 100_000)],
    "parameters": [problem(hidden=n) for n in (6, 20, 63, 200, 630)],
    "steps": [problem(visits=20_000, steps=n) for n in (20, 80, 200, 400, 2_000)],
}
"""What is varied, and where."""


def cost(what: Problem, questions: Iterable[int], repeats: int) -> dict[int, float]:
    """Record, and ask each question: seconds of a warm answer."""
    seconds: dict[int, list[float]] = {q: [] for q in questions}
    with tempfile.TemporaryDirectory(prefix="nbdyn-benchmark-") as scratch:
        folder = Path(scratch)
        prepare(what, folder)
        asked = choose(what, folder)
        record("nbdyn", what, folder)
        for _ in range(repeats):
            for question, found in seconds.items():
                found += ask("nbdyn", question, asked, what, folder)[0][1:]
    return {question: statistics.median(found) for question, found in seconds.items()}


def measure(axes: dict[str, list[Problem]], questions: Iterable[int], repeats: int) -> pd.DataFrame:
    """A row an axis, size and question: axis, size, question, seconds."""
    rows = [
        {"axis": axis, "size": getattr(what, axis), "question": question, "seconds": seconds}
        for axis, problems in axes.items()
        for what in problems
        for question, seconds in cost(what, questions, repeats).items()
    ]
    return pd.DataFrame(rows)


def slope(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """Slope of log(seconds) in log(size) by least squares, and its standard error.

    >>> slope(np.array([1.0, 10.0, 100.0]), np.array([3.0, 30.0, 300.0]))
    (1.0, 0.0)
    """
    x, y = np.log10(sizes) - np.log10(sizes).mean(), np.log10(seconds)
    found = float(x @ y / (x @ x))
    rest = y - y.mean() - found * x
    error = float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))
    return round(found, 3), round(error, 3)


def slopes(times: pd.DataFrame) -> pd.DataFrame:
    """A row an axis and question: axis, question, slope, error."""
    rows: list[dict[str, Any]] = []
    for (axis, question), part in times.groupby(["axis", "question"], sort=False):
        found, error = slope(part["size"].to_numpy(np.float64), part["seconds"].to_numpy())
        rows.append({"axis": axis, "question": question, "slope": found, "error": error})
    return pd.DataFrame(rows)


def table(times: pd.DataFrame) -> str:
    """A Markdown table an axis: seconds by size, and the slope in the last line."""
    fitted, lines = slopes(times).set_index(["axis", "question"]), []
    for axis, part in times.groupby("axis", sort=False):
        seconds = part.pivot(index="size", columns="question", values="seconds")
        lines += [f"| {axis} | " + " | ".join(f"question {q}, s" for q in seconds) + " |"]
        lines += ["|---|" + "---|" * len(seconds.columns)]
        lines += [f"| {size:,} | " + " | ".join(f"{s:.4f}" for s in row) + " |" for size, row in seconds.iterrows()]
        found = [fitted.loc[(axis, question)] for question in seconds]
        lines += ["| slope | " + " | ".join(f"{f['slope']:.2f} ± {f['error']:.2f}" for f in found) + " |", ""]
    return "\n".join(lines)


def figure(times: pd.DataFrame, path: Path) -> None:
    """Draw seconds over size, a panel an axis, a line a question."""
    import altair as alt

    panels = []
    for axis, part in times.groupby("axis", sort=False):
        lines = alt.Chart(part.astype({"question": str})).mark_line(point=True)
        x = alt.X("size:Q", title=str(axis)).scale(type="log").axis(format="~s", tickCount=3)
        y = alt.Y("seconds:Q", title="seconds").scale(type="log").axis(format="~g", tickCount=4)
        panels.append(lines.encode(x=x, y=y, color="question:N").properties(width=180, height=180))
    path.parent.mkdir(parents=True, exist_ok=True)
    alt.hconcat(*panels).resolve_scale(y="shared").save(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", nargs="+", type=int, choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--figure", action="store_true", help="draw docs/images/growth.svg, too")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    chosen = parser.parse_args(arguments)
    times = measure({axis: AXES[axis] for axis in chosen.axes}, chosen.questions, chosen.repeats)
    print(", ".join(f"{key} {value}" for key, value in machine(["nbdyn"]).items()) + "\n")
    print("\n".join(f"{number}. {QUESTIONS[number]}" for number in chosen.questions) + "\n")
    print(table(times))
    if chosen.figure:
        figure(times, FIGURE)
    if chosen.json:
        chosen.json.write_text(json.dumps(times.to_dict("records"), indent=1))


if __name__ == "__main__":
    main()
