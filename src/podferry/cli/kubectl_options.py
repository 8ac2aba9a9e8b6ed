"""The options that commands of `kubectl podferry` share, and what runs their work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import anyio
import typer

from podferry.cli import kubectl_moves as moves
from podferry.cli.kubectl_moves import ClusterOptions
from podferry.kube.client import MIGRATIONS, PODS, ResourceKind
from podferry.model import Connections

T = TypeVar("T")


def offering(kind: ResourceKind) -> Callable[[typer.Context], list[str]]:
    """Shell completion of object names. Offers nothing where the cluster does not answer."""

    def offer(context: typer.Context) -> list[str]:
        given = {
            name: value
            for name, value in context.params.items()
            if value and name in ClusterOptions.__dataclass_fields__
        }
        try:
            return do(partial(moves.names, ClusterOptions(**given), kind))
        except Exception:  # noqa: BLE001 - a failed completion must not print into the user's line
            return []

    return offer


PodName = Annotated[str, typer.Argument(metavar="POD", help="The pod.", autocompletion=offering(PODS))]
MigrationName = Annotated[
    str, typer.Argument(metavar="MIGRATION", help="The Migration.", autocompletion=offering(MIGRATIONS))
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="NAMESPACE", help="Default: the context's.")
]
Context = Annotated[
    str | None, typer.Option("--context", metavar="NAME", help="Default: the kubeconfig's current one.")
]
Kubeconfig = Annotated[
    Path | None, typer.Option("--kubeconfig", metavar="FILE", help="Default: $KUBECONFIG or ~/.kube/config.")
]
MayClose = Annotated[
    Connections | None,
    typer.Option(
        "--connections",
        case_sensitive=False,
        help="What may become of connections whose other end stays: Close; Preserve: TCP connections to pods on nodes with an "
        "agent go on; or Require: no move where one would be lost. Default: the pod's policy's, or Close.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: Migration objects as the API server has them.")]


def do(work: Callable[[], Awaitable[T]]) -> T:
    """Run it to its end."""
    return anyio.run(work)
