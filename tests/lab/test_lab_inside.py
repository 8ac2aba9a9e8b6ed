"""Tests marked `node` run inside a node, with its Python, and can use what a node has."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest

from podferry.lab import inside
from podferry.lab.root_images import python_of
from podferry.node.process import run

pytestmark = pytest.mark.node


def test_this_runs_inside_a_node() -> None:
    assert inside()
    assert socket.gethostname() == "node-a"
    assert Path("/proc/self/ns/mnt").samefile("/proc/1/ns/mnt")


def test_the_python_is_the_nodes_own_and_finds_its_packages() -> None:
    assert ".".join(map(str, sys.version_info[:2])) == python_of(Path("/"))
    import cryptography
    import grpc
    import xxhash
    import zstandard

    for module in (cryptography, grpc, xxhash, zstandard):
        assert module.__file__ is not None
        assert module.__file__.startswith("/opt/podferry/site/")


@pytest.mark.parametrize("program", ["containerd", "ctr", "runc", "criu", "glusterfs", "mkfs.erofs", "podferry-runc"])
def test_the_programs_of_a_node_are_there(program: str) -> None:
    assert shutil.which(program)


def test_interrupts_are_not_ignored() -> None:
    """A shell's background job ignores SIGINT, and all its children with it; the stage must not be one."""
    status = run(["cat", "/proc/1/status"]).stdout
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert not ignored & 0b110, "PID 1 ignores SIGINT or SIGQUIT, and so does every container"


def test_criu_finds_what_it_needs() -> None:
    checked = run(["criu", "check"], check=False)
    assert checked.returncode == 0, checked.stderr
