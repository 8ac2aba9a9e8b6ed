"""Two pods that talk without a pause, and what a node has of connections between pods that go on when one moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from podferry.lab import Lab

Json = dict[str, Any]

SERVER = """
import os, socket, threading
def answer(one):
    with one:
        while said := one.recv(1 << 16): one.sendall(said)
server = socket.create_server(('', 9000))
while True:
    one, _ = server.accept()
    threading.Thread(target=answer, args=(one,), daemon=True).start()
"""
CLIENT = """
import itertools, os, socket, sys, time
all_of = [socket.create_connection((os.environ['PEER'], 9000)) for _ in range(int(os.environ['MANY']))]
for n in itertools.count():
    for one in all_of:
        said = os.urandom(8) * 512
        one.sendall(said)
        heard = b''
        while len(heard) < len(said):
            piece = one.recv(1 << 16)
            if not piece: sys.exit(f'BAD closed after {n}')
            heard += piece
        if heard != said: sys.exit(f'BAD {n} {heard[:8]}')
    if not n % 20: print('count', n, flush=True)
    if os.path.exists('/tmp/end'): break
    time.sleep(0.002)
for one in all_of: one.close()
print('ended', flush=True)
time.sleep(1e6)
"""
"""It says the same thing twice never, so nothing that is lost, told twice or in another order goes unnoticed."""

TABLES = """
import pathlib
from podferry.node import address_rewriting, netlink, netns
def there():
    asked = [bytes([family, 0, 0, 0]) + netlink.attribute(1, address_rewriting.TABLE) for family in (2, 10)]
    return sum(netlink.get(netlink.NETFILTER, 10 << 8 | 1, one) is not None for one in asked)
found = sum(netns.in_network_at(one, there) for one in pathlib.Path('/run/netns').iterdir())
print(found, sorted(one.name for one in pathlib.Path('/var/lib/podferry/translations').glob('*')))
"""


def pods(make: Callable[..., Json], *, many: int = 3) -> tuple[Json, Callable[[str], Json]]:
    """The server, and, once its address is known, the client with so many connections to it."""

    def client(address: str) -> Json:
        made = make("client", CLIENT)
        env = [{"name": "PEER", "value": address}, {"name": "MANY", "value": str(many)}]
        made["spec"]["containers"][0]["env"] = env
        return made

    return make("server", SERVER), client


def counted(lines: list[str]) -> int:
    """How far the client is."""
    assert not [line for line in lines if "BAD" in line], lines[-3:]
    return max([int(line.split()[1]) for line in lines if line.startswith("count")], default=-1)


def rules(lab: Lab, node: str) -> str:
    """How many tables a node's pods have for connections that go on, and what is written down of them."""
    paths = "PYTHONPATH=/opt/podferry/src:/opt/podferry/site"
    return lab.exec(node, ["sh", "-c", f'{paths} python3 -P -c "$0"', TABLES]).stdout.strip()
