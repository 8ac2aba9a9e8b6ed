"""The small parts of which moves of pods are made: numbers, journals, offers, what containerd's records say."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.core.undo import Ledger
from podferry.engine.journal import JOURNAL, Journal, Part
from podferry.engine.ports import IMAGES, LOG, DirtySet, is_log
from podferry.errors import Failed, PeerMisbehaved, UsageError
from podferry.lazypages.page_source import Frame, Word
from podferry.memory.ranges import Runs
from podferry.node import cri
from podferry.node.containerd import Containerd
from podferry.node.cri import SharedMountKind, Volume
from podferry.node.records import Container, Opaque, PodContainer
from podferry.node.upper import copy
from podferry.wire.messages import AddressSpaceSum, FileSum, StateEnd, TreeSum
from podferry.workload.makers import kubelet
from podferry.workload.numbers import (
    address_space_of,
    container_of_address_space,
    container_of_directory,
    demand_known,
    directory_of,
)
from podferry.workload.offered import OfferedPod, PodPart
from podferry.workload.page_channel import DaemonPageChannel
from podferry.workload.pod.cluster_port import PodName
from podferry.workload.source import union
from podferry.workload.target import TargetWorkload
from podferry.workload.target_container import demand_whole

pytestmark = pytest.mark.unit

PARTS, PIDS = st.integers(0, 63), st.integers(1, (1 << 22) - 1)
RUNS = st.lists(st.integers(0, 40), max_size=4).map(
    lambda pages: Runs((n * 4096, (n + 1) * 4096) for n in sorted(set(pages)))
)
ADDRESS_SPACES = st.dictionaries(PIDS, RUNS, max_size=3)
UID = "0f8a1c9e-1111-4222-8333-444455556666"


@given(PARTS, PIDS)
def test_spaces_are_told_apart_and_fit_the_wire(part: int, pid: int) -> None:
    assert container_of_address_space(address_space_of(part, pid)) == (part, pid)
    assert address_space_of(part, pid) < 1 << 32
    assert address_space_of(0, pid) == pid, "the first container is numbered as one alone"


@given(PARTS, st.sampled_from([0, 1]))
def test_directories_are_told_apart(part: int, directory: int) -> None:
    assert container_of_directory(directory_of(part, directory)) == part
    assert is_log(directory_of(part, directory)) == bool(directory)
    assert directory_of(part, directory) < 256


@given(st.lists(st.builds(DirtySet, ADDRESS_SPACES, ADDRESS_SPACES), min_size=1, max_size=4))
def test_what_was_found_in_each_container_is_looked_up_in_one(changes: list[DirtySet]) -> None:
    def numbered(part: int, address_spaces: dict[int, Runs]) -> dict[int, Runs]:
        return {address_space_of(part, pid): runs for pid, runs in address_spaces.items()}

    found = [DirtySet(numbered(n, one.written), numbered(n, one.dropped)) for n, one in enumerate(changes)]  # type: ignore[arg-type]
    all_of_it = union(found)
    assert all_of_it.bytes == sum(one.bytes for one in changes)
    for one in found:
        assert one.written.items() <= all_of_it.written.items()
        assert one.dropped.items() <= all_of_it.dropped.items()


END = StateEnd(
    "m",
    (FileSum(0, "a", 1, "x"), FileSum(1, "log", 7, ""), FileSum(2, "a", 2, "y"), FileSum(3, "log", 8, "")),
    (AddressSpaceSum(address_space_of(0, 1), 3), AddressSpaceSum(address_space_of(1, 1), 4)),
    (TreeSum(0, 1, 1, "p"), TreeSum(1, 2, 2, "q"), TreeSum(2, 3, 3, "volume")),
)


@pytest.mark.parametrize(("containers", "trees"), [(1, 3), (2, 2)])
def test_the_end_speaks_of_no_container_or_tree_that_there_is_not(containers: int, trees: int) -> None:
    demand_known(END, 2, 3)
    with pytest.raises(PeerMisbehaved):
        demand_known(END, containers, trees)


class Tree:
    """What a receiver says that came."""

    def __init__(self, *came: Any) -> None:
        self.came = SimpleNamespace(**dict(zip(("entries", "bytes", "digest"), came, strict=True)))

    def finish(self) -> Any:
        return self.came


@pytest.mark.parametrize(
    ("receiver", "number"),
    [(Tree(1, 1, "p"), 1), (Tree(1, 2, "q"), 1), (Tree(2, 2, "p"), 1), (Tree(2, 2, "q"), 4), (None, 1)],
)
def test_a_tree_that_is_not_what_the_end_says_did_not_arrive_whole(receiver: Any, number: int) -> None:
    """Nor is one whole of which the end says nothing."""
    demand_whole(Tree(2, 2, "q"), 1, END, "the upper layer")  # type: ignore[arg-type]
    with pytest.raises(Failed, match="did not arrive whole"):
        demand_whole(receiver, number, END, "the upper layer")


class Received:
    """A container that takes what it is given."""

    def __init__(self) -> None:
        self.took: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **_: self.took.append((name, *args))


def test_what_arrives_goes_to_the_container_of_its_number(tmp_path: Path) -> None:
    containers, data = [Received(), Received()], memoryview(b"x")
    workload = TargetWorkload(None, Journal(tmp_path / "m"), containers, None)  # type: ignore[arg-type]
    workload.pages(1, address_space_of(1, 7), 4096, data)
    workload.drop(address_space_of(0, 7), 0, 4096)
    workload.tree(1, data)
    workload.log(directory_of(1, LOG), 3, data)
    workload.image(directory_of(1, IMAGES), "a", 0, data, last=True)
    assert containers[0].took == [("drop", 7, 0, 4096)]
    assert containers[1].took == [
        ("pages", 1, 7, 4096, data), ("tree", data), ("log", 3, data), ("image", "a", 0, data)
    ]  # fmt: skip
    for strange in (
        lambda: workload.pages(1, address_space_of(2, 7), 4096, data),
        lambda: workload.tree(2, data),
        lambda: workload.log(directory_of(2, LOG), 0, data),
    ):
        with pytest.raises(PeerMisbehaved):
            strange()


def test_the_files_of_volumes_are_part_of_what_was_promised(tmp_path: Path) -> None:
    taken: list[int] = []

    def take(*, disk: int) -> None:
        taken.append(disk)

    promise: Any = SimpleNamespace(take=take)
    workload = TargetWorkload(None, Journal(tmp_path / "m"), [], None, promise=promise)  # type: ignore[arg-type]
    workload._volumes = [SimpleNamespace(receiver=SimpleNamespace(feed=lambda record: None))]  # type: ignore[list-item]
    workload.tree(0, memoryview(b"record"))
    assert taken == [6]


def test_a_part_of_a_journal_keeps_to_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m")
    journal.note(postcopy=True)
    first, second = Part(journal, 0), Part(journal, 1)
    first.acquire("freeze", cgroup="a")
    second.acquire("freeze", cgroup="b")
    second.note(container="c1")
    assert (first.held("freeze"), second.held("freeze")) == ({"cgroup": "a"}, {"cgroup": "b"})
    assert (first.facts.get("container"), second.facts["container"], second.facts["postcopy"]) == (None, "c1", True)
    first.release("freeze")
    assert (first.held("freeze"), second.held("freeze")) == (None, {"cgroup": "b"})
    journal.close()
    again = Journal(tmp_path / "m")
    again.close()
    assert Part(again, 1).held("freeze") == {"cgroup": "b"}
    assert first.directory.name == "m.0"


@pytest.mark.parametrize(
    ("head", "facts", "suffix"),
    [
        ([{"format": 3}], {"offered": {"record": ""}}, ".0"),
        ([{"format": 2}], {"offered": {"record": ""}}, ""),
        ([], {"offered": {"record": ""}}, ""),
        ([{"format": 2}], {"offered": {"pod": {}}}, ".0"),
        ([{"format": 2}], {"pod": {}}, ".0"),
    ],
)
def test_the_journal_of_a_version_before_has_no_number_for_a_container_alone(
    head: list[dict[str, Any]], facts: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    """A migration that the version before began is taken up: what it holds is found, and its places are those that it made."""
    lines = [*head, {"t": 1.0, "facts": facts}, {"t": 2.0, "acquire": f"freeze{suffix}", "with": {"cgroup": "a"}}]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = Journal(tmp_path / "m")
    part = Part(journal, 0)
    assert part.held("freeze") == {"cgroup": "a"}
    assert part.directory.name == f"m{suffix}"
    part.note(released=True)
    part.release("freeze")
    journal.close()
    again = Journal(tmp_path / "m")
    again.close()
    assert Part(again, 0).facts["released"] is True
    assert again.ledger.entries == []


@pytest.mark.anyio
async def test_what_the_containers_of_a_pod_hold_is_taken_back_by_one_handler_and_struck_out_by_one_word() -> None:
    ledger, taken = Ledger(), []

    async def thaw(facts: Any) -> None:
        taken.append(facts["at"])

    for kind, at in (("freeze.0", 0), ("freeze.1", 1), ("held-dump.1", 2)):
        ledger.add(kind, {"at": at})
    ledger.remove("held-dump")
    assert [entry.kind for entry in ledger.entries] == ["freeze.0", "freeze.1"]
    assert await ledger.unwind({"freeze": thaw}) == []
    assert taken == [1, 0]


OFFERED = OfferedPod(
    PodName("ns", "job", UID),
    (PodPart("main", "c0", ("--file-locks",)), PodPart("side", "c1", ())),
    (Volume("data", SharedMountKind.DISK), Volume("data", SharedMountKind.MEMORY)),
)


def test_an_offer_of_a_pod_travels() -> None:
    assert OfferedPod.from_dict(json.loads(json.dumps(OFFERED.to_dict())), "ns/job") == OFFERED


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pod", {"namespace": "ns", "name": "other", "uid": UID}),
        ("pod", {"namespace": "ns", "name": "job", "uid": "../../x"}),
        ("containers", []),
        ("containers", [{"name": "a/b", "id": "c", "flags": []}]),
        ("containers", [{"name": "a", "id": "c", "flags": []}] * 2),
        ("containers", [{"name": "a", "id": "c", "flags": ["--evil"]}]),
        ("containers", [{"name": f"a{n}", "id": "c", "flags": []} for n in range(65)]),
        ("volumes", [{"name": "v", "kind": "tape"}]),
        ("volumes", [{"name": "v", "kind": "disk"}] * 2),
    ],
)
def test_what_is_no_offer_of_a_pod_is_refused(field: str, value: Any) -> None:
    with pytest.raises(PeerMisbehaved):
        OfferedPod.from_dict({**OFFERED.to_dict(), field: value}, "ns/job")


def bound(*binds: tuple[str, str], **linux: Any) -> dict[str, Any]:
    mounts = [{"source": source, "destination": at, "type": "bind", "options": ["rbind"]} for source, at in binds]
    return {"mounts": mounts, "linux": linux}


def test_what_is_a_pods_own_and_what_is_its_nodes(tmp_path: Path) -> None:
    pod = tmp_path / "pods" / UID
    empty, partly = pod / "volumes/kubernetes.io~empty-dir/data", pod / "volume-subpaths/data/main/0"
    shm = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/s/shm"
    for directory in (empty, partly):
        directory.mkdir(parents=True)
    spec = bound(
        (str(empty), "/data"),
        (str(pod / "etc-hosts"), "/etc/hosts"),
        (str(partly), "/part"),
        (str(pod / "containers/main/1a2b"), "/dev/termination-log"),
        (shm, "/dev/shm"),
        ("/srv/models", "/models"),
    )
    assert [one.source for one in cri.foreign_binds(spec, UID, tmp_path)] == ["/srv/models"]
    assert list(cri.sub_paths_of_empty_dirs(spec, UID, tmp_path)) == ["data"]
    assert cri.volumes([spec], UID, tmp_path) == (
        (Volume("data", SharedMountKind.DISK), empty),
        (Volume("shm", SharedMountKind.SHM), Path(shm)),
    )
    assert list(cri.mounted_at(spec, empty)) == ["/data"]
    assert cri.termination_message(spec, UID, "main", tmp_path) == pod / "containers/main/1a2b"
    assert cri.termination_message(spec, UID, "other", tmp_path) is None
    assert list(cri.foreign_binds(spec, "another-pods", tmp_path)) != list(cri.foreign_binds(spec, UID, tmp_path))
    with pytest.raises(UsageError):
        cri.pod_directory("../..")


def test_namespaces_that_are_joined() -> None:
    own = [{"type": "pid"}, {"type": "network", "path": "/proc/1/ns/net"}]
    assert cri.shared_namespaces(bound(namespaces=own)) == ()
    assert cri.shared_namespaces(bound(namespaces=[{"type": "pid", "path": "/proc/1/ns/pid"}])) == ("pid",)
    for users in ({"type": "user"}, {"type": "user", "path": "/run/userns/1"}):  # as hostUsers: false is laid out
        assert cri.shared_namespaces(bound(namespaces=[*own, users])) == ("user",)


class Records:
    """containerd, as far as it is asked for a pod's containers."""

    def __init__(self, *attempts: tuple[str, str, int]) -> None:
        self.records = [self.record(id, name, attempt) for id, name, attempt in attempts]
        self.filters: tuple[str, ...] = ()

    @staticmethod
    def record(id: str, name: str, attempt: int) -> Container:
        config = {"metadata": {"name": name, "attempt": attempt}}
        metadata = {
            "Version": "v1",
            "Metadata": {"ID": id, "Config": config, "LogPath": f"/var/log/pods/x/{name}/{attempt}.log"},
        }
        extension = Opaque("github.com/containerd/cri/pkg/store/container/Metadata", json.dumps(metadata).encode())
        extensions = {"io.cri-containerd.container.metadata": extension}
        return Container(id, "image", "overlayfs", id, Opaque("spec", b"{}"), extensions=extensions)

    def containers(self, *filters: str) -> list[Container]:
        self.filters = filters
        return self.records

    def pod(self, uid: str) -> Mapping[str, PodContainer]:
        return Containerd.pod(self, uid)  # type: ignore[arg-type]


