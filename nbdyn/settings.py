"""What a user may set, how sizes are read and printed, and how nbdyn speaks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbdyn.errors import NbdynError

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass
class Options:
    """Settings of this process: `nbdyn.options.memory = "1 GB"`."""

    memory: str = "256 MB"
    """Recorded data waiting for the writer, at most; when it is reached, training waits (nothing is dropped)."""
    cache: str = "1 GB"
    """Per-sample factors that questions keep in memory, of each open run (never over an eighth of the machine's)."""
    static_png: bool = True
    """Whether widgets and plots carry a PNG, for GitHub and other viewers that run no widgets."""
    quiet: bool = False
    """Whether the one-line announcements of the recorder are left out."""


options = Options()


def say(text: str) -> None:
    """Print one line to the user, unless `nbdyn.options.quiet`."""
    if not options.quiet:
        print(f"nbdyn: {text}", flush=True)


def parse_size(text: str | int) -> int:
    """Bytes in a size such as "20 GB" (decimal units); an int is bytes already.

    Raises:
        NbdynError: if the text is no size.

    >>> parse_size("20 GB")
    20000000000
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?b)\s*", str(text).lower())
    if match is None or float(match[1]) <= 0:
        raise NbdynError(f'{text!r} is no size; write a number and a unit, such as "20 GB".')
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(n_bytes: float) -> str:
    """A size for people, in decimal units.

    >>> format_size(341_240)
    '341 KB'
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= size:
            value = n_bytes / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{n_bytes:.0f} B"
