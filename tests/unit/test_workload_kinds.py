"""What an agent finds out about a workload before anything is touched, and what it makes of that: containers alone, and pods."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_core_rules import JOB, NODE

from podferry.core.connections import ConnectionsLost, Fate, OpenConnection, PeerKind
from podferry.core.preflight import NoRoom
from podferry.engine.journal import Journal, Part
from podferry.errors import Bug, PeerMisbehaved, Refused, UsageError
from podferry.memory.tracking.tracker import Choice, TrackerKind
from podferry.model import Connections, Mode
from podferry.node.containerd import Containerd
from podferry.node.containerd_errors import ContainerdNotFound
from podferry.node.cri import Volume
from podferry.node.records import Container, Opaque, PodContainer, Task, TaskStatus
from podferry.node.runtime import ContainerNotFound
from podferry.protos import runc_pb2
from podferry.wire.messages import Offer
from podferry.workload import inspected
from podferry.workload.config import Config
from podferry.workload.inspected import Member, View, merged, running_task, task_of, why_not
from podferry.workload.kinds import alone, kind, kubelet_pods
from podferry.workload.kinds.alone import ContainersAlone
from podferry.workload.kinds.kubelet_pods import KubeletPods, fifos
from podferry.workload.offered import OfferedContainer, OfferedPod, PodPart
from podferry.workload.pod.cluster_port import PodName
from podferry.workload.source_container import RunningContainer

pytestmark = pytest.mark.unit
RUNS = Task("job", 7, TaskStatus.RUNNING)
UFFD = Choice(TrackerKind.UFFD, "the kernel can")
POD = PodName("default", "train", "u1")


def record(binary: str = "/usr/local/sbin/podferry-runc", id: str = "job") -> Container:
    options = Opaque("containerd.runc.v1.Options", runc_pb2.Options(binary_name=binary).SerializeToString())
    return Container(id, "docker.io/library/numpy:1", "overlayfs", id, Opaque("spec", b"{}"), options=options)


def member(name: str = "job", **changed: Any) -> Member:
    return Member(name, RunningContainer(record(id=name), RUNS, Path("/upper")), JOB, **changed)


def view(**changed: Any) -> View:
    return View("job", (member(),), OfferedContainer(record()), JOB, NODE, UFFD, **changed)


def config(tmp_path: Path, **changed: Any) -> Config:
    return Config("b", "b:1", tmp_path, {}, run=tmp_path / "run", state=tmp_path / "state", **changed)


# A container by its records.


@pytest.mark.parametrize(
    ("binary", "task", "says"),
    [
        ("/usr/local/sbin/podferry-runc", RUNS, None),
        ("podferry-runc", RUNS, None),
        ("/usr/bin/runc", RUNS, "its OCI runtime is /usr/bin/runc"),
        ("", RUNS, "its OCI runtime is runc"),
        ("podferry-runc", None, "it has no task"),
        ("podferry-runc", replace(RUNS, status=TaskStatus.PAUSED), "its task is paused"),
        ("podferry-runc", replace(RUNS, status=TaskStatus.STOPPED), "its task is stopped"),
    ],
)
def test_what_the_records_say_against_a_move(binary: str, task: Task | None, says: str | None) -> None:
    found = why_not(record(binary), task)
    assert (None if found is None else found.why) == says
    assert found is None or found.remedy

    def of(id: str) -> Task:
        if task is None:
            raise ContainerNotFound(id)
        return task

    runtime: Any = SimpleNamespace(task=of)
    assert task_of(runtime, record(binary)) == task
    if says is None:
        assert running_task(runtime, record(binary)) == task
    else:
        with pytest.raises(Refused) as refused:
            running_task(runtime, record(binary))
        assert refused.value.why == says


@pytest.mark.parametrize("held", [None, 5 << 20])
@pytest.mark.parametrize(("guards", "limits"), [(False, True), (True, True), (False, False)])
def test_what_the_kernel_says_of_a_container(
    guards: bool, limits: bool, held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its cgroup does not count memory, what it holds is what its processes have."""
    group = SimpleNamespace(memory_held=lambda: held, why_no_quota=lambda: "no cpu controller")
    monkeypatch.setattr(inspected, "Cgroup", SimpleNamespace(of_container=lambda root, id: group))
    facts = replace(JOB, anonymous=100, shared=20, tmpfs=30, unsaved=("io_uring",))
    monkeypatch.setattr(inspected, "container_facts", lambda *_: facts)
    monkeypatch.setattr(inspected, "has_guards", lambda pid: guards)
    monkeypatch.setattr(inspected, "may_read_limits", lambda pid: limits)
    runtime: Any = SimpleNamespace(runc_root=lambda record: "/run/runc")
    found = inspected.inspect(runtime, "main", RunningContainer(record(), RUNS, Path("/upper")))
    assert (found.name, found.why_unthrottled, found.held) == ("main", "no cpu controller", held or 130)
    lacks = [inspected.GUARDS] * guards + [inspected.LIMITS] * (not limits)
    assert found.facts.unsaved == ("io_uring", *lacks)
    assert found.spec == {}


