"""What a build has to go through: spans of epochs, classes of visits, groups of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store import calls
from nbdyn.store.index.entry import Span
from nbdyn.store.layout import INDEX_CLASSES
from nbdyn.store.projection import is_projected

if TYPE_CHECKING:
    from nbdyn.store.store import Store

LARGEST_BYTES = 4_000_000_000
"""An index that would be larger, uncompressed, is left out."""
SUMS_BYTES = 1_000_000_000
"""Where the running sums of one site by class would take more memory, classes are left out."""
CELL_SECONDS, PLACE_SECONDS = 0.2e-9, 1.5e-9
"""Time on two cores for a visit's cell of a layer with one position a visit (a matrix product), and for each position
of a cell elsewhere: 0.4 to 1.4 ns were measured on convolutions, attention and LSTMs."""
VISITS_STEPS = 16_384
"""Targets of visits are read so many steps at a time."""


@dataclass(frozen=True)
class Group:
    """Parameters whose sums are built together.

    Attributes:
        site: the only site that uses them, once a batch; None where uses have to be added up before |c| and c^2 are
            taken, and for parameters that no captured call used.
        runs: (first, size) of each run of parameters, those of the site in its order.
        used: whether any captured call uses them.
    """

    site: int | None
    runs: tuple[tuple[int, int], ...]
    used: bool = True

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return sum(size for _, size in self.runs)

    def indices(self) -> np.ndarray:
        """Their global indices, (size,) int64."""
        return np.concatenate([np.arange(first, first + size) for first, size in self.runs])


@dataclass(frozen=True)
class Plan:
    """A build of steps start <= step < stop.

    Attributes:
        start, stop: the steps.
        captured: those of them whose factors are stored, sorted.
        spans: their spans.
        scale: (stop - start,) own gradient g = scale * c at each step; 1 where `own` is False.
        own: whether the scale of every captured step of the run is known.
        classes: of the run's visits; 0 where they are not told apart.
        first_visit: (stop - start,) where each step's visits begin in `target`.
        target: (visits,) int32: class of each visit, -1 for none.
        groups: the parameters.
        left_out: name of an index -> why it is not built.
        visits: captured visits, each counted once for each site: the work to do.
    """

    start: int
    stop: int
    captured: np.ndarray
    spans: tuple[Span, ...]
    scale: np.ndarray
    own: bool
    classes: int
    first_visit: np.ndarray
    target: np.ndarray
    groups: tuple[Group, ...]
    left_out: dict[str, str]
    visits: int

    def classes_at(self, step: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The class of some visits, (n,) int32."""
        return self.target[self.first_visit[step - self.start] + position]

    @property
    def grads(self) -> bool:
        """Whether sums over visits are the batch gradients p.grad."""
        return "grad" not in self.left_out


def plan_of(store: Store, start: int) -> Plan:
    """What steps from `start` on need.

    Raises:
        CorruptRun: if the run is damaged.
    """
    stop, table = store.steps_committed, calls.load(store).table
    steps = store.read_steps(0, stop, ("epoch", "scale", "batch_size"))
    every = np.unique(table[:, calls.STEP])
    own = bool(len(every)) and not np.isnan(steps["scale"][every]).any()
    classes, target = _targets(store, start)
    captured = every[every >= start]
    spans = _spans(steps["epoch"], captured, start)
    left_out = _left_out(store, classes, _count_spans(steps["epoch"]), len(every))
    sizes = steps["batch_size"][start:].astype(np.int64)
    return Plan(
        start=start,
        stop=stop,
        captured=captured,
        spans=spans,
        scale=steps["scale"][start:].astype(np.float64) if own else np.ones(stop - start),
        own=own,
        classes=0 if "classes" in left_out else classes,
        first_visit=np.cumsum(sizes) - sizes,
        target=target,
        groups=_groups(store, table) if "epochs" not in left_out else (),
        left_out=left_out,
        visits=int(table[table[:, calls.STEP] >= start, calls.SIZE].sum()),
    )


def seconds(store: Store) -> float:
    """About how long a build of the whole run takes; right within a factor of four."""
    found, stop = 0.0, store.steps_committed
    for number, site in enumerate(store.factors.sites):
        visits = int(store.factors.calls_of(number, 0, stop)[:, calls.SIZE].sum())
        if site.form == "dense" or not visits:
            found += visits * site.size * CELL_SECONDS
            continue
        # A visit's factors are (inputs + outputs) numbers a position, unless a convolution strides.
        numbers = store.factors.nbytes(number, 0, stop) / np.dtype(store.config["row_dtype"]).itemsize / visits
        places = numbers / sum(site.shape[:2])
        each = CELL_SECONDS if site.form == "linear" and places < 1.5 else PLACE_SECONDS * max(1.0, places)
        found += visits * site.size * each
    return found


