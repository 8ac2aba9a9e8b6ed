"""Which CRIU the nodes of a lab have: that of their Debian, or a later one where that cannot save anything on this kernel."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from podferry.core.labhost import LabHost
from podferry.install.criu_bundle import DIRECTORY
from podferry.lab import Lab, hostfacts, root_images, site
from podferry.lab.debian import NEXT_SUITE, SUITE
from podferry.lab.kubernetes import daemons, portable_criu
from podferry.lab.lab_settings import LabSettings

pytestmark = pytest.mark.unit

OLD, LATE = "6.12.48+deb13-amd64", "7.1-rc1"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, LabSettings], dict[str, Path]]]:
    """What nodes are shown on a kernel, with nothing built for it."""
    monkeypatch.setattr(site, "site", lambda *_: Path("/site"))
    monkeypatch.setattr(root_images, "job_archive", lambda *_: Path("/job.tar"))
    monkeypatch.setattr(root_images, "pause_archive", lambda *_: Path("/pause.tar"))
    monkeypatch.setattr(daemons, "directory", lambda: Path("/kubernetes"))
    monkeypatch.setattr(portable_criu, "late_bundle", lambda *_: Path("/late"))

    def of(release: str, settings: LabSettings) -> dict[str, Path]:
        monkeypatch.setattr(platform, "release", lambda: release)
        return Lab("test-criu")._binds(settings, Path("/root"), print)

    yield of


@pytest.mark.parametrize("suite", [SUITE, NEXT_SUITE])
def test_nodes_have_a_late_criu_on_a_late_kernel(
    shown: Callable[[str, LabSettings], dict[str, Path]], suite: str
) -> None:
    assert shown(LATE, LabSettings(debian=suite))[DIRECTORY] == Path("/late")
    assert DIRECTORY not in shown(OLD, LabSettings(debian=suite))


def test_in_a_cluster_it_is_for_agents_to_bring_one(shown: Callable[[str, LabSettings], dict[str, Path]]) -> None:
    """Where it is shown read-only, they could not."""
    assert DIRECTORY not in shown(LATE, LabSettings(kubernetes=True))


def test_doctor_judges_by_the_criu_that_nodes_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(release: str, **more: bool) -> LabHost:
        monkeypatch.setattr(platform, "release", lambda: release)
        return hostfacts.lab_host("test-criu", debian=SUITE, **more)

    monkeypatch.setattr(hostfacts, "_trials", lambda: {})
    assert found(LATE).criu == portable_criu.LATE
    assert found(LATE, kubernetes=True).criu == (4, 2), "what agents bring"
    assert found(OLD).criu == (4, 1)
