"""What containerd's answers mean where it fails, as errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc

from podferry.errors import Failed, PodferryError, TimedOut
from podferry.node.runtime import ContainerNotFound


class ContainerdFailed(Failed):
    """containerd answered with an error."""

    code = "PF230"


class ContainerdNotFound(ContainerdFailed, ContainerNotFound):
    """containerd knows no such container, task, snapshot or image."""

    code = "PF231"


class ContainerdAlreadyExists(ContainerdFailed):
    """containerd has a container, task or snapshot of that name already."""

    code = "PF232"


class ContainerdUnreachable(ContainerdFailed):
    """Nothing answers on containerd's socket."""

    code = "PF233"


@contextlib.contextmanager
def errors_of(doing: str, socket: Path) -> Iterator[None]:
    """gRPC's errors as ours. `doing` says what the call to the containerd at `socket` was for."""
    try:
        yield
    except grpc.RpcError as error:
        raise _translate(doing, socket, error.code(), error.details() or "") from error


def _translate(doing: str, socket: Path, code: grpc.StatusCode, details: str) -> PodferryError:
    what = f"containerd cannot {doing}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(f"containerd was too slow to {doing}", remedy="see containerd's log on this node")
    if code is grpc.StatusCode.UNAVAILABLE:
        return ContainerdUnreachable(what, why=f"{socket}: {details}", remedy="start containerd, or name its socket")
    kinds = {grpc.StatusCode.NOT_FOUND: ContainerdNotFound, grpc.StatusCode.ALREADY_EXISTS: ContainerdAlreadyExists}
    kind = kinds.get(code, ContainerdFailed)
    return kind(what, why=details or code.name, evidence=details.splitlines()[1:])
