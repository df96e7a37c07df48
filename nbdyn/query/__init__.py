"""The query room: text -> tree -> plan -> frame."""

# `execute` the function stands where `execute` the module is found: the module is imported here, once, before it.
from nbdyn.query.execute import execute, explain

__all__ = ["execute", "explain"]