def test_containers_are_judged_as_one_job() -> None:
    one = replace(
        JOB, pids=(3, 1), unsaved=("b",), devices=("/dev/x",), memory=10, anonymous=1, shared=2, tmpfs=3, upper=4
    )
    other = replace(JOB, pids=(2,), unsaved=("a",), image="o", memory=None, anonymous=10, shared=20, tmpfs=30, upper=40)
    both = merged("default/train", [one, other], 100, ("10.0.0.1:1 -> 10.0.0.2:2",))
    assert (both.id, both.image, both.pids, both.unsaved) == ("default/train", "i", (1, 2, 3), ("a", "b"))
    assert (both.devices, both.binds, both.connections) == (("/dev/x",), (), ("10.0.0.1:1 -> 10.0.0.2:2",))
    assert (both.memory, both.anonymous, both.shared, both.tmpfs, both.upper) == (10, 11, 22, 33, 144)


# What is made of it.


def test_the_target_is_asked_with_what_the_job_is_and_the_node_has() -> None:
    offer = view().offer("m1", Mode.LIVE)
    assert (offer.migration, offer.name, offer.mode) == ("m1", "job", Mode.LIVE)
    assert offer.facts == {"container": JOB.to_dict(), "node": NODE.to_dict()}
    assert (offer.memory_bytes, offer.upper_bytes) == (JOB.anonymous, JOB.upper)


def test_a_workload_that_may_move_is_tracked_in_live_alone() -> None:
    assert view().demand_movable(Mode.LIVE) is UFFD
    for mode in (Mode.STOP, Mode.POSTCOPY):
        assert view().demand_movable(mode).kind is TrackerKind.NONE


def test_the_reasons_of_its_kind_come_before_those_of_any_workload() -> None:
    own = Refused("a hostPath")
    seen = replace(view(refused=(own,)), facts=replace(JOB, unsaved=("io_uring",)))
    found = seen.refusals(Mode.LIVE)
    assert found[0] is own
    assert len(found) == 2
    with pytest.raises(Refused, match="a hostPath"):
        seen.demand_movable(Mode.LIVE)


def test_a_job_that_cannot_be_slowed_down_is_warned_of_where_it_might_have_to_be() -> None:
    seen = replace(view(), members=(member(), member(why_unthrottled="no cpu controller")))
    (warning,) = [one for one in seen.warnings(Mode.LIVE) if "throttle" in one]
    assert "no cpu controller" in warning
    assert [one for one in seen.warnings(Mode.STOP) if "throttle" in one] == []
    assert [one for one in view().warnings(Mode.LIVE) if "throttle" in one] == []


