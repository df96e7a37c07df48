"""Where a frame came from, as a small dict of strings that travels in `DataFrame.attrs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbdyn.schema import PROVENANCE

if TYPE_CHECKING:
    import pandas as pd

    from nbdyn.store.store import Store


def package_version() -> str:
    """The version of nbdyn."""
    import nbdyn

    return nbdyn.__version__


def with_provenance(frame: pd.DataFrame, store: Store, what: str, **more: str) -> pd.DataFrame:
    """The frame itself, its `attrs["nbdyn"]` set: run, uri, what, steps committed, version, and `more`."""
    frame.attrs[PROVENANCE] = {
        "run": store.name,
        "uri": store.uri,
        "what": what,
        "steps": f"0..{store.steps_committed - 1}" if store.steps_committed else "none",
        "version": package_version(),
    } | more
    return frame
