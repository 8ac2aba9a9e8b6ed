"""Kubernetes: the only client of the API server, the Migration object, watches, leases, events."""
