"""What must hold of a job on the target before its move is called a success: a Migration's `spec.verify`. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from podferry.kube.objects import DURATION, FIXED, ObjectPart, rule

Json = dict[str, Any]

DEFAULT_TIMEOUT = "30s"
PATIENCE = 86400
"""Seconds for which the kubelet asks on: it restarts a container whose startup probe has failed for good."""


class Scheme(StrEnum):
    """How an HTTP server is asked."""

    HTTP = "HTTP"
    HTTPS = "HTTPS"


def _port() -> Any:
    return Field(description="The port, at the pod's own address.", ge=1, le=65535)


class VerifyHttp(ObjectPart):
    """A GET that must be answered with 200 to 399."""

    port: Annotated[int, _port()]
    path: Annotated[str, Field(description="What is asked for.", pattern="^/", max_length=1024)] = "/"
    scheme: Annotated[Scheme, Field(description="HTTP, or HTTPS, of which no certificate is checked.")] = Scheme.HTTP


class VerifyTcp(ObjectPart):
    """A connection that must be accepted."""

    port: Annotated[int, _port()]


class VerifyExec(ObjectPart):
    """A command that must end with 0."""

    command: Annotated[
        list[Annotated[str, Field(max_length=4096)]],
        Field(
            description="The program in the container and its arguments; no shell is added. Who asks for it must be allowed "
            "pods/exec.",
            min_length=1,
            max_length=64,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ]


class Verify(ObjectPart):
    """What is asked of the job once it runs on the target: one of http, tcp and exec."""

    container: Annotated[
        str | None,
        Field(
            description="The container that is asked. Without it the first of the pod's spec.",
            min_length=1,
            max_length=63,
        ),
    ] = None
    http: Annotated[VerifyHttp | None, Field(description="Ask an HTTP server of the job.")] = None
    tcp: Annotated[VerifyTcp | None, Field(description="Connect to a server of the job.")] = None
    exec: Annotated[VerifyExec | None, Field(description="Run a command beside the job.")] = None
    timeout: Annotated[
        str, Field(description="How long after the resume it may take until it holds.", pattern=DURATION)
    ] = DEFAULT_TIMEOUT

    def probe(self) -> Json:
        """The startup probe by which the target's kubelet asks, once a second until it holds."""
        how: Json = {}
        if self.http is not None:
            how["httpGet"] = {"port": self.http.port, "path": self.http.path, "scheme": str(self.http.scheme)}
        elif self.tcp is not None:
            how["tcpSocket"] = {"port": self.tcp.port}
        elif self.exec is not None:
            how["exec"] = {"command": list(self.exec.command)}
        return {**how, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": PATIENCE}


ONE_WAY = rule(
    "[has(self.http), has(self.tcp), has(self.exec)].filter(one, one).size() == 1",
    "verify takes one of http, tcp and exec",
)
ONE_WAY["x-kubernetes-validations"] += rule(FIXED, "verify cannot be changed")["x-kubernetes-validations"]
