"""A lab that is up: its nodes, its links, its share, and what comes back by itself."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable

import pytest

from podferry.errors import CommandFailed, PodferryError, Refused, UsageError
from podferry.lab import Lab, cgroups, containers, network, root_images
from podferry.lab.progress import quiet
from podferry.lab.state import SWITCH
from podferry.node.process import run

pytestmark = pytest.mark.lab
PATIENCE = 30.0
MEBIBYTE = 1 << 20


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what happens elsewhere and tells nobody; half a minute is more than it ever takes."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"never: {holds}"
        time.sleep(0.05)


def succeeds(lab: Lab, node: str, *argv: str) -> bool:
    try:
        return lab.exec(node, argv, check=False, timeout=PATIENCE).returncode == 0
    except PodferryError:
        return False


def pid_of(lab: Lab, machine: str, command: str) -> int | None:
    """A process of a machine by its name, as this machine counts."""
    for one in cgroups.processes(lab.name, machine):
        try:
            if os.path.basename(os.readlink(f"/proc/{one.pid}/exe")) == command:  # noqa: PTH115, PTH119 - in its root
                return one.pid
        except OSError:
            continue
    return None


def shaper(pid: int, interface: str) -> dict[str, object]:
    """The queueing discipline at one end of a link, with its counters."""
    argv = ["nsenter", f"--target={pid}", "--net", "tc", "-json", "-statistics", "qdisc", "show", "dev", interface]
    shown = json.loads(run(argv).stdout)
    assert isinstance(shown[0], dict)
    return shown[0]


def sent(pid: int, interface: str) -> int:
    return int(str(shaper(pid, interface)["bytes"]))


def switch_of(lab: Lab) -> int:
    return next(one.pid for one in cgroups.processes(lab.name, SWITCH) if one.first)


def test_up_again_changes_nothing(lab: Lab) -> None:
    before = lab.status()
    services = [pid_of(lab, node.name, "containerd") for node in before.nodes]
    assert lab.up() == before
    assert [pid_of(lab, node.name, "containerd") for node in before.nodes] == services
    assert all(node.alive for node in (before.storage, *before.nodes))


def test_a_lab_does_not_shrink(lab: Lab) -> None:
    with pytest.raises(UsageError, match="has 2 nodes already"):
        lab.up(1)


def test_what_nodes_were_made_with_stays(lab: Lab) -> None:
    before = lab.status()
    with pytest.raises(UsageError, match="other settings"):
        lab.up(agent=False)
    assert lab.status() == before


def test_every_node_has_its_own_namespaces_root_and_name(lab: Lab) -> None:
    nodes = [node for node in (lab.status().storage, *lab.status().nodes) if node.pid]
    for kind in ("mnt", "pid", "net", "uts", "ipc", "cgroup"):
        kinds = {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in ("self", *(node.pid for node in nodes))}  # noqa: PTH115
        assert len(kinds) == len(nodes) + 1
    for node in nodes:
        assert lab.exec(node.name, ["hostname"]).stdout.strip() == node.name
        assert lab.exec(node.name, ["ls", "-A", "/old"], check=False).returncode, "the host's root is still there"
    lab.exec("node-a", ["touch", "/only-here"])
    assert succeeds(lab, "node-a", "test", "-e", "/only-here")
    assert not succeeds(lab, "node-b", "test", "-e", "/only-here")


def test_exec_runs_inside_and_reports_what_failed(lab: Lab) -> None:
    done = lab.exec("node-a", ["sh", "-c", "pwd; cat; echo $X"], input="in\n", env={"X": "from outside"}, cwd="/tmp")
    assert done.stdout == "/tmp\nin\nfrom outside\n"
    joined = lab.exec("node-a", ["cat", "/proc/self/cgroup"]).stdout
    assert joined == lab.exec("node-a", ["cat", "/proc/1/cgroup"]).stdout
    with pytest.raises(CommandFailed) as failed:
        lab.exec("node-a", ["sh", "-c", "echo why >&2; exit 3"])
    assert failed.value.returncode == 3
    assert failed.value.evidence == ["why"]
    with pytest.raises(UsageError, match="no node 'node-z'"):
        lab.exec("node-z", ["true"])


def test_the_share_is_one_file_system_on_every_node(lab: Lab) -> None:
    lab.exec(
        "node-a",
        ["sh", "-c", "mkdir -p /share/d && echo text > /share/d/file && setfattr -n user.k -v v /share/d/file"],
    )
    assert lab.exec("node-b", ["cat", "/share/d/file"]).stdout == "text\n"
    assert "user.k" in lab.exec("node-b", ["getfattr", "-d", "/share/d/file"]).stdout
    lab.exec("node-b", ["rm", "-r", "/share/d"])
    eventually(lambda: not succeeds(lab, "node-a", "test", "-e", "/share/d"))
    for node in ("node-a", "node-b"):
        assert lab.exec(node, ["stat", "-f", "-c", "%T", "/share"]).stdout.strip() == "fuse"


def test_links_have_their_rate_in_both_directions(lab: Lab) -> None:
    switch = switch_of(lab)
    node = lab.node("node-a")
    assert node.pid is not None
    for pid, interface in ((switch, "node-a"), (node.pid, "eth0")):
        qdisc = shaper(pid, interface)
        assert qdisc["kind"] == "tbf"
        assert qdisc["options"]["rate"] * 8 == network.bits_per_second("1gbit")  # type: ignore[index]
        before = sent(pid, interface)
        lab.exec("node-a", ["ping", "-q", "-c", "100", "-i", "0.002", "-s", "8000", "node-b"])
        assert sent(pid, interface) - before > 100 * 8000


def test_the_slower_of_two_rates_is_slower(own_lab: Lab) -> None:
    """Only that the rate is honoured: a tenth of the rate takes more than three times as long, in each direction."""
    taken: dict[str, list[float]] = {}
    for rate in ("20mbit", "200mbit"):
        own_lab.up(1, rate, agent=False)
        taken[rate] = []
        for direction in (
            ["if=/dev/zero", "of=/share/bulk", "conv=fsync"],
            ["if=/share/bulk", "of=/dev/null", "iflag=direct"],
        ):
            begun = time.monotonic()
            own_lab.exec("node-a", ["dd", "bs=1M", "count=8", *direction])
            taken[rate].append(time.monotonic() - begun)
    for slow, fast in zip(taken["20mbit"], taken["200mbit"], strict=True):
        assert slow > 3 * fast


def test_a_link_without_a_rate_in_a_lab_brought_up_by_who_ignores_interrupts(own_lab: Lab) -> None:
    """As a shell's background job does; the lab's containers must not inherit it."""
    heard = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGQUIT)}
    try:
        status = own_lab.up(1, "none", agent=False)
    finally:
        for one, handler in heard.items():
            signal.signal(one, handler)
    assert status.link == "none"
    assert shaper(switch_of(own_lab), "node-a")["kind"] == "noqueue"
    first = own_lab.exec("node-a", ["cat", "/proc/1/status"]).stdout
    assert not int(first.partition("SigIgn:")[2].split()[0], 16) & 0b110


def test_a_cut_link_lets_nothing_pass_until_it_is_mended(lab: Lab) -> None:
    ping = ("ping", "-q", "-c", "1", "-W", "1")
    assert succeeds(lab, "node-a", *ping, "node-b")
    lab.cut("node-b")
    try:
        assert lab.node("node-b").cut
        assert not lab.node("node-a").cut
        assert not succeeds(lab, "node-a", *ping, "node-b")
        assert not succeeds(lab, "node-b", *ping, "node-a")
        assert succeeds(lab, "node-a", *ping, "storage")
    finally:
        lab.mend("node-b")
    eventually(lambda: succeeds(lab, "node-a", *ping, "node-b"))
    assert not lab.node("node-b").cut


@pytest.mark.parametrize(
    ("node", "program", "works"),
    [
        ("node-a", "containerd", ("ctr", "version")),
        ("node-a", "glusterfsd", ("ls", "/share")),
        ("storage", "glusterfsd", ("true",)),
    ],
)
def test_services_come_back_when_they_are_killed(lab: Lab, node: str, program: str, works: tuple[str, ...]) -> None:
    before = pid_of(lab, node, program)
    assert before is not None
    os.kill(before, signal.SIGKILL)
    eventually(lambda: pid_of(lab, node, program) not in (None, before))
    eventually(lambda: succeeds(lab, node, *works))
    for client in ("node-a", "node-b"):
        eventually(lambda client=client: succeeds(lab, client, "touch", "/share/after"))  # type: ignore[misc]


def test_orphans_are_reaped(lab: Lab) -> None:
    lab.exec("node-a", ["sh", "-c", "(sleep 0.1 &)"])

    def no_zombies() -> bool:
        table = lab.exec("node-a", ["ps", "-A", "-o", "ppid=,stat="]).stdout.split("\n")
        return not any(line.split()[0] == "1" and line.split()[1].startswith("Z") for line in table if line)

    eventually(no_zombies)


def test_a_killed_node_comes_back_with_its_disk(own_lab: Lab) -> None:
    own_lab.up(2, agent=False)
    own_lab.exec(
        "node-b", ["sh", "-c", "echo kept > /var/lib/podferry/disk; echo kept > /root/file; echo lost > /run/file"]
    )
    own_lab.kill_node("node-b")
    assert not own_lab.node("node-b").alive
    assert own_lab.node("node-a").alive
    with pytest.raises(Refused, match=r"node-b of lab .* is not running"):
        own_lab.exec("node-b", ["true"])

    assert own_lab.start_node("node-b").alive
    assert own_lab.exec("node-b", ["cat", "/var/lib/podferry/disk", "/root/file"]).stdout == "kept\nkept\n"
    assert not succeeds(own_lab, "node-b", "test", "-e", "/run/file")
    assert succeeds(own_lab, "node-b", "ping", "-q", "-c", "1", "-W", "2", "node-a")
    assert succeeds(own_lab, "node-b", "ls", "/share")


def test_a_dead_switch_is_replaced_and_everybody_reconnected(own_lab: Lab) -> None:
    own_lab.up(2, agent=False)
    cgroups.kill(own_lab.name, SWITCH)
    assert not succeeds(own_lab, "node-a", "ping", "-q", "-c", "1", "-W", "1", "node-b")
    own_lab.up()
    assert succeeds(own_lab, "node-a", "ping", "-q", "-c", "1", "-W", "2", "node-b")


def test_a_lab_can_grow_and_its_nodes_learn_of_it(own_lab: Lab) -> None:
    first = own_lab.up(1, agent=False)
    grown = own_lab.up(2)
    assert grown.nodes[0] == first.nodes[0]
    known = json.loads(own_lab.exec("node-a", ["cat", "/etc/podferry/agent.json"]).stdout)["peers"]
    assert known == {"node-b": f"{grown.nodes[1].address}:7460"}
    assert succeeds(own_lab, "node-a", "ping", "-q", "-c", "1", "-W", "2", "node-b")


def test_two_labs_do_not_meet(lab: Lab, own_lab: Lab) -> None:
    other = own_lab.up(1, agent=False)
    mine = lab.status()
    assert other.subnet != mine.subnet
    assert not succeeds(lab, "node-a", "ping", "-q", "-c", "1", "-W", "1", other.nodes[0].address)
    containers.start(own_lab, "node-a", "same-name", ["sleep", "1000"])
    assert containers.find(lab, "same-name") is None
    own_lab.down()
    assert lab.status() == mine


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_containers_run_and_freeze_with_either_cgroup(own_lab: Lab, kind: str) -> None:
    if kind == "v1" and cgroups.native_mode(cgroups.hierarchies()) != "v1":
        pytest.skip("no v1 controllers are mounted here")
    own_lab.up(1, agent=False, cgroup=kind)
    fs = own_lab.exec("node-a", ["stat", "-f", "-c", "%T", "/sys/fs/cgroup"]).stdout.strip()
    assert fs == ("cgroup2fs" if kind == "v2" else "tmpfs")
    containers.start(own_lab, "node-a", "c", ["python3", "-c", "import time\nwhile True: time.sleep(1)"])
    own_lab.exec("node-a", ["ctr", "task", "pause", "c"])
    assert "PAUSED" in own_lab.exec("node-a", ["ctr", "task", "list"]).stdout
    own_lab.exec("node-a", ["ctr", "task", "resume", "c"])
    containers.stop(own_lab, "c")
    assert containers.find(own_lab, "c") is None


def test_the_kernels_settings_are_not_a_nodes_to_change(lab: Lab) -> None:
    read = ["cat", "/proc/sys/kernel/panic"]
    outside = run(read).stdout
    lab.exec("node-a", ["sh", "-c", "echo 7 > /proc/sys/kernel/panic"])
    assert lab.exec("node-a", read).stdout == "7\n"
    assert run(read).stdout == outside


def test_a_containers_output_is_there_from_its_first_line(lab: Lab) -> None:
    text = "import os\nprint('first', os.environ['K'])\nfor i in range(5): print(i)"
    image = str(root_images.job_archive(quiet))
    containers.start(lab, "node-b", "talker", ["python3", "-c", text], image=image, env={"K": "v"})
    try:
        with pytest.raises(UsageError, match="there is a container talker on node-b"):
            containers.start(lab, "node-a", "talker", ["true"])
        said = b"".join(containers.output(lab, "talker", follow=True)).decode()
        assert said.splitlines() == ["first v", "0", "1", "2", "3", "4"]
    finally:
        containers.stop(lab, "talker")
    assert b"".join(containers.output(lab, "talker")).startswith(b"first v\n")
    with pytest.raises(UsageError, match="no container nobody"):
        list(containers.output(lab, "nobody"))
