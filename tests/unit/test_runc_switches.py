"""What runc would deny CRIU is asked of runc, where it knows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podferry.criu.checkpoint import CRIU_CONF
from podferry.criu.runc_switches import WANTED, switches

pytestmark = pytest.mark.unit


def runc(path: Path, *options: str) -> Path:
    lines = "".join(f"   {one}   what it does\\n" for one in ("--image-path value", *options))
    made = path.with_name("new")
    made.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    made.chmod(0o755)
    os.replace(made, path)  # noqa: PTH105 - as a package manager does
    return path


def test_an_older_runc_is_asked_for_nothing_it_does_not_know(tmp_path: Path) -> None:
    assert switches(runc(tmp_path / "runc")) == ()
    assert switches(runc(tmp_path / "runc", "--link-remap-of-all")) == ()
    assert switches(tmp_path / "none") == ()


def test_a_runc_that_was_upgraded_is_asked_anew(tmp_path: Path) -> None:
    assert switches(runc(tmp_path / "runc", "--link-remap")) == ("--link-remap",)
    assert switches(runc(tmp_path / "runc", *WANTED)) == WANTED


def test_what_runc_is_asked_for_is_what_the_file_of_settings_says() -> None:
    settings = CRIU_CONF.read_text().splitlines()
    assert {"link-remap", "skip-in-flight"} <= set(settings)
