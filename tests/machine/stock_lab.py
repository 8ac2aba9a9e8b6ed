"""Labs on a whole stock machine, for the tests beside this file: all of it is done through the machine's shell.

What happens in a node is asked for by nsenter, without podferry: it is seen from outside, and emulated, each `podferry` takes
seconds.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from emulated import Lacking
from stock import MEMORY, USER, Stock, booted, built, caches
from warm_podferry import SOCKET

from podferry.lab.debian import OF_NODES
from podferry.lab.root_images import JOB_IMAGE

CHECKOUT = Path(__file__).parents[2]
AT = f"/home/{USER}/podferry"
STATE = "/var/lib/podferry"
LAYERS = f"{STATE}/labs/default/machines/storage/brick/images/layers"
SERVER = f"{AT}/tests/machine/warm_podferry.py"
SETTINGS = "/root/podferry.environment"
PATIENCE = 900.0
"""Seconds for whatever a busy machine does in some, emulated. No test measures time."""

PATIENTLY = ("--max-freeze", "300")
"""Emulated and busy, a machine takes longer over a dump than a job should stand still elsewhere."""

JOB = """
import itertools, time
data = bytearray(b"x") * (16 << 20)
for n in itertools.count():
    data[n * 4096 % len(data)] = n % 256
    print(n, sum(data[at * 4096] for at in range(n + 1)) if n < 256 else "", flush=True)
    time.sleep(0.2)
"""
PYTHON = ["python3", "-uc", JOB]
# containerd's default for ctr, and so what a container has that is told nothing.
CAPABILITIES = (
    "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW "
    "SETFCAP SETGID SETPCAP SETUID SYS_CHROOT"
)
RESTRICTED = [
    "--user=1000:1000",
    "--read-only",
    "--seccomp",
    *(f"--cap-drop=CAP_{one}" for one in CAPABILITIES.split()),
]
"""What most pods are: runAsNonRoot, all capabilities dropped, the default seccomp profile, a root that nobody writes to."""
PROFILE = "cri-containerd.apparmor.d"
CONFINED = f"--apparmor-profile={PROFILE}"
"""And on Debian and Ubuntu, what AppArmor holds it with. `load_profile` first."""
RIGHTS = [
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "profile",
]


def sums(count: int) -> list[str]:
    """What `JOB` prints first: its memory is what it was."""
    return [f"{n} {sum(range(n + 1)) if n < 256 else ''}" for n in range(count)]


@dataclass
class StockLab:
    """A lab with two nodes on a stock machine, and what its jobs have said so far."""

    machine: Stock
    program: str = "podferry"
    nodes: dict[str, int] = field(default_factory=dict)

    def podferry(self, *argv: str) -> str:
        """What a command prints."""
        return self.machine.run(f"{self.program} {shlex.join(argv)}", timeout=PATIENCE).stdout

    def up(self) -> None:
        """By a service of systemd's: what comes up outlives it."""
        said = self.machine.run("systemd-run --quiet --wait --pipe podferry lab up", timeout=PATIENCE).stdout
        self.nodes = {name: int(pid) for name, pid in re.findall(r"^(node-[ab]) .* up.* (\d+)$", said, re.MULTILINE)}
        assert sorted(self.nodes) == ["node-a", "node-b"], said

    def in_node(self, node: str, script: str) -> str:
        """What a shell script prints that runs in a node, found by the node's first process."""
        enter = f"nsenter --target {self.nodes[node]} --all env --ignore-environment PATH=$PATH"
        return self.machine.run(f"{enter} sh -euc {shlex.quote(script)}", timeout=PATIENCE).stdout

    def start(
        self, name: str, options: Sequence[str] = (), *, image: str = JOB_IMAGE, argv: Sequence[str] = PYTHON
    ) -> None:
        """A job on node-a: by `podferry lab run`, or by ctr with what that has no options for. Its image is on the share, then."""
        if not options:
            self.podferry("lab", "run", "--node=node-a", f"--name={name}", "--", *argv)
        else:
            ctr = ["ctr", "run", "--detach", "--snapshotter=podferry", "--runc-binary=/usr/local/sbin/podferry-runc"]
            ctr += ["--cpu-shares=0", f"--log-uri=file:///var/log/podferry/containers/{name}.log", *options]
            self.in_node("node-a", shlex.join([*ctr, image, name, *argv]))
        self.wait_for_layers(1)

    def fetch(self, image: str, layers: int = 1) -> None:
        """Have node-a pull an image, which `ctr run` does not, and put so many layers on the share."""
        name = re.sub(r"\W+", "-", Path(image).name)
        self.podferry("lab", "run", "--node=node-a", f"--name={name}", f"--image={image}", "--", "true")
        self.podferry("lab", "stop", name)
        self.wait_for_layers(layers)

    def wait_for_layers(self, count: int) -> None:
        """Until so many layers of images are on the share."""
        wait_until("layers are on the share", lambda: len(self.machine.run(f"ls {LAYERS}").stdout.split()) >= count)

    def said(self, name: str, expected: Callable[[int], list[str]]) -> int:
        """How many lines the job has printed: what it should, none lost and none said twice."""
        lines = self.podferry("lab", "logs", name).splitlines()
        assert lines == expected(len(lines))
        return len(lines)

    def wait_for_more(self, name: str, expected: Callable[[int], list[str]]) -> None:
        """Until the job has printed more than now."""
        before = self.said(name, expected)
        wait_until(f"{name} prints", lambda: self.said(name, expected) > before)

    def move(self, name: str, to: str) -> dict[str, Any]:
        """Move the job; the record of a completed migration."""
        said = self.podferry("migrate", name, "--to", to, *PATIENTLY, "--json")
        record: dict[str, Any] = json.loads(said.splitlines()[-1])
        assert record["outcome"] == "completed", record
        return record

    def rights(self, node: str, name: str) -> dict[str, str]:
        """What the kernel says of the rights of the job's first process."""
        pid = self.in_node(node, f"ctr task list | awk '$1 == \"{name}\" {{ print $2 }}'").strip()
        script = f"cat /proc/{pid}/status; echo profile: $(cat /proc/{pid}/attr/current)"
        said = self.in_node(node, script)
        found = {key: value.strip() for key, _, value in (line.partition(":") for line in said.splitlines())}
        return {key: found[key] for key in RIGHTS}

    def goes_there_and_back(self, name: str, expected: Callable[[int], list[str]] = sums, *, times: int = 1) -> None:
        """The job on node-a moves to node-b and back; nothing of it is lost, and it has the rights that it had."""
        had = self.rights("node-a", name)
        for _ in range(times):
            self.move(name, "node-b")
            there = self.rights("node-b", name)
            self.move(name, "node-a")
            assert there == self.rights("node-a", name) == had
        self.wait_for_more(name, expected)


