"""What all widgets of nbdyn share: a strict constructor, a static picture beside the live view, an error strip."""

from __future__ import annotations

import threading
import uuid
from typing import Any, ClassVar

import anywidget
import traitlets
from IPython.display import display, update_display

from nbdyn.errors import did_you_mean
from nbdyn.plots import png_size, to_png
from nbdyn.settings import options
from nbdyn.widgets import _assets


class Widget(anywidget.AnyWidget):
    """Base of the widgets: subclasses give `_esm`, `chart()` and `_caption()`.

    Args:
        **state: traits of the subclass.

    Raises:
        TypeError: if a keyword is unknown (ipywidgets itself would only warn), naming the nearest known one.
    """

    _css = _assets.style()
    _arguments: ClassVar[tuple[str, ...]] = ()
    """Keywords of the constructor that are not traits; for error messages."""

    error = traitlets.Unicode("", help="a message shown in a strip inside the widget").tag(sync=True)

    def __init__(self, **state: Any) -> None:
        """Refuse what is no trait, then make the widget."""
        own = [name for name in self.trait_names(sync=True) if not name.startswith("_")]
        for name in state:
            if name not in own:
                known = [*self._arguments, *own]
                raise TypeError(f"{type(self).__name__} has no argument {name!r}; {did_you_mean(name, known)}")
        self._lock = threading.RLock()
        self._display_id: str | None = None
        super().__init__(**state)

    def chart(self) -> Any:
        """The same picture as an altair chart."""
        raise NotImplementedError

    def _caption(self) -> str:
        raise NotImplementedError

    def _has_picture(self) -> bool:
        """Whether a static picture would show anything."""
        return True

    def png(self) -> bytes:
        """The same picture as the bytes of a PNG file, drawn in Python."""
        return to_png(self.chart())

    def _bundle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The view for a live notebook, the picture for places that run no widgets, a line for terminals."""
        live = super()._repr_mimebundle_() or ({}, {})
        data, metadata = dict(live[0]), dict(live[1])
        data["text/plain"] = self._caption()
        if options.static_png and self._has_picture():
            data["image/png"] = self.png()
            metadata["image/png"] = png_size(data["image/png"])
        return data, metadata

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget's view, `image/png` and a line of text, for hosts that ask for them."""
        return self._bundle()

    def _ipython_display_(self) -> None:
        """Show the widget under a display id, so that its static picture can be renewed when it has changed."""
        self._display_id = uuid.uuid4().hex
        data, metadata = self._bundle()
        display(data, metadata=metadata, raw=True, display_id=self._display_id)

    def _renew_picture(self) -> None:
        """Replace the static picture of the view shown last; the live view (same model) goes on.

        A picture that cannot be drawn must not end a training loop: the error is shown in the widget instead.
        """
        if self._display_id is None:
            return
        try:
            data, metadata = self._bundle()
            update_display(data, metadata=metadata, raw=True, display_id=self._display_id)
        except Exception as error:
            self.error = f"The static picture could not be renewed: {error}"
