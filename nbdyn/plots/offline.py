"""Altair charts that show themselves as a picture without network."""

from __future__ import annotations

import io
import zlib
from typing import Any

import altair as alt

from nbdyn.settings import options

_FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"


class _Offline:
    """What the classes below add to altair's: the picture, and operators that give charts of the same kind."""

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
        """A PNG (drawn twice as fine as it is shown) and a line of text.

        A renderer that the user chose, such as `alt.renderers.enable("jupyter", offline=True)`, is left to its work.
        """
        if alt.renderers.active != "default" or not options.static_png:
            return super()._repr_mimebundle_(*args, **kwargs)  # type: ignore[misc]
        picture = to_png(self)
        return {"image/png": picture, "text/plain": f"altair {type(self).__name__}"}, {"image/png": png_size(picture)}

    def __add__(self, other: Any) -> Any:
        return offline(super().__add__(other))  # type: ignore[misc]

    def __and__(self, other: Any) -> Any:
        return offline(super().__and__(other))  # type: ignore[misc]

    def __or__(self, other: Any) -> Any:
        return offline(super().__or__(other))  # type: ignore[misc]

    def facet(self, *args: Any, **kwargs: Any) -> Any:
        """As altair's, the result drawn without network too."""
        return offline(super().facet(*args, **kwargs))  # type: ignore[misc]


class OfflineChart(_Offline, alt.Chart):
    """An `altair.Chart` shown without network."""


class OfflineLayerChart(_Offline, alt.LayerChart):
    """An `altair.LayerChart` shown without network."""


class OfflineVConcatChart(_Offline, alt.VConcatChart):
    """An `altair.VConcatChart` shown without network."""


class OfflineHConcatChart(_Offline, alt.HConcatChart):
    """An `altair.HConcatChart` shown without network."""


class OfflineConcatChart(_Offline, alt.ConcatChart):
    """An `altair.ConcatChart` shown without network."""


class OfflineFacetChart(_Offline, alt.FacetChart):
    """An `altair.FacetChart` shown without network."""


class OfflineRepeatChart(_Offline, alt.RepeatChart):
    """An `altair.RepeatChart` shown without network."""


_OFFLINE = {cls.__mro__[2]: cls for cls in _Offline.__subclasses__()}


def offline(chart: Any) -> Any:
    """The same chart, drawn as a PNG without network when a notebook shows it.

    It stays an altair chart: `.properties`, `.interactive`, `.save`, `.to_dict`, `&`, `|` and `+` work as ever. The
    user's global `alt.renderers` is neither changed nor overruled: once one is chosen, the chart is shown by it.
    Drawing takes 0.7 s the first time, then some 30 ms.

    >>> chart = offline(alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(x="x:Q"))
    >>> sorted((chart & chart)._repr_mimebundle_()[0])
    ['image/png', 'text/plain']
    """
    if isinstance(chart, _Offline):
        return chart
    if type(chart) not in _OFFLINE:
        raise TypeError(f"offline() takes an altair chart, not {type(chart).__name__}.")
    twin = chart.copy(deep=False)
    # altair's own __setattr__ writes into the specification, so the class is set past it.
    object.__setattr__(twin, "__class__", _OFFLINE[type(chart)])
    return twin


def to_png(chart: Any) -> bytes:
    """The chart as the bytes of a PNG file, two pixels a point, drawn by vl-convert without a browser."""
    buffer = io.BytesIO()
    if chart._get("config") is alt.Undefined:
        # Set here and not on the chart: altair refuses to place charts that have a config beside others.
        chart = chart.configure(font=_FONT, background="white", padding=14)
    chart.save(buffer, format="png", scale_factor=2)
    return _squeeze(buffer.getvalue())


def _squeeze(picture: bytes) -> bytes:
    """The same PNG, compressed harder: pictures lie in notebooks, and vl-convert's are 2.4 times as large (0.1 s)."""
    kept, pixels, at = [], b"", 8
    while at < len(picture):
        end = at + 12 + int.from_bytes(picture[at : at + 4], "big")  # length, type, data, checksum
        if picture[at + 4 : at + 8] == b"IDAT":
            pixels += picture[at + 8 : end - 4]
        else:
            kept.append(picture[at:end])
        at = end
    body = b"IDAT" + zlib.compress(zlib.decompress(pixels), 9)
    data = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return picture[:8] + b"".join([*kept[:-1], data, kept[-1]])


def png_size(picture: bytes) -> dict[str, int]:
    """Width and height in points at which a picture of `to_png` should be shown, read from its header."""
    return {
        "width": int.from_bytes(picture[16:20], "big") // 2,
        "height": int.from_bytes(picture[20:24], "big") // 2,
    }
