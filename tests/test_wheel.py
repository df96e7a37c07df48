"""The wheel holds what the package needs besides its modules: scripts and styles of the widgets, data, py.typed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path):
    # python -m hatchling, not pip: no network and no second environment
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("nbdyn-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("nbdyn/")}
    files = (path for path in (ROOT / "nbdyn").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"nbdyn/py.typed", "nbdyn/data/digits.npz"} <= packed
    assert any(name.startswith("nbdyn/widgets/static/") and name.endswith(".js") for name in packed)
    assert wheel.stat().st_size < 1_000_000
