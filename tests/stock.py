"""Whole stock machines for tests: a Debian release with systemd, its own kernel and all capabilities, under qemu.

`debootstrap` makes it once and the cache keeps it. Its disk is thrown away each time (`snapshot=on`), and so is a second one, with
what this machine has built for labs: building a node image under emulation takes half an hour. It is reached by ssh, through a port
of 127.0.0.1. What this machine's apt and pip are configured with comes along at the moment of the test, so that packages can be
downloaded from where this machine has them from.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from emulated import Lacking

from podferry.errors import PodferryError
from podferry.lab import root_images, site
from podferry.lab.build_cache import cached, remove
from podferry.lab.debian import APT, SUITE, architecture, bootstrap, downloads, mirror, require
from podferry.lab.kubernetes import portable_criu
from podferry.lab.state import CACHE
from podferry.node.process import Completed, last_lines, raise_for, run, spawn

PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mkfs.ext4": "e2fsprogs",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
PACKAGES = [
    "systemd-sysv",
    "linux-image-amd64",
    "openssh-server",
    "dbus",
    "libpam-systemd",
    "udev",
    "kmod",
    "iproute2",
    "procps",
    "init",
    "ca-certificates",
    "apparmor",
    "sudo",
    "make",
    "python3",
    "python3-venv",
]
"""What a machine has on which Debian's installer put standard tools and an ssh server, as far as it could matter, and make."""

USER = "someone"
"""Who may become root there by sudo."""
GIB = 1 << 30
DISK_SIZE, CACHE_SIZE = 12 * GIB, 4 * GIB
MEMORY = "4096M"
BOOT_SECONDS, TRIAL_SECONDS = 900.0, 60.0
EDITION = 1
DIES_WITH_US = ("setpriv", "--pdeathsig=KILL")
SSH = (
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "-o",
    "LogLevel=ERROR",
    "-o",
    "BatchMode=yes",
)
# Of the checkout's files these are no part of what a user gets, or are made there anew.
NOT_IN_A_CHECKOUT = (".git", ".venv", ".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__", "*.tar")

_CONFIGURE = """
root=$1 key=$2 user=$3
echo stock > "$root/etc/hostname"
printf '127.0.0.1 localhost\\n127.0.1.1 stock\\n' > "$root/etc/hosts"
echo nameserver 10.0.2.3 > "$root/etc/resolv.conf"
mkdir -p "$root/var/lib/podferry/cache"
cat > "$root/etc/fstab" <<EOF
LABEL=stock / ext4 defaults 0 1
LABEL=caches /var/lib/podferry/cache ext4 defaults,nofail 0 0
EOF
printf '[Match]\\nName=en* eth*\\n[Network]\\nDHCP=ipv4\\n' > "$root/etc/systemd/network/10-stock.network"
# The clock is qemu's; and nothing is to be downloaded that no test asked for.
chroot "$root" systemctl -q enable systemd-networkd ssh
chroot "$root" systemctl -q mask systemd-networkd-wait-online.service
chroot "$root" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer systemd-timesyncd.service
chroot "$root" useradd -m -s /bin/bash "$user"
echo "$user ALL=(ALL) NOPASSWD: ALL" > "$root/etc/sudoers.d/$user"
for home in root "home/$user"; do
    mkdir -p -m 700 "$root/$home/.ssh"
    cp "$key" "$root/$home/.ssh/authorized_keys"
done
chroot "$root" chown -R "$user:" "/home/$user/.ssh"
"""
# INTO NAME..., of the cache
_COLLECT = """
into=$1 size=$2 cache=$3
shift 3
mkdir "$into.tree"
mount -t tmpfs tmpfs "$into.tree"
for name; do
    if [ -d "$cache/$name" ]; then mkdir "$into.tree/$name"; else : > "$into.tree/$name"; fi
    mount --bind "$cache/$name" "$into.tree/$name"
done
truncate -s "$size" "$into"
mkfs.ext4 -q -O ^has_journal -L caches -d "$into.tree" "$into"
"""


@cache
def built(suite: str) -> Path:
    """The directory with kernel, initrd, disk and key of a stock machine. Raises `Lacking`.

    The first time it downloads and builds some minutes; what this machine lacks for that is installed.
    """
    if architecture() != "amd64":
        raise Lacking(f"a stock machine is made on amd64 only, not on {architecture()}")
    try:
        require(PROGRAMS, print)
        recipe = {"packages": PACKAGES, "suite": suite, "configured": _CONFIGURE, "edition": EDITION, "size": DISK_SIZE}
        return cached(f"stock.{suite}", recipe, lambda into: _build(suite, into))
    except (PodferryError, OSError) as error:
        raise Lacking(error.report() if isinstance(error, PodferryError) else str(error)) from error


