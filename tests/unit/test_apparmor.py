"""AppArmor is shown to CRIU where the kernel has it; the machine tests move a container that it confines."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.errors import Failed
from podferry.node import apparmor

pytestmark = pytest.mark.unit


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> list[list[object]]:
    """What was run to mount something."""
    argvs: list[list[object]] = []
    monkeypatch.setattr(apparmor, "run", argvs.append)
    return argvs


def kernel(place: Path, enabled: str, *, mounted: bool) -> tuple[Path, Path]:
    """A /sys, and what CRIU remembers of the kernel."""
    parameters = place / "sys/module/apparmor/parameters"
    parameters.mkdir(parents=True)
    (parameters / "enabled").write_text(f"{enabled}\n")
    (place / "sys/kernel/security").mkdir(parents=True)
    if mounted:
        (place / "sys/kernel/security/apparmor").mkdir()
    facts = place / "criu.kdat"
    facts.write_bytes(b"no AppArmor here")
    return place / "sys", facts


def test_securityfs_is_mounted_where_a_pod_does_not_have_it(tmp_path: Path, mounts: list[list[object]]) -> None:
    sys, facts = kernel(tmp_path, "Y", mounted=False)
    apparmor.show(sys, facts)
    assert mounts == [["mount", "-t", "securityfs", "securityfs", sys / "kernel/security"]]
    assert not facts.exists(), "CRIU would go on saying that there is no AppArmor"


@pytest.mark.parametrize(("enabled", "mounted"), [("Y", True), ("N", False)])
def test_nothing_is_mounted_otherwise(tmp_path: Path, mounts: list[list[object]], enabled: str, mounted: bool) -> None:
    sys, facts = kernel(tmp_path, enabled, mounted=mounted)
    apparmor.show(sys, facts)
    apparmor.show(tmp_path / "a kernel without it", facts)
    assert mounts == []
    assert facts.exists()


def test_an_agent_that_may_not_mount_works_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(argv: list[object]) -> None:
        raise Failed("mount ended with 32")

    monkeypatch.setattr(apparmor, "run", refuse)
    sys, facts = kernel(tmp_path, "Y", mounted=False)
    apparmor.show(sys, facts)
    assert facts.exists()


def test_a_profile_that_the_target_has_not_loaded_is_named(tmp_path: Path) -> None:
    profiles = tmp_path / "kernel/security/apparmor/profiles"
    profiles.parent.mkdir(parents=True)
    profiles.write_text("cri-containerd.apparmor.d (enforce)\nlsb_release (complain)\n")
    for profile in ("cri-containerd.apparmor.d", "lsb_release", "unconfined", "", None):
        assert apparmor.refusal({"process": {"apparmorProfile": profile}}, "train", "node-b", tmp_path) is None
    for spec in ({}, {"process": None}):
        assert apparmor.refusal(spec, "train", "node-b", tmp_path) is None
    for where in (tmp_path, tmp_path / "a kernel without it"):
        refused = apparmor.refusal({"process": {"apparmorProfile": "cri"}}, "train", "node-b", where)
        assert "node-b has no AppArmor profile 'cri', which confines train" in str(refused)
