"""Installing and uninstalling, step by step."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from podferry.core.host import SELINUX_REMEDY, SELINUX_WHY
from podferry.criu import dump_gate, incoming, network_setup
from podferry.errors import PodferryError, Refused
from podferry.install import containerd_config, containerd_service, crio_service, criu_bundle, remains
from podferry.install.containerd_config import ContainerdSettings
from podferry.install.containerd_service import Daemon
from podferry.install.crio_service import CrioDaemon
from podferry.install.files import InstalledFiles, Root
from podferry.node import host, outside, own_tmpfs

WRAPPER = "/opt/podferry/bin/podferry-runc"
SOURCE = Path(outside.__file__).with_name("podferry-runc")
TASKS = "/run/containerd/io.containerd.runtime.v2.task"

POLL_INTERVAL = 1.0  # seconds; a container's end is no event that others could wait for

Tell = Callable[[str], None]
Runtime = Daemon | CrioDaemon


def find_runtime() -> Runtime:
    """What makes the pods on this node. Raises `Refused` where neither containerd nor CRI-O runs."""
    if crio_service.makes_the_pods() and (found := crio_service.find()) is not None:
        return found
    return containerd_service.find()


@dataclass(frozen=True)
class Installed:
    """What an installation did: the files that changed, and whether the container runtime was started again."""

    changed: tuple[str, ...]
    restarted: bool


def install(
    report: Tell,
    *,
    bundle: Path = Path(criu_bundle.DIRECTORY),
    find: Callable[[], Runtime] = find_runtime,
    memory: Callable[[Tell], object] = own_tmpfs.ensure_on_node,
) -> Installed:
    """Put podferry on this node, or bring what is there up to date. `bundle` holds our CRIU; `memory` makes the place for memory
    on its way.

    The container runtime is started again only if its settings changed. Raises `PodferryError`; the settings are then as before.
    """
    root = Root(outside.root())
    if host.selinux_enforces(root.top):
        raise Refused("SELinux enforces its policy on this node", why=SELINUX_WHY, remedy=SELINUX_REMEDY)
    runtime = find()
    ledger = InstalledFiles(root)
    changed = []

    def write(path: str, content: bytes, mode: int) -> None:
        if ledger.write(path, content, mode=mode):
            report(f"wrote {path}")
            changed.append(path)

    write(WRAPPER, SOURCE.read_bytes(), 0o755)
    write(str(dump_gate.ON_NODE), dump_gate.SHIM.read_bytes(), 0o755)
    write(str(network_setup.ON_NODE), network_setup.SCRIPT.read_bytes(), 0o755)
    write(str(incoming.ON_NODE), incoming.STOPPED.read_bytes(), 0o755)
    write(str(incoming.PARENT_ON_NODE), incoming.PARENT.read_bytes(), 0o755)
    if criu_bundle.wanted(root.top):
        if not bundle.is_dir():
            raise Refused(
                "podferry needs another CRIU on this node, and this installation brings none",
                why=f"its own is missing or older than {'.'.join(map(str, criu_bundle.OLDEST))}, and {bundle} is not there",
                remedy="install CRIU on the node, or use podferry's container image",
            )
        for path, content, mode in criu_bundle.files(bundle):
            write(path, content, mode)
    restarted = _configure(root, runtime, ledger, write, report)
    memory(report)
    if not changed and not restarted:
        report("everything is in its place already")
    return Installed(tuple(changed), restarted)


def uninstall(
    report: Tell,
    *,
    force: bool = False,
    wait: bool = False,
    find: Callable[[], Runtime] = find_runtime,
    memory: Callable[[Tell], object] = own_tmpfs.remove_from_node,
) -> Installed:
    """Restore the node as it was before `install`; what its agent has kept goes too, its key and journals among it.

    While containers need what would go, the agent runs or a migration has not ended, it waits with `wait`, raises `Refused`
    without, or goes on with `force`.
    """
    root = Root(outside.root())
    ledger = InstalledFiles(root)
    streamed = ""
    while not force and (why := _users(root) or remains.in_use(root)):
        if not wait:
            raise Refused(
                "podferry is in use on this node",
                why=why,
                remedy="drain the node and end its agent (in a cluster: kubectl delete -k deploy/), or give --wait or --force",
            )
        if why != streamed:
            report(f"waiting: {why}")
        streamed = why
        time.sleep(POLL_INTERVAL)
    if not ledger.entries and not ledger.restart_due:
        left = tuple(remains.remove(root, report))
        memory(report)
        if not left:
            report("nothing is installed here")
        return Installed(left, False)
    runtime = find()
    before = runtime.dump()
    # Settings first: they must not name a program that is gone.
    order = sorted(ledger.entries, key=lambda path: not path.endswith((".toml", crio_service.NAME)))
    changed = []
    for path in order:
        if ledger.is_ours(path) or root.read(path) is None:
            ledger.put_back(path)
            report(f"restored {path}")
        elif path.endswith((f"/{containerd_config.NAME}", f"/{crio_service.NAME}")):
            ledger.put_back(path)
            report(f"removed {path}")
        else:
            report(f"left {path} alone: somebody has changed it since")
            ledger.forget(path)
        changed.append(path)
    _remove_empty(root, [str(PurePosixPath(path).parent) for path in order])
    restarted = ledger.restart_due or runtime.dump() != before
    if restarted:
        report(f"{runtime.name}: starting it again")
        runtime.restart()
    ledger.restart_due = False
    ledger.save()
    gone = remains.remove(root, report)
    memory(report)
    return Installed((*changed, *gone), restarted)


def _wanted(root: Root, runtime: Runtime) -> dict[str, str]:
    """The files by which the container runtime knows podferry's, and what is to be in them."""
    return runtime.settings(WRAPPER) if isinstance(runtime, CrioDaemon) else _wanted_of_containerd(root, runtime)


