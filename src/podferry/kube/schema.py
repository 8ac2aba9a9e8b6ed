"""The CustomResourceDefinition and the API reference, generated from the typed classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from podferry.kube.client import MIGRATION_POLICIES, MIGRATIONS, NODE_DRAINS, ResourceKind
from podferry.kube.drain import NodeDrain
from podferry.kube.migration import GROUP, VERSION, Migration
from podferry.kube.objects import ObjectPart
from podferry.kube.policy import MigrationPolicy
from podferry.kube.writers import HEADER, status_policies

Schema = dict[str, Any]
Column = tuple[str, str, str, int, str]
"""Title, type, path, priority (1: with `-o wide` alone), description."""

MIGRATION_COLUMNS: tuple[Column, ...] = (
    ("Pod", "string", ".spec.podName", 0, "the pod that moves"),
    ("From", "string", ".status.sourceNode", 0, "the node that it leaves"),
    ("To", "string", ".status.targetNode", 0, "the node that it goes to"),
    ("Phase", "string", ".status.phase", 0, "how far it is"),
    ("Progress", "string", ".status.progress.summary", 0, "how far the engine is"),
    ("Downtime", "string", ".status.downtime", 0, "how long the job stood still"),
    ("Age", "date", ".metadata.creationTimestamp", 0, ""),
    ("Mode", "string", ".status.settings.mode", 1, "how memory moves"),
    ("Policy", "string", ".status.settings.policy", 1, "the MigrationPolicy that applies"),
    ("Reason", "string", ".status.ending.reason", 1, "why it ended so"),
    ("Requested-By", "string", ".spec.requestedBy", 1, "who asked for it"),
    ("Message", "string", ".status.message", 1, "the latest in words"),
)
DRAIN_COLUMNS: tuple[Column, ...] = (
    ("Phase", "string", ".status.phase", 0, "how far it is"),
    ("Pods", "integer", ".status.total", 0, "pods that the drain has seen on the node"),
    ("Moved", "integer", ".status.moved", 0, "pods that moved to another node"),
    ("Left", "integer", ".status.left", 0, "pods still on the node"),
    ("Remaining", "string", ".status.remaining", 0, "how long the moves that are left will take"),
    ("Age", "date", ".metadata.creationTimestamp", 0, ""),
    ("Summary", "string", ".status.summary", 1, "all of it in a few words"),
)
POLICY_COLUMNS: tuple[Column, ...] = (
    ("Movable", "boolean", ".spec.movable", 0, "whether its pods may move"),
    ("Modes", "string", ".spec.modes", 0, "the modes that they may move in"),
    ("Max-Downtime", "string", ".spec.maxDowntime", 0, "their downtime budget"),
    ("Parallel", "integer", ".spec.parallel", 0, "moves at once"),
    ("Age", "date", ".metadata.creationTimestamp", 0, ""),
)

SELECTABLE = (".spec.podName", ".status.sourceNode", ".status.targetNode", ".status.phase")
"""What a watch may select by: an agent sees the Migrations of its own node and no others (Kubernetes 1.32)."""


@dataclass(frozen=True)
class Resource:
    """A kind of object of ours: its typed class in module `source`, its names, columns and what a watch may select by. `example` is
    a whole object for docs/api.md."""

    kind: ResourceKind
    model: type[ObjectPart]
    source: str
    singular: str
    short: str
    columns: tuple[Column, ...]
    selectable: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    example: str = ""

    @property
    def file(self) -> str:
        """The name of its CustomResourceDefinition's file below deploy/crds."""
        return f"{GROUP}_{self.kind.plural}.yaml"


MIGRATION = Resource(
    MIGRATIONS,
    Migration,
    "src/podferry/kube/migration.py",
    "migration",
    "mig",
    MIGRATION_COLUMNS,
    SELECTABLE,
    ("spec",),
    "metadata:\n  name: move-train\nspec:\n  podName: train",
)
NODE_DRAIN = Resource(
    NODE_DRAINS,
    NodeDrain,
    "src/podferry/kube/drain.py",
    "nodedrain",
    "drain",
    DRAIN_COLUMNS,
    example="metadata:\n  name: node-a\nspec:\n  parallel: 2",
)
MIGRATION_POLICY = Resource(
    MIGRATION_POLICIES,
    MigrationPolicy,
    "src/podferry/kube/policy.py",
    "migrationpolicy",
    "migpol",
    POLICY_COLUMNS,
    example="metadata:\n  name: interactive\nspec:\n  podSelector:\n    matchLabels: {tier: interactive}\n  maxDowntime: 300ms",
)
RESOURCES = (MIGRATION, NODE_DRAIN, MIGRATION_POLICY)


