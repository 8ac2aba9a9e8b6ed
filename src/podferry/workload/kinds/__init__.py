"""The kinds of workload that an agent moves: a container alone (`alone`), a pod (`kubelet_pods`). `kind` has what they share."""
