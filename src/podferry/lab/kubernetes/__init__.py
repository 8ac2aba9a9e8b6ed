"""Kubernetes in a lab: a control plane on a machine of its own, a kubelet on every node."""
