"""Dense gradients (visit, parameter), in HDF5 and in Zarr: a chunk is a step of 4096 parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.benchmarks.rivals.arrays import BLOCK, Arrays, by_sample
from tests.benchmarks.rivals.training import Problem, Step

STEPS_AT_ONCE = 8
"""Steps whose cells are read together: Zarr decompresses chunks side by side."""


class Dense(Arrays):
    """Answers from three arrays: `cells` (visits, parameters), `weights` (steps + 1, parameters), `visits`."""

    cells: Any
    rows: tuple[Any, Any]
    tables: tuple[Any, Any]

    def gradients(self):
        size = self.problem.batch * STEPS_AT_ONCE
        for first in range(0, self.problem.visits, size):
            block = self.cells[first : first + size]
            yield from block.reshape(-1, self.problem.batch, self.problem.parameters).mean(axis=1)

    def sums(self, start, stop, first, last):
        ids, order, starts = self.order(start, stop)
        visits = slice(start * self.problem.batch, stop * self.problem.batch)
        for low in range(first - first % BLOCK, last, BLOCK):
            a, b = max(low, first), min(low + BLOCK, last)
            yield a, ids, by_sample(self.cells[visits, a:b], order, starts)

    def visits(self, run, columns, steps=slice(None)):
        size, table = self.problem.batch, self.tables[run]
        rows = slice(*(None if end is None else end * size for end in (steps.start, steps.stop)))
        return pd.DataFrame({name: table[name][rows] for name in columns})

    def weights(self, run, step):
        return self.rows[run][step]

    def trajectory(self, parameter):
        return self.rows[0][:, parameter]


class Rows:
    """Gathers visits and weights of the steps, to be written in large pieces."""

    def __init__(self) -> None:
        self.visits: list[pd.DataFrame] = []
        self.weights: list[np.ndarray] = []

    def take(self, step: Step) -> None:
        """Keep one step's."""
        self.visits.append(step.visits())
        self.weights.append(step.weights)

    def table(self) -> pd.DataFrame:
        """All visits."""
        return pd.concat(self.visits, ignore_index=True)

    def flush(self) -> np.ndarray:
        """The rows of weights gathered since the last call, (n, parameters)."""
        rows, self.weights = np.stack(self.weights), []
        return rows


WEIGHT_ROWS = 64
"""Rows of weights in a chunk."""


class HdfWriter:
    """h5py: byteshuffle and LZF, which reads faster than gzip here and is little larger."""

    needs_cells = True

    def create(self, folder: Path, problem: Problem) -> None:
        import h5py

        self._folder, self._rows, self._done = folder, Rows(), 0
        self._options: dict[str, Any] = {"dtype": "f4", "compression": "lzf", "shuffle": True}
        self._file = h5py.File(folder / "cells.h5", "w", rdcc_nbytes=2**25)
        shape, width = (problem.visits, problem.parameters), min(BLOCK, problem.parameters)
        self._cells = self._file.create_dataset("cells", shape, chunks=(problem.batch, width), **self._options)
        self._other = h5py.File(folder / "weights.h5", "w")
        shape, width = (problem.steps + 1, problem.parameters), min(1024, problem.parameters)
        chunks = (min(WEIGHT_ROWS, shape[0]), width)
        self._weights = self._other.create_dataset("weights", shape, chunks=chunks, **self._options)

    def write(self, step: Step) -> None:
        self._rows.take(step)
        if step.cells is not None:
            first = step.number * len(step.cells)
            self._cells[first : first + len(step.cells)] = step.cells
        if len(self._rows.weights) == WEIGHT_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = self._rows.flush()
        self._weights[self._done : self._done + len(rows)] = rows
        self._done += len(rows)

    def close(self, weights: np.ndarray) -> None:
        self._rows.weights.append(weights)
        self._flush()
        for name, column in self._rows.table().items():
            self._file[str(name)] = column.to_numpy()
        self._file.close()
        self._other.close()


class Hdf(Dense):
    """h5py."""

    def __init__(self, folders: tuple[Path, Path], problem: Problem) -> None:
        import h5py

        super().__init__(folders, problem)
        a, b = (h5py.File(folder / "cells.h5", rdcc_nbytes=2**25) for folder in folders)
        self.cells, self.tables = a["cells"], (a, b)
        rows = [h5py.File(folder / "weights.h5")["weights"] for folder in folders]
        self.rows = (rows[0], rows[1])


class ZarrWriter:
    """Zarr 3: Blosc with byteshuffle and zstd, level 1."""

    needs_cells = True

    def create(self, folder: Path, problem: Problem) -> None:
        import zarr
        from zarr.codecs import BloscCodec

        self._root = zarr.open_group(str(folder / "cells"), mode="w")
        self._other = zarr.open_group(str(folder / "weights"), mode="w")
        self._rows, self._done = Rows(), 0
        blosc: dict[str, Any] = {
            "dtype": "f4",
            "compressors": BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=4),
        }
        shape, width = (problem.visits, problem.parameters), min(BLOCK, problem.parameters)
        self._cells = self._root.create_array("cells", shape=shape, chunks=(problem.batch, width), **blosc)
        shape, width = (problem.steps + 1, problem.parameters), min(1024, problem.parameters)
        chunks = (min(WEIGHT_ROWS, shape[0]), width)
        self._weights = self._other.create_array("weights", shape=shape, chunks=chunks, **blosc)

    def write(self, step: Step) -> None:
        self._rows.take(step)
        if step.cells is not None:
            first = step.number * len(step.cells)
            self._cells[first : first + len(step.cells)] = step.cells
        if len(self._rows.weights) == WEIGHT_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = self._rows.flush()
        self._weights[self._done : self._done + len(rows)] = rows
        self._done += len(rows)

    def close(self, weights: np.ndarray) -> None:
        self._rows.weights.append(weights)
        self._flush()
        for name, column in self._rows.table().items():
            self._root.create_array(str(name), data=column.to_numpy())


class Zarr(Dense):
    """Zarr."""

    def __init__(self, folders: tuple[Path, Path], problem: Problem) -> None:
        import zarr

        super().__init__(folders, problem)
        a, b = (zarr.open_group(str(folder / "cells"), mode="r") for folder in folders)
        self.cells, self.tables = a["cells"], (a, b)
        rows = [zarr.open_group(str(folder / "weights"), mode="r")["weights"] for folder in folders]
        self.rows = (rows[0], rows[1])
