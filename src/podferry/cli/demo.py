"""`podferry lab demo`: a computing job moves between two nodes while it runs, and its result proves that nothing was lost."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from podferry.cli import chart, demo_job, demo_kubernetes, units
from podferry.cli.agent_client import AgentClient
from podferry.cli.demo_verdict import (
    CANDIDATES,
    EVERY,
    MEBIBYTES,
    MOVE_AT,
    MOVED,
    SOURCE,
    TARGET,
    TWIN,
    announce,
    compare,
)
from podferry.cli.migrate import Follower
from podferry.cli.record import Record
from podferry.cli.terminal import stderr, stdout, steps, words
from podferry.cli.views import EventView, choose
from podferry.errors import Failed, PodferryError, UsageError
from podferry.lab import Lab, containers, root_images
from podferry.lab.kubernetes import daemons
from podferry.lab.state import CACHE, require_root
from podferry.model import Mode, Outcome

LAB = "demo"
LEAST_MEBIBYTES, STEPS, LEAST_STEPS = 16, 1800, 900
WAYS = {
    Mode.LIVE: "It moves to {} while it computes.",
    Mode.POSTCOPY: "It moves to {} at once, and fetches its memory while it computes there.",
    Mode.STOP: "It moves to {}, frozen meanwhile.",
}
BUNDLES = Path("run/containerd/io.containerd.runtime.v2.task") / containers.NAMESPACE


def demo(
    *,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the move's record as a page, as `podferry explain` does.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="The mode of the move, as for `podferry migrate`.")] = Mode.LIVE,
    steps_: Annotated[
        int, typer.Option("--steps", metavar="N", min=LEAST_STEPS, help="The number of steps that the job computes.")
    ] = STEPS,
    memory: Annotated[
        int, typer.Option(metavar="MIB", min=LEAST_MEBIBYTES, help="How much memory the job rewrites.")
    ] = MEBIBYTES,
    name: Annotated[
        str, typer.Option("--lab", metavar="NAME", help="The name of the demo's lab, which must not be up already.")
    ] = LAB,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="Move the pod of a Job in a lab with Kubernetes, in mode live.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab and its containers up at the end.")] = False,
) -> None:
    """Move a computing job between two nodes, and prove that its result is the one of a job that never moved.

    Brings up a lab of its own and takes it down again. The first time builds the lab's images: a few minutes.

    Example: [bold]podferry lab demo --html demo.html[/]
    """
    require_root()
    if kubernetes and (html is not None or mode is not Mode.LIVE or memory != MEBIBYTES):
        raise UsageError("--kubernetes cannot be combined with --html, --memory or --mode", remedy="leave them out")
    if kubernetes:
        daemons.directory()
    lab, began = Lab(name), time.monotonic()
    if lab.exists():
        raise UsageError(
            f"lab {name} is up already", why="the demo takes its lab down", remedy=f"podferry lab down --lab {name}"
        )
    what = "Kubernetes, kubelets, " if kubernetes else ""
    announce(
        f"1. A lab of two nodes on this machine: {what}namespaces, containerd, runc, CRIU, a network file system, a 1 gbit "
        f"link. {_first()}"
    )
    try:
        with steps() as progress:
            lab.up(2, kubernetes=kubernetes, progress=progress)
        if kubernetes:
            demo_kubernetes.act(lab, steps_)
        else:
            _act(lab, mode, steps_, memory, html)
    finally:
        if keep:
            announce(f"\nThe lab stays: podferry --lab {name} ps; podferry lab down --lab {name} removes it.")
        else:
            announce("\nThe lab goes; nothing is left behind but a cache of its images.")
            with steps() as progress:
                lab.down(progress)
    stderr().print(words(f"The demo took {units.duration((time.monotonic() - began) * 1000)}.", "dim"))


def _first() -> str:
    """What is built before the lab starts, and how long that usually takes in all."""
    if not (missing := root_images.unbuilt()):
        return "Its images are there already."
    names, seconds = " and ".join(one.name for one in missing), sum(one.seconds for one in missing)
    return f"Built first, and kept in {CACHE} for the next time: {names}, usually in {seconds} s."


def _act(lab: Lab, mode: Mode, count: int, memory: int, html: Path | None) -> None:
    announce(
        f"2. A job on {SOURCE} that rewrites {memory} MiB of memory all the time; each value depends on the ones before. "
        f"The same job on {TARGET}, to compare with: it stays where it is."
    )
    source = files("podferry.cli").joinpath("demo_job.py").read_text(encoding="utf-8")
    argv = ["python3", "-c", source, *map(str, (memory, count, CANDIDATES, EVERY))]
    for name, node in ((MOVED, SOURCE), (TWIN, TARGET)):
        containers.start(lab, node, name, argv)
    output = ContainerOutput(lab, MOVED)
    with output.shown(_print_line):
        output.wait_for(f"step {MOVE_AT} ")
    announce(f"3. {WAYS[mode].format(TARGET)}")
    record = _move(lab, output, mode)
    stdout().print(chart.summary(record))
    if html is not None:
        _write_page(record, html)
    if record.outcome is not Outcome.COMPLETED:
        raise Failed.because(
            "the job did not move",
            record.error or Failed(record.reason),
            remedy="podferry lab demo --keep leaves everything as it is, for a look",
        )
    announce(f"4. {TARGET} takes up the job where {SOURCE} left it.")
    with output.shown(_print_line):
        output.wait_for(demo_job.FINAL)
    announce("5. Both jobs are done. Is the result the same?")
    twin = ContainerOutput(lab, TWIN)
    twin.wait_for(demo_job.FINAL)
    compare(_facts(lab, TARGET, MOVED, output), _facts(lab, TARGET, TWIN, twin))


def _move(lab: Lab, output: ContainerOutput, mode: Mode) -> Record:
    view: EventView = choose(json=False)
    with output.shown(lambda line: view.note(f"job: {line}")):
        return Follower(AgentClient(lab.agent_socket(SOURCE)), view).run(
            name=MOVED,
            to=TARGET,
            mode=mode.value,
            timeout_s=None,
            max_downtime_ms=None,
            max_freeze_s=None,
            bandwidth=None,
            allow_postcopy=False,
        )


class ContainerOutput:
    """A container's output, read by a thread of its own across all moves; lines are complete ones."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lines: list[str] = []
        self._name = name
        self._news = threading.Condition()
        self._show: Callable[[str], None] | None = None
        self._ended: PodferryError | None = None
        threading.Thread(target=self._read, args=(lab,), daemon=True).start()

    @contextmanager
    def shown(self, show: Callable[[str], None]) -> Iterator[None]:
        """Pass each new line to `show` meanwhile."""
        self._show = show
        try:
            yield
        finally:
            self._show = None

    def wait_for(self, start: str) -> None:
        """Until a line begins with `start`. Raises what ended the output before."""
        with self._news:
            self._news.wait_for(lambda: self._ended or any(line.startswith(start) for line in self.lines))
            if not any(line.startswith(start) for line in self.lines):
                assert self._ended is not None
                raise self._ended

    def _read(self, lab: Lab) -> None:
        ended: PodferryError = Failed(f"the container {self._name} ended before its work was done")
        try:
            rest = ""
            for chunk in containers.output(lab, self._name, follow=True):
                *lines, rest = (rest + chunk.decode(errors="replace")).split("\n")
                for line in lines:
                    self._take(line)
            ended.evidence = self.lines[-3:]
        except PodferryError as error:
            ended = error
        with self._news:
            self._ended = ended
            self._news.notify_all()

    def _take(self, line: str) -> None:
        with self._news:
            self.lines.append(line)
            self._news.notify_all()
        if (show := self._show) is not None:
            show(line)


