"""`podferry install` and `podferry uninstall`: this node of a cluster, by what its agent's container image brings."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from podferry import install as installer
from podferry.cli.terminal import print_json, stderr, words
from podferry.errors import UsageError
from podferry.install import Installed

Json = Annotated[bool, typer.Option("--json", help="Print what changed as JSON.")]


def install(json: Json = False) -> None:
    """Put podferry's OCI runtime on this node, and tell containerd of it; CRIU too, where the node's would not do.

    `kubectl apply -k deploy/` has every node do this, and again at every start of its agent: what is in its place is left
    alone, and containerd is started again only if its settings changed. Containers run on meanwhile.
    """
    _require_root("install")
    _done(installer.install(_report), json=json)


def uninstall(
    force: Annotated[
        bool, typer.Option("--force", help="Uninstall although containers run that no runtime could stop afterwards.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until no container needs podferry any more.")] = False,
    json: Json = False,
) -> None:
    """Take podferry off this node again: every file is as it was before `podferry install`, the agent's key and journals are gone.

    `kubectl apply -k deploy/uninstall` has every node do this. While containers run that podferry's runtime started, it
    is refused, or waits. A file that somebody else has changed since is left alone, and said so.
    """
    _require_root("uninstall")
    _done(installer.uninstall(_report, force=force, wait=wait), json=json)


def _done(done: Installed, *, json: bool) -> None:
    if json:
        print_json(asdict(done))


def _report(step: str) -> None:
    stderr().print(words(step))


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise UsageError(f"podferry {command} needs root", why="it writes what containerd runs", remedy="use sudo")
