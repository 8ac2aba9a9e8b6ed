"""Which nodes a pod's own rules allow: `nodeSelector` and required node affinity, as the scheduler reads them (Kubernetes,
"Assigning Pods to Nodes"), and which it cannot move to: those with another container runtime. Pure. Taints, resources and other
pods are left to the scheduler: they change by the minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Json = dict[str, Any]

HOSTNAME = "kubernetes.io/hostname"


def allows(pod: Json, labels: Mapping[str, str]) -> bool:
    """Whether the pod's rules allow a node with these labels. What they ask of the name is left out: an earlier migration
    may have asked it.
    """
    selector = pod["spec"].get("nodeSelector") or {}
    terms = _terms(pod)
    return all(labels.get(key) == value for key, value in selector.items()) and (
        terms is None or any(_matches(term, labels) for term in terms)
    )


def pin(pod: Json, name: str, labels: Mapping[str, str]) -> str | None:
    """What ties the pod to the node that it is on, which has this name and these labels, in words; None where nothing does.

    It is tied if its rules allow no node with another hostname, whatever labels that may have.
    """
    host = labels.get(HOSTNAME, name)
    if HOSTNAME in (pod["spec"].get("nodeSelector") or {}):
        return f"nodeSelector {HOSTNAME}: {host}"
    terms = [term for term in _terms(pod) or [] if term.get("matchExpressions") or term.get("matchFields")]
    if terms and all(_only(term, host) for term in terms):
        return f"required node affinity: {HOSTNAME} in ({host})"
    return None


def of_other_runtimes(nodes: Iterable[Json], name: str) -> list[str]:
    """The names, in order, of those nodes whose container runtime is another than that of the node `name`, as kubelets tell it."""
    runtimes = {node["metadata"]["name"]: _runtime(node) for node in nodes}
    own = runtimes.get(name)
    return sorted(other for other, runtime in runtimes.items() if own and runtime and runtime != own)


def _runtime(node: Json) -> str:
    """Such as `cri-o`; empty where it is not told. The kubelet writes `cri-o://1.34.1`."""
    info = (node.get("status") or {}).get("nodeInfo") or {}
    return str(info.get("containerRuntimeVersion") or "").partition("://")[0]


def _terms(pod: Json) -> list[Json] | None:
    """The terms of which one must hold; None where there is no such rule."""
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    return None if required is None else list(required.get("nodeSelectorTerms") or [])


def _only(term: Json, host: str) -> bool:
    return any(
        one["key"] == HOSTNAME and one["operator"] == "In" and set(one.get("values") or []) <= {host}
        for one in term.get("matchExpressions") or []
    )


def _matches(term: Json, labels: Mapping[str, str]) -> bool:
    """A term without any demand holds nowhere."""
    expressions = term.get("matchExpressions") or []
    if not expressions and not term.get("matchFields"):
        return False
    return all(_OPERATORS[one["operator"]](labels.get(one["key"]), one.get("values") or []) for one in expressions)


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _compare(found: str | None, values: list[str], *, more: bool) -> bool:
    here, bound = _number(found), _number(values[0] if len(values) == 1 else None)
    return here is not None and bound is not None and (here > bound if more else here < bound)


_OPERATORS: Mapping[str, Callable[[str | None, list[str]], bool]] = {
    "In": lambda found, values: found in values,
    "NotIn": lambda found, values: found not in values,
    "Exists": lambda found, values: found is not None,
    "DoesNotExist": lambda found, values: found is None,
    "Gt": lambda found, values: _compare(found, values, more=True),
    "Lt": lambda found, values: _compare(found, values, more=False),
}
