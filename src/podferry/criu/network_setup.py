"""The moment in a restore at which a container's new network namespace is arranged: it is there, and nothing is in it yet.

CRIU runs `gated/network` as an action script. It needs nothing of the node but a shell: it says through a FIFO which process CRIU
has made, and waits for the agent's answer, while this arranges the namespace (`network`). Sockets are restored after that, so that
they find the addresses that they are bound to. The agent's end, or a failure, ends the restore before anything of the job has run.

The script is beside the package, or where the installer has put it for agents in pods (`gate` has another one of that kind): not in
the agent's own directories, since file systems such as /run are often mounted so that no program there can be run.
"""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from pathlib import Path

from podferry.errors import Failed, PodferryError, Refused
from podferry.node import network_namespace, outside
from podferry.node.netlock import Namespace

SCRIPT = Path(__file__).with_name("gated") / "network"
ON_NODE = Path("/opt/podferry/gated/network")
"""Where the installer puts it for agents in pods."""
ASKED, ANSWERED, LOCKED = "network.asked", "network.answered", "network.locked"


def settings() -> str:
    """CRIU's settings that have it call us. Raises `Refused` where the script cannot be run on this node."""
    script = ON_NODE if outside.in_pod() else SCRIPT
    seen = outside.root() / script.relative_to("/") if outside.in_pod() else script
    if not os.access(seen, os.X_OK) or (outside.in_pod() and seen.read_bytes() != SCRIPT.read_bytes()):
        raise Refused(
            "the container's network namespace cannot be made here as it was",
            why=f"{script} is missing on this node, of another version, or on a file system that runs no programs",
            remedy="run `podferry install` on the node again, or install podferry where programs can be run",
        )
    return f"action-script {script}\n"


class NetworkSetup:
    """What `gated/network` talks to, in the directory that is prepared for one container. Threads may wait in it."""

    def __init__(self, directory: Path) -> None:
        for name in (ASKED, ANSWERED, LOCKED):  # a dead agent's are of no use
            (directory / name).unlink(missing_ok=True)
        for name in (ASKED, ANSWERED):
            os.mkfifo(directory / name, 0o600)
        self._asked, self._answered = (
            os.open(directory / name, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for name in (ASKED, ANSWERED)
        )
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self.error: PodferryError | None = None
        """Why the namespace could not be arranged, where it could not."""

    @staticmethod
    def wanted(directory: Path) -> bool:
        """Whether a directory was prepared with it."""
        return (directory / ASKED).exists()

    def serve(self, images: Path) -> None:
        """Answer the questions that will come, by what the images in `images` tell. Returns at once."""
        self._thread = threading.Thread(target=self._serve, args=(images,), name="network", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let go: a restore that asks from now on fails."""
        os.eventfd_write(self._ended, 1)
        if self._thread is not None:
            self._thread.join()
        for fd in (self._asked, self._answered, self._ended):
            os.close(fd)

    def _serve(self, images: Path) -> None:
        locked: Namespace | None = None
        while (pid := self._asked_for()) is not None:
            try:
                if locked is None:
                    locked = _arrange(pid, images)
                else:
                    locked.unlock()
            except PodferryError as error:
                self.error = error
            except Exception as error:  # noqa: BLE001 - whatever it was, CRIU waits for an answer
                self.error = Failed.because("cannot arrange the container's network namespace", error)
            with suppress(OSError):
                os.write(self._answered, b"failed\n" if self.error else b"done\n")

    def _asked_for(self) -> str | None:
        """Wait for a question; None where there will be none."""
        poll = select.poll()
        poll.register(self._asked, select.POLLIN)
        poll.register(self._ended, select.POLLIN)
        if self._ended in dict(poll.poll()):
            return None
        return os.read(self._asked, 4096).decode(errors="replace").strip()


def _arrange(pid: str, images: Path) -> Namespace | None:
    """Arrange the namespace of a process; where connections come with the images, it is locked then."""
    if not pid.isdecimal():
        raise Failed("CRIU did not name the process that it has created", why=f"it says {pid!r}"[:80])
    described = images / network_namespace.IMAGE
    told = described.read_bytes() if described.exists() else b""
    network_namespace.make(network_namespace.Network.decode(told) if told else network_namespace.DEFAULT, int(pid))
    if not has_streams(images):
        return None
    namespace = Namespace.of({}, int(pid))
    (images.parent / LOCKED).touch()
    namespace.lock()
    return namespace


def has_streams(images: Path) -> bool:
    """Whether connections come with these images. CRIU sends again what waited to be sent, before the other end need be there."""
    return any(images.glob("tcp-stream-*.img"))
