"""Shared images: containerd's snapshots over layers that live once, on a file system that every node mounts."""

from __future__ import annotations

from podferry.snapshotter.checking import CheckedLayer, check_layers
from podferry.snapshotter.layout import FormName
from podferry.snapshotter.opening import initialise, open_share
from podferry.snapshotter.references import forget
from podferry.snapshotter.share_report import ImagesReport, images_report

__all__ = [
    "CheckedLayer",
    "FormName",
    "ImagesReport",
    "check_layers",
    "forget",
    "images_report",
    "initialise",
    "main",
    "open_share",
]


def main() -> None:
    """The program `podferry-snapshotter`."""
    from podferry.snapshotter.program import main as program

    program()
