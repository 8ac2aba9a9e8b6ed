"""containerd's snapshot service over gRPC: requests in, answers and status codes out."""

# ruff: noqa: N802  (the names are gRPC's)

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from podferry.errors import PodferryError, UsageError
from podferry.node.containerd import LAYER_STAYS
from podferry.protos import snapshots_pb2 as pb
from podferry.protos import snapshots_pb2_grpc, types_pb2
from podferry.snapshotter.faults import (
    LayerExchanged,
    LayerMissing,
    ShareFull,
    ShareHung,
    ShareReadOnly,
    ShareUnavailable,
)
from podferry.snapshotter.metadata import SnapshotExists, SnapshotInUse, SnapshotInvalid, SnapshotMissing
from podferry.snapshotter.publisher import STAYS
from podferry.snapshotter.snapshot_row import SnapshotRow
from podferry.snapshotter.snapshotter import PreparedMount, Snapshotter

T = TypeVar("T")
log = structlog.get_logger()

PAGE = 100  # snapshots in one message of a list
LONGEST_REASON = 240  # characters in a label
SAID = 2  # lines of what a command said, in an error that containerd passes on
STATUS = {
    SnapshotMissing: grpc.StatusCode.NOT_FOUND,
    SnapshotExists: grpc.StatusCode.ALREADY_EXISTS,
    SnapshotInUse: grpc.StatusCode.FAILED_PRECONDITION,
    SnapshotInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    LayerMissing: grpc.StatusCode.FAILED_PRECONDITION,
    LayerExchanged: grpc.StatusCode.FAILED_PRECONDITION,
    ShareUnavailable: grpc.StatusCode.UNAVAILABLE,
    ShareHung: grpc.StatusCode.UNAVAILABLE,
    ShareReadOnly: grpc.StatusCode.UNAVAILABLE,
    ShareFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""containerd turns the codes back into its own errors, so they are part of the contract."""


class Service(snapshots_pb2_grpc.SnapshotsServicer):
    """Every call goes to a `Snapshotter`; `observe` is told each call's name and outcome."""

    def __init__(self, snapshotter: Snapshotter, observe: Callable[[str, str], None] = lambda call, code: None) -> None:
        self.snapshotter = snapshotter
        self.observe = observe

    def Prepare(self, request: pb.PrepareSnapshotRequest, context: grpc.ServicerContext) -> pb.PrepareSnapshotResponse:
        stop = threading.Event()
        context.add_callback(stop.set)
        made = self._do(
            "Prepare",
            context,
            lambda: self.snapshotter.prepare(request.key, request.parent, dict(request.labels), stop),
        )
        return pb.PrepareSnapshotResponse(mounts=map(_mount, made))

    def View(self, request: pb.ViewSnapshotRequest, context: grpc.ServicerContext) -> pb.ViewSnapshotResponse:
        made = self._do(
            "View", context, lambda: self.snapshotter.view(request.key, request.parent, dict(request.labels))
        )
        return pb.ViewSnapshotResponse(mounts=map(_mount, made))

    def Mounts(self, request: pb.MountsRequest, context: grpc.ServicerContext) -> pb.MountsResponse:
        made = self._do("Mounts", context, lambda: self.snapshotter.mounts(request.key))
        return pb.MountsResponse(mounts=map(_mount, made))

    def Commit(self, request: pb.CommitSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        self._do(
            "Commit",
            context,
            lambda: self.snapshotter.commit(request.name, request.key, dict(request.labels), request.parent),
        )
        return Empty()

    def Remove(self, request: pb.RemoveSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        self._do("Remove", context, lambda: self.snapshotter.remove(request.key))
        return Empty()

    def Stat(self, request: pb.StatSnapshotRequest, context: grpc.ServicerContext) -> pb.StatSnapshotResponse:
        found = self._do("Stat", context, lambda: self.snapshotter.stat(request.key))
        return pb.StatSnapshotResponse(info=_info(found))

    def Update(self, request: pb.UpdateSnapshotRequest, context: grpc.ServicerContext) -> pb.UpdateSnapshotResponse:
        found = self._do(
            "Update",
            context,
            lambda: self.snapshotter.update(
                request.info.name, dict(request.info.labels), list(request.update_mask.paths)
            ),
        )
        return pb.UpdateSnapshotResponse(info=_info(found))

    def List(
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListSnapshotsResponse]:
        found = self._do("List", context, lambda: self.snapshotter.walk(list(request.filters)))
        for start in range(0, len(found), PAGE):
            yield pb.ListSnapshotsResponse(info=map(_info, found[start : start + PAGE]))

    def Usage(self, request: pb.UsageRequest, context: grpc.ServicerContext) -> pb.UsageResponse:
        size, inodes = self._do("Usage", context, lambda: self.snapshotter.usage(request.key))
        return pb.UsageResponse(size=size, inodes=inodes)

    def Cleanup(self, request: pb.CleanupRequest, context: grpc.ServicerContext) -> Empty:
        self._do("Cleanup", context, self.snapshotter.cleanup)
        return Empty()

    def _do(self, call: str, context: grpc.ServicerContext, function: Callable[[], T]) -> T:
        try:
            result = function()
        except PodferryError as error:
            code = next((code for kind, code in STATUS.items() if isinstance(error, kind)), grpc.StatusCode.UNKNOWN)
            if not isinstance(error, SnapshotExists | SnapshotMissing):
                log.warning("call failed", call=call, code=error.code, why=str(error))
            self._fail(call, context, code, _sentence(error))
        except OSError as error:
            log.error("call failed on this node's disk", call=call, why=str(error))
            self._fail(call, context, grpc.StatusCode.INTERNAL, str(error))
        self.observe(call, "OK")
        return result

    def _fail(self, call: str, context: Any, code: grpc.StatusCode, text: str) -> NoReturn:
        self.observe(call, code.name)
        context.abort(code, text)
        raise AssertionError("abort raises")


def _sentence(error: PodferryError) -> str:
    """An error in one line, as it appears in a pod's events."""
    said = "".join(f"; {line.strip()}" for line in error.evidence[-SAID:])
    return f"podferry {error.code}: {error}{said}" + (f" (what to do: {error.remedy})" if error.remedy else "")


def _mount(mount: PreparedMount) -> types_pb2.Mount:
    return types_pb2.Mount(type=mount.type, source=mount.source, options=mount.options)


def _info(snapshot: SnapshotRow) -> pb.Info:
    return pb.Info(
        name=snapshot.name,
        parent=snapshot.parent,
        kind=int(snapshot.kind),  # type: ignore[arg-type]  # the stubs want their own enum
        created_at=_timestamp(snapshot.created),
        updated_at=_timestamp(snapshot.updated),
        labels=_labels(snapshot),
    )


def _labels(snapshot: SnapshotRow) -> dict[str, str]:
    """Its labels, and one of ours on a layer that is not shared: why not, for who asks on behalf of another node."""
    stays = snapshot.note.startswith(STAYS)
    return (
        {**snapshot.labels, LAYER_STAYS: snapshot.note.removeprefix(STAYS)[:LONGEST_REASON]}
        if stays
        else snapshot.labels
    )


def _timestamp(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)
