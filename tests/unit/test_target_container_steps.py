"""What a target's container does with each thing that arrives for it, what it checks before GO, and how its restore ends."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from podferry.criu.processes import Process
from podferry.engine.journal import Journal, Part
from podferry.errors import Bug, Failed, PeerMisbehaved, TimedOut
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.page_store import PageStore
from podferry.memory.store.page_store import Totals as StoreTotals
from podferry.node.records import Container, Opaque
from podferry.wire.frames import HELD_PAGES, File
from podferry.wire.messages import AddressSpaceSum, FileSum, StateEnd
from podferry.workload import target_container as module
from podferry.workload.config import Config
from podferry.workload.numbers import address_space_of, directory_of
from podferry.workload.target_container import TargetContainer

pytestmark = [pytest.mark.unit, pytest.mark.anyio]
JOB = Container("job", "image", "overlayfs", "job", Opaque("spec", b"{}"))
NUMBER = 1
PAGES, LOG = directory_of(NUMBER, module.IMAGES), directory_of(NUMBER, module.LOG)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Recorder:
    """Notes each call as a line."""

    def __init__(self, said: list[str], **results: Any) -> None:
        self._said, self._results = said, results

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            shown = [bytes(one) if isinstance(one, memoryview) else one for one in args]
            self._said.append(" ".join(map(str, [name, *shown, *options.values()])))
            result = self._results.get(name)
            if isinstance(result, Exception):
                raise result
            return result

        return call


class Maker:
    """Who makes the container; its restore ends as `ends` says."""

    name, key, flags, not_images, lasting = "main", "main", ("--file-locks",), ("payloads",), ("task",)

    def __init__(self, said: list[str], *, made: bool = True, ends: Exception | None = None) -> None:
        self.made_already = JOB if made else None
        self._said, self._ends = said, ends

    def prepare(self, container: TargetContainer) -> None:
        assert container.journal.held("scratch") is not None
        self._said.append("prepare")

    async def make(self, container: TargetContainer, timeout: float) -> Container:
        self._said.append("make")
        return JOB

    async def before_restore(self, container: TargetContainer) -> None:
        self._said.append("before restore")

    async def restored(self, container: TargetContainer) -> None:
        self._said.append("restored")
        if self._ends is not None:
            raise self._ends

    async def started(self, container: TargetContainer) -> None:
        self._said.append("started")


@pytest.fixture
def said() -> list[str]:
    return []


def made(tmp_path: Path, said: list[str], **maker: Any) -> TargetContainer:
    config = Config("b", "b:1", tmp_path, {}, run=tmp_path / "run", state=tmp_path / "state")
    runtime: Any = SimpleNamespace(root=lambda record: f"root of {record.id}")
    promise: Any = SimpleNamespace(take=lambda *, run: said.append(f"promised {run}"))
    job = TargetContainer(config, runtime, Part(Journal(tmp_path / "m1"), NUMBER), Maker(said, **maker), promise)
    job._incoming = cast(Any, Recorder(said, failed=None, failure=["log"], stopped=-1))
    cast(Any, job._incoming).images = tmp_path / "images"
    cast(Any, job._incoming).wrapper = os.getpid()
    return job


# What arrives.


async def test_places_are_in_the_ledger_before_they_are_made(tmp_path: Path, said: list[str]) -> None:
    job = made(tmp_path, said)
    await job.prepare()
    assert job.journal.held("scratch") == {"directory": str(job.scratch)}
    assert said == ["prepare"]
    assert (job.scratch / "store").is_dir()
    job.pages(1, 7, PAGE, memoryview(b"x" * PAGE))
    assert [line for line in said if line.startswith("promised")] == [f"promised {PAGE}"]
    await job.close()


async def test_pages_go_into_the_store_and_those_of_images_to_the_images(tmp_path: Path, said: list[str]) -> None:
    job = made(tmp_path, said)
    with pytest.raises(Bug, match="before the container was prepared"):
        job.pages(1, 7, PAGE, memoryview(b"x"))
    job._store, job._images = cast(Any, Recorder(said)), cast(Any, Recorder(said))
    job.pages(2, 7, 4096, memoryview(b"x"))
    job.pages(2, HELD_PAGES, 8192, memoryview(b"y"))
    job.drop(7, 0, 4096)
    job.drop(HELD_PAGES, 4096, 8192)
    assert said == ["write 7 4096 b'x' 2", "hold 8192 b'y' 2", "drop 7 0 4096", "drop 4096 8192"]


async def test_images_count_against_what_was_promised_until_the_job_runs(tmp_path: Path, said: list[str]) -> None:
    job = made(tmp_path, said)
    job._images = cast(Any, Recorder(said))
    job.image("core-1.img", 0, memoryview(b"abc"), last=True)
    piece = File(PAGES, "pages-1.img", 0, memoryview(b"ab"))
    job.image_of_pages(piece)
    assert [line for line in said if line.startswith("promised")] == ["promised 3", f"promised {piece.size}"]
    assert [line.split()[0] for line in said if not line.startswith("promised")] == ["take", "take_pages"]
    assert "True" in said[1]
    PageStore.create(job.scratch / "store", lambda size: None).sync()
    assert job.daemon_socket() == job._lazypages.socket
    said.clear()
    job.image("core-2.img", 0, memoryview(b"abc"), last=False)
    assert not [line for line in said if line.startswith("promised")]
    job._images = cast(Any, SimpleNamespace(close=lambda: None))
    await job.close()


async def test_output_comes_in_order_and_only_where_there_is_a_log(tmp_path: Path, said: list[str]) -> None:
    job = made(tmp_path, said)
    with pytest.raises(PeerMisbehaved, match="has no log"):
        job.log(0, memoryview(b"x"))
    job.log_file = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    job.log(0, memoryview(b"one\n"))
    job.log(4, memoryview(b"two\n"))
    with pytest.raises(PeerMisbehaved, match="out of order") as caught:
        job.log(4, memoryview(b"two\n"))
    assert caught.value.why == "offset 4 after 8"
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    descriptor = job.log_file
    job._images = cast(Any, SimpleNamespace(close=lambda: said.append("images closed")))
    await job.close()
    assert job.log_file == -1
    assert said == ["close", "images closed"]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


async def test_files_before_the_container_was_prepared_are_a_bug(tmp_path: Path, said: list[str]) -> None:
    job = made(tmp_path, said)
    with pytest.raises(Bug, match="upper layer"):
        job.tree(memoryview(b"x"))
    job.upper = cast(Any, Recorder(said))
    job.tree(memoryview(b"x"))
    assert said == ["feed b'x'"]


async def test_whoever_asks_for_the_container_is_what_makes_it_once(tmp_path: Path, said: list[str]) -> None:
    assert await made(tmp_path / "a", said).make(1.0) is JOB
    assert said == []
    assert await made(tmp_path / "b", said, made=False).make(1.0) is JOB
    assert said == ["make"]


# What is checked before GO.

END = StateEnd(
    "m1",
    (
        FileSum(PAGES, "core-1.img", 3, "d"),
        FileSum(LOG, "log", 8, "d"),
        FileSum(directory_of(0, module.IMAGES), "core-1.img", 9, "other"),
        FileSum(directory_of(0, module.LOG), "log", 100, "other"),
    ),
    (
        AddressSpaceSum(address_space_of(NUMBER, 7), 3),
        AddressSpaceSum(address_space_of(NUMBER, 8), 0),
        AddressSpaceSum(address_space_of(0, 7), 100),
    ),
    (),
)


@pytest.fixture
def whole(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> TargetContainer:
    """A container for which all has come that `END` says."""
    job = made(tmp_path, said)
    job._images, job._store = cast(Any, Recorder(said)), cast(Any, Recorder(said))
    job.log_size = 8
    monkeypatch.setattr(module, "demand_whole", lambda upper, number, end, what: said.append(f"whole {number} {what}"))
    monkeypatch.setattr(module, "refresh_root", lambda root: said.append(f"refreshed {root}"))
    monkeypatch.setattr(module, "missing", lambda store, images: {})
    monkeypatch.setattr(module, "raise_to_spec", lambda images, rights: None)
    monkeypatch.setattr(module, "demand_no_more", lambda images, rights, also: said.append(f"judged beside {also}"))
    return job


async def test_all_that_the_end_says_of_this_container_is_checked_and_nothing_of_another(
    whole: TargetContainer, said: list[str]
) -> None:
    await whole.verify(END)
    totals = {7: StoreTotals(1, 3, 3 * PAGE), 8: StoreTotals(1, 0, 0)}
    assert said == [
        "complete",
        f"verify {[END.files[0]]}",
        f"judged beside {(module.INVENTORY, 'payloads')}",
        f"whole {NUMBER} the upper layer",
        "refreshed root of job",
        "complete 7",
        "complete 8",
        f"verify {totals}",
        "sync",
        "close",
    ]


async def test_in_post_copy_memory_is_not_expected_yet(whole: TargetContainer, said: list[str]) -> None:
    whole.journal.note(postcopy=True)
    await whole.verify(END)
    assert said[-2:] == ["refreshed root of job", "sync"]


async def test_a_container_that_is_not_made_yet_is_judged_when_it_is(whole: TargetContainer, said: list[str]) -> None:
    cast(Any, whole.maker).made_already = None
    await whole.verify(END)
    assert not [line for line in said if line.startswith(("judged", "refreshed"))]
    with pytest.raises(Bug, match="not made yet"):
        whole._judge_images()


async def test_output_that_did_not_come_whole_is_no_success(whole: TargetContainer) -> None:
    whole.log_size = 7
    with pytest.raises(Failed, match="log did not arrive whole") as caught:
        await whole.verify(END)
    assert "7 bytes" in caught.value.why


async def test_pages_that_criu_expects_and_nobody_sent_are_no_success(
    whole: TargetContainer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "missing", lambda store, images: {8: [(0, PAGE)]})
    with pytest.raises(Failed, match="memory pages are missing") as caught:
        await whole.verify(END)
    assert "[8]" in caught.value.why
    assert "sync" not in said


async def test_a_rehearsal_checks_images_and_nothing_else(whole: TargetContainer, said: list[str]) -> None:
    await whole.judge(END)
    assert said == [f"verify {[END.files[0]]}", f"judged beside {(module.INVENTORY, 'payloads')}"]


async def test_processes_that_the_spec_raises_are_expected_to_be_raised(
    whole: TargetContainer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "raise_to_spec", lambda images, rights: 500)
    monkeypatch.setattr(
        module, "expect_oom_score", lambda images, least: said.append(f"expected {images.name} {least}")
    )
    await whole.judge(END)
    assert said[1] == "expected images 500"


async def test_after_the_last_page_what_is_absent_is_zero(
    whole: TargetContainer, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "missing", lambda store, images: {7: [(0, 10), (20, 30)], 8: [(5, 6)]})
    whole.remote_pages_complete(cast(Any, Recorder(said)))
    at = {pid: address_space_of(NUMBER, pid) for pid in (7, 8)}
    assert said == [f"zero {at[7]} 0 10", f"zero {at[7]} 20 30", f"zero {at[8]} 5 6"]


# The restore.


@pytest.fixture
def releasing(whole: TargetContainer, said: list[str], monkeypatch: pytest.MonkeyPatch) -> TargetContainer:
    """The same, with a daemon that says since when the job runs, and a look at the job that goes well."""

    async def since() -> float:
        return 5.0

    @asynccontextmanager
    async def keeping(incoming: Any, kept: Any) -> AsyncIterator[None]:
        said.append("keeping")
        yield

    whole._lazypages = cast(Any, SimpleNamespace(since=since, resumed_at=lambda: 0.0))
    monkeypatch.setattr(module, "keeping", keeping)
    return whole


async def test_a_container_is_judged_if_it_was_not_and_is_restored_once(
    releasing: TargetContainer, said: list[str]
) -> None:
    assert await releasing.release() == 5.0
    assert said == [
        f"judged beside {(module.INVENTORY, 'payloads')}",
        "refreshed root of job",
        "before restore",
        "restore",
        "keeping",
        "restored",
        "started",
    ]
    assert releasing.journal.facts["released"] is True
    me = Process.of(os.getpid())
    assert me is not None
    assert releasing.wrapper() == me
    said.clear()
    releasing._kept.since = 6.0
    assert await releasing.release() == 6.0, "the job runs since the later of both"
    assert said == ["keeping", "restored", "started"]


async def test_a_container_that_was_judged_before_go_is_not_kept_waiting_for_it(
    releasing: TargetContainer, said: list[str]
) -> None:
    await releasing.verify(END)
    said.clear()
    await releasing.release()
    assert said[:2] == ["before restore", "restore"]


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [(Failed("runc left no log"), Failed, "the restore of main failed"), (TimeoutError(), TimedOut, "has not ended")],
)
async def test_a_restore_that_failed_says_so(
    error: Exception, kind: type[Exception], says: str, releasing: TargetContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast(Any, releasing.maker)._ends = error
    monkeypatch.setattr(module.RestoreProcess, "settle", lambda self: False)
    with pytest.raises(kind, match=says) as caught:
        await releasing.release()
    if kind is TimedOut:
        assert cast(TimedOut, caught.value).evidence == ["log"]


@pytest.mark.parametrize(("settled", "resumed_at"), [(True, 0.0), (None, 5.0)])
async def test_a_job_that_criu_let_go_of_has_run_whatever_is_said_of_its_start(
    settled: bool | None,
    resumed_at: float,
    releasing: TargetContainer,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cast(Any, releasing.maker)._ends = Failed("cannot start a stopped process")
    cast(Any, releasing._lazypages).resumed_at = lambda: resumed_at
    monkeypatch.setattr(module.RestoreProcess, "settle", lambda self: settled)
    monkeypatch.setattr(module, "let_run_late", lambda incoming, kept: said.append("let run late"))
    assert await releasing.release() == 5.0
    assert said[-2:] == ["let run late", "started"]


@pytest.mark.parametrize("network", [False, True])
async def test_podferry_runc_finds_the_container_only_once_the_ledger_has_it(
    network: bool, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made(tmp_path, said)
    job._incoming = None
    assert job.adopted

    def prepare(key: str, **options: Any) -> Any:
        said.append(f"{job.journal.held('incoming')} {options}")
        return Recorder(said)

    monkeypatch.setattr(module.Incoming, "prepare", prepare)
    monkeypatch.setattr(module, "group_to_restore", lambda spec, runc: f"/group of {spec} {runc}")
    monkeypatch.setattr(module, "version", lambda program: f"{program} 1.3")
    job.expect_restore(network=network, criu_conf="x")
    flags = ("--lazy-pages", "--file-locks")
    options = {"flags": flags, "network": network, "criu_conf": "x", "run": job.config.run}
    assert said == [f"{{'key': 'main'}} {options}"]
    assert not job.adopted
    job.belongs_in(replace(JOB, spec=Opaque("spec", b'{"root": {}}')))
    assert said[-1] == "belongs_in /group of {'root': {}} runc 1.3"


async def test_a_podferry_runc_that_waits_no_more_is_told_with_the_reason(tmp_path: Path, said: list[str]) -> None:
    reader, writer = os.pipe()
    job = made(tmp_path, said)
    gone = Failed("podferry-runc has ended")
    job._incoming = cast(Any, SimpleNamespace(fileno=lambda: reader, gone=lambda why: said.append(why) or gone))
    with anyio.move_on_after(0.05) as waits:
        await job.lost()
    assert waits.cancelled_caught, "as long as it waits, nothing is lost"
    os.close(writer)
    with anyio.fail_after(120):
        assert await job.lost() is gone
    assert "was killed" in said[0]
    os.close(reader)
