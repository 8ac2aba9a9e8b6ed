"""The soft-dirty tracker on a kernel that has soft-dirty bits and lacks what the better one needs: Debian 12's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import vm

pytestmark = [pytest.mark.lab, pytest.mark.slow]
TIMEOUT = 3600


@pytest.fixture(scope="module")
def kernel() -> Path:
    if what := vm.lacking():
        pytest.skip(what)
    try:
        return vm.kernel()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"Debian's kernel package {vm.META_PACKAGE} cannot be had: {error}")


def test_the_soft_dirty_tracker_passes_the_trackers_tests(kernel: Path, tmp_path: Path) -> None:
    options = ["-v", "-m", "not slow", "-p", "no:cacheprovider", "-c", "/dev/null", "-W", "ignore"]
    tests = [f"/work/tests/{name}.py" for name in ("test_trackers", "test_trackers_cases")]
    ran = vm.run(kernel, tmp_path, [*options, *tests], TIMEOUT)
    print(ran.output)
    assert "kernel 6.1." in ran.output
    assert ran.status == 0, ran.output[-6000:]
    passed = re.findall(r"::(test_\w+)(?:\[\d+\])? PASSED", ran.output)
    assert passed.count("test_the_copy_is_the_process") >= 6, "its tracker did not run"
    assert "test_writes_are_seen_once_and_page_by_page" in passed
