"""Which files of a tree may change without a trace, because a process has mapped them shared.

A store through a shared mapping sets the file's times at the first fault after the page was last cleaned, not at the
store; on tmpfs never. So the times of such a file prove nothing (`scan`).
"""

from __future__ import annotations

from pathlib import Path


def shared_files(pid: int, mount_point: bytes = b"/") -> set[bytes]:
    """The files below `mount_point` that the process has mapped shared, as paths relative to it.

    `mount_point` is the tree's place as the process sees it: `/` for the upper layer of a container, the place of the
    mount for a volume. Paths that are no part of the tree do no harm. A process that is gone has mapped nothing.
    Source of the format: proc_pid_maps(5); a newline in a name is printed as `\\012`, and so is one that is spelled so.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    prefix = mount_point.rstrip(b"/") + b"/"
    found = set()
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1].endswith(b"s") and fields[5].startswith(prefix):
            path = fields[5][len(prefix) :]
            found |= {path, path.replace(b"\\012", b"\n")}
    return found
