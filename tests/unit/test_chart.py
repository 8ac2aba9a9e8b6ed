"""charts/podferry: it is what scripts/chart writes, and renders, by real helm, what kustomize makes of deploy/."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_tools import API_VERSIONS, CHART, KUBERNETES, helm, kustomize, rendered, template

from podferry import __version__

pytestmark = pytest.mark.unit
ROOT = CHART.parents[1]
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
KEEP = {"helm.sh/resource-policy": "keep"}
PARTS = {
    "evictions": ["evictions.enabled=true"],
    "opt-in": ["optIn.enabled=true"],
    "cloud-notices": ["cloudNotices.enabled=true"],
    "requested-by": ["requestedBy.enabled=true"],
    "monitoring": ["monitoring.enabled=true"],
}
"""Of deploy/, what is applied by itself, and the chart's values for it."""
Json = dict[str, Any]
Key = tuple[str, str, str]


def by_key(objects: list[Json]) -> dict[Key, Json]:
    """Objects by kind, namespace and name; each is there once."""
    found: dict[Key, Json] = {}
    for one in objects:
        about = one["metadata"]
        key = one["kind"], about.get("namespace", ""), about["name"]
        assert key not in found
        found[key] = without_line_ends(one)
    return found


def without_line_ends(value: Any) -> Any:
    """Expressions in CEL on one line: kustomize writes their folded text anew, and adds line ends."""
    if isinstance(value, dict):
        return {
            name: " ".join(one.split()) if name == "expression" and isinstance(one, str) else without_line_ends(one)
            for name, one in value.items()
        }
    return [without_line_ends(one) for one in value] if isinstance(value, list) else value


def of_kustomize(*parts: str, namespace: str = "podferry-system") -> dict[Key, Json]:
    """What deploy/ and these parts of it make, without the namespace, which is not the chart's."""
    texts = [kustomize(ROOT / "deploy" / part) for part in ("", *parts)]
    objects = [one for text in texts for one in yaml.safe_load_all(text.replace("podferry-system", namespace))]
    return by_key([one for one in objects if one["kind"] != "Namespace"])


def of_helm(*values: str, namespace: str = "podferry-system") -> dict[Key, Json]:
    """What the chart makes. That its CRDs stay when the release goes is shown here, and taken away."""
    found = by_key(rendered(*(f"--set={one}" for one in values), namespace=namespace))
    for (kind, _, _), one in found.items():
        if kind == "CustomResourceDefinition":
            assert one["metadata"].pop("annotations") == KEEP
    return found


def differences(chart: dict[Key, Json], base: dict[Key, Json]) -> list[str]:
    """What one has and the other has not, object by object."""
    names = [f"only in one: {key}" for key in chart.keys() ^ base.keys()]
    return names + [f"{key} differs" for key in chart.keys() & base.keys() if chart[key] != base[key]]


def test_the_templates_are_those_that_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts/chart", tmp_path], check=True)
    written = {path.name: path.read_text() for path in (tmp_path / "charts/podferry/templates").iterdir()}
    here = {path.name: path.read_text() for path in (CHART / "templates").iterdir()}
    generated = {name for name, text in here.items() if "Generated from deploy/" in text}
    assert generated == set(written)
    assert [name for name in written if written[name] != here[name]] == [], "run scripts/chart"
    copied = tmp_path / "charts/podferry/files/dashboard.json"
    assert copied.read_text() == (CHART / "files/dashboard.json").read_text(), "run scripts/chart"


def test_the_charts_version_is_the_programs() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_it_is_equal_to_the_base() -> None:
    assert differences(of_helm(), of_kustomize()) == []


@pytest.mark.parametrize("part", PARTS)
def test_with_each_part_it_is_equal_to_the_base_and_that_part(part: str) -> None:
    base, both = of_kustomize(), of_kustomize(part)
    assert both.keys() > base.keys()
    assert differences(of_helm(*PARTS[part]), both) == []


def test_with_all_parts_in_another_namespace() -> None:
    values = [one for part in PARTS.values() for one in part]
    chart = of_helm(*values, namespace="elsewhere")
    assert differences(chart, of_kustomize(*PARTS, namespace="elsewhere")) == []
    assert "podferry-system" not in json.dumps([one for one in chart.values() if "spec" not in one])


