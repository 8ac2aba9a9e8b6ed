"""`podferry pki`: certificates for agents on hosts that have no authority of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from podferry.cli.terminal import stderr, words
from podferry.wire.pki import AUTHORITY_LIFE, CA_CERTIFICATE, CA_KEY, NODE_CERTIFICATE, NODE_KEY, NODE_LIFE, Authority

app = typer.Typer(
    name="pki",
    help="Certificates for agents: an authority, and a certificate for each node. Agents trust nothing else.",
    epilog="Keep the authority's directory on one machine; a node gets only the directory issued for it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Home = Annotated[Path, typer.Option("--authority", metavar="DIR", help="The authority's directory.")]
HOME = Path("pki")


@app.command()
def init(directory: Home = HOME) -> None:
    """Create a certificate authority. Never replaces one: agents would refuse the certificates that it has signed.

    Example: [bold]podferry pki init --authority pki[/]
    """
    Authority.create(directory)
    stderr().print(words(f"{directory}: {CA_CERTIFICATE} and {CA_KEY}, good for {AUTHORITY_LIFE.days // 365} years"))


@app.command()
def issue(
    *,
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node's name, as in its agent.json.")],
    address: Annotated[
        list[str] | None,
        typer.Option(metavar="IP", help="An IP address to put into the certificate, too; may be repeated."),
    ] = None,
    into: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The directory to write to; default: one with the node's name.")
    ] = None,
    directory: Home = HOME,
) -> None:
    """Issue a node's certificate, or renew it: an agent reads its files anew for every connection.

    Example: [bold]podferry pki issue node-a --authority pki --into node-a[/]
    """
    authority, place = Authority.load(directory), into or Path(node)
    authority.issue(node, address or [], place)
    stderr().print(
        words(
            f"{place}: {CA_CERTIFICATE}, {NODE_CERTIFICATE} and {NODE_KEY} for {node}, good for {NODE_LIFE.days} days"
        )
    )
