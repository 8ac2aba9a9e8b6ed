"""Where a restored container belongs, as runc works it out of the spec."""

from __future__ import annotations

from pathlib import Path

import pytest

from podferry.core.facts import CgroupKind
from podferry.criu import restored_group
from podferry.criu.incoming import Incoming
from podferry.criu.restored_group import group_of, group_to_restore

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("/default/job", "/default/job"),
        ("/kubepods/burstable/pod7/c1", "/kubepods/burstable/pod7/c1"),
        (
            "kubepods-burstable-pod7_1.slice:cri-containerd:c1",
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7_1.slice/cri-containerd-c1.scope",
        ),
        ("machine.slice:runc:c1", "/machine.slice/runc-c1.scope"),
        (":runc:c1", "/system.slice/runc-c1.scope"),
        ("-.slice:runc:c1", "/runc-c1.scope"),
        ("a.slice:runc:b.slice", "/a.slice/b.slice"),
        ("c1", ""),
        ("", ""),
        ("a:b", ""),
    ],
)
def test_the_group_is_the_one_that_runc_makes(path: str, group: str) -> None:
    assert group_of(path) == group


@pytest.mark.parametrize(
    ("kind", "runc", "told"),
    [
        (CgroupKind.V2, "1.1.15", True),
        (CgroupKind.V2, "", True),
        (CgroupKind.V2, "1.2.0", False),
        (CgroupKind.V1, "1.1.15", False),
        (CgroupKind.HYBRID, "1.1.15", False),
    ],
)
def test_it_is_told_where_runc_does_not(
    monkeypatch: pytest.MonkeyPatch, kind: CgroupKind, runc: str, told: bool
) -> None:
    monkeypatch.setattr(restored_group, "cgroup_kind", lambda: kind)
    assert group_to_restore({"linux": {"cgroupsPath": "/pods/c1"}}, runc) == ("/pods/c1" if told else "")
    assert group_to_restore({}, runc) == ""


@pytest.mark.parametrize("settings", ["", "network-lock skip"])
@pytest.mark.parametrize("group", ["", "/pods/c1"])
def test_criu_reads_it_among_its_settings(tmp_path: Path, settings: str, group: str) -> None:
    with Incoming.prepare("job", criu_conf=settings, run=tmp_path) as incoming:
        incoming.belongs_in(group)
        conf = incoming.path / "criu.conf"
        lines = conf.read_text().split("\n") if conf.exists() else []
        lines = [line for line in lines if line and not line.startswith("action-script")]
        assert lines == [one for one in (settings, group and f"cgroup-root :{group}") if one]
