"""nbdyn itself: the factors, and the questions as statements."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tests.benchmarks.rivals.asked import Answer, Asked
from tests.benchmarks.rivals.training import Plain, Problem

NAMES = {
    "sum |g|": "value",
    "sum |grad|": "value",
    "progress(loss)": "progress",
    "dist(w, init)": "distance",
    "acc": "accuracy",
}
"""Columns of nbdyn's frames that are called otherwise here."""


def tidy(frames: Answer) -> Answer:
    """nbdyn's answers in the shape of the others'."""
    return tuple(frame.rename(columns=NAMES) for frame in frames)


class Recorded(Plain):
    """Records with nbdyn. Cells are not written out one by one besides: the factors hold all of them."""

    def __init__(self, path: Path, per_sample: bool = True) -> None:
        self._path = path
        self._per_sample = per_sample

    def begin(self, model, optimizer, loss_fn):
        import nbdyn

        self._quiet, nbdyn.options.quiet = nbdyn.options.quiet, True
        options = {"cells": None} if self._per_sample else {"per_sample": False}
        self._recorder = nbdyn.record(self._path, model, optimizer, loss_fn, weights="every", **options)

    def batches(self, loader):
        return self._recorder.watch(loader)

    def close(self):
        import nbdyn

        self._recorder.close()
        nbdyn.options.quiet = self._quiet


class Factors:
    """nbdyn."""

    def __init__(self, folders: tuple[Path, Path], problem: Problem) -> None:
        import nbdyn

        self.problem = problem
        self._run = nbdyn.open(folders[0])

    def _ask(self, question: int, asked: Asked) -> list[pd.DataFrame]:
        return [self._run.query(statement) for statement in asked.statements()[question]]

    def q1(self, asked: Asked) -> pd.DataFrame:
        return self._ask(1, asked)[0]

    def q2(self, asked: Asked) -> tuple[pd.DataFrame, pd.DataFrame]:
        best, groups = self._ask(2, asked)
        return best, groups

    def q3(self, asked: Asked) -> pd.DataFrame:
        return self._ask(3, asked)[0]

    def q4(self, asked: Asked) -> pd.DataFrame:
        return self._ask(4, asked)[0]

    def q5(self, asked: Asked) -> pd.DataFrame:
        return self._ask(5, asked)[0]
