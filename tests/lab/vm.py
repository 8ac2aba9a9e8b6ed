"""Another kernel: a virtual machine whose whole system is an initramfs of this Python, podferry and its tests.

The kernel is Debian's own for virtual machines, from its package, downloaded and unpacked but never installed. Without KVM qemu
emulates the processor: slow, but it boots in seconds, and needs nothing of the machine.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
META_PACKAGE = "linux-image-cloud-amd64"
CACHE = Path("/var/tmp/podferry-test-kernels")
ROOT = Path(__file__).parents[2]
TESTERS = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py", "typing_extensions.py")
ENDED = re.compile(rb"^tests ended with status (\d+)", re.MULTILINE)
MEMORY = "1536M"

INIT = """#!{python} -SI
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp"), ("tmpfs", "/dev/shm")):
    os.makedirs(where, exist_ok=True)
    if libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None):
        print("cannot mount", where, ctypes.get_errno())
console = os.open("/dev/console", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(console, fd)
print("kernel", os.uname().release, flush=True)
child = os.fork()
if child == 0:
    environment = {{"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONPATH": "/work/src:/work/tests", "PYTHONDONTWRITEBYTECODE": "1"}}
    os.chdir("/tmp")
    os.execve({python!r}, [{python!r}, "-P", "-m", "pytest", *{arguments!r}], environment)
while True:
    pid, status = os.wait()
    if pid == child:
        break
print(f"\\ntests ended with status {{os.waitstatus_to_exitcode(status)}}", flush=True)
os.sync()
time.sleep(0.2)
libc.reboot(0x4321FEDC)
"""


@dataclass(frozen=True)
class Ran:
    """How a run of tests ended in there, and what it printed."""

    status: int
    output: str


def lacking() -> str:
    """What this machine lacks to run it; empty where nothing."""
    missing = [program for program in (QEMU, "apt-get", "dpkg-deb", "ldd") if shutil.which(program) is None]
    return f"needs {', '.join(missing)} (Debian: apt install qemu-system-x86)" if missing else ""


def kernel() -> Path:
    """Debian's kernel, downloaded the first time. Raises `CalledProcessError` or `OSError` where it cannot be had."""
    CACHE.mkdir(exist_ok=True)
    if not (there := sorted(CACHE.glob("boot/vmlinuz-*"))):
        depends = subprocess.run(
            ["apt-cache", "depends", META_PACKAGE], check=True, capture_output=True, text=True
        ).stdout
        package = depends.partition("Depends: ")[2].split()[0]
        subprocess.run(["apt-get", "download", package], check=True, cwd=CACHE, capture_output=True)
        [archive] = CACHE.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, CACHE], check=True)
        archive.unlink()
        there = sorted(CACHE.glob("boot/vmlinuz-*"))
    return there[-1]


def run(kernel: Path, place: Path, arguments: list[str], timeout: float) -> Ran:
    """Run `pytest ARGUMENTS` in a machine of its own. Files of the tests lie in /work/tests. `timeout` is in seconds."""
    python = os.path.realpath(sys.executable)
    tree = Tree()
    for name in ("proc", "sys", "dev", "tmp"):
        tree.directory(name)
    tree.device("dev/console", 5, 1)
    tree.program(Path(python))
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    tree.copy(stdlib, stdlib, skip={"test", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip"})
    for library in (stdlib / "lib-dynload").glob("*.so"):
        tree.libraries(library)
    packages = Path(sysconfig.get_paths()["purelib"])
    for name in TESTERS:
        tree.copy(packages / name, Path("/work/src") / name)
    for installed in packages.glob("*.dist-info"):
        tree.file(f"/work/src/{installed.name}/METADATA", installed / "METADATA")
        if (entries := installed / "entry_points.txt").exists() and installed.name.startswith("pytest-"):
            tree.file(f"/work/src/{installed.name}/entry_points.txt", entries)
    tree.copy(ROOT / "src/podferry", Path("/work/src/podferry"))
    tree.copy(ROOT / "tests/node", Path("/work/tests"))
    tree.file("init", INIT.format(python=python, arguments=arguments).encode(), 0o755)
    image = place / "initramfs.gz"
    with gzip.open(image, "wb", compresslevel=1) as file:
        for piece in tree.archive():
            file.write(piece)
    argv = [QEMU, "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", MEMORY, "-nographic", "-no-reboot"]
    argv += [
        "-kernel",
        str(kernel),
        "-initrd",
        str(image),
        "-append",
        "console=ttyS0 quiet panic=-1 no_timer_check tsc=unstable",
    ]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    ended = ENDED.search(done.stdout)
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert ended, f"the machine ended before its tests did:\n{output[-4000:]}"
    return Ran(int(ended[1]), output)


class Tree:
    """Files for an initramfs, in cpio's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes | Path, tuple[int, int]]] = {}

    def directory(self, name: str) -> None:
        """A directory and those above it."""
        path = Path(name.strip("/"))
        for one in [*reversed(path.parents), path]:
            if str(one) != ".":
                self._entries.setdefault(str(one), (0o40755, b"", (0, 0)))

    def file(self, name: str, content: bytes | Path, mode: int = 0o644) -> None:
        """A file, whose content may be that of a file here."""
        self.directory(os.path.dirname(name))  # noqa: PTH120
        self._entries[name.strip("/")] = (0o100000 | mode, content, (0, 0))

    def device(self, name: str, major: int, minor: int) -> None:
        """A character device."""
        self._entries[name] = (0o20600, b"", (major, minor))

    def copy(self, source: Path, target: Path, skip: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """A file, or a directory with all in it but what is in `skip` and compiled by another Python."""
        if source.is_file():
            self.file(str(target), source, source.stat().st_mode & 0o777)
            return
        for one in source.iterdir():
            if one.name not in skip and one.name != "__pycache__":
                self.copy(one, target / one.name, skip)

    def program(self, path: Path) -> None:
        """A program and what it is linked with."""
        self.file(str(path), path, 0o755)
        self.libraries(path)

    def libraries(self, path: Path) -> None:
        """What a program or library is linked with."""
        told = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
        for name in re.findall(r"(/\S+) \(0x", told):
            if name.strip("/") not in self._entries:
                self.file(name, Path(name), 0o755)

    def archive(self) -> Iterator[bytes]:
        """The archive, in pieces."""
        for number, (name, (mode, content, device)) in enumerate(self._entries.items(), 1):
            data = content.read_bytes() if isinstance(content, Path) else content
            yield self._record(number, name, mode, data, device)
        yield self._record(0, "TRAILER!!!", 0, b"", (0, 0))

    @staticmethod
    def _record(number: int, name: str, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        head += bytes(-len(head) % 4)
        return head + data + bytes(-len(data) % 4)
