"""The machines that people have: a company's TLS proxy, `/tmp` noexec, small disks, another locale, no IPv6, container
runtimes of their own. Each is made in namespaces of the test's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from podferry.lab import Lab, containers, site, state
from podferry.lab.debian import bootstrap
from podferry.lab.downloads import downloads
from podferry.lab.progress import quiet
from podferry.node.process import Completed, run
from podferry.wire.pki import Authority

pytestmark = pytest.mark.lab
CHECKOUT = Path(__file__).parents[2]
SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


MAIN = 'import sys; from podferry.cli import main; sys.argv = ["podferry", *sys.argv[1:]]; main()'


def podferry(stage: str, *argv: str, env: dict[str, str] | None = None, timeout: float = 300.0) -> Completed:
    """Run podferry after the shell lines of `stage`, in a mount namespace of their own."""
    script = f'{stage}\nexec "$@"'
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", sys.executable, "-c", MAIN, *argv]
    return run(command, check=False, env=env, timeout=timeout)


def noexec_tmp(*kept: Path) -> str:
    """Shell lines that make /tmp one that runs no programs, but for the checkout and `kept` where these are there."""
    lines = ["mount -t tmpfs tmpfs /mnt"]
    for number, path in enumerate((CHECKOUT, *kept)):
        lines.append(f"mkdir /mnt/{number}; mount --bind {path} /mnt/{number}")
    lines.append("mount -t tmpfs -o noexec tmpfs /tmp")
    for number, path in enumerate((CHECKOUT, *kept)):
        lines.append(f"[ -e {path} ] || {{ mkdir -p {path}; mount --bind /mnt/{number} {path}; }}")
    return "\n".join(lines)


def findings(done: Completed) -> dict[str, dict[str, str]]:
    assert done.returncode in (0, 3), done.stderr
    return {one["check"]: one for one in json.loads(done.stdout)["findings"]}


# -- what doctor sees, and lab up refuses ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> str:
    """Shell lines that mount an ext4 of 200 MiB at `tmp_path`/disk."""
    run(["truncate", "--size=200M", tmp_path / "image"])
    run(["mkfs.ext4", "-q", tmp_path / "image"])
    (tmp_path / "disk").mkdir()
    return f"mount -o loop {tmp_path}/image {tmp_path}/disk"


def test_a_small_disk_is_refused_before_anything_is_built(small_disk: str, tmp_path: Path) -> None:
    state = {"PODFERRY_STATE": str(tmp_path / "disk")}
    listed = f'{small_disk}\n"$@" || code=$?; ls "{tmp_path}/disk" > "{tmp_path}/left"; exit $code'
    done = podferry(listed, "lab", "up", "--lab", f"test-{os.getpid()}-small", env=state)
    assert done.returncode == 3, done.stderr
    assert "PF114" in done.stderr
    assert "PODFERRY_STATE" in done.stderr
    assert set((tmp_path / "left").read_text().split()) <= {"lost+found", "labs", "cache"}
    assert findings(podferry(small_disk, "doctor", "--json", env=state))["disk"]["verdict"] == "blocked"


@pytest.mark.parametrize(
    ("stage", "check", "verdict", "word"),
    [
        ("mount -t tmpfs tmpfs {0}", "disk", "blocked", "tmpfs"),
        ("mount --bind {0} {0}; mount -o remount,bind,noexec {0}", "disk", "blocked", "noexec"),
        ("mount --bind {0} {0}; mount -o remount,bind,ro {0}", "disk", "blocked", "ro"),
    ],
)
def test_mounts(tmp_path: Path, stage: str, check: str, verdict: str, word: str) -> None:
    done = podferry(stage.format(tmp_path), "doctor", "--json", env={"PODFERRY_STATE": str(tmp_path)})
    assert findings(done)[check]["verdict"] == verdict
    assert word in findings(done)[check]["found"]


@pytest.mark.parametrize(
    ("privileges", "check"),
    [
        (["setpriv", "--reuid=65534", "--clear-groups"], "user"),
        (["unshare", "--user", "--map-root-user"], "user"),
        (["setpriv", "--bounding-set=-sys_admin"], "capabilities"),
        (["setpriv", "--bounding-set=-mknod"], "devices"),
        (["setpriv", "--bounding-set=-net_admin"], "bridge"),
    ],
)
def test_what_the_caller_may_not_do_is_tried_and_told(privileges: list[str], check: str) -> None:
    done = run([*privileges, sys.executable, "-c", MAIN, "doctor", "--json"], check=False, timeout=120.0)
    assert done.returncode == 3, done.stderr
    assert findings(done)[check]["verdict"] == "blocked"


def test_doctor_leaves_nothing(tmp_path: Path) -> None:
    def traces() -> tuple[set[str], list[str], list[str]]:
        mounts = {line.split(" - ")[0].split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
        return (
            mounts,
            sorted(one.name for one in Path("/sys/class/net").iterdir()),
            sorted(one.name for one in tmp_path.iterdir()),
        )

    before = traces()
    done = run([sys.executable, "-c", MAIN, "doctor"], check=False, env={"PODFERRY_STATE": str(tmp_path / "state")})
    assert done.returncode in (0, 3), done.stderr
    assert traces() == before


# -- downloads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def company(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A package index behind TLS whose authority only this machine's own list has: its address, and that list."""
    Authority.create(tmp_path / "ca", name="a company").issue("localhost", ["127.0.0.1"], tmp_path / "tls")
    index = tmp_path / "index" / "tiny"
    index.mkdir(parents=True)
    with zipfile.ZipFile(index / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\n")
    (index / "index.html").write_text('<a href="tiny-1.0-py3-none-any.whl">tiny-1.0-py3-none-any.whl</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(index.parent)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls/node.crt", tmp_path / "tls/node.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_address[1]}", tmp_path / "tls/ca.crt"
    server.shutdown()


@pytest.mark.parametrize("how", ["podferry", "scripts", "neither"])
def test_a_companys_authority_is_trusted_when_the_system_trusts_it(
    company: tuple[str, Path], tmp_path: Path, how: str
) -> None:
    if not SYSTEM_BUNDLE.is_file():
        pytest.skip(f"this machine has no list of authorities at {SYSTEM_BUNDLE}")
    index, authority = company
    uv = site._uv(quiet)
    environment = downloads({}) if how == "podferry" else {}
    source = f". {CHECKOUT}/scripts/downloads.sh;" if how == "scripts" else ""
    script = f'mount --bind {authority} {SYSTEM_BUNDLE}; {source} exec "$@"'
    install = [uv, "pip", "install", "--no-config", "--no-cache", "--quiet", "--index-url", index]
    argv = ["unshare", "--mount", "sh", "-ec", script, "sh", *install, "--target", tmp_path / "into", "tiny"]
    done = run(argv, check=False, env=environment, timeout=120.0)
    if how == "neither":
        assert "UnknownIssuer" in done.stderr, "the index is no test of trust"
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "into/tiny.py").is_file()


def test_criu_is_bundled_although_tmp_runs_no_programs(tmp_path: Path) -> None:
    """Its libraries are found by running it."""
    script = f"""
from pathlib import Path
from podferry.lab.kubernetes import portable_criu
portable_criu.cached = lambda kind, recipe, build: build(Path({str(tmp_path)!r}) / "criu")
portable_criu.bundle(print)
"""
    stage = noexec_tmp(tmp_path) + '\nexec "$@"'
    done = run(
        ["unshare", "--mount", "sh", "-ec", stage, "sh", sys.executable, "-c", script], check=False, timeout=300.0
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "criu/criu").is_file()


# -- the lab in unusual surroundings -----------------------------------------------------------------------------------

NO_IPV6 = """
import ctypes, os, struct, sys
# A seccomp filter: socket(AF_INET6) ends as on a kernel without IPv6. (linux/seccomp.h, linux/bpf_common.h)
number = {"x86_64": 41, "aarch64": 198}[os.uname().machine]
code = [(0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, 10)]
code += [(0x06, 0, 0, 0x50000 | 97), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
filter = struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(22, 2, ctypes.c_char_p(filter), 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_lab_without_ipv6(own_lab: Lab) -> None:
    """It comes up and runs a container from its registry. (Nobody under a seccomp filter may dump, so nothing moves.)"""
    without = [sys.executable, "-c", NO_IPV6]
    tried = run([*without, sys.executable, "-c", "import socket; socket.socket(socket.AF_INET6)"], check=False)
    assert "not supported by protocol" in tried.stderr, "this would be no test"
    done = run([*without, sys.executable, "-c", MAIN, "lab", "up", "--lab", own_lab.name], check=False, timeout=900.0)
    assert done.returncode == 0, done.stderr
    containers.start(own_lab, "node-a", "hello", ["python3", "-c", "print('hello')"])
    assert b"".join(containers.output(own_lab, "hello", follow=True)) == b"hello\n"


class Runtime:
    """Stands where a container runtime of the host listens, and keeps what it is told."""

    def __init__(self, path: Path) -> None:
        self.heard: list[bytes] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self._socket.accept()
            client.settimeout(5.0)
            with client, suppress(TimeoutError):
                if said := client.recv(100):
                    self.heard.append(said)


def test_a_demo_where_much_is_unusual(own_lab: Lab, tmp_path: Path) -> None:
    """/tmp runs no programs, /run is small, the terminal is German and knows no UTF-8, and other container runtimes are
    at their places: none hears a word of the lab."""
    (tmp_path / "run").mkdir()
    runtimes = {name: Runtime(tmp_path / "run" / name) for name in ("containerd", "docker", "k3s")}
    stage = f"""{noexec_tmp(tmp_path)}
mount -t tmpfs -o size=16m tmpfs /run
mkdir -p /run/containerd /run/k3s/containerd
for one in containerd/containerd.sock:containerd docker.sock:docker k3s/containerd/containerd.sock:k3s; do
    : > /run/${{one%:*}}
    mount --bind {tmp_path}/run/${{one#*:}} /run/${{one%:*}}
done"""
    env = {"LC_ALL": "de_DE", "LANG": "de_DE", "PYTHONIOENCODING": "iso8859-1", "TMPDIR": "/tmp"}
    seen = findings(podferry(stage, "doctor", "--json", env=env))
    assert "noexec" in seen["/tmp"]["found"]
    assert seen["container runtimes"]["found"].startswith("containerd, Docker, k3s' containerd;")
    done = podferry(stage, "lab", "demo", "--lab", own_lab.name, "--steps", "900", env=env, timeout=900.0)
    assert done.returncode == 0, done.stderr
    assert "The job that moved computed exactly" in done.stdout
    assert [one.heard for one in runtimes.values()] == [[], [], []]


VOLATILE = re.compile(
    r"random/|fs/(dentry|inode|file-nr|aio-nr|quota)|pty/nr|ns_last_pid|conntrack_count|pipe-max-size|sched_domain|"
    r"net/netfilter/nf_log|kernel/(perf|nsm)|cad_pid|sunrpc|/route/flush|compact_memory|drop_caches|stat_refresh|fs/mount-max"
)


def machine() -> dict[str, object]:
    """What a container runtime of this machine stands on: interfaces, mounts, packet filters, kernel settings."""
    settings = {}
    for path in Path("/proc/sys").rglob("*"):
        if not VOLATILE.search(str(path)) and path.is_file():
            with suppress(OSError):
                settings[str(path)] = path.read_bytes()
    filters = shutil.which("nft") and run(["nft", "list", "ruleset"], check=False).stdout
    interfaces = sorted(one.name for one in Path("/sys/class/net").iterdir())
    routes = Path("/proc/net/route").read_text()
    return {"settings": settings, "filters": filters, "interfaces": interfaces, "routes": routes}


def test_the_machine_is_as_before_while_a_lab_runs(own_lab: Lab) -> None:
    before = machine()
    own_lab.up(2)
    containers.start(own_lab, "node-a", "job", ["sleep", "infinity"])
    during = machine()
    assert {name for name in before["settings"] if before["settings"][name] != during["settings"].get(name)} == set()  # type: ignore
    assert {**during, "settings": 0} == {**before, "settings": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("libopenmpi-dev", "usr/bin/mpicc"),
        ("mariadb-server", "usr/sbin/mariadbd"),
        ("nginx,postgresql", "usr/sbin/nginx"),
    ],
)
def test_images_of_packages_whose_configuration_needs_an_order(package: str, file: str) -> None:
    with tempfile.TemporaryDirectory(dir=state.CACHE) as place:
        root = Path(place) / "root"
        bootstrap(package.split(","), root, state.CACHE / "debs", quiet)
        assert os.path.lexists(root / file)  # mpicc is a link to an absolute path
        assert not (root / "usr/sbin/policy-rc.d").exists()
        assert "half-configured" not in (root / "var/lib/dpkg/status").read_text()
        running = [one for one in Path("/proc").glob("[0-9]*/root") if os.path.realpath(one).startswith(place)]
        assert not running, "a package started something"