def test_of_each_container_the_latest_attempt() -> None:
    there = Records(("old", "main", 0), ("new", "main", 1), ("side", "side", 0))
    found = there.pod(UID)
    assert {name: one.record.id for name, one in found.items()} == {"main": "new", "side": "side"}
    assert found["main"].log == Path("/var/log/pods/x/main/1.log")
    assert UID in there.filters[0]


@pytest.mark.anyio
async def test_the_lazy_pages_daemon_of_a_pod_are_heard_as_one(tmp_path: Path) -> None:
    listeners, daemons = [], []
    for number in range(2):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(tmp_path / str(number)))
        listener.listen(1)
        listeners.append(listener)
    page_channel = DaemonPageChannel([tmp_path / str(number) for number in range(2)])
    daemons = [listener.accept()[0] for listener in listeners]
    try:
        daemons[1].send(Frame(Word.WANT, 7, 4096, 8192).encode())
        with anyio.fail_after(5):
            assert await page_channel.next_request() == Frame(Word.WANT, address_space_of(1, 7), 4096, 8192)
            page_channel.arrived(address_space_of(1, 7), 4096, 8192)
            page_channel.zero(address_space_of(0, 3), 0, 4096)
            await page_channel.flush()
            assert Frame.decode(daemons[1].recv(64)) == Frame(Word.ARRIVED, 7, 4096, 8192)
            assert Frame.decode(daemons[0].recv(64)) == Frame(Word.ZERO, 3, 0, 4096)
            daemons[0].close()
            daemons[1].send(Frame(Word.WANT, 8, 0, 4096).encode())
            assert await page_channel.next_request() == Frame(Word.WANT, address_space_of(1, 8), 0, 4096)
            daemons[1].close()
            assert await page_channel.next_request() is None
    finally:
        page_channel.close()
        for one in (*listeners, *daemons):
            one.close()


