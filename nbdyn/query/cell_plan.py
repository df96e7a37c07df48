"""Plans of `top`, `group`, `show MEASURE of` and events over cells: members, targets, and where cells come from."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nbdyn.errors import NotRecorded
from nbdyn.query.evaluate import Array
from nbdyn.query.layers import Layer, layers_of, read_sites
from nbdyn.query.reads import Read
from nbdyn.query.reduce import linear
from nbdyn.query.reduce.linear import FEW
from nbdyn.query.reduce.measures import EXCEED, MAX, MAX_ABS, operations
from nbdyn.query.source import Source
from nbdyn.query.tree import Expression, Group, Measure, Measured, Selector, Show, Top
from nbdyn.query.words import OF_UNITS
from nbdyn.store.index.read import Index, open_index
from nbdyn.store.names import ascending

OF_VISITS = ("sample", "class", "batch", "epoch", "token", "position")
"""Members that are groups of visits; the others are groups of parameters."""
OF_PARAMETERS = ("weight", "unit", "tensor", "layer")
OF_STEPS = ("batch", "epoch")
"""Members that have cells of grad, w and dw, which belong to steps."""
UNIT_MEMBER = {"step": "batch"}

READ_SPEED, PRODUCT_SPEED, CELL_SPEED = 300e6, 4e10, 2e8
"""Bytes a second from disk, multiplications a second in a product, cells a second one by one: measured on two cores;
what `explain` and `estimate` reckon with."""


@dataclass(frozen=True)
class CellPlan:
    """A question about cells, bound to a run.

    Attributes:
        statement: Top, Group, or Show of one Measured.
        measure: what is made of the cells.
        visits: words of OF_VISITS by which visits are told apart, in the order of the result's columns.
        parameters: word of OF_PARAMETERS by which parameters are, "" for none.
        indices: global parameter indices, (k,) ascending; of act and err numbers of units.
        where: a bound condition on visits.
        start, stop: steps, half-open.
        index: the run's index, where it answers the question; its field.
        field: field of the index.
        reads: what is read.
        columns: of the result.
        notes: what is to be known.
        layers: of act and err: whose units these are.
        exact: whether a statement with `approximately` is answered exactly, because that costs less.
    """

    statement: Top | Group | Show
    measure: Measure
    visits: tuple[str, ...]
    parameters: str
    indices: Array
    where: Expression | None
    start: int
    stop: int
    index: Index | None
    field: str
    reads: tuple[Read, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    exact: bool = False

    @property
    def attributes(self) -> bool:
        """Whether a displacement is divided among members of visits."""
        return self.measure.aggregate in ("net", "path") and any(kind not in OF_STEPS for kind in self.visits)


def plan_cells(statement: Top | Group | Show, source: Source) -> CellPlan:
    """The plan of a statement about cells.

    Raises:
        QueryError: if the measure and the members do not go together.
        NotRecorded: if the run has no such cells.
    """
    measure, selector, kinds = _asked(statement)
    visits = tuple(kind for kind in kinds if kind in OF_VISITS)
    within = tuple(kind for kind in kinds if kind in OF_PARAMETERS)
    _check(statement, measure, visits, within, source)
    layers, without = (), ""
    if measure.quantity in OF_UNITS:
        layers, without = layers_of(measure.quantity, selector or Selector("all"), source)
        indices = np.arange(sum(layer.units for layer in layers))
    else:
        indices = ascending(source.select(selector or Selector("all")).indices)
    if (not isinstance(statement, Show) and selector is None) or (selector is not None and selector.text == "all"):
        every = len(indices)
        indices = with_factors(indices, measure.quantity, source)
        if len(indices) < every:
            without = f"{every - len(indices):,} parameters left out: of them no samples' gradients are recorded"
    rows = source.steps + (measure.quantity == "w")  # the final weights follow the last step
    start, stop, note = source.range(statement.scope, rows=rows)
    where = None if statement.where is None else source.bind(statement.where, "visits", condition=True)
    finest = min(within, key=OF_PARAMETERS.index, default="")
    plan = CellPlan(statement, measure, visits, finest, indices, where, start, stop, None, "", (),
                    _columns(statement, measure, visits, within), tuple(filter(None, (note, without))),
                    layers)  # fmt: skip
    plan = _with_index(plan, source)
    return replace(plan, reads=_reads(plan, source))


def _asked(statement: Top | Group | Show) -> tuple[Measure, Selector | None, tuple[str, ...]]:
    """Measure, parameters and members of a statement, those of `per` first."""
    match statement:
        case Top(_, _, what, per, selector, Measure() as measure):
            return measure, selector, (per, what) if per is not None else (what,)
        case Group(what, selector, Measure() as measure):
            return measure, selector, (what,)
        case Show((Measured(measure, selector),), per):
            return measure, selector, tuple(UNIT_MEMBER.get(unit, unit) for unit in per)
        case _:
            raise TypeError(f"{statement} is no question about cells")


def _check(
    statement: Top | Group | Show, measure: Measure, visits: tuple[str, ...], within: tuple[str, ...], source: Source
) -> None:
    position = measure.position
    if measure.quantity in OF_UNITS:
        _check_units(measure, visits, within, source)
        return
    tokens = {"token", "position"} & set(visits)
    if tokens and (len(visits) > 1 or measure.quantity != "g"):
        raise source.error(f"{tokens.pop()}s stand alone, and are of g.", position)
    if tokens and measure.aggregate in ("mean", "var", "share"):
        raise source.error(f"{tokens.pop()}s are ranked by sum, norm, max or count of g.", position)
    if measure.aggregate in ("net", "path"):
        return
    alone = [kind for kind in visits if kind not in OF_STEPS]
    if measure.quantity != "g" and alone:
        many = f"{alone[0]}s" if alone[0] != "class" else "classes"
        hint = "net dw or path dw" if measure.quantity == "dw" else "sum |g|"
        raise source.error(
            f"{measure.quantity} belongs to whole batches; what {many} have of their own is g: by {hint}.", position
        )
    if measure.quantity != "g" and statement.where is not None:
        raise source.error(f"where speaks of visits, and {measure.quantity} belongs to whole batches.", position)


def _check_units(measure: Measure, visits: tuple[str, ...], within: tuple[str, ...], source: Source) -> None:
    quantity, position = measure.quantity, measure.position
    for kind in ("weight", "tensor"):
        if kind in within:
            message = f"{quantity} has one value a unit of a layer, not a {kind}: ask for units or layers."
            raise source.error(message, position)
    for kind in ("token", "position"):
        if kind in visits:
            message = f"{kind}s are of g; the places of {quantity} come one by one: show {quantity} of fc1."
            raise source.error(message, position)
    if explodes(measure):
        message = f"explode is a threshold of gradients; compare {quantity} with a number: share(|{quantity}| > 1e-3)."
        raise source.error(message, position)


def with_factors(indices: Array, quantity: str, source: Source) -> Array:
    """Of all parameters those of which the run has samples' gradients, where these are asked for.

    Raises:
        NotRecorded: if there are none.
    """
    stored = len(source.store.weights.steps) == source.steps + 1
    if quantity in ("w", "act", "err") or (quantity == "dw" and stored):
        return indices
    factors = source.store.factors
    held = np.zeros(source.parameters, dtype=bool)
    for site in factors.sites:
        for first, size in site.runs:
            held[first : first + size] = True
    for tensor in source.tensors:
        if tensor["name"] in factors.batch_only:
            held[tensor["first"] : tensor["first"] + tensor["size"]] = False
    if not held.any():
        raise NotRecorded(
            f"{source.name} holds no per-sample gradients, from which {quantity} is had; record with "
            "nbdyn.record(path, model, optimizer, loss_fn)."
        )
    return indices[held[indices]]


def _columns(
    statement: Top | Group | Show, measure: Measure, visits: tuple[str, ...], within: tuple[str, ...]
) -> tuple[str, ...]:
    of_visits = {"sample": ("sample",), "class": ("class",), "batch": ("step",), "epoch": ("epoch",),
                 "token": ("sample", "token"), "position": ("token",)}  # fmt: skip
    of_parameters = {"weight": ("parameter", "weight"), "unit": ("layer", "unit"), "tensor": ("tensor",),
                     "layer": ("layer",)}  # fmt: skip
    first = [name for kind in within for name in of_parameters[kind]]
    then = [name for kind in visits for name in of_visits[kind]]
    names = tuple(dict.fromkeys([*first, *then]))
    if isinstance(statement, Top):
        per = statement.per
        own = of_visits.get(per or "", of_parameters.get(per or "", ()))
        rest = tuple(name for name in names if name not in own)
        return (*own, "rank", *rest, str(measure))
    return (*names, str(measure), "group", "low", "high") if isinstance(statement, Group) else (*names, str(measure))


def explodes(measure: Measure) -> bool:
    """Whether the threshold of a share is the layer's own."""
    return measure.condition is not None and measure.condition[1] == "explode"


