"""An agent of a cluster limits its own memory to what a hostile job may cost it; helpers and others' moves are not held to it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import yaml
from agent_rig import Fault, Rig

from podferry.agent import memory
from podferry.core import limits
from podferry.core.phases import SourcePhase
from podferry.criu.dump_images import _MM_MAGIC, COMMON_MAGIC, FILES_MAGIC, write_entries
from podferry.errors import UsageError
from podferry.kube.quantities import quantity
from podferry.memory.kernel.page_size import PAGE
from podferry.model import Mode
from podferry.protos import pagemap_pb2, rights_pb2

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
MIB = 1 << 20
ALONE = 200 * MIB
"""An agent that moves nothing: 110 MiB in the lab, and threads' stacks."""


def python(program: str, *words: object) -> str:
    """What a Python of its own prints, that has run `program`."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def of_manifest(name: str, container: str) -> dict[str, object]:
    for document in yaml.safe_load_all((ROOT / "deploy" / name).read_text()):
        if document["kind"] in ("DaemonSet", "Deployment"):
            containers = document["spec"]["template"]["spec"]["containers"]
            found: dict[str, object] = next(one for one in containers if one["name"] == container)
            return found
    raise AssertionError(f"{name} runs nothing")


def test_the_manifests_limit_is_what_one_job_may_cost() -> None:
    agent = of_manifest("agent.yaml", "agent")
    (most,) = [one["value"] for one in agent["env"] if one["name"] == memory.VARIABLE]  # type: ignore[attr-defined]
    assert quantity(most) > ALONE + sum(one.most * one.each for one in limits.TABLE)
    assert "limits" not in agent["resources"]  # type: ignore[operator]  # a tmpfs counts as its container's


def test_the_controllers_limit_has_room_for_many_migrations() -> None:
    """Each stays in its cache for an hour or longer after its end."""
    manager = {"manager": "podferry", "fieldsType": "FieldsV1", "fieldsV1": {f"f:{number}": {} for number in range(60)}}
    condition = {
        "type": "Eligible",
        "status": "True",
        "reason": "Checked",
        "message": 120 * "x",
        "lastTransitionTime": "t",
    }
    about = {"name": "move", "namespace": "team", "uid": "u", "managedFields": 3 * [manager]}
    body = json.dumps({"metadata": about, "spec": {"podName": "train"}, "status": {"conditions": 12 * [condition]}})
    tracemalloc.start()
    kept = [json.loads(body) for _ in range(500)]
    each = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    limit = of_manifest("controller.yaml", "controller")["resources"]["limits"]["memory"]  # type: ignore[index]
    assert quantity(limit) > 2 * ALONE + 10_000 * each


def test_beyond_it_the_agent_has_an_error_and_its_helpers_have_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"""
import os, subprocess, sys, threading
from podferry.agent import memory
from podferry.node import outside
outside.make_cgroups = lambda: []
os.environ[outside.IN_POD] = "1"
memory.limit("512Mi")
with open("/proc/self/status") as status:
    before = int(next(line for line in status if line.startswith("VmData")).split()[1])
threads = [threading.Thread(target=threading.Event().wait, args=(5,)) for _ in range(100)]
for one in threads:
    one.start()
with open("/proc/self/status") as status:
    assert int(next(line for line in status if line.startswith("VmData")).split()[1]) - before < 300 << 10, "stacks"
try:
    bytearray({600 * MIB})
except MemoryError:
    print("no more")
file = os.memfd_create("job")
os.ftruncate(file, {600 * MIB})
import mmap
mmap.mmap(file, {600 * MIB}).close()
print(subprocess.run(outside.surviving(["sh", "-c", "ulimit -S -d"]), capture_output=True, text=True).stdout)
"""
    assert python(program).split("\n") == ["no more", "unlimited"]


@pytest.mark.parametrize("wrong", ["much", "2Xi", "1Mi", "Gi"])
def test_a_limit_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match=memory.VARIABLE):
        memory.limit(wrong)


def test_a_move_that_is_too_much_for_the_agent_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(rig: Rig) -> None:
        raise MemoryError

    rig = Rig(tmp_path, [Fault("source", "dump", too_much)], None).move(Mode.LIVE, monkeypatch)
    assert rig.phase("a") == SourcePhase.ROLLED_BACK
    assert "as much memory as it may have" in rig.records["a"]["error"]["what"]
    assert memory.VARIABLE in rig.records["a"]["error"]["remedy"]


PEAK = """
import sys
from pathlib import Path

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) << 10
"""
SCANS = (
    PEAK
    + """
import os
from podferry.node.upper import scan
root = os.open(sys.argv[1], os.O_RDONLY)
before = peak()
found = scan(root)
print(peak() - before)
"""
)
READS = (
    PEAK
    + """
from podferry.criu import dump_images
from podferry.criu.rights import _all
path = Path(sys.argv[1])
before = peak()
found = list(_all(path, "files")) if path.name == "files.img" else dump_images.dumped_areas(path, 1)
print(peak() - before)
"""
)


def test_a_file_costs_an_agent_no_more_than_the_table_says(tmp_path: Path) -> None:
    files = 30_000
    for number in range(files):
        directory = tmp_path / str(number % 100)
        directory.mkdir(exist_ok=True)
        (directory / f"a-name-of-usual-length-{number}").touch()
    grew = int(python(SCANS, tmp_path))
    assert files * 100 < grew, "nothing is measured"
    assert grew / files < limits.FILES.each


@pytest.mark.parametrize("of", ["mappings", "open files"])
def test_an_image_that_is_read_as_a_whole_costs_no_more_than_the_table_says(tmp_path: Path, of: str) -> None:
    count = 300_000
    if of == "mappings":
        areas = [
            pagemap_pb2.VmaEntry(
                start=at << 13, end=(at << 13) + PAGE, pgoff=0, shmid=0, prot=3, flags=34, status=1, fd=-1
            )
            for at in range(1, count)
        ]
        data = pagemap_pb2.MmEntry(vmas=areas).SerializeToString()
        path, read = tmp_path / "mm-1.img", tmp_path
        path.write_bytes(struct.pack("<III", COMMON_MAGIC, _MM_MAGIC, len(data)) + data)
    else:
        path = read = tmp_path / "files.img"
        write_entries(path, FILES_MAGIC, (rights_pb2.FileEntry(type=1, id=at, efd=bytes(12)) for at in range(count)))
    grew = int(python(READS, read))
    assert path.stat().st_size < grew, "nothing is measured"
    assert grew / path.stat().st_size < limits.PARSED_IMAGE.each
