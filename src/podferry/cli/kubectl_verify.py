"""`--verify` of `kubectl podferry migrate`, as a Migration's `spec.verify`."""

from __future__ import annotations

import shlex
from typing import Any

from podferry.cli.kubectl_moves import whole_seconds
from podferry.errors import UsageError
from podferry.kube.verify import Scheme

Json = dict[str, Any]

FORM = "http:PORT/PATH|tcp:PORT|exec:COMMAND"


def parse(text: str, container: str | None, timeout: str | None) -> Json:
    """What was typed. Raises `UsageError`.

    >>> parse("http:8080/healthz", None, "10s")
    {'http': {'port': 8080, 'path': '/healthz', 'scheme': 'HTTP'}, 'timeout': '10s'}
    """
    kind, _, rest = text.partition(":")
    found: Json = {}
    if kind in ("http", "https"):
        port, slash, path = rest.partition("/")
        found["http"] = {
            "port": _port(text, port),
            "path": f"{slash}{path}" or "/",
            "scheme": str(Scheme(kind.upper())),
        }
    elif kind == "tcp":
        found["tcp"] = {"port": _port(text, rest)}
    elif kind == "exec" and (command := _words(text, rest)):
        found["exec"] = {"command": command}
    else:
        raise _wrong(text)
    if container is not None:
        found["container"] = container
    if timeout is not None:
        whole_seconds(timeout)
        found["timeout"] = timeout
    return found


def _port(text: str, port: str) -> int:
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise _wrong(text)
    return int(port)


def _words(text: str, command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as wrong:
        raise UsageError(f"--verify {text} is not understood", why=str(wrong)) from wrong


def _wrong(text: str) -> UsageError:
    return UsageError(f"--verify {text} is not understood", why=f"it is {FORM}", remedy="--verify http:8080/healthz")
