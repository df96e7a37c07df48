"""What a researcher would pick instead of nbdyn for the five questions, each used as an expert would."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.rivals.cells import Cells, CellsWriter
from tests.benchmarks.rivals.dense import Hdf, HdfWriter, Zarr, ZarrWriter
from tests.benchmarks.rivals.factors import Factors, Recorded
from tests.benchmarks.rivals.replay import Replay, ReplayWriter
from tests.benchmarks.rivals.sql import DuckDb, ParquetWriter
from tests.benchmarks.rivals.training import Collector, Plain, Problem


@dataclass(frozen=True)
class System:
    """One way to record and to ask.

    Attributes:
        observer: makes what records to a folder; the second argument tells whether with gradients of samples.
        reader: opens two runs; has q1 .. q5.
        packages: that it needs; they are imported before the first question, as `modules` are.
        weights: the file or folder in which the weights lie.
    """

    observer: Callable[[Path, bool, Problem], Plain]
    reader: Callable[[tuple[Path, Path], Problem], Any]
    packages: tuple[str, ...]
    weights: str
    modules: tuple[str, ...] = ()


def _stored(writer: Callable[[], Any]) -> Callable[[Path, bool, Problem], Plain]:
    def observer(path: Path, cells: bool, problem: Problem) -> Plain:
        path.mkdir(parents=True)
        made = writer()
        made.create(path, problem)
        return Collector(made, cells)

    return observer


SYSTEMS = {
    "nbdyn": System(
        lambda path, cells, _: Recorded(path, cells),
        Factors,
        ("altair", "numba", "tiledb", "torch"),
        "weights",
        ("nbdyn.run", "nbdyn.query"),
    ),
    "DuckDB": System(_stored(ParquetWriter), DuckDb, ("duckdb", "pyarrow"), "weights.parquet"),
    "h5py": System(_stored(HdfWriter), Hdf, ("h5py", "torch"), "weights.h5"),
    "zarr": System(_stored(ZarrWriter), Zarr, ("zarr", "torch"), "weights"),
    "TileDB cells": System(_stored(CellsWriter), Cells, ("tiledb", "torch"), "weights"),
    "replay": System(_stored(ReplayWriter), Replay, ("torch",), "weights.npy"),
}


def missing() -> dict[str, str]:
    """The systems that cannot run here, and the packages that each lacks."""
    lacking = {
        name: ", ".join(p for p in system.packages if importlib.util.find_spec(p) is None)
        for name, system in SYSTEMS.items()
    }
    return {name: packages for name, packages in lacking.items() if packages}


__all__ = ["SYSTEMS", "System", "missing"]