def _wanted_of_containerd(root: Root, containerd: Daemon) -> dict[str, str]:
    text = (root.read(containerd.config) or b"").decode()
    at = containerd_config.drop_in_path(ContainerdSettings(containerd.config, text))
    known = ContainerdSettings(
        containerd.config, text, _imported(root, ContainerdSettings(containerd.config, text), at)
    )
    main = containerd_config.with_import(known, containerd.major, at)
    new = {at: containerd_config.drop_in(known, containerd.major, WRAPPER)}
    if main != text:
        new[containerd.config] = main
    return new


def _configure(
    root: Root, runtime: Runtime, ledger: InstalledFiles, write: Callable[[str, bytes, int], None], report: Tell
) -> bool:
    """The container runtime's settings; true if it was started again."""
    new = _wanted(root, runtime)
    stale = [path for path, content in new.items() if root.read(path) != content.encode()]
    before = {path: root.read(path) for path in stale}
    if stale:
        ledger.restart_due = True
    for path, wanted in new.items():
        place = root.path(path)
        write(path, wanted.encode(), place.stat().st_mode & 0o777 if place.exists() else 0o644)
    if not ledger.restart_due:
        return False
    try:
        _check(runtime)
        report(f"{runtime.name}: starting it again, for its new settings")
        runtime.restart()
    except PodferryError:
        report(f"{runtime.name}: its settings go back to what they were")
        for path, content in before.items():
            if content is None:
                ledger.put_back(path)
            else:
                write(path, content, root.path(path).stat().st_mode & 0o777)
        raise
    ledger.restart_due = False
    ledger.save()
    return True


def _check(runtime: Runtime) -> None:
    """What was written must be understood before anything depends on it."""
    if f".runtimes.{containerd_config.RUNTIME}" in runtime.dump():
        return
    if isinstance(runtime, CrioDaemon):
        raise Refused(
            "CRI-O would not load podferry's runtime",
            why=f"it does not read {runtime.drop_ins}/{crio_service.NAME}, or a later file replaces what that says",
            remedy=f"see `{' '.join(('crio', *runtime.flags))} config`",
        )
    raise Refused(
        "containerd would not load podferry's runtime",
        why=f"another file that {runtime.config} imports replaces podferry's settings",
        remedy=f"see `containerd --config {runtime.config} config dump`",
    )


def _imported(root: Root, main: ContainerdSettings, ours: str) -> tuple[str, ...]:
    """The texts of the files that containerd's configuration imports, but for our own."""
    texts = []
    for pattern in main.table.get("imports", []):
        absolute = str(PurePosixPath(main.path).parent / pattern)
        directory = root.path(str(PurePosixPath(absolute).parent))
        for file in sorted(glob.glob(PurePosixPath(absolute).name, root_dir=directory)):  # noqa: PTH207
            if file != PurePosixPath(ours).name and (text := root.read(f"{PurePosixPath(absolute).parent}/{file}")):
                texts.append(text.decode())
    return tuple(texts)


def _users(root: Root) -> str:
    """Why the runtime is still needed: the containers, as NAMESPACE/ID, whose shim calls it; empty where there are none."""
    found = []
    for options in sorted(root.path(TASKS).glob("*/*/options.json")):
        if WRAPPER in options.read_text(errors="replace"):
            found.append(f"{options.parents[1].name}/{options.parent.name}")
    found += [f"CRI-O's {id}" for id in crio_service.users(root, WRAPPER)]
    if not found:
        return ""
    return f"{len(found)} containers were started by its runtime, among them {found[0]}: they could not be stopped"


def _remove_empty(root: Root, directories: list[str]) -> None:
    """Remove directories that nothing is left in, those of ours and a drop-in's."""
    every = {parent for one in directories for parent in (PurePosixPath(one), *PurePosixPath(one).parents)}
    for directory in sorted(every, key=lambda one: len(one.parts), reverse=True):
        if directory.is_relative_to("/opt/podferry") or directory.name in ("conf.d", "crio.conf.d"):
            root.remove_empty(str(directory))
