"""Who writes which field of a status: one table, and the admission policy that holds everybody to it (deploy/status-policy.yaml).

RBAC knows `migrations/status` as a whole. What an agent or the controller writes there decides about other people's pods, so each
field has its writers and is closed to all others. A field that is added to the classes and not to this table fails a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from podferry.kube.migration import GROUP, INTACT, RESUMED, TARGET_READY, TARGET_READY_BEFORE, TARGET_REQUESTED

Json = dict[str, Any]


class Writer(StrEnum):
    """Who writes into a status."""

    CONTROLLER = "controller"
    SOURCE = "source"
    TARGET = "target"


Writers = frozenset[Writer]
BY_CONTROLLER: Writers = frozenset({Writer.CONTROLLER})
BY_SOURCE: Writers = frozenset({Writer.SOURCE})
BY_TARGET: Writers = frozenset({Writer.TARGET})

MIGRATION_STATUS: Mapping[str, Writers] = {
    "phase": BY_CONTROLLER,
    "observedGeneration": BY_CONTROLLER,
    "sourceNode": BY_CONTROLLER,
    "targetNode": BY_CONTROLLER,
    "sourceAddress": BY_CONTROLLER,
    "targetAddress": BY_CONTROLLER,
    "sourcePod": BY_CONTROLLER,
    "sourcePodAddresses": BY_CONTROLLER,
    "targetPod": BY_CONTROLLER,
    "containers": BY_CONTROLLER,
    "owner": BY_CONTROLLER,
    "keepsName": BY_CONTROLLER,
    "keptPlace": BY_CONTROLLER,
    "settings": BY_CONTROLLER,
    "engine.source": BY_SOURCE,
    "engine.target": BY_TARGET,
    "progress": BY_SOURCE,
    "downtime": BY_SOURCE,
    "forecast": BY_SOURCE,
    "warnings": BY_SOURCE,
    "connections": BY_SOURCE,
    "peers": BY_CONTROLLER,
    "closedConnections": BY_SOURCE,
    "abort": BY_CONTROLLER,
    "engineEnding": BY_SOURCE,
    "ending": BY_CONTROLLER,
    "arbiter": BY_CONTROLLER,
    "message": BY_CONTROLLER,
    "startTime": BY_CONTROLLER,
    "completionTime": BY_CONTROLLER,
}
LISTS = frozenset({"containers", "sourcePodAddresses", "warnings", "connections", "peers", "closedConnections"})
MIGRATION_CONDITIONS: Mapping[str, Writers] = {
    TARGET_REQUESTED: BY_TARGET,
    TARGET_READY: BY_TARGET,
    TARGET_READY_BEFORE: BY_TARGET,
    RESUMED: BY_SOURCE | BY_TARGET,
    INTACT: BY_SOURCE,
}
"""The conditions that agents set; all others are the controller's."""

WHO = {
    Writer.CONTROLLER: "the controller's",
    Writer.SOURCE: "the agent's of the source's node",
    Writer.TARGET: "the agent's of the target's node",
}
VARIABLES = {
    Writer.CONTROLLER: "variables.controller",
    Writer.SOURCE: "variables.atSource",
    Writer.TARGET: "variables.atTarget",
}
CONTROL = f"authorizer.group('{GROUP}').resource('migrations').check('control').allowed()"
ADMINISTRATOR = "authorizer.group('').resource('nodes').check('delete').allowed()"
NODE_KEY = "'authentication.kubernetes.io/node-name'"

HEADER = """\
# Generated from src/podferry/kube/writers.py by scripts/crds. Do not edit.
# What RBAC cannot say: of a status each program writes the fields that are its own, an agent only in Migrations that its own node
# has a part in. The node is the one that the agent's token is bound to (Kubernetes 1.32 and later put it there). The controller is
# known by a verb of its own, `control`, wherever it is installed; whoever may delete nodes is an administrator and not held to it.
"""


def status_policies() -> list[Json]:
    """The policies of Migrations' and NodeDrains' statuses, with their bindings."""
    migrations = _policy(
        "podferry-migration-status",
        "migrations/status",
        [
            ("controller", CONTROL),
            ("nodes", f"request.userInfo.?extra[?{NODE_KEY}].orValue([])"),
            ("node", "size(variables.nodes) == 1 ? variables.nodes[0] : ''"),
            ("atSource", _at("sourceNode")),
            ("atTarget", _at("targetNode")),
        ],
        [
            (
                "variables.controller || variables.atSource || variables.atTarget",
                "an agent writes only into the Migrations of its own node",
            ),
            *(_field(path, writers) for path, writers in MIGRATION_STATUS.items()),
            *(_condition(type, writers) for type, writers in MIGRATION_CONDITIONS.items()),
            _other_conditions(),
        ],
    )
    drains = _policy(
        "podferry-drain-status",
        "nodedrains/status",
        [("controller", CONTROL)],
        [("variables.controller", "a NodeDrain's status is the controller's to write")],
    )
    return [*migrations, *drains]


def _at(side: str) -> str:
    return f"!variables.controller && variables.node != '' && variables.node == oldObject.?status.?{side}.orValue('')"


def _field(path: str, writers: Writers) -> tuple[str, str]:
    way = ".?".join(["", "status", *path.split(".")])
    # Who writes a part writes its siblings as empty where they are not there, and a list that is not there as an empty one.
    empty = ".orValue('')" if "." in path else ".orValue([])" if path in LISTS else ""
    return _closed(f"object{way}{empty} == oldObject{way}{empty}", f"status.{path} is", writers)


def _condition(type: str, writers: Writers) -> tuple[str, str]:
    return _closed(
        f"{_conditions('object', f'c.type == {type!r}')} == {_conditions('oldObject', f'c.type == {type!r}')}",
        f"the condition {type} is",
        writers,
    )


def _other_conditions() -> tuple[str, str]:
    others = f"!(c.type in {list(MIGRATION_CONDITIONS)})"
    same = f"{_conditions('object', others)} == {_conditions('oldObject', others)}"
    return _closed(same, f"conditions but {', '.join(MIGRATION_CONDITIONS)} are", BY_CONTROLLER)


def _conditions(of: str, chosen: str) -> str:
    return f"{of}.?status.?conditions.orValue([]).filter(c, {chosen})"


def _closed(unchanged: str, what: str, writers: Writers) -> tuple[str, str]:
    may = [VARIABLES[one] for one in Writer if one in writers]
    return " || ".join(
        [*may, unchanged]
    ), f"{what} {' and '.join(WHO[one] for one in Writer if one in writers)} to write"


def _policy(name: str, resource: str, variables: list[tuple[str, str]], rules: list[tuple[str, str]]) -> list[Json]:
    api = "admissionregistration.k8s.io/v1"
    policy = {
        "apiVersion": api,
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "resourceRules": [
                    {"apiGroups": [GROUP], "apiVersions": ["*"], "operations": ["UPDATE"], "resources": [resource]}
                ]
            },
            "matchConditions": [
                {"name": "by-no-administrator", "expression": f"!({CONTROL} && {ADMINISTRATOR})"},
            ],
            "variables": [{"name": one, "expression": expression} for one, expression in variables],
            "validations": [
                {"expression": expression, "message": message, "reason": "Forbidden"} for expression, message in rules
            ],
        },
    }
    binding = {
        "apiVersion": api,
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    }
    return [policy, binding]
