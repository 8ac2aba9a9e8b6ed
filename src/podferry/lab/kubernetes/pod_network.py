"""Addresses of a lab's Kubernetes, and the routes that join its nodes' pods.

There is no kube-proxy: nothing in the lab needs a Service's address but the API server's own, and that machine simply has
it. EndpointSlices are kept as everywhere, so what a Service would choose can be read there. The API server does so itself for the
webhooks that it asks: it goes to a pod behind the Service (`--enable-aggregator-routing`, for control planes without kube-proxy).
"""

from __future__ import annotations

from collections.abc import Mapping

from podferry.lab.network import add_address, set_routes
from podferry.lab.state import CONTROL, STORAGE

SERVICES = "10.250.0.0/16"
API_SERVICE = "10.250.0.1"
"""The address of the Service `kubernetes`: the first of `SERVICES`."""
API_PORT = 443
"""As the Service has it, so that nobody has to translate between the two."""
PODS = "10.240.0.0/16"


def pod_subnet(node_address: str) -> str:
    """The addresses of a node's pods. Labs may share them: nothing routes out of a lab."""
    return f"10.240.{node_address.rpartition('.')[2]}.0/24"


def connect(machine: str, pid: int, addresses: Mapping[str, str]) -> None:
    """Give a machine that is on the lab's bridge its routes to the others' pods and to the API server."""
    if machine == CONTROL:
        add_address(pid, f"{API_SERVICE}/32")
    routes = {
        pod_subnet(address): address for other, address in addresses.items() if other not in (machine, STORAGE, CONTROL)
    }
    if machine != CONTROL:
        routes[f"{API_SERVICE}/32"] = addresses[CONTROL]
    set_routes(pid, routes)
