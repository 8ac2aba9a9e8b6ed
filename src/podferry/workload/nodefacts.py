"""What a node is and has, as far as a migration cares. Facts travel to the peer, which compares them with its own."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from functools import lru_cache
from pathlib import Path

from podferry.core.facts import NodeFacts, RuntimeKind
from podferry.criu import skipped_pages
from podferry.criu.dump_gate import DumpGate
from podferry.errors import CommandFailed, TimedOut
from podferry.memory.kernel import uffd
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.tracking import tracker
from podferry.node import outside
from podferry.node.cgroup import cgroup_kind
from podferry.node.host import selinux_enforces
from podferry.node.node_programs import found
from podferry.node.process import run

PROGRAM_TIMEOUT = 10.0  # seconds
LAZY_FEATURES = (
    uffd.Feature.EVENT_FORK | uffd.Feature.EVENT_REMAP | uffd.Feature.EVENT_REMOVE | uffd.Feature.EVENT_UNMAP
)


def node_facts(
    root: Path,
    held: Path,
    runtime: RuntimeKind,
    runtime_version: str = "",
    *,
    runc: str = "runc",
    criu: str = "criu",
) -> NodeFacts:
    """The facts of this node. `root` is the directory for whose file system free space is asked, `held` the one that
    holds memory on its way; `runtime_version` is that of the container runtime."""
    model, flags = _processor(Path("/proc/cpuinfo").read_text())
    kernel = tracker.probe()
    return NodeFacts(
        kernel=platform.release(),
        machine=platform.machine(),
        page_size=PAGE,
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        cpus=os.cpu_count() or 1,
        cpu_model=model,
        cpu_flags=flags,
        criu=version(criu),
        runc=version(runc),
        runtime=runtime,
        runtime_version=runtime_version,
        cgroup=cgroup_kind(),
        memory_available=memory_available(),
        disk_free=shutil.disk_usage(root).free,
        run_free=shutil.disk_usage(held).free,
        lazy_pages=has_lazy_pages(),
        pagemap_scan=kernel.pagemap_scan,
        wp_async=kernel.wp_async,
        soft_dirty=kernel.soft_dirty,
        memory_skipping_dump=DumpGate.usable() and skipped_pages.possible(),
        pipe_max_size=int(Path("/proc/sys/fs/pipe-max-size").read_text()),
        clock=time.time(),
        selinux=selinux_enforces(outside.root()),
    )


def version(program: str) -> str:
    """The version that `PROGRAM --version` prints, such as `4.1.1`; empty where there is no such program.

    Asked once for each file: an upgraded program is asked anew.
    """
    if (one := found(program)) is None:
        return ""
    path, file = one
    return _version(path, file.st_mtime_ns, file.st_size)


@lru_cache(maxsize=16)
def _version(path: str, _mtime: int, _size: int) -> str:
    try:
        printed = run(outside.on_node([path, "--version"]), timeout=PROGRAM_TIMEOUT, check=False).stdout
    except (CommandFailed, TimedOut):
        return ""
    number = re.search(r"\d+(?:\.\d+)+", printed)
    return number[0] if number else ""


def memory_available() -> int:
    """Bytes that the kernel could give away without swapping."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _processor(cpuinfo: str) -> tuple[str, tuple[str, ...]]:
    """The processor's model and features: x86 says `flags`, arm64 `Features`. Those of the first: kernels want equal ones."""
    first = cpuinfo.split("\n\n", 1)[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    model = fields.get("model name") or " ".join(
        f"{name} {fields[name]}" for name in ("CPU implementer", "CPU part", "CPU variant") if name in fields
    )
    return model, tuple(sorted((fields.get("flags") or fields.get("Features") or "").split()))


def has_lazy_pages() -> bool:
    """Whether CRIU can hand over page faults: a userfaultfd that reports forks, moves and removals."""
    try:
        fd = uffd.create()
    except OSError:
        return False
    try:
        return uffd.api(fd) & LAZY_FEATURES == LAZY_FEATURES
    except OSError:
        return False
    finally:
        os.close(fd)
