"""`podferry-snapshotter`: options in, a running service out."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Annotated

import grpc
import structlog
import typer

from podferry.errors import PodferryError
from podferry.fs.private import private_directory
from podferry.node import own_tmpfs
from podferry.protos import snapshots_pb2_grpc
from podferry.snapshotter import layout
from podferry.snapshotter.collect import DAY, Collector
from podferry.snapshotter.deadlines import Guard
from podferry.snapshotter.erofs import ErofsForm
from podferry.snapshotter.faults import ShareRefused
from podferry.snapshotter.grpc_service import Service
from podferry.snapshotter.housekeeping import Housekeeping
from podferry.snapshotter.kept import LayerWatch
from podferry.snapshotter.layer_mounts import mounted_read_only
from podferry.snapshotter.layer_ports import SystemClock
from podferry.snapshotter.layout import FormName
from podferry.snapshotter.leases import Leases
from podferry.snapshotter.metadata import Metadata
from podferry.snapshotter.metrics import Metrics
from podferry.snapshotter.opening import open_share
from podferry.snapshotter.posix import PosixShare
from podferry.snapshotter.prefetch import Prefetcher
from podferry.snapshotter.publisher import Publisher
from podferry.snapshotter.references import References
from podferry.snapshotter.snapshot_row import Home
from podferry.snapshotter.snapshotter import Snapshotter
from podferry.snapshotter.store import LayerStore
from podferry.snapshotter.tree import TreeForm
from podferry.wire.metrics_server import serve_metrics

SOCKET = Path("/run/podferry/snapshotter.sock")
ROOT = Path("/var/lib/podferry/snapshotter")
NICE = 10
CALLS = 64  # at once: pulls that wait for another node hold one each

log = structlog.get_logger()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    share: Annotated[str, typer.Option(metavar="PATH", help="where the share is mounted")],  # typer looks at a Path
    socket_path: Annotated[Path, typer.Option("--socket", help="the socket that containerd is told of")] = SOCKET,
    root: Annotated[Path, typer.Option(help="the node's own disk")] = ROOT,
    form: Annotated[FormName, typer.Option(help="how layers are put on the share")] = FormName.EROFS,
    node: Annotated[str, typer.Option(help="this node's name on the share")] = "",
    lease: Annotated[float, typer.Option(help="seconds after which a silent publisher counts as dead")] = 30.0,
    wait: Annotated[float, typer.Option(help="seconds to wait for another node's layer at most")] = 60.0,
    deadline: Annotated[float, typer.Option(help="seconds after which the share counts as hung")] = 15.0,
    read_only: Annotated[
        bool, typer.Option(help="use the share's layers, add none; so does a node that has it mounted read-only")
    ] = False,
    collect: Annotated[bool, typer.Option(help="remove layers that no node has noted as used")] = False,
    grace: Annotated[float, typer.Option(help="seconds for which an unused layer is kept")] = DAY,
    metrics_port: Annotated[int, typer.Option(help="serve Prometheus metrics on this port of 127.0.0.1; 0: no")] = 0,
) -> None:
    """Serve containerd snapshots whose layers lie once on a file system that every node mounts."""
    metrics = Metrics()
    root = root.resolve()
    private_directory(root, below=root)
    metadata = Metadata(root / "metadata.db")
    clock = SystemClock()
    read_only = read_only or mounted_read_only(Path(share).absolute())
    opened = _open(Path(share).absolute(), Guard(deadline), metadata, read_only=read_only)
    name = layout.check_node(node or os.environ.get("NODE_NAME", "") or socket.gethostname())
    instance = metadata.fact("instance", layout.new_token)
    store = LayerStore(
        opened,
        clock,
        References(opened, clock, name, instance, _on_share(metadata)),
        Leases(opened, clock, name, lease),
        forms={FormName.DIR: TreeForm(opened), FormName.EROFS: ErofsForm(opened, root / "scratch")},
        form=form,
        read_only=read_only,
    )
    publisher = Publisher(root, metadata, store, published=metrics.layer_published, failed=metrics.failed)
    snapshotter = Snapshotter(root, metadata, store, publisher, wait=wait)
    collector = Collector(opened, clock, grace=grace) if collect else None
    prefetcher = Prefetcher(opened, lambda: _on_share(metadata), read_only, metrics.prefetched.inc)
    snapshotter.starting = prefetcher.starting
    publisher.pulling = snapshotter.unpacking
    housekeeping = Housekeeping(opened, publisher, collector, prefetcher, metrics)
    watch = LayerWatch(opened, store, snapshotter.kept, lambda: _on_share(metadata), metrics.failed)
    snapshotter.cleanup()
    server = grpc.server(ThreadPoolExecutor(CALLS, thread_name_prefix="call"), maximum_concurrent_rpcs=4 * CALLS)
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(Service(snapshotter, metrics.called), server)  # type: ignore[no-untyped-call]
    listen(server, socket_path)
    if metrics_port:
        serve_metrics(f"127.0.0.1:{metrics_port}", metrics.registry)
    for part in (_in_the_background(publisher.run), housekeeping.run, prefetcher.run, _in_the_background(watch.run)):
        threading.Thread(target=part, name=part.__qualname__, daemon=True).start()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    role = "reader" if read_only else "publisher"
    log.info(
        "ready",
        socket=str(socket_path),
        share=str(opened.root),
        share_id=opened.id,
        node=name,
        role=role,
        form=form.value,
    )
    stop.wait()
    publisher.stop()
    housekeeping.stop()
    prefetcher.stop()
    watch.stop()
    server.stop(5.0).wait()
    metadata.close()


def listen(server: grpc.Server, socket_path: Path) -> None:
    """Have `server` answer at `socket_path`, which only root reaches.

    Once there is a socket, nothing can be mounted over it, and neither the agent nor the installer would have a tmpfs of its own.
    """
    if socket_path.parent == Path(own_tmpfs.RUN) and (why := own_tmpfs.ensure(socket_path.parent)):
        log.warning("memory on its way shares its file system with others", why=why)
    private_directory(socket_path.parent, below=socket_path.parent)
    socket_path.unlink(missing_ok=True)
    server.add_insecure_port(f"unix://{socket_path}")
    socket_path.chmod(0o600)


def _in_the_background(work: Callable[[], None]) -> Callable[[], None]:
    """Work that leaves the processors to others, such as the pull whose layers it publishes."""

    @wraps(work)
    def nicely() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # of this thread, and of what it starts
        work()

    return nicely


def _on_share(metadata: Metadata) -> list[str]:
    """The layers that this node has from the share, by chain id."""
    return [layer.chain for layer in metadata.layers(Home.SHARE) if layer.chain]


def _open(root: Path, guard: Guard, metadata: Metadata, *, read_only: bool) -> PosixShare:
    """The share, if need be as one that does not answer yet: a node starts without it where it has used it before."""
    known = metadata.recall("share")
    try:
        share = open_share(root, guard=guard, read_only=read_only)
    except PodferryError as error:
        if known is None:
            raise
        log.warning("starting without the share", code=error.code, why=str(error))
        return PosixShare(root, known, guard)
    if metadata.fact("share", lambda: share.id) != share.id:
        raise ShareRefused(
            f"{root} is not the share that holds this node's images",
            why=f"it is {share.id}, not {known}",
            remedy="mount the right share, or use another --root for this one",
        )
    return share


def main() -> None:
    """The program `podferry-snapshotter`."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        app()
    except PodferryError as error:
        print(error.report(), file=sys.stderr)
        sys.exit(1)
