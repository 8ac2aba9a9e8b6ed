"""The inventory: what differs is found, what can be put right is, and what is expected to differ is not told."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from podferry.core.inventory import (
    EXPECTED,
    OOM_SCORE,
    Difference,
    decode,
    differences,
    encode,
    may_be_given,
    with_oom_score,
)
from podferry.errors import PeerMisbehaved
from podferry.node import descriptors, inventory

pytestmark = pytest.mark.unit
CPUS = frozenset(os.sched_getaffinity(0))


def test_every_kind_of_difference_is_found() -> None:
    before = {"1/1": {"a": "1", "b": "2", "gone": "x"}, "1/2": {"a": "1"}}
    after = {"1/1": {"a": "1", "b": "3", "new": "y"}, "1/3": {"a": "1"}}
    assert differences(before, after) == [
        Difference("1/1", "b", "2", "3"),
        Difference("1/1", "gone", "x", ""),
        Difference("1/1", "new", "", "y"),
        Difference("1/2", "thread", "True", ""),
        Difference("1/3", "thread", "", "True"),
    ]
    assert str(differences(before, after)[0]) == "b of 1/1: was 2, is 3"


def test_what_is_expected_has_a_reason_and_is_not_told() -> None:
    assert all(EXPECTED.values())
    assert not differences({"1/1": dict.fromkeys(EXPECTED, "1")}, {"1/1": dict.fromkeys(EXPECTED, "2")})


@pytest.mark.parametrize(
    ("attribute", "value", "capabilities", "allowed"),
    [
        ("affinity", "0", "0", True),
        ("io-priority", str(2 << 13), "0", True),
        ("io-priority", str(1 << 13), "0", False),  # real time
        ("io-priority", str(1 << 13), "0000000000800000", True),
        ("io-priority", "-1", "0", False),
        ("scheduler", "0 1 5 0 0 0 0 0 200", "0", True),  # reset on fork, and a clamp
        ("scheduler", "1 0 0 50 0 0 0 0 0", "0", False),  # SCHED_FIFO, where CRIU restored SCHED_OTHER
        ("scheduler", "0 0 -20 0 0 0 0 0 0", "0", False),
        ("scheduler", "", "0", False),
    ],
)
def test_nobody_is_given_more_than_they_could_take(
    attribute: str, value: str, capabilities: str, allowed: bool
) -> None:
    has = {"CapPrm": capabilities, "scheduler": "0 0 5 0 0 0 0 0 0"}
    assert may_be_given(attribute, value, has) is allowed


def test_it_travels() -> None:
    found = {"1/1": {"comm": "a \u00e9"}}
    assert decode(encode(found)) == found


@pytest.mark.parametrize("data", [b"", b"[]", b"[1]", b'{"1/1": 3}', b'{"1/1": {"a": 3}}', b"\xff", b'{"1/1": ["ab"]}'])
def test_what_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(PeerMisbehaved):
        decode(data)


BREAK = {
    "affinity": lambda pid: os.sched_setaffinity(pid, {min(CPUS)}),
    "scheduler": lambda pid: os.sched_setscheduler(pid, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0)),
    "io-priority": lambda pid: inventory._GIVE["io-priority"](pid, str(2 << 13 | 5)),
    "timer-slack": lambda pid: Path(f"/proc/{pid}/timerslack_ns").write_text("123456"),
    "coredump_filter": lambda pid: Path(f"/proc/{pid}/coredump_filter").write_text("0x7"),
}


@pytest.mark.parametrize("attribute", inventory._GIVE)
def test_what_can_be_given_from_outside_is_put_right(process: int, attribute: str) -> None:
    if attribute == "affinity" and len(CPUS) < 2:
        pytest.skip("one processor: there is nothing to choose")
    plain = inventory.take(process, [process], CPUS)
    BREAK[attribute](process)
    chosen = inventory.take(process, [process], CPUS)
    assert {one.attribute for one in differences(plain, chosen)} & inventory._GIVE.keys() == {attribute}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        here = inventory.take(other.pid, [other.pid], CPUS)
        (name,) = here
        before = {name: next(iter(chosen.values()))}
        inventory.put_right(before, other.pid, [other.pid], CPUS)
        assert inventory.take(other.pid, [other.pid], CPUS)[name][attribute] == before[name][attribute]
        other.kill()


def test_a_job_that_may_run_anywhere_may_run_anywhere_on_more_processors(process: int) -> None:
    found = inventory.take(process, [process], CPUS)
    assert [one["affinity"] for one in found.values()] == [inventory.ANYWHERE]
    assert inventory.put_right(found, process, [process], CPUS) == (0, {})


def test_lists_of_processors() -> None:
    assert inventory._numbers_of("0-2,5\n") == {0, 1, 2, 5}
    assert inventory._numbers_of("\n") == frozenset()


SOCKETS = """
import fcntl, socket, sys
tcp, udp, near = socket.create_server(('127.0.0.1', 0)), socket.socket(type=socket.SOCK_DGRAM), socket.socketpair()[0]
r, w = __import__('os').pipe()
if sys.argv[1:]:
    tcp.setsockopt(6, 1, 1); tcp.setsockopt(6, 18, 12345); tcp.setsockopt(0, 1, 16); tcp.setsockopt(1, 36, 7)
    udp.setsockopt(0, 8, 1); udp.setsockopt(1, 29, 1)
    fcntl.fcntl(w, 1031, 1 << 18)
