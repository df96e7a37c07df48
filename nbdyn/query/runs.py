"""Runs by name: a path, or a neighbour in the folder of the run that is asked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nbdyn.errors import NbdynError, UnknownName, did_you_mean
from nbdyn.store.backend import basename, context, is_local, join, object_type, parent, tiledb

if TYPE_CHECKING:
    from nbdyn.store import Store


def siblings(uri: str) -> list[str]:
    """Names of the runs in the folder of a run, itself too."""
    folder = parent(uri)
    if is_local(folder):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if os.path.isdir(folder) else []
    else:
        names = sorted(basename(entry) for entry in tiledb().VFS(ctx=context(folder)).ls(folder))
    return [name for name in names if _is_run(join(folder, name))]


def _is_run(uri: str) -> bool:
    try:
        return object_type(uri) == "group"
    except NbdynError:
        return False  # a folder that cannot be read is no run to offer; opening it by name says what is wrong


def open_run(name: str, store: Store) -> Store:
    """The run of a name: the asked one itself, a path, or else its neighbour.

    Args:
        name: a name in the folder of `store`, a path, or a URI.
        store: the run that is asked.

    Raises:
        UnknownName: with the nearest neighbour.
        CorruptRun: if it is there but damaged.
    """
    from nbdyn.store import Store

    if name in (store.name, store.uri):
        return store
    neighbour = join(parent(store.uri), name)
    for place in (name, neighbour):
        if place in store.neighbours:
            store.neighbours[place].refresh()
            return store.neighbours[place]
        if _is_run(place):
            store.neighbours[place] = Store(place)
            return store.neighbours[place]
    known = [other for other in siblings(store.uri) if other != store.name]
    raise UnknownName(f'no run "{name}" here or beside {store.name}; {did_you_mean(name, [store.name, *known])}')