@contextlib.contextmanager
def stock_machine(suite: str, memory: str = MEMORY) -> Iterator[Stock]:
    """A stock machine, booted; the test is skipped where there cannot be one."""
    try:
        built(suite)
    except Lacking as lacking:
        pytest.skip(f"no stock machine: {lacking}")
    with booted(suite, memory=memory) as machine:
        yield machine


def provide(machine: Stock) -> None:
    """Put the checkout on a machine with a `podferry` that needs nothing downloaded: the packages of this machine's labs."""
    machine.check_out(CHECKOUT, AT)
    [site] = machine.run(f"ls -d {STATE}/cache/site*").stdout.split()
    assert caches().exists()
    settings = f"export PYTHONPATH={AT}/src:{site} PODFERRY_DEBIAN={OF_NODES}"
    program = f"""#!/bin/sh
. {SETTINGS}
exec python3 -c 'import sys; from podferry.cli import main; sys.exit(main())' "$@"
"""
    machine.run(f"echo {shlex.quote(settings)} > {SETTINGS}")
    machine.run(f"echo {shlex.quote(program)} > /usr/local/bin/podferry; chmod 755 /usr/local/bin/podferry")


def warm(machine: Stock) -> str:
    """Have a `podferry` on a machine that was provided with it that is imported already; returns what it is called by."""
    begin = f". {SETTINGS}; exec python3 {SERVER} serve"
    machine.run(f"systemd-run --quiet --unit=warm-podferry sh -c {shlex.quote(begin)}")
    wait_until("podferry is imported", lambda: not machine.run(f"[ -S {SOCKET} ]", check=False).returncode)
    return f"python3 -SI {SERVER}"


def load_profile(machine: Stock) -> None:
    """Have AppArmor know containerd's default profile, as it does where a kubelet has started a pod."""
    text = Path(__file__).with_name(PROFILE).read_text()
    machine.run(f"printf %s {shlex.quote(text)} | apparmor_parser --skip-cache --replace")


def wait_until(what: str, true: Callable[[], object]) -> None:
    """Wait for long; a machine that is emulated and busy is no failure."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(1.0)


def traces(machine: Stock) -> dict[str, set[str]]:
    """What a lab could leave behind on a machine."""
    asked = {
        "mounts": "findmnt -rno TARGET | grep -v ^/run/user/",  # systemd's, for as long as a user has a session
        "interfaces": "ls /sys/class/net",
        "cgroups": "cd /sys/fs/cgroup; ls -d podferry* 2> /dev/null || :",
        "passed on": "cat /sys/fs/cgroup/cgroup.subtree_control",
        "settings": "sysctl fs.pipe-max-size | tr -d ' '",
        "labs": f"ls {STATE}/labs 2> /dev/null || :",
        "processes": "ps -e -o comm= | grep -E '^(containerd|runsv|gluster|tini)' || :",
    }
    said = machine.run("\n".join(f"echo '# {what}'; ({how})" for what, how in asked.items())).stdout
    parts = [part.partition("\n") for part in said.split("# ")[1:]]
    return {what: set(lines.split()) for what, _, lines in parts}
