"""`kubectl podferry` against the real API server, as a person or a script runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from anyio import to_thread

from podferry import __version__
from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import MIGRATIONS, NODE_DRAINS, NODES, PODS
from podferry.model import Connections

from .real import BINARIES
from .world import World

pytestmark = [pytest.mark.cluster, pytest.mark.anyio]
BIN = Path(sys.executable).parent
KUBECTL = str(BINARIES / "kubectl")

Run = Callable[..., Any]


@pytest.fixture
def run(real_world: World, control_plane: Path) -> Run:
    """Run it in the world's namespace: returns exit code, stdout and stderr."""

    def blocking(*argv: str, program: str = "kubectl-podferry") -> tuple[int, str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "KUBECONFIG": str(control_plane), "COLUMNS": "200"}
        argv = (str(BIN / program), *argv)
        done = subprocess.run(argv, check=False, env=environment, capture_output=True, text=True, timeout=90)
        return done.returncode, done.stdout, done.stderr

    async def run(*argv: str, **more: str) -> tuple[int, str, str]:
        return await to_thread.run_sync(partial(blocking, *argv, **more))

    return run


@pytest.fixture
def world(real_world: World) -> World:
    return real_world


async def test_check_says_what_stands_in_the_way_and_touches_nothing(world: World, run: Run) -> None:
    await world.pod("good")
    await world.pod(
        "bad", runtimeClassName=None, hostNetwork=True, volumes=[{"name": "h", "hostPath": {"path": "/srv"}}]
    )
    code, out, _ = await run("check", "good", "-n", world.namespace)
    assert (code, out.strip()) == (0, "good can move.")
    good, warning = await world.api.get(PODS, "good", world.namespace), "CRIU hands 300 MiB of memory to pipes"
    await world.migrate("good", "rehearsed", dryRun=True)
    done = {"phase": "Rehearsed", "sourcePod": {"name": "good", "uid": good["metadata"]["uid"]}, "warnings": [warning]}
    await world.patch(MIGRATIONS, "rehearsed", {"status": done}, world.namespace, part="status")
    code, out, _ = await run("check", "good", "-n", world.namespace)
    assert (code, out.splitlines()) == (0, ["good can move.", f"  mind: {warning}"])
    code, out, _ = await run("check", "good", "-n", world.namespace, "--json")
    assert json.loads(out)["warnings"] == [warning]
    await world.pod("tied", nodeSelector={"kubernetes.io/hostname": world.nodes[0]})
    code, out, err = await run("check", "tied", "-n", world.namespace)
    assert (code, "preferredDuringScheduling" in err) == (3, True)
    code, out, err = await run("check", "bad", "-n", world.namespace)
    assert code == 3
    assert "bad cannot move." in out
    for words in ("runtimeClassName: podferry", "/srv", "hostNetwork: true"):
        assert words in err
    code, out, _ = await run("check", "bad", "-n", world.namespace, "--json")
    reasons = [one["reason"] for one in json.loads(out)["refusals"]]
    assert (code, reasons) == (3, ["RuntimeClassMissing", "HostNetwork", "HostPath"])


async def test_migrate_follows_to_the_end(world: World, run: Run) -> None:
    await world.pod()
    world.controller()
    result: list[tuple[int, str, str]] = []

    async def migrate() -> None:
        result.append(await run("migrate", "train", "--name", "move", "-n", world.namespace))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(migrate)
        await world.until(partial(there, world))
        await world.agents_move()
    ((code, out, err),) = result
    assert code == 0, err
    assert "Completed" in out
    assert "42ms" in out
    assert "Scheduling" in err
    code, out, _ = await run("list", "-n", world.namespace)
    assert code == 0
    assert out.splitlines()[0].split() == ["NAME", "POD", "FROM", "TO", "PHASE", "PROGRESS", "DOWNTIME", "AGE"]
    assert "Completed" in out
    code, out, err = await run("get", "migrations", "-n", world.namespace, program=KUBECTL)
    columns, row = (line.split() for line in out.splitlines())
    assert columns == ["NAME", "POD", "FROM", "TO", "PHASE", "PROGRESS", "DOWNTIME", "AGE"], err
    assert row[:5] == ["move", "train", *world.nodes, "Completed"]
    assert "42ms" in row
    wait = ("wait", "--for=condition=Completed", "migration/move", "--timeout=10s", "-n", world.namespace)
    code, out, err = await run(*wait, program=KUBECTL)
    assert (code, out.strip()) == (0, "migration.podferry.dev/move condition met"), err
    code, out, _ = await run("explain", "move", "-n", world.namespace)
    assert code == 0
    assert out.index("Scheduled=True") < out.index("HandedOver=True")
    assert "MigrationCompleted" in out
    code, out, _ = await run("status", "move", "-n", world.namespace, "--json")
    assert (code, json.loads(out)["status"]["phase"]) == (0, "Completed")
    code, out, _ = await run("explain", "move", "-n", world.namespace, "--json")
    assert (code, json.loads(out)["migration"]["status"]["phase"]) == (0, "Completed")
    assert "MigrationCompleted" in {one["reason"] for one in json.loads(out)["events"]}
    code, out, _ = await run("list", "-n", world.namespace, "--json")
    assert (code, [one["metadata"]["name"] for one in json.loads(out)["migrations"]]) == (0, ["move"])
    code, _, err = await run("cancel", "move", "-n", world.namespace)
    assert code == 3
    assert "has ended" in err