def test_uninstall_is_equal_to_its_kustomization() -> None:
    (base,) = [one for one in yaml.safe_load_all(kustomize(ROOT / "deploy/uninstall")) if one["kind"] != "Namespace"]
    base["metadata"]["namespace"] = "podferry-system"
    (chart,) = rendered("--set=uninstall=true,evictions.enabled=true,monitoring.enabled=true,policies.a.movable=true")
    assert chart == base


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_renders(path: Path) -> None:
    objects = rendered(f"--values={path}")
    given = yaml.safe_load(path.read_text())
    assert ("ValidatingWebhookConfiguration" in {one["kind"] for one in objects}) == given["evictions"]["enabled"]
    repository = given["image"].get("repository", "podferry.local/podferry")
    images = set(re.findall(r'"image": "([^"]+)"', json.dumps(objects)))
    assert images == {f"{repository}:{__version__}"}


def test_there_is_an_example_for_each_kind_of_cluster() -> None:
    assert {path.stem for path in EXAMPLES} == {"kind", "k3s", "eks", "gke", "kubeadm"}


def test_values_reach_what_they_are_for() -> None:
    digest = f"sha256:{'0' * 64}"
    values = [
        f"image.digest={digest}",
        "image.pullPolicy=Always",
        "imagePullSecrets[0].name=pull",
        "limits.cluster=0",
        "limits.outOfNode=3",
        "nodeTrouble[0]=taint:example.com/gone=2m",
        "controller.extraArgs[0]=--movable-every=60",
        "policies.still.movable=false",
    ]
    objects = by_key(rendered(*(f"--set={one}" for one in values)))
    for key in (
        ("DaemonSet", "podferry-system", "podferry-agent"),
        ("Deployment", "podferry-system", "podferry-controller"),
    ):
        pod = objects[key]["spec"]["template"]["spec"]
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
        for one in [*pod.get("initContainers", []), *pod["containers"]]:
            assert (one["image"], one["imagePullPolicy"]) == (f"podferry.local/podferry@{digest}", "Always")
    (controller,) = objects["Deployment", "podferry-system", "podferry-controller"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert controller["command"] == [
        "podferry-controller",
        "--metrics-port=9464",
        "--parallel=0",
        "--parallel-out=3",
        "--node-trouble=taint:example.com/gone=2m",
        "--movable-every=60",
    ]
    assert {"name": "PODFERRY_IMAGE", "value": f"podferry.local/podferry@{digest}"} in controller["env"]
    assert objects["MigrationPolicy", "", "still"]["spec"] == {"movable": False}


def test_policies_wait_for_their_kind_on_a_first_install_alone() -> None:
    """Helm asks the API server about every object before it makes the first, so it would fail in words of its own."""
    wanted = "--set=policies.still.movable=false"
    refused = template(wanted, check=False)
    assert refused.returncode
    assert "then give them in an upgrade" in refused.stderr
    for known in ((), API_VERSIONS[:1]):
        options = [] if known else ["--is-upgrade"]
        assert "MigrationPolicy" in {one["kind"] for one in rendered(wanted, *options, api_versions=known)}


def test_the_operators_objects_are_there_where_the_operator_is() -> None:
    def kinds(**options: Any) -> set[str]:
        return {one["kind"] for one in rendered(**options)}

    assert "PodMonitor" not in kinds(api_versions=())
    assert {"PodMonitor", "PrometheusRule"} <= kinds(api_versions=("monitoring.coreos.com/v1/PodMonitor",))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("image.digest=latest", "image/digest"),
        ("evictions.enable=true", "enable"),
        ("limits.cluster=-1", "limits/cluster"),
        ("nodeTrouble[0]=taint", "nodeTrouble/0"),
        ("monitoring.enabled=maybe", "monitoring/enabled"),
        ("policies.Upper.movable=true", "Upper"),
        ("typo=1", "typo"),
    ],
)
def test_a_wrong_value_is_refused(value: str, why: str) -> None:
    refused = template(f"--set={value}", check=False)
    assert refused.returncode
    assert why in refused.stderr.replace(".", "/")


def test_what_needs_a_later_kubernetes_is_refused_in_words() -> None:
    refused = template("--set=optIn.enabled=true", check=False)
    assert refused.returncode
    assert "Kubernetes 1.36" in refused.stderr


def test_every_value_is_in_the_schema_and_every_value_of_the_schema_has_a_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def same(values: Json, of: Json, where: str) -> None:
        of = schema["definitions"][of["$ref"].rpartition("/")[2]] if "$ref" in of else of
        named = of.get("properties")
        if named is None or where.endswith("resources"):
            return
        assert set(values) == set(named) - {"global"}, where
        for name, value in values.items():
            if isinstance(value, dict):
                same(value, named[name], f"{where}.{name}")

    same(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")


def test_helm_finds_nothing_wrong() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART, f"--kube-version={KUBERNETES}").stdout
