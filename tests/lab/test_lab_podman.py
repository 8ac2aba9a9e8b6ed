"""Debian's podman with an additional image store on the share: what docs/images.md tells users of Podman and CRI-O."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from moving import A, B
from test_lab_images import TINY, archive, layer_bytes, layers_of

from podferry.lab import Lab, containers
from podferry.lab.build_cache import cached
from podferry.lab.debian import SUITE, architecture, bootstrap
from podferry.lab.state import CACHE

pytestmark = [pytest.mark.lab, pytest.mark.slow]
PACKAGES = ["ca-certificates", "crun", "podman"]
STORE = "/share/containers"
STAGE = """
cd /var/lib/podferry
mkdir -p podman/up podman/work podman/root podman/containers
cd podman
mount -t overlay overlay -o lowerdir=/opt/podman,upperdir=up,workdir=work root
for one in proc sys dev run share; do mkdir -p root/$one; mount --rbind /$one root/$one; done
mkdir -p root/var/lib/containers root/etc/containers
mount --bind containers root/var/lib/containers
cp /etc/hosts /etc/resolv.conf root/etc/
cp /etc/ssl/certs/podferry-lab.pem root/etc/ssl/certs/
printf '[engine]\\nno_pivot_root = true\\n' > root/etc/containers/containers.conf  # in a chroot nobody can
cat > root/etc/containers/storage.conf
"""
QUIET = {"PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}


def storage_conf() -> str:
    """The file that the documents tell people to write."""
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
    (found,) = re.findall(r"^```toml\n(\[storage\]\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(found)


def podman(lab: Lab, node: str, *argv: str) -> str:
    command = ["chroot", "/var/lib/podferry/podman/root", "podman", "--cgroup-manager=cgroupfs", *argv]
    return lab.exec(node, command, env=QUIET, timeout=120.0).stdout


@pytest.fixture
def podmen(own_lab: Lab) -> Lab:
    """A lab whose nodes have podman, in a root of its own beside the node's."""
    recipe = {"suite": SUITE, "packages": PACKAGES, "arch": architecture()}
    root = cached("podman", recipe, lambda into: bootstrap(PACKAGES, into, CACHE / "debs", print))
    own_lab.up(2, agent=False, binds={"/opt/podman": root}, progress=print)
    for node in (A, B):
        own_lab.exec(node, ["sh", "-ec", STAGE], input=storage_conf())
    return own_lab


def test_a_second_podman_runs_from_the_share_and_downloads_nothing(podmen: Lab, tmp_path: Path) -> None:
    path = archive(tmp_path, "hello")
    containers.push(podmen, path, compress=False)
    layers = layers_of(path)
    # As documented: one node pulls into a store of its own and copies that to the share.
    podman(podmen, A, "--root=/var/lib/containers/made", "pull", TINY)
    assert layer_bytes(podmen, A, layers) > 1 << 20
    made = "/var/lib/podferry/podman/containers/made"
    podmen.exec(A, ["sh", "-ec", f"mkdir {STORE}; cp -a {made}/. {STORE}/"])
    listed = podman(podmen, B, "images", "--format={{.Repository}}:{{.Tag}} {{.ReadOnly}}")
    assert listed.split() == [TINY, "true"]
    options = ["--rm", "--network=none", "--cgroups=disabled", "--pull=never"]
    said = podman(podmen, B, "run", *options, TINY, "/bin/sh", "-c", "read x < /says; echo $x; echo changed > /says")
    assert said == "hello\n"
    assert layer_bytes(podmen, B, layers) == 0
    again = podman(podmen, B, "run", *options, TINY, "/bin/sh", "-c", "read x < /says; echo $x")
    assert again == "hello\n", "what a container writes stays its own"