def _targets(store: Store, start: int) -> tuple[int, np.ndarray]:
    """How many classes the whole run has, and the class of each visit from step `start` on."""
    classes, found = 0, [np.empty(0, np.int32)]
    for first in range(0, store.steps_committed, VISITS_STEPS):
        visits = store.read_visits(first, min(first + VISITS_STEPS, store.steps_committed))
        target = visits["target"].astype(np.int32)
        classes = max(classes, int(target.max(initial=-1)) + 1)
        found.append(target[visits["step"] >= start])
    return classes, np.concatenate(found)


def _starts(epoch: np.ndarray) -> np.ndarray:
    return np.nonzero(np.diff(epoch, prepend=epoch[0] - 1 if len(epoch) else 0))[0]


def _count_spans(epoch: np.ndarray) -> int:
    return len(_starts(epoch))


def _spans(epoch: np.ndarray, captured: np.ndarray, start: int) -> tuple[Span, ...]:
    firsts = _starts(epoch[start:]) + start
    bounds = zip(firsts.tolist(), [*firsts[1:].tolist(), len(epoch)], strict=True) if len(firsts) else []
    return tuple(Span(int(epoch[a]), a, b, int(np.diff(np.searchsorted(captured, [a, b]))[0])) for a, b in bounds)


def _left_out(store: Store, classes: int, spans: int, captured: int) -> dict[str, str]:
    """Why some indexes cannot be, or are not worth, having."""
    found: dict[str, str] = {}
    if store.config["weights"] != "every":
        found["events"] = "weights were not recorded at every step"
    if not captured:
        return found | dict.fromkeys(("epochs", "classes", "exponents"), "no per-sample gradients were recorded")
    fraction = (store.config.get("per_sample") or {}).get("fraction", 1.0)
    if fraction < 1.0:
        found["grad"] = f"only a share of {fraction} of the samples was recorded (fraction=)"
    elif any(is_projected(site) for site in store.factors.sites):
        found["grad"] = "random projections were recorded (project=)"
    if "grad" in found:
        found["exponents"] = found["grad"]
    if 24 * spans * store.parameters > LARGEST_BYTES:
        found["epochs"] = f"{spans:,} epochs of {store.parameters:,} parameters would be too large"
    if not classes:
        found["classes"] = "the visits have no classes"
    elif classes > INDEX_CLASSES:
        found["classes"] = f"{classes:,} classes are more than {INDEX_CLASSES}"
    elif 8 * classes * spans * store.parameters > LARGEST_BYTES:
        found["classes"] = f"{classes} classes in {spans:,} epochs of {store.parameters:,} parameters are too many"
    elif 16 * classes * max(site.size for site in store.factors.sites) > SUMS_BYTES:
        found["classes"] = f"{classes} classes of so large a layer would take too much memory to build"
    if "epochs" in found:  # one pass over the factors serves all three
        found |= {name: found["epochs"] for name in ("classes", "exponents") if name not in found}
    return found


def _groups(store: Store, table: np.ndarray) -> tuple[Group, ...]:
    """Sites whose parameters are used once a batch, by themselves; then all other parameters of captured tensors."""
    sites, held = store.factors.sites, _held(store)
    uses = np.zeros(store.parameters, np.int16)
    for site in sites:
        for first, size in site.runs:
            uses[first : first + size] += 1
    again = set(table[table[:, calls.CALL] > 0, calls.SITE].tolist())
    alone = held & (uses == 1)
    groups = [
        Group(number, tuple(site.runs))
        for number, site in enumerate(sites)
        if number not in again and all(alone[first : first + size].all() for first, size in site.runs)
    ]
    rest = held.copy()
    for first, size in (run for group in groups for run in group.runs):
        rest[first : first + size] = False
    for used in (True, False):
        some = rest & ((uses > 0) == used)
        groups += [Group(None, _runs(some), used)] if some.any() else []
    return tuple(groups)


def _held(store: Store) -> np.ndarray:
    """Which parameters belong to tensors that were captured by sample, (parameters,) bool."""
    held, tensors = np.zeros(store.parameters, bool), store.config["tensors"]
    firsts = np.array([tensor["first"] for tensor in tensors])
    for first, _ in (run for site in store.factors.sites for run in site.runs):
        tensor = tensors[int(np.searchsorted(firsts, first, side="right")) - 1]
        held[tensor["first"] : tensor["first"] + tensor["size"]] = tensor["name"] not in store.factors.batch_only
    return held


def _runs(chosen: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Runs of True.

    >>> _runs(np.array([True, True, False, True]))
    ((0, 2), (3, 1))
    """
    edges = np.nonzero(np.diff(np.r_[False, chosen, False]))[0].reshape(-1, 2)
    return tuple((int(a), int(b - a)) for a, b in edges)
