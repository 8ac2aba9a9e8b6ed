"""deploy/, as far as it can be read: what is where, and what nobody may do."""

from __future__ import annotations

import importlib
import json
import re
import tarfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from podferry import __version__
from podferry.controller import webhook
from podferry.install import criu_bundle
from podferry.install.containerd_config import RUNTIME
from podferry.install.node import WRAPPER
from podferry.lab import oci, spdx
from podferry.lab.kubernetes import image

pytestmark = pytest.mark.unit
DEPLOY = Path(__file__).parents[2] / "deploy"
Json = dict[str, Any]


def objects(directory: Path = DEPLOY) -> list[Json]:
    """What a kustomization names, file by file."""
    named = yaml.safe_load((directory / "kustomization.yaml").read_text())["resources"]
    return [one for name in named for one in yaml.safe_load_all((directory / name).read_text())]


def of_kind(kind: str) -> dict[str, Json]:
    return {one["metadata"]["name"]: one for one in objects() if one["kind"] == kind}


def test_every_file_is_named_by_its_kustomization() -> None:
    apart = {path.parent for path in DEPLOY.glob("*/kustomization.yaml")}
    for directory in (DEPLOY, *apart):
        named = set(yaml.safe_load((directory / "kustomization.yaml").read_text())["resources"])
        there = {path for path in directory.rglob("*.yaml") if directory != DEPLOY or path.parent not in apart}
        assert named == {str(path.relative_to(directory)) for path in there if path.name != "kustomization.yaml"}


@pytest.mark.parametrize("directory", [DEPLOY, DEPLOY / "uninstall"], ids=["deploy", "uninstall"])
def test_the_image_is_the_one_that_the_script_makes_in_this_version(directory: Path) -> None:
    (chosen,) = yaml.safe_load((directory / "kustomization.yaml").read_text())["images"]
    assert chosen == {"name": image.NAME, "newTag": __version__}
    used = set(re.findall(r"image: (\S+)", "".join(path.read_text() for path in directory.glob("*.yaml"))))
    assert used == {image.NAME}


def test_what_starts_is_in_the_image() -> None:
    for one in objects():
        pod = one.get("spec", {}).get("template", {}).get("spec", {})
        for container in [*pod.get("initContainers", []), *pod.get("containers", [])]:
            assert container["command"][0] in image.PROGRAMS


def test_the_images_programs_are_those_of_the_package() -> None:
    """Each begins where the package's own entry point does, and that is there."""
    scripts = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]["scripts"]
    for name, module in image.PROGRAMS.items():
        assert scripts[name] == f"{module}:main"
        assert callable(importlib.import_module(module).main)


def test_the_runtime_class_names_the_runtime_that_is_installed() -> None:
    assert of_kind("RuntimeClass")["podferry"]["handler"] == RUNTIME
    agent = of_kind("DaemonSet")["podferry-agent"]["spec"]["template"]["spec"]
    paths = {one["hostPath"]["path"] for one in agent["volumes"]}
    assert str(Path(WRAPPER).parent) in paths
    mounts = {one["name"]: one["mountPath"] for one in agent["containers"][0]["volumeMounts"]}
    for volume in agent["volumes"]:
        assert mounts[volume["name"]] == volume["hostPath"]["path"], "the node's programs are handed the agent's paths"


def test_nobody_may_do_everything() -> None:
    for role in (*of_kind("ClusterRole").values(), *of_kind("Role").values()):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], role["metadata"]["name"]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_agents_read_no_secrets_and_make_no_pods() -> None:
    rules = [
        *of_kind("ClusterRole")["podferry-agent"]["rules"],
        *of_kind("Role")["podferry-agent"]["rules"],
    ]
    for rule in rules:
        assert "secrets" not in rule["resources"]
        if "pods" in rule["resources"] or "nodes" in rule["resources"]:
            assert rule["verbs"] == ["get"], "one that it knows the name of"


