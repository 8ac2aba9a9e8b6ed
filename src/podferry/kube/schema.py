"""The CustomResourceDefinition and the API reference, generated from the typed classes."""

from __future__ import annotations

from typing import Any

import yaml

from podferry.kube.client import MIGRATIONS
from podferry.kube.migration import GROUP, VERSION, Migration, MigrationSpec, MigrationStatus

Schema = dict[str, Any]

COLUMNS = (
    ("Pod", "string", ".spec.podName", 0, "the pod that moves"),
    ("From", "string", ".status.sourceNode", 0, "the node that it leaves"),
    ("To", "string", ".status.targetNode", 0, "the node that it goes to"),
    ("Phase", "string", ".status.phase", 0, "how far it is"),
    ("Progress", "string", ".status.progress.summary", 0, "how far the engine is"),
    ("Downtime", "string", ".status.downtime", 0, "how long the job stood still"),
    ("Age", "date", ".metadata.creationTimestamp", 0, ""),
    ("Mode", "string", ".spec.mode", 1, "how memory moves"),
    ("Reason", "string", ".status.ending.reason", 1, "why it ended so"),
    ("Message", "string", ".status.message", 1, "the latest in words"),
)

SELECTABLE = (".spec.podName", ".status.sourceNode", ".status.targetNode", ".status.phase")
"""What a watch may select by: an agent sees the Migrations of its own node and no others (Kubernetes 1.32)."""

HEADER = "# Generated from src/podferry/kube/migration.py by scripts/crds. Do not edit.\n"


def structural(model: type[Migration]) -> Schema:
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
    _without_defaults(properties["status"])
    schema["required"] = ["spec"]
    return schema


def _without_defaults(schema: Schema) -> None:
    schema.pop("default", None)
    for inner in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        _without_defaults(inner)


class _Whole(yaml.SafeDumper):
    """Repeats what occurs twice, instead of pointing at it."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def definition() -> Schema:
    """The CustomResourceDefinition of Migration."""
    columns = [
        {"name": name, "type": type_, "jsonPath": path}
        | ({"description": text} if text else {})
        | ({"priority": priority} if priority else {})
        for name, type_, path, priority, text in COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{MIGRATIONS.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": MIGRATIONS.kind,
                "listKind": f"{MIGRATIONS.kind}List",
                "plural": MIGRATIONS.plural,
                "singular": "migration",
                "shortNames": ["mig"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "selectableFields": [{"jsonPath": path} for path in SELECTABLE],
                    "schema": {"openAPIV3Schema": structural(Migration)},
                }
            ],
        },
    }


def definition_yaml() -> str:
    """The CustomResourceDefinition as deploy/crds holds it."""
    return HEADER + yaml.dump(definition(), Dumper=_Whole, sort_keys=False, width=120)


def reference() -> str:
    """docs/api.md: every field, from the same classes."""
    schema = structural(Migration)
    lines = [
        "# API reference",
        "",
        "<!-- Generated from src/podferry/kube/migration.py by scripts/crds. Do not edit. -->",
        "",
        f"`Migration` (`{GROUP}/{VERSION}`, namespaced, short name `mig`). {schema['description']}",
        "",
        "```yaml",
        f"apiVersion: {GROUP}/{VERSION}",
        "kind: Migration",
        "metadata:",
        "  name: move-train",
        "spec:",
        "  podName: train",
        "```",
    ]
    for name, model in (("spec", MigrationSpec), ("status", MigrationStatus)):
        lines += ["", f"## {name}", "", " ".join((model.__doc__ or "").split()), ""]
        lines += _table(schema["properties"][name])
    lines += ["", "## Columns of `kubectl get migrations`", "", "| column | field | |", "|---|---|---|"]
    lines += [
        f"| {name.upper()}{' (wide)' if priority else ''} | `{path}` | {text} |"
        for name, _, path, priority, text in COLUMNS
    ]
    return "\n".join(lines) + "\n"


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
        if "enum" in field:
            text += " One of " + ", ".join(f"`{one}`" for one in field["enum"]) + "."
        inner = field.get("items", field)
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
