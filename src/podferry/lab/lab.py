"""A lab: a small cluster on one machine, made of namespaces, that `down` removes without a trace."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from podferry.errors import Failed, Refused, TimedOut, UsageError
from podferry.install.criu_bundle import DIRECTORY as OWN_CRIU
from podferry.lab import (
    build_cache,
    cgroups,
    delegation,
    hostfacts,
    kernel,
    machine,
    machine_config,
    network,
    registry,
    root_images,
    site,
    state,
)
from podferry.lab.debian import SUITES, require
from podferry.lab.kubernetes import certificates, crio_package, daemons, deploy, image, portable_criu
from podferry.lab.kubernetes.cluster import Kubectl
from podferry.lab.kubernetes.pod_network import connect
from podferry.lab.lab_settings import LabSettings, archives_of, runtime_on, services_of
from podferry.lab.lab_status import LabStatus, Node
from podferry.lab.progress import Progress, quiet
from podferry.lab.state import CONTROL, CRIO, STORAGE, SWITCH, runtime_of
from podferry.node.process import Arg, Completed, last_lines, raise_for, run
from podferry.wire.pki import Authority

AGENT_SOCKET = "run/podferry/agent.sock"
CONTAINERD_SOCKET = "run/containerd/containerd.sock"
SNAPSHOTTER_SOCKET = "run/podferry/snapshotter.sock"
READY_SECONDS = 600.0
"""On a machine that is emulated, or short of processors, a service needs minutes to start."""

# A mount is an event (poll on /proc/self/mountinfo); ctr itself waits for containerd's socket.
# containerd that once found no snapshotter comes back to it only after a while, and pulls fail until then.
_IMAGES_READY = (
    f"until ctr snapshots --snapshotter {machine_config.SNAPSHOTTER} list >/dev/null 2>&1; do sleep 0.1; done"
)
_SHARE_READY = "until mountpoint -q /share; do findmnt --poll=mount --first-only --timeout 500 >/dev/null || :; done"
_IMAGES = "/opt/podferry/images"
_KUBERNETES = "/opt/podferry/kube"


class Lab:
    """The lab called `name`, whether it is up or not. Every method needs root and raises `PodferryError`."""

    def __init__(self, name: str = "default") -> None:
        self.name = state.check_name(name)
        self.home = state.LABS / name
        self._lock = state.LABS / f"{name}.lock"
        self._settings = self.home / "lab.json"

    # -- the whole lab ---------------------------------------------------------------------------------------------

    def up(
        self,
        nodes: int | None = None,
        link: str | None = None,
        *,
        cgroup: str | None = None,
        agent: bool | None = None,
        kubernetes: bool | None = None,
        debian: str | None = None,
        runtime: str | None = None,
        binds: Mapping[str, Path] | None = None,
        progress: Progress = quiet,
    ) -> LabStatus:
        """Bring the lab up, or complete what is missing of it; what is not given stays as it was.

        `link` is a rate such as 1gbit, or none. Nodes that run are not restarted, except for their agents where their
        configuration changed. `debian` is the release that they are made of, of `SUITES`, `runtime` what makes their containers
        (`state.runtime_of`). Raises `UsageError` for fewer nodes than there are, and for other cgroups, binds, agents, Kubernetes,
        Debian or container runtime than those they were made with; `Refused` where Kubernetes' programs are missing, or CRI-O's.
        """
        state.require_root()
        state.require_plain_disk()
        with state.locked(self._lock):
            given: dict[str, Any] = {
                "nodes": nodes,
                "link": link,
                "cgroups": cgroup,
                "agent": agent,
                "kubernetes": kubernetes,
                "debian": debian,
                "runtime": runtime,
            }
            if binds is not None:
                given["binds"] = {inside: str(source) for inside, source in binds.items()}
            settings = self._settle({key: value for key, value in given.items() if value is not None})
            if not cgroups.processes(self.name):
                hostfacts.require(self.name, progress, debian=settings.debian, kubernetes=settings.kubernetes)
            require(network.PROGRAMS, progress)
            image = root_images.node_root(progress, settings.debian)
            binds_of_nodes = self._binds(settings, image, progress)
            kernel.raise_pipe_size(progress)
            cgroups.prepare(progress)
            self.home.mkdir(parents=True, exist_ok=True)
            self._settings.write_text(json.dumps(asdict(settings), indent=2))
            self._start_missing(settings, image, binds_of_nodes, progress)
            return self.status()

    def down(self, progress: Progress = quiet) -> None:
        """End everything in the lab and remove it. A lab that is not there, or only half, is fine."""
        state.require_root()
        with state.locked(self._lock):
            progress(f"lab {self.name}: ending its processes")
            cgroups.kill(self.name)
            progress(f"lab {self.name}: removing its cgroups and files")
            cgroups.remove(self.name)
            build_cache.remove(self.home)
            if not list_labs():
                kernel.restore_pipe_size()
                delegation.give_back()

    def exists(self) -> bool:
        """Whether the lab has been brought up and not taken down."""
        return self._settings.exists()

    def status(self) -> LabStatus:
        """The lab as it is now. Raises `UsageError` where there is none."""
        state.require_root()
        settings = self._read_settings()
        pids = {one.machine: one.pid for one in cgroups.processes(self.name) if one.first}
        cut = network.cut_off(pids[SWITCH]) if SWITCH in pids else set()
        addresses = self._addresses(settings)
        found = {name: Node(name, address, pids.get(name), name in cut) for name, address in addresses.items()}
        storage, control = found.pop(STORAGE), found.pop(CONTROL, None)
        net = f"{state.subnet(self.name)}.0/24"
        return LabStatus(self.name, net, settings.link, storage, tuple(found.values()), control)

    # -- one machine of it -----------------------------------------------------------------------------------------

    def node(self, name: str) -> Node:
        """The node (or `storage`) called `name`. Raises `UsageError` for a name the lab does not have."""
        status = self.status()
        own = [status.storage, *([status.control] if status.control else [])]
        known = {node.name: node for node in (*own, *status.nodes)}
        if name not in known:
            raise UsageError(
                f"lab {self.name} has no node {name!r}", remedy=f"its machines are {', '.join(sorted(known))}"
            )
        return known[name]

    def command(self, node: str, argv: Sequence[Arg], *, cwd: str = "/") -> list[Arg]:
        """The command that runs `argv` inside a node, for callers that start it themselves."""
        return machine.enter(self._pid(node), argv, cwd=cwd)

    def exec(
        self,
        node: str,
        argv: Sequence[Arg],
        *,
        check: bool = True,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        timeout: float | None = None,
    ) -> Completed:
        """Run `argv` inside a node (or `storage`) to its end, as `process.run` does; `timeout` in seconds."""
        done = run(self.command(node, argv, cwd=cwd), check=False, input=input, env=env, timeout=timeout)
        typed = ["podferry", "lab", "exec", "--lab", self.name, node, "--", *(str(arg) for arg in argv)]
        done = replace(done, argv=typed)
        if check:
            raise_for(done)
        return done

    def root(self, node: str) -> Path:
        """A running node's root directory as this machine reaches it."""
        return Path("/proc", str(self._pid(node)), "root")

    def agent_socket(self, node: str) -> Path:
        """The socket of a running node's agent as this machine reaches it; short enough for connect(2)."""
        return self.root(node) / AGENT_SOCKET

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig of the lab's Kubernetes, for programs in its network (`kubectl`)."""
        return self.home / "kubeconfig"

    def kubectl(self) -> Kubectl:
        """kubectl for the lab's Kubernetes. Raises `UsageError` where it has none."""
        if not self._read_settings().kubernetes:
            raise UsageError(
                f"lab {self.name} has no Kubernetes",
                remedy=f"podferry lab down --lab {self.name}; podferry lab up --kubernetes --lab {self.name}",
            )
        return Kubectl(self._pid(CONTROL), self.kubeconfig)

    def deploy(self, progress: Progress = quiet) -> None:
        """Install podferry, as it is here and now, in the lab's Kubernetes, as `kubectl apply -k deploy/` does anywhere.

        `up` does it already in a lab with agents. Raises `Failed` where something of it does not get ready.
        """
        kubectl, tag = self.kubectl(), image.tag()
        reference = f"{image.NAME}:{tag}"
        if deploy.image(kubectl) != reference:
            archive = image.archive(progress, tag)
            progress("kubernetes: installing podferry")
            registry.push(self, archive, compress=False)
        deploy.apply(kubectl, reference)
        deploy.wait(kubectl)

    def cut(self, node: str) -> None:
        """Cut a node's link: packets vanish in both directions, and neither side is told."""
        self.node(node)
        network.set_cut(self._pid(SWITCH), node, cut=True)

    def mend(self, node: str) -> None:
        """Undo `cut`."""
        self.node(node)
        network.set_cut(self._pid(SWITCH), node, cut=False)

    def kill_node(self, node: str) -> None:
        """Kill everything in a node at once, as a power failure does. Its disk stays, memory and /run do not."""
        self.node(node)
        with state.locked(self._lock):
            cgroups.kill(self.name, node)
            cgroups.remove(self.name, node)

    def start_node(self, node: str, progress: Progress = quiet) -> Node:
        """Start a node again that was killed."""
        self.node(node)
        self.up(progress=progress)
        return self.node(node)

    # -- how -------------------------------------------------------------------------------------------------------

    def _settle(self, given: Mapping[str, Any]) -> LabSettings:
        """The lab's settings with those that are `given`, checked."""
        before = self._read_settings() if self.exists() else None
        settings = replace(before or LabSettings(), **given)
        network.bits_per_second(settings.link)
        if settings.debian not in SUITES:
            raise UsageError(
                f"nodes cannot be made of Debian {settings.debian!r}", remedy=f"take {' or '.join(SUITES)}"
            )
        names = state.node_names(settings.nodes)
        if CRIO in {runtime_of(name, settings.runtime) for name in names} and not settings.kubernetes:
            raise UsageError(
                "a lab without Kubernetes cannot have CRI-O",
                why="CRI-O makes a kubelet's pods alone",
                remedy="podferry lab up --kubernetes --runtime crio",
            )
        if before and settings.nodes < before.nodes:
            raise UsageError(f"lab {self.name} has {before.nodes} nodes already", remedy="take it down first")
        if before and replace(settings, nodes=before.nodes, link=before.link) != before:
            raise UsageError(
                f"lab {self.name} is up with other settings",
                why="only its nodes and its link can change while it is up",
                remedy="take it down first",
            )
        return settings

    def _start_missing(self, settings: LabSettings, image: Path, binds: Mapping[str, Path], progress: Progress) -> None:
        addresses = self._addresses(settings)
        switch = machine.first_process(self.name, SWITCH)
        if switch is None:
            switch = machine.start_switch(self.name)
        network.make_bridge(switch)
        self._issue_certificates(addresses)
        if settings.kubernetes:
            certificates.issue(self.home, addresses)

        major = root_images.containerd_of(image)

        def bring(name: str) -> None:
            home = self.home / "machines" / name
            # What is installed in a cluster adds to containerd's configuration; it is the node's own from then on.
            kept = {"containerd.toml"} if settings.kubernetes else set()
            changed = machine_config.write(
                machine_config.for_machine(self.name, name, addresses, major, runtime_on(name, settings)),
                home / "etc",
                keep=kept,
            )
            pid = machine.first_process(self.name, name)
            if pid is None:
                progress(f"{name}: starting")
                services, kind = services_of(name, settings), settings.cgroups
                pid = machine.start(machine.Machine(self.name, name, home, image, services, kind, binds))
            elif changed and "agent" in services_of(name, settings):
                self.exec(name, ["sv", "restart", "/run/service/agent"])
            network.connect(switch, network.Port(name, addresses[name], pid), settings.link)
            if settings.kubernetes:
                connect(name, pid, addresses)
            if name == STORAGE:
                for reference, archive in archives_of(settings).items():
                    self.exec(
                        name, registry.ensure(f"{_IMAGES}/{archive}.tar", reference), timeout=registry.PUSH_SECONDS
                    )
            elif name != CONTROL:
                self._wait_until_ready(name, settings, progress)

        # The switch and every machine are ours alone; they start at the same time.
        with ThreadPoolExecutor(max_workers=len(addresses)) as pool:
            list(pool.map(bring, addresses))
        if settings.kubernetes:
            progress("kubernetes: waiting until its nodes are ready")
            self.kubectl().wait_until_ready(state.node_names(settings.nodes))
            if settings.agent:
                self.deploy(progress)

    def _wait_until_ready(self, name: str, settings: LabSettings, progress: Progress) -> None:
        self.exec(name, ["sh", "-ec", _SHARE_READY], timeout=READY_SECONDS)
        logs = self.home / "machines" / name / "log" / "podferry"
        if runtime_on(name, settings) == CRIO:
            _wait_for_socket(self.root(name) / crio_package.SOCKET, f"{name}'s CRI-O", logs / "crio.log")
            progress(f"{name}: ready")
            return
        _wait_for_socket(self.root(name) / SNAPSHOTTER_SOCKET, f"{name}'s snapshotter", logs / "snapshotter.log")
        _wait_for_socket(self.root(name) / CONTAINERD_SOCKET, f"{name}'s containerd", logs / "containerd.log")
        self.exec(name, ["ctr", "--connect-timeout", f"{READY_SECONDS:.0f}s", "version"], timeout=READY_SECONDS)
        self.exec(name, ["sh", "-ec", _IMAGES_READY], timeout=READY_SECONDS)
        if "agent" in services_of(name, settings):
            _wait_for_socket(self.agent_socket(name), f"{name}'s agent", logs / "agent.log")
        progress(f"{name}: ready")

    def _binds(self, settings: LabSettings, image: Path, progress: Progress) -> dict[str, Path]:
        """What every machine is shown read-only, by the path it sees."""
        packages = site.site(image, progress)
        shown = {"/opt/podferry/site": packages, f"{_IMAGES}/job.tar": root_images.job_archive(progress)}
        if not settings.kubernetes and portable_criu.late_wanted(settings.debian):  # in a cluster, agents bring one
            shown[OWN_CRIU] = portable_criu.late_bundle(progress)
        if settings.kubernetes:
            shown[_KUBERNETES] = daemons.directory()
            shown[f"{_IMAGES}/pause.tar"] = root_images.pause_archive(progress)
        if CRIO in settings.runtime.split(","):
            shown[crio_package.IN_NODES] = crio_package.directory()
        return {**shown, **{inside: Path(source) for inside, source in settings.binds.items()}}

    def _issue_certificates(self, addresses: Mapping[str, str]) -> None:
        pki = self.home / "pki"
        authority = Authority.load(pki) if pki.exists() else Authority.create(pki, name=f"lab {self.name}")
        for name, address in addresses.items():
            into = self.home / "machines" / name / "etc" / "pki"
            if name != CONTROL and not (into / "node.crt").exists():
                authority.issue(machine_config.REGISTRY if name == STORAGE else name, [address], into)

    def _addresses(self, settings: LabSettings) -> dict[str, str]:
        return state.addresses(self.name, state.node_names(settings.nodes), control=settings.kubernetes)

    def _read_settings(self) -> LabSettings:
        try:
            return LabSettings(**json.loads(self._settings.read_text()))
        except FileNotFoundError as missing:
            raise UsageError(f"there is no lab {self.name}", remedy=f"podferry lab up --lab {self.name}") from missing
        except (ValueError, TypeError) as damaged:
            raise Failed.because(f"{self._settings} is damaged", damaged, remedy="take the lab down") from damaged

    def _pid(self, node: str) -> int:
        pid = machine.first_process(self.name, node)
        if pid is None:
            if node != SWITCH:
                self.node(node)
            raise Refused(f"{node} of lab {self.name} is not running", remedy=f"podferry lab start-node {node}")
        return pid


def list_labs() -> list[str]:
    """The names of all labs on this machine: on its disk, or among its processes."""
    on_disk = {path.name for path in state.LABS.iterdir() if path.is_dir()} if state.LABS.is_dir() else set()
    return sorted(on_disk | cgroups.labs())


def _wait_for_socket(path: Path, whose: str, log: Path) -> None:
    """Until somebody answers at a unix socket. Raises `TimedOut` with the end of the log."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(str(path)) == 0:
                return
        if time.monotonic() > deadline:
            raise TimedOut(f"{whose} does not answer", why=f"no process listens at {path}", evidence=last_lines(log))
        time.sleep(0.05)  # a socket's birth is no event that its future client could wait for
