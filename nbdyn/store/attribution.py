"""How much each visit moved a weight: the coefficients by which contributions to gradients make a displacement.

An update of torch's SGD, Adam or AdamW is linear in the gradients, once Adam's second moment v is taken as it was:

    g_u = f_u G_u + k_u w_u          G_u: sum of the step's contributions; f: clipping and sign; k: L2 weight decay
    m_u = mu_u m_(u-1) + nu_u g_u    the buffer of momentum, the first moment
    w_(u+1) - w_u = -alpha_u m_u - gamma_u g_u - delta_u w_u        delta: decoupled weight decay

so that w[stop] - w[start] = sum_t coefficient_t G_t + decay + before, with coefficients from one backward recursion
over the steps (the adjoint of the lines above): `A_u = mu_(u+1) A_(u+1) - alpha_u`,
`coefficient_u = f_u (nu_u A_u - gamma_u)`, where alpha, gamma and delta count only for start <= u < stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.schema import PART_GRADIENT
from nbdyn.settings import format_size
from nbdyn.store import optimizer_state, state
from nbdyn.store.gradients import Gradients
from nbdyn.store.names import check_indices
from nbdyn.store.seen_gradients import SeenGradients
from nbdyn.store.trajectory import trajectory_chunks

if TYPE_CHECKING:
    from nbdyn.store.optimizer_state import Snapshot
    from nbdyn.store.store import Store

SUPPORTED = ("SGD", "Adam", "AdamW")
TAIL = 1e-7
"""What is left of a buffer where the look back through it ends: below the rounding of float32."""
FACTOR_TOLERANCE = 1e-2
"""|given gradient - c * raw gradient| / |given gradient| up to which it counts as clipped by a number: half precision
leaves about 1e-3."""
MAX_BYTES = 2_000_000_000
"""Of the coefficients by step and parameter, at most."""


@dataclass(frozen=True)
class Attribution:
    """The displacement w[stop] - w[start] of some parameters, by the gradients that made it.

    The share of a visit at step t is coefficient[t] * c, c being its contribution (`run.gradients[t, ...]`). Momentum
    makes visits before `start` count, too. moved = explained + decay + before + rounding.

    Attributes:
        steps: the steps whose visits matter, (m,) int64.
        coefficients: (m,) if the same for all parameters, else (m, k), float64.
        kind: "exact" (SGD), "geometric tail" (with momentum), or "first order" (Adam: a sample's influence by way of
            the second moment is left out; the shares add up all the same).
        explained: sum of coefficient times gradient, (k,) float64.
        moved: w[stop] - w[start], (k,) float64.
        decay: the part of weight decay, which belongs to no sample, (k,).
        before: what the buffer held from before `steps`, (k,).
    """

    steps: np.ndarray
    coefficients: np.ndarray
    kind: str
    explained: np.ndarray
    moved: np.ndarray
    decay: np.ndarray
    before: np.ndarray

    @property
    def rest(self) -> np.ndarray:
        """What the visits do not explain, (k,): moved - explained; weight decay, `before` and rounding."""
        return self.moved - self.explained

    @property
    def residual(self) -> float:
        """The largest |moved - explained - decay - before|: rounding, if all is as recorded."""
        return float(np.max(np.abs(self.rest - self.decay - self.before), initial=0.0))

    def __repr__(self) -> str:
        ends = f"{self.steps[0]}..{self.steps[-1]}" if len(self.steps) else "none"
        return f"<Attribution to steps {ends}, {self.kind}: {len(self.moved)} parameters, residual {self.residual:.3g}>"


@dataclass(frozen=True)
class Update:
    """The update rule of every step, see the module's docstring: each (n, c), c tensors (SGD) or parameters (Adam)."""

    mu: np.ndarray
    nu: np.ndarray
    alpha: np.ndarray
    gamma: np.ndarray
    kappa: np.ndarray
    delta: np.ndarray


