"""Kill -9 at every step of Prepare, Commit, publication and Remove; then everything works or is made again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import grpc
import images_crash
import pytest
from images_rig import GC, LOCAL, Rig, scratch, some_chain

from podferry.images import layout
from podferry.images.layout import FormName
from podferry.images.mounts import mount_points
from podferry.images.snapshotter import REF
from podferry.protos import snapshots_pb2 as pb
from podferry.protos import snapshots_pb2_grpc

pytestmark = pytest.mark.node

T = TypeVar("T")
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["images_crash"])
EVERY = 12
"""Every how manyth step is tried in one run of the suite; the other steps are those of the `slow` test."""


class Mortal:
    """A snapshotter in a process of its own that may die at any call, and a containerd that goes on as containerd does."""

    def __init__(self, home: Path, share: Path, form: FormName, crash_at: int) -> None:
        self.home, self.share, self.form = home, share, form
        self.crash_at = crash_at
        self.deaths = 0
        self.socket = home / "s"
        self.process: BaseProcess | None = None
        self.start()

    def start(self) -> None:
        arguments = ["--share", self.share, "--root", self.home / "root", "--socket", self.socket]
        arguments += ["--form", self.form.value, "--no-collect", "--node", "mortal"]
        crash_at = self.crash_at if self.deaths == 0 else 0
        self.process = FORK.Process(
            target=images_crash.serve,
            args=([str(one) for one in arguments], str(self.home / "log"), crash_at, str(self.home / "count")),
            daemon=True,
        )
        self.process.start()
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(str(self.socket)) == 0:
                    break
            if not self.process.is_alive():
                self._again()
                return
            threading.Event().wait(0.02)
        self.channel = grpc.insecure_channel(f"unix://{self.socket}")
        self.stub = snapshots_pb2_grpc.SnapshotsStub(self.channel)

    def _again(self) -> None:
        assert self.process is not None
        self.process.join(10)
        assert self.process.exitcode == -9, (self.home / "log").read_text()
        self.deaths += 1
        assert self.deaths == 1
        self.socket.unlink(missing_ok=True)
        self.start()

    def attempt(self, call: Callable[[snapshots_pb2_grpc.SnapshotsStub], T]) -> tuple[T | None, str]:
        """One call; its status. A dead snapshotter is started again."""
        try:
            return call(self.stub), "OK"
        except grpc.RpcError as error:
            code = str(error.code().name)
            if code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN") and self.process is not None:
                self.process.join(10)
                self.channel.close()
                self._again()
                return None, "DIED"
            return None, code

    def stop(self) -> None:
        assert self.process is not None
        self.channel.close()
        self.process.terminate()
        self.process.join(20)


def unpack(node: Mortal, chain: str, parent: str, number: int) -> str:
    """What containerd's unpacker does for one layer, until it is there; its backend name."""
    for attempt in range(4):
        key = f"k/{number}/extract-{attempt} {chain}"
        labels = {**GC, REF: chain}
        made, code = node.attempt(
            lambda stub: stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=parent, labels=labels))  # noqa: B023
        )
        if code == "OK":
            assert made is not None
            source = made.mounts[0].source
            if made.mounts[0].type == "overlay":
                source = next(o for o in made.mounts[0].options if o.startswith("upperdir=")).partition("=")[2]
            (Path(source) / f"file-{number}").write_text(chain)
            (Path(source) / "shared").write_text(str(number))
            name = f"k/{number}/{chain}"
            node.attempt(lambda stub: stub.Commit(pb.CommitSnapshotRequest(name=name, key=key, labels=labels)))  # noqa: B023
        elif code == "DIED":
            node.attempt(lambda stub: stub.Remove(pb.RemoveSnapshotRequest(key=key)))  # noqa: B023
        found, code = node.attempt(
            lambda stub: [
                info
                for page in stub.List(pb.ListSnapshotsRequest(filters=[f'labels."{REF}"=={chain},parent=="{parent}"']))
                for info in page.info
                if info.kind == pb.COMMITTED
            ]
        )
        if found:
            return str(found[0].name)
    raise AssertionError("never unpacked")


def published(node: Mortal, chains: list[str]) -> None:
    for _ in range(1000):
        with suppress(FileNotFoundError):
            if {layout.name_of(chain) for chain in chains} <= set(os.listdir(node.share / layout.LAYERS)):  # noqa: PTH208
                return
        if node.process is not None and not node.process.is_alive():
            node.channel.close()
            node._again()
        threading.Event().wait(0.02)
    raise AssertionError(f"never published:\n{(node.home / 'log').read_text()}")


def story(form: FormName, crash_at: int) -> int:
    """Two layers, a container, everything removed, with one death on the way; how many steps there were."""
    with scratch(LOCAL) as share, scratch(LOCAL) as home:
        Rig(home / "maker", share).close()  # a share made and probed
        node = Mortal(home, share, form, crash_at)
        chains = [some_chain(), some_chain()]
        parent = ""
        for number, chain in enumerate(chains):
            parent = unpack(node, chain, parent, number)
        published(node, chains)
        for _ in range(3):
            _, code = node.attempt(
                lambda stub: stub.Prepare(pb.PrepareSnapshotRequest(key="c", parent=parent, labels=GC))
            )
            if code in ("OK", "ALREADY_EXISTS"):
                break
        node.attempt(lambda stub: stub.Mounts(pb.MountsRequest(key="c")))
        mounts, code = node.attempt(lambda stub: stub.Mounts(pb.MountsRequest(key="c")))
        assert code == "OK", code
        assert mounts is not None
        reader = Rig(home / "reader", share, name="reader")
        with reader.mounted(list(mounts.mounts)) as at:
            assert (at / "file-0").read_text() == chains[0]
            assert (at / "file-1").read_text() == chains[1]
            assert (at / "shared").read_text() == "1"
        for chain in chains:  # every file of every layer
            layer = reader.store.find(chain)
            assert layer is not None
            reader.store.check(layer)
        reader.close()
        for _ in range(8):
            infos, code = node.attempt(
                lambda stub: [info for page in stub.List(pb.ListSnapshotsRequest()) for info in page.info]
            )
            if code == "OK" and not infos:
                break
            for info in sorted(infos or [], key=lambda one: one.created_at.ToNanoseconds(), reverse=True):
                node.attempt(lambda stub, name=info.name: stub.Remove(pb.RemoveSnapshotRequest(key=name)))  # type: ignore[misc]
        node.attempt(lambda stub: stub.Cleanup(pb.CleanupRequest()))
        node.attempt(lambda stub: stub.Cleanup(pb.CleanupRequest()))
        for folder in ("snapshots", "images", "l"):
            assert not list((home / "root" / folder).iterdir()), folder
        assert not mount_points(home / "root")
        if crash_at:
            assert node.deaths == 1, "the step was never reached"
        node.stop()
        return int((home / "count").read_text())


@pytest.fixture(scope="module")
def steps() -> dict[FormName, int]:
    return {form: story(form, 0) for form in FormName}


@pytest.mark.parametrize("form", list(FormName))
def test_killed_at_a_step_everything_works_or_is_made_again(form: FormName, steps: dict[FormName, int]) -> None:
    assert steps[form] > 60
    for step in range(1, steps[form] - 8, EVERY):
        story(form, step)


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FormName))
def test_killed_at_every_step(form: FormName, steps: dict[FormName, int]) -> None:
    for step in range(1, steps[form] - 8):
        story(form, step)
