"""The node's kubelet: where it keeps pods, and which container runtime it uses, by its command line and its configuration.

The root directory is a flag alone (`--root-dir`); the runtime's endpoint is a flag or a field of the configuration file, and the
flag wins, as it does for the kubelet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path("/var/lib/kubelet")
CRIO = "crio.sock"
_PROGRAMS = ("kubelet", "kubelite", "k3s", "k3s-server", "k3s-agent", "rke2")


@dataclass(frozen=True)
class Kubelet:
    """`root` is where it keeps pods, `endpoint` the container runtime's socket, empty where it does not say."""

    root: Path = ROOT
    endpoint: str = ""

    @property
    def has_crio(self) -> bool:
        """Whether CRI-O makes its pods' containers."""
        return Path(self.endpoint).name == CRIO


def find(proc: Path = Path("/proc")) -> Kubelet | None:
    """The kubelet that runs here, None where none does."""
    for pid in sorted((int(one.name) for one in proc.iterdir() if one.name.isdecimal()), key=int):
        with suppress(OSError):
            words = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(words[0].split(" ")[0]).name in _PROGRAMS and _is_program(proc / str(pid)):
                return _of(words[1:], proc / str(pid) / "root")
    return None


def _is_program(process: Path) -> bool:
    """Whether it is more than a script of that name; where the kernel does not say, nothing speaks against it."""
    try:
        return Path(os.readlink(process / "exe")).name not in ("sh", "bash", "dash", "busybox")  # noqa: PTH115
    except OSError:
        return True


def _of(words: Sequence[str], root: Path) -> Kubelet:
    flags = dict(_flags(words))
    if file := flags.get("kubelet-args-file"):  # MicroK8s
        with suppress(OSError):
            flags |= dict(_flags(_inside(root, file).read_text().split()))
    config = _config(_inside(root, flags["config"])) if "config" in flags else {}
    endpoint = flags.get("container-runtime-endpoint") or str(config.get("containerRuntimeEndpoint") or "")
    return Kubelet(Path(flags.get("root-dir") or ROOT), endpoint.removeprefix("unix://"))


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags by their names: `--name=value`, `--name value`, and k3s' `--kubelet-arg=name=value`."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if not word.startswith("-"):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        value = value if equals else following
        if name == "kubelet-arg":
            name, _, value = value.partition("=")
        yield name, value.strip("'\"")


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
