"""What may be wrong: versions, the front end, and the state of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

PACKAGES = (
    "nbdyn", "torch", "tiledb", "numpy", "pandas", "scipy", "altair", "vl-convert-python", "anywidget", "ipywidgets",
    "ipykernel", "jupyterlab", "notebook",
)  # fmt: skip


def doctor(path: str | os.PathLike[str] | None = None) -> str:
    """Versions of what nbdyn stands on, likely causes of trouble in words, and what is known of a run.

    Args:
        path: a run to look at.

    >>> "python" in doctor()
    True
    """
    found = {name: _version(name) for name in PACKAGES}
    lines = [f"python {platform.python_version()} at {sys.executable}, {platform.platform()}"]
    lines += [f"{name} {version or 'is not installed here'}" for name, version in found.items()]
    lines += _advice(found)
    if path is not None:
        lines += _run_lines(os.fspath(path))
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _advice(found: dict[str, str | None]) -> list[str]:
    advice = []
    if found["jupyterlab"] is None and found["notebook"] is None:
        advice.append(
            "Jupyter is not in this environment. If it runs from another one, install anywidget there too, "
            "then reload the browser tab; otherwise widgets stay blank."
        )
    if found["anywidget"] is not None:
        advice.append("If a widget stays blank after an installation, reload the browser tab.")
    return advice


def _run_lines(path: str) -> list[str]:
    from nbdyn.errors import NbdynError
    from nbdyn.store import Store, lock, verify
    from nbdyn.store.backend import normalize

    try:
        store = Store(path)
    except NbdynError as error:
        return [str(error)]
    lines = [f"{store.name}: {store.status}, {store.steps_committed:,} steps committed"]
    if lock.is_held(normalize(path)):
        lines.append(f"it is being recorded by {lock.holder(normalize(path))}")
    findings = verify.verify(path)
    return [*lines, "it is whole" if not len(findings) else findings.to_string(index=False)]
