"""A pod: the kubelet makes its containers on the target, and removes what is left of them on the source. Of the original only the
processes are killed here; records, snapshots and the sandbox go when the pod's object goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from podferry.core.undo import Handler
from podferry.criu.checkpoint import Process
from podferry.criu.connections import content
from podferry.criu.images import without_deleted_sources
from podferry.engine.journal import Journal
from podferry.engine.ports import IMAGES, Images
from podferry.errors import Failed
from podferry.fs.private import private_directory
from podferry.node import outside
from podferry.node.cgroup import Cgroup
from podferry.node.payloads import OPEN_FILES
from podferry.node.process import spawn
from podferry.workload.frozen import FrozenContainer
from podferry.workload.helpers import helper_environment, kill_helper, python
from podferry.workload.numbers import directory_of
from podferry.workload.pod.offered import PAYLOADS
from podferry.workload.pod.probes import Probe
from podferry.workload.threads import Looks, run

STAND_IN = "stand-in"
"""The process that answers probes (`podferry.workload.answering`), in the ledger."""
_MOUNTS = re.compile(r"mountpoints-\d+\.img")

HandOver = Callable[[], Awaitable[None]]
"""Returns when the owner counts the target pod, and the source pod is deleted."""


class KubeletOwner:
    """The kubelet has the pod. `departed` is the mark that nothing of it starts here; `payloads` packs what the kubelet has written
    for it and these images say is open; `probes` are answered while it stands still."""

    def __init__(
        self,
        journal: Journal,
        hand_over: HandOver,
        *,
        departed: Path,
        payloads: Callable[[Iterable[bytes]], bytes] = lambda images: b"",
        probes: Sequence[Probe] = (),
    ) -> None:
        self._journal, self._hand_over = journal, hand_over
        self._departed, self._payloads, self._probes = departed, payloads, probes
        self._looks = Looks()

    async def stand_by(self, cgroups: Sequence[Cgroup]) -> None:
        """Start what answers probes when the containers do not."""
        if self._probes:
            await run(self._start_stand_in, cgroups)

    def _start_stand_in(self, cgroups: Sequence[Cgroup]) -> None:
        what = {"cgroups": [one.to_dict() for one in cgroups], "probes": [asdict(one) for one in self._probes]}
        argv = outside.surviving([*python("podferry.workload.answering"), json.dumps(what)])
        process = Process.of(spawn(argv, env=helper_environment()).pid)
        if process is None:
            raise Failed("what answers the pod's liveness probes while it stands still died at once")
        self._journal.acquire(STAND_IN, **asdict(process))

    async def before_freeze(self) -> None:
        """From here on nothing of the pod starts on this node, unless it is undone."""
        self._journal.acquire("departed", path=str(self._departed))
        private_directory(self._departed.parent, below=self._departed.parents[1])
        self._departed.touch()

    async def completed(self, images: Images) -> Images:
        """Without mounts whose source was deleted here, and with what is open of the pod's own volumes."""
        whole = {
            name: without_deleted_sources(content(data)) if _MOUNTS.fullmatch(name[1]) else data
            for name, data in images.items()
        }
        open_files = (content(data) for (_, name), data in images.items() if name == OPEN_FILES)
        if payloads := await self._looks.at_once(partial(self._payloads, open_files)):
            whole[directory_of(0, IMAGES), PAYLOADS] = payloads
        return whole

    async def before_commit(self) -> None:
        """Have the owner count the target pod. The mark that nothing of the pod starts here again stays until the pod is gone."""
        await self._hand_over()
        self._journal.release("departed")

    async def after_commit(self, killed: Sequence[FrozenContainer]) -> None:
        """What remains is the kubelet's; nobody need answer probes any more."""
        if (facts := self._journal.held(STAND_IN)) is not None:
            await run(kill_helper, facts)
            self._journal.release(STAND_IN)


def source_handlers() -> dict[str, Handler]:
    """How what the source of a pod holds beside its containers is taken back."""

    async def come_back(facts: Mapping[str, Any]) -> None:
        Path(facts["path"]).unlink(missing_ok=True)

    return {"departed": come_back, STAND_IN: lambda facts: run(kill_helper, facts)}
