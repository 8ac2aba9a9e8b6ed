"""Real helm and kustomize, for tests of the chart; without them the tests skip and say so."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from podferry.lab.kubernetes import daemons

CHART = Path(__file__).parents[1] / "charts/podferry"
API_VERSIONS = ("podferry.dev/v1alpha1/MigrationPolicy", "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy")
KUBERNETES = "1.36.0"
ELSEWHERE = "/opt/podferry/go/bin"
SOURCES = {"helm": "helm.sh/helm/v3/cmd/helm@v3.19.0", "kustomize": "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1"}


def program(name: str) -> str:
    """Where it is: PODFERRY_HELM or PODFERRY_KUSTOMIZE, the PATH, or where CONTRIBUTING.md says to install it."""
    path = ":".join((os.environ.get("PATH", ""), str(daemons.DIRECTORY), ELSEWHERE))
    found = os.environ.get(f"PODFERRY_{name.upper()}") or shutil.which(name, path=path)
    if found is None:
        pytest.skip(
            f"needs {name} (go install {SOURCES[name]}, or PODFERRY_{name.upper()}): "
            "whether the chart is equal to deploy/ is not shown"
        )
    return found


def helm(*arguments: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run helm with nothing of the user's own."""
    kept = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "HELM_NO_PLUGINS": "1", **environment}
    done = subprocess.run([program("helm"), *arguments], env=kept, check=False, capture_output=True, text=True)
    assert not (check and done.returncode), done.stderr
    return done


def template(*options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`helm template` of the chart, for a Kubernetes that it is for: a helm of `go install` knows none of itself."""
    return helm("template", "podferry", CHART, f"--kube-version={KUBERNETES}", *options, check=check)


@cache
def kustomize(directory: Path) -> str:
    """What kustomize makes of a directory."""
    done = subprocess.run([program("kustomize"), "build", directory], check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def rendered(
    *options: str, namespace: str = "podferry-system", api_versions: Sequence[str] = API_VERSIONS
) -> list[dict[str, Any]]:
    """The objects that the chart makes, hooks too."""
    known = [f"--api-versions={one}" for one in api_versions]
    text = template(f"--namespace={namespace}", *known, *options).stdout
    return [one for one in yaml.safe_load_all(text) if one is not None]
