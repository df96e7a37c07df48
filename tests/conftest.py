"""Settings of every test: repeatable, and away from the user's own folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from nbdyn.settings import options

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

# jupyter_core asks to choose where it keeps its files; without this it warns, and warnings are errors here.
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

settings.register_profile("nbdyn", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("nbdyn")


@pytest.fixture(autouse=True, scope="module")
def _settings_stay() -> Iterator[None]:
    """No module leaves a setting of this process behind for the tests that follow."""
    quiet = options.quiet
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else None
    yield
    assert options.quiet == quiet, "nbdyn.options.quiet was changed and not put back"
    assert threads is None or sys.modules["torch"].get_num_threads() == threads, "torch's threads were not put back"


@pytest.fixture(autouse=True)
def _no_user_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep IPython's history and profile out of the user's home."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.getbasetemp() / "ipython"))


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A shell with the magics, no history file, and no run open."""
    from IPython.core.interactiveshell import InteractiveShell

    from nbdyn import magics, run

    monkeypatch.setattr(run, "_current", None)
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    shell.history_manager.enabled = False
    magics.load_ipython_extension(shell)
    yield shell
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()
