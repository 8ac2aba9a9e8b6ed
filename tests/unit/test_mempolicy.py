"""Memory policies: as numa_maps names them, and as the call takes them."""

from __future__ import annotations

import pytest

from podferry.core.mempolicy import arguments, told

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("line", "policy", "mode", "mask"),
    [
        ("562e88df4000 default file=/usr/bin/head mapped=2 N0=2", "default", 0, 0),
        ("562e88df4000 bind:0-1,4 file=/x y", "bind:0-1,4", 2, 0b10011),
        ("562e88df4000 prefer:1 anon=1", "prefer:1", 1, 0b10),
        ("562e88df4000 prefer (many):0 anon=1", "prefer (many):0", 5, 1),
        ("562e88df4000 weighted interleave:0-1 anon=1", "weighted interleave:0-1", 6, 3),
        ("562e88df4000 bind=balancing|static:0 anon=1", "bind=balancing|static:0", 2 | 1 << 13 | 1 << 15, 1),
        ("562e88df4000 local anon=1", "local", 4, 0),
    ],
)
def test_what_the_kernel_tells_is_what_the_call_takes(line: str, policy: str, mode: int, mask: int) -> None:
    assert told(line) == policy
    assert arguments(policy) == (mode, mask)


@pytest.mark.parametrize(
    "policy", ["", "bond:0", "bind:x", "bind=wild:0", "bind:5000", "bind:0-999999999999", "bind:-1"]
)
def test_what_is_no_policy_is_refused(policy: str) -> None:
    with pytest.raises(ValueError):
        arguments(policy)


def test_a_line_that_names_none() -> None:
    assert told("") == ""
