"""Build kubectl-podferry as one file for each platform, and its krew manifest; see scripts/plugin."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLATFORMS = {
    "linux-amd64": "x86_64-manylinux_2_28",
    "linux-arm64": "aarch64-manylinux_2_28",
    "darwin-amd64": "x86_64-apple-darwin",
    "darwin-arm64": "aarch64-apple-darwin",
}
"""As kubectl and krew call them, and as uv does."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
NOT_USED = {
    "cffi", "cryptography", "grpcio", "h2", "hpack", "hyperframe", "prometheus-client", "protobuf", "pycparser", "tomli-w", "wsproto",
    "xxhash", "zstandard",
}  # fmt: skip
"""Of the lock, what the plugin does not import."""
NOT_OURS = ("bench", "lab", "protos", "snapshotter", "lazypages", "install")
"""Of podferry, what the plugin does not import."""
EPOCH = (2026, 1, 1, 0, 0, 0)
"""In every archive, so that the same sources make the same file."""


def requirements() -> str:
    """The lock's entries, hashes and all, for what the plugin imports."""
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())
    found = {re.split(r"[=\[ ;]", entry, maxsplit=1)[0]: entry for entry in entries if "==" in entry}
    if missing := NOT_USED - set(found):
        raise SystemExit(f"plugin: {', '.join(sorted(missing))} is not in requirements.lock any more: take it out of NOT_USED")
    return "\n".join(entry for name, entry in found.items() if name not in NOT_USED) + "\n"


def installed(uv: str, platform: str, python: str, into: Path) -> dict[str, bytes]:
    """The files of the plugin's dependencies there."""
    lock = into.with_suffix(".txt")
    lock.write_text(requirements())
    subprocess.run(
        [
            uv, "pip", "install", "--quiet", "--target", into, "--python-platform", PLATFORMS[platform], "--python-version", python,
            "--only-binary", ":all:", "--no-deps", "--require-hashes", "--link-mode", "copy", "--python", sys.executable, "--requirement", lock,
        ],  # fmt: skip
        check=True,
    )
    left = re.compile(r"(^|/)(__pycache__|bin|RECORD|INSTALLER|REQUESTED|direct_url\.json|uv_cache\.json|\.lock)(/|$)")
    return {
        name: path.read_bytes()
        for path in sorted(into.rglob("*"))
        if path.is_file() and not left.search(name := path.relative_to(into).as_posix())
    }


def program() -> dict[str, bytes]:
    """podferry's own files."""
    return {
        f"podferry/{path.relative_to(ROOT / 'src/podferry')}": path.read_bytes()
        for path in sorted((ROOT / "src/podferry").rglob("*.py"))
        if path.relative_to(ROOT / "src/podferry").parts[0] not in NOT_OURS
    }


def archive(uv: str, platform: str, pythons: list[str]) -> bytes:
    """The file: a line by which the system finds Python, and a zip archive with a part for each Python and one for all."""
    with tempfile.TemporaryDirectory() as scratch:
        trees = {f"cp{one.replace('.', '')}": installed(uv, platform, one, Path(scratch, one)) for one in pythons}
    first = next(iter(trees.values()))
    common = {name for name in first if all(tree.get(name) == first[name] for tree in trees.values())}
    files = {"__main__.py": (ROOT / "scripts/plugin_main.py").read_bytes()}
    files |= {f"common/{name}": content for name, content in program().items()}
    files |= {f"common/{name}": first[name] for name in common}
    for python, tree in trees.items():
        files[f"{python}/{python}.txt"] = b"compiled for this Python\n"
        files |= {f"{python}/{name}": content for name, content in tree.items() if name not in common}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name in sorted(files):
            member = zipfile.ZipInfo(name, EPOCH)
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            file.writestr(member, files[name])
    return b"#!/usr/bin/env python3\n" + packed.getvalue()


def tarball(plugin: bytes) -> bytes:
    """What krew downloads: the plugin and its license."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, content, mode in (("kubectl-podferry", plugin, 0o755), ("LICENSE", (ROOT / "LICENSE").read_bytes(), 0o644)):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            file.addfile(member, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0)


def manifest(version: str, url: str, digests: dict[str, str]) -> str:
    """The krew manifest, with the digest of each platform's archive."""
    text = f"""# Written by scripts/plugin. Try it: kubectl krew install --manifest=podferry.yaml --archive=kubectl-podferry-linux-amd64.tar.gz
apiVersion: krew.googlecontainertools.github.com/v1alpha2
kind: Plugin
metadata:
  name: podferry
spec:
  version: v{version}
  homepage: {url}
  shortDescription: Move running pods between nodes
  description: |
    Move running pods between nodes, with their memory and files, stopped for a fraction of a second;
    empty nodes without losing work. podferry has to be installed in the cluster.
  caveats: |
    It needs Python {PYTHONS[0]} or later on the PATH as python3.
  platforms:
"""
    for platform, digest in digests.items():
        system, processor = platform.split("-")
        text += f"""    - selector:
        matchLabels: {{os: {system}, arch: {processor}}}
      uri: {url}/kubectl-podferry-{platform}.tar.gz
      sha256: {digest}
      bin: kubectl-podferry
"""
    return text


def main() -> None:
    """Build them all."""
    parser = argparse.ArgumentParser(prog="scripts/plugin VENV", description=__doc__)
    parser.add_argument("--uv", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, default=ROOT / "dist/plugin", help="default: dist/plugin")
    parser.add_argument("--platform", action="append", choices=PLATFORMS, help="may be given several times; default: all")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="may be given several times; default: all")
    parser.add_argument("--url", default="https://example.invalid/podferry", help="where the archives will be, for the krew manifest")
    asked = parser.parse_args()
    asked.into.mkdir(parents=True, exist_ok=True)
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "src/podferry/__init__.py").read_text(), re.MULTILINE)
    digests = {}
    for platform in asked.platform or PLATFORMS:
        plugin = archive(asked.uv, platform, asked.python or list(PYTHONS))
        path = asked.into / f"kubectl-podferry-{platform}"
        path.write_bytes(plugin)
        path.chmod(0o755)
        packed = tarball(plugin)
        path.with_name(f"{path.name}.tar.gz").write_bytes(packed)
        digests[platform] = hashlib.sha256(packed).hexdigest()
        print(f"{path}: {len(plugin) / 2**20:.1f} MiB")
    (asked.into / "podferry.yaml").write_text(manifest(version, asked.url, digests))


if __name__ == "__main__":
    main()