def coefficients(store: Store, indices: np.ndarray, start: int, stop: int) -> Attribution:
    """Attribute w[stop] - w[start] of some parameters to the gradients of single steps, hence to samples.

    Cost: the batch gradients of these parameters from the snapshot before the tail of momentum on (Adam: twice the
    memory of its coefficients, steps x k float64), the trajectory of the weights where there is weight decay.

    Args:
        store: the run.
        indices: global parameter indices, (k,).
        start: first step.
        stop: end of the half-open range: weights[stop] are after the last of its steps.

    Raises:
        NotRecorded: for other optimizers than SGD, Adam and AdamW; if gradients were changed by more than a factor
            before the step; or not captured whole and exactly.
        Incompatible: if an index lies outside the model.
        NbdynError: if the coefficients would take more than 2 GB.
    """
    indices = np.asarray(indices, np.int64).reshape(-1)
    check_indices(indices, store.config["tensors"])
    if not len(indices):
        raise Incompatible("no weights are named; give one or more parameter indices, such as [41_025].")
    if not 0 <= start <= stop <= store.steps_committed:
        last = store.steps_committed - 1
        raise NotRecorded(f"{store.name} has steps 0..{last}; {start}..{stop - 1} are not among them.")
    name = store.config["optimizer"]["name"]
    if name not in SUPPORTED:
        raise NotRecorded(
            f"{store.name} was trained with {name}; displacements are attributed for {', '.join(SUPPORTED)}. "
            "Contributions to gradients are there for every optimizer: ask by sum |g|, not by net dw."
        )
    unique, back = np.unique(indices, return_inverse=True)
    found = Work(store, unique, start, stop).attribution()
    columns = found.coefficients if found.coefficients.ndim == 1 else found.coefficients[:, back]
    parts = {field: getattr(found, field)[back] for field in ("explained", "moved", "decay", "before")}
    return replace(found, coefficients=columns, **parts)