def test_the_controller_is_an_ordinary_pod() -> None:
    pod = of_kind("Deployment")["podferry-controller"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not {"hostNetwork", "hostPID", "volumes"} & set(pod)
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_an_image_of_another_and_more_layers(tmp_path: Path) -> None:
    for name in ("base", "first", "second"):
        (tmp_path / name / "opt").mkdir(parents=True)
        (tmp_path / name / "opt" / name).write_text(name)
    base, made, again = tmp_path / "base.tar", tmp_path / "made.tar", tmp_path / "again.tar"
    oci.write_archive(
        tmp_path / "base", base, reference="example/base:1", architecture="amd64", command=["sh"], env=["A=1"]
    )
    trees = [tmp_path / "first", tmp_path / "second"]
    for archive in (made, again):
        oci.extend(base, archive, trees, reference="example/made:2", command=["run"], env=["B=2"])
    assert made.read_bytes() == again.read_bytes()
    with tarfile.open(made) as tar:

        def read(digest: str) -> bytes:
            file = tar.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert file is not None
            return file.read()

        index = tar.extractfile("index.json")
        assert index is not None
        (named,) = json.load(index)["manifests"]
        manifest = json.loads(read(named["digest"]))
        config = json.loads(read(manifest["config"]["digest"]))
        assert named["annotations"]["io.containerd.image.name"] == "example/made:2"
        assert config["config"] == {"Cmd": ["run"], "Env": ["B=2"], "WorkingDir": "/"}
        digests = [one["digest"] for one in manifest["layers"]]
        assert len(digests) == 3
        assert config["rootfs"]["diff_ids"] == digests
        for digest in [named["digest"], manifest["config"]["digest"], *digests]:
            assert oci._blob(read(digest)).digest == digest.removeprefix("sha256:")
        assert [one["size"] for one in manifest["layers"]] == [len(read(digest)) for digest in digests]
    assert oci.digest(made) == named["digest"]
    assert oci.read(made, "opt/second") == b"second"
    assert oci.read(made, "opt/base") == b"base"
    with pytest.raises(FileNotFoundError):
        oci.read(made, "opt/third")


STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.41-12+deb13u5
Description: more
 Version: 7 of something else

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1:1.0
"""


def test_an_image_lists_what_it_is_made_of(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "Zope_x-1.5.dist-info").mkdir(parents=True)
    (site / "Zope_x-1.5.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: Zope_x\nVersion: 1.5\n")
    packages = [*spdx.of_debian(STATUS), *spdx.of_python(site)]
    assert [one.url for one in packages] == ["pkg:deb/debian/libc6@2.41-12%2Bdeb13u5?arch=amd64", "pkg:pypi/zope_x@1.5"]
    made = spdx.document(image.NAME, "1.0", packages, created=datetime(2026, 1, 2, tzinfo=UTC))
    assert made == spdx.document(image.NAME, "1.0", reversed(packages), created=datetime(2026, 1, 2, tzinfo=UTC))
    spdx.write(tmp_path, made)
    read = json.loads((tmp_path / spdx.PLACE).read_text())
    assert (read["spdxVersion"], read["dataLicense"], read["creationInfo"]["created"]) == (
        "SPDX-2.3",
        "CC0-1.0",
        "2026-01-02T00:00:00Z",
    )
    described = {one["relatedSpdxElement"] for one in read["relationships"]}
    assert described == {one["SPDXID"] for one in read["packages"]}
    assert len(described) == 2


def test_our_criu_lies_apart_from_everything_of_the_nodes() -> None:
    assert criu_bundle.DIRECTORY.startswith("/opt/podferry/")


def test_a_drain_of_nodes_leaves_a_controller_that_answers_evictions() -> None:
    """Where none answers, what could move is evicted: by the time that one is asked no more it has answered the last question."""
    deployment = of_kind("Deployment")["podferry-controller"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    evictions = next(one["containerPort"] for one in container["ports"] if one["name"] == "evictions")
    assert evictions == webhook.PORT
    assert container["readinessProbe"]["tcpSocket"] == {"port": "evictions"}
    asked = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert webhook_timeout() < asked < pod["terminationGracePeriodSeconds"]
    budget = of_kind("PodDisruptionBudget")["podferry-controller"]["spec"]
    assert budget["minAvailable"] < deployment["replicas"]
    assert budget["selector"] == deployment["selector"]


def webhook_timeout() -> int:
    """Seconds that the API server waits for an answer about an eviction."""
    (configuration,) = [one for one in objects(DEPLOY / "evictions") if one["kind"] == "ValidatingWebhookConfiguration"]
    (one,) = configuration["webhooks"]
    seconds: int = one["timeoutSeconds"]
    return seconds
