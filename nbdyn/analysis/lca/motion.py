"""The motion of each step, divided into what made it: gradient, noise, momentum, weight decay, adaptive scaling.

A step of torch's SGD, Adam or AdamW is, in the notation of `nbdyn.store.attribution`, whose rules are used here,

    g = G + kappa w            G: the minibatch gradient as the optimizer saw it; kappa: L2 weight decay
    m = mu m' + nu g           m': the buffer of momentum (the first moment) before the step
    dw = -alpha m - gamma g - delta w          delta: decoupled weight decay

With L the gradient over the whole training set, G = L + (G - L); the buffer is kept as the sum of two, m = p + q, p of
gradients and q of L2 decay, each of which follows the second line. With c = alpha nu + gamma the parts are

    gradient        -c L
    noise           -c (G - L)
    momentum        -alpha mu p'
    weight decay    -c kappa w - alpha mu q' - delta w

SGD's alpha is the same for all weights of a param group. Adam's is lr D, with one D = 1 / (sqrt(v) + eps), both bias
corrections included, for each weight. For it, the four lines above are taken with alpha = lr d, one number d for
all weights, and what is left is

    adaptive scaling    -lr (D - d) m,    with d = |lr D m| / |lr m|, norms over all weights.

So the first four are the step that SGD with momentum would take from the same moments, as long as Adam's own step but
in SGD's direction; the fifth is the difference of the two directions. (This is the magnitude of one optimizer with the
direction of another, as in the grafting of Agarwal et al. 2020, arXiv 2002.11803. The mean of D would not do: a weight
that never had a gradient has D = 1 / eps, and a few of them would make up the mean.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.store import optimizer_state
from nbdyn.store.attribution import SUPPORTED, Update, Work, look_back
from nbdyn.store.seen_gradients import CHUNK_BYTES, SeenGradients
from nbdyn.store.trajectory import trajectory_chunks

if TYPE_CHECKING:
    from nbdyn.store.store import Store

PARTS = ("gradient", "noise", "momentum", "weight decay", "adaptive scaling")
"""The parts of a step; SGD has the first four."""


@dataclass(frozen=True)
class MotionParts:
    """One step's motion w[t+1] - w[t] of all parameters, in parts.

    Attributes:
        step: t.
        names: of the parts, see `PARTS`.
        values: (parts, P) float64.
        residual: max |sum of the parts - (w[t+1] - w[t])|: rounding, if all is as recorded; NaN if weights are.
        scale: for Adam d, the one number that stands for all of its scalings (see the module); 1 for SGD.
    """

    step: int
    names: tuple[str, ...]
    values: np.ndarray
    residual: float
    scale: float

    def __getitem__(self, name: str) -> np.ndarray:
        """One part, (P,)."""
        return self.values[self.names.index(name)]

    def __repr__(self) -> str:
        return f"<MotionParts of step {self.step}: {', '.join(self.names)}; residual {self.residual:.3g}>"


class Motion:
    """Divides the motion of the steps of a recorded run, going forward.

        motion = Motion(run.store)
        parts = motion.parts(0, w0, w1, full_gradient)
        (k * parts.values).sum(axis=1)      # the loss change of step 0 that each part made

    What each part says. "gradient": what the step would have been with the whole training set at once and no memory.
    "noise": all that the optimizer's gradient differed by: the choice of the batch; also clipping, another mode of
    dropout or BatchNorm, or lower precision, than that of the full gradient given. "momentum": gradients of earlier
    steps, their noise included. "weight decay": all of it, what came by way of the buffer included. "adaptive
    scaling": Adam's direction instead of SGD's, see the module. Adam's second moment is taken as it was: that a
    gradient (or L2 decay) also changed D is in no part. A residual far above rounding says that something happened that
    is not in the record: a hook that changed gradients, an optimizer's state that was changed by hand.

    Cost: a step takes about 20 passes over P float64 numbers, and the product that rebuilds the minibatch gradient from
    the recorded factors: 30 ms (SGD) or 70 ms (Adam) for 84,060 parameters, batches of 250, two busy cores. Memory
    about 20 P float64 and 32 MB. Where `start` is not 0, the steps whose gradients are
    still in the buffer then (150 for a momentum of 0.9) are gone through first.

    Args:
        store: the run, recorded with per-sample gradients; `run.store`.
        start: the first step whose parts can be asked for.
        stop: end of the half-open range of steps; None for all that are committed.

    Attributes:
        names: of the parts: `PARTS`, without the last for SGD.

    Raises:
        Incompatible: for another optimizer than SGD, Adam and AdamW of torch.optim.
        NotRecorded: if the run does not have these steps, or their minibatch gradients.
    """

    def __init__(self, store: Store, start: int = 0, stop: int | None = None) -> None:
        stop = store.steps_committed if stop is None else stop
        if not 0 <= start <= stop <= store.steps_committed:
            last = store.steps_committed - 1
            raise NotRecorded(f"{store.name} has steps 0..{last}; {start}..{stop - 1} are not among them.")
        name = store.config["optimizer"]["name"]
        if name not in SUPPORTED:
            raise Incompatible(
                f"{store.name} was trained with {name}; motion is divided into gradient, noise, momentum and the like "
                f"for {', '.join(SUPPORTED)} of torch.optim. The allocation itself is there for every optimizer."
            )
        self._store, self._start, self._stop = store, start, stop
        self._carrier = _Carrier(store, start, stop)
        self._next = self._carrier.anchor
        self.names = PARTS[:-1] if name == "SGD" else PARTS

    def __repr__(self) -> str:
        return f"<Motion of {self._store.name}, steps {self._start}..{self._stop - 1}: {', '.join(self.names)}>"

    def parts(self, step: int, before: np.ndarray, after: np.ndarray, gradient: np.ndarray) -> MotionParts:
        """The parts of one step's motion.

        Args:
            step: t; later than that of the call before. Steps left out are gone through from the record.
            before: w[t], all parameters in the order of the run's global indices, (P,).
            after: w[t+1], (P,).
            gradient: of the loss over the whole training set at w[t], (P,).

        Raises:
            NbdynError: if the step is not within start..stop-1, or not later than the last one.
            Incompatible: if an array does not have one number for each parameter.
        """
        before, after, gradient = (self._checked(a) for a in (before, after, gradient))
        if not max(self._next, self._start) <= step < self._stop:
            raise NbdynError(
                f"step {step}: this Motion goes forward through steps {self._start}..{self._stop - 1}, and is at "
                f"{max(self._next, self._start)}; for an earlier one make another, Motion(store, start={step})."
            )
        with np.errstate(over="ignore", invalid="ignore"):  # of a run that diverged: its parts are NaN
            self._advance(step)
            values, scale = self._carrier.take(step, before, gradient)
            apart = np.abs(values.sum(axis=0) - (after - before))
        self._next = step + 1
        return MotionParts(step, self.names, values[: len(self.names)], float(np.max(apart, initial=0.0)), scale)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        found = np.asarray(values, np.float64)
        if found.shape != (self._store.parameters,):
            raise Incompatible(
                f"found an array of shape {found.shape}; weights and gradients of {self._store.name} are flat, "
                f"({self._store.parameters:,},), all tensors one after another as in run.parameters."
            )
        return found

    def _advance(self, step: int) -> None:
        """Take the steps before `step`, for what they leave in the optimizer's state."""
        nothing = np.zeros(self._store.parameters)
        if self._carrier.decays:
            for steps, rows in trajectory_chunks(self._store, np.arange(self._store.parameters), self._next, step):
                for t, row in zip(steps.tolist(), rows, strict=True):
                    self._carrier.take(t, row.astype(np.float64), nothing)
        else:
            for t in range(self._next, step):
                self._carrier.take(t, nothing, nothing)


