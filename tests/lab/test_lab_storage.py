"""The storage node is killed at steps of a pull and a removal; afterwards every image works or is fetched again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moving import A, B, until
from test_lab_images import CTR, TINY, archive

from podferry.errors import PodferryError
from podferry.lab import Lab, containers
from podferry.lab.machine_config import SNAPSHOTTER
from podferry.lab.state import STORAGE
from podferry.snapshotter import FormName

pytestmark = [pytest.mark.lab, pytest.mark.slow]
CHECKOUT = Path(__file__).parents[2]
IN_NODE = "/opt/podferry/checkout"
GATE = "run/podferry/snapshotter-gate"
EVERY = 29
"""Every how manyth step is tried; odd, so that all kinds of steps come."""


class Storage:
    """A lab whose first node's snapshotter can be stopped at a step."""

    def __init__(self, lab: Lab, form: FormName) -> None:
        self.lab = lab
        lab.up(2, agent=False, binds={IN_NODE: CHECKOUT}, progress=print)
        for node in (A, B):
            run = lab.root(node) / "run/service/snapshotter/run"
            text = run.read_text().replace("-m podferry.snapshotter", f"{IN_NODE}/tests/node/images_gate.py")
            run.write_text(text)
            (lab.root(node) / "etc/podferry/snapshotter.options").write_text(f"--form {form} --deadline 5\n")
            lab.exec(node, ["sv", "restart", "/run/service/snapshotter"])
        lab.up()

    def gate(self, suffix: str = "") -> Path:
        """The file of that name on the first node."""
        return (self.lab.root(A) / GATE).with_suffix(suffix)

    def arm(self, step: int) -> None:
        """Stop the snapshotter at a step from now on; 0 only counts."""
        self.gate(".reached").unlink(missing_ok=True)
        self.gate().write_text(str(step))

    def steps(self) -> int:
        """How many there have been since it was armed."""
        return int(self.gate(".steps").read_text())

    def pull_and_remove(self) -> None:
        """What is interrupted. Errors are allowed then."""
        for act in (lambda: containers.pull(self.lab, A, TINY), self.published, self.forget):
            try:
                act()
            except PodferryError as error:
                print(f"interrupted: {error}")

    def published(self) -> None:
        """Give the publisher its time."""
        log = self.lab.root(A) / "var/log/podferry/snapshotter.log"
        seen = log.read_text().count("layer published")
        for _ in range(50):
            if self.gate(".reached").exists() or log.read_text().count("layer published") >= seen + 2:
                return
            self.lab.exec(A, ["sleep", "0.1"])

    def forget(self, node: str = A) -> None:
        """Remove the image from a node."""
        self.lab.exec(node, [*CTR, "images", "remove", "--sync", TINY], check=False, timeout=60.0)

    def interrupt(self) -> bool:
        """Pull, and kill the storage node where the gate is; false if it was never reached."""
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(self.pull_and_remove)
            until(lambda: work.done() or self.gate(".reached").exists(), "the step is reached")
            reached = self.gate(".reached").exists()
            if reached:
                self.lab.kill_node(STORAGE)
            self.gate().unlink()
            if reached:
                self.lab.start_node(STORAGE)
            work.result(120)
        return reached

    def sums(self, node: str) -> str:
        """The digests of all files in a new container of the image, pulled where it is not there."""
        try:
            containers.pull(self.lab, node, TINY)
            argv = ["run", "--rm", "--snapshotter", SNAPSHOTTER, TINY, "reader", "/bin/busybox", "sha256sum"]
            return self.lab.exec(node, [*CTR, *argv, "/says", "/bin/busybox"], timeout=60.0).stdout
        except PodferryError as error:
            print(f"not yet: {error.report()}")
            return ""


@pytest.fixture(params=list(FormName))
def storage(request: pytest.FixtureRequest, own_lab: Lab) -> Iterator[Storage]:
    yield Storage(own_lab, request.param)


def test_the_storage_node_is_killed_at_steps(storage: Storage, tmp_path: Path) -> None:
    path = archive(tmp_path, "precious")
    containers.push(storage.lab, path, compress=False)
    root = tmp_path / "root-precious"
    wanted = "".join(
        f"{hashlib.sha256((root / one).read_bytes()).hexdigest()}  /{one}\n" for one in ("says", "bin/busybox")
    )
    storage.arm(0)
    storage.pull_and_remove()
    total = storage.steps()
    storage.gate().unlink()
    assert total > 20, "the steps are counted"
    tried = range(1, total, EVERY)
    reached = 0
    for step in tried:
        storage.lab.exec(A, ["sh", "-ec", "rm -rf /share/images/layers/*"])
        storage.arm(step)
        reached += storage.interrupt()
        print(f"step {step} of {total}: {reached} reached")
        for node in (A, B):
            until(lambda node=node: storage.sums(node) == wanted, f"step {step}: {node} has whole files")  # type: ignore[misc]
            storage.forget(node)
    assert reached >= len(tried) * 0.8, f"{reached} of {len(tried)} steps were reached"
