"""`kubectl podferry report`: what a bug report about one migration needs, in one file, and nothing of what the job computes with.

Of pods it keeps the shape of the spec and the status. Values of the environment, commands, arguments, probes' commands, and all
annotations but podferry's own are left out: they are where secrets are. Nothing of Secrets, ConfigMaps or logs is read.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from podferry import __version__
from podferry.cli import kubectl_moves as moves
from podferry.cli.kubectl_moves import ClusterOptions
from podferry.errors import Refused
from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import NODES, PODS, Api
from podferry.kube.migration import GROUP, Migration, PodReference

Json = dict[str, Any]

HIDDEN = "(left out)"
COMMANDS = frozenset({"command", "args"})
MORE = """What this does not hold, and what helps where it may be told:
  kubectl -n podferry-system logs deployment/podferry-controller | grep {name}
  kubectl -n podferry-system logs daemonset/podferry-agent -c agent, of the agents on {source} and {target}
Look through the files before you send them: names of pods, nodes and namespaces are in them as they are.
"""


async def collect(where: ClusterOptions, name: str) -> dict[str, str]:
    """The files of the report, by name."""
    found, events = await moves.explanation(where, name)
    status = found.status
    async with where.open() as (api, namespace):
        pods = {
            "source-pod": await _pod(api, namespace, status.source_pod),
            "target-pod": await _pod(api, namespace, status.target_pod),
        }
        nodes = [await _node(api, one) for one in (status.source_node, status.target_node) if one]
        server = await _version(api)
    files: dict[str, Any] = {
        "migration.json": _without_managed_fields(found.to_json()),
        "events.json": [{key: one.get(key) for key in EVENT} for one in events],
        "nodes.json": nodes,
        "versions.json": {"kubectl-podferry": __version__, "kubernetes": server},
        **{f"{which}.json": redacted(pod) for which, pod in pods.items() if pod is not None},
    }
    texts = {file: json.dumps(content, indent=1) + "\n" for file, content in files.items()}
    return {**texts, "README.txt": _readme(found)}


EVENT = ("eventTime", "type", "reason", "note", "regarding", "reportingController")


def redacted(pod: Json) -> Json:
    """A pod without what may be secret in it."""
    whole: Json = _scrubbed(_without_managed_fields(pod))
    about = whole["metadata"]
    annotations = about.get("annotations") or {}
    about["annotations"] = {key: value if key.startswith(f"{GROUP}/") else HIDDEN for key, value in annotations.items()}
    return whole


def _scrubbed(value: Any, key: str = "") -> Any:
    """Also what a later Kubernetes adds: whatever is called so, wherever it is."""
    if key in COMMANDS and isinstance(value, list):
        return [HIDDEN] * len(value)
    if key == "env" and isinstance(value, list):
        return [{**one, **({"value": HIDDEN} if "value" in one else {})} for one in value]
    if key == "httpHeaders" and isinstance(value, list):
        return [HIDDEN] * len(value)
    if isinstance(value, dict):
        return {name: _scrubbed(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_scrubbed(inner) for inner in value]
    return value


def _without_managed_fields(body: Json) -> Json:
    whole = copy.deepcopy(body)
    whole["metadata"].pop("managedFields", None)
    return whole


async def _pod(api: Api, namespace: str, wanted: PodReference | None) -> Json | None:
    if wanted is None:
        return None
    found = await api.find(PODS, wanted.name, namespace)
    return found if found is not None and found["metadata"]["uid"] == wanted.uid else None


async def _node(api: Api, name: str) -> Json:
    """What kind of machine it is; nothing of its addresses."""
    try:
        found = await api.find(NODES, name)
    except ApiFailed as refused:
        return {"name": name, "not-read": refused.why}
    status = (found or {}).get("status") or {}
    return {
        "name": name,
        "there": found is not None,
        **{key: status.get(key) for key in ("nodeInfo", "allocatable", "conditions")},
    }


async def _version(api: Api) -> Any:
    try:
        return await api._call("GET", "/version", what="the API server does not tell its version")
    except ApiFailed as refused:
        return refused.why


def _readme(migration: Migration) -> str:
    status = migration.status
    return MORE.format(name=migration.name, source=status.source_node or "?", target=status.target_node or "?")


def write(files: dict[str, str], into: Path) -> None:
    """All of it as one compressed archive. Raises `Refused` where the file is there already."""
    try:
        with into.open("xb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name, text in files.items():
                content = text.encode()
                about = tarfile.TarInfo(f"{into.name.removesuffix('.tar.gz')}/{name}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    except FileExistsError as there:
        raise Refused(f"{into} is there already", remedy="name another file with --output") from there