async def there(world: World) -> bool:
    return await world.api.find(MIGRATIONS, "move", world.namespace) is not None


async def test_other_resources_are_asked_for_and_stay_as_they_were_asked_for(world: World, run: Run) -> None:
    await world.pod()
    words = ("--requests", "cpu=200m,memory=64Mi", "--limits", "main:memory=128Mi", "--name", "move")
    code, out, err = await run("migrate", "train", "--detach", "--json", *words, "-n", world.namespace)
    assert code == 0, err
    wanted = {"name": "main", "requests": {"cpu": "200m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}}
    assert json.loads(out)["spec"]["resources"] == [wanted]
    for other in ([], None, [{**wanted, "limits": {"memory": "1Gi"}}]):
        with pytest.raises(ApiFailed, match="resources cannot be changed"):
            await world.patch(MIGRATIONS, "move", {"spec": {"resources": other}}, world.namespace)
    for amount in ("much", "-1", "1" * 40):
        with pytest.raises(ApiFailed, match=r"spec\.resources"):
            await world.migrate(name="x", resources=[{"name": "main", "limits": {"cpu": amount}}])


async def test_a_refusal_is_exit_code_three_and_json_to_the_end(world: World, run: Run) -> None:
    await world.pod(hostNetwork=True)
    world.controller()
    code, out, _ = await run("migrate", "train", "-n", world.namespace, "--json")
    last = json.loads(out.splitlines()[-1])
    assert (code, last["status"]["phase"]) == (3, "Refused")
    assert last["status"]["ending"]["reason"] == "HostNetwork"


async def test_a_migration_that_is_gone_as_soon_as_it_has_ended_is_told_to_its_end(world: World, run: Run) -> None:
    await world.pod(hostNetwork=True)
    world.controller()
    code, out, err = await run("migrate", "train", "--ttl", "0s", "--name", "move", "-n", world.namespace)
    assert (code, "HostNetwork" in out) == (3, True), err

    async def gone() -> bool:
        return not await there(world)

    await world.until(gone)
    code, out, _ = await run("migrate", "train", "--ttl", "1.5h", "--detach", "--json", "-n", world.namespace)
    assert (code, json.loads(out)["spec"]["ttlSecondsAfterFinished"]) == (0, 5400)


async def test_cancel_waits_for_the_end(world: World, run: Run) -> None:
    await world.pod()
    world.controller()
    asked = ("--name", "move", "--connections", "require", "--detach")
    code, out, _ = await run("migrate", "train", *asked, "-n", world.namespace)
    assert (code, out.strip()) == (0, "migration/move created")
    assert (await world.get()).settings.connections is Connections.REQUIRE
    await world.reached(lambda one: one.status.phase == "Running")
    code, out, _ = await run("cancel", "move", "-n", world.namespace)
    assert code == 0
    assert "Cancelled" in out


async def test_what_makes_no_sense_is_said(world: World, run: Run, tmp_path: Path, control_plane: Path) -> None:
    code, _, err = await run("check", "nobody", "-n", world.namespace)
    assert code == 2
    assert "there is no pod nobody" in err
    code, _, err = await run("migrate", "train", "--timeout", "soon", "-n", world.namespace)
    assert code == 2
    assert "'soon' is not a duration" in err
    code, _, err = await run("migrate", "train", "--ttl", "soon", "-n", world.namespace)
    assert code == 2
    assert "'soon' is not a duration" in err
    code, _, err = await run("check", "train", "--connections", "require", "-n", world.namespace)
    assert code == 2
    assert "--connections needs --rehearse" in err
    code, _, err = await run("status", "nothing", "-n", world.namespace)
    assert code == 2
    assert "there is no Migration nothing" in err
    code, _, err = await run("list", "--kubeconfig", str(tmp_path / "none"))
    assert code == 3
    assert "no cluster is configured" in err
    gone = yaml.safe_load(control_plane.read_text())
    gone["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "gone").write_text(yaml.safe_dump(gone))
    code, _, err = await run("list", "--kubeconfig", str(tmp_path / "gone"))
    assert code == 7
    assert "https://127.0.0.1:9" in err


async def test_kubectl_finds_it_as_a_plugin(world: World, run: Run) -> None:
    code, out, err = await run("podferry", "version", program=KUBECTL)
    assert (code, out.strip()) == (0, f"kubectl-podferry {__version__}"), err
    code, out, _ = await run("podferry", "list", "-A", program=KUBECTL)
    assert code == 0


async def test_the_shell_completes_commands_and_pods(world: World, run: Run) -> None:
    await world.pod()
    code, out, _ = await run("mig", program="kubectl_complete-podferry")
    assert (code, out.split()) == (0, ["migrate", ":4"])
    code, out, _ = await run("migrate", "-n", world.namespace, "", program="kubectl_complete-podferry")
    assert (code, out.split()) == (0, ["train", ":4"])


async def test_a_node_is_drained_and_the_terminal_shows_each_pod(world: World, run: Run) -> None:
    node = world.nodes[0]
    world.also.append((NODE_DRAINS, node))
    await world.pod()
    await world.pod("tied", volumes=[{"name": "h", "hostPath": {"path": "/srv"}}])
    code, out, _ = await run("drain", node, "--dry-run", "--json")
    rows = {one["pod"]: one for one in json.loads(out)["pods"]}
    assert (code, rows["train"]["action"], rows["tied"]["action"]) == (0, "move", "leave")
    assert [one["reason"] for one in rows["tied"]["refusals"]] == ["HostPath"]
    assert "unschedulable" not in (await world.api.get(NODES, node))["spec"], "a dry run touches nothing"
    world.controller()
    result: list[tuple[int, str, str]] = []

    async def drain() -> None:
        result.append(await run("drain", node))

    async def begun() -> bool:
        return bool((await world.api.list(MIGRATIONS, world.namespace))[0])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain)
        await world.until(begun)
        (made,) = (await world.api.list(MIGRATIONS, world.namespace))[0]
        await world.agents_move(made["metadata"]["name"])
    ((code, out, err),) = result
    assert code == 5, err
    assert f"{world.namespace}/train: moved to {world.nodes[1]}, stopped for 42ms" in err
    assert "1 pods stay" in err
    assert "--evict-others" in err
    assert "Incomplete" in out
    code, out, err = await run("get", "nodedrains", program=KUBECTL)
    assert out.splitlines()[0].split() == ["NAME", "PHASE", "PODS", "MOVED", "LEFT", "REMAINING", "AGE"], err
    code, _, err = await run("drain", node, "--stop")
    assert (code, "is not being drained" in err) == (2, True)
    code, _, err = await run("drain", "no-such-node")
    assert (code, "there is no node no-such-node" in err) == (2, True)


async def test_list_watch_says_each_change_until_ctrl_c(world: World, control_plane: Path) -> None:
    await world.pod()
    world.controller()
    environment = {**os.environ, "KUBECONFIG": str(control_plane), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    argv = [str(BIN / "kubectl-podferry"), "list", "-n", world.namespace, "--watch"]
    async with await anyio.open_process(argv, env=environment, stderr=None) as watching:
        await world.migrate()
        await world.agents_move()
        assert watching.stdout is not None
        said = ""
        with anyio.fail_after(60):
            while "Completed" not in said:
                said += (await watching.stdout.receive()).decode()
        watching.send_signal(signal.SIGINT)
        with anyio.fail_after(30):
            assert await watching.wait() == 130
    assert "move  train" in said
    assert f"{world.nodes[0]} > {world.nodes[1]}" in said
    assert "stopped for 42ms" in said


async def test_a_report_holds_what_a_bug_report_needs_and_no_secret(world: World, run: Run, tmp_path: Path) -> None:
    secrets = ("hunter2", "--password=x", "s3cr3t-header", "annotated")
    main = {
        "name": "main",
        "image": "train",
        "command": ["train", "--password=x"],
        "env": [{"name": "TOKEN", "value": "hunter2"}],
        "livenessProbe": {"httpGet": {"port": 80, "httpHeaders": [{"name": "A", "value": "s3cr3t-header"}]}},
    }
    await world.pod(containers=[main])
    await world.patch(PODS, "train", {"metadata": {"annotations": {"example.com/x": "annotated"}}}, world.namespace)
    world.controller()
    await world.migrate()
    await world.reached(lambda one: one.status.phase == "Running")
    await world.agents_end("rolled-back", "move", "Engine", "the link broke")
    await world.ended()
    file = tmp_path / "found.tar.gz"
    code, out, err = await run("report", "move", "-n", world.namespace, "-o", str(file))
    assert (code, "migration.json" in out) == (0, True), err
    with tarfile.open(file) as tar:
        files = {
            Path(one.name).name: content.read().decode()
            for one in tar.getmembers()
            if (content := tar.extractfile(one)) is not None
        }
    assert {"README.txt", "events.json", "migration.json", "nodes.json", "source-pod.json", "versions.json"} == set(
        files
    )
    assert "the link broke" in files["migration.json"]
    assert "MigrationRolledBack" in files["events.json"]
    assert "TOKEN" in files["source-pod.json"], "what there is of it is told"
    assert [one for one in secrets if any(one in text for text in files.values())] == []
    assert json.loads(files["versions.json"])["kubernetes"]["gitVersion"].startswith("v1.")
    code, _, err = await run("report", "move", "-n", world.namespace, "-o", str(file))
    assert (code, "is there already" in err) == (3, True)
