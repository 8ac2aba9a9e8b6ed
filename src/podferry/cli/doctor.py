"""`podferry doctor`: can this machine run the lab, or be a node; what is in the way, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from podferry.cli.exits import Exit
from podferry.cli.terminal import print_json, stderr, stdout, words
from podferry.core.findings import Finding, Verdict, worst
from podferry.errors import UsageError
from podferry.lab.debian import OF_NODES, SUITES

MARKS = {
    Verdict.FINE: ("fine", "green"),
    Verdict.LIMITED: ("works, but", "yellow"),
    Verdict.BLOCKED: ("in the way", "bold red"),
}
SUMMARIES = {
    Verdict.FINE: "Everything is as it should be.",
    Verdict.LIMITED: "It works here, but not all of it.",
    Verdict.BLOCKED: "It cannot work here until what is in the way is gone.",
}


def doctor(
    node: Annotated[
        bool,
        typer.Option(
            "--node", help="Check what a node's agent needs, on a host or in a cluster, instead of what the lab needs."
        ),
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="With --node: the agent's configuration file.")
    ] = None,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="Check for a lab with Kubernetes.")] = False,
    debian: Annotated[
        str, typer.Option(metavar="RELEASE", help=f"Check for a lab whose nodes run Debian {' or '.join(SUITES)}.")
    ] = OF_NODES,
    lab: Annotated[
        str, typer.Option("--lab", metavar="NAME", envvar="PODFERRY_LAB", help="The lab's name.")
    ] = "default",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether this machine can run the lab, or with --node be a node, and what to do about what it lacks.

    Nothing is changed: what can be tried is tried in namespaces that are gone afterwards. Exit code 0 means that it can, 3
    that something is in the way. `podferry lab up` asks the same first.

    Examples:

    [bold]podferry doctor[/]

    [bold]podferry doctor --node --json | jq '.findings[] | select(.verdict == "blocked")'[/]
    """
    if debian not in SUITES:
        raise UsageError(f"nodes cannot be made of Debian {debian!r}", remedy=f"take {' or '.join(SUITES)}")
    if config is not None and not node:
        raise UsageError("--config needs --node", remedy="podferry doctor --node --config FILE")
    findings = _of_node(config) if node else _of_lab(lab, debian, kubernetes)
    verdict = worst(findings)
    if json:
        print_json(
            {
                "purpose": "node" if node else "lab",
                "verdict": verdict.value,
                "findings": [one.to_dict() for one in findings],
            }
        )
    else:
        for finding in findings:
            show(finding)
        stderr().print(words(SUMMARIES[verdict], MARKS[verdict][1]))
    if verdict is Verdict.BLOCKED:
        raise typer.Exit(Exit.REFUSED)


def show(finding: Finding) -> None:
    """One finding: what is there on a line; what follows and what to do below it."""
    mark, style = MARKS[finding.verdict]
    line = words(f"{mark:<11}", style)
    line.append_text(words(f"{finding.check}: {finding.found}"))
    stdout().print(line)
    for text in (finding.why, finding.remedy and f"what to do: {finding.remedy}"):
        if text:
            stdout().print(words(f"{'':<11}  {text}", "dim" if text == finding.why else ""))


def _of_lab(lab: str, debian: str, kubernetes: bool) -> list[Finding]:
    from podferry.lab.hostfacts import examine
    from podferry.lab.state import check_name

    return examine(check_name(lab), debian=debian, kubernetes=kubernetes)


def _of_node(path: Path | None) -> list[Finding]:
    from podferry.agent.doctor_facts import node_host
    from podferry.core.nodehost import findings
    from podferry.workload.config import Config, load

    return findings(node_host(load(path) if path else Config("", "", Path())))