def test_a_connection_that_would_be_lost_forbids_the_move_where_none_may_be() -> None:
    gone = OpenConnection("tcp", "10.0.0.5:1", "10.0.0.9:2", "", PeerKind.ANOTHER, Fate.CLOSED, "its peer stays")
    seen = view(connections=(gone,))
    assert seen.lost(Connections.CLOSE) is None
    assert seen.demand_movable(Mode.LIVE) is UFFD
    with pytest.raises(ConnectionsLost, match=r"10\.0\.0\.9:2|cost"):
        seen.demand_movable(Mode.LIVE, Connections.REQUIRE)


# Containers alone.


class FakeContainerd:
    """The container `job` with this task."""

    kind = "containerd"

    def __init__(self, task: Task | None = RUNS, ids: tuple[str, ...] = ("job",)) -> None:
        self._task, self._ids = task, ids

    def tasks(self) -> list[Task]:
        return [] if self._task is None else [self._task]

    def containers(self) -> list[Container]:
        return [record(id=one) for one in self._ids]

    def container(self, name: str) -> Container:
        if name not in self._ids:
            raise ContainerdNotFound(name)
        return record(id=name)

    def task(self, id: str) -> Task:
        if self._task is None:
            raise ContainerNotFound(id)
        return self._task

    def upper(self, record: Container) -> Path:
        return Path("/upper")

    def lineage(self, snapshotter: str, key: str) -> tuple[str, ...]:
        assert (snapshotter, key) == ("overlayfs", "job")
        return ("sha256:low", "sha256:top")

    def staying(self, snapshotter: str, layers: tuple[str, ...]) -> dict[str, str]:
        return {layers[-1]: "a socket"}

    def find_layers(self, snapshotter: str, layers: tuple[str, ...]) -> str:
        return ""

    def runc_root(self, record: Container) -> str:
        return "/run/runc"


