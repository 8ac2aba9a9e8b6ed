"""`podferry lab`: a small cluster on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from podferry.cli.lab_images import app as image_commands
from podferry.cli.terminal import print_json, stderr, stdout, words
from podferry.errors import UsageError
from podferry.lab import Lab, LabStatus, Node, containers, list_labs
from podferry.lab.debian import OF_NODES, SUITES
from podferry.lab.lab_settings import DEFAULT_LINK, DEFAULT_NODES
from podferry.lab.progress import Progress, phases
from podferry.lab.root_images import JOB_IMAGE
from podferry.lab.state import CONTROL, STORAGE, require_root
from podferry.node.process import CLEAN_ENVIRONMENT

app = typer.Typer(
    name="lab",
    help=(
        "A small cluster on this machine: nodes that are sets of Linux namespaces, with real containerd, runc and CRIU, "
        "joined by a link of a set rate, with a real network file system at /share that holds their image layers, and a "
        "real registry. Needs root."
    ),
    epilog=(
        "Start with `podferry lab up`, then `podferry lab run --node node-a --name train -- python3 -c ...`, then "
        "`podferry migrate train --to node-b`. `podferry lab down` leaves nothing behind but a cache of images."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(image_commands)

LabName = Annotated[
    str,
    typer.Option("--lab", metavar="NAME", envvar="PODFERRY_LAB", help="The lab's name. Labs have separate networks."),
]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="node-a, node-b, ... or storage.")]
Container = Annotated[str, typer.Argument(metavar="NAME", help="The container, as `podferry lab run` named it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT = "default"
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def up(
    *,
    nodes: Annotated[int | None, typer.Option(help=f"How many nodes (new labs: {DEFAULT_NODES}).")] = None,
    link: Annotated[
        str | None,
        typer.Option(metavar="RATE", help=f"Each node's link: 1gbit, 250mbit, ... or none (new labs: {DEFAULT_LINK})."),
    ] = None,
    cgroups: Annotated[str | None, typer.Option(hidden=True, help="auto, v1 or v2.")] = None,
    agent: Annotated[bool | None, typer.Option(hidden=True, help="Whether nodes run podferry-agent.")] = None,
    kubernetes: Annotated[
        bool | None,
        typer.Option(
            "--kubernetes",
            help="A Kubernetes cluster: a control plane, and a kubelet on every node, from the programs in "
            "$PODFERRY_KUBE_BIN.",
        ),
    ] = None,
    debian: Annotated[
        str | None,
        typer.Option(
            metavar="RELEASE", help=f"The Debian release of the nodes: {' or '.join(SUITES)} (new labs: {OF_NODES})."
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The container runtime of a lab with Kubernetes: containerd, or crio from the programs in "
            "$PODFERRY_CRIO_BIN; containerd,crio gives node-a the first, all others the second (new labs: containerd).",
        ),
    ] = None,
    lab: LabName = DEFAULT,
) -> None:
    """Start the lab, or its missing parts. The first start builds the nodes' image, which takes a few minutes.

    A second `up` takes a moment; it can add nodes and change the rate of the links.

    Examples:

    [bold]podferry lab up --nodes 3 --link 250mbit[/]

    [bold]podferry lab up --kubernetes && podferry lab kubectl get nodes[/]
    """
    with _progress() as progress:
        status = Lab(lab).up(
            nodes,
            link,
            cgroup=cgroups,
            agent=agent,
            kubernetes=kubernetes,
            debian=debian,
            runtime=runtime,
            progress=progress,
        )
    _print_status(status)


@app.command()
def down(lab: LabName = DEFAULT) -> None:
    """Stop and remove the lab: processes, namespaces, cgroups, files. Does nothing where there is no such lab."""
    with _progress() as progress:
        Lab(lab).down(progress)


@app.command()
def status(json: Json = False, lab: LabName = DEFAULT) -> None:
    """Show the lab's machines.

    Example: [bold]podferry lab status --json | jq '.nodes[].address'[/]
    """
    require_root()
    found = Lab(lab).status()
    if json:
        print_json(_as_dict(found))
    else:
        _print_status(found)


@app.command(name="list")
def list_command(json: Json = False) -> None:
    """List the labs of this machine."""
    names = list_labs()
    if json:
        print_json({"labs": names})
    else:
        for name in names:
            stdout().print(words(name))


@app.command(name="exec", context_settings=PASS_ON)
def exec_command(context: typer.Context, node: NodeName, lab: LabName = DEFAULT) -> None:
    """Run a command inside a node, on this terminal; ends with its exit code.

    Examples:

    [bold]podferry lab exec node-a -- ctr tasks list[/]

    [bold]podferry lab exec node-b -- bash[/]
    """
    require_root()
    argv = [str(word) for word in Lab(lab).command(node, context.args or ["bash"])]
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python's choice, not the command's
        signal.signal(ignored, signal.SIG_DFL)
    os.execvpe(argv[0], argv, {**CLEAN_ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb")})


@app.command(context_settings=PASS_ON)
def kubectl(context: typer.Context, lab: LabName = DEFAULT) -> None:
    """Run kubectl for the lab's Kubernetes, with this machine's files; ends with its exit code.

    A lab's network is its own, so a kubectl started elsewhere would not reach it.

    Examples:

    [bold]podferry lab kubectl get pods -A[/]

    [bold]podferry lab kubectl -- apply -f job.yaml[/]
    """
    require_root()
    client = Lab(lab).kubectl()
    argv = [str(word) for word in client.command(context.args)]
    kept = {name: value for name in ("HOME", "TERM", "KUBE_EDITOR", "EDITOR") if (value := os.environ.get(name))}
    os.execvpe(argv[0], argv, {**CLEAN_ENVIRONMENT, **kept, **client.environment()})


@app.command(name="kill-node")
def kill_node(node: NodeName, lab: LabName = DEFAULT) -> None:
    """Kill everything in a node at once, as a power failure does. Its disk stays."""
    require_root()
    Lab(lab).kill_node(node)


@app.command(name="start-node")
def start_node(node: NodeName, lab: LabName = DEFAULT) -> None:
    """Start a node that was killed."""
    with _progress() as progress:
        Lab(lab).start_node(node, progress)


@app.command()
def cut(node: NodeName, lab: LabName = DEFAULT) -> None:
    """Cut a node's link: packets vanish in both directions until `podferry lab mend`."""
    require_root()
    Lab(lab).cut(node)


