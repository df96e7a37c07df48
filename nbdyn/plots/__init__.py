"""Pictures: charts that show themselves without network, panels over steps, and a picture for each kind of answer."""

from __future__ import annotations

from nbdyn.plots.answers import picture
from nbdyn.plots.offline import (
    OfflineChart,
    OfflineConcatChart,
    OfflineFacetChart,
    OfflineHConcatChart,
    OfflineLayerChart,
    OfflineRepeatChart,
    OfflineVConcatChart,
    offline,
    png_size,
    to_png,
)
from nbdyn.plots.panels import (
    ALARM,
    AXIS,
    COLORS,
    LOGARITHMIC,
    MAX_ROWS,
    MUTED,
    decimate,
    heading,
    lines,
    numbers,
    panel,
    show_number,
    stack,
    titled,
)

__all__ = [
    "ALARM",
    "AXIS",
    "COLORS",
    "LOGARITHMIC",
    "MAX_ROWS",
    "MUTED",
    "OfflineChart",
    "OfflineConcatChart",
    "OfflineFacetChart",
    "OfflineHConcatChart",
    "OfflineLayerChart",
    "OfflineRepeatChart",
    "OfflineVConcatChart",
    "decimate",
    "heading",
    "lines",
    "numbers",
    "offline",
    "panel",
    "picture",
    "png_size",
    "show_number",
    "stack",
    "titled",
    "to_png",
]
