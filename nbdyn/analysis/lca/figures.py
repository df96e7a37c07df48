"""Pictures of a loss change allocation: layers, steps, moments of learning, saliency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.plots import AXIS, COLORS, MUTED, decimate, panel, stack, titled
from nbdyn.plots.grids import colour

if TYPE_CHECKING:
    from nbdyn.analysis.lca.learning import Moments
    from nbdyn.analysis.lca.neurons import SameNeuron, Specialization
    from nbdyn.analysis.lca.result import Allocation

HELPS, HURTS = COLORS[2], COLORS[1]
BINS = 200
"""Steps are reduced to so many bins of least, mean and greatest value."""
MANY = 24
"""Layers that are drawn as lines, at most."""
PIXEL, IMAGE_SIDE = 11, 96
"""Points of a pixel of saliency, and of the longer side of an image, at most."""
PICTURES, IMAGE_CELLS, IMAGE_COLUMNS = 12, 4_700, 6
"""Images of saliency in one picture, at most; their pixels together; and images in a row."""


def overview(found: Allocation) -> Any:
    """The layers' totals, and loss and layers over the steps."""
    return titled(
        alt.vconcat(layers(found), over_steps(found), spacing=26).resolve_scale(color="independent"), *_heading(found)
    )


def layers(found: Allocation) -> Any:
    """Bars of what helped and hurt in each layer; a tick marks the sum."""
    table: Any = found.layers[["layer", "lca", "help", "hurt"]]
    tidy = table.melt(["layer", "lca"], ["help", "hurt"], "side", "nats")
    y = alt.Y("layer:N", sort=None, axis=alt.Axis(title=None, grid=False, labelLimit=180, **AXIS))
    x = alt.X("nats:Q", axis=alt.Axis(title="sum of A over the run (below 0: it helped)", **AXIS))
    color = alt.Color("side:N", title=None, scale=alt.Scale(domain=["help", "hurt"], range=[HELPS, HURTS]))
    bars = alt.Chart(tidy).mark_bar(opacity=0.45).encode(x=x, y=y, color=color)
    sums = alt.Chart(table).mark_tick(thickness=2.5, size=16, color="black").encode(x="lca:Q", y=y)
    return (bars + sums).properties(width=640, height=max(60, 22 * len(table)))


def over_steps(found: Allocation) -> Any:
    """Panels: the loss, what each step allocated, and each layer's share of it summed over the steps so far."""
    frame = found.steps
    steps = frame["step"].to_numpy()
    sums = found.series("layer").cumsum()
    parts = [decimate(steps, sums[name].to_numpy(), BINS).assign(series=str(name)) for name in sums.columns[:MANY]]
    panels = [
        panel(decimate(steps, frame["loss"].to_numpy(), BINS), "loss", None, color=COLORS[5]),
        panel(decimate(steps, frame["allocated"].to_numpy(), BINS), "sum of A of a step", None, color=COLORS[5]),
        panel(pd.concat(parts, ignore_index=True), "sum of A of a layer so far", "step", size=(640, 150)),
    ]
    return stack(panels, "", "")


def moments(found: Moments) -> Any:
    """A dot for each moment of learning of each layer; red where all layers have one at the same step."""
    frame: Any = found.frame().assign(layer=lambda t: t["layer"].astype(str))
    frame["all layers"] = frame["shared"] == len(found.layers)
    x = alt.X("step:Q", scale=alt.Scale(zero=False), axis=alt.Axis(grid=False, **AXIS))
    y = alt.Y("layer:N", sort=list(map(str, found.layers)), axis=alt.Axis(title=None, grid=False, **AXIS))
    color = alt.Color("all layers:N", scale=alt.Scale(domain=[False, True], range=[MUTED, HURTS]))
    chart = alt.Chart(frame).mark_tick(thickness=2, size=11).encode(x=x, y=y, color=color)
    chart = chart.properties(width=620, height=15 * len(found.layers))
    if found.classes:
        chart = chart.facet(row=alt.Row("class:N", header=alt.Header(labelAngle=0, titleFontSize=11)), spacing=3)
    share = int(frame["all layers"].sum() / max(1, len(found.layers)))
    title = f"moments of learning: {len(frame):,} in {len(found.layers)} layers; {share:,} times all layers at once"
    return titled(chart, title)


