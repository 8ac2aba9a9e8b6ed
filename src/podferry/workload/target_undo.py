"""How what a workload holds on its target is taken back, whoever makes its containers."""

from __future__ import annotations

import shutil

from podferry.core.undo import Handler
from podferry.criu.incoming import forget
from podferry.criu.incoming import remove as remove_incoming
from podferry.workload.config import Config
from podferry.workload.helpers import kill_helper
from podferry.workload.threads import threaded


def handlers(config: Config) -> dict[str, Handler]:
    """How each thing that the ledger of a container on the target may hold, whoever makes it, is taken back."""

    return {
        "scratch": threaded(lambda facts: shutil.rmtree(facts["directory"], ignore_errors=True)),
        "incoming": threaded(lambda facts: remove_incoming(config.incoming, facts["key"])),
        "restored": threaded(lambda facts: forget(config.run, facts["key"])),
        "lazy-pages-daemon": threaded(kill_helper),
    }
