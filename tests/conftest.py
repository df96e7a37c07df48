"""Settings of every test: repeatable, and away from the user's own folders."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# jupyter_core asks to choose where it keeps its files; without this it warns, and warnings are errors here.
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

settings.register_profile("nbdyn", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("nbdyn")


@pytest.fixture(autouse=True)
def _no_user_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep IPython's history and profile out of the user's home."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.getbasetemp() / "ipython"))
