"""`podferry` for machines that are emulated: it is imported once, which takes half a minute there, and forked for each command.

`warm_podferry.py serve` is the server; without that word it is `podferry` itself, in the server's environment and cgroup.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import socket
import sys

SOCKET = "/run/warm-podferry"


def serve() -> None:
    import podferry.cli
    import podferry.lab

    for package in (podferry.cli, podferry.lab):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(SOCKET)
        server.listen()
        while True:
            client, _ = server.accept()
            if not os.fork():
                answer(client)
            client.close()


def answer(client: socket.socket) -> None:
    """Run one command with the streams of who asked, and tell the exit status. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if pid := os.fork():
        _, status = os.waitpid(pid, 0)
        client.send(str(os.waitstatus_to_exitcode(status) & 255).encode())
        os._exit(0)
    client.close()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode) for number, mode in enumerate(("r", "w", "w")))
    sys.argv = ["podferry", *said.decode().split("\0")]
    importlib.import_module("podferry.cli").main()


def ask() -> int:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(SOCKET)
        socket.send_fds(server, ["\0".join(sys.argv[1:]).encode()], [0, 1, 2])
        return int(server.recv(16))


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    sys.exit(ask())
