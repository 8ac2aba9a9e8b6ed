"""podferry-agent: one per node; moves containers off it and onto it."""

from podferry.agent.program import main

__all__ = ["main"]