def _build(suite: str, into: Path) -> None:
    print(f"stock machine of {suite}: building its disk")
    into.mkdir()
    root = into / "root"
    bootstrap(PACKAGES, root, CACHE / "debs", print, suite)
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", into / "key"])
    run(["sh", "-ec", _CONFIGURE, "sh", root, into / "key.pub", USER])
    for name in ("vmlinuz", "initrd.img"):
        [path] = root.glob(f"boot/{name}-*")
        shutil.copy(path, into / name)
    run(["truncate", "-s", str(DISK_SIZE), into / "disk.ext4"])
    run(["mkfs.ext4", "-q", "-L", "stock", "-d", root, into / "disk.ext4"])
    remove(root)


@cache
def caches() -> Path:
    """A disk with what labs need built: the nodes' image, Python packages for them and for tests in them, the image of jobs, and
    the CRIU that a late kernel needs."""
    root = root_images.node_root(print)
    job, criu = root_images.job_archive(print), portable_criu.late_bundle(print)
    made = (root, site.site(root, print), site.development(root, print), job, criu)
    names = sorted(path.name for path in made)
    recipe = {"names": names, "edition": EDITION, "size": CACHE_SIZE}

    def build(into: Path) -> None:
        print("stock machine: packing what labs need")
        try:
            run(["unshare", "--mount", "sh", "-ec", _COLLECT, "sh", into, str(CACHE_SIZE), CACHE, *names])
        finally:
            remove(into.with_name(f"{into.name}.tree"))

    return cached("stock.caches", recipe, build)


@cache
def accelerator() -> str:
    """What qemu runs fastest with here: `kvm` or `tcg`. Both start a kernel that has nothing to do but panic, since a device file
    proves nothing: in some virtual machines KVM is there and slower than emulation."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    taken = {}
    for name in ("kvm", "tcg"):
        began = time.monotonic()
        argv = [
            *_qemu(name),
            "-kernel",
            built(SUITE) / "vmlinuz",
            "-append",
            "console=ttyS0 panic=-1",
            "-serial",
            "stdio",
        ]
        done = _tried(argv)
        if "Kernel panic" in done:
            taken[name] = time.monotonic() - began
    return min(taken, key=lambda name: taken[name], default="tcg")


def _tried(argv: Sequence[str | Path]) -> str:
    try:
        return run(argv, check=False, timeout=TRIAL_SECONDS).stdout
    except PodferryError:
        return ""


def _qemu(accelerated: str, memory: str = MEMORY) -> list[str]:
    how = "kvm" if accelerated == "kvm" else "tcg,thread=multi"
    machine = ["-machine", "q35", "-cpu", "max", "-accel", how, "-smp", "2", "-m", memory]
    return [
        *DIES_WITH_US,
        "qemu-system-x86_64",
        *machine,
        "-nodefaults",
        "-display",
        "none",
        "-no-reboot",
    ]


class Stock:
    """A stock machine that runs, with root's shell in it."""

    def __init__(self, suite: str, port: int, place: Path) -> None:
        self.suite, self.port, self.place = suite, port, place
        self.key = place / "key"
        self.environment = ""

    def run(self, script: str, *, user: str = "root", check: bool = True, timeout: float = 600.0) -> Completed:
        """Run a shell script there as `user` (in a session of theirs) to its end; `timeout` in seconds."""
        argv = self._ssh(user)
        done = run([*argv, f"sh -euc {shlex.quote(self.environment + script)}"], check=False, timeout=timeout)
        done = Completed([f"on {self.suite}: {script}"], done.returncode, done.stdout, done.stderr)
        if check and done.returncode:
            print(done.stdout[-4000:], done.stderr[-4000:])  # pytest shows of an error no more than what failed
            raise_for(done)
        return done

    def _ssh(self, user: str) -> list[str]:
        control = ["-o", f"ControlPath={self.place / f'ssh.{user}'}"]
        return ["ssh", *SSH, *control, "-i", str(self.key), "-p", str(self.port), f"{user}@127.0.0.1"]

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Keep one connection of root's, which all commands share: emulated, a login of their own takes each of them seconds."""
        ssh, *rest = self._ssh("root")
        master = spawn([*DIES_WITH_US, ssh, "-M", "-N", *rest])
        try:
            yield
        finally:
            master.kill()
            master.wait()

    def put(self, archive: Path, directory: str) -> None:
        """Unpack a tar archive there."""
        to = f"tar x -C {shlex.quote(directory)}"
        run(
            ["sh", "-ec", 'archive=$1; shift; exec "$@" < "$archive"', "sh", archive, *self._ssh("root"), to],
            timeout=600.0,
        )

    def configure_clients(self) -> str:
        """Have its apt and pip download from where this machine's do, and return what they need in their environment.

        Nothing of that stands anywhere but on the machine's disk, which is thrown away.
        """
        with tempfile.TemporaryDirectory(dir=self.place) as directory:
            tree = Path(directory)
            sources = tree / "etc/apt/sources.list"
            sources.parent.mkdir(parents=True)
            sources.write_text(f"deb {mirror(APT)} {self.suite} main\n")
            kept = [path for path in (Path("/etc/pip.conf"), Path("/etc/uv")) if path.exists()]
            kept += list(Path("/usr/local/share/ca-certificates").glob("*"))
            wanted = downloads()
            for name in ("SSL_CERT_FILE", "PIP_CERT", "PIP_FIND_LINKS"):
                if (path := Path(wanted.get(name, ""))).is_absolute() and path.exists():
                    kept.append(path.resolve())
                    wanted[name] = str(path.resolve())
            wanted.pop("SSL_CERT_DIR", None)
            argv = ["tar", "-c", "-f", self.place / "clients.tar", "-C", tree, "etc", "-C", "/"]
            run([*argv, *sorted({str(path).lstrip("/") for path in kept})])
        self.put(self.place / "clients.tar", "/")
        return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in wanted.items())

    def check_out(self, checkout: Path, directory: str) -> None:
        """Put the checkout there as a user has it: its files, and nothing that was made of them."""
        archive = self.place / "checkout.tar"
        run(["tar", "-c", "-f", archive, *(f"--exclude={one}" for one in NOT_IN_A_CHECKOUT), "-C", checkout, "."])
        self.run(f"mkdir -p {shlex.quote(directory)}")
        self.put(archive, directory)


