"""The chart on a real API server, by real helm: it installs, upgrades in place, and leaves when it is removed what must stay."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chart_tools import CHART, helm, program

from . import real

pytestmark = pytest.mark.cluster
SYSTEM = "podferry-system"
ALL = ("evictions.enabled=true", "optIn.enabled=true", "cloudNotices.enabled=true", "requestedBy.enabled=true")
POLICY = "policies.still.movable=false"
CRDS = {f"{name}.podferry.dev" for name in ("migrations", "nodedrains", "migrationpolicies")}
MIGRATION = {
    "apiVersion": "podferry.dev/v1alpha1",
    "kind": "Migration",
    "metadata": {"name": "kept", "namespace": "default"},
    "spec": {"podName": "train"},
}
WEBHOOK = "validatingwebhookconfiguration/podferry-evictions"
FILLED_IN = {"caBundle": "eA==", "service": {"path": "/evictions/secret"}}
NEW_KIND = 60.0
Json = dict[str, Any]


@dataclass(frozen=True)
class Cluster:
    """A control plane without nodes and without podferry."""

    kubeconfig: Path

    def helm(self, *arguments: str | Path, check: bool = True) -> str:
        """Run helm as an administrator; what it prints, errors too."""
        options = (f"--kubeconfig={self.kubeconfig}", f"--namespace={SYSTEM}")
        home = str(self.kubeconfig.parent)
        done = helm(*arguments, *options, check=check, HELM_CACHE_HOME=home, HELM_CONFIG_HOME=home, HELM_DATA_HOME=home)
        return done.stdout + done.stderr

    def release(self, verb: str, *values: str, **more: str) -> str:
        """Install or upgrade it with these values."""
        options = [f"--set={one}" for one in values] + [
            f"--{name.replace('_', '-')}={one}" for name, one in more.items()
        ]
        return self.helm(verb, "podferry", CHART, *options)

    def kubectl(self, *arguments: str, given: Json | None = None) -> str:
        """Run kubectl as an administrator."""
        argv = [real.BINARIES / "kubectl", f"--kubeconfig={self.kubeconfig}", *arguments]
        stdin = json.dumps(given) if given else None
        deadline = time.monotonic() + NEW_KIND
        while True:
            done = subprocess.run(argv, input=stdin, check=False, capture_output=True, text=True)
            if "There can be a delay" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(0.2)  # admission policies learn of a kind a moment after its CRD is there
        assert not done.returncode, done.stderr
        return done.stdout

    def get(self, what: str, namespace: str = SYSTEM) -> Json:
        """One object, or a list of them."""
        found: Json = json.loads(self.kubectl("get", what, "-n", namespace, "-o", "json"))
        return found

    def names(self, what: str) -> set[str]:
        """Those of a kind, in podferry's namespace where the kind has any."""
        return {one["metadata"]["name"] for one in self.get(what)["items"]}


@pytest.fixture
def bare() -> Iterator[Cluster]:
    """A control plane of the test's own."""
    if why := real.missing():
        pytest.skip(f"needs a real control plane: {why}")
    if not (real.BINARIES / "kubectl").exists():
        pytest.skip(f"needs kubectl in {real.BINARIES} (PODFERRY_KUBE_BIN)")
    program("helm")
    with real.control_plane(bare=True) as kubeconfig:
        yield Cluster(kubeconfig)


def test_it_installs_upgrades_and_uninstalls(bare: Cluster) -> None:
    bare.kubectl("create", "namespace", SYSTEM)
    said = bare.release("install", *ALL, dry_run="server")
    assert "kubectl podferry check POD" in said
    assert not bare.names("crd"), "it was asked alone"

    bare.release("install", *ALL)
    assert bare.names("crd") == CRDS
    bare.release("upgrade", *ALL, POLICY)
    assert bare.names("deployment") == {"podferry-controller"}
    assert bare.names("daemonset") == {"podferry-agent"}
    policies = bare.names("validatingadmissionpolicy")
    assert {"podferry-pods", "podferry-requests"} <= policies
    assert bare.names("mutatingadmissionpolicy") == {"podferry-opt-in", "podferry-requested-by"}
    policy = bare.get("migrationpolicy/still")
    assert policy["spec"]["movable"] is False
    bare.kubectl("apply", "-f", "-", given=MIGRATION)
    # As the controller does it: by what the server is known, and at which path it answers.
    patch = [
        {"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": FILLED_IN["caBundle"]},
        {"op": "add", "path": "/webhooks/0/clientConfig/service/path", "value": FILLED_IN["service"]["path"]},
    ]
    bare.kubectl("patch", WEBHOOK, "--type=json", "-p", json.dumps(patch))

    bare.release("upgrade", *ALL, POLICY, "limits.cluster=3", "policies.still.modes={live}")
    (controller,) = bare.get("deployment/podferry-controller")["spec"]["template"]["spec"]["containers"]
    assert controller["command"][-1] == "--parallel=3"
    changed = bare.get("migrationpolicy/still")
    assert changed["spec"] == {"movable": False, "modes": ["live"]}
    assert changed["metadata"]["uid"] == policy["metadata"]["uid"], "it held all the time"
    (webhook,) = bare.get(WEBHOOK)["webhooks"]
    assert webhook["clientConfig"]["caBundle"] == FILLED_IN["caBundle"], "evictions are answered all the time"
    assert webhook["clientConfig"]["service"]["path"] == FILLED_IN["service"]["path"]
    bare.release("upgrade", *ALL)
    assert not bare.names("migrationpolicy"), "the release has it for its own"

    said = bare.helm("upgrade", "podferry", CHART, "--reuse-values", "--set=uninstall=true")
    assert "rollout status daemonset/podferry-uninstall" in said
    assert bare.names("daemonset") == {"podferry-uninstall"}
    assert not bare.names("deployment")
    assert not bare.names("validatingadmissionpolicy")
    bare.helm("uninstall", "podferry")
    assert not bare.names("daemonset")
    assert bare.names("crd") == CRDS, "who removes a program does not lose his objects"
    assert bare.get("migration/kept", "default")["spec"]["podName"] == "train"

    bare.release("install", *ALL, POLICY)
    assert bare.names("validatingadmissionpolicy") == policies
    assert bare.names("migrationpolicy") == {"still"}
    assert bare.get("migration/kept", "default")
