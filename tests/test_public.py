"""The public door: every name is there, documented, and what the README and CI run is the same."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import nbdyn

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", nbdyn.__all__)
def test_every_public_name_is_there_and_documented(name: str):
    value = getattr(nbdyn, name)
    assert (value.__doc__ or "").strip(), f"nbdyn.{name} has no docstring"
    assert name in dir(nbdyn)


def test_all_names_its_homes_and_nothing_else():
    assert set(nbdyn.__all__) == set(nbdyn._HOMES)
    assert sorted(nbdyn.__all__) == nbdyn.__all__


def test_editors_see_the_public_names():
    """The lazy names are also imported under TYPE_CHECKING, from the homes that the table gives."""
    tree = ast.parse((ROOT / "nbdyn" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names if alias.asname}
    assert seen == nbdyn._HOMES


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known():
    with pytest.raises(AttributeError, match=r"has no attribute 'reccord'; it has .*record"):
        nbdyn.reccord  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def undocumented(path: Path) -> list[str]:
    """The public functions, classes and methods of a file that have no docstring."""
    missing: list[str] = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name[0] != "_":
                if not ast.get_docstring(node):
                    missing.append(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    tree = ast.parse(path.read_text(encoding="utf-8"))
    visit(tree.body, "")
    return missing if ast.get_docstring(tree) else ["the module", *missing]


def test_everything_public_has_a_docstring():
    files = sorted((ROOT / "nbdyn").rglob("*.py"))
    without = {str(path.relative_to(ROOT)): undocumented(path) for path in files}
    assert not {path: names for path, names in without.items() if names}


def test_version_is_the_installed_one():
    assert importlib.metadata.version("nbdyn") == nbdyn.__version__


def test_python_m_nbdyn_helps():
    done = subprocess.run([sys.executable, "-m", "nbdyn", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "demo" in done.stdout, done.stderr


def test_the_readme_gives_the_command_that_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    line = next(line for line in script.splitlines() if line.startswith("test_command="))
    (command,) = shlex.split(line.removeprefix("test_command="))
    assert command in (ROOT / "README.md").read_text()


def pins() -> dict[str, str]:
    """The versions in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {name.lower(): version for name, _, version in (line.partition("==") for line in lines) if version}


def test_constraints_pin_every_dependency():
    """One version, without local part, for all that nbdyn and its extras name."""
    named = {re.match(r"[\w-]+", text)[0].lower() for text in importlib.metadata.requires("nbdyn") or []}
    assert named <= set(pins())
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins().values())


def test_binder_uses_the_same_versions():
    environment = (ROOT / "binder" / "environment.yml").read_text()
    same = dict(re.findall(r"- ([\w-]+)==(\S+)", environment))
    assert same and same == {name: pins()[name] for name in same}
