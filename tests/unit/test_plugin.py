"""kubectl-podferry as one file: it runs with Python alone, and says what it cannot."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from plugin_tools import MACHINE, PYTHON, ROOT, built, environment, plugin

from podferry import __version__

pytestmark = pytest.mark.unit


def run(home: Path, *arguments: str | Path, program: str | Path = "kubectl-podferry", **more: str) -> str:
    """What it prints; it ends well."""
    done = subprocess.run(
        [program, *arguments], env=environment(home, **more), cwd="/", check=False, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_it_runs_with_python_alone(tmp_path: Path) -> None:
    shown = run(tmp_path, "--help")
    for command in ("migrate", "check", "drain", "list", "explain", "report"):
        assert re.search(rf"\b{command}\b", shown)
    assert run(tmp_path, "version") == f"kubectl-podferry {__version__}\n"
    (kept,) = (tmp_path / ".cache/kubectl-podferry").iterdir()
    assert (kept / "podferry/cli/kubectl.py").exists()


def test_its_modules_are_its_own(tmp_path: Path) -> None:
    """Neither this checkout nor the environment of the tests is reached, and every command's module is there."""
    run(tmp_path, "version")
    (kept,) = (tmp_path / ".cache/kubectl-podferry").iterdir()
    names = [path.stem for path in (ROOT / "src/podferry/cli").glob("kubectl*.py")]
    imports = "; ".join(f"import podferry.cli.{name} as last" for name in names)
    said = run(tmp_path, "-c", f"{imports}; print(last.__file__)", program="python3", PYTHONPATH=str(kept))
    assert said.startswith(str(kept))


def test_without_a_place_to_write_it_runs_all_the_same(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    shown = run(tmp_path, "version", XDG_CACHE_HOME="/proc/nowhere", TMPDIR=str(scratch))
    assert __version__ in shown
    assert not list(scratch.iterdir()), "it leaves nothing"


def test_what_others_can_write_is_not_run(tmp_path: Path) -> None:
    run(tmp_path, "version")
    (kept,) = (tmp_path / ".cache/kubectl-podferry").iterdir()
    (kept / "podferry/cli/kubectl.py").write_text("raise SystemExit('taken over')")
    kept.chmod(0o777)
    assert __version__ in run(tmp_path, "version")


def test_another_python_is_told(tmp_path: Path) -> None:
    other = tmp_path / "kubectl-podferry-other"
    this = f"cp{PYTHON.replace('.', '')}"
    with zipfile.ZipFile(plugin()) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            new.writestr(name.replace(f"{this}/", "cp399/"), old.read(name))
    done = subprocess.run(["python3", other], env=environment(tmp_path), check=False, capture_output=True, text=True)
    assert done.returncode
    assert f"for cp399, not for this {this}" in done.stderr


def test_it_completes_under_its_other_name(tmp_path: Path) -> None:
    environment(tmp_path)
    (tmp_path / "bin/kubectl_complete-podferry").symlink_to(plugin())
    offered = run(tmp_path, "mig", program="kubectl_complete-podferry").splitlines()
    assert offered == ["migrate", ":4"]


def test_the_krew_manifest_is_of_what_was_built(tmp_path: Path) -> None:
    manifest = yaml.safe_load((built() / "podferry.yaml").read_text())
    assert manifest["spec"]["version"] == f"v{__version__}"
    (one,) = manifest["spec"]["platforms"]
    assert one["selector"]["matchLabels"] == {"os": "linux", "arch": MACHINE}
    packed = built() / one["uri"].rpartition("/")[2]
    assert hashlib.sha256(packed.read_bytes()).hexdigest() == one["sha256"]
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    assert (tmp_path / one["bin"]).read_bytes() == plugin().read_bytes()
    assert os.access(tmp_path / one["bin"], os.X_OK)
    assert (tmp_path / "LICENSE").exists()
