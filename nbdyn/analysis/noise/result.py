"""The noise that was gathered: frames of its measures, its nulls, and what they carry in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbdyn.analysis.noise import measures, surrogate, words
from nbdyn.analysis.noise.asked import whole_numbers
from nbdyn.analysis.noise.kinds import Kind
from nbdyn.analysis.noise.sampled import Sample, Source, Sums
from nbdyn.analysis.noise.scale import noise_scale
from nbdyn.errors import Incompatible, NbdynError
from nbdyn.settings import format_size
from nbdyn.store.names import locate
from nbdyn.store.provenance import with_provenance

if TYPE_CHECKING:
    from nbdyn.store import Store

BATCHES = (1, 10, 100, 600)
"""Over which the index is followed, where the samples suffice."""
SIZES = (600, 2_000, 6_000, 20_000, 60_000)
"""Numbers of samples over which the kurtosis is followed."""
MOST_BYTES = 600_000_000
"""Of the gradients of mini-batches that a surrogate is made of, in float64; it takes about eight times as much."""


class Noise:
    """Gradient noise of a run. Made by `run.noise`; `sampled` says what the values are.

    Every measure is taken of one coordinate at a time, over the rows that were sampled; a layer's number is the median
    over its coordinates. Results of different kinds cannot be joined, and rows of different steps never are.

    Attributes:
        kind: what is sampled; see `nbdyn.analysis.noise.kinds`.
        samples: the values, layer by layer and step by step.
        notes: what is left out, and what else a reader must know.
        seed: of coordinates and batches.
        batch: samples of a mini-batch, where these were sampled.
    """

    def __init__(
        self,
        kind: Kind,
        samples: Sequence[Sample],
        sums: Sequence[Sums],
        store: Store,
        seed: int,
        batch: int | None = None,
        source: Source | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        if not samples:
            raise NbdynError(f"nothing of {store.name} was sampled: no layer's gradients could be split into samples.")
        self.kind, self.samples, self.notes = kind, tuple(samples), notes
        self._sums, self._store, self.seed, self.batch, self._source = tuple(sums), store, seed, batch, source
        self._usual: dict[str, pd.DataFrame] = {}

    # What it is ---------------------------------------------------------------------------------------------------

    @property
    def sampled(self) -> str:
        """What one value is, in words, and how many there are."""
        first, rows = self.samples[0], sorted({len(s.values) for s in self.samples})
        what = self.kind.words_of(self.batch)
        many = " to ".join(f"{n:,}" for n in dict.fromkeys((rows[0], rows[-1])))
        many += f" {self.kind.row if rows == [1] else words.plural(self.kind.row)}"
        if self.kind.of_samples and self._source is not None and self._source.of > rows[-1]:
            many += f" of {self._source.of:,}"
        if self.kind.in_order:
            many += f" {first.step}..{first.stop - 1}"
        return what if self.kind.name == "coordinates" else f"{what} ({many})"

    @property
    def steps(self) -> list[int]:
        """The steps at whose weights was sampled; of a window the first."""
        return sorted({sample.step for sample in self.samples})

    @property
    def layers(self) -> list[str]:
        """The layers, in the order of the network."""
        return list(dict.fromkeys(sample.layer for sample in self.samples))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the numbers do not say, in plain words."""
        return ((self.kind.warning,) if self.kind.warning else ()) + self.notes

    # Measures -----------------------------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """One row a step and coordinate that was sampled.

        Columns: step, layer, parameter (global index), index (its label), n, mean, std, zeros (share of exact zeros),
        alpha (stable index by the characteristic function, zeros left out), kurtosis (excess). A dead coordinate (zero
        in every row) has NaN. Of kind "coordinates" one row a layer: parameter is -1.
        """
        tables = []
        tensors = self._store.config["tensors"]
        for s in self.samples:
            single = self.kind.name == "coordinates"
            parameters = np.array([-1]) if single else s.parameters
            live = s.live
            alpha = np.where(live, measures.alphas(s.values), np.nan)
            table = {
                "step": s.step, "layer": s.layer, "parameter": parameters,
                "index": [f"all of {s.layer}"] if single else locate(parameters, tensors)[1], "n": len(s.values),
                "mean": s.values.mean(axis=0, dtype=np.float64), "std": s.values.std(axis=0, ddof=1, dtype=np.float64),
                "zeros": (s.values == 0).mean(axis=0), "alpha": alpha,
                "kurtosis": measures.excess_kurtosis(s.values),
            }  # fmt: skip
            tables.append(pd.DataFrame(table))
        return self._framed(pd.concat(tables, ignore_index=True), "gradient noise by coordinate")

    def index(self, batch: Sequence[int] | None = None) -> pd.DataFrame:
        """The stable index against aggregation. Flat below 2: as a stable law. Rising to 2: finite variance.

        Rows are averaged over disjoint random batches of so many samples; the index of each coordinate is the slope of
        the empirical characteristic function (see `nbdyn.statistics.heavy_tail.ecf`). A stable law keeps its index
        under addition; where the variance is finite the central limit theorem brings it to 2.

        Columns: step, layer, batch, n (batch means), coordinates (with an index), dead (zero in every row), zeros
        (median share of exact zeros, which are left out), median, q1, q3 (over coordinates), low, high (95 % interval
        of the median, see `nbdyn.analysis.noise.measures.index`), finite_population (1 - batch / samples: what drawing
        without replacement leaves of the variance).

        Args:
            batch: samples of a mean; by default those of 1, 10, 100 and 600 that leave 60 means, for an interval.

        Raises:
            Incompatible: if what was sampled are no single samples, or fewer than 20 means are left.
        """
        rows = []
        for s, size, values in self._aggregated(self._batches(batch)):
            found = measures.index(values[:, s.live], self._size(s))
            live = values[:, s.live]
            zeros = float(np.median((live == 0).mean(axis=0))) if live.shape[1] else math.nan
            left = 1 - size / len(s.values) if self.kind.of_samples else math.nan
            rows.append(
                {"step": s.step, "layer": s.layer, "batch": size, "n": len(values), "coordinates": found.coordinates,
                 "dead": int((~s.live).sum()), "zeros": zeros, "median": found.median, "q1": found.q1, "q3": found.q3,
                 "low": found.low, "high": found.high, "finite_population": left}
            )  # fmt: skip
        return self._framed(pd.DataFrame(rows), "stable index against batch aggregation")

    def kurtosis(self, n: Sequence[int] | None = None) -> pd.DataFrame:
        """The excess kurtosis against the number of rows n. It settles: finite fourth moment; grows as n: stable law.

        Columns: step, layer, n, blocks (disjoint pieces of n rows that are averaged, at most 10), coordinates, median,
        q1, q3, low, high (interval over coordinates), and the same for all n of a layer: slope, slope_low, slope_high
        (of log kurtosis on log n over the last factor of ten, with 95 % interval over samples; see
        `nbdyn.analysis.noise.measures.Growth`).

        That the kurtosis of batch means falls like 1 / batch is no evidence: it does so in any finite sample.

        Args:
            n: numbers of rows; by default those of 600, 2,000, ... that there are, and all.

        Raises:
            Incompatible: if n is more than there are, or below 20.
        """
        rows = []
        for s, _, values in self._aggregated((1,)):
            usual = sorted({*(m for m in SIZES if m <= len(values)), len(values)})
            sizes = usual if n is None else whole_numbers(n, "n")
            if n is not None and not all(measures.FEWEST <= m <= len(values) for m in sizes):
                raise Incompatible(f"n={tuple(sizes)}: give numbers of {measures.FEWEST}..{len(values):,} rows.")
            growth = measures.growth(values)
            for m in sizes:
                found, blocks = measures.kurtosis_at(values, m, self._size(s))
                rows.append(
                    {"step": s.step, "layer": s.layer, "n": m, "blocks": blocks, "coordinates": found.coordinates,
                     "median": found.median, "q1": found.q1, "q3": found.q3, "low": found.low, "high": found.high,
                     "slope": growth.slope, "slope_low": growth.low, "slope_high": growth.high}
                )  # fmt: skip
        return self._framed(pd.DataFrame(rows), "excess kurtosis against the number of samples")

    def normality(self, batch: Sequence[int] | None = None, level: float = surrogate.LEVEL) -> pd.DataFrame:
        """The share of coordinates that D'Agostino and Pearson's test rejects as not normal, by batch.

        Columns: step, layer, batch, n, coordinates, rejected, share, low, high (95 % Clopper-Pearson; too narrow where
        coordinates depend on each other), level (the share expected of many Gaussian rows; of 100 rows a test at 1 %
        rejects 1.7 %, of 40 it rejects 2.0 %), kurtosis (median excess).

        Args:
            batch: as for `index`.
            level: of the test.

        Raises:
            Incompatible: as `index`; or if the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise Incompatible(f"level={level}: give one between 0 and 1, such as 0.01.")
        rows = []
        for s, size, values in self._aggregated(self._batches(batch)):
            found = measures.normality(values, level)
            rows.append(
                {"step": s.step, "layer": s.layer, "batch": size, "n": len(values), "coordinates": found.coordinates,
                 "rejected": found.rejected, "share": found.share, "low": found.low, "high": found.high,
                 "level": level, "kurtosis": measures.kurtosis(values, self._size(s)).median}
            )  # fmt: skip
        return self._framed(pd.DataFrame(rows), "share of coordinates whose noise is not normal")

    def scale(self) -> pd.DataFrame:
        """The simple noise scale tr(Sigma) / |G|^2 of each layer and of the network ("all"), over all coordinates.

        Columns: step, layer, n, trace, signal, signal_low, signal_high, scale, low, high, resolved, of_these; see
        `nbdyn.analysis.noise.scale.NoiseScale`. Where the interval of |G|^2 reaches 0 it is not resolved, and NaN.

        Raises:
            Incompatible: if what was sampled are no single samples.
        """
        self._need_samples("a noise scale needs")
        rows = []
        for sums in self._sums:
            for layer, some in sums.columns.items():
                totals = sums.squares[:, some].sum(axis=1), sums.along[:, some].sum(axis=1)
                found = noise_scale(*totals, float(sums.mean_square[some].sum()))
                rows.append({"step": sums.step, "layer": layer, **found._asdict()})
        return self._framed(pd.DataFrame(rows), "gradient noise scale")

    def norms(self) -> pd.DataFrame:
        """One row a step, sample and layer, and "all": norm, the Euclidean norm of the sample's gradient, not centred.

        Column `row` is the place of the sample among those that were sampled.

        Raises:
            Incompatible: if what was sampled are no single samples.
        """
        self._need_samples("norms are of")
        tables = []
        for sums in self._sums:
            for layer, some in sums.columns.items():
                norm, row = np.sqrt(sums.squares[:, some].sum(axis=1)), np.arange(len(sums.squares))
                tables.append(pd.DataFrame({"step": sums.step, "layer": layer, "row": row, "norm": norm}))
        return self._framed(pd.concat(tables, ignore_index=True), "norms of gradients of single samples")

    def surrogate(self, batch: int | None = None, batches: int = 100, draws: int = 39) -> pd.DataFrame:
        """Each measure beside what Gaussian noise of the same covariance gives.

        Two questions. Per coordinate, of means over `batch` samples: median index, median kurtosis, share not normal.
        And the estimator of the gradient-noise paper (Simsekli, Sagun, Gurbuzbalaban 2019, arXiv 1901.06053), "block
        log-moments": it takes all coordinates of all mini-batches as one sample and adds up neighbours, so that it
        reads mostly their covariance. Where it does not leave the null's range it does not see any tail.

        Columns: step, layer ("all": the network), statistic, batch, n (rows), coordinates, observed, null_mean,
        null_low, null_high (95 %), p (the chance that Gaussian noise looks as heavy-tailed), draws.

        Args:
            batch: samples of a mean; by default 100, or fewer where the samples are few.
            batches: mini-batches for the block log-moments; memory and time grow with batches x parameters.
            draws: surrogates, 19 or more; p is at least 1 / (1 + draws).

        Raises:
            Incompatible: if the rows depend on each other in time or are coordinates, would take too much memory, or
                fewer than 20 means, 2 mini-batches or 19 surrogates are asked for.
        """
        if not self.kind.at_fixed_weights:
            raise Incompatible(f"a Gaussian surrogate takes rows at fixed weights, and these are {self.sampled}.")
        if draws < 19 or batches < 2:
            raise Incompatible(f"draws={draws}, batches={batches}: give 19 surrogates and 2 mini-batches, or more.")
        if self.kind.of_samples:
            usual = max(1, min(100, self._fewest // measures.FEWEST))
            size, *more = (usual,) if batch is None else self._batches(batch)
            if more:
                raise Incompatible(f"batch={batch}: give one size.")
        else:
            size = 1
            if batch not in (None, self.batch):
                raise Incompatible(f"these are means over {self.batch} samples; batch={batch} takes another sample.")
        rows: list[dict[str, Any]] = []
        for s, _, values in self._aggregated((size,)):
            head = {"step": s.step, "layer": s.layer, "batch": size * (self.batch or 1), "n": len(values)}
            if s.live.any():
                found = surrogate.per_coordinate(values, self._size(s), draws, self.seed)
                rows += [head | row for row in found]
        if self._source is not None:
            size = size * (self.batch or 1)
            for step in self.steps:
                rows += self._block_log_moments(step, size, batches, draws)
        order = ["step", "layer", "statistic", "batch", "n", "coordinates"]
        more = ["observed", "null_mean", "null_low", "null_high", "p", "draws"]
        return self._framed(pd.DataFrame(rows, columns=[*order, *more]), "gradient noise beside Gaussian surrogates")

    # What to show and to say --------------------------------------------------------------------------------------

    def plot(self) -> Any:
        """The noise panel: a column for each layer; index, kurtosis, share not normal and noise scale over training."""
        from nbdyn.analysis.noise.figures import panel

        return panel(self)

    def verdict(self, surrogates: pd.DataFrame | None = None) -> list[str]:
        """A sentence for each step and layer: what its numbers carry, and no more.

        Args:
            surrogates: what `surrogate` gave, if its numbers are to stand in the sentences.
        """
        return words.verdicts(self, surrogates)

    def methods(self) -> str:
        """What was done, for a paper: sample, measures, nulls, numbers and sources."""
        return words.methods(self)

    def __repr__(self) -> str:
        at = f"window {self.steps[0]}" if self.kind.in_order else f"steps {', '.join(map(str, self.steps))}"
        counts = sum(len(s.parameters) for s in self.samples if s.step == self.steps[0])
        tail = "".join(f"; {text}" for text in self.warnings)
        return (
            f"<Noise of {self._store.name}: {self.sampled}; {at}, {len(self.layers)} layers, {counts:,} coordinates; "
            f".index() .kurtosis() .normality() .scale() .surrogate() .verdict() .plot(){tail}>"
        )

    # Inside -------------------------------------------------------------------------------------------------------

    def usual(self, measure: str) -> pd.DataFrame:
        """A measure by its name with its default arguments, computed once for pictures and sentences."""
        if measure not in self._usual:
            self._usual[measure] = getattr(self, measure)()
        return self._usual[measure]

    @property
    def run(self) -> str:
        """The run's name."""
        return self._store.name

    @property
    def has_sums(self) -> bool:
        """Whether norms over all coordinates are known, as a noise scale needs."""
        return self.kind.of_samples and bool(self._sums)

    def _need_samples(self, what: str) -> None:
        if not self.kind.of_samples:
            raise Incompatible(f'{what} gradients of single samples, not {self.sampled}: "samples".')

    def _size(self, s: Sample) -> int:
        """Coordinates that a median speaks for."""
        return 1 if self.kind.name == "coordinates" else s.size

    @property
    def _fewest(self) -> int:
        """Rows: recorded batches may differ in size."""
        return min(len(s.values) for s in self.samples)

    def _batches(self, batch: Sequence[int] | int | None) -> tuple[int, ...]:
        rows = self._fewest
        sizes = () if batch is None else whole_numbers(batch, "batch")
        if not self.kind.of_samples:
            if sizes not in ((), (1,)):
                raise Incompatible(
                    f"batches are means of single samples at fixed weights, and these are {self.sampled}; "
                    'run.noise(sampled="samples").index(batch=...) has them.'
                )
            return (1,)
        if batch is None:
            return tuple(size for size in BATCHES if rows // size >= measures.FOR_INTERVAL) or (1,)
        if not all(size >= 1 and rows // size >= measures.FEWEST for size in sizes):
            raise Incompatible(
                f"batch={sizes}: {rows:,} samples make {measures.FEWEST} means of at most {rows // measures.FEWEST}."
            )
        return sizes

    def _aggregated(self, sizes: Sequence[int]) -> Iterator[tuple[Sample, int, np.ndarray]]:
        """The means over batches of each layer: random ones, or the rows in their order where that is one in time."""
        for s in self.samples:
            rng = np.random.default_rng(self.seed)
            order = np.arange(len(s.values)) if self.kind.in_order else rng.permutation(len(s.values))
            for size in sizes:
                yield s, size, measures.in_batches(s.values, size, order)

    def _block_log_moments(self, step: int, size: int, batches: int, draws: int) -> list[dict[str, Any]]:
        assert self._source is not None
        probe = self._source.probe
        count = min(batches, len(probe.samples) // size)
        weights, buffers = self._source.weights[step]
        if 8 * count * len(weights) > MOST_BYTES:
            raise Incompatible(
                f"{count} mini-batches x {len(weights):,} parameters take {format_size(8 * count * len(weights))}; "
                f"give batches={MOST_BYTES // (8 * len(weights))} or fewer."
            )
        probe.go_to(weights, buffers)
        order = np.random.default_rng(self.seed).permutation(len(probe.samples))
        noise = np.stack([probe.gradient(order[i * size : (i + 1) * size]) for i in range(count)])
        found = surrogate.block_log_moments(noise, probe.layers(), draws, self.seed)
        return [{"step": step, "batch": size, "n": count, **row} for row in found]

    def _framed(self, frame: pd.DataFrame, what: str) -> pd.DataFrame:
        more = {"warning": "; ".join(self.warnings)} if self.warnings else {}
        return with_provenance(frame, self._store, what, sampled=self.sampled, **more)
