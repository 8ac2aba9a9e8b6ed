"""`podferry-controller`: decides about Migrations in a cluster; the agents do the work."""

from podferry.controller.program import main

__all__ = ["main"]