def alone_on(tmp_path: Path, containerd: FakeContainerd, **changed: Any) -> ContainersAlone:
    return ContainersAlone(config(tmp_path, **changed), cast(Containerd, containerd))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel would say."""
    monkeypatch.setattr(kind.WorkloadKind, "node_facts", lambda self: NODE)
    monkeypatch.setattr(kind.WorkloadKind, "_choice", UFFD)
    for where in (alone, kubelet_pods):
        monkeypatch.setattr(where, "inspect", lambda runtime, name, running: Member(name, running, JOB, held=50 << 20))
        monkeypatch.setattr(where, "open_connections", lambda pid, pids, *_: (("seen from", pid, tuple(pids)),))


@pytest.mark.usefixtures("kernel")
def test_a_container_alone_is_offered_with_its_layers_and_its_log(tmp_path: Path) -> None:
    task = replace(RUNS, stdout="file:///var/log/job.log", stderr="file:///var/log/job.log")
    seen = alone_on(tmp_path, FakeContainerd(task)).view("job")
    offered = seen.offered
    assert isinstance(offered, OfferedContainer)
    assert (seen.name, offered.layers, offered.staying) == (
        "job",
        ("sha256:low", "sha256:top"),
        {"sha256:top": "a socket"},
    )
    assert offered.log == Path("/var/log/job.log")
    (only,) = seen.members
    assert (only.running.upper, only.running.output.log, only.running.flags) == (
        Path("/upper"),
        offered.log,
        kind.DUMP_FLAGS,
    )
    assert (seen.connections, seen.tracker) == ((("seen from", 7, (1,)),), UFFD)


@pytest.mark.usefixtures("kernel")
def test_a_container_that_is_not_here_or_does_not_run_is_not_inspected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no container other on b"):
        alone_on(tmp_path, FakeContainerd()).view("other")
    with pytest.raises(Refused, match="does not run"):
        alone_on(tmp_path, FakeContainerd(None)).view("job")


def test_containers_of_crio_move_as_pods_only(tmp_path: Path) -> None:
    here = alone_on(tmp_path, FakeContainerd(), crio="/run/crio/crio.sock")
    for asked in (here.containers, lambda: here.view("job")):
        with pytest.raises(Refused, match="only as pods"):
            asked()


def test_what_is_here_is_listed_with_what_stands_against_its_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(pids=lambda: [1, 2])
    monkeypatch.setattr(alone, "Cgroup", SimpleNamespace(of_container=lambda root, id: group))
    monkeypatch.setattr(alone, "resident", lambda pid: pid * 100)
    runs, none = alone_on(tmp_path, FakeContainerd(ids=("job", "made"))).containers()
    assert runs == {
        "name": "job",
        "node": "b",
        "state": "running",
        "memory_bytes": 300,
        "image": "docker.io/library/numpy:1",
        "movable": True,
        "why": "",
    }
    assert (none["name"], none["state"], none["memory_bytes"], none["movable"]) == ("made", "no task", 0, False)
    assert "does not run" in none["why"]


def offer_of(seen: View, facts: dict[str, Any] | None = None) -> Offer:
    offer = seen.offer("m1", Mode.LIVE)
    return offer if facts is None else replace(offer, facts=facts)


@pytest.mark.usefixtures("kernel")
def test_a_target_weighs_what_it_never_takes_what_it_cannot_run_and_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def against(self: OfferedContainer, *, namespace: str, capabilities: frozenset[str]) -> list[Refused]:
        assert (namespace, "CAP_SYS_NICE" in capabilities, "CAP_CHOWN" in capabilities) == ("default", True, True)
        return [Refused("never")] * bool(self.record.sandbox)

    monkeypatch.setattr(OfferedContainer, "against", against)
    capabilities = frozenset({"CAP_SYS_NICE"})
    here, seen = alone_on(tmp_path, FakeContainerd(ids=()), capabilities=capabilities), view()
    assert here.weigh(offer_of(seen), seen.offered) == (NODE, [])
    taken = alone_on(tmp_path, FakeContainerd(ids=("job",)), capabilities=capabilities)
    newer = replace(seen, node=replace(NODE, machine="aarch64"))
    sandboxed = OfferedContainer(replace(record(), sandbox="another's"))
    never, cannot, lacks = taken.weigh(offer_of(newer), sandboxed)[1]
    assert str(never) == "never"
    assert "aarch64" in f"{cannot} {cannot.why}"
    assert "a container named job" in str(lacks)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("facts", [{}, {"container": JOB.to_dict()}, {"container": {}, "node": NODE.to_dict()}])
def test_an_offer_without_facts_is_not_weighed(facts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PeerMisbehaved):
        alone_on(tmp_path, FakeContainerd(ids=())).weigh(offer_of(view(), facts), view().offered)


def test_an_offer_of_another_kind_is_a_bug(tmp_path: Path) -> None:
    pod = OfferedPod(POD, (PodPart("main", "c0", ()),), ())
    with pytest.raises(Bug, match="OfferedPod was taken for OfferedContainer"):
        alone_on(tmp_path, FakeContainerd()).known(pod)


def test_a_frozen_workload_is_found_by_what_the_journal_says_of_its_offer(tmp_path: Path) -> None:
    here, journal = alone_on(tmp_path, FakeContainerd()), Journal(tmp_path / "m1")
    assert here.frozen(journal, "job") is None, "it was not inspected yet, so nothing was frozen"
    journal.note(offered=view().offered.for_journal())
    found = here.frozen(journal, "job")
    assert found is not None
    (only,) = found._frozen
    assert (only.record.id, only.journal.number) == ("job", 0)
    target = here.target(journal, "job")
    (made,) = target._containers
    assert (made.maker.name, made.journal.number) == ("job", 0)


def test_a_workload_is_made_ready_to_leave_with_each_container_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file of a volume that any of them has mapped as shared is one that may change without a trace in its times."""
    made: list[tuple[int, str, TrackerKind]] = []

    def container(config: Config, runtime: Any, journal: Part, running: RunningContainer, tracker: TrackerKind) -> Any:
        made.append((journal.number, running.record.id, tracker))
        return SimpleNamespace(tree=None, mapped_shared=lambda at: {f"{running.record.id} at {at}".encode()})

    trees: list[tuple[Path, Callable[[], set[bytes]]]] = []

    def tree(path: Path, suspects: Callable[[], set[bytes]]) -> Any:
        trees.append((path, suspects))
        return SimpleNamespace()

    monkeypatch.setattr(kind, "SourceContainer", container)
    monkeypatch.setattr(kind, "SourceTree", tree)
    monkeypatch.setattr(kind.cri, "mounted_at", lambda spec, path: [f"/mnt{path}"])
    seen = replace(
        view(),
        members=(member("one"), member("two")),
        volumes=((cast(Volume, None), Path("/a")), (cast(Volume, None), Path("/b"))),
    )
    workload = alone_on(tmp_path, FakeContainerd()).source(
        seen, Journal(tmp_path / "m"), TrackerKind.UFFD, Connections.REQUIRE
    )
    assert made == [(0, "one", TrackerKind.UFFD), (1, "two", TrackerKind.UFFD)]
    assert [(path, suspects()) for path, suspects in trees] == [
        (Path("/a"), {b"one at /mnt/a", b"two at /mnt/a"}),
        (Path("/b"), {b"one at /mnt/b", b"two at /mnt/b"}),
    ]
    assert workload._connections is Connections.REQUIRE
    assert len(workload._trees) == 4


