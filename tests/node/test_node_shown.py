"""A directory of the node that an agent's pod does not mount, brought into its container: here a mount namespace of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from podferry.node.process import run

pytestmark = pytest.mark.node

# As an agent's container sees it: another mount namespace, in which an empty file system hides what the node has there.
CONTAINER = """
import os, subprocess, sys
from pathlib import Path
from podferry.node import outside
from podferry.node.shown import show

here, node = Path(sys.argv[1]), int(sys.argv[2])
os.environ[outside.IN_POD] = "1"
outside.FIRST = node
outside.root = lambda: Path(f"/proc/{node}/root")
subprocess.run(["mount", "-t", "tmpfs", "hides", here.parent], check=True)
print(show(here), sorted(os.listdir(here)), flush=True)
print(show(here), show(here.with_name("nothing")), show(here.with_name("new"), make=True), flush=True)
sys.stdin.readline()
print(sorted(os.listdir(here / "later")), flush=True)
subprocess.run(["mount", "-t", "tmpfs", "ours", here / "ours"], check=True)
(here / "ours" / "file").touch()
(here / "written").touch()
print("mounted", flush=True)
sys.stdin.readline()
"""


def test_what_the_node_has_there_is_seen_with_what_it_mounts_later(tmp_path: Path) -> None:
    here = tmp_path / "node" / "data"
    for name in ("later", "ours"):
        (here / name).mkdir(parents=True)
    (here / "file").touch()
    words = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        sys.executable,
        "-c",
        CONTAINER,
        str(here),
        str(Path("/proc/self").resolve().name),
    ]
    run(["mount", "--bind", here, here])
    run(["mount", "--make-shared", here])
    child = Popen(words, stdin=PIPE, stdout=PIPE, text=True)
    assert child.stdin and child.stdout
    try:
        assert child.stdout.readline() == "True ['file', 'later', 'ours']\n"
        assert child.stdout.readline() == "True False True\n"
        assert (here.with_name("new")).is_dir(), "it was made on the node"
        run(["mount", "-t", "tmpfs", "volume", here / "later"])
        (here / "later" / "of-the-node").touch()
        print("go on", file=child.stdin, flush=True)
        assert child.stdout.readline() == "['of-the-node']\n"
        assert child.stdout.readline() == "mounted\n"
        assert (here / "written").exists(), "it is the node's own directory"
        assert not (here / "ours" / "file").exists(), "what is mounted in the container stays there"
    finally:
        child.stdin.close()
        child.wait()
        run(["umount", "-R", here])
