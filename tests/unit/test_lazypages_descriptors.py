"""The lazy-pages daemon's two processes at their start, when one may be slower than the other."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from podferry.memory.store.page_store import PageStore
from podferry.node.process import spawn

pytestmark = pytest.mark.unit

SLOW_HOLDER = """
import sys, time
from podferry.lazypages import daemon
from podferry.lazypages import descriptor_holder as descriptors
keep = descriptors._keep

def slowly(*given):
    time.sleep(0.5)
    keep(*given)

descriptors._keep = slowly
sys.exit(daemon.main(sys.argv[1:]))
"""


def test_told_to_end_before_the_keeper_is_ready_both_end_in_order(tmp_path: Path) -> None:
    with closing(PageStore.create(tmp_path / "store")) as store:
        store.sync()
    argv = [sys.executable, "-c", SLOW_HOLDER, "--work", tmp_path, "--images", tmp_path]
    argv += ["--store", tmp_path / "store", "--status", tmp_path / "status"]
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    daemon = spawn(argv, env=environment, stdout=subprocess.PIPE)
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        daemon.terminate()
        assert daemon.wait(30) == 1, "and not of the signal, which would say that it was killed"
    finally:
        daemon.kill()
        daemon.wait()