def test_what_was_staged_goes_to_its_place(tmp_path: Path) -> None:
    staged, place = tmp_path / "staged", tmp_path / "place"
    (staged / "deep").mkdir(parents=True)
    place.mkdir()
    (place / "was here").touch()
    (staged / "deep/file").write_bytes(b"content")
    os.link(staged / "deep/file", staged / "link")
    (staged / "deep/file").chmod(0o640)
    staged.chmod(0o1777)
    copy(staged, place)
    assert sorted(str(one.relative_to(place)) for one in place.rglob("*")) == ["deep", "deep/file", "link"]
    assert (place / "link").read_bytes() == b"content"
    assert (place / "link").stat().st_ino == (place / "deep/file").stat().st_ino
    assert (place / "link").stat().st_mode & 0o777 == 0o640
    assert place.stat().st_mode & 0o7777 == 0o1777


class FakeNamespace:
    """Loopback of the target pod, which a kernel without nf_tables cannot hold still."""

    can = True
    held = False

    def __init__(self, path: str, inode: int) -> None:
        self.path, self.inode = path, inode

    @staticmethod
    def of(spec: object, pid: int) -> FakeNamespace:
        return FakeNamespace("/ns", 7)

    def lock(self) -> None:
        if not FakeNamespace.can:
            raise Failed("cannot hold the container's loopback traffic")
        FakeNamespace.held = True

    def unlock(self) -> None:
        FakeNamespace.held = False


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("names", "streams", "can", "held"),
    [("a", False, True, False), ("a", True, True, True), ("ab", False, True, True), ("ab", False, False, False)],
)
async def test_nothing_passes_between_containers_until_the_last_is_restored(
    names: str, streams: bool, can: bool, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that runs before another one would find its port closed, though nobody is connected yet."""
    monkeypatch.setattr(kubelet, "Namespace", FakeNamespace)
    monkeypatch.setattr(kubelet, "asdict", lambda one: {"path": one.path, "inode": one.inode})
    monkeypatch.setattr(FakeNamespace, "can", can)
    monkeypatch.setattr(FakeNamespace, "held", False)
    first = Container("c0", "image", "overlayfs", "c0", Opaque("spec", b"{}"))
    containers: list[Any] = [SimpleNamespace(maker=SimpleNamespace(key=name, made_already=first)) for name in names]
    for name in names if streams else "":
        (tmp_path / "incoming" / name / "images").mkdir(parents=True)
        (tmp_path / "incoming" / name / "images/tcp-stream-1.img").touch()
    journal = Journal(tmp_path / "journal")
    config: Any = SimpleNamespace(incoming=tmp_path / "incoming")
    maker = kubelet.KubeletMaker(config, journal, SimpleNamespace())  # type: ignore[arg-type]
    await maker.before_release(containers)
    assert (FakeNamespace.held, journal.held("network-lock") is not None) == (held, held)
    await maker.after_release()
    assert not FakeNamespace.held
    assert journal.held("network-lock") is None


@pytest.mark.anyio
async def test_connections_are_not_restored_where_loopback_cannot_be_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubelet, "Namespace", FakeNamespace)
    monkeypatch.setattr(kubelet, "asdict", lambda one: {"path": one.path, "inode": one.inode})
    monkeypatch.setattr(FakeNamespace, "can", False)
    (tmp_path / "incoming/a/images").mkdir(parents=True)
    (tmp_path / "incoming/a/images/tcp-stream-1.img").touch()
    first = Container("c0", "image", "overlayfs", "c0", Opaque("spec", b"{}"))
    containers: list[Any] = [SimpleNamespace(maker=SimpleNamespace(key="a", made_already=first))]
    config: Any = SimpleNamespace(incoming=tmp_path / "incoming")
    maker = kubelet.KubeletMaker(config, Journal(tmp_path / "journal"), SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(Failed, match="loopback"):
        await maker.before_release(containers)