# The index ---------------------------------------------------------------------------------------------------------


def _with_index(plan: CellPlan, source: Source) -> CellPlan:
    """The plan with the index, where that has what is asked: sums over whole epochs, by class or not."""
    names = operations(plan.measure)
    measure = plan.measure
    usable = (
        measure.quantity in ("g", "grad")
        and plan.where is None
        and len(names) == 1
        and measure.aggregate in ("sum", "norm")
        and plan.visits in ((), ("class",), ("epoch",))
    )
    epochs = _whole_epochs(plan, source) if usable else None
    index = open_index(source.store) if epochs is not None else None
    if index is None or epochs is None:
        return plan
    name = {"sum": "sum", "sum_abs": "sum_abs", "sum_sq": "sum_sq"}[names[0]]
    field = f"{name}_{measure.quantity}"
    if measure.quantity == "g" and plan.visits == ("class",):
        found = index.classes(field, *epochs, indices=plan.indices[:1]) if field in ("sum_g", "sum_abs_g") else None
    else:
        found = index.epochs(field, *epochs, indices=plan.indices[:1]) if plan.visits != ("class",) else None
    return plan if found is None or np.isnan(found).any() else replace(plan, index=index, field=field)


def _whole_epochs(plan: CellPlan, source: Source) -> tuple[int, int] | None:
    """First and last epoch of the plan's steps, where they are all of these epochs' steps."""
    epochs = source.index["epoch"].to_numpy()
    if plan.stop <= plan.start:
        return None
    first, last = int(epochs[plan.start]), int(epochs[plan.stop - 1])
    whole = np.flatnonzero((epochs >= first) & (epochs <= last))
    return (first, last) if whole[0] == plan.start and whole[-1] + 1 == plan.stop else None


