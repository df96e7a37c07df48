"""Cells other than 0 in a sparse TileDB array (step, parameter, sample), written in global order in one go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.rivals.arrays import BLOCK, Arrays
from tests.benchmarks.rivals.dense import WEIGHT_ROWS, Rows
from tests.benchmarks.rivals.training import Problem, Step

STEPS_AT_ONCE = 8
"""Steps whose cells are read together."""


def _filters() -> Any:
    import tiledb

    return tiledb.FilterList([tiledb.ByteShuffleFilter(), tiledb.ZstdFilter(1)])


class CellsWriter:
    """TileDB: tiles of one step; a visit's sample is the third dimension, for no batch holds a sample twice."""

    needs_cells = True

    def create(self, folder: Path, problem: Problem) -> None:
        import tiledb

        self._folder, self._rows, self._done = folder, Rows(), 0
        self._uri, self._weights = str(folder / "cells"), str(folder / "weights")
        packed = _filters()
        dims = [
            tiledb.Dim(name, domain=(0, size - 1), tile=tile, dtype=np.uint32, filters=packed)
            for name, size, tile in (
                ("step", problem.steps, 1),
                ("parameter", problem.parameters, problem.parameters),
                ("sample", problem.samples, problem.samples),
            )
        ]
        value = tiledb.Attr("g", dtype=np.float32, filters=packed)
        schema = tiledb.ArraySchema(tiledb.Domain(*dims), attrs=[value], sparse=True, capacity=100_000)
        tiledb.Array.create(self._uri, schema)
        dims = [
            tiledb.Dim("step", domain=(0, problem.steps), tile=min(WEIGHT_ROWS, problem.steps), dtype=np.uint32),
            tiledb.Dim("parameter", domain=(0, problem.parameters - 1), tile=min(1024, problem.parameters),
                       dtype=np.uint32),
        ]  # fmt: skip
        value = tiledb.Attr("w", dtype=np.float32, filters=packed)
        tiledb.Array.create(self._weights, tiledb.ArraySchema(tiledb.Domain(*dims), attrs=[value]))
        self._query, self._array = None, None

    def write(self, step: Step) -> None:
        self._rows.take(step)
        if step.cells is not None:
            self._write_cells(step.number, step.samples, step.cells)
        if len(self._rows.weights) == WEIGHT_ROWS:
            self._flush()

    def _write_cells(self, number: int, samples: np.ndarray, cells: np.ndarray) -> None:
        import tiledb

        lt, ctx = tiledb.libtiledb, tiledb.default_ctx()
        if self._query is None:
            self._array = tiledb.open(self._uri, "w")
            self._query = lt.Query(ctx, lt.Array(ctx, self._array), lt.QueryType.WRITE)
            self._query.layout = lt.LayoutType.GLOBAL_ORDER
        order = np.argsort(samples)
        by_parameter = cells.T[:, order]
        parameter, place = by_parameter.nonzero()
        columns = {
            "step": np.full(len(parameter), number, np.uint32),
            "parameter": parameter.astype(np.uint32),
            "sample": samples[order][place].astype(np.uint32),
            "g": by_parameter[parameter, place],
        }
        for name, values in columns.items():
            self._query.set_data_buffer(name, values, len(values))
        self._query._submit()

    def _flush(self) -> None:
        import tiledb

        rows = self._rows.flush()
        with tiledb.open(self._weights, "w") as array:
            array[self._done : self._done + len(rows)] = rows
        self._done += len(rows)

    def close(self, weights: np.ndarray) -> None:
        import tiledb

        if self._query is not None:
            self._query.finalize()
            self._array.close()
        self._rows.weights.append(weights)
        self._flush()
        table = self._rows.table()
        visit = tiledb.Dim("visit", domain=(0, len(table) - 1), tile=len(table), dtype=np.uint32)
        attrs = [tiledb.Attr(name, dtype=column.dtype, filters=_filters()) for name, column in table.items()]
        tiledb.Array.create(str(self._folder / "visits"), tiledb.ArraySchema(tiledb.Domain(visit), attrs=attrs))
        with tiledb.open(str(self._folder / "visits"), "w") as array:
            array[:] = {name: column.to_numpy() for name, column in table.items()}


class Cells(Arrays):
    """TileDB."""

    def __init__(self, folders: tuple[Path, Path], problem: Problem) -> None:
        import tiledb

        super().__init__(folders, problem)
        self._ctx = tiledb.Ctx({"py.init_buffer_bytes": str(2**28), "sm.mem.total_budget": str(2**32)})
        self._cells = tiledb.open(str(folders[0] / "cells"), ctx=self._ctx)
        self._weights, self._visits = (
            [tiledb.open(str(folder / name), ctx=self._ctx) for folder in folders] for name in ("weights", "visits")
        )

    def gradients(self):
        width, size = self.problem.parameters, self.problem.batch
        for first in range(0, self.problem.steps, STEPS_AT_ONCE):
            stop = min(first + STEPS_AT_ONCE, self.problem.steps)
            query = self._cells.query(dims=["step", "parameter"], attrs=["g"], order="U")
            found = query.multi_index[first : stop - 1, :, :]
            place = (found["step"].astype(np.int64) - first) * width + found["parameter"]
            sums = np.bincount(place, weights=found["g"], minlength=(stop - first) * width)
            yield from sums.reshape(-1, width) / size

    def sums(self, start, stop, first, last):
        width = self.problem.samples
        query = self._cells.query(dims=["parameter", "sample"], attrs=["g"], order="U")
        for a in range(first, last, BLOCK):
            b = min(a + BLOCK, last)
            found = query.multi_index[start : stop - 1, a : b - 1, :]
            place = found["sample"].astype(np.int64) * (b - a) + (found["parameter"] - a)
            sums = np.bincount(place, weights=np.abs(found["g"]), minlength=width * (b - a))
            yield a, np.arange(width), sums.reshape(width, b - a)

    def visits(self, run, columns, steps=slice(None)):
        size = self.problem.batch
        ends = (steps.start or 0) * size, (self.problem.steps if steps.stop is None else steps.stop) * size
        return pd.DataFrame(self._visits[run].query(attrs=list(columns))[ends[0] : ends[1]])

    def weights(self, run, step):
        return self._weights[run][step]["w"]

    def trajectory(self, parameter):
        return self._weights[0][:, parameter]["w"]
