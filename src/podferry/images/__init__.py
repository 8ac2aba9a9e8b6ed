"""Shared images: containerd's snapshots over layers that live once, on a file system that every node mounts."""

from __future__ import annotations


def main() -> None:
    """The program `podferry-snapshotter`."""
    from podferry.images.program import main as program

    program()
