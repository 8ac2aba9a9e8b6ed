"""What the lab tests of migrations share: two nodes with a job on one of them, and eyes that miss nothing that is left behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from podferry.cli.agent_client import AgentClient, AgentUnreachable
from podferry.errors import PodferryError
from podferry.lab import Lab, cgroups, containers
from podferry.node.containerd import Containerd

A, B = NODES = ("node-a", "node-b")
JOBS = Path(__file__).parent / "jobs"
PATIENCE = 180.0
POLL_INTERVAL = 0.02
GATES = "run/podferry/gates"
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/default"
SERVICES = ("tini", "runsvdir", "runsv", "containerd", "glusterfs", "agent", "images")

Record = dict[str, Any]


def other(node: str) -> str:
    """The node that a job on `node` moves to."""
    return B if node == A else A


def until(holds: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """Wait for what happens elsewhere and tells nobody; returns what `holds` did. A minute is more than it ever takes."""
    deadline = time.monotonic() + patience
    while not (found := holds()):
        assert time.monotonic() < deadline, f"it never came to be: {what or holds}"
        time.sleep(POLL_INTERVAL)
    return found


class Process:
    """A process of a node, as this machine sees it: `name` tells what it is for, `job` whose container it is in."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        stat = Path(f"/proc/{pid}/stat").read_text()
        comm, _, fields = stat.partition("(")[2].rpartition(")")
        self.zombie = fields.split()[0] in "ZX"
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        members = [line.split(":", 2)[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
        self.job = next((path.rsplit("/", 1)[1] for path in members if "/default/" in path), "")
        self.name = comm
        if "podferry.agent" in argv:
            self.name = "agent"
        elif module := next((word for word in argv if word.startswith("podferry.")), None):
            self.name = module.rsplit(".", 1)[1]
        elif comm.startswith("containerd-shim"):
            self.name = f"shim {argv[argv.index('-id') + 1]}" if "-id" in argv else "shim"


class Cluster:
    """The session's lab, its agents and their breakpoints, and the job that this test moves."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._pool = ThreadPoolExecutor(64)
        self._roots: dict[str, Path] = {}
        self._containerds: dict[tuple[str, int], Containerd] = {}
        self.at_rest = {node: self._at_rest(node) for node in NODES}

    def root(self, node: str) -> Path:
        """A node's root directory. Asked all the time, so the first process is looked for only once in its life."""
        if not (root := self._roots.get(node)) or not root.exists():
            root = self._roots[node] = self.lab.root(node)
        return root

    # What people do.

    def agent(self, node: str) -> AgentClient:
        """The agent of `node`."""
        return AgentClient(self.root(node) / "run/podferry/agent.sock")

    def start(self, name: str, script: str, *argv: str, node: str = A) -> None:
        """Start a job of `jobs/`, of one file or of several after each other, and wait until it has begun to count."""
        text = "\n".join((JOBS / f"{one}.py").read_text() for one in script.split())
        containers.start(self.lab, node, name, ["python3", "-u", "-c", text, *argv])
        until(lambda: self.counted(node, name) > 0, f"{name} counts on {node}")

    def stop(self, name: str) -> None:
        """Remove a job, wherever it is, and its log."""
        for node in NODES:
            with suppress(PodferryError):
                self.lab.exec(node, ["ctr", "task", "delete", "--force", name], check=False, timeout=30.0)
                self.lab.exec(node, ["ctr", "container", "delete", name], check=False)
                self.log(node, name).unlink(missing_ok=True)
                (self.root(node) / "run/podferry/restored" / name).unlink(missing_ok=True)

    def migrate(self, name: str, *, source: str, mode: str = "stop", **more: Any) -> Record:
        """Move `name` to the other node, and wait for the end. However busy the machine is, its job may stand still so long."""
        more.setdefault("max_freeze_s", PATIENCE)
        found = self.agent(source).call("migrate", timeout=PATIENCE, name=name, to=other(source), mode=mode, **more)
        assert isinstance(found, dict)
        return found

    def begin(self, name: str, *, source: str, mode: str = "stop", **more: Any) -> Future[Record]:
        """Move `name`, and do not wait."""
        return self._pool.submit(lambda: self.migrate(name, source=source, mode=mode, **more))

    def records(self, node: str) -> list[Record]:
        """What the agent of `node` remembers; waits for one that has just been killed."""

        def ask() -> list[list[Record]]:
            with suppress(AgentUnreachable):
                return [self.agent(node).call("status")]
            return []

        found: list[Record] = until(ask, f"the agent of {node} answers")[0]
        return found

    def record(self, node: str, name: str) -> Record:
        """The latest record of `name` on `node`."""
        return [one for one in self.records(node) if one["name"] == name][-1]

    def ended(self, node: str, name: str) -> Record:
        """Wait until the latest migration of `name` has ended on `node`; its record."""
        until(lambda: self.record(node, name)["outcome"], f"the migration of {name} has ended on {node}")
        return self.record(node, name)

    def cancel(self, node: str, name: str) -> None:
        """Ask for the way back, and do not wait."""
        id = self.record(node, name)["id"]
        self._pool.submit(lambda: self.agent(node).call("cancel", id=id))

    def containerd(self, node: str) -> Containerd:
        """containerd of `node`; one that has been killed is waited for."""
        pid = self.lab.node(node).pid
        assert pid is not None
        if (node, pid) not in self._containerds:
            self._containerds[node, pid] = Containerd(self.root(node) / "run/containerd/containerd.sock")
        return self._containerds[node, pid]

    # Gates.

    def close_breakpoint(self, gate: str) -> None:
        """Close a gate, named `ROLE-PHASE-JOB`, on both nodes."""
        for node in NODES:
            self._gate(node, gate).parent.mkdir(exist_ok=True)
            self._gate(node, f"{gate}.reached").unlink(missing_ok=True)
            self._gate(node, gate).touch()

    def open_breakpoints(self, pattern: str = "*") -> None:
        """Let everybody through the breakpoints that match."""
        for node in NODES:
            with suppress(PodferryError, OSError):
                for gate in self._gate(node, "x").parent.glob(pattern):
                    if gate.suffix != ".reached":
                        gate.unlink(missing_ok=True)

    def reached(self, gate: str, move: Future[Record] | None = None) -> None:
        """Wait until an agent stands at a gate, which comes before the end of `move`."""

        def stands() -> bool:
            assert not (move and move.done()), f"the migration ended before {gate}: {move.result()}"
            return any(self._gate(node, f"{gate}.reached").exists() for node in NODES)

        until(stands, f"somebody reaches {gate}")

    def _gate(self, node: str, gate: str) -> Path:
        return self.root(node) / GATES / gate

    def install_gates(self) -> None:
        """Have the agents look for breakpoints from their next start on, which is now."""
        for node in NODES:
            run = self.root(node) / "run/service/agent/run"
            text = run.read_text()
            if "PODFERRY_BREAKPOINTS" not in text:
                run.write_text(text.replace("exec ", f"export PODFERRY_BREAKPOINTS=/{GATES}\nexec ", 1))
                self.kill(node, "agent")

    # Disasters.

    def processes(self, node: str) -> Iterator[Process]:
        """The processes of `node`."""
        for one in cgroups.processes(self.lab.name, node):
            with suppress(OSError, IndexError, ValueError):
                yield Process(one.pid)

    def kill(self, node: str, name: str, *, again: bool = True) -> bool:
        """Kill -9 the processes of this name, as far as there are any. With `again` an agent is waited for."""
        doomed = [one for one in self.processes(node) if one.name == name and not one.zombie]
        for one in doomed:
            with suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        if name == "agent" and again:
            until(lambda: not any(Path(f"/proc/{one.pid}").exists() for one in doomed), "the old agent is gone")
            self.records(node)
        return bool(doomed)

    # What can be seen.

    def log(self, node: str, name: str) -> Path:
        """Where a job's output goes."""
        return self.root(node) / f"{containers.LOGS}/{name}.log".lstrip("/")

    def lines(self, node: str, name: str) -> list[str]:
        """A job's whole lines of output."""
        try:
            return self.log(node, name).read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []

    def counted(self, node: str, name: str) -> int:
        """How many lines there are in a job's output on `node`."""
        return len(self.lines(node, name))

    def goes_on(self, node: str, name: str, more: int = 3) -> None:
        """Wait until a job on `node` has counted on."""
        before = self.counted(node, name)

        def counts() -> bool:
            last = self.lines(node, name)[-1:]
            assert not last or not last[0].startswith("BAD"), last[0]
            return self.counted(node, name) >= before + more

        until(counts, f"{name} counts on {node}")

    def traces(self, node: str) -> set[str]:
        """Everything on a node that a job, a migration or a failed one may leave there."""
        root = self.root(node)
        found = set()
        for kind in ("incoming", "outgoing", "arriving", "restored"):
            with suppress(FileNotFoundError):
                found |= {f"{kind} {one.name}" for one in (root / "run/podferry" / kind).iterdir()}
        listing = self.lab.exec(
            node, ["sh", "-c", "ctr c ls -q; echo -; ctr snapshots --snapshotter podferry ls; echo -; ctr task ls -q"]
        ).stdout
        records, snapshots, tasks = (part.splitlines() for part in listing.split("-\n"))
        found |= {f"container {name}" for name in records} | {f"task {name}" for name in tasks}
        found |= {f"snapshot {line.split()[0]}" for line in snapshots[1:] if "Active" in line}
        found |= {f"log {path.stem}" for path in self.log(node, "x").parent.glob("*.log")}
        for one in self.processes(node):
            if one.zombie and one.name != "glusterfs":
                found.add(f"zombie {one.name}")
            elif one.job:
                found.add(f"running {one.job}")
            elif one.name not in SERVICES and not one.zombie:
                found.add(f"process {one.name}")
        pid = self.lab.node(node).pid
        for line in Path(f"/proc/{pid}/mounts").read_text().splitlines():
            where = line.split()[1]
            if where.startswith(("/run/containerd", "/run/podferry", "/tmp", "/var/lib/containerd")):
                found.add(f"mount {where.removeprefix(BUNDLES)}")
        for freezer in (root / "sys/fs/cgroup/freezer/default", root / "sys/fs/cgroup/default"):
            for group in freezer.glob("*/"):
                found.add(f"cgroup {group.name}")
                with suppress(OSError):
                    if "FROZEN" in (group / "freezer.state").read_text():
                        found.add(f"frozen {group.name}")
        return found

    def said(self, lines: int = 40) -> str:
        """The last lines of what both agents logged."""
        logs = {node: self.root(node) / "var/log/podferry/agent.log" for node in NODES}
        return "\n".join(
            f"-- agent of {node}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for node, path in logs.items()
        )

    def descriptors(self, node: str) -> int:
        """How many descriptors the agent of `node` has open."""
        agent = next(one.pid for one in self.processes(node) if one.name == "agent")
        return sum(1 for _ in Path(f"/proc/{agent}/fd").iterdir())

    def _at_rest(self, node: str) -> set[str]:
        """What is on a node before anything moves, once the layers of an image that was just pulled are packed."""
        found = until(lambda: "process mkfs.erofs" not in (now := self.traces(node)) and now, f"{node} is at rest")
        assert isinstance(found, set)
        return found

    def surplus(self, node: str, *jobs: str, dead: Sequence[str] = ()) -> set[str]:
        """What there is on `node` beyond its rest, the running `jobs` and what is kept of the `dead`; and what these lack."""
        wanted = set(self.at_rest[node])
        for job in dead:
            wanted |= {f"{kind} {job}" for kind in ("container", "snapshot", "log")}
        for job in jobs:
            wanted |= {f"{kind} {job}" for kind in ("container", "snapshot", "task", "log", "running", "cgroup")}
            wanted |= {f"process shim {job}", f"mount /{job}/rootfs"}
        found = self.traces(node) - {f"restored {job}" for job in (*jobs, *dead)}
        return {f"+ {one}" for one in found - wanted} | {f"- {one}" for one in wanted - found}

    def only_on(self, node: str, name: str) -> None:
        """The job runs on `node`, as an ordinary container does, and there is no trace of it or its moves elsewhere."""
        self.goes_on(node, name)
        self.nothing_but({node: [name]})

    def nothing_but(
        self, jobs: dict[str, list[str]], *, dead: dict[str, list[str]] | None = None, besides: Sequence[str] = ()
    ) -> None:
        """Nothing is on either node beyond these jobs, by node, and what is kept of the `dead`, and of that nothing is missing;
        `besides` are not looked at."""

        def surplus(node: str) -> set[str]:
            found = self.surplus(node, *jobs.get(node, []), dead=(dead or {}).get(node, []))
            return {one for one in found if not any(job in one for job in besides)}

        deadline = time.monotonic() + PATIENCE / 2
        while left := {node: found for node in NODES if (found := surplus(node))}:
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(5 * POLL_INTERVAL)


class Witness:
    """Keeps every file open that the output of `jobs` went to, on either node, also those that were removed.

    A job's lines are `COUNT TIME`. Had two copies run, one count would have been written at two times (I1).
    """

    def __init__(self, cluster: Cluster, *jobs: str) -> None:
        self._cluster, self._jobs = cluster, jobs
        self._files: dict[tuple[str, str, int], Any] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Witness:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        for file in self._files.values():
            file.close()

    def testify(self, job: str) -> None:
        """No count of `job` was written twice, and none was left out."""
        self._look()
        times: dict[int, str] = {}
        for (name, node, _), file in list(self._files.items()):
            if name == job:
                file.seek(0)
                lines = [line.split(" ", 1) for line in file.read().split("\n")[:-1]]
                assert [int(number) for number, _ in lines] == list(range(len(lines))), f"a gap or repeat on {node}"
                for number, time_of in lines:
                    assert times.setdefault(int(number), time_of) == time_of, (
                        f"count {number} ran twice, also on {node}"
                    )

    def _watch(self) -> None:
        while not self._over.wait(POLL_INTERVAL):
            self._look()

    def _look(self) -> None:
        for node in NODES:
            for job in self._jobs:
                with suppress(OSError, PodferryError):
                    path = self._cluster.log(node, job)
                    key = (job, node, path.stat().st_ino)
                    if key not in self._files:
                        self._files[key] = path.open()