class Work:
    """What the attribution of one displacement needs, step by step from `anchor` on."""

    def __init__(self, store: Store, parameters: np.ndarray, start: int, stop: int) -> None:
        self._store, self._parameters, self._start, self._stop = store, parameters, start, stop
        self._anchor, self._snapshot, self._options = look_back(store, start, stop)
        self._seen = SeenGradients(store, parameters, self._anchor, stop)
        self._owner = self._seen.owner
        self._names = [store.config["tensors"][number]["name"] for number in self._seen.tensors]
        places = optimizer_state.places(store)
        self._places = [places.get(name, (-1, -1)) for name in self._names]
        updated = np.array([group >= 0 for group, _ in self._places], bool)
        self._active = self._seen.present & ~self._seen.skipped[:, None] & updated
        for step in self._seen.given:
            self._seen.factor[step - self._anchor] = _fitted_factor(store, int(step))
        self._wanted = np.arange(self._anchor, stop) >= start
        self._factor = self._seen.factor[:, None] * np.where(self._column("maximize"), -1.0, 1.0)

    def _column(self, key: str, item: int | None = None) -> np.ndarray:
        """An option at every step for every tensor, (n, m); of pairs such as betas one item."""
        found = np.zeros((len(self._options), len(self._places)))
        for place, (group, _) in enumerate(self._places):
            if group >= 0:
                values = [groups[group].get(key, 0.0) for groups in self._options]
                found[:, place] = values if item is None else [value[item] for value in values]
        return found

    def _state(self, key: str) -> list[Any]:
        """The optimizer's state at the anchor of each tensor: None, or the wanted parameters' (k_j,), or a number."""
        found = []
        for number, (_, place) in enumerate(self._places):
            value = self._snapshot.tensors.get(f"optimizer/{place}/{key}")
            if value is not None:
                first = self._store.config["tensors"][self._seen.tensors[number]]["first"]
                flat = value.double().reshape(-1).numpy()
                local = self._parameters[self._seen.columns[number]] - first
                value = flat[local] if key != "step" else float(flat[0])
            found.append(value)
        return found

    def _flat_state(self, key: str) -> np.ndarray:
        """State of the wanted parameters, zeros where there was none, (k,)."""
        found = np.zeros(len(self._parameters))
        for columns, value in zip(self._seen.columns, self._state(key), strict=True):
            if value is not None:
                found[columns] = value
        return found

    # The update rules -------------------------------------------------------------------------------------------

    def _sgd(self) -> Update:
        """`torch.optim.SGD`, a column a tensor: the first gradient becomes the buffer as it is, undamped."""
        lr, momentum = self._column("lr"), self._column("momentum")
        nesterov = self._column("nesterov").astype(bool)
        buffered = self._active & (momentum != 0)
        there = np.array([value is not None for value in self._state("momentum_buffer")], bool)
        first = buffered & ~there & (np.cumsum(buffered, axis=0) == 1)
        return Update(
            mu=np.where(buffered, np.where(first, 0.0, momentum), 1.0),
            nu=np.where(buffered, np.where(first, 1.0, 1.0 - self._column("dampening")), 0.0),
            alpha=np.where(buffered, np.where(nesterov, lr * momentum, lr), 0.0) * self._wanted[:, None],
            gamma=np.where(self._active & (~buffered | nesterov), lr, 0.0) * self._wanted[:, None],
            kappa=np.where(self._active, self._column("weight_decay"), 0.0),
            delta=np.zeros_like(lr),
        )

    def _adam(self, gradients: np.ndarray, weights: np.ndarray | None) -> Update:
        """`torch.optim.Adam` and AdamW, a column a parameter: v, and with amsgrad its maximum, as they were."""
        owner, active = self._owner, self._active
        lr, beta1, beta2, decay = (
            self._column("lr"), self._column("betas", 0), self._column("betas", 1), self._column("weight_decay"),
        )  # fmt: skip
        decoupled = self._column("decoupled_weight_decay").astype(bool)
        decoupled |= self._store.config["optimizer"]["name"] == "AdamW"
        kappa = np.where(active & ~decoupled, decay, 0.0)[:, owner]
        count = np.array([value or 0.0 for value in self._state("step")]) + np.cumsum(active, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(active & self._wanted[:, None], lr / (1 - beta1**count), 0.0)[:, owner]
        root = np.sqrt(1 - beta2 ** np.maximum(count, 1))
        eps, amsgrad = self._column("eps"), self._column("amsgrad").astype(bool)
        v, largest = self._flat_state("exp_avg_sq"), self._flat_state("max_exp_avg_sq")
        alpha = np.empty_like(gradients)
        for row in range(len(gradients)):
            g = self._factor[row, owner] * gradients[row]
            if weights is not None:
                g = g + kappa[row] * weights[row]
            b2 = beta2[row, owner]
            v = np.where(active[row, owner], b2 * v + (1 - b2) * g * g, v)
            largest = np.where(active[row, owner], np.maximum(largest, v), largest)
            second = np.where(amsgrad[row, owner], largest, v)
            denominator = np.sqrt(second) / root[row, owner] + eps[row, owner]
            alpha[row] = np.divide(rate[row], denominator, out=np.zeros_like(v), where=rate[row] != 0)
        delta = np.where(active & decoupled, lr * decay, 0.0) * self._wanted[:, None]
        nu = np.where(active, 1 - beta1, 0.0)[:, owner]
        mu = np.where(active, beta1, 1.0)[:, owner]
        return Update(mu, nu, alpha, np.zeros_like(alpha), kappa, delta[:, owner])

    def _weights(self) -> np.ndarray:
        """The weights before every step, (n, k)."""
        chunks = trajectory_chunks(self._store, self._parameters, self._anchor, self._stop)
        return np.concatenate([rows for _, rows in chunks])

    # From the rules to the attribution --------------------------------------------------------------------------

    def attribution(self) -> Attribution:
        """Rules, coefficients, and what they add up to."""
        is_sgd = self._store.config["optimizer"]["name"] == "SGD"
        decays = bool((self._column("weight_decay") * self._active).any())
        if is_sgd:
            update, gradients = self._sgd(), None
            columns, buffer = self._owner, self._flat_state("momentum_buffer")
            kind = "geometric tail" if update.nu.any() else "exact"
        else:
            self._check_size(len(self._parameters))
            gradients = self._seen.read(self._anchor, self._stop, raw=True)
            update = self._adam(gradients, self._weights() if decays else None)
            columns, buffer, kind = np.arange(len(self._parameters)), self._flat_state("exp_avg"), "first order"
        direct, adjoint = _adjoint(update)
        shares = direct * (self._factor if is_sgd else self._factor[:, self._owner])
        first = self._first(shares)
        explained, dropped = self._explained(shares, columns, first, gradients)
        moved, decay = self._moved(direct * update.kappa - update.delta, columns, decays)
        before = adjoint[columns] * buffer + dropped
        steps = np.arange(self._anchor + first, self._stop)
        merged = self._merged(shares[first:]) if is_sgd else shares[first:]
        return Attribution(steps, merged, kind, explained, moved, decay, before)

    def _check_size(self, width: int) -> None:
        nbytes = 8 * len(self._options) * width
        if nbytes > MAX_BYTES:
            raise NbdynError(
                f"coefficients of {width:,} weights at {len(self._options):,} steps would take {format_size(nbytes)}; "
                f"ask for fewer weights or steps (up to {format_size(MAX_BYTES)})."
            )

    def _first(self, shares: np.ndarray) -> int:
        """The first row that matters: before it, and before `start`, coefficients are below TAIL of the largest."""
        if not shares.size:
            return 0
        size = np.abs(shares).max(axis=1)
        matters = size > TAIL * size.max()
        return min(int(np.argmax(matters)), self._start - self._anchor) if matters.any() else self._start - self._anchor

    def _merged(self, shares: np.ndarray) -> np.ndarray:
        """Columns of tensors as one where they are alike, else as columns of parameters."""
        if (shares == shares[:, :1]).all():
            return shares[:, 0]
        self._check_size(len(self._owner))
        return shares[:, self._owner]

    def _explained(
        self, shares: np.ndarray, columns: np.ndarray, first: int, gradients: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sums of coefficient times gradient from row `first` on, and before it."""
        found = np.zeros((2, len(self._parameters)))
        for start, stop in self._seen.windows():
            rows = slice(start - self._anchor, stop - self._anchor)
            values = self._seen.read(start, stop, raw=True) if gradients is None else gradients[rows]
            part = shares[rows][:, columns]
            # A step that the scaler skipped had infinite gradients, and no influence.
            products = np.multiply(part, values, out=np.zeros_like(values), where=part != 0)
            cut = min(max(0, first - rows.start), len(products))
            found += [products[cut:].sum(axis=0), products[:cut].sum(axis=0)]
        return found[0], found[1]

    def _moved(self, pull: np.ndarray, columns: np.ndarray, decays: bool) -> tuple[np.ndarray, np.ndarray]:
        """The displacement, and the part of weight decay in it: the sum of pull[u] w[u]."""
        start, stop = self._start, self._stop
        ends, decay = {}, np.zeros(len(self._parameters))
        for first, last in [(self._anchor, stop + 1)] if decays else [(start, start + 1), (stop, stop + 1)]:
            for steps, rows in trajectory_chunks(self._store, self._parameters, first, last):
                ends |= {t: rows[t - steps[0]].astype(np.float64) for t in (start, stop) if t in steps}
                if decays:
                    inside = steps[steps < stop]
                    decay += (pull[inside - self._anchor][:, columns] * rows[: len(inside)]).sum(axis=0)
        return ends[stop] - ends[start], decay


def look_back(store: Store, start: int, stop: int) -> tuple[int, Snapshot, list[list[dict[str, Any]]]]:
    """The snapshot before which nothing of a buffer is left at `start`, and the options of every step since then."""
    back = 0
    while True:
        anchor = state.last_snapshot(store, max(0, start - back))
        if anchor is None:
            raise NotRecorded(f"{store.name} holds no snapshot at or before step {start} to begin from.")
        snapshot = optimizer_state.read_snapshot(store, anchor)
        options = optimizer_state.options(store, snapshot, anchor, stop)
        rates = np.array([[_persistence(group) for group in groups] for groups in options])
        if anchor == 0 or not rates.any() or rates[: start - anchor].prod(axis=0).max() <= TAIL:
            return anchor, snapshot, options
        largest = float(rates.max())
        back = max(2 * back, math.ceil(math.log(TAIL) / math.log(largest)) if largest < 1 else start)


def _persistence(group: dict[str, Any]) -> float:
    """What a step leaves of the buffer."""
    return float(group["betas"][0]) if "betas" in group else float(group["momentum"])


def _adjoint(update: Update) -> tuple[np.ndarray, np.ndarray]:
    """Derivative of the displacement by each step's g, (n, c), and by the buffer before the first step, (c,)."""
    found = np.empty(update.alpha.shape)
    adjoint = np.zeros(update.alpha.shape[1])
    for row in reversed(range(len(found))):
        adjoint = adjoint - update.alpha[row]
        found[row] = update.nu[row] * adjoint - update.gamma[row]
        adjoint = update.mu[row] * adjoint
    return found, adjoint


def _fitted_factor(store: Store, step: int) -> float:
    """The number c for which a gradient that is stored whole is c times the sum of the step's contributions."""
    data = state.read(store, step, PART_GRADIENT) or b""
    flat = np.frombuffer(data, store.config["row_dtype"]).astype(np.float64)
    raw, seen = [], []
    for name, gradient in Gradients(store).rebuild(step).items():
        tensor = next(t for t in store.config["tensors"] if t["name"] == name)
        raw.append(gradient.reshape(-1).astype(np.float64))
        seen.append(flat[tensor["first"] : tensor["first"] + tensor["size"]])
    x, y = np.concatenate(raw), np.concatenate(seen)
    factor = float(x @ y / (x @ x)) if x.any() else 1.0
    if not np.linalg.norm(y - factor * x) <= FACTOR_TOLERANCE * np.linalg.norm(y):
        raise NotRecorded(
            f"before step {step} of {store.name} the gradient was changed by more than one factor (clipping by value, "
            "noise, a hook): how much of it belongs to which sample is not defined. Contributions to the gradient "
            "itself are there: ask by sum |g|, not by net dw."
        )
    return factor
