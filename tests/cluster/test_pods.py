"""Pods move between two nodes of a real cluster, by the agents' engine alone: the test stands in for the controller."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from podferry.lab import Lab

from .moving_pods import A, B, Json, Move, Movers, also, pod, until

pytestmark = pytest.mark.cluster

COUNT = """
import itertools, time
block = bytearray(16 << 20)
for n in itertools.count():
    block[n * 4096 % len(block)] = n % 256
    print(n, flush=True)
    time.sleep(0.05)
"""
WRITER = """
import itertools, mmap, os, socket, threading, time
os.makedirs('/data/deep/er', exist_ok=True)
shm = open('/dev/shm/counter', 'wb+'); shm.write(bytes(4096)); shm.flush()
shared = mmap.mmap(shm.fileno(), 4096)
server = socket.create_server(('', 8000))
def serve():
    while True:
        connection, _ = server.accept()
        connection.sendall(b'%d' % shared[0]); connection.close()
threading.Thread(target=serve, daemon=True).start()
upper = open('/var/tmp/mine', 'a')
for n in itertools.count():
    shared[0:8] = n.to_bytes(8, 'little')
    for place in ('/data/deep/er/count', '/mem/count'):
        with open(place + '.new', 'w') as file: file.write(str(n))
        os.rename(place + '.new', place)
    upper.write(f'{n}\\n'); upper.flush()
    print(n, flush=True)
    time.sleep(0.05)
"""
READER = """
import itertools, os, time
while not os.path.exists('/mem/count'): time.sleep(0.05)
upper = open('/var/tmp/mine', 'a')
shm = open('/dev/shm/counter', 'rb', buffering=0)
for n in itertools.count():
    shm.seek(0)
    print(n, int.from_bytes(shm.read(8), 'little'), open('/data/deep/er/count').read(), open('/mem/count').read(), flush=True)
    upper.write(f'{n}\\n'); upper.flush()
    time.sleep(0.05)
"""
CHOOSER = """
import ctypes, fcntl, itertools, os, socket, time
libc = ctypes.CDLL(None)
set_io, get_io, set_policy, get_policy = (251, 252, 238, 239) if os.uname().machine == 'x86_64' else (30, 31, 237, 236)
os.sched_setaffinity(0, {0}); libc.syscall(set_io, 1, 0, 2 << 13 | 5); libc.prctl(29, 123456)
libc.syscall(set_policy, 2, ctypes.byref(ctypes.c_ulong(1)), 64)
server = socket.create_server(('', 0)); server.setsockopt(6, 1, 1); server.setsockopt(6, 18, 12345)
near, far = os.pipe(); fcntl.fcntl(far, 1031, 1 << 18)
os.makedirs('/srv/deep'); watch = libc.inotify_init1(os.O_NONBLOCK); libc.inotify_add_watch(watch, b'/srv/deep', 0x100)
def policy():
    mode = ctypes.c_int()
    libc.syscall(get_policy, ctypes.byref(mode), None, 0, None, 0)
    return mode.value
def found():
    sockets = server.getsockopt(6, 1), server.getsockopt(6, 18), fcntl.fcntl(near, 1032)
    return os.sched_getaffinity(0), libc.syscall(get_io, 1, 0), libc.prctl(30), *sockets
chosen = found()
assert chosen == ({0}, 2 << 13 | 5, 123456, 1, 12345, 1 << 18), chosen
for n in itertools.count():
    assert found() == chosen, found()
    for _ in range(100):  # a thread sets it by itself, some milliseconds after it goes on
        if policy() == 2: break
        time.sleep(0.05)
    assert policy() == 2, policy()
    open(f'/srv/deep/{n}', 'w').close()
    assert os.read(watch, 4096)
    os.unlink(f'/srv/deep/{n}')
    print(n, flush=True)
    time.sleep(0.02)
"""
VOLUMES = [{"name": "data", "emptyDir": {}}, {"name": "mem", "emptyDir": {"medium": "Memory"}}]
MOUNTS = [{"name": "data", "mountPath": "/data"}, {"name": "mem", "mountPath": "/mem"}]


STAYS = "stays"
"""The label of a pod that outlives the test that began it."""


@pytest.fixture(scope="module")
def movers(bare: Lab) -> Iterator[Movers]:
    """The agents. In the end no pod is left in the namespace, and of no pod anything on the nodes."""
    movers = Movers(bare)
    yield movers
    movers.kubectl.run("delete", "pod", "--all", "--wait", "--grace-period=1")
    nothing_is_left(movers)
    movers.stop()


@pytest.fixture
def clean(movers: Movers) -> Iterator[Movers]:
    """The agents; afterwards nothing of the test's moves is left on the nodes. Its pods end while the next test begins."""
    yield movers
    movers.kubectl.run("delete", "pod", "-l", f"!{STAYS}", "--wait=false", "--grace-period=1")
    nothing_is_left(movers)


