"""Kill -9 at every step of Prepare, Commit, publication and Remove; then everything works or is made again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import grpc
import images_crash
import pytest
from images_rig import GC, LOCAL, Rig, scratch, some_chain

from podferry.protos import snapshots_pb2 as pb
from podferry.protos import snapshots_pb2_grpc
from podferry.snapshotter import layout
from podferry.snapshotter.layer_mounts import mount_points
from podferry.snapshotter.layout import FormName
from podferry.snapshotter.snapshotter import REF

pytestmark = pytest.mark.node

T = TypeVar("T")
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["images_crash"])
EVERY = 29
"""Every how manyth step is tried in one run of the suite; odd, so before calls and after. The `slow` test tries all."""
LEASE = "2"
"""Seconds for which a lease of the dead keeps its successor waiting."""
MOST = 0.8
"""How many of the steps that are tried must be reached. A busy machine takes more of them: it looks oftener."""


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
        arguments += ["--form", self.form.value, "--no-collect", "--node", "mortal", "--lease", LEASE]
        crash_at = self.crash_at if self.deaths == 0 else 0
        self.process = FORK.Process(
            target=images_crash.serve,
            args=([str(one) for one in arguments], str(self.home / "log"), crash_at, str(self.home / "count")),
            daemon=True,
        )
        self.process.start()
        until = time.monotonic() + 60
        while True:
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(str(self.socket)) == 0:
                    break
            if not self.process.is_alive():
                self._again()
                return
            assert time.monotonic() < until, (self.home / "log").read_text()
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
            if code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN") or self.dead():
                self.revive()
                return None, "DIED"
            return None, code

    def insist(self, call: Callable[[snapshots_pb2_grpc.SnapshotsStub], T]) -> tuple[T | None, str]:
        """A call that may be made again: at most one death, then its status."""
        done, code = self.attempt(call)
        return self.attempt(call) if code == "DIED" else (done, code)

    def dead(self) -> bool:
        assert self.process is not None
        return not self.process.is_alive()

    def revive(self) -> None:
        """Start it again; it must have died, of nothing but SIGKILL, and never before."""
        self.channel.close()
        self._again()

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
        found, code = node.insist(
            lambda stub: [
                info
                for page in stub.List(pb.ListSnapshotsRequest(filters=[f'labels."{REF}"=={chain},parent=="{parent}"']))
                for info in page.info
                if info.kind == pb.COMMITTED
            ]
        )
        assert code == "OK", code
        if found:
            return str(found[0].name)
    raise AssertionError("never unpacked")


def published(node: Mortal, chains: list[str]) -> None:
    for _ in range(1000):
        with suppress(FileNotFoundError):
            if {layout.name_of(chain) for chain in chains} <= set(os.listdir(node.share / layout.LAYERS)):  # noqa: PTH208
                return
        if node.dead():
            node.revive()
        threading.Event().wait(0.02)
    raise AssertionError(f"never published:\n{(node.home / 'log').read_text()}")


def story(form: FormName, crash_at: int) -> tuple[int, bool]:
    """Two layers, a container, everything removed, with one death on the way: how many steps there were, and whether it died."""
    with scratch(LOCAL) as share, scratch(LOCAL) as home:
        Rig(home / "maker", share).close()  # a share made and probed
        node = Mortal(home, share, form, crash_at)
        chains = [some_chain(), some_chain()]
        parent = ""
        for number, chain in enumerate(chains):
            parent = unpack(node, chain, parent, number)
        published(node, chains)
        _, code = node.insist(lambda stub: stub.Prepare(pb.PrepareSnapshotRequest(key="c", parent=parent, labels=GC)))
        assert code == "OK" or (code == "ALREADY_EXISTS" and node.deaths), code
        mounts, code = node.insist(lambda stub: stub.Mounts(pb.MountsRequest(key="c")))
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
        empty(node)
        if node.dead():  # after its last answer: then it is as with any other death
            node.revive()
            empty(node)
        for folder in ("snapshots", "images", "l"):
            assert not list((home / "root" / folder).iterdir()), folder
        assert not mount_points(home / "root")
        steps = int((home / "count").read_text())
        node.stop()
        return steps, bool(node.deaths)


def empty(node: Mortal) -> None:
    """Remove every snapshot, youngest first, as containerd's garbage collector does, and clean up."""
    for _ in range(8):
        infos, code = node.insist(
            lambda stub: [info for page in stub.List(pb.ListSnapshotsRequest()) for info in page.info]
        )
        assert code == "OK", code
        assert infos is not None
        if not infos:
            break
        for info in sorted(infos, key=lambda one: one.created_at.ToNanoseconds(), reverse=True):
            _, code = node.insist(lambda stub, name=info.name: stub.Remove(pb.RemoveSnapshotRequest(key=name)))  # type: ignore[misc]
            assert code in ("OK", "NOT_FOUND", "FAILED_PRECONDITION"), code
    else:
        raise AssertionError("never empty")
    _, code = node.insist(lambda stub: stub.Cleanup(pb.CleanupRequest()))
    assert code == "OK", code


def die_at(form: FormName, steps: range) -> None:
    """A death at each of these steps. A step that a run does not reach lies in its last part, which varies."""
    reached = [step for step in steps if story(form, step)[1]]
    assert len(reached) >= MOST * len(steps), f"only {len(reached)} of {len(steps)} steps were reached"


@pytest.mark.parametrize("before", ["_owner_of", "create"])
@pytest.mark.parametrize("form", list(FormName))
def test_a_layer_moves_to_the_share_in_the_middle_of_a_prepare(
    form: FormName, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy on disk is deleted then, unless a container may have mounted it."""
    with scratch(LOCAL) as share, scratch(LOCAL) as home:
        rig = Rig(home / "node", share, form=form)
        chain = some_chain()
        (mount,) = rig.prepare("layer", labels={**GC, REF: chain})
        (Path(mount.source) / "file").write_text(chain)
        rig.commit("base", "layer", {**GC, REF: chain})
        owner = rig.snapshotter if before == "_owner_of" else rig.metadata
        moved = []
        original = getattr(owner, before)

        def after_the_move(*args: Any) -> Any:
            if not moved:
                moved.append(rig.publisher.publish_all())
            return original(*args)

        monkeypatch.setattr(owner, before, after_the_move)
        mounts = rig.prepare("container", "base")
        assert moved == [True]
        assert not list((rig.root / "snapshots").glob(f"{rig.metadata.get('base').id}/fs/file"))
        with rig.mounted(mounts) as at:
            assert (at / "file").read_text() == chain
        rig.close()


@pytest.fixture(scope="module")
def steps() -> dict[FormName, int]:
    return {form: story(form, 0)[0] for form in FormName}


@pytest.mark.parametrize("form", list(FormName))
def test_killed_at_a_step_everything_works_or_is_made_again(form: FormName, steps: dict[FormName, int]) -> None:
    assert steps[form] > 60
    die_at(form, range(1, steps[form], EVERY))


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FormName))
def test_killed_at_every_step(form: FormName, steps: dict[FormName, int]) -> None:
    die_at(form, range(1, steps[form]))
