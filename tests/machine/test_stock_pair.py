"""Two stock machines with kernels of their own: podferry installed as docs/agent.md says, and a job that moves between them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from emulated import Lacking
from stock import Stock, booted_pair, built
from stock_lab import (
    AT,
    CHECKOUT,
    CONFINED,
    PATIENCE,
    PATIENTLY,
    PYTHON,
    RESTRICTED,
    STATE,
    load_profile,
    sums,
    wait_until,
)

from podferry.cli.app import run as podferry
from podferry.lab.debian import SUITE
from podferry.node.process import Completed, run

pytestmark = [pytest.mark.machine, pytest.mark.slow]
NODES = {"node-a": "192.168.77.1", "node-b": "192.168.77.2"}
UNIT = "/etc/systemd/system/podferry-agent.service"
INSTALL = f"""
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends containerd runc criu python3-venv
python3 -m venv /opt/podferry
/opt/podferry/bin/pip install --quiet {AT}
ln -s /opt/podferry/bin/podferry* /usr/local/bin/
sysctl -w fs.pipe-max-size=4194304
package=$(/opt/podferry/bin/python -c 'import podferry; print(podferry.__path__[0])')
install -m 755 "$package/node/podferry-runc" /usr/local/sbin/
ctr images import --base-name '' {STATE}/cache/job-*.tar
"""


def unit() -> str:
    """The systemd unit in docs/agent.md, word for word."""
    text = (CHECKOUT / "docs/agent.md").read_text()
    [found] = re.findall(rf"```ini\n# {UNIT}\n(.*?)```", text, re.DOTALL)
    return str(found)


def on_each(nodes: dict[str, Stock], do: Callable[[str, Stock], None]) -> None:
    """Do it on both machines, side by side."""
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(do, nodes.keys(), nodes.values()))


def install(_: str, machine: Stock) -> None:
    machine.environment = machine.configure_clients()
    machine.check_out(CHECKOUT, AT)
    machine.run(INSTALL, timeout=PATIENCE * 2)


def begin(authority: Path, name: str, machine: Stock) -> None:
    """Have systemd run an agent. Certificates are made outside, "on a machine that you trust"."""
    packed = machine.place / "pki.tar"
    run(["tar", "-c", "-f", packed, "-C", authority / name, "."])
    peers = {peer: f"{address}:7460" for peer, address in NODES.items() if peer != name}
    config = {"node": name, "listen": f"{NODES[name]}:7460", "certificates": "/etc/podferry/pki", "peers": peers}
    machine.run(f"mkdir -p /etc/podferry/pki; echo {shlex.quote(json.dumps(config))} > /etc/podferry/agent.json")
    machine.put(packed, "/etc/podferry/pki")
    machine.run(
        f"printf %s {shlex.quote(unit())} > {UNIT}; systemctl daemon-reload; systemctl enable --now podferry-agent",
        timeout=PATIENCE,
    )
    wait_until("the agent answers", lambda: not agent(machine, "ps", check=False).returncode)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stock]]:
    """Both machines, with an agent each that systemd runs."""
    try:
        built(SUITE)
    except Lacking as lacking:
        pytest.skip(f"no stock machine: {lacking}")
    with booted_pair(SUITE) as machines:
        both = dict(zip(NODES, machines, strict=True))
        on_each(both, install)
        load_profile(both["node-a"])
        authority = tmp_path_factory.mktemp("pki")
        assert podferry(["pki", "init", "--authority", str(authority)]) == 0
        for name in both:
            assert podferry(["pki", "issue", name, "--authority", str(authority), "--into", str(authority / name)]) == 0
        on_each(both, partial(begin, authority))
        yield both


def agent(machine: Stock, *argv: str, check: bool = True) -> Completed:
    """podferry, asking this machine's agent."""
    return machine.run(f"podferry --agent /run/podferry/agent.sock {shlex.join(argv)}", timeout=PATIENCE, check=check)


def start(machine: Stock, name: str, options: Sequence[str]) -> None:
    """A job on this machine that has printed something."""
    image = machine.run("ctr images list -q").stdout.split()[0]
    ctr = ["ctr", "run", "--detach", "--runc-binary", "/usr/local/sbin/podferry-runc"]
    ctr += ["--log-uri", f"file:///var/log/{name}.log", *options, image, name, *PYTHON]
    machine.run(shlex.join(ctr), timeout=PATIENCE)
    wait_until(f"{name} prints", lambda: said(machine, name))


def said(machine: Stock, name: str) -> list[str]:
    return machine.run(f"cat /var/log/{name}.log 2> /dev/null || :").stdout.splitlines()


def move(nodes: dict[str, Stock], name: str) -> None:
    """From node-a, where nothing is left of it but its log, to node-b."""
    here, there = nodes.values()
    record = json.loads(agent(here, "migrate", name, "--to", "node-b", *PATIENTLY, "--json").stdout.splitlines()[-1])
    assert record["outcome"] == "completed", record
    assert f"\n{name} " not in here.run("ctr task list; ctr containers list").stdout
    assert "RUNNING" in there.run(f"ctr task list | grep '^{name} '").stdout


def goes_on(machine: Stock, name: str) -> None:
    """It prints more, and all that it ever printed is here, once."""
    arrived = len(said(machine, name))
    wait_until(f"{name} prints there", lambda: len(said(machine, name)) > arrived)
    lines = said(machine, name)
    assert lines == sums(len(lines))


def test_each_machine_has_what_a_node_needs(nodes: dict[str, Stock]) -> None:
    for machine in nodes.values():
        machine.run("podferry doctor --node", timeout=PATIENCE)
    kernels = {machine.run("cat /proc/sys/kernel/random/boot_id").stdout for machine in nodes.values()}
    assert len(kernels) == 2


@pytest.mark.parametrize(
    "options", [[], [*RESTRICTED, CONFINED]], ids=["of root", "without capabilities, under AppArmor"]
)
def test_a_job_moves_to_another_machine(nodes: dict[str, Stock], options: list[str]) -> None:
    name = "restricted" if options else "root"
    start(nodes["node-a"], name, options)
    if CONFINED in options:
        refused = agent(nodes["node-a"], "check", name, "--to", "node-b", check=False)
        assert "node-b has no AppArmor profile" in refused.stdout + refused.stderr
        load_profile(nodes["node-b"])
    move(nodes, name)
    goes_on(nodes["node-b"], name)
