"""A container on its way onto this node: its page store, CRIU's images, its upper layer and log, and its restore.

Everything it makes is in the ledger before it is made; `handlers` takes the same things back, for a migration that fails and for
one that a killed agent left.

The file is long because it has every step of one container, from the first page to the restore, in the order in which they come.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import anyio

from podferry.core.allowed_rights import rights_of
from podferry.criu.dump_images import missing
from podferry.criu.incoming import Incoming
from podferry.criu.oom_score import raise_to_spec
from podferry.criu.processes import Process
from podferry.criu.restored_group import group_to_restore
from podferry.criu.restoring import RestoreProcess
from podferry.criu.rights import demand_no_more
from podferry.engine.journal import Part
from podferry.engine.ports import IMAGES, LOG, Json, PageChannel
from podferry.errors import Bug, Failed, PeerMisbehaved, PodferryError, TimedOut
from podferry.memory.kernel.page_size import PAGE
from podferry.memory.store.page_store import PageStore
from podferry.memory.store.page_store import Totals as StoreTotals
from podferry.node.records import Container
from podferry.node.runtime import ContainerRuntime
from podferry.node.upper import Receiver, refresh_root
from podferry.wire.frames import HELD_PAGES, File
from podferry.wire.messages import StateEnd
from podferry.workload.account import Promise
from podferry.workload.config import Config
from podferry.workload.helpers import answered
from podferry.workload.keeping import INVENTORY, Kept, expect_oom_score, keeping, let_run_late
from podferry.workload.lazypages_process import LazyPagesProcess
from podferry.workload.nodefacts import version
from podferry.workload.numbers import address_space_of, container_of_address_space, demand_whole, directory_of
from podferry.workload.received_images import ReceivedImages
from podferry.workload.threads import at_once, run

PREPARE_TIMEOUT = 60.0
RESTORE_TIMEOUT = 60.0
POLL_JOB_INTERVAL = 0.5


class ContainerMaker(Protocol):
    """Who makes one container on this node."""

    name: str
    """As errors say it."""
    flags: tuple[str, ...]
    """Of the dump and the restore."""
    not_images: tuple[str, ...]
    """Files that come with CRIU's images and are none."""
    lasting: tuple[str, ...]
    """What the ledger lets go of when it stays."""

    @property
    def key(self) -> str:
        """By which podferry-runc finds what is prepared for it."""
        ...

    @property
    def made_already(self) -> Container | None:
        """Its record, once it is made."""
        ...

    def prepare(self, container: TargetContainer) -> None:
        """Give it places for its upper layer and its log."""
        ...

    async def make(self, container: TargetContainer, timeout: float) -> Container:
        """Have it made, up to podferry-runc waiting in its `create`; its record."""
        ...

    async def before_restore(self, container: TargetContainer) -> None:
        """All of it is here, and it is made: the last that must be done before its tasks run."""
        ...

    async def restored(self, container: TargetContainer) -> None:
        """Return when what restores it has ended. Raises what that says of a failure."""
        ...

    async def started(self, container: TargetContainer) -> None:
        """It has run: return when whoever it is made for knows."""
        ...

    async def is_here(self) -> bool:
        """Whether it runs, or has run here to its end."""
        ...

    async def has_ended(self) -> bool:
        """Whether no task of it runs."""
        ...

    def mark_arrived(self) -> None:
        """All of the workload has run here: from now on a restart of the container is an ordinary one."""
        ...

    async def crash(self) -> None:
        """End it as a crash would."""
        ...


