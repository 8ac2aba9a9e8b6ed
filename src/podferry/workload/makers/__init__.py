"""Who makes a workload's containers: podferry itself, by calling containerd, or the kubelet. It is the one thing that a container
alone and a pod differ in.
"""