class _Carrier(Work):
    """The rules of an attribution, one step at a time, with a state that is carried from step to step.

    Attributes:
        anchor: the first step that must be taken.
        decays: whether there is any weight decay, so that weights matter.
    """

    def __init__(self, store: Store, start: int, stop: int) -> None:
        self._store, self._parameters = store, np.arange(store.parameters)
        self.anchor, self._snapshot, self._every = look_back(store, start, stop)
        try:
            self._seen = SeenGradients(store, self._parameters, self.anchor, stop)
        except NotRecorded as error:
            raise NotRecorded(
                "noise and momentum are told from the minibatch gradients of all steps; record them with "
                "nbdyn.record(path, model, optimizer, loss_fn), without per_sample=False, layers, every, fraction or "
                f"project. Found: {error}"
            ) from error
        self._owner = self._seen.owner
        places = optimizer_state.places(store)
        names = [store.config["tensors"][number]["name"] for number in self._seen.tensors]
        self._places = [places.get(name, (-1, -1)) for name in names]
        self._updated = np.array([group >= 0 for group, _ in self._places], bool)
        self._wanted = np.ones(1, bool)
        self._is_sgd = store.config["optimizer"]["name"] == "SGD"
        self.decays = any(group.get("weight_decay") for groups in self._every for group in groups)
        self._window, self._window_start = np.empty((0, store.parameters)), self.anchor
        self._load()

    def _load(self) -> None:
        """Begin with the state of the snapshot; a buffer found in it counts as one of gradients."""
        self._there = [value is not None for value in super()._state("momentum_buffer")]
        self._count = np.array([value or 0.0 for value in super()._state("step")])
        self._carried: dict[str, np.ndarray] = {}
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            flat, values = np.zeros(len(self._parameters)), super()._state(key)
            for columns, value in zip(self._seen.columns, values, strict=True):
                flat[columns] = 0.0 if value is None else value
            self._carried[key] = flat
        buffer = self._carried["momentum_buffer" if self._is_sgd else "exp_avg"]
        self._moments = np.stack([buffer, np.zeros_like(buffer)])

    def _state(self, key: str) -> list[Any]:
        """The state as it is now, in place of the snapshot's."""
        if key == "step":
            return self._count.tolist()
        return [True if there else None for there in self._there]  # SGD asks only whether there is a buffer

    def _flat_state(self, key: str) -> np.ndarray:
        return self._carried[key]

    def _gradient(self, step: int) -> np.ndarray:
        """The minibatch gradient as the optimizer saw it, (P,)."""
        if not self._window_start <= step < self._window_start + len(self._window):
            stop = min(step + max(1, CHUNK_BYTES // (8 * len(self._parameters))), self._seen.stop)
            factor = self._seen.factor[step - self.anchor : stop - self.anchor]
            self._window, self._window_start = self._seen.read(step, stop) * factor[:, None], step
        return self._window[step - self._window_start]

    def take(self, step: int, weights: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, float]:
        """Take a step: its parts (len(PARTS), P), and the one scale that they are divided by."""
        row = step - self.anchor
        if self._seen.skipped[row]:  # its gradients are infinite, and did nothing
            return np.zeros((len(PARTS), len(self._parameters))), 1.0
        self._options = [self._every[row]]
        self._active = (self._seen.present[row] & self._updated)[None]
        sign = np.where(self._column("maximize"), -1.0, 1.0)
        self._factor = sign
        gradient = self._gradient(step)
        rule = self._sgd() if self._is_sgd else self._adam(gradient[None], weights[None])
        return self._divided(rule, sign[0, self._owner], gradient, weights, full)

    def _divided(
        self, rule: Update, sign: np.ndarray, gradient: np.ndarray, weights: np.ndarray, full: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """The parts by the lines of the module; the state goes on."""
        columns = self._owner if self._is_sgd else slice(None)
        mu, nu, alpha, gamma, kappa, delta = (
            values[0, columns]
            for values in (rule.mu, rule.nu, rule.alpha, rule.gamma, rule.kappa, rule.delta)
        )  # fmt: skip
        seen = np.stack([sign * gradient, kappa * weights])
        older = mu * self._moments
        self._moments = older + nu * seen
        scale, adaptive = 1.0, np.zeros_like(alpha)
        if not self._is_sgd:
            moment = self._moments.sum(axis=0)
            rate = (self._column("lr") * self._active)[0, self._owner]
            length = float(np.linalg.norm(rate * moment))
            scale = float(np.linalg.norm(alpha * moment)) / length if length else 0.0
            adaptive = (scale * rate - alpha) * moment
            alpha = scale * rate
            self._keep_second_moment(seen.sum(axis=0))
        self._count += self._active[0]
        self._there = (self._there | (self._active & (self._column("momentum") != 0))[0]).tolist()
        direct = alpha * nu + gamma
        own = -direct * sign * full
        parts = [
            own,
            -direct * seen[0] - own,
            -alpha * older[0],
            -direct * seen[1] - alpha * older[1] - delta * weights,
            adaptive,
        ]
        return np.stack(parts), scale

    def _keep_second_moment(self, g: np.ndarray) -> None:
        """What `_adam` made of v and of its maximum within the step, for the next one."""
        b2 = np.where(self._active, self._column("betas", 1), 1.0)[0, self._owner]
        v = self._carried["exp_avg_sq"] = b2 * self._carried["exp_avg_sq"] + (1 - b2) * g * g
        self._carried["max_exp_avg_sq"] = np.maximum(self._carried["max_exp_avg_sq"], v)
