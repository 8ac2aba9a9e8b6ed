"""The lazy-pages daemon of a restore: CRIU's lazy-pages protocol, answered from the local page store and from the source."""
