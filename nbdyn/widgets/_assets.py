"""Joins `static/core.js` and one widget's file into the single module that anywidget needs, without a build step."""

from __future__ import annotations

import re
from pathlib import Path

STATIC = Path(__file__).parent / "static"
_CORE_IMPORT = re.compile(r'^import \{[^}]*\} from "\./core\.js";\n', re.MULTILINE)
_CORE_EXPORT = re.compile(r"^export (?=(?:function|const) )", re.MULTILINE)


def join(name: str) -> str:
    """The source of one widget as one ES module: core.js without its exports, then the widget without its import.

    >>> module = join("cockpit.js")
    >>> module.count("export "), "import {" in module
    (1, False)
    """
    core = _CORE_EXPORT.sub("", (STATIC / "core.js").read_text(encoding="utf-8"))
    return core + _CORE_IMPORT.sub("", (STATIC / name).read_text(encoding="utf-8"))


def style() -> str:
    """The style sheet that all widgets share; every rule is confined to `.nbdyn`."""
    return (STATIC / "nbdyn.css").read_text(encoding="utf-8")
