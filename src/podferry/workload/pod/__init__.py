"""Moving a pod: its containers side by side, its volumes, and the two pods that the cluster sees."""
