"""A pod with all that the kubelet and the cluster give it, moved by what deploy/ installs.

What is the pod's own comes along, what is made for each pod is the new one's, and its Service follows.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from typing import Any

import pytest

from podferry.lab import Lab
from podferry.lab.root_images import JOB_IMAGE

from .installing import A, B

pytestmark = pytest.mark.cluster
PATIENCE = 120.0
CLAIM = "/share/claim-of-a-test"
# Each line: its number, what two emptyDirs remember of the one before, what it is told by environment and files, and what it reads
# from files that it has open since its start; the number goes into a file of the claim too, which stays open.
JOB = """
import base64, ctypes, json, mmap, os, time
def read(path):
    return open(path).read().strip()
def owner(token):
    body = token.split('.')[1]
    return json.loads(base64.urlsafe_b64decode(body + '=' * (-len(body) % 4)))['kubernetes.io']['pod']['name']
log, n = open('/claim/log', 'a'), 0
colour, token, part = open('/settings/colour'), open('/all/token'), None
mapped = mmap.mmap(token.fileno(), 0, prot=mmap.PROT_READ)
os.chdir('/down/..data')
libc, news = ctypes.CDLL(None), 0
watch = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(watch, b'/settings', 0x3c0)  # what appears and goes, as those watch who reload their settings
memory = bytearray(os.urandom(1 << 20) * 16)
os.sched_setaffinity(0, {0})
while True:
    assert os.sched_getaffinity(0) == {0}, 'the affinity is gone'
    kept = [read(place) if n else '-1' for place in ('/disk/count', '/mem/count')]
    for place in ('/disk/count', '/mem/count'):
        with open(place, 'w') as file:
            file.write(str(n))
    told = [os.environ['COLOUR'], os.environ['NAME'], read('/settings/colour'), read('/key/word'), read('/down/name')]
    colour.seek(0)
    held = [colour.read(), owner(mapped[:].decode()), read('name'), read('/etc/colour'), news]
    try: news += len(os.read(watch, 65536))
    except BlockingIOError: pass
    part = part or (os.path.exists('/disk/hold') and open('/etc/colour'))
    print(n, *kept, *told, owner(read('/all/token')), *held, flush=True)
    log.write(f'{n}\\n')
    log.flush()
    memory[n * 4096 % len(memory)] = n % 256
    n += 1
    time.sleep(0.1)
"""
Json = dict[str, Any]


def around() -> list[Json]:
    """What stands around the pod. The claim's volume is a directory of the file system that all nodes of the lab share."""
    nodes = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [A, B]}]}
    of_volume = {"storageClassName": "", "accessModes": ["ReadWriteMany"]}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "asis"}, "data": {"colour": "green"}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "asis"},
            # The shell has it open as long as it runs.
            "stringData": {"word": "sesame", "run.sh": f"exec 3<&0\npython3 -uc {shlex.quote(JOB)}\nexit 1\n"},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "asis"},
            "spec": {
                **of_volume,
                "capacity": {"storage": "1Gi"},
                "persistentVolumeReclaimPolicy": "Retain",
                "local": {"path": CLAIM},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [nodes]}},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "asis"},
            "spec": {**of_volume, "volumeName": "asis", "resources": {"requests": {"storage": "1Gi"}}},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "asis"},
            "spec": {"selector": {"app": "asis"}, "ports": [{"port": 80}]},
        },
    ]