@contextlib.contextmanager
def booted(suite: str, *, link: Sequence[str] = (), memory: str = MEMORY) -> Iterator[Stock]:
    """A stock machine of a Debian release, booted and gone again afterwards; `link` is qemu's of another network card.

    Raises `Lacking` and `PodferryError`.
    """
    made, disk = built(suite), caches()
    how = accelerator()
    with tempfile.TemporaryDirectory(prefix="podferry-stock-") as directory:
        place = Path(directory)
        shutil.copy(made / "key", place / "key")
        port = _free_port()
        disks = [f"file={made / 'disk.ext4'},format=raw,if=virtio,snapshot=on"]
        disks += [f"file={disk},format=raw,if=virtio,snapshot=on"]
        argv = [*_qemu(how, memory), "-kernel", str(made / "vmlinuz"), "-initrd", str(made / "initrd.img")]
        argv += [
            "-append",
            "root=/dev/vda rw console=ttyS0 loglevel=4 panic=-1",
            "-serial",
            f"file:{place / 'console'}",
        ]
        argv += [word for one in disks for word in ("-drive", one)]
        argv += ["-nic", f"user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{port}-:22", *link]
        with (place / "qemu.log").open("wb") as log:
            qemu = spawn(argv, stderr=log)
        try:
            stock = Stock(suite, port, place)
            _wait_for_ssh(stock, qemu)
            with stock.connected():
                # Busy, the machine may have given up on the disk before it saw it.
                stock.run("mountpoint -q $cache || mount $cache".replace("$cache", str(CACHE)), timeout=BOOT_SECONDS)
                yield stock
        finally:
            qemu.kill()
            qemu.wait()


@contextlib.contextmanager
def booted_pair(suite: str) -> Iterator[tuple[Stock, Stock]]:
    """Two stock machines, with kernels of their own and a network between them: 192.168.77.1 and 192.168.77.2."""
    with tempfile.TemporaryDirectory(prefix="podferry-link-") as directory, contextlib.ExitStack() as stack:
        cable = Path(directory, "cable")
        machines = []
        for number, server in ((1, "on"), (2, "off")):  # the first is there when the second connects
            card = f"virtio-net-pci,netdev=link,mac={_LINK_MAC}{number}"
            ends = ["-netdev", f"stream,id=link,server={server},addr.type=unix,addr.path={cable}", "-device", card]
            one = stack.enter_context(booted(suite, link=ends))
            one.run(
                f"printf %s {shlex.quote(_LINK.format(mac=_LINK_MAC, number=number))} > {_LINK_FILE}; networkctl reload"
            )
            machines.append(one)
        yield machines[0], machines[1]


_LINK_MAC = "52:54:00:77:00:0"
_LINK_FILE = "/etc/systemd/network/05-link.network"
_LINK = """[Match]
MACAddress={mac}{number}
[Network]
Address=192.168.77.{number}/24
LinkLocalAddressing=no
"""


def _wait_for_ssh(stock: Stock, qemu: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while stock.run("true", check=False, timeout=BOOT_SECONDS).returncode:
        if qemu.poll() is not None or time.monotonic() > deadline:
            console = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", "\n".join(last_lines(stock.place / "console")))
            said = (stock.place / "qemu.log").read_text(errors="replace")
            raise RuntimeError(f"the stock machine of {stock.suite} does not boot:\n{console}\n{said}")
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
