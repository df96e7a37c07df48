"""Plans of `... approximately within 5%`: what can be sampled, which columns come, what the first sample reads."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from nbdyn.query.cell_plan import CellPlan
from nbdyn.query.evaluate import Array
from nbdyn.query.reads import Read
from nbdyn.query.reduce.targets import targets_of
from nbdyn.query.sampling import STRATA, Design, design
from nbdyn.query.source import Source
from nbdyn.query.tree import Group

SAMPLED = ("class", "epoch")
"""Members of visits that steps can be sampled for: each of them has many steps."""
ESTIMATED = ("sum", "mean", "norm", "count", "share", "path", "net")
"""Aggregates that come from totals of steps."""
FEW_STEPS = 32
"""With fewer steps the exact answer costs no more than a sample with an interval worth having."""
CLUSTER_SECONDS, WARM_SECONDS = 0.06, 0.003
"""What it costs to read a cluster of an array beside its bytes, from disk and from memory: measured on two cores."""
SUMS_BYTES = 512_000_000
"""Memory for the sums of all strata, about: where rows are many, strata are fewer."""


def approximated(plan: CellPlan, source: Source) -> CellPlan:
    """The plan of a statement with `approximately within`; others come back as they are.

    Raises:
        QueryError: if the measure or the members cannot be had from a sample of steps.
    """
    if plan.statement.within is None:
        return plan
    _check(plan, source)
    low, high = interval_columns(plan)
    place = plan.columns.index(str(plan.measure)) + 1
    columns = (*plan.columns[:place], low, high, *plan.columns[place:])
    reason, reads = _why_exact(plan, source), plan.reads
    if not reason:
        first = _first_reads(plan, source)
        whole = sum(read.cost for read in reads)
        if sum(read.cost for read in first) < whole:
            reads = first
        else:
            reason = f"to read all steps takes about {whole:.2g} s, and a sample no less"
    notes = (*plan.notes, f"exact: {reason}") if reason else plan.notes
    return replace(plan, columns=columns, reads=reads, notes=notes, exact=bool(reason))


def _check(plan: CellPlan, source: Source) -> None:
    measure = plan.measure
    bound = f"{100 * (plan.statement.within or 0):g}%"
    for kind in plan.visits:
        if kind not in SAMPLED:
            many = "batches" if kind == "batch" else f"{kind}s"
            raise source.error(
                f"an approximate answer comes from a sample of the steps, in which most {many} are missing; leave "
                f'"approximately within {bound}" out, or ask for classes, epochs or parameters.',
                measure.position,
            )
    if measure.aggregate not in ESTIMATED or measure.quantity in ("act", "err"):
        why = {"max": "a sample tells nothing of the largest cell that it missed", "var": "var is had exactly"}
        reason = why.get(measure.aggregate, f"{measure.quantity} is had exactly")
        raise source.error(
            f'{reason}: leave "approximately within {bound}" out, or ask by sum, mean, norm, count, share or path of '
            "g, grad, w or dw.",
            measure.position,
        )


def interval_columns(plan: CellPlan) -> tuple[str, str]:
    """The names of the interval's ends; `low` and `high` of `group` are the bounds of the group."""
    return ("value_low", "value_high") if isinstance(plan.statement, Group) else ("low", "high")


def _why_exact(plan: CellPlan, source: Source) -> str:
    """Why a sample is not worth while, whatever it costs; "" where it may be."""
    measure = plan.measure
    if plan.index is not None:
        return "the index has it"
    if plan.stop - plan.start < FEW_STEPS:
        return f"fewer than {FEW_STEPS} steps"
    if measure.aggregate == "net":
        return "of net dw a sample tells little, as steps cancel"
    if measure.quantity not in ("w", "dw") or plan.attributes:
        return ""
    stored = source.store.weights.steps
    rows = np.count_nonzero((stored >= plan.start) & (stored <= plan.stop))
    return "" if rows >= plan.stop - plan.start else "weights between snapshots are rebuilt one step after the other"


def seed_of(plan: CellPlan, source: Source) -> int:
    """The seed of a question: the run's name and the statement in its normal form decide it."""
    return zlib.crc32(f"{source.name}\n{plan.statement}".encode())


def design_of(plan: CellPlan, source: Source, steps: Array, rows: int) -> Design:
    """The strata of some steps, (N,) ascending; where epochs are members no stratum is in two of them.

    Args:
        plan: the plan.
        source: the run.
        steps: those to sample from.
        rows: members x targets of the answer, which say how much a stratum holds in memory.
    """
    epochs = source.index["epoch"].to_numpy()[np.minimum(steps, source.steps - 1)]
    by_epoch = "epoch" in plan.visits
    groups = epochs if by_epoch else np.zeros(len(steps), np.int64)
    each = 16 * rows // (len(np.unique(epochs)) if by_epoch else 1)
    return design(groups, seed_of(plan, source), most=max(2, min(STRATA, SUMS_BYTES // max(1, each))))


def _first_reads(plan: CellPlan, source: Source) -> tuple[Read, ...]:
    """The reads of the first sample: the table of visits whole, of everything else the steps drawn."""
    steps = np.arange(plan.start, plan.stop)
    rows = targets_of(plan.indices, plan.parameters, source.tensors).count * (10 if "class" in plan.visits else 1)
    drawn = design_of(plan, source, steps, rows)
    part, how = drawn.steps(0) / len(steps), f"; first sample: {drawn.steps(0):,} of {len(steps):,} steps"

    def sampled(read: Read) -> Read:
        if read.array == "visits":
            return read
        each = WARM_SECONDS if read.how.startswith("in memory") else CLUSTER_SECONDS
        seconds = read.cost * part + each * drawn.size(0)
        size = {"rows": round(read.rows * part), "bytes": round(read.bytes * part)}
        return replace(read, **size, seconds=seconds, how=read.how + how)

    return tuple(sampled(read) for read in plan.reads)
