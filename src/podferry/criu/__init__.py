"""All of podferry's dealings with CRIU: prepared and held dumps, restores, and the reading and changing of images."""
