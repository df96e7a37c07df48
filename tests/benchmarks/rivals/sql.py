"""DuckDB over Parquet: a row for each cell other than 0, sorted by step, a row group a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.rivals.asked import Asked
from tests.benchmarks.rivals.training import Problem, Step


class ParquetWriter:
    """pyarrow: zstd; dictionaries for what repeats, byte streams for the values."""

    needs_cells = True

    def create(self, folder: Path, problem: Problem) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._folder, self._visits = folder, []
        cell = [(name, pa.int32()) for name in ("step", "sample", "class", "parameter")]
        self._cells = pq.ParquetWriter(
            folder / "cells.parquet",
            pa.schema([*cell, ("g", pa.float32())]),
            compression="zstd",
            use_dictionary=["step", "sample", "class"],
            column_encoding={"parameter": "DELTA_BINARY_PACKED", "g": "BYTE_STREAM_SPLIT"},
        )
        self._weights = pq.ParquetWriter(
            folder / "weights.parquet",
            pa.schema([("step", pa.int32()), ("parameter", pa.int32()), ("w", pa.float32())]),
            compression="zstd",
            use_dictionary=["step"],
            column_encoding={"parameter": "DELTA_BINARY_PACKED", "w": "BYTE_STREAM_SPLIT"},
        )

    def write(self, step: Step) -> None:
        import pyarrow as pa

        self._visits.append(step.visits())
        self._write_weights(step.number, step.weights)
        if step.cells is None:
            return
        by_parameter = np.ascontiguousarray(step.cells.T)
        parameter, place = by_parameter.nonzero()
        columns = [
            np.full(len(parameter), step.number, np.int32),
            step.samples.astype(np.int32)[place],
            step.classes.astype(np.int32)[place],
            parameter.astype(np.int32),
            by_parameter[parameter, place],
        ]
        self._cells.write_table(pa.table(columns, schema=self._cells.schema), row_group_size=len(parameter) + 1)

    def _write_weights(self, number: int, weights: np.ndarray) -> None:
        import pyarrow as pa

        columns = [np.full(len(weights), number, np.int32), np.arange(len(weights), dtype=np.int32), weights]
        self._weights.write_table(pa.table(columns, schema=self._weights.schema))

    def close(self, weights: np.ndarray) -> None:
        self._write_weights(len(self._visits), weights)
        self._cells.close()
        self._weights.close()
        pd.concat(self._visits).to_parquet(self._folder / "visits.parquet", compression="zstd", index=False)


class DuckDb:
    """DuckDB."""

    def __init__(self, folders: tuple[Path, Path], problem: Problem) -> None:
        import duckdb

        self.problem = problem
        self._at = duckdb.connect()
        self._at.execute("SET parquet_metadata_cache = true; SET enable_progress_bar = false")
        for run, folder in zip("ab", folders, strict=True):
            for name in ("cells", "weights", "visits"):
                self._at.execute(f"CREATE VIEW {name}_{run} AS FROM read_parquet('{folder / name}.parquet')")

    def q1(self, asked: Asked) -> pd.DataFrame:
        """A bounded heap for each weight: window functions, which sort, take twice as long. One number is a quicker
        key than two."""
        first, stop = asked.steps_of_epoch(self.problem)
        layer, samples = self.problem.layers[0], self.problem.samples
        return self._at.execute(f"""
            WITH sums AS (
                SELECT parameter::BIGINT * {samples} + sample AS key, sum(abs(g)) AS value FROM cells_a
                WHERE step BETWEEN {first} AND {stop - 1} AND parameter BETWEEN {layer.first} AND {layer.bias - 1}
                GROUP BY key
            ), best AS (
                SELECT key // {samples} AS parameter,
                    max_by({{'sample': key % {samples}, 'value': value}}, value, {asked.top}) AS top
                FROM sums GROUP BY parameter
            )
            SELECT parameter, member.sample AS sample, member.value AS value
            FROM (SELECT parameter, unnest(top) AS member FROM best)
        """).df()

    @property
    def _gradients(self) -> str:
        return f"SELECT step, parameter, sum(g) / {self.problem.batch} AS grad FROM cells_a GROUP BY step, parameter"

    def q2(self, asked: Asked) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The sums once, then both questions."""
        self._at.execute(f"""
            CREATE OR REPLACE TEMP TABLE moved AS
            SELECT parameter, sum(abs(grad)) AS value FROM ({self._gradients}) GROUP BY parameter HAVING value > 0
        """)
        best = self._at.execute(f"FROM moved ORDER BY value DESC LIMIT {asked.many(self.problem)}").df()
        groups = self._at.execute(f"""
            WITH ends AS (SELECT log2(min(value)) AS low, log2(max(value)) AS high FROM moved)
            SELECT parameter, coalesce(value, 0) AS value,
                CASE WHEN value IS NULL THEN 0
                    ELSE least(1 + floor((log2(value) - low) / (high - low) * {asked.bins}), {asked.bins})::INT
                    END AS "group"
            FROM range({self.problem.parameters}) AS every(parameter) LEFT JOIN moved USING (parameter), ends
            ORDER BY parameter
        """).df()
        return best, groups

    def q3(self, asked: Asked) -> pd.DataFrame:
        """Both runs at a step."""
        runs = " UNION ALL ".join(
            f"""
            SELECT '{run}' AS run, t.loss AS loss, t.accuracy AS accuracy, z.loss AS began, w.distance AS distance,
                l.lowest AS lowest
            FROM (SELECT avg(loss) AS loss, avg(correct) AS accuracy FROM visits_{run} WHERE step = {asked.step}) t,
                (SELECT avg(loss) AS loss FROM visits_{run} WHERE step = 0) z,
                (SELECT min(loss) AS lowest FROM (SELECT avg(loss) AS loss FROM visits_{run} GROUP BY step)) l,
                (SELECT sqrt(sum((a.w::DOUBLE - b.w) ** 2)) AS distance
                 FROM (SELECT parameter, w FROM weights_{run} WHERE step = {asked.step}) a
                 JOIN (SELECT parameter, w FROM weights_{run} WHERE step = 0) b USING (parameter)) w
            """
            for run in "ab"
        )
        return self._at.execute(f"""
            SELECT run, {asked.step} AS step, (began - loss) / (began - min(lowest) OVER ()) AS progress, distance,
                accuracy
            FROM ({runs}) ORDER BY run
        """).df()

    def _samples_before(self, events: str, asked: Asked) -> pd.DataFrame:
        """The last visits before the steps that a query gives as `event_step`."""
        return self._at.execute(f"""
            WITH events AS ({events})
            SELECT event_step, row_number() OVER nearest AS before, step, position, sample
            FROM events JOIN visits_a ON step < event_step AND step >= event_step - {asked.count}
            WINDOW nearest AS (PARTITION BY event_step ORDER BY step DESC, position DESC)
            QUALIFY before <= {asked.count}
            ORDER BY event_step, before DESC
        """).df()

    def q4(self, asked: Asked) -> pd.DataFrame:
        """Batch gradients, each layer's RMS, its median over the steps before, the share above: one statement."""
        layers = self.problem.layers
        which = "CASE " + " ".join(f"WHEN parameter < {x.stop} THEN {n}" for n, x in enumerate(layers)) + " END"
        sizes = ", ".join(f"({n}, {x.stop - x.first})" for n, x in enumerate(layers))
        before = f"(PARTITION BY layer ORDER BY step ROWS BETWEEN {asked.window} PRECEDING AND 1 PRECEDING)"
        return self._samples_before(
            f"""
            WITH batch AS MATERIALIZED (SELECT step, grad, {which} AS layer FROM ({self._gradients})),
            sizes(layer, size) AS (VALUES {sizes}),
            squares AS (SELECT step, layer, sum(grad * grad) AS square FROM batch GROUP BY step, layer),
            norms AS (
                SELECT step, layer, sqrt(coalesce(square, 0) / size) AS rms
                FROM range({self.problem.steps}) AS every(step) CROSS JOIN sizes LEFT JOIN squares USING (step, layer)
            ),
            limits AS (
                SELECT step, layer, {asked.factor} * median(rms) OVER {before} AS high, count(*) OVER {before} AS known
                FROM norms
            ),
            hot AS (
                SELECT step FROM batch JOIN limits USING (step, layer)
                WHERE known >= {asked.known} AND (abs(grad) > high OR NOT isfinite(grad))
                GROUP BY step HAVING count(*) > {asked.share} * {self.problem.parameters}
            )
            SELECT step AS event_step FROM hot WHERE step - 1 NOT IN (SELECT step FROM hot)
            """,
            asked,
        )

    def q5(self, asked: Asked) -> pd.DataFrame:
        """The weight's own rows."""
        return self._samples_before(
            f"""
            WITH near AS (
                SELECT step, abs(w) <= {asked.within} AS is_near FROM weights_a WHERE parameter = {asked.parameter}
            ), edges AS (
                SELECT step, is_near AND NOT coalesce(lag(is_near) OVER (ORDER BY step), false) AS edge FROM near
            )
            SELECT min(step) AS event_step FROM edges WHERE edge
            """,
            asked,
        )
