"""Payloads of a pod's volumes: which have something open, and that they arrive as they were and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from upper_tree import picture

from podferry.errors import Failed, PeerMisbehaved
from podferry.node import payloads

pytestmark = pytest.mark.unit
THEN, NOW = "..2026_11_28_01_45_00.1234567890", "..2026_11_28_01_46_30.42"
SETTINGS = "kubernetes.io~configmap/settings"
KEY = "kubernetes.io~secret/key"


def volume(kubelet: Path, uid: str, place: str, version: str, **files: str) -> Path:
    """A volume as the kubelet leaves it."""
    root = kubelet / "pods" / uid / "volumes" / place
    payload = root / version
    for name, content in files.items():
        (payload / "sub").mkdir(parents=True, exist_ok=True)
        (payload / name).write_text(content)
        (payload / "sub" / name).write_text(content * 2)
        (payload / name).chmod(0o640)
        (root / name).symlink_to(f"..data/{name}")
    (root / "..data").symlink_to(version)
    return payload


def test_only_payloads_in_which_something_is_open_travel(tmp_path: Path) -> None:
    held = volume(tmp_path, "one", SETTINGS, THEN, script="true")
    volume(tmp_path, "one", KEY, NOW, word="sesame")
    volume(tmp_path, "one", "kubernetes.io~empty-dir/disk", THEN, mine="of the job")
    images = [b"\x0a/scripts/" + THEN.encode() + b"/script", b"/etc/passwd"]
    assert payloads.open_in(images, "one", tmp_path) == [held]
    assert payloads.open_in([b"/etc/passwd"], "one", tmp_path) == []
    assert payloads.open_in(images, "another", tmp_path) == []


def test_they_arrive_as_they_were_and_what_the_kubelet_has_written_stays(tmp_path: Path) -> None:
    sent = [volume(tmp_path, "one", SETTINGS, THEN, script="a" * 700_000), volume(tmp_path, "one", KEY, THEN, word="x")]
    here = volume(tmp_path, "two", SETTINGS, NOW, script="b")
    volume(tmp_path, "two", KEY, THEN, word="of the target's own")
    before = picture(here)
    payloads.unpack(payloads.pack(sent), "two", tmp_path)
    assert picture(here.with_name(THEN)) == picture(sent[0])
    assert picture(here) == before
    assert (here.parent / "script").read_text() == "b"
    assert (tmp_path / "pods/two/volumes" / KEY / "word").read_text() == "of the target's own", "it was there already"


def test_a_volume_that_the_pod_has_not_is_said(tmp_path: Path) -> None:
    sent = payloads.pack([volume(tmp_path, "one", SETTINGS, THEN, script="a")])
    with pytest.raises(Failed, match="no volume settings here"):
        payloads.unpack(sent, "two", tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        f"kubernetes.io~configmap/../../../../../etc/{THEN}",
        f"kubernetes.io~empty-dir/disk/{THEN}",
        f"kubernetes.io~configmap/settings/{THEN}/..",
        "kubernetes.io~configmap/settings/..data",
        f"/etc/{THEN}",
        f"{SETTINGS}/{THEN}\n",
    ],
)
def test_a_peer_cannot_write_anywhere_else(tmp_path: Path, place: str) -> None:
    volume(tmp_path, "two", SETTINGS, NOW, script="b")
    sent = payloads.pack([volume(tmp_path, "one", SETTINGS, THEN, script="a")])
    name = f"{SETTINGS}/{THEN}".encode()
    forged = len(place).to_bytes(2, "little") + place.encode() + sent[2 + len(name) :]
    with pytest.raises(PeerMisbehaved, match="cannot be a payload"):
        payloads.unpack(forged, "two", tmp_path)


def test_what_is_cut_off_is_no_payload(tmp_path: Path) -> None:
    here = volume(tmp_path, "two", SETTINGS, NOW, script="b")
    sent = payloads.pack([volume(tmp_path, "one", SETTINGS, THEN, script="a")])
    for end in range(1, len(sent)):
        with pytest.raises(PeerMisbehaved):
            payloads.unpack(sent[:end], "two", tmp_path)
        for path in here.parent.glob(f"{THEN}/**/*"):
            assert path.is_relative_to(here.with_name(THEN))
        if (made := here.with_name(THEN)).exists():
            shutil.rmtree(made)
