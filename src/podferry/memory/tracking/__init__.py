"""Which memory of a group of processes has changed: one tracker for each facility of the kernel."""