def _facts(lab: Lab, node: str, name: str, output: ContainerOutput) -> dict[str, str]:
    """What the job left: its last line, all its lines, and the file that it appended to."""
    if (there := containers.find(lab, name)) != node:
        raise Failed(f"the container {name} is on {there or 'no node'}", why=f"it should be on {node}")
    path = lab.root(node) / BUNDLES / name / "rootfs" / str(demo_job.LEDGER).lstrip("/")
    try:
        ledger = path.read_bytes()
    except OSError as gone:
        raise Failed.because(f"cannot read what the container {name} wrote to {demo_job.LEDGER}", gone) from gone
    text = "\n".join(output.lines).encode()
    return {
        "final checksum": output.lines[-1].split()[-1],
        f"{len(output.lines)} lines of output": hashlib.sha256(text).hexdigest(),
        f"{ledger.count(10)} lines in its file": hashlib.sha256(ledger).hexdigest(),
    }


def _write_page(record: Record, path: Path) -> None:
    from podferry.cli.page import page

    try:
        path.write_text(page(record), encoding="utf-8")
    except OSError as unwritable:
        raise UsageError(f"cannot write {path}", why=unwritable.strerror or str(unwritable)) from unwritable
    announce(f"The move as a page: {path}")


def _print_line(line: str) -> None:
    stderr().print(words(f"  job: {line}", "dim"))
