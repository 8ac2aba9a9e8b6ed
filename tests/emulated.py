"""Another kernel, or another processor, under the tests of a node: Debian's own, in a machine that qemu emulates.

Its disk holds a root with the kernel's modules and the packages that tests need: the nodes' own, or for another processor one of
unpacked packages, with Python and little else. The checkout of the moment comes as a tar archive on a second one. The console shows
what is said, and a second serial line brings the reports. Nothing of the machine outlives it, and without KVM it needs nothing of
this one but qemu: the kernel stands after some two seconds.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from podferry.errors import PodferryError
from podferry.lab import root_images, site
from podferry.lab.build_cache import cached, remove
from podferry.lab.debian import APT, SUITE, architecture, mirror, require
from podferry.lab.downloads import downloads
from podferry.lab.progress import Progress
from podferry.node.process import run, spawn

KERNEL_PACKAGE = "linux-image-cloud-{}"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# In the order in which they are loaded, where they are not part of the kernel: each needs those before it. What tests need
# further, modprobe finds on the disk.
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
JOB_ARCHIVE = "opt/podferry/images/job.tar"
DISK_SIZE = 4 << 30
MEMORY = "4096M"
START_SECONDS = 60.0
# Raised by hand when what is done here changes, but none of the packages.
EDITION = 2


@dataclass(frozen=True)
class Board:
    """What qemu emulates: by which program, of which package, called how; the devices of the console and of the reports (whose
    words have a place for the file's name); and what its wheels are called by."""

    qemu: str
    package: str
    words: tuple[str, ...]
    console: str
    reports: str
    line: tuple[str, ...]
    wheels: str = ""


BOARDS = {
    "amd64": Board(
        "qemu-system-x86_64",
        "qemu-system-x86",
        ("-machine", "q35", "-cpu", "max"),
        console="ttyS0",
        reports="/dev/ttyS1",
        line=("-serial", "file:{}"),
    ),
    "arm64": Board(
        "qemu-system-aarch64",
        "qemu-system-arm",
        ("-machine", "virt", "-cpu", "cortex-a76"),
        console="ttyAMA0",
        reports="/dev/ttyS0",
        line=("-chardev", "file,id=reports,path={}", "-device", "pci-serial,chardev=reports"),
        wheels="aarch64-unknown-linux-gnu",
    ),
}
FOREIGN_ROOT = [
    "base-files",
    "bash",
    "busybox-static",
    "coreutils",
    "dash",
    "hostname",
    "iproute2",
    "kmod",
    "libc-bin",
    "libstdc++6",
    "mount",
    "procps",
    "python3",
    "tini",
    "util-linux",
]
"""What a root of another processor has beside what these need. Nothing of it is configured: it cannot run here."""

_INIT = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs devtmpfs /dev
for module in {" ".join(MODULES)}; do [ ! -e /$module.ko ] || $b insmod /$module.ko; done
$b mount -t ext4 /dev/vda /root && $b tar x -f /dev/vdb -C /root/opt/podferry || exec $b poweroff -f
$b mount --move /dev /root/dev
exec $b switch_root /root /usr/bin/tini -- /bin/sh /opt/podferry/machine
"""

# In a session of its own: the tests would be an orphaned process group, which gets SIGHUP and SIGCONT when one of it exits while
# another is stopped. Powers off whatever happens: a first process that ends is a panic, and the machine ends with it.
_MACHINE = """
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
hostname emulated
ip link set lo up
ln -s checkout/src /opt/podferry/src
stty -F {reports} raw
stty -F /dev/console -opost
echo "kernel $(uname -rm)"
cd /opt/podferry/checkout
setsid --wait env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 {words}
busybox poweroff -f
"""


class Lacking(Exception):
    """What keeps such a machine from being made here."""


@cache
def machine(suite: str, processor: str) -> Path:
    """The directory with kernel, initrd and disk for the kernel of a Debian release. Raises `Lacking`.

    The first time it downloads and builds some minutes; without qemu it installs that.
    """
    if architecture() != "amd64":
        raise Lacking(f"an emulated machine is made on amd64 only, not on {architecture()}")
    try:
        board, name = BOARDS[processor], f"{suite}.{processor}"
        require({board.qemu: board.package, "mkfs.ext4": "e2fsprogs"}, print)
        tools = root = root_images.node_root(print)
        if processor != "amd64":
            recipe = {"packages": FOREIGN_ROOT, "suite": SUITE}
            root = cached(f"node.{processor}", recipe, lambda into: _root(SUITE, processor, into))
        packages = {
            "site": site.site(root, print, wheels=board.wheels),
            "dev": site.development(root, print, wheels=board.wheels),
        }
        recipe = {"package": KERNEL_PACKAGE, "suite": suite}
        package = cached(f"kernel.{name}", recipe, lambda into: _kernel(suite, processor, into))
        files = {JOB_ARCHIVE: root_images.job_archive(print)} if root is tools else {}
        parts = [package, root, *packages.values(), *files.values()]
        return cached(
            f"machine.{name}",
            {"parts": [one.name for one in parts], "edition": EDITION},
            lambda into: _build(package, root, packages, files, tools, into, print),
        )
    except (PodferryError, OSError) as error:
        raise Lacking(error.report() if isinstance(error, PodferryError) else str(error)) from error


def attempt(
    suite: str, processor: str, checkout: Path, argv: Sequence[str], environment: Mapping[str, str], seconds: float
) -> tuple[str, str]:
    """Boot, run `argv` in the checkout there, and return what the console showed and what came over the line for reports.

    A machine that takes longer than `seconds` is ended. Raises `Lacking` and `PodferryError`.
    """
    built, board = machine(suite, processor), BOARDS[processor]
    with tempfile.TemporaryDirectory(prefix="podferry-machine-") as directory:
        place = Path(directory)
        words = [*(f"{name}={value}" for name, value in environment.items()), *argv]
        (place / "machine").write_text(_MACHINE.format(words=shlex.join(words), reports=board.reports))
        _archive(checkout, place)
        for name in ("console", "reports"):
            (place / name).touch()
        with (place / "qemu.log").open("wb") as log:
            qemu = spawn(_qemu(board, built, place), stderr=log)
            with contextlib.suppress(subprocess.TimeoutExpired):
                qemu.wait(seconds)
            late = qemu.poll() is None
            qemu.kill()
            qemu.wait()
        said, written, trouble = (
            (place / name).read_text(errors="replace") for name in ("console", "reports", "qemu.log")
        )
    if late:
        trouble += f"the machine was ended after {seconds:.0f} s"
    return f"{said}\n{trouble}", written


def _qemu(board: Board, built: Path, place: Path) -> list[str]:
    disks = [f"file={built / 'disk.ext4'},format=raw,if=virtio,snapshot=on"]
    disks += [f"file={place / 'checkout.tar'},format=raw,if=virtio,readonly=on"]
    return [
        # When these tests are ended, so is it.
        *("setpriv", "--pdeathsig=KILL", board.qemu, *board.words),
        *("-accel", "tcg,thread=multi", "-smp", "2", "-m", MEMORY),
        *("-nodefaults", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{place / 'console'}", *(word.format(place / "reports") for word in board.line)),
        *("-kernel", str(built / "vmlinuz"), "-initrd", str(built / "initrd")),
        *("-append", f"console={board.console} quiet panic=-1"),
        *(word for disk in disks for word in ("-drive", disk)),
    ]


def _archive(checkout: Path, place: Path) -> None:
    """What is tested and how, as it is now, at the places where a node of a lab has them."""
    argv = ["tar", "-c", "-f", place / "checkout.tar", "--exclude=__pycache__"]
    argv += ["--transform", r"s,^\(src\|tests\|pyproject\),checkout/&,S"]
    run([*argv, "-C", checkout, "src", "tests", "pyproject.toml", "-C", place, "machine"])


def _kernel(suite: str, processor: str, into: Path) -> None:
    print(f"kernel of {suite} for {processor}: downloading")
    with _unpacking(suite, processor, into) as (apt, state):
        shown = run(["apt-cache", *apt, "depends", "--important", KERNEL_PACKAGE.format(processor)]).stdout
        package = next(line.split()[-1] for line in shown.splitlines() if "Depends: linux-image-" in line)
        run(["apt-get", *apt, "download", "-q", package], cwd=state, env=downloads())


def _root(suite: str, processor: str, into: Path) -> None:
    print(f"a root for {processor}: downloading")
    with _unpacking(suite, processor, into) as (apt, _):
        run(["apt-get", *apt, "install", "--download-only", "-q", "-y", *FOREIGN_ROOT], env=downloads())


@contextlib.contextmanager
def _unpacking(suite: str, processor: str, into: Path) -> Iterator[tuple[list[str], Path]]:
    """Options for apt, with lists of packages of its own, since this machine may be of another release, and the directory that
    these are in. Packages that are found there in the end are unpacked."""
    state = into / "apt"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True)
    keys = f"[signed-by={KEYS}] " if KEYS.exists() else ""
    (state / "sources.list").write_text(f"deb {keys}{mirror(APT)} {suite} main\n")
    (state / "status").touch()
    options = {
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Architecture": processor,
        "APT::Architectures::": processor,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    run(["apt-get", *words, "update", "-q"], env=downloads())
    yield words, state
    # base-files first: it has the links of /bin and others, where packages have their files.
    for archive in sorted(state.rglob("*.deb"), key=lambda path: not path.name.startswith("base-files_")):
        run(["dpkg-deb", "-x", archive, into])
    shutil.rmtree(state)


def _build(
    package: Path,
    root: Path,
    packages: Mapping[str, Path],
    files: Mapping[str, Path],
    tools: Path,
    into: Path,
    progress: Progress,
) -> None:
    progress("emulated machine: building its disk")
    into.mkdir()
    [kernel] = package.glob("boot/vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    [modules] = (place for place in package.glob("**/lib/modules/*") if place.name == release)
    shutil.copy(kernel, into / "vmlinuz")
    overlay = into / "overlay"
    for name in ("upper", "work", "root"):
        (overlay / name).mkdir(parents=True)
    binds = [f"{path}:opt/podferry/{name}" for name, path in packages.items()]
    binds += [f"{modules}:usr/lib/modules/{release}"]
    (overlay / f"upper/usr/lib/modules/{release}").mkdir(parents=True)
    for name, path in files.items():
        (overlay / "upper" / name).parent.mkdir(parents=True)
        shutil.copy(path, overlay / "upper" / name)
    argv = ["unshare", "--mount", "sh", "-ec", _DISK, "sh", root, overlay, into / "disk.ext4", str(DISK_SIZE), release]
    run([*argv, tools, *binds])
    remove(overlay)
    _pack(root, modules, tools, into / "initrd")


# ROOT OVERLAY DISK SIZE RELEASE TOOLS FROM:TO...
_DISK = """
root=$1 overlay=$2 disk=$3 size=$4 release=$5 tools=$6
shift 6
mount -t overlay overlay -o "lowerdir=$root,upperdir=$overlay/upper,workdir=$overlay/work" "$overlay/root"
for copy; do
    mkdir -p "$overlay/root/${copy#*:}"
    cp -r "${copy%%:*}/." "$overlay/root/${copy#*:}"
done
mount --bind "$overlay/root" "$tools/mnt"
chroot "$tools" depmod -b /mnt "$release"
truncate -s "$size" "$disk"
mkfs.ext4 -q -O ^has_journal -d "$overlay/root" "$disk"
"""


def _pack(root: Path, modules: Path, tools: Path, initrd: Path) -> None:
    """An initramfs that loads what the disk needs, and goes on there."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name in ("bin", "dev", "root"):
            (tree / name).mkdir()
        shutil.copy(root / "usr/bin/busybox", tree / "bin")
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        for name in MODULES:
            for module in modules.rglob(f"{name}.ko*"):
                data = module.read_bytes()
                (tree / f"{name}.ko").write_bytes(lzma.decompress(data) if module.suffix == ".xz" else data)
        names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
        archive = tree / "archive"
        run([tools / "usr/bin/busybox", "cpio", "-o", "-H", "newc", "-F", archive], cwd=tree, input=names)
        initrd.write_bytes(gzip.compress(archive.read_bytes(), 1))