def nothing_is_left(movers: Movers) -> None:
    for node in (A, B):
        until(lambda node=node: not movers.leftovers(node), f"nothing is left on {node}")


@pytest.fixture(scope="module", autouse=True)
def cold(request: pytest.FixtureRequest, movers: Movers) -> None:
    """A pod that nobody will ever move in. Its runtime waits for a minute, so it is made before the other tests."""
    if not is_wanted(request, test_a_pod_made_for_a_migration_never_starts_cold):
        return
    manifest = pod("cold", COUNT)
    manifest["metadata"] |= {"labels": {STAYS: "yes"}, "annotations": {"podferry.dev/migration": "nobody-knows"}}
    manifest["spec"]["nodeName"] = B
    movers.kubectl.run("create", "-f", "-", input=json.dumps(manifest))


@pytest.fixture(scope="module", autouse=True)
def deleted(request: pytest.FixtureRequest, movers: Movers) -> tuple[Move, Path] | None:
    """A move whose target pod is deleted while it waits, before the source may freeze; and the gate that keeps it from that.

    The kubelet is busy starting the container until it loses patience, after two minutes: all the other tests.
    """
    if not is_wanted(request, test_a_target_pod_that_is_deleted_while_it_waits_ends_the_move_before_the_freeze):
        return None
    write = "if n % 10 == 0: block[:] = bytes([n % 256]) * len(block)"
    busy = COUNT.replace("time.sleep(0.05)", f"time.sleep(0.05)\n    {write}")
    manifest = pod("deleted", busy.replace("16 << 20", "64 << 20"))
    manifest["metadata"]["labels"] = {STAYS: "yes"}
    here = movers.create(manifest)
    gate = movers.close_breakpoint("source-cut-over-default_deleted")
    move = movers.order(here, B, policy={"max_downtime": 10.0})
    movers.make_target(move)
    until(gate.with_name(f"{gate.name}.reached").exists, "the source is about to cut over")
    assert move.target_pod is not None
    movers.under_way.append(move)
    movers.kubectl.run("delete", "pod", move.target_pod["metadata"]["name"], "--wait=false", "--grace-period=1")
    return move, gate


def is_wanted(request: pytest.FixtureRequest, test: Callable[..., None]) -> bool:
    return any(getattr(item, "function", None) is test for item in request.session.items)


def counts_on(movers: Movers, target: Json, container: str = "main") -> list[str]:
    """Wait until a container has counted on after its move; its lines, which have neither gap nor repeat."""
    name = target["metadata"]["name"]
    before = len(movers.logs(name, container))
    until(lambda: len(movers.logs(name, container)) > before + 5, f"{container} of {name} counts")
    lines = movers.logs(name, container)
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))
    return lines


def never_restarted(target: Json) -> bool:
    status = target["status"]
    all_of = status["containerStatuses"] + status.get("initContainerStatuses", [])
    return all(one["restartCount"] == 0 and "running" in one["state"] for one in all_of)


@pytest.mark.parametrize("mode", ["stop", "live", "postcopy"])
def test_there_and_back(clean: Movers, mode: str) -> None:
    here = clean.create(pod(f"count-{mode}", COUNT))
    counts_on(clean, here)
    for _ in range(2):
        here, record = clean.move(here, mode)
        assert never_restarted(clean.get(here["metadata"]["name"]))
        counts_on(clean, here)
        assert record["downtime_ms"] > 0


