"""The hand-shake with CRIU's action script: a restored job stands still until it has been looked at, and never for ever."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from podferry.agent.status_reporter import set_intact
from podferry.core.inventory import encode
from podferry.criu.incoming import STOPPED, Incoming
from podferry.errors import Failed
from podferry.kube.migration import INTACT, Migration
from podferry.node import inventory
from podferry.workload.keeping import INVENTORY, Kept, keeping, let_run_late

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


@pytest.fixture
def incoming(tmp_path: Path) -> Iterator[Incoming]:
    with Incoming.prepare("job", run=tmp_path) as incoming:
        yield incoming


def script(incoming: Incoming, init: int, action: str = "pre-resume") -> subprocess.Popen[bytes]:
    about = {"CRTOOLS_SCRIPT_ACTION": action, "CRTOOLS_IMAGE_DIR": str(incoming.images), "CRTOOLS_INIT_PID": str(init)}
    return subprocess.Popen([STOPPED], env={**os.environ, **about})


def taken(pid: int) -> dict[str, dict[str, str]]:
    return {name: dict(has) for name, has in inventory.take(pid, [pid], frozenset(os.sched_getaffinity(0))).items()}


async def ended(process: subprocess.Popen[bytes]) -> int:
    with anyio.fail_after(30):
        while process.poll() is None:
            await anyio.sleep(0.005)
    return process.returncode


async def test_what_was_lost_is_put_right_before_the_script_ends(incoming: Incoming, process: int) -> None:
    before = taken(process)
    (name,) = before
    before[name] |= {"timer-slack": "123456", "umask-of-old": "7"}
    (incoming.images / INVENTORY).write_bytes(encode(before))
    kept = Kept()
    async with keeping(incoming, kept):
        assert await ended(script(incoming, process)) == 0
    assert Path(f"/proc/{process}/timerslack_ns").read_text().strip() == "123456"
    assert (kept.put_right, [str(one) for one in kept.differences]) == (
        1,
        [f"umask-of-old of {name}: was 7, is nothing"],
    )
    assert kept.since > 0


async def test_a_memory_policy_is_set_by_the_thread_itself(incoming: Incoming, process: int) -> None:
    before = taken(process)
    (name,) = before
    assert before[name]["memory-policy"] == "default"
    before[name]["memory-policy"] = "bind:0"
    (incoming.images / INVENTORY).write_bytes(encode(before))
    kept = Kept()
    async with keeping(incoming, kept):
        assert await ended(script(incoming, process)) == 0
    assert taken(process)[name]["memory-policy"] == "bind:0"
    assert (kept.put_right, kept.differences) == (1, [])


async def test_a_memory_policy_that_cannot_be_set_is_a_difference(incoming: Incoming, process: int) -> None:
    before = taken(process)
    (name,) = before
    before[name]["memory-policy"] = "bind:1000"
    (incoming.images / INVENTORY).write_bytes(encode(before))
    kept = Kept()
    async with keeping(incoming, kept):
        assert await ended(script(incoming, process)) == 0
    assert [str(one) for one in kept.differences] == [f"memory-policy of {name}: was bind:1000, is default"]


async def test_an_inventory_that_is_none_keeps_no_job_from_running(incoming: Incoming, process: int) -> None:
    (incoming.images / INVENTORY).write_bytes(b"[]")
    async with keeping(incoming, Kept()):
        assert await ended(script(incoming, process)) == 0


async def test_a_restore_that_fails_says_why(incoming: Incoming) -> None:
    with pytest.raises(Failed, match="the restore"):
        async with keeping(incoming, Kept()):
            raise Failed("the restore failed")


async def test_the_script_waits_for_nobody_where_the_agent_is_gone(incoming: Incoming, process: int) -> None:
    waits = script(incoming, process)
    with anyio.move_on_after(0.2):
        await ended(waits)
    assert waits.poll() is None
    incoming.close()
    assert await ended(waits) == 0
    assert await ended(script(incoming, process)) == 0  # and where there is nothing to wait at


async def test_other_actions_of_criu_do_not_wait(incoming: Incoming, process: int) -> None:
    assert await ended(script(incoming, process, "post-restore")) == 0


def test_a_migration_says_whether_the_job_has_what_it_had() -> None:
    migration = Migration.from_json({"metadata": {"name": "m"}, "spec": {"podName": "p"}})
    set_intact(migration, None)
    assert migration.status.condition(INTACT) is None
    set_intact(migration, [])
    assert migration.status.holds(INTACT)
    set_intact(migration, ["affinity of 1/1: was 0, is anywhere"])
    said = migration.status.condition(INTACT)
    assert said is not None
    assert (said.status, said.message) == ("False", "affinity of 1/1: was 0, is anywhere")


async def test_who_is_restored_after_the_time_is_up_is_let_run_and_does_not_wait_for_nobody(
    incoming: Incoming, process: int
) -> None:
    kept = Kept()
    with anyio.move_on_after(0.01):
        async with keeping(incoming, kept):
            await anyio.sleep_forever()
    late = script(incoming, process)
    await anyio.sleep(0.05)
    assert late.poll() is None, "nobody looks at it"
    let_run_late(incoming, kept)
    assert await ended(late) == 0
    assert kept.since > 0


async def test_that_nothing_was_compared_is_not_that_nothing_differs(incoming: Incoming, process: int) -> None:
    kept = Kept()
    assert kept.told() == ("nothing was compared: the job did not wait to be looked at",)
    (incoming.images / INVENTORY).write_bytes(b"torn")
    async with keeping(incoming, kept):
        assert await ended(script(incoming, process)) == 0
    (why,) = kept.told()
    assert why.startswith("nothing was compared: ")
    assert "did not wait" not in why


async def test_what_is_too_large_to_be_looked_at_is_not_and_says_so(incoming: Incoming, process: int) -> None:
    assert inventory.may_be_taken([process])
    assert not inventory.may_be_taken([process], most=3), "a thread and three descriptors"
    kept = Kept()
    async with keeping(incoming, kept):
        assert await ended(script(incoming, process)) == 0
    assert "the source took no inventory" in kept.told()[0]
