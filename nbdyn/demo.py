"""`python -m nbdyn demo`: a real training run on embedded data, recorded, questioned, pictured."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

import nbdyn
from nbdyn.run import Run
from nbdyn.settings import format_size

WIDTHS = (64, 48, 24, 10)
BATCH = 32


def demo(folder: str | os.PathLike[str] = "nbdyn-demo", epochs: int = 20) -> Path:
    """Train an MLP on handwritten digits twice (two orders of the data), ask both runs questions, draw the answers.

    Args:
        folder: where the runs and the picture go; earlier ones are kept.
        epochs: passes over the 1,797 digits.

    Returns:
        The picture.
    """
    folder = Path(folder)
    print("Training two MLPs on 1,797 handwritten digits: the same start, two orders of the data.\n")
    first, second = (_train(folder / f"order-{seed}", seed, epochs) for seed in (1, 2))
    print(f"\nReopened: {first!r}\n          {second!r}\n")
    print(first.steps.tail(3).to_string(index=False), "\n")
    middle = len(first) // 2
    _ask(f"compare {_quoted(first)}, {_quoted(second)} by progress(loss), dist(w, init), acc at step {middle}", first)
    weight = _weight_that_crosses_zero(first)
    answer = _ask(f"last 10 samples before {weight} crosses 0", first)
    _show_pulls(first, int(answer["event_step"].iloc[0]) - 1, weight)
    picture = folder / "demo.png"
    _draw(first, second, weight, answer, picture)
    print(f"Picture: {picture}")
    print(f'Next: open notebooks/01_first_light.ipynb, or type\n  import nbdyn\n  run = nbdyn.open("{first.uri}")')
    return picture


def _train(path: Path, seed: int, epochs: int) -> Run:
    """One recorded run: every weight at every step."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
    from tqdm.auto import tqdm

    x, y = nbdyn.datasets.digits()
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    torch.manual_seed(0)  # the same initial weights for both runs
    a, b, c, classes = WIDTHS
    model = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, classes))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    with nbdyn.record(path, model, optimizer, loss_fn, weights="every", note=f"digits, data order {seed}") as rec:
        for _ in tqdm(range(epochs), desc=path.name, unit="epoch"):
            for inputs, targets in rec.watch(loader):
                loss = loss_fn(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return nbdyn.open(rec)


def _quoted(run: Run) -> str:
    """A run's name in the language; runs of one folder know each other by name."""
    return f"`{run.name}`"


def _ask(statement: str, run: Run) -> pd.DataFrame:
    answer = run.query(statement)
    print(f"%dyn {statement}\n{answer.to_string(index=False)}")
    for key in ("note", "before"):
        if note := answer.attrs["nbdyn"].get(key):
            print(f"  ({note})")
    print()
    return answer


def _show_pulls(run: Run, step: int, weight: str) -> None:
    """The samples that moved a weight most in one step."""
    cells = run.gradients[step, weight].frame()
    largest = cells.sort_values("value", key=abs, ascending=False)[["step", "position", "sample", "value"]].head(5)
    print(f'run.gradients[{step}, "{weight}"], the five largest contributions to its gradient in that step')
    print(f"{largest.to_string(index=False)}\n")


def _weight_that_crosses_zero(run: Run) -> str:
    """The weight of the second layer that goes farthest on both sides of zero."""
    values = run.weights["2.weight"]
    reach = np.minimum(values.max(axis=0), -values.min(axis=0))
    row, column = np.unravel_index(reach.argmax(), reach.shape)
    return f"2.weight[{row},{column}]"


def _draw(first: Run, second: Run, weight: str, answer: pd.DataFrame, picture: Path) -> None:
    """Loss of both runs, and the weight with the step at which it crosses zero."""
    import altair as alt

    from nbdyn.plots import ALARM, COLORS, to_png

    runs = (first, second)
    losses = pd.concat([run.steps.dyn.smooth(ema=0.95)[["step", "loss"]].assign(run=run.name) for run in runs])
    paths = pd.concat([run.weights.frame(weight)[["step", "value"]].assign(run=run.name) for run in runs])
    events = pd.DataFrame({"step": answer["event_step"].unique()})
    color = alt.Color("run:N", title=None, scale=alt.Scale(range=list(COLORS[:2])))
    step = alt.X("step:Q", title="step", axis=alt.Axis(grid=False))
    log = alt.Y("loss:Q", scale=alt.Scale(type="log"), title="loss in nats, smoothed", axis=alt.Axis(tickCount=4))
    # Every second step: altair draws 5,000 rows at most.
    loss = alt.Chart(losses.iloc[::2]).mark_line(strokeWidth=1.3).encode(step, log, color)
    path = alt.Chart(paths.iloc[::2]).mark_line(strokeWidth=1.3).encode(step, alt.Y("value:Q", title=weight), color)
    rule = alt.Chart(events).mark_rule(strokeDash=[4, 3], color=ALARM).encode(x="step:Q")
    zero = alt.Chart(pd.DataFrame({"value": [0.0]})).mark_rule(opacity=0.4).encode(y="value:Q")
    size = {"width": 380, "height": 220}
    title = alt.Title(f"When {weight} first crosses zero in {first.name}", anchor="start")
    left = loss.properties(title=alt.Title("Two orders of the same data", anchor="start"), **size)
    picture.write_bytes(to_png(left | (path + zero + rule).properties(title=title, **size)))
    print(f"Drawn: {format_size(picture.stat().st_size)}.")