class TargetContainer:
    """A container that `maker` makes, and everything that is received for it."""

    def __init__(
        self,
        config: Config,
        runtime: ContainerRuntime,
        journal: Part,
        maker: ContainerMaker,
        promise: Promise | None = None,
    ) -> None:
        """`promise` is what this node has promised of memory; nobody asks for more after GO."""
        self._promise = promise
        self.config, self.runtime, self.journal, self.maker = config, runtime, journal, maker
        self.scratch = config.incoming.with_name("arriving") / journal.directory.name
        self.upper: Receiver | None = None
        self.log_file = -1
        self.log_size = 0
        self._incoming: Incoming | None = None
        self._store: PageStore | None = None
        self._images = ReceivedImages(lambda: self.incoming.images, self.scratch / "shared", self._grows)
        self._kept = Kept()
        self._lazypages = LazyPagesProcess(journal, self.scratch)
        self._judged = False

    @property
    def incoming(self) -> Incoming:
        """What podferry-runc finds. An agent that was restarted takes up what is there."""
        if self._incoming is None:
            self._incoming = Incoming.adopt(self.maker.key, run=self.config.run)
        return self._incoming

    @property
    def adopted(self) -> bool:
        """Whether nothing was prepared by this agent, but by one before it."""
        return self._incoming is None

    # Until GO.

    async def prepare(self) -> None:
        """Places for pages, images, the upper layer and the log."""
        await run(self._prepare)

    def _prepare(self) -> None:
        self.journal.acquire("scratch", directory=str(self.scratch))
        self._store = PageStore.create(self.scratch / "store", self._grows)
        self.maker.prepare(self)

    def _grows(self, size: int) -> None:
        if self._promise is not None:
            self._promise.take(run=size)

    def expect_restore(self, *, network: bool = False, criu_conf: str = "") -> None:
        """podferry-runc finds what is prepared for the container from now on, and waits."""
        self.journal.acquire("incoming", key=self.maker.key)
        self._incoming = Incoming.prepare(
            self.maker.key,
            flags=("--lazy-pages", *self.maker.flags),
            network=network,
            criu_conf=criu_conf,
            run=self.config.run,
        )

    def belongs_in(self, record: Container) -> None:
        """What is restored belongs in this container's cgroup."""
        self.incoming.belongs_in(group_to_restore(record.spec_json(), version("runc")))

    async def start_lazypages(self, *, postcopy: bool) -> None:
        """Start the lazy-pages daemon. May be called again for post-copy: then it takes the place of the first."""
        with anyio.fail_after(PREPARE_TIMEOUT):
            await self._lazypages.start(self.incoming, postcopy=postcopy)

    async def make(self, timeout: float) -> Container:
        """Have the container made, unless it is."""
        return self.maker.made_already or await self.maker.make(self, timeout)

    async def lost(self) -> PodferryError:
        """Return, with the reason, once podferry-runc waits no more."""
        incoming = self.incoming
        await anyio.wait_readable(incoming)
        return incoming.gone("it was killed, or the call that made the container was given up")

    # What arrives.

    def pages(self, round: int, pid: int, address: int, data: memoryview) -> None:
        """Put arrived pages of a process into the store."""
        if pid == HELD_PAGES:
            self._images.hold(address, data, round)
        else:
            self._need_store().write(pid, address, data, round)

    def drop(self, pid: int, start: int, end: int) -> None:
        """Pages that are zero or gone."""
        if pid == HELD_PAGES:
            self._images.drop(start, end)
        else:
            self._need_store().drop(pid, start, end)

    def tree(self, record: memoryview) -> None:
        """A record of the upper layer."""
        if self.upper is None:
            raise Bug("a record of the upper layer came before the container was prepared")
        self.upper.feed(record)

    def log(self, offset: int, data: memoryview) -> None:
        """A piece of what the container printed."""
        if self.log_file < 0:
            raise PeerMisbehaved("output of a container that has no log")
        if offset != self.log_size:
            raise PeerMisbehaved("the container's log came out of order", why=f"offset {offset} after {self.log_size}")
        self.log_size += os.pwrite(self.log_file, data, offset)

    def image(self, name: str, offset: int, data: memoryview, *, last: bool) -> None:
        """A piece of one of CRIU's images. The name was checked when its frame was."""
        self._grows(len(data))
        self._images.take(name, offset, data, last=last)

    def image_of_pages(self, piece: File) -> None:
        """A piece of one of CRIU's images, of pages of which some are here already."""
        self._grows(piece.size)
        self._images.take_pages(piece)

    async def verify(self, end: StateEnd) -> None:
        """All that `end` says of this container is here and whole, or an error says what is not."""
        await at_once(self._verify, end)

    async def judge(self, end: StateEnd) -> None:
        """In a rehearsal: the images that `end` announces are here, and may be restored here. Nothing else came."""
        await at_once(self._judge, end)

    def _judge(self, end: StateEnd) -> None:
        images = directory_of(self.journal.number, IMAGES)
        self._images.verify([one for one in end.files if one.directory == images])
        if self.maker.made_already is not None:
            self._judge_images()

    def _verify(self, end: StateEnd) -> None:
        number = self.journal.number
        self._images.complete()
        self._judge(end)
        demand_whole(self.upper, number, end, "the upper layer")
        if (record := self.maker.made_already) is not None:
            self._register_root(record)
        if sum(one.size for one in end.files if one.directory == directory_of(number, LOG)) != self.log_size:
            raise Failed("the container's log did not arrive whole", why=f"{self.log_size} bytes came")
        store = self._need_store()
        if self.journal.facts.get("postcopy"):
            return store.sync()
        totals = {
            pid: one.pages
            for one in end.address_spaces
            for at, pid in [container_of_address_space(one.address_space)]
            if at == number
        }
        for pid in totals:
            store.complete(pid)
        store.verify({pid: StoreTotals(1, pages, pages * PAGE) for pid, pages in totals.items()})
        if lacking := missing(store, self.incoming.images):
            raise Failed(
                "memory pages are missing",
                why=f"the source sent nothing for some pages of the processes {sorted(lacking)}",
            )
        store.sync()
        return store.close()

    def _judge_images(self) -> None:
        """Refuse images that give the container more than its spec. The job stands still meanwhile."""
        record = self.maker.made_already
        if record is None:
            raise Bug("the container is not made yet")
        rights = rights_of(record.spec_json(), os.path.exists, os.uname().machine)
        if (least := raise_to_spec(self.incoming.images, rights)) is not None:
            expect_oom_score(self.incoming.images, least)
        demand_no_more(self.incoming.images, rights, also=(INVENTORY, *self.maker.not_images))
        self._judged = True

    def _register_root(self, record: Container) -> None:
        """The upper layer is as it was on the source, and its overlay is mounted already."""
        refresh_root(self.runtime.root(record))

    # Post-copy.

    def daemon_socket(self) -> Path:
        """Where the lazy-pages daemon is told what has come, and asks for what is wanted."""
        self._promise = None
        if self._store is None:
            self._store = PageStore.open(self.scratch / "store")
        return self._lazypages.socket

    def remote_pages_complete(self, channel: PageChannel) -> None:
        """What is absent now, of the pages that CRIU left to the lazy-pages daemon, is zero."""
        for pid, gaps in missing(self._need_store(), self.incoming.images).items():
            for start, end in gaps:
                channel.zero(address_space_of(self.journal.number, pid), start, end)

    # The resume.

    async def release(self) -> float:
        """Have it restored, as soon as it is made. Returns since when it runs."""
        if not self.journal.facts.get("released"):
            await self._let_it_be_restored()
        try:
            with anyio.fail_after(RESTORE_TIMEOUT):
                async with keeping(self._incoming, self._kept):
                    await self.maker.restored(self)
        except (TimeoutError, PodferryError) as error:
            # containerd refuses to start what has ended already; what CRIU has resumed has run all the same.
            if not await self.has_run():
                raise self._not_restored(error) from error
            let_run_late(self._incoming, self._kept)
        await self.maker.started(self)
        return max(await self._lazypages.since(), self._kept.since)

    def differences(self) -> tuple[str, ...]:
        """After `release`: what the job has not here as it had it on the source."""
        return self._kept.told()

    async def _let_it_be_restored(self) -> None:
        record = await self.make(RESTORE_TIMEOUT)
        if not self._judged:
            await at_once(self._judge_images)
            await at_once(self._register_root, record)
        await self.maker.before_restore(self)
        wrapper = Process.of(self.incoming.wrapper)
        self.journal.note(released=True, wrapper=[wrapper.pid, wrapper.started] if wrapper else None)
        await at_once(self.incoming.restore)

    async def has_run(self) -> bool:
        """Whether CRIU let go of the tasks, once that cannot change any more. Then this is the job's only life."""
        restoring = RestoreProcess(self.config.incoming / self.maker.key / "work", self.wrapper())
        found = await at_once(restoring.settle)
        return self._lazypages.resumed_at() > 0 if found is None else found

    def wrapper(self) -> Process | None:
        """podferry-runc, as it was told to restore."""
        facts = self.journal.facts.get("wrapper")
        return Process(int(facts[0]), int(facts[1])) if facts else None

    def _not_restored(self, error: BaseException) -> PodferryError:
        what = f"the restore of {self.maker.name}"
        if isinstance(error, TimeoutError):
            return TimedOut(f"{what} has not ended after {RESTORE_TIMEOUT:.0f} s", evidence=self.restore_log())
        return (self._incoming and self._incoming.failed(f"{what} failed")) or Failed.because(f"{what} failed", error)

    def restore_log(self) -> list[str]:
        """What CRIU says of a restore that failed."""
        return self._incoming.failure() if self._incoming else []

    async def resumed(self) -> float:
        """Since when it runs, as `release` returns it, for an agent that was restarted. Raises where it is gone."""
        status = await self._lazypages.status("filling", "done")
        if not await answered(self.maker.is_here):
            raise Failed(f"the container {self.maker.name} is gone", evidence=self._lazypages.log())
        return float(status["resumed_ns"]) / 1e9

    async def filled(self) -> Json:
        """Wait until the lazy-pages daemon has put every page in its place."""
        if (figures := self.journal.facts.get("filled")) is None:
            status = await self._fed()
            if self.journal.facts.get("postcopy") and not await answered(
                self.maker.is_here
            ):  # whoever is gone lacks no page
                raise Failed("the job has ended before all of its memory had arrived")
            figures = {name: value for name, value in status.items() if name != "state"}
            self.journal.note(filled=figures)
            if status:
                await self._lazypages.ended()
        return dict(figures)

    async def _fed(self) -> Json:
        """Wait until the lazy-pages daemon is done, or until the job has ended, which the lazy-pages daemon does not notice
        while it has no page to
        give: then there are no figures."""
        if not self.journal.facts.get("postcopy"):
            return await self._lazypages.status("done")
        while True:
            with anyio.move_on_after(POLL_JOB_INTERVAL):
                return await self._lazypages.status("done")
            if await answered(self.maker.has_ended):
                return {}

    def entrust(self) -> None:
        """It stays, whatever becomes of the migration: from now on the ledger holds only what is in the way."""
        for kind in self.maker.lasting:
            self.journal.release(kind)

    async def close(self) -> None:
        """Let go of descriptors; a wrapper that still waits fails."""
        for one in (self._incoming, self._store, self.upper):
            if one is not None:
                one.close()
        self._images.close()
        if self.log_file >= 0:
            os.close(self.log_file)
        self._incoming = self._store = self.upper = None
        self.log_file = -1

    def _need_store(self) -> PageStore:
        if self._store is None:
            raise Bug("pages came before the container was prepared")
        return self._store
