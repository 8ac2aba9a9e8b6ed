"""Installing on scratch roots, beside a containerd that only reads its configuration as the real ones do."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import tomli_w

from podferry.criu import dump_gate, incoming
from podferry.errors import Refused
from podferry.install import containerd_config, containerd_service, criu_bundle, files, node, remains
from podferry.install.containerd_config import CRI, ContainerdSettings
from podferry.node import outside
from podferry.node.process import spawn

pytestmark = pytest.mark.unit

CONFIG = "/etc/containerd/config.toml"
DROP_IN = "/etc/containerd/conf.d/90-podferry.toml"
V2 = """\
# written by hand
version = 2
root = "/var/lib/containerd"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "pause:3"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = true
"""
V3 = V2.replace("version = 2", "version = 3").replace(CRI[2], CRI[3])


@dataclass
class Containerd:
    """Reads files as containerd 1.7 or 2 does, and counts its starts."""

    root: Path
    major: int
    config: str = CONFIG
    name: str = "containerd"
    restarts: int = 0
    running: dict[str, Any] = field(default_factory=dict)

    def read(self) -> dict[str, Any]:
        main = files.Root(self.root).path(self.config)
        table = tomllib.loads(main.read_text()) if main.exists() else {}
        for pattern in table.get("imports", []):
            for path in sorted(self.root.glob(pattern[1:])):
                plugins = tomllib.loads(path.read_text()).get("plugins", {})
                mine = table.setdefault("plugins", {})
                for name, section in plugins.items():
                    merge = self.major >= 2 and name in mine
                    mine[name] = containerd_config._merged(mine[name], section) if merge else section
        return table

    def dump(self) -> str:
        return tomli_w.dumps(self.read())

    def restart(self) -> Containerd:
        self.restarts += 1
        self.running = self.read()
        return self


@dataclass
class Node:
    root: Path
    bundle: Path
    containerd: Containerd
    said: list[str] = field(default_factory=list)
    mounts: list[str] = field(default_factory=list)

    def install(self) -> node.Installed:
        return node.install(
            lambda _: None,
            bundle=self.bundle,
            find=lambda: self.containerd,  # type: ignore[arg-type,return-value]
            memory=lambda _: self.mounts.append("on"),
        )

    def uninstall(self, *, force: bool = False, wait: bool = False) -> node.Installed:
        return node.uninstall(
            self.said.append,
            force=force,
            wait=wait,
            find=lambda: self.containerd,  # type: ignore[arg-type,return-value]
            memory=lambda _: self.mounts.append("off"),
        )

    def put(self, path: str, text: str, mode: int = 0o644) -> None:
        place = self.root / path[1:]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def tree(self) -> dict[str, tuple[int, object]]:
        """All that is on the node: kind and mode, and content."""
        found: dict[str, tuple[int, object]] = {}
        for path in self.root.rglob("*"):
            kind = path.lstat().st_mode
            content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(self.root))] = (kind, content)
        return found

    def runtime(self, major: int) -> dict[str, Any]:
        cri = CRI[2] if major < 2 else CRI[3]
        found = self.containerd.running["plugins"][cri]["containerd"]["runtimes"]
        assert isinstance(found, dict)
        return found


@pytest.fixture(params=[1, 2])
def major(request: pytest.FixtureRequest) -> int:
    assert isinstance(request.param, int)
    return request.param


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int) -> Node:
    root, bundle = tmp_path / "root", tmp_path / "bundle"
    (bundle / "bin").mkdir(parents=True)
    (bundle / "bin" / "criu").write_text("#!/bin/sh\n")
    (bundle / "bin" / "criu").chmod(0o755)
    monkeypatch.setattr(outside, "root", lambda: root)
    monkeypatch.setattr(outside, "on_node", lambda argv: [f"{root}{argv[0]}", *argv[1:]])
    one = Node(root, bundle, Containerd(root, major))
    one.put(CONFIG, V2 if major < 2 else V3, 0o640)
    one.put("/usr/sbin/criu", "#!/bin/sh\necho Version: 4.2.1\n", 0o755)
    for directory in ("var/lib/podferry", "opt"):
        (root / directory).mkdir(parents=True)
    one.containerd.running = one.containerd.read()
    return one


def test_the_runtime_is_the_nodes_runc_by_another_program(on: Node, major: int) -> None:
    done = on.install()
    assert done.restarted
    assert on.containerd.restarts == 1
    runtimes = on.runtime(major)
    assert runtimes["podferry"] == {
        "runtime_type": "io.containerd.runc.v2",
        "pod_annotations": ["podferry.dev/*"],
        "options": {"SystemdCgroup": True, "BinaryName": node.WRAPPER},
    }
    assert runtimes["runc"]["options"] == {"SystemdCgroup": True}
    cri = CRI[2] if major < 2 else CRI[3]
    assert on.containerd.running["plugins"][cri]["sandbox_image"] == "pause:3"
    wrapper = on.root / node.WRAPPER[1:]
    assert wrapper.read_bytes() == node.SOURCE.read_bytes()
    assert wrapper.stat().st_mode & 0o777 == 0o755
    shim = on.root / dump_gate.ON_NODE.relative_to("/")
    assert shim.read_bytes() == dump_gate.SHIM.read_bytes()
    script = on.root / incoming.ON_NODE.relative_to("/")
    assert script.read_bytes() == incoming.STOPPED.read_bytes()
    assert shim.stat().st_mode & 0o777 == 0o755
    assert (on.root / CONFIG[1:]).stat().st_mode & 0o777 == 0o640
    assert not (on.root / "opt/podferry/criu").exists(), "the node's CRIU is new enough"


def test_installing_again_changes_nothing(on: Node) -> None:
    on.install()
    before = on.tree()
    assert on.install() == node.Installed((), False)
    assert on.tree() == before
    assert on.containerd.restarts == 1


def test_uninstalling_restores_the_node_byte_for_byte(on: Node) -> None:
    on.put("/usr/sbin/criu", "#!/bin/sh\necho Version: 4.1.1\n", 0o755)
    before, running = on.tree(), on.containerd.running
    on.install()
    assert on.tree() != before
    assert on.uninstall().restarted
    assert on.tree() == before
    assert on.containerd.running == running
    assert on.uninstall() == node.Installed((), False)


@pytest.mark.parametrize("installed", ["", "#!/bin/sh\necho Version: 4.1.1\n", "#!/bin/sh\nexit 1\n"])
def test_a_node_whose_criu_is_missing_or_too_old_gets_ours(on: Node, installed: str) -> None:
    (on.root / "usr/sbin/criu").unlink()
    if installed:
        on.put("/usr/sbin/criu", installed, 0o755)
    assert f"{criu_bundle.DIRECTORY}/bin/criu" in on.install().changed
    ours = on.root / criu_bundle.DIRECTORY[1:] / "bin" / "criu"
    assert ours.stat().st_mode & 0o777 == 0o755


def test_a_new_wrapper_needs_no_restart(on: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on.install()
    (tmp_path / "newer").write_text("#!/bin/sh\n# newer\n")
    monkeypatch.setattr(node, "SOURCE", tmp_path / "newer")
    assert on.install() == node.Installed((node.WRAPPER,), False)
    assert on.containerd.restarts == 1


def test_an_installation_that_was_killed_before_the_restart_makes_up_for_it(on: Node) -> None:
    class Killed(BaseException):
        pass

    def killed() -> Containerd:
        raise Killed

    restart, on.containerd.restart = on.containerd.restart, killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        on.install()
    on.containerd.restart = restart  # type: ignore[method-assign]
    assert on.install() == node.Installed((), True)
    assert on.install() == node.Installed((), False)


def test_settings_that_containerd_would_not_take_go_back(on: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    config = (on.root / CONFIG[1:]).read_bytes()
    monkeypatch.setattr(on.containerd, "dump", lambda: "something else won")
    with pytest.raises(Refused, match="would not load podferry's runtime"):
        on.install()
    assert on.containerd.restarts == 0
    assert (on.root / CONFIG[1:]).read_bytes() == config
    assert not (on.root / DROP_IN[1:]).exists()


def test_a_directory_that_is_imported_already_is_used(on: Node) -> None:
    text = f'imports = ["/etc/containerd/more/*.toml"]\n{(on.root / CONFIG[1:]).read_text()}'
    on.put(CONFIG, text)
    assert "/etc/containerd/more/90-podferry.toml" in on.install().changed
    assert (on.root / CONFIG[1:]).read_text() == text


def test_other_imports_stay(on: Node, major: int) -> None:
    on.put(CONFIG, f'imports = [\n  "/etc/other.toml",\n]\n{(on.root / CONFIG[1:]).read_text()}')
    version, cri = (2, CRI[2]) if major < 2 else (3, CRI[3])
    other = {"version": version, "plugins": {cri: {"containerd": {"runtimes": {"kata": {"runtime_type": "kata"}}}}}}
    on.put("/etc/other.toml", tomli_w.dumps(other))
    on.install()
    assert set(on.runtime(major)) == ({"kata", "podferry"} if major < 2 else {"kata", "runc", "podferry"})
    on.uninstall()
    assert on.containerd.running == on.containerd.read()
    assert "podferry" not in on.runtime(major)


def test_a_configuration_behind_a_link_stays_behind_it(on: Node) -> None:
    place = on.root / CONFIG[1:]
    on.put("/etc/real/containerd.toml", place.read_text())
    place.unlink()
    place.symlink_to("/etc/real/containerd.toml")
    before = on.tree()
    on.install()
    assert place.is_symlink()
    assert "imports" in (on.root / "etc/real/containerd.toml").read_text()
    on.uninstall()
    assert on.tree() == before


def test_without_any_configuration_there_is_one(on: Node, major: int) -> None:
    (on.root / CONFIG[1:]).unlink()
    before = on.tree()
    on.install()
    assert on.containerd.running["version"] == (2 if major < 2 else 3)
    assert "podferry" in on.runtime(major)
    on.uninstall()
    assert on.tree() == before


def test_what_somebody_changed_since_is_left_alone(on: Node) -> None:
    on.install()
    place = on.root / CONFIG[1:]
    place.write_text(place.read_text() + "# mine\n")
    changed = place.read_text()
    on.uninstall()
    assert place.read_text() == changed
    assert not (on.root / DROP_IN[1:]).exists()


def test_a_node_whose_containers_need_the_runtime_keeps_it(on: Node) -> None:
    on.install()
    on.put(f"{node.TASKS}/k8s.io/abc/options.json", f'{{"binary_name":"{node.WRAPPER}"}}')
    before = on.tree()
    with pytest.raises(Refused, match="in use") as refused:
        on.uninstall()
    assert "k8s.io/abc" in refused.value.why
    assert on.tree() == before
    assert on.uninstall(force=True).restarted


def test_a_node_can_wait_for_the_end_of_its_containers(on: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    on.install()
    options = [f"{node.TASKS}/k8s.io/{name}/options.json" for name in ("abc", "def")]
    for path in options:
        on.put(path, f'{{"binary_name":"{node.WRAPPER}"}}')
    monkeypatch.setattr(node.time, "sleep", lambda _: (on.root / options.pop()[1:]).unlink())
    assert on.uninstall(wait=True).restarted
    waited = [line for line in on.said if "waiting" in line]
    assert [("2 containers" in line, "1 containers" in line) for line in waited] == [(True, False), (False, True)]


@pytest.mark.parametrize("major", [2])
def test_a_format_of_containerd_1_under_containerd_2(on: Node) -> None:
    on.put(CONFIG, V2)
    on.install()
    found = tomllib.loads((on.root / DROP_IN[1:]).read_text())
    assert found["version"] == 2, "a newer drop-in would keep the main file from being read as what it is"
    assert list(found["plugins"]) == [CRI[2]]


def test_format_1_is_refused_with_the_way_out(on: Node) -> None:
    on.put(CONFIG, "[plugins.cri]\n")
    with pytest.raises(Refused, match="has format 1") as refused:
        on.install()
    assert "config migrate" in refused.value.remedy


@pytest.mark.parametrize("path", ["/a/link/file", "/a/up/etc/file", "/a/out/file"])
def test_links_never_lead_out_of_the_node(tmp_path: Path, path: str) -> None:
    top = tmp_path / "root"
    (top / "a").mkdir(parents=True)
    (top / "a" / "link").symlink_to("/etc")
    (top / "a" / "up").symlink_to("../../../..")
    (top / "a" / "out").symlink_to("/../../etc")
    found = files.Root(top).path(path)
    assert found == top / "etc" / "file"


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(Exception, match="too many symbolic links"):
        files.Root(tmp_path).path("/loop/x")


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["containerd"], CONFIG),
        (["containerd", "--config", "/etc/other.toml"], "/etc/other.toml"),
        (["containerd", "-c", "/etc/other.toml", "--log-level", "debug"], "/etc/other.toml"),
        (["containerd", "--config=/etc/other.toml"], "/etc/other.toml"),
    ],
)
def test_the_configuration_is_the_one_containerd_was_started_with(words: list[str], config: str) -> None:
    assert containerd_service._config(words) == config


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path fits into the address of a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pf-") as directory:
        yield Path(directory)


def test_who_listens_is_what_the_kernel_says_of_the_nodes_own_socket(short: Path) -> None:
    ours, stale = short / "containerd.sock", short / "stale.sock"
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as other:
        listening.bind(str(ours))
        assert containerd_service.listener(ours) is None, "nobody listens yet"
        listening.listen()
        other.bind(str(stale))
        assert containerd_service.listener(ours) == os.getpid()
        assert containerd_service.listener(stale) is None
    assert containerd_service.listener(ours) is None
    assert containerd_service.listener(short / "nobody.sock") is None


IMPOSTOR = """
import os, socket, sys
os.chroot(sys.argv[1])
listening = socket.socket(socket.AF_UNIX)
listening.bind("/run/containerd/containerd.sock")
listening.listen()
print("listens", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may take another root directory")
def test_a_socket_of_that_name_in_another_root_is_not_the_nodes(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that shares the node's network is listed in /proc/net/unix by the same path, and may have the lower pid."""
    root, other = short / "node", short / "container"
    for one in (root, other):
        (one / "run/containerd").mkdir(parents=True)
    monkeypatch.setattr(outside, "root", lambda: root)
    impostor = Popen([sys.executable, "-c", IMPOSTOR, str(other)], stdin=PIPE, stdout=PIPE)
    try:
        assert impostor.stdout and impostor.stdout.readline() == b"listens\n"
        assert "/run/containerd/containerd.sock" in Path("/proc/net/unix").read_text()
        with pytest.raises(Refused, match="containerd does not run"):
            containerd_service.find()
    finally:
        impostor.kill()
        impostor.communicate()


KEPT = {
    "/var/lib/podferry/pki/node.key": "a key",
    "/var/lib/podferry/migrations/1/record.json": "{}",
    "/var/lib/podferry/staging/1.volumes/0/secret": "files",
    "/var/lib/podferry/arrived/uid_job": "",
    "/run/podferry/incoming/uid_job/images/pages-1.img": "memory",
    "/run/podferry/restored/job": "",
}


def test_uninstalling_leaves_no_key_no_journal_and_no_staged_file(on: Node) -> None:
    on.put("/var/lib/podferry/snapshotter/layers/1", "a layer of containerd's")
    (on.root / "run").mkdir()
    before = on.tree()
    on.install()
    for path, text in KEPT.items():
        on.put(path, text, 0o600)
    done = on.uninstall()
    assert on.tree() == before
    assert "/var/lib/podferry/pki" in done.changed
    for path, text in KEPT.items():  # an agent that was started once more
        on.put(path, text, 0o600)
    on.uninstall()
    assert on.tree() == before


def test_what_is_kept_elsewhere_through_a_link_stays(on: Node) -> None:
    on.put("/home/somebody/file", "hers")
    on.put("/var/lib/podferry/snapshotter/layers/1", "a layer of containerd's")
    (on.root / "var/lib/podferry/staging").symlink_to(on.root / "home/somebody")
    before = on.tree()
    on.uninstall()
    assert {name for name in before if name not in on.tree()} == {"var/lib/podferry/staging"}


def test_a_migration_that_has_not_ended_keeps_the_node_installed(on: Node) -> None:
    on.install()
    on.put("/var/lib/podferry/migrations/1/journal.jsonl", '{"format": 2}\n')
    with pytest.raises(Refused, match="1 migrations have not ended"):
        on.uninstall()
    assert (on.root / node.WRAPPER[1:]).exists()
    on.uninstall(force=True)
    assert not (on.root / "var/lib/podferry/migrations").exists()


def test_an_agent_that_runs_keeps_the_node_installed(on: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    on.install()
    monkeypatch.setattr(remains, "listener", lambda path: 7 if path.name == "agent.sock" else None)
    with pytest.raises(Refused, match="its agent still runs"):
        on.uninstall()
    assert (on.root / node.WRAPPER[1:]).exists()


def test_uninstalling_waits_for_an_agent_that_is_about_to_end(on: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    on.install()
    answers = iter([7, 7, None])
    monkeypatch.setattr(remains, "listener", lambda path: next(answers))
    monkeypatch.setattr(node, "POLL_INTERVAL", 0.0)
    on.uninstall(wait=True)
    assert on.said.count("waiting: its agent still runs") == 1
    assert not (on.root / node.WRAPPER[1:]).exists()


def test_where_selinux_enforces_nothing_is_installed(on: Node) -> None:
    on.put("/sys/fs/selinux/enforce", "1")
    before = on.tree()
    with pytest.raises(Refused, match="SELinux enforces"):
        on.install()
    assert on.tree() == before
    on.put("/sys/fs/selinux/enforce", "0")
    assert on.install().changed


def test_imports_written_in_a_way_that_is_not_understood() -> None:
    main = ContainerdSettings(CONFIG, 'version = 2\n"imports" = ["/x.toml"]\n')
    with pytest.raises(Refused, match="cannot add an import"):
        containerd_config.with_import(main, 1, DROP_IN)


MOUNTED = """
set -e
mount -t tmpfs none "$1"
echo ready
read -r _
"""


def test_a_directory_that_the_node_has_a_mount_on_is_not_removed_from_a_container(tmp_path: Path) -> None:
    """`rmdir` would succeed here, and unmount it there."""
    (state := tmp_path / "state").mkdir()
    (left := tmp_path / "left").mkdir()
    argv = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNTED, "sh", state]
    node_ = spawn(argv, stdin=PIPE, stdout=PIPE)
    try:
        assert node_.stdout is not None
        if node_.stdout.readline() != b"ready\n":
            pytest.skip("this user may not make mount namespaces here")
        root = files.Root(Path(f"/proc/{node_.pid}/root"))
        root.remove_empty(str(state))
        root.remove_empty(str(left))
        assert f" {state} " in Path(f"/proc/{node_.pid}/mountinfo").read_text()
        assert state.is_dir()
        assert not left.exists()
    finally:
        node_.kill()
        node_.wait()
