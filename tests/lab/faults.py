"""Faults beneath the agents: a disk without room, a tmpfs without room, clocks that jump."""

from __future__ import annotations

from moving import NODES, Cluster

JOURNALS = "/var/lib/podferry/migrations"
PAGES = "/run/podferry"
PAGES_SIZE = "80%"
CLOCK = "/opt/podferry-clock"
SHIFTED = f"""
import datetime, time

def shift():
    try:
        with open("{CLOCK}/shift") as file:
            return float(file.read() or 0)
    except (OSError, ValueError):
        return 0.0

now, now_ns = time.time, time.time_ns
time.time = lambda: now() + shift()
time.time_ns = lambda: now_ns() + int(shift() * 1e9)

class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=shift())

datetime.datetime = Shifted
"""
"""The node's Python finds this as its sitecustomize: CLOCK_REALTIME has no namespace. OpenSSL's clock, by which certificates are
valid, does not jump."""

_MOUNT = """
mountpoint -q "$1" && exit
mkdir -p "$1" && cp -a "$1" /tmp/journals.test && mount -t tmpfs -o mode=700,size=64m journals "$1" &&
cp -a /tmp/journals.test/. "$1" && rm -r /tmp/journals.test
"""
_FULL = """mount -o remount,size=$(df -k --output=used "$1" | tail -n 1 | tr -d ' ')k "$1" """


def prepare(cluster: Cluster) -> None:
    """Give journals a file system of their own, and agents a clock that `jump` moves. They start anew."""
    for node in NODES:
        lab, root = cluster.lab, cluster.root(node)
        lab.exec(node, ["sh", "-c", _MOUNT, "sh", JOURNALS])
        lab.exec(node, ["mkdir", "-p", CLOCK])
        (root / f"{CLOCK}/sitecustomize.py".lstrip("/")).write_text(SHIFTED)
        run = root / "run/service/agent/run"
        text = run.read_text()
        if CLOCK not in text:
            run.write_text(text.replace("PYTHONPATH=", f"PYTHONPATH={CLOCK}:", 1))
        cluster.kill(node, "agent")


def clear_away(cluster: Cluster) -> None:
    """The agents' journals and clocks are the nodes' own again."""
    for node in NODES:
        run = cluster.root(node) / "run/service/agent/run"
        run.write_text(run.read_text().replace(f"{CLOCK}:", ""))
        cluster.lab.exec(node, ["umount", "--lazy", JOURNALS])
        cluster.lab.exec(node, ["rm", "-r", CLOCK])
        cluster.kill(node, "agent")


def fill_up(cluster: Cluster, node: str, where: str) -> None:
    """Not one page more fits."""
    cluster.lab.exec(node, ["sh", "-c", _FULL, "sh", where])


def make_room(cluster: Cluster, node: str, where: str) -> None:
    """There is room again."""
    size = {JOURNALS: "64m", PAGES: PAGES_SIZE}[where]
    cluster.lab.exec(node, ["mount", "-o", f"remount,size={size}", where])


def jump(cluster: Cluster, **seconds: float) -> None:
    """The clocks of `node_a` and `node_b` jump so far from what they would be."""
    for node, shift in seconds.items():
        (cluster.root(node.replace("_", "-")) / f"{CLOCK}/shift".lstrip("/")).write_text(str(shift))