# Pods.


class FakeRuntime:
    """The pod's containers, and of which pods anything is here."""

    kind = "containerd"

    def __init__(self, there: dict[str, PodContainer] | None = None, task: Task | None = RUNS) -> None:
        self.there, self._task = there or {}, task
        self.pods: set[str] = {"u1"}

    def pod(self, uid: str) -> dict[str, PodContainer]:
        return self.there if uid == "u1" else {}

    def holds_pod(self, uid: str) -> bool:
        return uid in self.pods

    def task(self, id: str) -> Task:
        if self._task is None:
            raise ContainerNotFound(id)
        return self._task

    def upper(self, record: Container) -> Path:
        return Path("/upper") / record.id


MAIN = {"main": PodContainer("main", record(id="c0"), Path("/var/log/pods/main/0.log"))}


def pods_on(tmp_path: Path, runtime: FakeRuntime, **changed: Any) -> KubeletPods:
    return KubeletPods(config(tmp_path, kubelet=tmp_path / "kubelet", **changed), cast(Any, runtime), None)


@pytest.fixture
def cri(kernel: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the specs say of the pod's mounts."""
    said: dict[str, Any] = {
        "volumes": (),
        "shared_namespaces": (),
        "foreign_binds": (),
        "sub_paths_of_empty_dirs": (),
        "termination_message": None,
        "mounted_parts": (),
    }
    for one in list(said):
        monkeypatch.setattr(kubelet_pods.cri, one, lambda *_, name=one: said[name])
    monkeypatch.setattr(kubelet_pods, "deleted_but_open", lambda pids, parts: tuple(parts))
    monkeypatch.setattr(kubelet_pods, "disk_usage", lambda path: 1000)
    monkeypatch.setattr(kubelet_pods, "to_others", lambda first, pids: ("10.0.0.1:1 -> 10.0.0.2:2",))
    return said


def test_a_pod_is_offered_with_its_containers_and_volumes(tmp_path: Path, cri: dict[str, Any]) -> None:
    volume = cast(Volume, SimpleNamespace(name="cache"))
    words = tmp_path / "words"
    words.write_text("ok")
    cri["volumes"], cri["termination_message"] = ((volume, Path("/cache")),), words
    task = replace(RUNS, stdout="/run/fifo/out", stderr="file:///x")
    seen = pods_on(tmp_path, FakeRuntime(MAIN, task)).view(POD, ["main"])
    assert seen.refused == ()
    assert seen.offered == OfferedPod(POD, (PodPart("main", "c0", kind.DUMP_FLAGS),), (volume,))
    assert (seen.facts.id, seen.facts.upper) == ("default/train", JOB.upper + 1000)
    assert seen.facts.connections == ("10.0.0.1:1 -> 10.0.0.2:2",)
    (only,) = seen.members
    assert only.running.output == kubelet_pods.Output(Path("/var/log/pods/main/0.log"), (Path("/run/fifo/out"),))
    assert (only.running.guarded, only.running.enclosed) == (True, {kubelet_pods.LAST_WORDS: words})
    assert (only.running.upper, seen.volumes) == (Path("/upper/c0"), ((volume, Path("/cache")),))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("shared_namespaces", ("pid",), "shares namespaces"),
        ("foreign_binds", (SimpleNamespace(source="/srv"),), "/srv"),
        ("sub_paths_of_empty_dirs", ("a/b", "a/b"), "a/b"),
        ("mounted_parts", ("app.conf",), "app.conf"),
    ],
)
def test_what_ties_a_pod_to_its_node_is_said_at_once(
    name: str, value: Any, says: str, tmp_path: Path, cri: dict[str, Any]
) -> None:
    cri[name] = value
    (only,) = pods_on(tmp_path, FakeRuntime(MAIN)).view(POD, ["main"]).refused
    assert "the container main" in str(only)
    assert says in f"{only} {only.why}"
    assert only.remedy


