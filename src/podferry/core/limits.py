"""Limits on the resources of an agent that one migration may take: they bound the agent's memory whatever a container does.

Each limit is far above what jobs have, and is checked where the thing is counted. What is beyond it is refused with the limit's
name; a peer that sends more breaks the protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

from podferry.errors import Refused


class TooMuch(Refused):
    """The container has more of something than may move."""

    code = "PF115"


@dataclass(frozen=True)
class Limit:
    """So much of it and no more; `each` is what one costs the agent, in bytes of memory, 0 where it is streamed."""

    what: str
    most: int
    each: int
    remedy: str

    def beyond(self, found: int, where: str = "the container") -> TooMuch | None:
        """Why not, where there is more."""
        if found <= self.most:
            return None
        return TooMuch(
            f"{where} has too many {self.what} to move", why=f"{found}; {self.most} may move", remedy=self.remedy
        )

    def demand(self, found: int, where: str = "the container") -> None:
        """Raise `TooMuch` where there is more."""
        if much := self.beyond(found, where):
            raise much


FILES = Limit(
    "files and directories that it changed, or has in one volume",
    500_000,
    733,
    "keep fewer files in the container's own layer or in an emptyDir: on a volume that both nodes have they need not move",
)
IMAGE = Limit("bytes in one of CRIU's images", 1 << 34, 0, "use less shared memory, or fewer and smaller deleted files")
PARSED_IMAGE = Limit(
    "bytes in one of CRIU's images that is read as a whole: of open files, mappings, mounts or processes",
    96 << 20,
    8,
    "have the job open fewer files, or map fewer",
)
TERMINATION_MESSAGE = Limit(
    "bytes in its termination message, of which the kubelet reads 4096",
    1 << 20,
    2,
    "do not write anything else to /dev/termination-log",
)
OPEN_PAYLOADS = Limit(
    "bytes that it has open of one ConfigMap, Secret or token", 64 << 20, 3, "have the job close files of the volume"
)

TABLE = (FILES, IMAGE, PARSED_IMAGE, TERMINATION_MESSAGE, OPEN_PAYLOADS)

STREAMED_IMAGES = ("pages-", "tmpfs-", "ghost-file-", "pipes-data", "fifo-data", "sk-queues")
"""Prefixes of the names of images that may be large and that podferry never reads as a whole."""


def of_image(name: str) -> Limit:
    """The limit for CRIU's image of this name."""
    return IMAGE if name.startswith(STREAMED_IMAGES) else PARSED_IMAGE