# What it costs -----------------------------------------------------------------------------------------------------


def _reads(plan: CellPlan, source: Source) -> tuple[Read, ...]:
    """What is read, with bytes before compression and the seconds that it may take."""
    count = len(plan.indices)
    if plan.index is not None:
        epochs = _whole_epochs(plan, source) or (0, 0)
        rows = epochs[1] - epochs[0] + 1
        if plan.visits == ("class",):
            rows *= len(np.asarray(plan.index.classes(plan.field, *epochs, indices=plan.indices[:1])))
        nbytes = 4 * rows * count
        name = "summary/classes" if plan.visits == ("class",) else "summary/epochs"
        return (Read(source.name, name, (plan.field,), plan.start, plan.stop, rows * count, nbytes, "index",
                     0.01 + nbytes / READ_SPEED),)  # fmt: skip
    visits = int(source.index["batch_size"].to_numpy()[plan.start : plan.stop].sum())
    table = Read(source.name, "visits", ("step", "position", "sample", "class"), plan.start, plan.stop, visits,
                 18 * visits, "stored", 0.01 + visits * 5e-7)  # fmt: skip
    if plan.measure.quantity in ("w", "dw") and not plan.attributes:
        return (_weights_read(plan, source),)
    if plan.layers:
        sites = [number for layer in plan.layers for number in layer.sites]
        return (table, *read_sites(sites, source, plan.start, plan.stop))
    return (table, *_factor_reads(plan, source, visits))


def _weights_read(plan: CellPlan, source: Source) -> Read:
    steps = source.store.weights.steps
    stored = int(np.count_nonzero((steps >= plan.start) & (steps <= plan.stop)))
    wanted = plan.stop - plan.start + 1
    how = "stored" if stored == wanted else f"{stored} rows stored, {wanted - stored} rebuilt from factors"
    nbytes = 4 * wanted * len(plan.indices)
    seconds = nbytes / READ_SPEED + (wanted - stored) * 1e-4
    return Read(source.name, "weights", ("value",), plan.start, plan.stop + 1, wanted * len(plan.indices), nbytes, how,
                0.01 + seconds)  # fmt: skip


def _factor_reads(plan: CellPlan, source: Source, visits: int) -> list[Read]:
    """A row for each site: its bytes, and how its cells are had."""
    factors, reads = source.store.factors, []
    exact = EXCEED not in operations(plan.measure)
    tokens = bool({"token", "position"} & set(plan.visits))
    parts, _ = linear.divided(source.store, plan.indices, plan.start, plan.stop, tokens=tokens)
    by_site = {part.site: part for part in parts} if exact else {}
    few, statement = len(plan.indices) <= FEW, plan.statement
    cell_by_cell = plan.parameters == "weight" and {MAX, MAX_ABS} & set(operations(plan.measure))
    lists = isinstance(statement, Top) and (statement.what, plan.parameters) == ("sample", "weight")
    for number in factors.sites_of(plan.indices):
        site, part = factors.sites[number], by_site.get(number)
        nbytes = factors.nbytes(number, plan.start, plan.stop)
        warm = factors.warm.holds(number, plan.start, plan.stop)
        if part is not None:
            used = len(part.inputs) + len(np.union1d(part.units, part.biases))
            nbytes = int(nbytes * min(1.0, used / sum(site.shape)))
        product = part is not None and not few and (lists or not cell_by_cell)
        work = visits * min(site.size, len(plan.indices)) / (PRODUCT_SPEED if product else CELL_SPEED)
        how = "threshold algorithm" if product and lists else "products" if product else "cell by cell"
        reads.append(Read(source.name, f"factors of {site.name}", ("a", "d"), plan.start, plan.stop, visits, nbytes,
                          f"{'in memory' if warm else 'factors'}; {how}",
                          (0.0 if warm else nbytes / READ_SPEED) + work))  # fmt: skip
    return reads
