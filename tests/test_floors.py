"""The rooms of nbdyn: imports go down only, and loading nbdyn loads nothing heavy and changes nothing of the user's."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nbdyn"

FLOORS = {
    "errors": 0, "schema": 0, "settings": 0, "datasets": 0, "cells": 0,
    "store": 1,
    "recorder": 2, "query": 2,
    "plots": 3, "thumbnails": 3,
    "statistics": 4,
    "analysis": 5,
    "parallel": 6,
    "widgets": 7,
    "magics": 8, "magic_options": 8, "magic_names": 8, "magic_completion": 8,
    "magic_hypothesis": 8, "hypotheses": 8,
    "accessor": 8, "asking": 8, "run": 8, "moment": 8, "recording": 8, "folder": 8, "demo": 8, "doctor": 8,
    "__main__": 8,
}  # fmt: skip
"""The floor of each room (a folder or a file of nbdyn). `__init__` is the door: it stands outside."""

SINGLE_FILES = {0, 8}
"""On these floors the rooms are single files, which may also import each other, in no circle."""


def modules() -> Iterator[tuple[str, Path]]:
    """Each module of nbdyn but the door: dotted name below nbdyn, file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield ".".join(part for part in parts if part != "__init__" or len(parts) == 1), path


NAMES = {name for name, _ in modules()}


def imported(name: str, path: Path) -> set[str]:
    """The modules of nbdyn that a module imports anywhere: at the top, in functions, for type checkers."""
    package = ["nbdyn", *name.split(".")] if path.stem == "__init__" else ["nbdyn", *name.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], node.module or ""] if node.level else [])
            source = base.rstrip(".") or node.module or ""
            found |= {f"{source}.{alias.name}" for alias in node.names}
    inside = {dotted.removeprefix("nbdyn.") for dotted in found if dotted.startswith("nbdyn.")}
    # "from nbdyn.store import Store" names a thing inside the module store: cut it back to the module
    return {dotted if dotted in NAMES else dotted.rpartition(".")[0] or dotted for dotted in inside}


def room(dotted: str) -> str:
    """The room of a module: the first part of its name."""
    return dotted.partition(".")[0]


def test_every_room_has_a_floor():
    assert {room(name) for name in NAMES} <= set(FLOORS)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_go_down_only(name: str, path: Path):
    here, floor = room(name), FLOORS[room(name)]
    for target in imported(name, path) - {"__version__"}:
        there = room(target)
        assert there in FLOORS, f"{name} imports {target}: give it a floor, or import it from its own module"
        sideways = floor == FLOORS[there] and floor in SINGLE_FILES
        assert there == here or FLOORS[there] < floor or sideways, f"{name} (floor {floor}) imports {target} upwards"


def test_single_files_import_each_other_in_no_circle():
    files = {name: path for name, path in modules() if FLOORS[room(name)] in SINGLE_FILES}
    graph = {name: {target for target in imported(name, path) if target in files} for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_check_sees_imports_everywhere(tmp_path: Path):
    module = tmp_path / "x.py"
    module.write_text(
        textwrap.dedent("""
        import nbdyn.settings
        from .. import errors
        from ..store import Store
        if TYPE_CHECKING:
            from nbdyn.store.frames import steps
        def f():
            from nbdyn import schema, __version__
        """)
    )
    expected = {"settings", "errors", "store", "store.frames", "schema", "__version__"}
    assert imported("query.x", module) == expected


# Loading, watched from a fresh process ---------------------------------------------------------------------------

WATCH = """
import signal, sys
import numpy as np, pandas as pd
def user_settings():
    options = {name: pd.get_option(name) for name in ("display.max_rows", "display.max_columns", "display.precision")}
    return np.get_printoptions(), signal.getsignal(signal.SIGINT), options
before = user_settings()
"""
SHELL = """
import nbdyn
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "nbdyn")
"""


def loaded_by(code: str) -> set[str]:
    """The modules in `sys.modules` after running code in a fresh interpreter; its assertions must hold."""
    script = textwrap.dedent(code) + "\nimport sys; print('\\nLOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


HEAVY = {"torch", "dask", "lightning", "transformers", "vl_convert", "sklearn"}


def test_import_is_light():
    loaded = loaded_by("import nbdyn; dir(nbdyn)")
    assert not loaded & (HEAVY | {"tiledb", "pandas", "altair", "anywidget", "IPython"})


@pytest.mark.parametrize("module", ["accessor", "magics", "widgets", "store", "query"])
def test_what_only_reads_needs_no_torch(module: str):
    assert not loaded_by(f"import nbdyn.{module}") & HEAVY


def test_load_ext_is_light_and_changes_no_settings():
    loaded = loaded_by(WATCH + SHELL + "assert user_settings() == before, (before, user_settings())")
    assert "nbdyn.magics" in loaded
    assert not loaded & (HEAVY | {"tiledb"})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    import torch

    import nbdyn

    path = tmp_path_factory.mktemp("floors") / "run"
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = torch.nn.CrossEntropyLoss()
    data = torch.utils.data.TensorDataset(torch.ones(6, 2), torch.tensor([0, 1] * 3))
    with nbdyn.record(str(path), model, optimizer, loss_fn) as recorder:
        for x, y in recorder.watch(torch.utils.data.DataLoader(data, batch_size=2)):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    return path


def test_an_opened_run_needs_no_torch_and_changes_no_settings(recorded: Path):
    opened = f"""
        run = nbdyn.open({str(recorded)!r})
        assert len(run.steps) == 3 and len(run.weights.steps) >= 1
        assert user_settings() == before, (before, user_settings())
    """
    loaded = loaded_by(WATCH + SHELL + textwrap.dedent(opened))
    assert "tiledb" in loaded
    assert not loaded & HEAVY
    assert "nbdyn.query.execute" not in loaded, "the language loads when something is asked"


def test_ctrl_c_stays_pythons(tmp_path: Path):
    """TileDB's default context, made wherever none is given, takes SIGINT: what records and reads makes none."""
    code = f"""
        import tiledb, torch
        import nbdyn
        from nbdyn.__main__ import main
        model = torch.nn.Linear(2, 2)
        optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.CrossEntropyLoss()
        data = torch.utils.data.TensorDataset(torch.ones(6, 2), torch.tensor([0, 1] * 3))
        path = {str(tmp_path / "run")!r}
        with nbdyn.record(path, model, optimizer, loss_fn, weights="every") as rec:
            for x, y in rec.watch(torch.utils.data.DataLoader(data, batch_size=2)):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
            rec.note("a note")
        run = nbdyn.open(path)
        assert len(run.gradients[0, "weight"].frame()) and len(run.gradients[:].total())
        assert len(run.steps) == 3 and len(run.visits) == 6 and len(run.notes) and len(run.weights["all"]) == 4
        assert len(run.query("last 5 samples before weight[0,0] becomes 0 within 9")) >= 0
        assert [main([command, path]) for command in ("verify", "compact", "gc")] == [0, 0, 0]
        assert tiledb.ctx._ctx_var.get(None) is None
    """
    loaded_by(code)