def test_containers_volumes_shared_memory_and_a_listening_socket_move_together(clean: Movers) -> None:
    main = pod("several", WRITER, volumes=VOLUMES)
    main["spec"]["containers"][0]["volumeMounts"] = MOUNTS
    main["spec"]["containers"].append(also(READER, volumeMounts=MOUNTS))
    here = clean.create(main)
    counts_on(clean, here, "other")
    for _ in range(2):
        here, _ = clean.move(here)
        name = here["metadata"]["name"]
        counts_on(clean, here)
        for line in counts_on(clean, here, "other"):
            shm, data, mem = map(int, line.split()[1:])
            assert shm - 1 <= data <= mem + 1, "what the container sees of the others is of another time"
        assert never_restarted(clean.get(name))
        for container in ("main", "other"):
            written = clean.kubectl.run("exec", name, "-c", container, "--", "cat", "/var/tmp/mine").stdout.split()
            assert [int(one) for one in written] == list(range(len(written)))
        ask = "import socket; print(socket.create_connection(('127.0.0.1', 8000), 5).recv(9))"
        assert "b'" in clean.kubectl.run("exec", name, "-c", "main", "--", "python3", "-c", ask).stdout


def test_what_each_container_has_chosen_it_keeps(clean: Movers) -> None:
    main = pod("chooser", CHOOSER)
    main["spec"]["containers"].append(also(CHOOSER))
    here = clean.create(main)
    counts_on(clean, here)
    for _ in range(2):
        here, record = clean.move(here)
        for container in ("main", "other"):
            counts_on(clean, here, container)
        assert never_restarted(clean.get(here["metadata"]["name"]))
        assert record["differences"] == []


def test_a_line_of_which_only_the_beginning_was_printed_is_whole_in_the_log(clean: Movers) -> None:
    script = "import itertools, time\nfor n in itertools.count(): print(n, end=' ... ', flush=True); time.sleep(0.2); print('done')"
    here = clean.create(pod("cut", script))
    counts_on(clean, here)
    for _ in range(2):
        here, _ = clean.move(here)
        lines = counts_on(clean, here)
        assert lines[:-1] == [f"{n} ... done" for n in range(len(lines) - 1)]


def test_a_sidecar_moves_and_what_has_finished_does_not_run_again(clean: Movers) -> None:
    main = pod("sidecar", COUNT, volumes=VOLUMES)
    mark = "import time; open('/data/ran', 'a').write(f'{time.time()}\\n')"
    main["spec"]["initContainers"] = [
        also(mark, "first", volumeMounts=MOUNTS),
        also(COUNT, "side", restartPolicy="Always", startupProbe={"exec": {"command": ["true"]}, "periodSeconds": 1}),
    ]
    main["spec"]["containers"][0]["volumeMounts"] = MOUNTS
    here = clean.create(main)
    counts_on(clean, here)
    here, _ = clean.move(here)
    counts_on(clean, here)
    counts_on(clean, here, "side")
    assert never_restarted(clean.get(here["metadata"]["name"]))
    ran = clean.kubectl.run("exec", here["metadata"]["name"], "-c", "main", "--", "cat", "/data/ran").stdout
    assert len(ran.splitlines()) == 1


def test_what_ends_after_the_move_ends_as_it_would_have(clean: Movers) -> None:
    script = "import time, sys\nfor n in range(120): print(n, flush=True); time.sleep(0.05)\nsys.exit(7)"
    here = clean.create(pod("ends", script))
    here, _ = clean.move(here)
    name = here["metadata"]["name"]
    until(lambda: clean.get(name)["status"]["phase"] == "Failed", f"{name} ends")
    [status] = clean.get(name)["status"]["containerStatuses"]
    assert status["state"]["terminated"]["exitCode"] == 7
    assert [int(line) for line in clean.logs(name)] == list(range(120))


def test_last_words_written_before_the_move_and_after_it_are_read_at_the_end(clean: Movers) -> None:
    script = """
import time
words = open('/dev/termination-log', 'w'); words.write('before, '); words.flush()
for n in range(120): print(n, flush=True); time.sleep(0.05)
words.write('after'); words.close()
"""
    here, _ = clean.move(clean.create(pod("words", script)))
    name = here["metadata"]["name"]
    until(lambda: clean.get(name)["status"]["phase"] == "Succeeded", f"{name} ends")
    [status] = clean.get(name)["status"]["containerStatuses"]
    assert status["state"]["terminated"]["message"] == "before, after"


def test_probes_and_somebody_inside_do_not_stop_a_move(clean: Movers) -> None:
    probe = {
        "exec": {"command": ["python3", "-c", "pass"]},
        "periodSeconds": 1,
        "failureThreshold": 3,
        "timeoutSeconds": 5,
    }
    manifest = pod("probed", COUNT)
    manifest["spec"]["containers"][0] |= {"livenessProbe": probe, "readinessProbe": probe}
    here = clean.create(manifest)
    clean.visit(here)
    for _ in range(2):
        here, _ = clean.move(here)
        counts_on(clean, here)
    time.sleep(5)
    assert never_restarted(clean.get(here["metadata"]["name"]))


