"""The result of a fit put together: distance, goodness of fit, alternatives, warnings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nbdyn.statistics.heavy_tail.alternatives import Alternative, ranking
from nbdyn.statistics.heavy_tail.family import Family, distances, goodness
from nbdyn.statistics.heavy_tail.result import Estimate, TailFit
from nbdyn.statistics.heavy_tail.sample import Sample, remarks


def assembled(
    kind: Family,
    method: str,
    sample: Sample,
    ordered: np.ndarray,
    estimates: Mapping[str, Estimate],
    others: Callable[[np.ndarray, str], Sequence[Alternative]],
    notes: Sequence[str] = (),
    *,
    block: int | None,
    bootstrap: int,
    seed: int,
) -> TailFit:
    """A fit of all values.

    Args:
        kind: the family; it is fitted once more.
        method: how, with the source.
        sample: the values in their order.
        ordered: sorted upwards.
        estimates: with their intervals.
        others: ordered values and the family's name -> the alternatives.
        notes: warnings of this family.
        block: of the bootstrap; for the warnings.
        bootstrap: replicates of the goodness of fit.
        seed: of its random numbers.
    """
    found = kind.fit(ordered[None])
    ks = float(distances(ordered[None], kind, found)[0])
    p, null = goodness(kind, found[0], ks, len(ordered), bootstrap, seed)
    law = kind.law(found[0])
    table, laws = ranking(ordered, law, found.shape[1], others(ordered, kind.name))
    return TailFit(
        family=kind.name, method=method, estimates=estimates, distribution=law, values=ordered, xmin=None,
        n_tail=len(ordered), zeros=sample.zeros, missing=sample.missing, ks=ks, p=p, null=null, alternatives=table,
        warnings=(*remarks(sample, block), *notes), others=laws,
    )  # fmt: skip
