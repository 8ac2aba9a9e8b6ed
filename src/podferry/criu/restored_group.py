"""Which group a restored container belongs in, told to CRIU where runc does not do it.

CRIU makes the groups that its images name, and has the processes join them. Those are the source's, and a pod's name holds its uid.
So `runc restore` tells CRIU what to put in their place; on cgroup v2 only from 1.2 on (`criuApplyCgroups` in
libcontainer/criu_linux.go). Before, the container would run in a group of which neither runc nor the kubelet knows.

Which group it is, runc works out of the spec: `cgroupsPath` is a path, or SLICE:PREFIX:NAME for its systemd driver, where
`a-b.slice` lies in `a.slice` (`ExpandSlice` and `getUnitName` in libcontainer/cgroups/systemd/common.go).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podferry.core.facts import CgroupKind
from podferry.core.preflight import numbers
from podferry.node.cgroup import cgroup_kind

RUNC_KEEPS_GROUP = (1, 2)


def group_to_restore(spec: Mapping[str, Any], runc: str) -> str:
    """The group, as a path from the root of the tree, that CRIU must be told of; empty where runc, of this version, tells it."""
    if cgroup_kind() is not CgroupKind.V2 or numbers(runc) >= RUNC_KEEPS_GROUP:
        return ""
    return group_of(str(spec.get("linux", {}).get("cgroupsPath", "")))


def group_of(cgroups_path: str) -> str:
    """Where runc puts a container whose spec says this; empty where that depends on runc's own group."""
    if cgroups_path.startswith("/"):
        return cgroups_path
    words = cgroups_path.split(":")
    if len(words) != 3:
        return ""
    slice, prefix, name = words
    unit = name if name.endswith(".slice") else f"{prefix}-{name}.scope"
    return f"{_expanded(slice or 'system.slice')}/{unit}"


def _expanded(slice: str) -> str:
    if slice == "-.slice":
        return ""
    parts = slice.removesuffix(".slice").split("-")
    return "".join(f"/{'-'.join(parts[: number + 1])}.slice" for number in range(len(parts)))
