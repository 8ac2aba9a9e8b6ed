"""`podferry images`: what lies on the share of the image layers, and the two words that only a person may say about it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from podferry.cli import units
from podferry.cli.terminal import print_json, stderr, stdout, words
from podferry.errors import Refused, UsageError

app = typer.Typer(
    name="images",
    help="The share that podferry-snapshotter keeps image layers on. Works wherever the share is mounted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Share = Annotated[
    Path, typer.Option(metavar="DIR", help="The share's directory, as given to `podferry-snapshotter --share`.")
]
SHOWN = 12


@app.command()
def show(
    share: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The share's directory, as given to `podferry-snapshotter --share`."),
    ] = None,
    lab: Annotated[str | None, typer.Option(metavar="NAME", help="The share of a lab on this machine.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the layers with their sizes and the nodes that use them. Changes nothing.

    Examples:

    [bold]podferry images show --share /share/images[/]

    [bold]podferry images show --lab default[/]
    """
    from podferry.snapshotter import images_report

    report = images_report(_where(share, lab))
    if json:
        print_json(report.to_dict())
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("LAYER", "FORM", "SIZE", "MADE BY", "USED BY"):
        table.add_column(title, justify="right" if title == "SIZE" else "left", overflow="fold")
    for layer in report.layers:
        name = layer.chain.removeprefix("sha256:")[:SHOWN]
        users = ", ".join(layer.users) or "nobody"
        table.add_row(words(name), words(layer.form), units.size(layer.bytes), words(layer.published_by), words(users))
    if report.layers:
        stdout().print(table)
    stdout().print(
        words(
            f"{report.share}: {report.state}, {len(report.layers)} layers, {units.size(report.bytes)}, "
            f"{units.size(report.free)} of {units.size(report.total)} free"
        )
    )
    for one in report.damaged:
        stderr().print(words(f"damaged: {one}", "yellow"))


@app.command()
def check(
    share: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The share's directory, as given to `podferry-snapshotter --share`."),
    ] = None,
    lab: Annotated[str | None, typer.Option(metavar="NAME", help="The share of a lab on this machine.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each layer.")] = False,
) -> None:
    """Read all layers and compare their digests. Sets damaged layers aside; the next pull publishes them again.

    Example: [bold]podferry images check --share /share/images[/]
    """
    from podferry.snapshotter import check_layers, open_share
    from podferry.snapshotter.faults import LayerDamaged

    checked = damaged = 0
    for layer in check_layers(open_share(_where(share, lab), create=False)):
        checked += 1
        damaged += bool(layer.wrong)
        if json:
            print_json(asdict(layer), indent=None)
            continue
        name = layer.chain.removeprefix("sha256:")[:SHOWN]
        said = words(f"{name} {layer.form or '?'}, {units.size(layer.bytes)}: ")
        said.append(words(f"{layer.wrong}; now at {layer.aside}", "yellow") if layer.wrong else words("whole"))
        stdout().print(said)
    if damaged:
        raise LayerDamaged(
            f"{damaged} of {checked} layers were damaged and set aside",
            remedy="where a node has the image: crictl rmi IMAGE; crictl pull IMAGE",
        )


def _where(share: Path | None, lab: str | None) -> Path:
    if share is not None and lab is None:
        return share
    if lab is None or share is not None:
        raise UsageError("no share is named", remedy="give either --share DIR or --lab NAME")
    from podferry.lab import Lab
    from podferry.lab.machine_config import IMAGES_SHARE

    there = Lab(lab)
    alive = [node.name for node in there.status().nodes if node.alive]
    if not alive:
        raise Refused(f"no node of lab {lab} is up", remedy=f"podferry lab up --lab {lab}")
    return there.root(alive[0]) / IMAGES_SHARE.lstrip("/")


@app.command()
def init(
    share: Share,
    local: Annotated[
        bool, typer.Option("--local", help="Allow a directory of this machine's own disk, where no share is mounted.")
    ] = False,
) -> None:
    """Turn an empty directory into a share. The first snapshotter does this by itself where a file system is mounted.

    Example: [bold]podferry images init --share /share/images[/]
    """
    from podferry.snapshotter import initialise, open_share

    if local:
        initialise(share)
    open_share(share)
    stderr().print(words(f"{share} is a share"))


@app.command()
def forget(
    node: Annotated[str, typer.Argument(metavar="NODE", help="A node that will never come back.")], share: Share
) -> None:
    """Remove the references of a node that will not come back, so that its layers can be collected.

    Example: [bold]podferry images forget node-c --share /share/images[/]
    """
    from podferry.snapshotter import forget as forget_node
    from podferry.snapshotter import open_share

    count = forget_node(open_share(share, create=False), node)
    stderr().print(words(f"{node} is forgotten" if count else f"{node} used nothing", "" if count else "yellow"))
