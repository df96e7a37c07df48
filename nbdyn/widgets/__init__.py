"""Widgets: what shows itself live in a notebook. Each is an anywidget, plain JavaScript, no network."""

from nbdyn.widgets.cockpit import Cockpit

__all__ = ["Cockpit"]
