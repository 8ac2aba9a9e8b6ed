"""The page store: the target's copy of address spaces on their way."""
