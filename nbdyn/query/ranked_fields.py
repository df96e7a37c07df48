"""`top` and `group` by recorded fields: `top 20 samples by mean(loss)`."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

import numpy as np
import pandas as pd

from nbdyn.query.plan import RankPlan
from nbdyn.query.ranked import bins, how_many
from nbdyn.query.rows import show
from nbdyn.query.source import Source
from nbdyn.query.tree import Group


def run_rank(plan: RankPlan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The frame of a plan over recorded fields, and its notes; rows without a value have no rank."""
    frame, notes = show(plan.values, source)
    statement, label = plan.statement, plan.values.items[0][0]
    if isinstance(statement, Group):
        found = frame.assign(**bins(frame[label].to_numpy(np.float64), statement.into))
        return found.loc[:, list(plan.columns)], notes
    missing = np.isnan(frame[label].to_numpy(np.float64))
    if missing.any():
        notes = [*notes, f"{np.count_nonzero(missing)} of {len(frame)} left out: their value is NaN"]
    frame = frame.loc[~missing].sort_values(label, ascending=False, kind="stable")
    if statement.per is None:
        frame["rank"] = np.arange(1, len(frame) + 1)
        frame = frame.iloc[: how_many(statement, len(frame))]
    else:
        groups = frame.groupby(plan.columns[0], sort=True)[label]
        frame["rank"] = groups.cumcount() + 1
        size = groups.transform("size").to_numpy()
        wanted = np.ceil(statement.count / 100 * size) if statement.percent else statement.count
        frame = frame.loc[frame["rank"].to_numpy() <= wanted].sort_values([plan.columns[0], "rank"])
    return frame[list(plan.columns)].reset_index(drop=True), notes