@app.command()
def mend(node: NodeName, lab: LabName = DEFAULT) -> None:
    """Undo `podferry lab cut`."""
    require_root()
    Lab(lab).mend(node)


@app.command(context_settings=PASS_ON)
def run(
    context: typer.Context,
    *,
    node: Annotated[str, typer.Option(metavar="NODE", help="The node that starts the container.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="The container's name.")],
    image: Annotated[
        str, typer.Option(metavar="REF", help="An image of the lab's registry, or the path of an OCI archive here.")
    ] = JOB_IMAGE,
    env: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="An environment variable of the container; may be repeated.")
    ] = None,
    lab: LabName = DEFAULT,
) -> None:
    """Start a container that podferry can move. The default image has python3 with its whole standard library.

    Example: [bold]podferry lab run --node node-a --name train --env STEPS=1000 -- python3 -c 'print(1)'[/]
    """
    require_root()
    settings = dict(_setting(one) for one in env or [])
    containers.start(Lab(lab), node, name, context.args, image=image, env=settings)


@app.command()
def stop(name: Container, lab: LabName = DEFAULT) -> None:
    """Kill a container and remove it, whichever node it runs on. Its log stays."""
    require_root()
    containers.stop(Lab(lab), name)


@app.command()
def logs(
    name: Container,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Follow the output until the container ends, also across its moves.")
    ] = False,
    lab: LabName = DEFAULT,
) -> None:
    """Print a container's output, from its first line, across all its moves: what it has written so far, or with -f all of it."""
    require_root()
    for chunk in containers.output(Lab(lab), name, follow=follow):
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"{text!r} is no environment setting", remedy="use NAME=VALUE")
    return key, value


@contextmanager
def _progress() -> Iterator[Progress]:
    """Where long work tells its steps: one line that changes on a terminal, else a line for each step."""
    console = stderr()
    if not console.is_terminal:
        yield phases(lambda step: console.print(words(step)))
        return
    with console.status("") as spinner:

        def show(step: str) -> None:
            spinner.update(words(step))
            log(step)

        log = phases(lambda step: console.print(words(step, "dim")))
        yield show


def _as_dict(status: LabStatus) -> dict[str, object]:
    def node(one: Node) -> dict[str, object]:
        return {**asdict(one), "alive": one.alive}

    return {
        "name": status.name,
        "subnet": status.subnet,
        "link": status.link,
        "storage": node(status.storage),
        "nodes": [node(one) for one in status.nodes],
        "control": node(status.control) if status.control else None,
        "kubeconfig": str(Lab(status.name).kubeconfig) if status.control else None,
    }


def _print_status(status: LabStatus) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("NODE", "ADDRESS", "STATE", "PID"):
        table.add_column(title)
    kinds = {STORAGE: "serves /share and the registry", CONTROL: "Kubernetes"}
    for node in (*status.nodes, status.storage, *([status.control] if status.control else [])):
        state = "down" if not node.alive else "cut off" if node.cut else "up"
        kind = kinds.get(node.name, f"link {status.link}")
        table.add_row(node.name, node.address, f"{state}, {kind}", str(node.pid or "-"))
    stdout().print(words(f"lab {status.name}"))
    stdout().print(table)
    if status.control:
        stdout().print(words(f"kubeconfig {Lab(status.name).kubeconfig}, for `podferry lab kubectl`"))
