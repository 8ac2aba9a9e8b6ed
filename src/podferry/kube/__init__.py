"""Kubernetes: the API server behind one door, the Migration object, watches, leases, events."""
