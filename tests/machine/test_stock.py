"""What the README promises, on a whole stock machine: everything is done through its shell and checked from outside.

The machine that tests usually run on is no such machine: no systemd, no controllers of cgroup v2, not all capabilities.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated import Lacking
from stock import USER, Stock, booted, built

from podferry.lab.debian import NEXT_SUITE, SUITE

# What make test has of a stock machine is in test_stock_lab.py.
pytestmark = [pytest.mark.machine, pytest.mark.slow]
CHECKOUT = Path(__file__).parents[2]
AT = f"/home/{USER}/podferry"
SUITES = [SUITE, "bookworm", NEXT_SUITE]
DEMO = "--memory 64 --steps 900"

JOB = """
import itertools, time
data = bytearray(b"x") * (32 << 20)
for n in itertools.count():
    data[n * 4096 % len(data)] = n % 256
    print(n, sum(data[at * 4096] for at in range(n + 1)) if n < 256 else "", flush=True)
    time.sleep(0.2)
"""
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


@pytest.fixture(scope="module", params=SUITES)
def machine(request: pytest.FixtureRequest) -> Iterator[Stock]:
    """A stock machine with the checkout of the moment, and whatever a user has done on it so far."""
    try:
        built(request.param)
    except Lacking as lacking:
        pytest.skip(f"no stock machine: {lacking}")
    with booted(request.param) as stock:
        stock.environment = stock.configure_clients()
        stock.check_out(CHECKOUT, AT)
        yield stock


@pytest.fixture(scope="module")
def lab(machine: Stock) -> Stock:
    """The machine with a lab, brought up by a systemd service: its processes outlive it."""
    machine.run(f"[ -x {AT}/.venv/bin/podferry ] || make -C {AT} setup", timeout=1200.0)
    up = f"systemd-run --quiet --wait --pipe --setenv=PATH=$PATH {AT}/.venv/bin/podferry lab up"
    said = machine.run(up, timeout=900.0)
    assert "node-b: ready" in said.stdout + said.stderr
    return machine


def podferry(machine: Stock, *argv: str, timeout: float = 600.0) -> str:
    return machine.run(f"{AT}/.venv/bin/podferry {shlex.join(argv)}", timeout=timeout).stdout


def in_node(machine: Stock, node: str, script: str) -> str:
    return podferry(machine, "lab", "exec", node, "--", "sh", "-euc", script)


def cgroups(machine: Stock) -> tuple[set[str], set[str]]:
    """What the top cgroup passes on beyond what systemd might, and the cgroups in it that are ours."""
    passed_on = machine.run("cat /sys/fs/cgroup/cgroup.subtree_control").stdout.split()
    names = machine.run("ls /sys/fs/cgroup").stdout.split()
    return set(passed_on) - {"cpu", "memory", "pids", "io"}, {name for name in names if name.startswith("podferry")}


def start(machine: Stock, name: str, options: list[str]) -> None:
    """A job on node-a: by `podferry lab run`, or by ctr with what that has no options for."""
    if not options:
        podferry(machine, "lab", "run", "--node=node-a", f"--name={name}", "--", "python3", "-uc", JOB)
        return
    podferry(machine, "lab", "run", "--node=node-a", "--name=first", "--", "true")  # the image is there, then
    podferry(machine, "lab", "stop", "first")
    image = in_node(machine, "node-a", "ctr images list -q").split()[0]
    ctr = ["ctr", "run", "--detach", "--snapshotter=podferry", "--runc-binary=/usr/local/sbin/podferry-runc"]
    ctr += ["--cpu-shares=0", f"--log-uri=file:///var/log/podferry/containers/{name}.log", *options]
    podferry(machine, "lab", "exec", "node-a", "--", *ctr, image, name, "python3", "-uc", JOB)


def counted(machine: Stock, name: str) -> int:
    """How far the job has come; nothing of its output is lost or said twice, and its memory is what it was."""
    lines = podferry(machine, "lab", "logs", name).splitlines()
    assert lines == [f"{n} {sum(range(n + 1)) if n < 256 else ''}" for n in range(len(lines))]
    return len(lines)


def move(machine: Stock, name: str, to: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(
        podferry(machine, "migrate", name, "--to", to, "--max-freeze", "300", "--json").splitlines()[-1]
    )
    assert record["outcome"] == "completed", record
    return record


def there_and_back(machine: Stock, name: str, times: int) -> None:
    for _ in range(times):
        for node in ("node-b", "node-a"):
            before = counted(machine, name)
            move(machine, name, node)
            machine.run("sleep 2")
            assert counted(machine, name) > before


def status(machine: Stock, node: str) -> dict[str, str]:
    """The kernel's word on the job's process."""
    said = in_node(machine, node, "cat /proc/$(pgrep -f '^python3 -uc' | head -1)/status")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in said.splitlines())}


def test_the_first_command_of_the_readme(machine: Stock) -> None:
    """By a user who may become root, in their own session (user.slice)."""
    done = machine.run(f"cd {AT} && sudo -E make demo DEMO={shlex.quote(DEMO)}", user=USER, timeout=2400.0, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert "equal" in said
    assert "different" not in said
    assert cgroups(machine) == (set(), set())


def test_a_job_of_another_user_without_capabilities_goes_there_and_back(lab: Stock) -> None:
    start(lab, "restricted", RESTRICTED)
    before = status(lab, "node-a")
    assert (before["Uid"].split()[0], int(before["CapPrm"], 16), before["Seccomp"]) == ("1000", 0, "2")
    there_and_back(lab, "restricted", 1)
    after = status(lab, "node-a")
    for same in (
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
    ):
        assert after[same] == before[same], same


def test_a_job_of_another_user_goes_there_and_back_ten_times(lab: Stock) -> None:
    start(lab, "often", RESTRICTED)
    there_and_back(lab, "often", 10)
    podferry(lab, "lab", "stop", "often")


def test_a_job_without_a_cpu_controller_moves_and_check_says_so(lab: Stock) -> None:
    start(lab, "job", [])
    assert not json.loads(podferry(lab, "check", "job", "--to", "node-b", "--json"))["warnings"]
    in_node(lab, "node-a", "echo -cpu > /sys/fs/cgroup/default/cgroup.subtree_control")
    [told] = json.loads(podferry(lab, "check", "job", "--to", "node-b", "--json"))["warnings"]
    assert "no cpu controller" in told
    there_and_back(lab, "job", 1)


def test_nothing_is_left_of_the_lab(lab: Stock) -> None:
    podferry(lab, "lab", "down")
    assert cgroups(lab) == (set(), set())
    assert lab.run("ps -e -o args= | grep -E '[c]ontainerd|[p]odferry' || true").stdout == ""


def test_in_a_container_its_processes_make_room(machine: Stock) -> None:
    """A cgroup namespace of its own, as containers have: the lab is in its cgroup, which had processes and passed on nothing."""
    script = f"""
        umount -R /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        mkdir -p /var/lib/inner/cache
        mount --bind /var/lib/podferry/cache /var/lib/inner/cache
        export PODFERRY_STATE=/var/lib/inner
        {AT}/.venv/bin/podferry lab up --lab inner --nodes 1
        {AT}/.venv/bin/podferry lab exec --lab inner node-a -- cat /sys/fs/cgroup/cgroup.controllers
        {AT}/.venv/bin/podferry lab exec --lab inner node-a -- ls /sys/fs/cgroup
        {AT}/.venv/bin/podferry lab down --lab inner
        [ -s /sys/fs/cgroup/cgroup.procs ] && [ ! -s /sys/fs/cgroup/cgroup.subtree_control ] && echo as before
    """
    container = (
        f"systemd-run --quiet --wait --pipe -p Delegate=yes unshare --cgroup --mount sh -euxc {shlex.quote(script)}"
    )
    done = machine.run(container, timeout=900.0)
    assert done.stdout.endswith("as before\n")
    assert {"cpu", "memory", "pids"} <= set(done.stdout.split()), done.stdout + done.stderr
    assert "moving its processes to podferry-others" in done.stderr
