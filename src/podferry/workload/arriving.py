"""A container on its way onto this node, in containerd, the page store, CRIU's images and the upper layer.

Everything it makes is in the ledger before it is made; `handlers` takes the same things back, for a migration that fails and
for one that a killed agent left.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from podferry.core.allowed_rights import rights_of
from podferry.core.undo import Handler
from podferry.criu.checkpoint import CRIU_CONF, Process
from podferry.criu.images import missing
from podferry.criu.incoming import Incoming
from podferry.criu.restored_group import group_to_tell
from podferry.criu.restoring import Restoring
from podferry.criu.rights import demand_no_more
from podferry.engine.journal import Part
from podferry.engine.ports import IMAGES, LOG, UPPER, Json, PageChannel
from podferry.errors import Bug, Failed, PeerMisbehaved, PodferryError, Refused, TimedOut
from podferry.memory.kernel.uffd import PAGE
from podferry.memory.store.page_store import PageStore
from podferry.memory.store.page_store import Totals as StoreTotals
from podferry.node import outside
from podferry.node.containerd import AlreadyExists, Containerd, NotFound
from podferry.node.network import is_own
from podferry.node.newfile import check_new, create_new
from podferry.node.process import last_lines, spawn
from podferry.node.records import upper_dir
from podferry.node.upper import Receiver, refresh_root
from podferry.wire.messages import StateEnd
from podferry.workload.account import Promise
from podferry.workload.arriving_image import ArrivingImage
from podferry.workload.config import Config
from podferry.workload.feeder_channel import FeederChannel
from podferry.workload.helpers import (
    END_TIMEOUT,
    ended,
    helper_environment,
    kill_helper,
    process_of,
    python,
    remove_task,
    runs,
)
from podferry.workload.keeping import INVENTORY, Kept, keeping
from podferry.workload.nodefacts import version
from podferry.workload.numbers import space_of
from podferry.workload.offered import Offered
from podferry.workload.threads import at_once, patiently, run

POISE_TIMEOUT = 60.0
STATE_TIMEOUT = 7200.0
RESTORE_TIMEOUT = 60.0
LOOK_EVERY = 0.02
LOOK_AT_JOB_EVERY = 0.5
FEEDER_SOCKET, FEEDER_STATUS = "feeder.sock", "feeder.json"


class Arriving:
    """The container `record` and everything that is made for it here. `log` is the file that its output goes to."""

    lasting: tuple[str, ...] = ("task", "container", "snapshot", "log", "restored")
    """What it holds that stays when it runs."""

    def __init__(
        self,
        config: Config,
        containerd: Containerd,
        journal: Part,
        offer: Offered | None,
        promise: Promise | None = None,
    ) -> None:
        """`promise` is what this node has promised of memory and disk; nobody asks for more after GO."""
        self._promise = promise
        self._config, self._containerd, self._journal, self._offered = config, containerd, journal, offer
        self.key = offer.record.id if offer else ""
        self.scratch = config.incoming.with_name("arriving") / journal.directory.name
        self._incoming: Incoming | None = None
        self._store: PageStore | None = None
        self._upper: Receiver | None = None
        self._log = -1
        self._log_end = 0
        self._images: dict[str, ArrivingImage] = {}
        self._images_whole: dict[str, tuple[int, str]] = {}
        self._feeder: Process | None = None
        self._starter: Process | None = None
        self._kept = Kept()

    @property
    def _offer(self) -> Offered:
        if self._offered is None:
            raise Bug("the kubelet makes this container")
        return self._offered

    async def prepare(self) -> None:
        """Its record, snapshot and the places for pages and images."""
        await run(self._prepare)

    def _prepare(self) -> None:
        record, journal = self._offer.record_here(self._config.wrapper), self._journal
        journal.acquire("container", id=record.id)
        try:
            self._containerd.create_container(record)
        except AlreadyExists as there:
            journal.release("container")
            raise Refused(
                f"there is a container named {record.id} here already", remedy="remove or rename it"
            ) from there
        journal.acquire("snapshot", snapshotter=record.snapshotter, key=record.snapshot_key)
        mounts = self._containerd.prepare(
            record.snapshotter, record.snapshot_key, self._offer.layers, image=record.image, node=self._config.node
        )
        self._upper = Receiver(upper_dir(mounts))
        journal.acquire("scratch", directory=str(self.scratch))
        self._store = PageStore.create(self.scratch / "store", self._grows)
        journal.acquire("restored", key=record.id)
        journal.acquire("incoming", key=record.id)
        self._incoming = Incoming.prepare(
            record.id,
            flags=("--lazy-pages", *self._offer.flags),
            criu_conf=CRIU_CONF.read_text(),
            network=is_own(record.spec_json()),
            run=self._config.run,
        )
        self._incoming.belongs_in(group_to_tell(record.spec_json(), version("runc")))
        if (path := self._offer.log) is not None:
            check_new(self._config.logs, path)  # before the ledger has it: what was there before is never deleted
            journal.acquire("log", path=str(path))
            try:
                self._log = create_new(self._config.logs, path)
            except Refused:
                journal.release("log")
                raise

    async def poise(self, *, postcopy: bool) -> None:
        """Start the page feeder, and a task whose creation waits for the state in the wrapper.

        May be called again for post-copy: that is a matter of the feeder alone.
        """
        if (old := self._journal.held("feeder")) is not None:
            await run(kill_helper, old)
            (self.scratch / FEEDER_STATUS).unlink(missing_ok=True)
        self._start_feeder(postcopy=postcopy)
        with anyio.fail_after(POISE_TIMEOUT):
            await self._status_of_feeder("listening")
            if self._starter is None:
                await self._start_task()

    async def lost(self) -> PodferryError:
        """Return, with the reason, once podferry-runc waits no more."""
        incoming = self._need_incoming()
        await anyio.wait_readable(incoming)
        return incoming.gone("it was killed, or the call that made the container was given up")

    def _start_feeder(self, *, postcopy: bool) -> None:
        incoming, store = self._need_incoming(), self.scratch / "store"
        argv = [*python("podferry.lazypages.daemon"), "--work", incoming.work, "--images", incoming.images]
        argv += ["--store", store, "--status", self.scratch / FEEDER_STATUS]
        if postcopy:
            argv += ["--source", self.scratch / FEEDER_SOCKET]
        self._feeder = self._spawn("feeder", argv)

    async def _start_task(self) -> None:
        incoming, record = self._need_incoming(), self._offer.record
        request = {
            "socket": str(self._config.containerd),
            "namespace": self._config.namespace,
            "id": record.id,
            "stdio": asdict(self._offer.stdio),
            "timeout": STATE_TIMEOUT,
        }
        (self.scratch / "start.json").write_text(json.dumps(request))
        self._journal.acquire("task", id=record.id)
        argv = [*python("podferry.workload.starter"), self.scratch / "start.json", self.scratch / "started.json"]
        self._starter = self._spawn("starter", argv)
        async with anyio.create_task_group() as watch:
            watch.start_soon(self._watch_starter, incoming)
            await patiently(incoming.wait_poised, POISE_TIMEOUT)
            watch.cancel_scope.cancel()

    async def _watch_starter(self, incoming: Incoming) -> None:
        """containerd may fail before the wrapper is ever called: then nobody need wait for it."""
        try:
            await self._starter_ended()
        except PodferryError as error:
            incoming.abandon(error)
        except anyio.get_cancelled_exc_class():
            incoming.abandon()
            raise
        else:
            incoming.abandon(Bug("the container started although its state had not arrived"))

    # What arrives.

    def _grows(self, size: int) -> None:
        if self._promise is not None:
            self._promise.take(run=size)

    def pages(self, round: int, space: int, address: int, data: memoryview) -> None:
        """Put arrived pages into the store."""
        self._need_store().write(space, address, data, round)

    def drop(self, space: int, start: int, end: int) -> None:
        """Pages that are zero or gone."""
        self._need_store().drop(space, start, end)

    def tree(self, number: int, record: memoryview) -> None:
        """A record of the upper layer."""
        if number != UPPER:
            raise PeerMisbehaved(f"a record of tree {number}, which a container has not")
        if self._upper is None:
            raise Bug("a record of the upper layer came before the container was prepared")
        if self._promise is not None:
            self._promise.take(disk=len(record))
        self._upper.feed(record)

    def log(self, directory: int, offset: int, data: memoryview) -> None:
        """A piece of what the container printed."""
        if self._log < 0 or directory != LOG:
            raise PeerMisbehaved("output of a container that has no log")
        if offset != self._log_end:
            raise PeerMisbehaved("the container's log came out of order", why=f"offset {offset} after {self._log_end}")
        self._log_end += os.pwrite(self._log, data, offset)

    def image(self, directory: int, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        """A piece of one of CRIU's images. The name was checked when its frame was."""
        if directory != IMAGES:
            raise PeerMisbehaved(f"a file for directory {directory}, which a container has not")
        if name in self._images_whole:
            raise PeerMisbehaved(f"the image {name} goes on after its end")
        if name not in self._images:
            self._images[name] = ArrivingImage(self._need_incoming().images / name)
        self._grows(len(data))
        self._images[name].take(offset, data)
        if last:  # there may be one for each mapping, and descriptors are few
            self._images_whole[name] = self._images.pop(name).whole()

    async def verify(self, end: StateEnd) -> None:
        """Everything is here and whole, or an error says what is not."""
        await at_once(self._verify, end)

    def _verify(self, end: StateEnd) -> None:
        store, images = self._need_store(), self._need_incoming().images
        sums = {one.name: one for one in end.files if one.directory == IMAGES}
        if set(sums) != {*self._images, *self._images_whole}:
            raise PeerMisbehaved(
                "other images arrived than were announced", why=f"{set(sums) ^ set(self._images_whole)}"
            )
        for name, expected in sums.items():
            if self._images_whole.get(name) != (expected.size, expected.digest):
                raise Failed(f"the image {name} did not arrive whole")
        self._judge_images()
        trees = {one.tree: one for one in end.trees}
        if self._upper is not None and UPPER in trees:
            came = self._upper.finish()
            if (came.entries, came.bytes, came.digest) != (
                trees[UPPER].entries,
                trees[UPPER].bytes,
                trees[UPPER].digest,
            ):
                raise Failed("the upper layer did not arrive whole", why=f"{came} is not {trees[UPPER]}")
            self._files_came()
        if sum(one.size for one in end.files if one.directory == LOG) != self._log_end:
            raise Failed("the container's log did not arrive whole", why=f"{self._log_end} bytes came")
        if self._journal.facts.get("postcopy"):
            return store.sync()
        for one in end.spaces:
            store.complete(one.space)
        store.verify({one.space: StoreTotals(1, one.pages, one.pages * PAGE) for one in end.spaces})
        if lacking := missing(store, images):
            raise Failed("memory is missing", why=f"of the processes {sorted(lacking)}, nothing was said of some pages")
        store.sync()
        return store.close()

    def _judge_images(self) -> None:
        """Refuse images that give the container more than its spec. The job stands still meanwhile."""
        rights = rights_of(self._offer.record.spec_json(), os.path.exists, os.uname().machine)
        demand_no_more(self._need_incoming().images, rights, also=(INVENTORY,))

    def _files_came(self) -> None:
        """The upper layer is as it was on the source; its overlay is mounted already."""
        refresh_root(self._containerd.bundle(self._offer.record.id) / "rootfs")

    # Post-copy.

    def relay(self) -> FeederChannel:
        """Connect to the page feeder."""
        return FeederChannel([self.feeder_socket()])

    def feeder_socket(self) -> Path:
        """Where the page feeder is told what has come, and asks for what is wanted."""
        self._promise = None
        if self._store is None:
            self._store = PageStore.open(self.scratch / "store")
        return self.scratch / FEEDER_SOCKET

    def all_owed_came(self, channel: PageChannel) -> None:
        """What is absent now, of the pages that CRIU left to the feeder, is zero."""
        for pid, gaps in missing(self._need_store(), self._need_incoming().images).items():
            for start, end in gaps:
                channel.zero(space_of(self._journal.number, pid), start, end)

    # The resume.

    async def release(self) -> float:
        """Give the wrapper its verdict, and see the task started. Returns since when it runs."""
        if self._starter is None:
            await self._adopt()
        if not self._journal.facts.get("released"):
            incoming = self._need_incoming()
            wrapper = Process.of(incoming.wrapper)
            self._journal.note(released=True, wrapper=[wrapper.pid, wrapper.started] if wrapper else None)
            await at_once(incoming.restore)
        try:
            with anyio.fail_after(RESTORE_TIMEOUT):
                async with keeping(self._incoming, self._kept):
                    await self._starter_ended()
        except (TimeoutError, PodferryError) as error:
            # containerd refuses to start what has ended already; what CRIU has resumed has run all the same.
            if not await self._has_run():
                raise self._not_restored("the restore", error) from error
        self._journal.release("starter")
        return await self._since()

    def differences(self) -> tuple[str, ...]:
        """What the job has not here as it had it on the source."""
        return tuple(map(str, self._kept.differences))

    async def _has_run(self) -> bool:
        """Whether CRIU let go of the tasks, once that cannot change any more. Then this is the job's only life."""
        restoring = Restoring(self._config.incoming / self.key / "work", self._wrapper())
        found = await at_once(restoring.settle)
        return self._resumed_at() > 0 if found is None else found

    def _wrapper(self) -> Process | None:
        facts = self._journal.facts.get("wrapper")
        return Process(int(facts[0]), int(facts[1])) if facts else None

    def _resumed_at(self) -> float:
        """When CRIU told the page feeder that the tasks are about to run; 0 where it did not."""
        with suppress(OSError, ValueError):
            return float(json.loads((self.scratch / FEEDER_STATUS).read_text()).get("resumed_ns", 0)) / 1e9
        return 0.0

    async def _since(self) -> float:
        """Since when a job that has run did so. Whether it still does, or has its memory, is for `filled` to find out."""
        with suppress(PodferryError), anyio.move_on_after(END_TIMEOUT):
            if self._feeder is None:
                self._feeder = process_of(self._journal.held("feeder"))
            await self._status_of_feeder("filling", "done")
        return max(self._resumed_at(), self._kept.since) or time.monotonic()

    def _not_restored(self, what: str, error: BaseException) -> PodferryError:
        if isinstance(error, TimeoutError):
            return TimedOut(f"{what} has not ended after {RESTORE_TIMEOUT:.0f} s", evidence=self._restore_log())
        failed = f"{what} failed"
        return (self._incoming and self._incoming.failed(failed)) or Failed.because(failed, error)

    async def resumed(self) -> float:
        """Since when it runs, as `release` returns it, for an agent that was restarted. Raises where it is gone."""
        if self._feeder is None:
            self._feeder = process_of(self._journal.held("feeder"))
        status = await self._status_of_feeder("filling", "done")
        if not await self.is_here():
            raise Failed("the job is gone", evidence=self._log_of("feeder"))
        return float(status["resumed_ns"]) / 1e9

    async def is_here(self) -> bool:
        """Whether containerd has a task of it, running or ended."""
        try:
            await at_once(self._containerd.task, self._offer.record.id)
        except NotFound:
            return False
        return True

    async def _adopt(self) -> None:
        """Go on where a killed agent was: its wrapper has ended unless the verdict was given; then wait for what became of it."""
        self._feeder, self._starter = (process_of(self._journal.held(kind)) for kind in ("feeder", "starter"))
        if self._journal.facts.get("released"):
            return
        if self._starter is not None:
            self._starter.kill()
        await at_once(partial(remove_task, self._containerd, self._offer.record.id))
        (self.scratch / "started.json").unlink(missing_ok=True)
        self._incoming = Incoming.adopt(self.key, run=self._config.run)
        await self._start_task()

    async def filled(self) -> Json:
        """Wait until the page feeder has put every page in its place. From then on the ledger holds only what is in the way."""
        if (figures := self._journal.facts.get("filled")) is None:
            if self._feeder is None:
                self._feeder = process_of(self._journal.held("feeder"))
            status = await self._fed()
            if self._journal.facts.get("postcopy") and not await self.is_here():  # whoever is gone lacks no page either
                raise Failed("the job is gone, and had not all its memory yet")
            figures = {name: value for name, value in status.items() if name != "state"}
            self._journal.note(filled=figures)
            if self._feeder is not None and status:
                with anyio.move_on_after(END_TIMEOUT):
                    await ended(self._feeder)
        for kind in self.lasting:
            self._journal.release(kind)
        return dict(figures)

    async def _fed(self) -> Json:
        """Wait until the page feeder is done, or until the job has ended, which the feeder does not notice while it has no page to
        give: then there are no figures."""
        if not self._journal.facts.get("postcopy"):
            return await self._status_of_feeder("done")
        while True:
            with anyio.move_on_after(LOOK_AT_JOB_EVERY):
                return await self._status_of_feeder("done")
            if await self.has_ended():
                return {}

    async def has_ended(self) -> bool:
        """Whether no task of it runs."""
        return not await run(runs, self._containerd, self._offer.record.id)

    async def close(self) -> None:
        """Let go of descriptors; a wrapper that still waits fails."""
        if self._incoming is not None:
            self._incoming.close()
        if self._store is not None:
            self._store.close()
        if self._upper is not None:
            self._upper.close()
        for image in self._images.values():
            image.close()
        if self._log >= 0:
            os.close(self._log)
        self._incoming = self._store = self._upper = None
        self._images.clear()
        self._log = -1

    async def _status_of_feeder(self, *wanted: str) -> Json:
        """Wait for one of these states of the page feeder; its death before is an error."""
        path = self.scratch / FEEDER_STATUS
        while True:
            alive = self._feeder is not None and self._feeder.alive()
            with suppress(OSError, ValueError):
                status: Json = json.loads(path.read_text())
                if status["state"] in wanted and (alive or status["state"] == "done"):
                    return status
                if status["state"] == "failed":
                    raise Failed("the page feeder failed", why=_reason(status), evidence=self._log_of("feeder"))
            if not alive:
                raise Failed("the page feeder died", evidence=self._log_of("feeder"))
            await anyio.sleep(LOOK_EVERY)

    async def _starter_ended(self) -> None:
        if self._starter is not None:
            await ended(self._starter)
        try:
            answer = json.loads((self.scratch / "started.json").read_text())
        except (OSError, ValueError) as error:
            raise Failed.because("the starter died", error) from error
        if "error" in answer:
            failure = PodferryError.from_dict(answer["error"])
            failure.evidence = self._restore_log() or failure.evidence
            raise failure

    def _spawn(self, kind: str, argv: list[str | Path]) -> Process:
        """Start a helper that outlives this agent."""
        with (self.scratch / f"{kind}.log").open("wb") as log:
            child = spawn(outside.surviving(argv), stdout=log, stderr=log, env=helper_environment())
        process = Process.of(child.pid)
        if process is None:
            raise Failed(f"the {kind} died at once", evidence=self._log_of(kind))
        self._journal.acquire(kind, pid=process.pid, started=process.started)
        return process

    def _restore_log(self) -> list[str]:
        return self._incoming.failure() if self._incoming else []

    def _log_of(self, kind: str) -> list[str]:
        return last_lines(self.scratch / f"{kind}.log")

    def _need_incoming(self) -> Incoming:
        if self._incoming is None:
            self._incoming = Incoming.adopt(self.key, run=self._config.run)
        return self._incoming

    def _need_store(self) -> PageStore:
        if self._store is None:
            raise Bug("pages came before the container was prepared")
        return self._store


