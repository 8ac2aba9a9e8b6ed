"""The files that a machine finds in /etc/podferry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from podferry.lab.debian import architecture
from podferry.lab.kubernetes import component_config as kubernetes_files
from podferry.lab.kubernetes import crio_package
from podferry.lab.root_images import PAUSE_IMAGE
from podferry.lab.state import CONTAINERD, CONTROL, CRIO, STORAGE

AGENT_PORT = 7460
BRICK_PORT = 24007
REGISTRY = "podferry.local"
"""The name of the registry on the storage node, which also stands in for every other registry."""

SHARE = "/share"
"""Where every node has the remote file system."""

IMAGES_SHARE = f"{SHARE}/images"
"""Where image layers are on it."""

METRICS_PORT = 7461
"""Where a node's snapshotter serves its metrics, on 127.0.0.1."""

SNAPSHOTTER = "podferry"
"""containerd's name for podferry-snapshotter, which keeps image layers on the share."""

Files = Mapping[str, str]


def for_machine(
    lab: str, name: str, addresses: Mapping[str, str], major: int = 1, runtime: str = CONTAINERD
) -> dict[str, str]:
    """File names and contents for the machine `name` of a lab whose machines have `addresses`, and containerd `major` or, as
    `runtime` of a node, CRI-O.

    Kubernetes is there where one of them is its control plane.
    """
    files = {
        "hostname": f"{name}\n",
        "hosts": "127.0.0.1 localhost\n"
        + f"{addresses[STORAGE]} {REGISTRY}\n"
        + "".join(f"{address} {host}\n" for host, address in addresses.items()),
        "machine-id": hashlib.sha256(f"{lab}/{name}".encode()).hexdigest()[:32] + "\n",
    }
    if name == STORAGE:
        return {**files, "brick.vol": _brick(), "registry.yml": _REGISTRY}
    if name == CONTROL:
        return {**files, **kubernetes_files.for_control(addresses)}
    files |= {"share.vol": _client(addresses[STORAGE]), "registry-hosts.toml": _registry_hosts()}
    if CONTROL in addresses:
        if runtime == CRIO:
            own = kubernetes_files.for_node(name, addresses, f"/{crio_package.SOCKET}")
            return {**files, **own, "crio.conf": crio_package.config()}
        own = kubernetes_files.for_node(name, addresses)
        return {**files, **own, "containerd.toml": containerd(major, kubernetes=True)}
    return {**files, "containerd.toml": containerd(major), "agent.json": agent(name, addresses)}


def write(files: Files, directory: Path, *, keep: Collection[str] = ()) -> bool:
    """Write the files; true if any of them is new or other than before. Those to `keep` are only made where missing."""
    directory.mkdir(parents=True, exist_ok=True)
    changed = False
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or (name not in keep and path.read_text() != text):
            path.write_text(text)
            changed = True
    return changed


def agent(name: str, addresses: Mapping[str, str]) -> str:
    """The agent's configuration (`podferry.workload.config`)."""
    peers = {host: f"{address}:{AGENT_PORT}" for host, address in addresses.items() if host not in (name, STORAGE)}
    return json.dumps(
        {
            "node": name,
            "listen": f"{addresses[name]}:{AGENT_PORT}",
            "certificates": "/etc/podferry/pki",
            "peers": peers,
            "state": "/var/lib/podferry",
            "run": "/run/podferry",
            "containerd": "/run/containerd/containerd.sock",
            "namespace": "default",
        },
        indent=2,
    )


def containerd(major: int, *, kubernetes: bool = False) -> str:
    """containerd's configuration: format 2 for containerd 1, format 3 for containerd 2, which split the CRI plugin.

    Layers are shared. For Kubernetes it is otherwise what a cluster's own installer leaves: pods have a network, and
    nothing is said of podferry's runtime.
    """
    cri = "io.containerd.grpc.v1.cri" if major < 2 else "io.containerd.cri.v1.runtime"
    kinds = ("aufs", "btrfs", "devmapper", "zfs")
    unused = ", ".join(f'"io.containerd.snapshotter.v1.{kind}"' for kind in kinds)
    sections = [
        f"version = {2 if major < 2 else 3}\ndisabled_plugins = [{unused}]",
        f'[plugins."{cri}"]\n  restrict_oom_score_adj = true\n  disable_apparmor = true',
        _runtime(cri, "runc"),
        *_pulling(cri, major),
    ]
    if not kubernetes:
        sections.append(_runtime(cri, "podferry", BinaryName="/usr/local/sbin/podferry-runc"))
    elif major < 2:
        sections[1] += f'\n  sandbox_image = "{PAUSE_IMAGE}"'
    else:
        sections.append(f'[plugins."io.containerd.cri.v1.images".pinned_images]\n  sandbox = "{PAUSE_IMAGE}"')
    if kubernetes:
        network = f'  bin_dir = "/usr/lib/cni"\n  conf_dir = "{kubernetes_files.CNI}"'
        sections.append(f'[plugins."{cri}".cni]\n{network}')
    return "\n\n".join(sections) + "\n"


def _pulling(cri: str, major: int) -> list[str]:
    """Images come from the lab's registry, and their layers from the share."""
    images = f'plugins."{cri}".containerd' if major < 2 else 'plugins."io.containerd.cri.v1.images"'
    registry = f'plugins."{cri}".registry' if major < 2 else 'plugins."io.containerd.cri.v1.images".registry'
    unpack = '[[plugins."io.containerd.transfer.v1.local".unpack_config]]'
    return [
        f'[proxy_plugins.{SNAPSHOTTER}]\n  type = "snapshot"\n  address = "/run/podferry/snapshotter.sock"',
        f'[{images}]\n  snapshotter = "{SNAPSHOTTER}"',
        f'[{registry}]\n  config_path = "/etc/containerd/certs.d"',
        *(
            f'{unpack}\n  platform = "linux/{architecture()}"\n  snapshotter = "{one}"'
            for one in (SNAPSHOTTER, "overlayfs")
        ),
    ]


def _runtime(cri: str, name: str, **options: str) -> str:
    table = f'plugins."{cri}".containerd.runtimes.{name}'
    given = "".join(f'\n  {key} = "{value}"' for key, value in options.items())
    return f'[{table}]\n  runtime_type = "io.containerd.runc.v2"\n[{table}.options]\n  SystemdCgroup = false{given}'


def _registry_hosts() -> str:
    """Whatever registry is asked for, the lab's answers. containerd 1.7 does not take `server` alone."""
    url = f"https://{REGISTRY}"
    return f'server = "{url}"\n\n[host."{url}"]\n  capabilities = ["pull", "resolve"]\n'


_REGISTRY = """\
version: 0.1
log:
  level: info
  formatter: json
storage:
  filesystem:
    rootdirectory: /srv/registry
http:
  addr: :443
  tls:
    certificate: /etc/podferry/pki/node.crt
    key: /etc/podferry/pki/node.key
"""


# GlusterFS with volume files of our own: what glusterd would generate for one brick, without waiting for glusterd.
def _brick() -> str:
    return f"""\
volume files
  type storage/posix
  option directory /srv/brick
end-volume
volume locks
  type features/locks
  subvolumes files
end-volume
volume share
  type performance/io-threads
  subvolumes locks
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.listen-port {BRICK_PORT}
  option auth.addr.share.allow *
  subvolumes share
end-volume
"""


def _client(address: str) -> str:
    return f"""\
volume remote
  type protocol/client
  option transport-type tcp
  option remote-host {address}
  option remote-port {BRICK_PORT}
  option remote-subvolume share
end-volume
volume share
  type performance/write-behind
  subvolumes remote
end-volume
"""