def structural(model: type[ObjectPart], required: tuple[str, ...] = ("spec",)) -> Schema:
    """The model's schema as Kubernetes takes it: structural, nothing referenced, nothing nullable."""
    whole = model.model_json_schema(by_alias=True, mode="validation")
    definitions = whole.get("$defs", {})

    def plain(schema: Schema) -> Schema:
        if "$ref" in schema:
            target = definitions[schema["$ref"].rpartition("/")[2]]
            return plain({**target, **{name: value for name, value in schema.items() if name != "$ref"}})
        if "anyOf" in schema:
            (real,) = (one for one in schema["anyOf"] if one.get("type") != "null")
            return plain({**real, **{name: value for name, value in schema.items() if name != "anyOf"}})
        done: Schema = {}
        for name, value in schema.items():
            match name:
                case "title" | "$defs" | "const":
                    continue
                case "default" if value is None or value == [] or schema.get("type") == "object":
                    continue
                case "properties":
                    done[name] = {one: plain(inner) for one, inner in value.items()}
                case "items":
                    done[name] = plain(value)
                case "additionalProperties":
                    if isinstance(value, dict):
                        done[name] = plain(value)
                case "description":
                    done[name] = " ".join(str(value).split())
                case _:
                    done[name] = value
        return done

    schema = plain(whole)
    properties = schema["properties"]
    properties["metadata"] = {"type": "object"}
    for name in ("apiVersion", "kind"):
        properties[name] = {"type": "string"}
    # Defaults in the status would be claims that nobody made.
    if "status" in properties:
        _without_defaults(properties["status"])
    schema.pop("required", None)
    return {**schema, "required": list(required)} if required else schema


def _without_defaults(schema: Schema) -> None:
    schema.pop("default", None)
    for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        _without_defaults(inner)


class _Whole(yaml.SafeDumper):
    """Repeats what occurs twice, instead of pointing at it."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def definition(resource: Resource = MIGRATION) -> Schema:
    """The CustomResourceDefinition of a kind."""
    columns = [
        {"name": name, "type": type_, "jsonPath": path}
        | ({"description": text} if text else {})
        | ({"priority": priority} if priority else {})
        for name, type_, path, priority, text in resource.columns
    ]
    kind, schema = resource.kind, structural(resource.model, resource.required)
    selectable = [{"jsonPath": path} for path in resource.selectable]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "names": {
                "kind": kind.kind,
                "listKind": f"{kind.kind}List",
                "plural": kind.plural,
                "singular": resource.singular,
                "shortNames": [resource.short],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    **({"subresources": {"status": {}}} if "status" in schema["properties"] else {}),
                    "additionalPrinterColumns": columns,
                    **({"selectableFields": selectable} if selectable else {}),
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def policies_yaml() -> str:
    """The policies of the statuses as deploy/ holds them."""
    return HEADER + yaml.dump_all(status_policies(), Dumper=_Whole, sort_keys=False, width=120)


def definition_yaml(resource: Resource = MIGRATION) -> str:
    """The CustomResourceDefinition as deploy/crds holds it."""
    header = f"# Generated from {resource.source} by scripts/crds. Do not edit.\n"
    return header + yaml.dump(definition(resource), Dumper=_Whole, sort_keys=False, width=120)


def reference() -> str:
    """docs/api.md: every field, from the same classes."""
    lines = [
        "# API reference",
        "",
        f"<!-- Generated from {' and '.join(one.source for one in RESOURCES)} by scripts/crds. Do not edit. -->",
    ]
    for resource in RESOURCES:
        lines += _chapter(resource)
    return "\n".join(lines) + "\n"


def _chapter(resource: Resource) -> list[str]:
    schema, kind = structural(resource.model, resource.required), resource.kind
    scope = "namespaced" if kind.namespaced else "cluster-scoped"
    lines = [
        "",
        f"# {kind.kind}",
        "",
        f"`{kind.kind}` (`{GROUP}/{VERSION}`, {scope}, short name `{resource.short}`). {schema['description']}",
        "",
        "```yaml",
        f"apiVersion: {GROUP}/{VERSION}",
        f"kind: {kind.kind}",
        *resource.example.splitlines(),
        "```",
    ]
    for name in [one for one in ("spec", "status") if one in schema["properties"]]:
        part = schema["properties"][name]
        lines += ["", f"## {kind.kind} {name}", "", part["description"], "", *_table(part)]
    lines += ["", f"## Columns of `kubectl get {kind.plural}`", "", "| column | field | |", "|---|---|---|"]
    lines += [
        f"| {name.upper()}{' (wide)' if priority else ''} | `{path}` | {text} |"
        for name, _, path, priority, text in resource.columns
    ]
    return lines


def _table(schema: Schema) -> list[str]:
    return ["| field | type | |", "|---|---|---|", *_rows(schema, "")]


def _rows(schema: Schema, prefix: str) -> list[str]:
    rows = []
    for name, field in schema["properties"].items():
        text = field.get("description", "")
        if name in schema.get("required", []):
            text += " Required."
        if "default" in field:
            default = field["default"]
            text += f" Default: `{str(default).lower() if isinstance(default, bool) else default}`."
        inner = field.get("items", field)
        if "enum" in inner:
            text += " One of " + ", ".join(f"`{one}`" for one in inner["enum"]) + "."
        rows.append(f"| `{prefix}{name}` | {_type(field)} | {text.replace('|', '&#124;')} |")
        if "properties" in inner:
            rows += _rows(inner, f"{prefix}{name}{'[]' if 'items' in field else ''}.")
    return rows


def _type(field: Schema) -> str:
    if field["type"] == "array":
        return f"list of {field['items']['type']}"
    if field["type"] == "object" and "additionalProperties" in field:
        return "map of string"
    return str(field["type"])
