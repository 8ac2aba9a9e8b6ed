"""What podferry decides, without doing any of it: phases, preflight, the stop rule, invariants, undo."""
