"""`podferry-controller`: decides about Migrations in a cluster; the agents do the work."""