def pod() -> Json:
    name = {"fieldRef": {"fieldPath": "metadata.name"}}
    down = [{"path": "name", **name}]
    token = {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}}
    volumes: Json = {
        "settings": {"configMap": {"name": "asis"}},
        "key": {"secret": {"secretName": "asis"}},
        "down": {"downwardAPI": {"items": down}},
        "all": {"projected": {"sources": [token, {"configMap": {"name": "asis"}}, {"downwardAPI": {"items": down}}]}},
        "disk": {"emptyDir": {}},
        "mem": {"emptyDir": {"medium": "Memory"}},
        "claim": {"persistentVolumeClaim": {"claimName": "asis"}},
    }
    main = {
        "name": "main",
        "image": JOB_IMAGE,
        "command": ["sh", "/key/run.sh"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {"limits": {"cpu": "1", "memory": "256Mi"}},
        "lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", "echo begun >> /disk/begun"]}}},
        "env": [
            {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "asis", "key": "colour"}}},
            {"name": "NAME", "valueFrom": name},
        ],
        "volumeMounts": [
            *({"name": one, "mountPath": f"/{one}"} for one in volumes),
            {"name": "settings", "mountPath": "/etc/colour", "subPath": "colour"},
        ],
    }
    spec = {
        "runtimeClassName": "podferry",
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}, "fsGroup": 2000},
        "containers": [main],
        "volumes": [{"name": one, **kind} for one, kind in volumes.items()],
    }
    about = {"name": "asis", "labels": {"app": "asis"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}


@pytest.fixture
def lab(installed: Lab) -> Iterator[Lab]:
    kubectl = installed.kubectl()
    installed.exec(A, ["mkdir", "-p", CLAIM])
    try:
        for one in (*around(), pod()):
            kubectl.run("create", "-f", "-", input=json.dumps(one))
        kubectl.run("wait", "--for=condition=Ready", "pod/asis", f"--timeout={PATIENCE:.0f}s")
        yield installed
    finally:
        kubectl.run("delete", "pod", "-l", "app=asis", "--wait", "--grace-period=1")
        kubectl.run("delete", "migrations", "--all", "--wait")
        for kind in ("service", "persistentvolumeclaim", "persistentvolume", "secret", "configmap"):
            kubectl.run("delete", kind, "asis", "--ignore-not-found", "--wait", "--timeout=60s")
        installed.exec(A, ["rm", "-rf", CLAIM])


def change_colour(lab: Lab, pod: str = "asis", colour: str = "blue") -> None:
    """The ConfigMap changes, and the pod's kubelet writes it anew: the file that the job has open is deleted."""
    kubectl, deadline = lab.kubectl(), time.monotonic() + PATIENCE
    kubectl.run("patch", "configmap", "asis", "--type=merge", "-p", json.dumps({"data": {"colour": colour}}))
    kubectl.run("annotate", "pod", pod, f"look={colour}", "--overwrite")  # or it would look within a minute or two
    while kubectl.run("logs", pod, "--tail=1").stdout.split()[5] != colour:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def ended(lab: Lab) -> Json:
    """The status of a Migration of the pod, to wherever, once it has ended."""
    kubectl, spec = lab.kubectl(), {"podName": "asis", "maxFreeze": "2m"}
    body = {"apiVersion": "podferry.dev/v1alpha1", "kind": "Migration", "metadata": {"name": "asis"}, "spec": spec}
    kubectl.run("create", "-f", "-", input=json.dumps(body))
    over = "--for=jsonpath={.status.completionTime}"
    kubectl.run("wait", over, "migration/asis", f"--timeout={PATIENCE:.0f}s")
    status: Json = json.loads(kubectl.run("get", "migration", "asis", "-o", "json").stdout)["status"]
    return status


def goes_on(lab: Lab) -> None:
    """The job has not stopped."""
    before = len(lab.kubectl().run("logs", "asis").stdout.splitlines())
    deadline = time.monotonic() + PATIENCE
    while len(lab.kubectl().run("logs", "asis").stdout.splitlines()) < before + 5:
        assert time.monotonic() < deadline, "it does not go on"
        time.sleep(0.2)


def endpoints(lab: Lab) -> set[str]:
    """The addresses that the Service has ready."""
    words = ("get", "endpointslices", "-l", "kubernetes.io/service-name=asis", "-o", "json")
    slices = json.loads(lab.kubectl().run(*words).stdout)["items"]
    of_all = [one for slice in slices for one in slice.get("endpoints") or []]
    return {address for one in of_all if one["conditions"]["ready"] for address in one["addresses"]}


def test_what_a_pod_has_comes_along_and_its_service_follows(lab: Lab) -> None:
    kubectl = lab.kubectl()

    def get(what: str) -> Json:
        found: Json = json.loads(kubectl.run("get", what, "-o", "json").stdout)
        return found

    def lines(name: str) -> list[list[str]]:
        return [line.split() for line in kubectl.run("logs", name).stdout.splitlines()]

    deadline = time.monotonic() + PATIENCE
    source = get("pod/asis")
    while len(lines("asis")) < 5 or endpoints(lab) != {source["status"]["podIP"]}:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert kubectl.run("podferry", "check", "asis").returncode == 0
    change_colour(lab)
    target_node = B if source["spec"]["nodeName"] == A else A
    migration = {
        "apiVersion": "podferry.dev/v1alpha1",
        "kind": "Migration",
        "metadata": {"name": "asis"},
        "spec": {"podName": "asis", "targetNode": target_node, "maxFreeze": "2m"},
    }
    kubectl.run("create", "-f", "-", input=json.dumps(migration))
    seen, status = set[str](), Json()
    while not status.get("completionTime"):
        assert time.monotonic() < deadline, status
        served = endpoints(lab)
        status = get("migration/asis").get("status", {})
        resumed = [one for one in status.get("conditions", []) if one["type"] == "Resumed" and one["status"] == "True"]
        assert served <= {source["status"]["podIP"]} or resumed, "the Service led to a pod that did not run the job yet"
        seen |= served
    assert status["phase"] == "Completed", status["ending"]
    target = get(f"pod/{status['targetPod']['name']}")
    name, here = target["metadata"]["name"], target["status"]["podIP"]
    while endpoints(lab) != {here}:
        assert time.monotonic() < deadline, endpoints(lab)
        time.sleep(0.2)
    assert source["status"]["podIP"] in seen, "it was asked while the pod moved"

    moved = len(lines(name))
    while len(lines(name)) < moved + 5:
        assert time.monotonic() < deadline, "it does not go on"
        time.sleep(0.2)
    told = lines(name)
    assert [one[0] for one in told] == [str(number) for number in range(len(told))]
    assert all(one[1] == one[2] == str(int(one[0]) - 1) for one in told), "an emptyDir forgot something"
    assert {tuple(one[3:5]) for one in told} == {("green", "asis")}, "its environment is what it was"
    assert {tuple(one[5:7]) for one in told} == {("green", "sesame"), ("blue", "sesame")}
    assert {tuple(one[7:9]) for one in told} >= {("asis", "asis"), (name, name)}, (
        "files made for a pod are the new one's"
    )
    assert told[-1][7:9] == [name, name]
    assert {tuple(one[9:12]) for one in told} == {("green", "asis", "asis")}, "what was open is what it was"
    assert [one[12] for one in told if one[8] == "asis"][-1] == "green", "a part of a volume does not change with it"
    assert told[-1][12] == "blue"
    heard = int(lines(name)[-1][13])
    assert heard > 0
    change_colour(lab, name, "red")
    while int(lines(name)[-1][13]) == heard:
        assert time.monotonic() < deadline, "what it watches changes, and it does not hear of it"
        time.sleep(0.2)
    assert kubectl.run("exec", name, "--", "cat", "/disk/begun").stdout == "begun\n", "it began once"
    kept = kubectl.run("exec", name, "--", "cat", "/claim/log").stdout.split()
    assert kept == [str(number) for number in range(len(kept))]
    assert len(kept) > moved


def test_a_pod_whose_config_map_is_gone_runs_on_and_the_kubelets_words_are_told(lab: Lab) -> None:
    lab.kubectl().run("delete", "configmap", "asis")
    status = ended(lab)
    assert (status["phase"], status["ending"]["reason"]) == ("RolledBack", "VolumeMissing"), status
    assert 'configmap "asis" not found' in status["ending"]["message"]
    goes_on(lab)


def test_a_part_of_a_volume_that_is_open_and_has_changed_is_refused(lab: Lab) -> None:
    lab.kubectl().run("exec", "asis", "--", "touch", "/disk/hold")
    change_colour(lab)
    status = ended(lab)
    assert status["phase"] == "Refused", status
    assert "/etc/colour, a part of a volume (subPath)" in status["ending"]["message"]
    goes_on(lab)
