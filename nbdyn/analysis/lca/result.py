"""The result of a loss change allocation: frames, checks, and the analyses that go on from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.analysis.lca import checks, intervals
from nbdyn.analysis.lca import concentration as _concentration
from nbdyn.analysis.lca import helping as _helping
from nbdyn.analysis.lca import tails as _tails
from nbdyn.analysis.lca.kept import Kept
from nbdyn.analysis.lca.learning import Moments
from nbdyn.analysis.lca.neurons import SameNeuron, Specialization, saliency, same_neuron, specialization
from nbdyn.analysis.lca.totals import STEP_COLUMNS, units_of
from nbdyn.errors import Incompatible, NotRecorded, UnknownName, did_you_mean
from nbdyn.schema import PROVENANCE
from nbdyn.settings import say
from nbdyn.statistics.heavy_tail.result import TailFit
from nbdyn.store.names import select

Array = np.ndarray


class Allocation:
    """Where the change of the loss went: A[t, i] of step t and parameter i, and its sums. Made by `run.lca`.

    A[t, i] is the mean of dL/dw_i along step t times w_i[t+1] - w_i[t]; the sum over i is L[t+1] - L[t] up to the
    residual. Below 0 a parameter helped, above 0 it hurt. Units are those of the loss: nats for cross-entropy.
    Source: Lan et al., NeurIPS 2019 (arXiv 1909.01440).

    Attributes:
        spec: what was computed: data, loss, modes, precision.
        labels: names of steps, groups and parts.
        tensors: those of the model.
    """

    def __init__(self, kept: Kept, run: str = "") -> None:
        self._kept, self._run = kept, run
        self._rows, self._sums, self._steps = kept.rows, kept.sums, kept.steps
        self.spec, self.labels, self.tensors, self.layers_in_order = kept.spec, kept.labels, kept.tensors, kept.layers

    def __len__(self) -> int:
        return len(self._rows)

    # The sum, and how exact it is ---------------------------------------------------------------------------------

    @property
    def steps(self) -> pd.DataFrame:
        """One row a step.

        Columns: step, loss and loss_after, allocated (the sum of A), residual (loss_after - loss - allocated),
        first_order (what the gradient before the step alone would allocate; no part of A), error (sum over parameters
        of what the next coarser rule differs by), drift (what changed buffers did to the loss
        before the step), nodes, gradients (full ones computed for it), met (the tolerance of a step).
        """
        columns = {name: self._rows.steps[name] for name in STEP_COLUMNS}
        frame = pd.DataFrame({"step": self._steps, **columns})
        kinds = {"nodes": np.int64, "gradients": np.int64, "met": bool}
        return self._framed(frame.astype(kinds), "loss change allocation by step")

    def check(self) -> pd.DataFrame:
        """One row: does the sum of A give the change of the loss?

        Columns: steps, loss, loss_after, change, allocated, residual (change - drift - allocated), residual_percent
        (of the change; the paper's convention, (true - approximated) / true), first_order_percent (the same of the
        first-order rule, for comparison: it is not what was used), mean_residual and worst_residual (of
        single steps, absolute), error (of all parameters, see `steps`), gradients, gradients_per_step, not_met (steps
        that missed a tolerance), drift.
        """
        return self._framed(pd.DataFrame([checks.summary(self._rows.steps)]), "check of a loss change allocation")

    def warn(self) -> None:
        """Say it if a tolerance was not met."""
        for sentence in checks.misses(self._rows.steps, self.spec["precision"]):
            say(sentence)

    # Sums ---------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer.

        Columns: lca (the sum of A), help and hurt (of its negative and positive cells), percent of helping, zero and
        hurting cells, helping_of_nonzero_percent, decay (what weight decay, as a term of the loss, changed), size.
        """
        return self._totals(self._kept.layer_of, {"layer": self.layers_in_order})

    @property
    def by_tensor(self) -> pd.DataFrame:
        """One row a tensor, the columns of `layers`."""
        names = {"layer": [t["layer"] for t in self.tensors], "tensor": [t["name"] for t in self.tensors]}
        return self._totals(np.arange(len(self.tensors)), names)

    def _totals(self, code: Array, names: dict[str, list[str]]) -> pd.DataFrame:
        table = checks.shares(self._rows.tensors, np.array([t["size"] for t in self.tensors]), code)
        return self._framed(pd.DataFrame(names | table), "loss change allocation by layer")

    @property
    def units(self) -> pd.DataFrame:
        """One row a unit (output neuron, channel): layer, unit, lca."""
        table = units_of(self.tensors).table.assign(lca=self._rows.units.sum(0))
        return self._framed(table, "loss change allocation by unit")

    @property
    def parameters(self) -> pd.DataFrame:
        """One row a parameter.

        Columns: parameter (global index), tensor, lca, help, hurt, error, helping and hurting (steps), lca_turns,
        weight_turns, gradient_turns (strict changes of sign from one step to the next).
        """
        sums = self._sums["parameters"]
        names = np.repeat([t["name"] for t in self.tensors], [t["size"] for t in self.tensors])
        table = {"parameter": np.arange(len(names)), "tensor": names, "lca": sums["help"] + sums["hurt"]}
        kept = {name: values for name, values in sums.items() if not name.startswith("last_")}
        return self._framed(pd.DataFrame(table | kept), "loss change allocation by parameter")

    def series(self, by: str = "layer") -> pd.DataFrame:
        """A wide frame, one row a step, one column a layer (or `by="tensor"`, "unit"): the sum of A."""
        if by == "unit":
            table = units_of(self.tensors).table
            columns = pd.MultiIndex.from_frame(table)
            values = self._rows.units
        elif by in ("layer", "tensor"):
            values = self._rows.tensors["sum"] if by == "tensor" else self._kept.by_layer(self._rows.tensors["sum"])
            columns = pd.Index([t["name"] for t in self.tensors] if by == "tensor" else self.layers_in_order, name=by)
        else:
            raise UnknownName(f"by={by!r}: {did_you_mean(by, ('layer', 'tensor', 'unit'))}")
        frame = pd.DataFrame(values, columns=columns, index=pd.Index(self._steps, name="step"))
        return self._framed(frame, f"loss change allocation by step and {by}")

    def cells(self, selector: str = "all", steps: slice = slice(None), of_class: int | None = None) -> Array:
        """A of some parameters, (steps, parameters) float32, in the order of their global indices.

        Args:
            selector: names, patterns or indices as everywhere: "fc1.weight[3,:]".
            steps: places, counted from the first step of the allocation.
            of_class: A^c of this class, of its own mean loss; None for A of the whole.

        Raises:
            NotRecorded: if only sums were kept, or not those of classes.
            UnknownName: if there is no such class.
        """
        return self._kept.cells(selector, steps, of_class)

    # Groups of samples, parts of the motion -----------------------------------------------------------------------

    @property
    def classes(self) -> pd.DataFrame:
        """One row a class and layer.

        Columns: lca, the sum of A^c, the allocation of the class's own mean loss L_c; and share, n_c / N. The sum of
        share x lca over classes is that of `layers`.

        Raises:
            NotRecorded: if it was computed without classes=True.
        """
        self._kept.need("class")
        groups, shares = self._kept.by_layer(self._rows.groups).sum(0), self.labels["shares"]
        index = pd.MultiIndex.from_product([self.labels["groups"], self.layers_in_order], names=["class", "layer"])
        share = np.repeat(shares, len(self.layers_in_order))
        frame = pd.DataFrame({"lca": groups.reshape(-1), "share": share}, index=index).reset_index()
        return self._framed(frame, "loss change allocation by class and layer")

    def intervals(self, level: float = 0.95) -> pd.DataFrame:
        """Layers with confidence intervals, of an allocation over a random subset: see `intervals.of_blocks`.

        Raises:
            NotRecorded: if it was computed without subset=.
        """
        self._kept.need("block")
        blocks = self._kept.by_layer(self._rows.groups).sum(0)
        total = sum(self.labels["shares"])
        if not math.isclose(total, 1.0, rel_tol=1e-9):  # a loss that is a sum over samples
            blocks = blocks * self.labels["of"]
        found = intervals.of_blocks(blocks, self.layers_in_order, self.labels["size"], self.labels["of"], level)
        return self._framed(found, "loss change allocation by layer, from a subset")

    @property
    def motion(self) -> pd.DataFrame:
        """One row a layer and part of the motion: lca, which sums over the parts to that of the layer.

        "rest" is what the parts leave of it: rounding, unless the record does not tell all that the optimizer did. The
        parts are told by the gradient of the allocated loss: over other data than the training's, "noise" holds the
        difference of the two, too.

        Raises:
            NotRecorded: if it was computed without motion=True.
        """
        if not self.labels["parts"]:
            raise NotRecorded("the motion was not divided; compute with motion=True.")
        sums = self._kept.by_layer(self._rows.parts).sum(0)
        sums = np.vstack([sums, self._kept.by_layer(self._rows.tensors["sum"]).sum(0) - sums.sum(0)])
        parts = [*self.labels["parts"], "rest"]
        index = pd.MultiIndex.from_product([parts, self.layers_in_order], names=["part", "layer"])
        frame = pd.DataFrame({"lca": sums.reshape(-1)}, index=index).reset_index()
        return self._framed(frame, "loss change allocation by part of the motion")

    # Analyses -----------------------------------------------------------------------------------------------------

    def helping(self, level: float = 0.05) -> pd.DataFrame:
        """How many parameters help at a step, by layer and in all: mean shares with intervals, against one half.

        See `nbdyn.analysis.lca.helping.helping_test`; both conventions, of all and of the non-zero.
        """
        helping, hurting, size = self._kept.counts()
        names = ["all", *self.layers_in_order]
        frame = _helping.helping_test(helping, hurting, size, names, level=level).rename(columns={"group": "layer"})
        return self._framed(frame, "percent helping")

    def helping_by_step(self) -> pd.DataFrame:
        """The same at every step: `nbdyn.analysis.lca.helping.percent_helping`."""
        helping, hurting, size = self._kept.counts()
        frame = _helping.percent_helping(helping, hurting, size, ["all", *self.layers_in_order])
        steps = self._steps[frame["step"]]
        return self._framed(frame.rename(columns={"group": "layer"}).assign(step=steps), "percent helping by step")

    def oscillations(self) -> pd.DataFrame:
        """Steps per event, of weight turns, crossings of the full gradient, and turns of A (LCA, table S2).

        See `nbdyn.analysis.lca.helping.per_event`; "ever non-zero" are parameters that ever moved the loss.
        """
        sums = self._sums["parameters"]
        alive = sums["helping"] + sums["hurting"] > 0
        frames = [
            _helping.per_event(sums[column], len(self), alive).assign(event=event)
            for event, column in (("weight turn", "weight_turns"), ("gradient crossing", "gradient_turns"),
                                  ("LCA turn", "lca_turns"))
        ]  # fmt: skip
        frame = pd.concat(frames, ignore_index=True)
        frame.insert(0, "event", frame.pop("event"))
        return self._framed(frame, "oscillations")

    def helping_shares(self) -> pd.DataFrame:
        """The histogram over parameters of the percent of steps at which each helps (LCA, figure 3d)."""
        share = _helping.helping_share(self._sums["parameters"]["helping"], len(self))
        return self._framed(_helping.share_histogram(share), "percent of helping steps by parameter")

    def moments(self, top: int = 20, of: str = "lca") -> Moments:
        """Moments of learning: the steps at which a layer helped more than just before and after (LCA, section 5).

        By class where the allocation is; `.synchronization()` of the result tests whether layers share them.

        Args:
            top: so many of each series with the largest |A|.
            of: "lca"; or, as controls, "gradient" or "motion": peaks of a layer's Euclidean norm, not by class.

        Raises:
            UnknownName: for another quantity.
            NotRecorded: if the rule took no gradient before the steps.
        """
        if of not in ("lca", "gradient", "motion"):
            raise UnknownName(f"of={of!r}: {did_you_mean(of, ('lca', 'gradient', 'motion'))}")
        if of != "lca":
            norms = np.sqrt(self._kept.by_layer(self._rows.tensors[f"{of}_square"]))
            if np.isnan(norms).all():
                raise NotRecorded(f"{self.spec['precision']['integrator']!r} took no gradient before the steps.")
            return Moments(norms.T[None], self.layers_in_order, [], self._steps, top, of)
        if self.labels["kind"] == "class":
            series = np.moveaxis(self._kept.by_layer(self._rows.groups), 0, -1)  # (classes, layers, steps)
            classes = list(self.labels["groups"])
        else:
            series, classes = self._kept.by_layer(self._rows.tensors["sum"]).T[None], []
        return Moments(series, self.layers_in_order, classes, self._steps, top)

    def concentration(self, selector: str = "all") -> pd.DataFrame:
        """How few parameters do the help and the hurt: `nbdyn.analysis.lca.concentration.concentration`."""
        indices = select(selector, list(self.tensors)).indices
        sums = self._sums["parameters"]
        return self._framed(_concentration.concentration((sums["help"] + sums["hurt"])[indices]), "concentration")

    def tail(self, selector: str = "all") -> pd.DataFrame:
        """How heavy the tails of single A[t, i] are: `nbdyn.analysis.lca.concentration.tail_share`."""
        return self._framed(_concentration.tail_share(self.cells(selector)), "tail share")

    def tails(
        self, selector: str = "all", steps: Sequence[int] | None = None, bootstrap: int = 199, seed: int = 0
    ) -> pd.DataFrame:
        """Double Weibull fits of A at single steps, and pooled: is the tail stretched, and is this the right family?

        Args:
            selector: which parameters.
            steps: places, counted from the first step of the allocation, negative ones from the end; None takes nine,
                evenly spaced.
            bootstrap: replicates of the goodness of fit.
            seed: of samples (more than 100,000 values are not all fitted) and bootstrap.

        Returns:
            A row a step and "pooled": n (values that are not 0), zeros, shape (1: Laplace; below: heavier than
            exponential), low, high (95 %, values taken for independent, which those of a layer are not), ks, p
            (goodness of fit), best (the family of largest likelihood), R_normal, R_Laplace, R_t, R_stable (log
            likelihood ratio a value, nats; above 0 the double Weibull is nearer), tail_ratio_2 (see `tail`).
        """
        places = np.unique(np.linspace(0, len(self) - 1, 9).astype(int)).tolist()
        places = places if steps is None else _tails.places_of(steps, len(self))
        found = _tails.table(self._step_of(selector), places, self._steps, bootstrap, seed)
        return self._framed(found, "tails of single allocations")

    def tail_fit(self, selector: str = "all", step: int | None = None, bootstrap: int = 199, seed: int = 0) -> TailFit:
        """The fit of `tails` at one place, or of all steps (not nine) pooled, with its picture and sentence."""
        places = range(len(self)) if step is None else _tails.places_of([step], len(self))
        return _tails.fit(self._step_of(selector), places, bootstrap, seed)

    def _step_of(self, selector: str) -> Callable[[int], Array]:
        return lambda place: self.cells(selector, slice(place, place + 1)).reshape(-1)

    def specialization(self, layer: str) -> Specialization:
        """Do the neurons of a layer help single classes? `nbdyn.analysis.lca.neurons.specialization`."""
        self._kept.need("class")
        mine = self._kept.units_of(layer)
        return specialization(-self._sums["unit_groups"]["value"][:, mine].T)

    def saliency(self, tensor: str, shape: Sequence[int]) -> Array:
        """How much each pixel's weight helped, (outputs, *shape): `nbdyn.analysis.lca.neurons.saliency`."""
        found = self._kept.tensor(tensor)
        sums, piece = self._sums["parameters"], slice(found["first"], found["first"] + found["size"])
        return saliency((sums["help"] + sums["hurt"])[piece].reshape(found["shape"][0], -1), shape)

    def same_neuron(self, tensor: str, **options: Any) -> SameNeuron:
        """Do weights of one neuron help at the same steps? `nbdyn.analysis.lca.neurons.same_neuron`, of a kernel."""
        found = self._kept.tensor(tensor)
        width = found["size"] // found["shape"][0]
        place = np.arange(found["size"])
        return same_neuron(self.cells(tensor), place // width, place % width, **options)

    def against(self, validation: Allocation) -> pd.DataFrame:
        """Train against validation: one row a layer: train, validation, and overfit, validation - train.

        Raises:
            Incompatible: if the other is of other steps or tensors.
        """
        same = np.array_equal(self._steps, validation._steps) and self.layers_in_order == validation.layers_in_order
        if not same:
            raise Incompatible("the two allocations are not of the same steps and layers.")
        own, other = self.layers["lca"], validation.layers["lca"]
        frame = pd.DataFrame({"layer": self.layers_in_order, "train": own, "validation": other, "overfit": other - own})
        return self._framed(frame, "train against validation")

    def plot(self) -> Any:
        """The layers' totals, and loss and layers over the steps."""
        from nbdyn.analysis.lca import figures

        return figures.overview(self)

    def plot_saliency(self, tensor: str, shape: Sequence[int]) -> Any:
        """Images of `saliency`, of the units that helped most; colour images are summed over their channels."""
        from nbdyn.analysis.lca import figures

        images = self.saliency(tensor, shape)
        images = images if images.ndim == 3 else images.sum(1)
        order = np.argsort(-images.sum((1, 2)), kind="stable")
        return figures.saliency(images[order], order, f"what helped at each input of {tensor}")

    def _framed(self, frame: pd.DataFrame, what: str) -> pd.DataFrame:
        s = self._rows.steps
        residual = float(s["residual"].sum())
        frame.attrs[PROVENANCE] = {
            "run": self._run, "what": what, "residual": f"{residual:.3g}",
            "integrator": self.spec["precision"]["integrator"],
            "samples": str(self.labels["size"]), "version": self.labels["version"],
        }  # fmt: skip
        return frame

    def __repr__(self) -> str:
        row = self.check().iloc[0]
        met = "" if not row["not_met"] else f", {row['not_met']:.0f} steps miss the tolerance"
        return (
            f"<Allocation of {self._run or 'weights'}: {len(self):,} steps, loss {row['loss']:.4g} -> "
            f"{row['loss_after']:.4g}, allocated {row['allocated']:.6g}, residual {row['residual']:.2g} "
            f"({row['residual_percent']:.2g} %), {row['gradients']:,.0f} gradients of {self.labels['size']:,} "
            f"samples{met}>"
        )
