"""Messages: each comes back as it was; whatever is not exactly a message is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry import __version__
from podferry.core.strict import MAX_DEPTH, fields_of
from podferry.errors import Bug, PeerLost, PeerMisbehaved, PodferryError, Refused
from podferry.model import Mode
from podferry.wire import messages
from podferry.wire.messages import (
    MESSAGES,
    PROTOCOL,
    Abort,
    Accept,
    AddressSpaceSum,
    ErrorReport,
    FileSum,
    Filled,
    GaveUp,
    Go,
    Hello,
    Message,
    MovedConnection,
    Offer,
    PageRequest,
    PagesEnd,
    PagesLost,
    PeerFailure,
    PrepareTarget,
    Progress,
    Query,
    Refuse,
    RoundAck,
    RoundEnd,
    Running,
    StateEnd,
    StatePart,
    Translate,
    Translated,
    TreeSum,
    decode,
    encode,
)

pytestmark = pytest.mark.unit

REPORT = ErrorReport("PF200", "it broke", "because", "mend it", ("line 1", "line 2"))
SAMPLES: list[Message] = [
    Hello(PROTOCOL, __version__, "node-a"),
    PeerFailure(REPORT),
    Offer("m-1", "job", Mode.LIVE, {"image": "x", "n": [1, 2.5, None, True]}, {}, 1 << 40, 0),
    Accept("m-1", {"cpu": {"flags": ["a"]}}),
    Refuse("m-1", (REPORT,)),
    PrepareTarget("m-1", True),
    RoundEnd(1, 2, 3),
    RoundAck(1),
    StatePart("m-1", (FileSum(0, "core-2.img", 5, "ab"),), (AddressSpaceSum(1, 2),)),
    StateEnd("m-1", (FileSum(0, "core-1.img", 5, "ab"),), (AddressSpaceSum(1, 2),), (TreeSum(0, 1, 2, "cd"),)),
    Running("m-1", 1_790_000_000_000_000_000),
    PageRequest(1, 0x7FFF_0000_0000),
    PagesEnd("m-1", ()),
    PagesLost("m-1"),
    Progress("filling", 1, 2),
    Filled("m-1", 12),
    GaveUp("m-1", REPORT),
    Abort("m-1", "grün"),
    Translate("m-1", "default", "moves", (MovedConnection("uid", "10.0.0.1:1", "[fd00::1]:2", "10.0.0.3"),)),
    Translated("m-1", (0, 3)),
]
BARE: list[Any] = [kind for kind in MESSAGES.values() if set(fields_of(kind)) == {"migration"}]
SAMPLES += [kind(migration="m-1") for kind in BARE]
BY_NAME = {type(sample).__name__: sample for sample in SAMPLES}


def as_json(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(encode(message))
    return fields


def refused(fields: object) -> str:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    with pytest.raises(PeerMisbehaved) as caught:
        decode(text)
    return caught.value.why


@pytest.mark.parametrize("name", MESSAGES)
def test_each_message_comes_back(name: str) -> None:
    sample = BY_NAME.get(name)
    if sample is None:
        sample = MESSAGES[name]("m-1", REPORT)  # type: ignore[arg-type, call-arg]
    assert decode(encode(sample)) == sample


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_a_field_that_is_missing_added_or_of_another_type_is_refused(sample: Message) -> None:
    whole = as_json(sample)
    refused({**whole, "extra": 1})
    for name in whole.keys() - {"type"}:
        refused({key: value for key, value in whole.items() if key != name})
        for wrong in (None, True, -1, 1.5, "x" * 5000, [True], {"a": 1}, [[]], 1 << 63):
            value = whole[name]
            if type(wrong) is type(value) and isinstance(wrong, dict):
                continue  # an opaque object
            if wrong is True and isinstance(value, bool):
                continue  # just what it may be
            if name in ("protocol",) and type(wrong) is int:
                continue  # another protocol, refused in its own way
            refused({**whole, name: wrong})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"Go"',
        b"{}",
        b'{"type":"Nonsense"}',
        b'{"type":["Go"]}',
        b'{"type":"ErrorReport"}',
        b'{"type":"Go","migration":"a","migration":"b"}',
        b'{"type":"Go","migration":"\\ud800"}',
        b'{"type":"Go","migration":""}',
        b'{"type":"Go","migration":"\xff"}',
        b'{"type":"RoundAck","round":NaN}',
        b'{"type":"RoundAck","round":1e2}',
        b'{"type":"RoundAck","round":65536}',
        b'{"type":"RoundAck","round":' + b"9" * 10_000 + b"}",
        b'{"type":"Accept","migration":"a","facts":{"a":Infinity}}',
        b'{"type":"Accept","migration":"a","facts":{"a":1e999}}',
        b'{"type":"Accept","migration":"a","facts":' + b'{"a":' * 100 + b"1" + b"}" * 101,
        b'{"type":"Accept","migration":"a","facts":' + b"[" * 200_000,
        b'{"type":"Refuse","migration":"a","refusals":[]}',
        b'{"type":"PageRequest","space":4294967296,"address":0}',
    ],
    ids=lambda text: text[:50].decode("latin-1"),
)
def test_what_is_no_message_is_refused(text: bytes) -> None:
    assert refused(text)


def test_an_offer_of_an_unknown_mode_is_refused() -> None:
    assert "'warp' is none of" in refused({**as_json(BY_NAME["Offer"]), "mode": "warp"})


def test_a_list_that_is_too_long_is_refused() -> None:
    gave_up = as_json(GaveUp("m-1", REPORT))
    assert "evidence: 65 entries" in refused({**gave_up, "error": {**gave_up["error"], "evidence": ["x"] * 65}})


@given(st.binary(max_size=100))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(PodferryError):
        decode(garbage)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(SAMPLES), st.data())
def test_a_message_with_anything_for_a_field_is_refused_or_comes_back(sample: Message, data: st.DataObject) -> None:
    whole = as_json(sample)
    name = data.draw(st.sampled_from(sorted(whole)))
    changed = {**whole, name: data.draw(json_values)}
    try:
        message = decode(json.dumps(changed).encode())
    except (PeerMisbehaved, Refused):
        return
    assert as_json(message) == changed


def test_another_protocol_is_refused_naming_both_versions_whatever_else_its_hello_says() -> None:
    theirs = {"type": "Hello", "protocol": PROTOCOL + 1, "version": "9.9.9", "future": True}
    with pytest.raises(Refused) as caught:
        decode(json.dumps(theirs).encode())
    for part in ("9.9.9", __version__, f"protocol {PROTOCOL + 1}", f"with {PROTOCOL}"):
        assert part in caught.value.what
    assert caught.value.remedy


def test_what_the_peer_would_refuse_is_our_bug() -> None:
    for wrong in (
        Go(""),
        RoundAck(-1),
        Accept("m", {"a": float("nan")}),
        Accept("m", {"a": {1, 2}}),
        Abort("m", "\ud800"),
    ):
        with pytest.raises(Bug):
            encode(wrong)
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH):
        deep = {"a": deep}
    with pytest.raises(Bug):
        encode(Accept("m", deep))


def test_an_error_arrives_as_it_left() -> None:
    left = PeerLost("gone", why="cable", remedy="plug in", evidence=["a", "b"])
    arrived = decode(encode(GaveUp("m", ErrorReport.of(left))))
    assert isinstance(arrived, GaveUp)
    error = arrived.error.error()
    assert type(error) is PeerLost
    assert error.to_dict() == left.to_dict()


def test_an_error_of_any_size_can_travel() -> None:
    huge = PeerLost("w" * 9000, why="y" * 99000, remedy="r" * 9000, evidence=["e" * 9000] * 99)
    assert decode(encode(PeerFailure(ErrorReport.of(huge))))


def test_messages_are_frozen_and_all_are_known() -> None:
    assert len(MESSAGES) == len({*messages.SOURCE_MESSAGES, *messages.TARGET_MESSAGES}) + 2
    for kind in MESSAGES.values():
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert kind.__doc__
    with pytest.raises(dataclasses.FrozenInstanceError):
        Query("m").migration = "n"  # type: ignore[misc]