def _reason(status: Json) -> str:
    return str(PodferryError.from_dict(status["error"])) if status.get("error") else ""


def handlers(config: Config, containerd: Containerd) -> dict[str, Handler]:
    """How each thing that the ledger of an arriving container may hold is taken back."""

    def threaded(function: Callable[[Mapping[str, Any]], object]) -> Handler:
        return lambda facts: at_once(function, facts)

    def gone(function: Callable[..., object]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            with suppress(NotFound):
                function(*args)

        return call

    return {
        "container": threaded(lambda facts: gone(containerd.delete_container)(facts["id"])),
        "snapshot": threaded(lambda facts: gone(containerd.remove_snapshot)(facts["snapshotter"], facts["key"])),
        "scratch": threaded(lambda facts: shutil.rmtree(facts["directory"], ignore_errors=True)),
        "incoming": threaded(lambda facts: shutil.rmtree(config.incoming / facts["key"], ignore_errors=True)),
        "restored": threaded(lambda facts: (config.run / "restored" / facts["key"]).unlink(missing_ok=True)),
        "log": threaded(lambda facts: Path(facts["path"]).unlink(missing_ok=True)),
        "task": threaded(lambda facts: remove_task(containerd, facts["id"])),
        "feeder": threaded(kill_helper),
        "starter": threaded(kill_helper),
    }
