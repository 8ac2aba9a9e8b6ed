"""kubectl-podferry as one file, built once for this machine and run as a user does who has no environment of podferry's."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="podferry-test-plugin-")


@cache
def built() -> Path:
    """The directory that scripts/plugin fills, for this machine and Python alone, as long as the tests run."""
    into = Path(_kept().name)
    for_this = [f"--platform=linux-{MACHINE}", f"--python={PYTHON}", f"--into={into}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [ROOT / "scripts/plugin", sys.prefix, *for_this], env=environment, check=False, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return into


def plugin() -> Path:
    """The file."""
    return built() / f"kubectl-podferry-linux-{MACHINE}"


def environment(home: Path, *programs: Path, **more: str) -> dict[str, str]:
    """A user's, with a Python that knows nothing of podferry, the plugin, and these directories on the PATH."""
    bin = home / "bin"
    bin.mkdir(parents=True, exist_ok=True)
    for name, target in (("kubectl-podferry", plugin()), ("python3", Path(sys.base_prefix, "bin", f"python{PYTHON}"))):
        if not (bin / name).is_symlink():
            (bin / name).symlink_to(target)
    path = ":".join(map(str, (bin, *programs, "/usr/bin", "/bin")))
    return {"HOME": str(home), "PATH": path, "PYTHONSAFEPATH": "1", **more}
