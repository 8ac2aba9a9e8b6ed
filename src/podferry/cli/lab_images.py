"""`podferry lab image`: images from Debian packages, built here and pushed to a lab's own registry."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer
from rich.table import Table

from podferry.cli import units
from podferry.cli.terminal import print_json, stderr, stdout, steps, words
from podferry.errors import UsageError
from podferry.lab import Lab, builder, containers, registry
from podferry.lab.state import require_root

app = typer.Typer(
    name="image",
    help="Images from Debian packages, built here without any registry, and pushed to the lab's own.",
    epilog=(
        "`podferry lab image build numpy --packages python3-numpy`, then `podferry lab image push numpy`, then "
        "`podferry lab run --node node-a --name sum --image numpy -- python3 -c 'import numpy'`."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The image: NAME or NAME:TAG.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def build(
    name: Name,
    packages: Annotated[
        list[str],
        typer.Option("--packages", metavar="PACKAGE,...", help="The Debian packages to install; may be repeated."),
    ],
    command: Annotated[
        str, typer.Option(metavar="COMMAND", help="The image's default command, quoted as for a shell.")
    ] = "bash",
    env: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="An environment variable of the container; may be repeated.")
    ] = None,
    json: Json = False,
) -> None:
    """Build an image: a minimal Debian with packages and all they need. An image with the same contents is not built again.

    Example: [bold]podferry lab image build numpy --packages python3-numpy,python3-scipy --command python3[/]
    """
    require_root()
    chosen = [one for given in packages for one in given.split(",") if one]
    if not chosen:
        raise UsageError("an image needs packages", remedy="--packages python3,...")
    pairs = [one.partition("=") for one in env or []]
    if wrong := [key for key, equals, _ in pairs if not key or not equals]:
        raise UsageError(f"{wrong[0]!r} is no environment setting", remedy="use NAME=VALUE")
    settings = {key: value for key, _, value in pairs}
    recipe = builder.Recipe(registry.reference_of(name), chosen, shlex.split(command), settings)
    with steps() as progress:
        archive = builder.build(recipe, progress)
    size = archive.stat().st_size
    if json:
        print_json({"reference": recipe.reference, "archive": str(archive), "bytes": size})
        return
    stdout().print(words(f"{recipe.reference}, {units.size(size)}: {archive}"))
    stderr().print(words(f"next: podferry lab image push {name}", "dim"))


@app.command()
def push(
    name: Name,
    compress: Annotated[bool, typer.Option(help="Compress the layers with gzip.")] = True,
    lab: Annotated[
        str, typer.Option("--lab", metavar="NAME", envvar="PODFERRY_LAB", help="The lab whose registry to push to.")
    ] = "default",
) -> None:
    """Push an image that was built here to the lab's registry. Nodes pull it when they next run it.

    Example: [bold]podferry lab image push numpy[/]
    """
    require_root()
    archive = builder.find(registry.reference_of(name))
    with steps() as progress:
        progress(f"pushing {units.size(archive.stat().st_size)}")
        reference = containers.push(Lab(lab), archive, compress=compress)
    stdout().print(words(reference))


@app.command("list")
def list_images(json: Json = False) -> None:
    """List the images that were built here."""
    found = {reference: path.stat().st_size for reference, path in sorted(builder.built().items()) if path.exists()}
    if json:
        print_json({"images": [{"reference": one, "bytes": size} for one, size in found.items()]})
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("IMAGE")
    table.add_column("SIZE", justify="right")
    for reference, size in found.items():
        table.add_row(words(reference), units.size(size))
    stdout().print(table)
