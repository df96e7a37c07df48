"""The runs of a folder as a table, and the card of one run."""

from __future__ import annotations

import html
import os
from typing import Any

import pandas as pd

from nbdyn.errors import NbdynError
from nbdyn.settings import format_size
from nbdyn.store import Store, frames
from nbdyn.store.backend import basename, context, is_local, join, normalize, object_type, tiledb


def runs(folder: str | os.PathLike[str] = "runs") -> pd.DataFrame:
    """The runs of a folder, one row each: run, status, steps, epochs, loss (last), model, weights, size, problem.

    A damaged run is listed with its problem; folders that are no runs are left out.

    Raises:
        NbdynError: if the folder does not exist.
    """
    uri = normalize(folder)
    vfs = tiledb().VFS(ctx=context(uri))
    if not vfs.is_dir(uri):
        raise NbdynError(f"no folder {os.fspath(folder)}; give the folder that holds your runs.")
    rows = [_row_of(join(uri, basename(path))) for path in sorted(vfs.ls(uri)) if object_type(path) == "group"]
    columns = ["run", "status", "steps", "epochs", "loss", "model", "weights", "size", "problem"]
    return pd.DataFrame(rows, columns=columns)


def _row_of(uri: str) -> dict[str, Any]:
    try:
        store = Store(uri)
        last = frames.steps(store, max(0, store.steps_committed - 1))
    except NbdynError as error:
        return {"run": basename(uri), "status": "corrupt", "steps": 0, "problem": str(error)}
    return {
        "run": store.name,
        "status": store.status,
        "steps": store.steps_committed,
        "epochs": int(last["epoch"].iloc[-1]) + 1 if len(last) else 0,
        "loss": float(last["loss"].iloc[-1]) if len(last) else float("nan"),
        "model": store.config["model"],
        "weights": weights_words(store.config),
        "size": format_size(_disk_bytes(uri)),
        "problem": "",
    }


def _disk_bytes(uri: str) -> int:
    """Bytes of all files of a run."""
    if not is_local(uri):
        return int(tiledb().VFS(ctx=context(uri)).dir_size(uri))
    return sum(os.path.getsize(os.path.join(root, file)) for root, _, files in os.walk(uri) for file in files)


def weights_words(config: dict[str, Any]) -> str:
    """How often weights were recorded."""
    return "every step" if config["weights"] == "every" else f"every {config['every']} steps"


def card(store: Store) -> str:
    """What a notebook shows of a run: HTML, all text escaped."""
    steps = frames.steps(store, max(0, store.steps_committed - 1))
    last = steps.iloc[-1] if len(steps) else None
    rows = {
        "where": store.uri,
        "status": store.status,
        "steps": f"{store.steps_committed:,}" + ("" if last is None else f" in {int(last['epoch']) + 1} epochs"),
        "last loss": "" if last is None else f"{last['loss']:.4g}",
        "model": f"{store.config['model']}, {store.parameters:,} parameters",
        "optimizer": store.config["optimizer"]["name"],
        "weights": weights_words(store.config),
        "recorded": store.config["created"],
    }
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(key)}</th>"
        f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
        for key, value in rows.items()
    )
    return f"<div class='nbdyn-run'><b>{html.escape(store.name)}</b><table>{cells}</table></div>"