def saliency(images: np.ndarray, units: np.ndarray, title: str) -> Any:
    """Images side by side, (n, H, W), the first PICTURES of them: how much the weight of each pixel helped."""
    _, height, width = images.shape
    count = max(1, min(len(images), PICTURES, IMAGE_CELLS // (height * width)))
    n, row, column = np.indices((count, height, width)).reshape(3, -1)
    names = [f"unit {unit}" for unit in units[:count]]
    values = images[:count].reshape(-1)
    table = pd.DataFrame({"unit": np.asarray(names, object)[n], "row": row, "column": column, "value": values})
    pixel = min(max(1, IMAGE_SIDE // max(height, width)), PIXEL)
    chart = (
        alt.Chart(table)
        .mark_rect()
        .encode(x=alt.X("column:O", axis=None), y=alt.Y("row:O", axis=None), color=colour(values, "helped"))
        .properties(width=pixel * width, height=pixel * height)
        .facet(
            alt.Facet("unit:N", sort=names, title=None, header=alt.Header(labelFontSize=10, labelPadding=2)),
            columns=IMAGE_COLUMNS,
            spacing=10,
        )
    )
    return titled(chart, title, f"{count} of {len(images)} units, those that helped most; below 0: it hurt")


def same_neuron(found: SameNeuron) -> Any:
    """The distribution of r of each kind of pair, and the mean r of each with its permutation null."""
    edges = np.linspace(-1, 1, 81)
    counted = [(kind, np.histogram(r, edges)[0] / max(1, len(r))) for kind, r in found.r.items()]
    shares = pd.concat([
        pd.DataFrame({"kind": kind, "r": (edges[1:] + edges[:-1]) / 2, "share": share}) for kind, share in counted
    ])  # fmt: skip
    color = alt.Color("kind:N", title=None, scale=alt.Scale(domain=list(found.r), range=list(COLORS[: len(found.r)])))
    x = alt.X("r:Q", axis=alt.Axis(title="correlation of two weights' allocations over the steps", **AXIS))
    y = alt.Y("share:Q", axis=alt.Axis(title="share of pairs", **AXIS))
    lines = alt.Chart(shares).mark_line(interpolate="step").encode(x=x, y=y, color=color)
    tests: Any = found.frame()
    means = alt.Chart(tests).mark_rule(strokeDash=[4, 3]).encode(x="mean_r:Q", color=color)
    said = [
        f"{row['kind']}: mean r {row['mean_r']:.3f} of {row['n']:,.0f} pairs"
        + ("" if np.isnan(row["p"]) else f", of a block {row['block_mean_r']:.3f}; under the null "
           f"{row['null_low']:.3f} .. {row['null_high']:.3f}, p {row['p']:.2g}")
        for row in tests.to_dict("records")
    ]  # fmt: skip
    chart = (lines + means).properties(width=640, height=200)
    return titled(chart, "do weights of a neuron learn at the same steps?", said)


def specialization(found: Specialization) -> Any:
    """How neurons' help is divided among classes: top share, top two, entropy; the mean of each beside its null."""
    tests: Any = found.tests.set_index("statistic")
    rows = []
    for name, said in (("top_1", "share of a neuron's top class"), ("top_2", "share of its top two classes"),
                       ("entropy", "entropy over classes")):  # fmt: skip
        values: Any = found.neurons[name].dropna()
        ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
        x = alt.X("value:Q", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(title=said, values=ticks, **AXIS))
        bars = alt.Chart(pd.DataFrame({"value": values})).mark_bar(color=MUTED).encode(
            x=x.bin(step=0.05), y=alt.Y("count()", axis=alt.Axis(title="neurons", **AXIS))
        )  # fmt: skip
        if name in tests.index:
            test = tests.loc[[name]]
            null = alt.Chart(test).mark_rect(color=COLORS[0], opacity=0.3).encode(x="null_low:Q", x2="null_high:Q")
            mean = alt.Chart(test).mark_rule(color=HURTS, thickness=2).encode(x="observed:Q")
            bars = null + bars + mean
        rows.append(bars.properties(width=200, height=130))
    said = [
        f"{row.Index}: {row.observed:.3f}; under the null {row.null_low:.3f} .. {row.null_high:.3f}, p {row.p:.2g} "
        f"(n {row.n:,}; {row.null})"
        for row in tests.itertuples()
    ]
    heading = "do neurons help single classes? (red: mean over neurons; blue: 95 % of the null's)"
    return titled(alt.hconcat(*rows, spacing=14), heading, said)


def _heading(found: Allocation) -> tuple[str, str]:
    row = found.check().iloc[0]
    missed = abs(row["residual_percent"])
    return (
        "loss change allocation",
        f"loss {row['loss']:.4g} -> {row['loss_after']:.4g}; {missed:.2g} % of the change not allocated",
    )
