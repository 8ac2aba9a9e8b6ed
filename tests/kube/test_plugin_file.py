"""kubectl-podferry as one file, found by kubectl, at a real API server."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from plugin_tools import environment

from . import real

pytestmark = pytest.mark.cluster
MIGRATION = {
    "apiVersion": "podferry.dev/v1alpha1",
    "kind": "Migration",
    "metadata": {"name": "seen-by-the-plugin", "namespace": "default"},
    "spec": {"podName": "train"},
}


def test_kubectl_finds_it_and_it_lists_migrations(control_plane: Path, tmp_path: Path) -> None:
    if not (real.BINARIES / "kubectl").exists():
        pytest.skip(f"needs kubectl in {real.BINARIES} (PODFERRY_KUBE_BIN)")
    users = environment(tmp_path, real.BINARIES, KUBECONFIG=str(control_plane))

    def kubectl(*arguments: str, given: str | None = None) -> str:
        done = subprocess.run(
            ["kubectl", *arguments], input=given, env=users, check=False, capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
        return done.stdout

    kubectl("apply", "-f", "-", given=json.dumps(MIGRATION))
    try:
        listed = json.loads(kubectl("podferry", "list", "--json"))
        assert "seen-by-the-plugin" in [one["metadata"]["name"] for one in listed["migrations"]]
        assert "train" in kubectl("podferry", "list")
    finally:
        kubectl("delete", "migration", "seen-by-the-plugin", "--wait=false")
