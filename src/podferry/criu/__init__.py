"""What podferry knows about CRIU: prepared and held dumps, restores, and what is read and changed in images."""
