"""The client of an agent's socket, against the real control socket and against ones that misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_contract import agent_keeps_the_contract
from cli_fake_agent import FakeAgent, serving

from podferry.cli.agent_client import AgentClient, AgentUnreachable
from podferry.errors import PeerMisbehaved, UsageError

pytestmark = pytest.mark.unit


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """Something that sends `answer` to whoever asks, and hangs up."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def once() -> None:
            stream, _ = listener.accept()
            with stream:
                stream.recv(4096)
                stream.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        yield
        thread.join(10)


def test_the_fake_agent_keeps_the_contract(tmp_path: Path) -> None:
    with serving(FakeAgent("node-a", {"train": "running"}), tmp_path / "agent"):
        record = agent_keeps_the_contract(AgentClient(tmp_path / "agent"), "train", "node-b")
    assert record.rounds == 4


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", AgentUnreachable),
        (b'{"event": {}}\n', AgentUnreachable),
        (b'{"result": [1', PeerMisbehaved),
        (b"what?\n", PeerMisbehaved),
        (b"[]\n", PeerMisbehaved),
        (b"{}\n", PeerMisbehaved),
        (b'{"error": "no"}\n', PeerMisbehaved),
        (b'{"event": []}\n', PeerMisbehaved),
        (b'{"error": {"code": "PF101", "what": "no"}}\n', UsageError),
    ],
)
def test_what_is_no_result_is_an_error(tmp_path: Path, answer: bytes, error: type[Exception]) -> None:
    with answering(tmp_path / "agent", answer), pytest.raises(error):
        AgentClient(tmp_path / "agent").call("ps", on_event=lambda event: None)


def test_a_null_result_is_a_result(tmp_path: Path) -> None:
    with answering(tmp_path / "agent", b'{"result": null}\n'):
        assert AgentClient(tmp_path / "agent").call("ps") is None


def test_nobody_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path / ("long" * 40)):
        with pytest.raises(AgentUnreachable) as caught:
            AgentClient(path).call("ps")
        assert "podferry-agent" in caught.value.remedy


def test_silence_has_an_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent"))
        listener.listen()
        with pytest.raises(AgentUnreachable, match="no answer in time"):
            AgentClient(tmp_path / "agent").call("ps", timeout=0.05)


def test_the_callers_own_errors_are_left_alone(tmp_path: Path) -> None:
    def broken(event: object) -> None:
        raise BrokenPipeError

    with answering(tmp_path / "agent", b'{"event": {}}\n'), pytest.raises(BrokenPipeError):
        AgentClient(tmp_path / "agent").call("ps", on_event=broken)
