"""What the machines of a lab's Kubernetes find in /etc/podferry, beside their certificates."""

from __future__ import annotations

import json
from collections.abc import Mapping

from podferry.lab.kubernetes.pod_network import API_PORT, SERVICES, pod_subnet
from podferry.lab.state import CONTROL

CNI = "/etc/podferry/cni"
KUBERNETES = "/etc/podferry/kubernetes"
CONTAINERD = "/run/containerd/containerd.sock"


def for_control(addresses: Mapping[str, str]) -> dict[str, str]:
    """Of the control plane's machine."""
    return {"kubernetes/environment": f"ADDRESS={addresses[CONTROL]}\nPORT={API_PORT}\nSERVICES={SERVICES}\n"}


def for_node(name: str, addresses: Mapping[str, str], endpoint: str = CONTAINERD) -> dict[str, str]:
    """Of a node whose container runtime listens at `endpoint`."""
    api = f"API={addresses[CONTROL]}\nPORT={API_PORT}\n"
    return {
        "cni/10-lab.conflist": json.dumps(_cni(addresses[name]), indent=2),
        "kubernetes/environment": f"NAME={name}\nADDRESS={addresses[name]}\n{api}",
        "kubernetes/kubelet.json": json.dumps({**_KUBELET, "containerRuntimeEndpoint": f"unix://{endpoint}"}, indent=2),
    }


_KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "authentication": {
        "anonymous": {"enabled": False},
        "webhook": {"enabled": True},
        "x509": {"clientCAFile": f"{KUBERNETES}/ca.crt"},
    },
    "authorization": {"mode": "Webhook"},
    "tlsCertFile": f"{KUBERNETES}/kubelet.crt",
    "tlsPrivateKeyFile": f"{KUBERNETES}/kubelet.key",
    "cgroupDriver": "cgroupfs",
    "failCgroupV1": False,
    "failSwapOn": False,
    # What a node of namespaces may not set for the whole machine is no error with it.
    "featureGates": {"KubeletInUserNamespace": True},
    "localStorageCapacityIsolation": False,
    "resolvConf": "",
    "clusterDomain": "cluster.local",
    # The machine's disk is not the lab's to keep free.
    "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
    "imageGCHighThresholdPercent": 100,
    "imageGCLowThresholdPercent": 99,
    "registerWithTaints": [],
}


def _cni(address: str) -> dict[str, object]:
    """Pods on a bridge, routed and not masqueraded."""
    return {
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipMasq": False,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": pod_subnet(address)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
