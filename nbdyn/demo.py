"""`python -m nbdyn demo`: real training runs on embedded data, recorded, asked the five questions, pictured."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import nbdyn
from nbdyn.run import Run
from nbdyn.schema import PROVENANCE
from nbdyn.settings import format_size, options

WIDTHS = (64, 48, 24, 10)
BATCH = 32
RATE = 0.05
_TOO_LARGE = 20 * RATE


@dataclass(frozen=True)
class _Asked:
    """A question, its statement and the answer."""

    question: str
    statement: str
    answer: pd.DataFrame


def demo(folder: str | os.PathLike[str] = "nbdyn-demo", epochs: int = 6) -> Path:
    """Train an MLP on handwritten digits, ask the five questions that nbdyn was made for, draw the answers.

    Three runs: two with different orders of the samples, and one whose learning rate is made 20 times too large on
    purpose at the beginning of its last epoch, so that its gradients explode.

    Args:
        folder: where the runs and the picture go; earlier ones are kept.
        epochs: passes over the 1,797 digits, at least 4; the forced run makes 4.

    Returns:
        The picture.
    """
    folder, epochs = Path(folder), max(4, epochs)
    print("Training an MLP (64-48-24-10) on 1,797 handwritten digits: two orders of the samples, and a third run whose")
    print(f"learning rate is set to {_TOO_LARGE:g} on purpose (20 times too large) in its last epoch.\n")
    quiet, options.quiet = options.quiet, True
    try:
        first, second = (_train(folder / f"order-{seed}", seed, epochs) for seed in (1, 2))
        forced = _train(folder / "too-fast", 3, 4, explode_in=3)
    finally:
        options.quiet = quiet
    for run in (first, second, forced):
        print(f"  {run!r}")
    asked = [*_about_samples_and_weights(first, second), _explosion(first, forced)]
    weight, found = _zero(first)
    asked.append(found)
    picture = folder / "demo.png"
    _draw(first, asked, weight, picture)
    print(f"\nPicture: {picture} ({format_size(picture.stat().st_size)})")
    print("Next: notebooks/02_five_questions.ipynb, or")
    print(f'  import nbdyn; run = nbdyn.open("{first.uri}"); run.query("{asked[1].statement}").dyn.plot()')
    return picture


def _train(path: Path, seed: int, epochs: int, explode_in: int | None = None) -> Run:
    """One recorded run: every weight at every step; in the epoch `explode_in` the learning rate is too large."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from tqdm.auto import tqdm

    x, y = nbdyn.datasets.digits()
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    torch.manual_seed(0)  # the same initial weights for all runs
    a, b, c, classes = WIDTHS
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    with nbdyn.record(path, model, optimizer, loss_fn, weights="every", note=f"digits, data order {seed}") as rec:
        for epoch in tqdm(range(epochs), desc=path.name, unit="epoch", leave=False):
            if epoch == explode_in:
                optimizer.param_groups[0]["lr"] = _TOO_LARGE
            for inputs, targets in rec.watch(loader):
                loss = loss_fn(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return nbdyn.open(rec, data=data)


# The questions ---------------------------------------------------------------------------------------------------


def _about_samples_and_weights(first: Run, second: Run) -> list[_Asked]:
    step = len(first) // 2
    names = ", ".join(f"`{run.name}`" for run in (first, second))  # runs of one folder know each other by name
    return [
        _ask(
            first,
            "1. Which samples caused each weight to change the most during an epoch?",
            "top 20 samples per weight of 0.weight by sum |g| during epoch 3",
        ),
        _ask(
            first,
            "2. Group the weights by how much they changed (sum of gradients) over the whole training.",
            "group weights by sum |grad| into 8 over all",
        ),
        _ask(
            first,
            "3. Two orders of the samples: how much progress by the middle?",
            f"compare {names} by progress(loss), dist(w, init), acc at step {step}",
        ),
    ]


def _explosion(healthy: Run, forced: Run) -> _Asked:
    """The samples before the forced explosion; the same question to a healthy run, for comparison."""
    statement = "last 50 samples before every share(|grad| > explode) > 10% during epoch 3"
    question = "4. The last samples before more than 10 % of the gradients were about to explode?"
    found = _ask(forced, question, statement)
    same = healthy.query(statement)
    events = len(same["event"].unique())
    note = same.attrs[PROVENANCE].get("note", "") if not events else f"{events} events"
    print(f"   The same of {healthy.name}, whose learning rate was left alone: {note}")
    return found


def _zero(run: Run) -> tuple[str, _Asked]:
    """A weight that crosses 0, of those that do so once the one that moved farthest; and the samples before that."""
    every: Any = run.query("last 1 samples before every 2.weight crosses 0 during epochs 1..3")["weight"]
    crossings = every.value_counts()
    moved: Any = run.query("top 50% weights of 2.weight by net dw")["weight"]
    once = moved[moved.isin(crossings.index[crossings == 1])]
    weight = once.iloc[0] if len(once) else crossings.index[0]
    question = "5. Which samples led this weight to become zero?"
    return weight, _ask(run, question, f"last 20 samples before {weight} crosses 0 during epochs 1..3")


def _ask(run: Run, question: str, statement: str, rows: int = 3) -> _Asked:
    """Ask, and print question, statement, the first rows and the note."""
    answer = run.query(statement)
    print(f"\n{question}\n   %dyn {statement}")
    lines = answer.head(rows).to_string(index=False).splitlines()
    print("\n".join(f"   {line}" for line in lines))
    if len(answer) > rows:
        print(f"   ... {len(answer):,} rows")
    if note := answer.attrs[PROVENANCE].get("note"):
        print(f"   ({note})")
    return _Asked(question, statement, answer)


# The picture -----------------------------------------------------------------------------------------------------


def _draw(run: Run, asked: list[_Asked], weight: str, picture: Path) -> None:
    """The five answers as panels, with thumbnails of the samples of the first."""
    import altair as alt

    from nbdyn.plots import to_png

    panels = [_panel(one) for one in asked]
    panels[0] = alt.hconcat(panels[0], _faces(run, asked[0].answer), spacing=30)
    panels[4] = _panel(asked[4], _path(run, weight, asked[4].answer) & asked[4].answer.dyn.plot().properties(title=""))
    rows = [panels[0], alt.hconcat(*panels[1:3], spacing=40).resolve_scale(color="independent"), panels[3], panels[4]]
    picture.write_bytes(to_png(alt.vconcat(*rows, spacing=36).resolve_scale(color="independent")))


def _panel(asked: _Asked, chart: Any = None) -> Any:
    import altair as alt

    chart = asked.answer.dyn.plot() if chart is None else chart
    return chart.properties(title=alt.Title(asked.question, subtitle=asked.statement, anchor="start", offset=12))


def _faces(run: Run, answer: pd.DataFrame) -> Any:
    """The samples that are in the most lists, as pictures."""
    import altair as alt

    images = run.data.tensors[0].numpy().reshape(-1, 8, 8).repeat(6, axis=1).repeat(6, axis=2)
    images = np.pad(images, ((0, 0), (3, 3), (3, 3)), constant_values=1)  # a white frame around each
    often = answer["sample"].value_counts().index[:20]
    faces = pd.DataFrame({"sample": often}).dyn.thumbnails(images, columns=4)
    table = pd.DataFrame({"url": ["data:image/png;base64," + base64.b64encode(faces.png).decode()]})
    width, height = 4 * 54, 5 * 54
    chart = alt.Chart(table).mark_image(width=width, height=height).encode(
        url="url:N", x=alt.value(width / 2), y=alt.value(height / 2)
    )  # fmt: skip
    title = alt.Title("The 20 samples in the most lists", anchor="start", fontSize=11, fontWeight="normal")
    return chart.properties(width=width, height=height, title=title)


def _path(run: Run, weight: str, answer: pd.DataFrame) -> Any:
    """The weight over the training, with the step at which it crosses 0."""
    import altair as alt

    from nbdyn.plots import ALARM, AXIS, COLORS, offline

    at = int(answer["event_step"].iloc[0])
    values = run.weights.frame(weight)[["step", "value"]]
    values = values.iloc[:: max(1, len(values) // 2000)]  # altair draws 5,000 rows at most
    x = alt.X("step:Q", axis=alt.Axis(title="step", grid=False, tickCount=8, **AXIS), scale=alt.Scale(nice=False))
    y = alt.Y("value:Q", axis=alt.Axis(title=weight, tickCount=4, gridColor="#e9e9ec", **AXIS))
    line = alt.Chart(values).mark_line(strokeWidth=1.3, color=COLORS[0]).encode(x, y)
    rule = alt.Chart(pd.DataFrame({"step": [at]})).mark_rule(strokeDash=[4, 3], color=ALARM).encode(x="step:Q")
    zero = alt.Chart(pd.DataFrame({"value": np.zeros(1)})).mark_rule(opacity=0.4).encode(y="value:Q")
    return offline(alt.layer(line, zero, rule).properties(width=640, height=120))