print(tcp.fileno(), udp.fileno(), w, flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(*argv: str) -> Iterator[tuple[int, list[str]]]:
    with subprocess.Popen(
        [sys.executable, "-Ic", SOCKETS, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        yield child.pid, child.stdout.readline().split()
        child.kill()


def test_options_of_sockets_and_sizes_of_pipes_are_put_right() -> None:
    with holder("chosen") as (pid, (tcp, udp, pipe)), holder() as (other, _):
        chosen, plain = descriptors.take(pid), descriptors.take(other)
        assert chosen[f"descriptor {tcp} options"] == "1:2=1 0:1=16 6:1=1 6:18=12345", "SO_MARK is nobody's to give"
        assert plain[f"descriptor {tcp} options"] == "1:2=1"
        assert chosen[f"descriptor {udp} options"] == "1:29=1 0:8=1"
        assert (chosen[f"descriptor {pipe} pipe"], plain[f"descriptor {pipe} pipe"]) == (str(1 << 18), str(1 << 16))
        (name,) = inventory.take(other, [other], CPUS)
        assert inventory.put_right({name: chosen}, other, [other], CPUS).times == 4  # the pipe by either end
        assert descriptors.take(other) == chosen


def test_every_descriptor_is_told_however_many_there_are() -> None:
    """What is not looked at would not be compared, and nobody would hear of it."""
    number = min(6000, resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 64)
    if number <= 5000:
        pytest.skip(f"needs more than 5,000 descriptors in a process, and may have {number}")
    script = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
null = os.open('/dev/null', os.O_RDONLY)
os.dup2(null, {number})
for one in range(3, {number}): os.dup2(null, one)
print('.', flush=True); sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-Ic", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert descriptors.take(child.pid).keys() >= {f"descriptor {one}" for one in range(number + 1)}
        child.kill()


def test_locks_of_files_are_told_by_kind_mode_and_range(tmp_path: Path) -> None:
    lock = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX, 10, 5)"
    script = f"{lock}; print('.', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-Ic", script, str(tmp_path / "locked")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        told = descriptors.take(child.pid)
        assert [value for name, value in told.items() if name.endswith("locks")] == ["POSIX ADVISORY WRITE 5 14"]
        child.kill()


def test_of_a_tcp_connection_is_compared_what_criu_leaves_out() -> None:
    """On the target a connection to the outside is closed, and its socket is no connection's any more."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert descriptors._chosen(one.fileno()) == {}
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12345)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 4096)
        assert descriptors._chosen(one.fileno()) == {(6, 18): 12345, (6, 25): 4096}
        with socket.create_connection(server.getsockname()) as other:
            assert descriptors._give_options(other.fileno(), descriptors._chosen(one.fileno()), {})
            assert descriptors._chosen(other.fileno()) == descriptors._chosen(one.fileno())
        assert descriptors._chosen(server.fileno()) == {(1, 2): 1, (6, 1): 1}


def test_the_congestion_control_of_sockets_is_given_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        usual = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_bytes().split()
        others = [name for name in allowed if name != usual.rstrip(b"\0")]
        if not others:
            pytest.skip(f"this kernel has one congestion control for everybody, {usual!r}")
        for had in (server, one):
            had.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, others[0])
            told = {(6, 13): int.from_bytes(others[0], "little")}
            assert descriptors._chosen(had.fileno()).items() >= told.items()
            with socket.create_server(("127.0.0.1", 0)) as new:
                assert descriptors._give_options(new.fileno(), told, {})
                assert new.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == others[0]


@pytest.mark.parametrize("value", [int.from_bytes(b"nobodys", "little"), 1 << 128, -1, 0])
def test_a_congestion_control_that_not_everybody_may_have_is_not_set(value: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        usual = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert not descriptors._give_options(server.fileno(), {(6, 13): value}, {})
        assert server.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) == usual


@pytest.mark.parametrize("options", ["1:36=7", "99:1=1", "1:20=1"])
def test_an_option_that_is_not_on_the_list_is_not_set(options: str) -> None:
    with holder() as (pid, (tcp, *_)):
        assert not descriptors.give(pid, f"descriptor {tcp} options", options, "")


@pytest.mark.parametrize(("attribute", "value"), [("options", "1:1"), ("options", "x"), ("pipe", "many")])
def test_what_is_no_value_of_a_descriptor_is_refused(attribute: str, value: str) -> None:
    with holder() as (pid, (tcp, *_)), pytest.raises(ValueError, match="invalid literal"):
        descriptors.give(pid, f"descriptor {tcp} {attribute}", value, "")


def test_a_pipe_does_not_become_larger_than_anybodys() -> None:
    with holder() as (pid, (_, _, pipe)):
        assert not descriptors.give(pid, f"descriptor {pipe} pipe", str(1 << 21), str(1 << 16))


def test_how_a_file_was_opened_is_no_difference(tmp_path: Path) -> None:
    def told(path: str, flags: int) -> str:
        fd = os.open(path, flags)
        try:
            return descriptors.take(os.getpid())[f"descriptor {fd}"]
        finally:
            os.close(fd)

    assert told(str(tmp_path), os.O_RDONLY) == told(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    assert told(str(tmp_path), os.O_RDWR | os.O_TMPFILE).endswith(f" {os.O_RDWR | os.O_CLOEXEC:#o}")
    assert told("/dev/null", os.O_RDWR | os.O_APPEND) != told("/dev/null", os.O_RDWR)


def test_a_deleted_file_is_called_what_the_job_called_it() -> None:
    assert descriptors.plain("/tmp/config.cr_link (deleted)") == "/tmp/config (deleted)"
    assert descriptors.plain("/tmp/config.cr_link") == "/tmp/config.cr_link"


def test_a_process_that_has_ended_is_in_no_inventory() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    me = os.getpid()
    assert inventory.take(me, [child], CPUS) == {}
    assert inventory.take(me, [me], CPUS)
    os.waitpid(child, 0)


def test_what_the_targets_spec_raises_is_no_difference() -> None:
    before = {
        "1/1": {OOM_SCORE: "990", "cwd": "/"},
        "1/2": {"comm": "x"},
        "7/7": {OOM_SCORE: "-5"},
        "8/8": {OOM_SCORE: "1000"},
    }
    expected = with_oom_score(before, 997)
    assert expected == {
        "1/1": {OOM_SCORE: "997", "cwd": "/"},
        "1/2": {"comm": "x"},
        "7/7": {OOM_SCORE: "997"},
        "8/8": {OOM_SCORE: "1000"},
    }