def test_a_restart_after_the_move_is_an_ordinary_one(clean: Movers) -> None:
    here = clean.create(pod("again", COUNT, restartPolicy="Always"))
    here, _ = clean.move(here)
    name = here["metadata"]["name"]
    counts_on(clean, here)
    kill_in(clean, here)
    until(lambda: restarts(clean.get(name)) == 1 and running(clean.get(name)), f"{name} is restarted")
    assert clean.logs(name)[0] == "0"


def test_the_controller_that_makes_no_pod_leaves_the_source_running(clean: Movers) -> None:
    here = clean.create(pod("quota", COUNT))
    move = clean.order(here, B)
    clean.hear(B, move.id, "wants-pod")
    clean.say(B, move.id, "pod", {"error": "exceeded quota: pods"})
    record = clean.ended(A, move)
    assert record["outcome"] == "rolled-back"
    assert "exceeded quota" in record["reason"]
    assert clean.said(B, move.id, "given-back") == [{}]
    counts_on(clean, clean.get("quota"))


def test_a_cancelled_move_gives_the_target_pod_back(clean: Movers) -> None:
    here = clean.create(pod("cancelled", COUNT))
    move = clean.order(here, B)
    clean.hear(B, move.id, "wants-pod")
    clean.say(A, move.id, "cancel", {})
    assert clean.ended(A, move)["outcome"] == "cancelled"
    clean.ended(B, move, "target")
    assert clean.said(B, move.id, "given-back") == [{}]
    counts_on(clean, clean.get("cancelled"))


@pytest.mark.parametrize(
    ("name", "spec", "reason"),
    [
        ("network", {"hostNetwork": True}, "shares namespaces with its node"),
        ("processes", {"shareProcessNamespace": True}, "shares namespaces with others"),
        ("path", {"volumes": [{"name": "data", "hostPath": {"path": "/tmp"}}]}, "directories of its node mounted"),
    ],
)
def test_what_cannot_move_is_refused_with_the_reason(
    clean: Movers, name: str, spec: dict[str, Any], reason: str
) -> None:
    manifest = pod(name, COUNT, **spec)
    if "volumes" in spec:
        manifest["spec"]["containers"][0]["volumeMounts"] = MOUNTS[:1]
    here = clean.create(manifest)
    record = clean.ended(A, clean.order(here, B))
    assert record["outcome"] == "refused"
    assert reason in record["reason"]
    counts_on(clean, clean.get(name))


def test_a_pod_made_for_a_migration_never_starts_cold(clean: Movers) -> None:
    """It was made before everything else here; by now its node's runtime has waited as long as it does."""
    refusal = "the container was to be restored, but its state does not come: it does not start anew"
    until(lambda: refusal in json.dumps(clean.get("cold")["status"]), "it is refused")
    assert clean.get("cold")["status"]["phase"] in ("Pending", "Failed")
    assert clean.kubectl.run("logs", "cold", check=False).stdout == ""


def test_a_target_pod_that_is_deleted_while_it_waits_ends_the_move_before_the_freeze(
    clean: Movers, deleted: tuple[Move, Path]
) -> None:
    move, gate = deleted
    assert clean.ended(B, move, "target")["outcome"] == "rolled-back"
    gate.unlink()
    record = clean.ended(A, move)
    assert record["outcome"] == "rolled-back"
    assert record["downtime_ms"] is None
    clean.under_way.remove(move)
    counts_on(clean, clean.get("deleted"))


def restarts(pod: Json) -> int:
    return sum(one["restartCount"] for one in pod["status"]["containerStatuses"])


def running(pod: Json) -> bool:
    return all("running" in one["state"] for one in pod["status"].get("containerStatuses", [{"state": {}}]))


def kill_in(movers: Movers, pod: Json) -> None:
    """kill -9 the first process of a pod's only container, from its node."""
    [status] = pod["status"]["containerStatuses"]
    id = status["containerID"].removeprefix("containerd://")
    node = pod["spec"]["nodeName"]
    state = json.loads((movers.root(node) / f"run/containerd/runc/k8s.io/{id}/state.json").read_text())
    movers.lab.exec(node, ["kill", "-9", str(state["init_process_pid"])])
