"""podferry's decisions, without I/O: phases, preflight, the stop rule of pre-copy, invariants, undo."""
