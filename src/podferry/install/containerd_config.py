"""containerd's configuration: what is added for podferry, as text, without touching any file.

containerd 2 merges the tables of its files. containerd 1.7 does not: a file that says anything of a plugin replaces all that the
files before it said of that plugin (containerd issue 5837). There the drop-in repeats the plugin's section, and installing again
brings it up to date.
"""

from __future__ import annotations

import copy
import re
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import tomli_w

from podferry.errors import Refused

RUNTIME = "podferry"
"""The handler of the RuntimeClass, and containerd's name for the runtime."""
NAME = "90-podferry.toml"
ANNOTATIONS = "podferry.dev/*"
CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
"""The CRI plugin's name in the formats of containerd's configuration: 3 is containerd 2's own, which reads 2 as well."""

_IMPORTS = re.compile(r"^imports\s*=\s*\[[^\]]*\][ \t]*\n?", re.MULTILINE)

Table = dict[str, Any]


@dataclass(frozen=True)
class ContainerdSettings:
    """containerd's main configuration file, and the other files that it imports, in their order."""

    path: str
    text: str
    imported: tuple[str, ...] = ()

    @property
    def table(self) -> Table:
        """The main file, parsed. Raises `Refused` where it cannot be."""
        try:
            return tomllib.loads(self.text)
        except tomllib.TOMLDecodeError as damaged:
            raise Refused.because(f"containerd's configuration {self.path} is not TOML", damaged) from damaged

    def version(self, major: int) -> int:
        """The format: what the file says, or the newest that containerd `major` knows. Raises `Refused` for format 1."""
        said = self.table.get("version", 1 if self.text.strip() else (2 if major < 2 else 3))
        if said not in CRI:
            raise Refused(
                f"containerd's configuration {self.path} has format {said}",
                why="podferry's runtime is added to formats 2 and 3",
                remedy="containerd config migrate prints it in a newer format",
            )
        return int(said)


def drop_in_path(settings: ContainerdSettings) -> str:
    """Where the drop-in goes: to a directory whose files are imported already, or to one of its own."""
    for pattern in settings.table.get("imports", []):
        if pattern.endswith("/*.toml"):
            return f"{_absolute(settings, pattern).removesuffix('*.toml')}{NAME}"
    return f"{PurePosixPath(settings.path).parent}/conf.d/{NAME}"


def drop_in(settings: ContainerdSettings, major: int, wrapper: str) -> str:
    """The drop-in's text. The runtime is the node's own runc in all but its program."""
    version = settings.version(major)
    section: Table = {}
    for text in (settings.text, *settings.imported):
        here = tomllib.loads(text).get("plugins", {}).get(CRI[version])
        if here is not None:
            section = _merged(section, here) if major >= 2 else here
    containerd = section.get("containerd", {})
    runtimes = containerd.get("runtimes", {})
    runtime = copy.deepcopy(runtimes.get(containerd.get("default_runtime_name", "runc"), {}))
    runtime["runtime_type"] = "io.containerd.runc.v2"
    runtime["pod_annotations"] = sorted({*runtime.get("pod_annotations", []), ANNOTATIONS})
    runtime["options"] = {**runtime.get("options", {}), "BinaryName": wrapper}
    ours: Table = {"containerd": {"runtimes": {RUNTIME: runtime}}}
    whole = ours if major >= 2 else _merged(section, ours)
    return tomli_w.dumps({"version": version, "plugins": {CRI[version]: whole}})


def with_import(settings: ContainerdSettings, major: int, drop_in: str) -> str:
    """The main file's text with an import of `drop_in`; the text itself where that is imported already."""
    table = settings.table
    imports = list(table.get("imports", []))
    if any(fnmatch(drop_in, _absolute(settings, pattern)) for pattern in imports):
        return settings.text
    line = f"imports = {_array([*imports, f'{PurePosixPath(drop_in).parent}/*.toml'])}\n"
    if not settings.text.strip():
        return f"version = {settings.version(major)}\n{line}"
    text = _IMPORTS.sub("", settings.text, count=1) if imports else settings.text
    text = line + text
    wanted = {**table, "imports": [*imports, f"{PurePosixPath(drop_in).parent}/*.toml"]}
    if _parsed(text) != wanted:
        raise Refused(
            f"cannot add an import to containerd's configuration {settings.path}",
            why="podferry cannot parse its list of imports",
            remedy=f"add {PurePosixPath(drop_in).parent}/*.toml to imports by hand, and try again",
        )
    return text


def _parsed(text: str) -> Table | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _array(values: list[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"


def _absolute(settings: ContainerdSettings, pattern: str) -> str:
    return str(PurePosixPath(settings.path).parent / pattern)


def _merged(one: Table, other: Table) -> Table:
    """Both tables, the second's values before the first's."""
    merged = dict(one)
    for key, value in other.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
