"""Processes that are to run under a spec which wants them killed sooner than the source's did, when memory runs out.

The kubelet computes a container's oom_score_adj from its request of memory and its node's size, so on another node, or with other
requests, it is another. A process keeps the one that it has, and without CAP_SYS_RESOURCE none may have less than its container's
spec says: it is raised to that. What a process has beyond that stays, since it may have asked for it.
"""

from __future__ import annotations

from pathlib import Path

from podferry.core.allowed_rights import Rights
from podferry.criu.dump_images import parse_entries, write_entries
from podferry.criu.rights import MAGIC
from podferry.protos import rights_pb2 as pb


def raise_to_spec(images: Path, rights: Rights) -> int | None:
    """Raise it in these images to what the spec says. Returns that where a process had less, and None where none had. Raises
    `PeerMisbehaved` for what is no image."""
    least, raised = rights.oom_score_adj, False
    if least is None or rights.has("CAP_SYS_RESOURCE"):
        return None
    for path in sorted(images.glob("core-*.img")):
        cores = parse_entries(path, MAGIC["core"], pb.Core)
        low = [one for one in cores if one.HasField("tc") and one.tc.oom_score_adj < least]
        for one in low:
            one.tc.oom_score_adj = least
        if low:
            write_entries(path, MAGIC["core"], cores)
            raised = True
    return least if raised else None