def test_a_termination_message_beyond_what_a_kubelet_reads_does_not_move(tmp_path: Path, cri: dict[str, Any]) -> None:
    words = cri["termination_message"] = tmp_path / "words"
    os.truncate(os.open(words, os.O_CREAT | os.O_WRONLY), 64 << 20)
    (only,) = pods_on(tmp_path, FakeRuntime(MAIN)).view(POD, ["main"]).refused
    assert "the container main" in str(only)
    words.unlink()
    assert pods_on(tmp_path, FakeRuntime(MAIN)).view(POD, ["main"]).refused == ()


@pytest.mark.parametrize(("limit", "fits"), [(None, True), (51 << 20, True), (50 << 20, False), (40 << 20, False)])
def test_a_container_has_to_fit_the_limit_that_it_will_have(
    limit: int | None, fits: bool, tmp_path: Path, cri: dict[str, Any]
) -> None:
    limits = {} if limit is None else {"main": limit, "other": 0}
    found = pods_on(tmp_path, FakeRuntime(MAIN)).view(POD, ["main"], memory_limits=limits).refused
    assert [type(one) for one in found] == ([] if fits else [NoRoom])


@pytest.mark.usefixtures("cri")
def test_a_pod_that_is_not_here_or_not_whole_is_not_inspected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pod default/train"):
        pods_on(tmp_path, FakeRuntime()).view(POD, ["main"])
    with pytest.raises(Refused, match="the container side of default/train does not run"):
        pods_on(tmp_path, FakeRuntime(MAIN)).view(POD, ["main", "side"])
    with pytest.raises(Refused, match="the container main of default/train cannot move") as refused:
        pods_on(tmp_path, FakeRuntime(MAIN, None)).view(POD, ["main"])
    assert refused.value.remedy == "start it first"


def test_an_agent_outside_of_a_cluster_moves_no_pods(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not belong to a Kubernetes cluster"):
        pods_on(tmp_path, FakeRuntime()).maker(Journal(tmp_path / "m"))


def test_marks_of_pods_that_are_gone_are_removed(tmp_path: Path) -> None:
    here = pods_on(tmp_path, FakeRuntime())
    here.sweep()  # nothing was ever marked
    arrived, departed = here._config.arrived, here._config.departed
    for directory, name in ((arrived, "u1_c0"), (arrived, "u2_c9"), (departed, "u1"), (departed, "u3")):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    here.sweep()
    assert {path.name for path in (*arrived.iterdir(), *departed.iterdir())} == {"u1_c0", "u1"}


@pytest.mark.parametrize(
    ("out", "err", "found"),
    [("/a", "/b", ("/a", "/b")), ("file:///a", "/b", ("/b",)), ("", "binary:///logger", ())],
)
def test_the_fifos_of_a_task_are_its_plain_paths(out: str, err: str, found: tuple[str, ...]) -> None:
    assert fifos(replace(RUNS, stdout=out, stderr=err)) == tuple(map(Path, found))
