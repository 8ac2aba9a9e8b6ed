"""What the project promises about itself: its pictures, its doors, its locks."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import podferry
from podferry.core.phases import diagram
from podferry.errors import PodferryError

pytestmark = pytest.mark.unit
ROOT = Path(podferry.__file__).parents[2]
SOURCES = [path for path in (ROOT / "src").rglob("*.py") if "_pb2" not in path.name]


def test_the_diagram_in_the_architecture_is_the_tables() -> None:
    assert diagram() in (ROOT / "ARCHITECTURE.md").read_text(), "run scripts/diagram .venv"


def test_the_files_that_the_architecture_names_exist() -> None:
    """Each by its path in the package, or by its name alone where the text before it has named the directory."""
    text, root = (ROOT / "ARCHITECTURE.md").read_text(), ROOT / "src/podferry"
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py|(?:[a-z_]+/)+[a-z_-]+)`", text))
    assert len(named) > 60
    have = {path.name for path in root.rglob("*.py")}
    directories = {path.parts[len(root.parts)] for path in root.glob("*/")}
    missing = {one for one in named if one.partition("/")[0] in directories and not (root / one).exists()}
    missing |= {one for one in named if "/" not in one and one not in have}
    assert missing == set()
    assert not {one for one in named if one.endswith(".py") and "/" in one and not (root / one).exists()}


def test_the_packages_that_the_architecture_names_are_those_that_there_are() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    table = text[text.index("| package |") : text.index("A package imports only")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    root = ROOT / "src/podferry"
    there = {path.parent.name for path in root.glob("*/__init__.py")} | {path.stem for path in root.glob("[a-z]*.py")}
    assert named == there


def test_processes_have_one_door() -> None:
    door = ROOT / "src/podferry/node/process.py"
    users = [path for path in SOURCES if re.search(r"^\s*(import|from) subprocess\b", path.read_text(), re.MULTILINE)]
    assert users == [door]


ONE_PLACE = {
    r"ctypes\.CDLL": {"fs/libc.py", "criu/gatekeeper.py"},  # the latter has no module of podferry's
    r"/mountinfo\"": {
        "fs/mountinfo.py",
        "criu/gatekeeper.py",
        "node/cgroup.py",
        "node/host.py",
        "snapshotter/layer_mounts.py",
    },
    r"SC_PAGE_?SIZE|mmap\.PAGESIZE": {
        "memory/kernel/page_size.py",
        "snapshotter/prefetch.py",
        "bench/machine_facts.py",
    },
    r"pidfd_getfd\(|PIDFD_GETFD": {"fs/libc.py"},
}


@pytest.mark.parametrize("what", ONE_PLACE)
def test_what_the_kernel_offers_has_one_place(what: str) -> None:
    """Where there were many, some were wrong: those with mountinfo here only name the file that `fs/mountinfo.py` reads."""
    root = ROOT / "src/podferry"
    found = {str(path.relative_to(root)) for path in SOURCES if re.search(what, _code(path))}
    assert found <= ONE_PLACE[what]


def _code(path: Path) -> str:
    """A module without its docstrings."""
    return re.sub(r'"""(?:[^"]|"(?!""))*"""', "", path.read_text())


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock", "requirements-uv.lock"])
def test_the_locks_hold_hashes_and_no_addresses(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    packages = re.findall(r"^[a-z0-9][^\s=]*==", text, re.MULTILINE)
    assert packages
    assert text.count("--hash=sha256:") >= len(packages)


def test_what_set_up_installs_is_pinned_by_hash() -> None:
    """Every call of pip's or uv's install names a lock with hashes, or installs the checkout itself."""
    for path in (ROOT / "scripts/setup", ROOT / "src/podferry/lab/site.py"):
        lines = [line for line in path.read_text().splitlines() if re.search(r"pip.*\b(install|sync)\b", line)]
        assert lines
        for line in lines:
            assert re.search(r"--require-hashes|--editable \.|\*pinned|\*options", line), f"{path.name}: {line}"
    assert '["--constraints", str(lock), *DEVELOPMENT]' in (ROOT / "src/podferry/lab/site.py").read_text()


def test_every_error_has_a_code_of_its_own_and_survives_the_wire() -> None:
    def kinds(kind: type[PodferryError]) -> list[type[PodferryError]]:
        return [kind, *(below for one in kind.__subclasses__() for below in kinds(one))]

    for kind in kinds(PodferryError)[1:]:
        assert "code" in kind.__dict__, f"{kind.__name__} has no code of its own"
        error = kind("what", why="why", remedy="remedy", evidence=["line"])
        back = PodferryError.from_dict(error.to_dict())
        assert type(back) is kind
        assert back.to_dict() == error.to_dict()


def test_no_two_public_classes_have_one_name() -> None:
    places: dict[str, list[Path]] = {}
    for path in SOURCES:
        for name in re.findall(r"^class ([A-Z]\w*)", path.read_text(), re.MULTILINE):
            places.setdefault(name, []).append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even within a function, or for their types alone: who reads one would have to read them all."""
    graph = grimp.build_graph("podferry", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()  # raises CycleError with the circle


LONGEST = 400
"""Lines of a module; a longer one says in its head why it stays whole."""


def test_a_long_module_says_in_its_head_why_it_is_long() -> None:
    for path in SOURCES:
        text = path.read_text()
        if len(text.splitlines()) > LONGEST:
            head = ast.get_docstring(ast.parse(text)) or ""
            assert re.search(r"\b(long|length)\b", head), f"{path}: more than {LONGEST} lines, and no reason"


OF_EACH_PROGRAM = {"__main__", "metrics", "program"}
"""What each of the programs has, under the same name in its package."""
PARALLEL = {
    # `core` decides about what another package reads, keeps or carries out.
    "connections": {"core", "criu"},
    "drain": {"core", "kube"},
    "host": {"core", "node"},
    "inventory": {"core", "node"},
    "migration": {"core", "kube"},
    "turns": {"core", "controller"},
    # `workload` has the ports' one implementation for the two halves of `engine`, and its makers are what `node` speaks with.
    "source": {"engine", "workload"},
    "target": {"engine", "workload"},
    "containerd": {"node", "workload/makers"},
    "kubelet": {"node", "workload/makers"},
    # `cli` names a module after the command in it.
    "lab": {"cli", "lab"},
    "pki": {"cli", "wire"},
}
"""The modules that share a name with one of another package on purpose: what the one is for, the other is too."""


def test_no_two_modules_have_one_name_unless_they_are_parallel() -> None:
    root, places = ROOT / "src/podferry", dict[str, set[str]]()
    for path in SOURCES:
        places.setdefault(path.stem, set()).add(path.parent.relative_to(root).as_posix())
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in OF_EACH_PROGRAM | {"__init__"}} == PARALLEL


def test_no_two_modules_of_tests_have_one_name() -> None:
    places: dict[str, list[Path]] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        if path.stem not in {"__init__", "conftest"}:
            places.setdefault(path.stem, []).append(path)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
