"""What is decoded strictly is what was encoded, whatever kinds of fields there are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from podferry.core.strict import NotStrict, from_json, to_json

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Inner:
    number: int | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    inners: tuple[Inner, ...]
    sure: bool | None


@pytest.mark.parametrize(
    "value",
    [
        Outer(None, (), None),
        Outer(Inner(7, ("a", "b")), (Inner(None, ()), Inner(0, ("",))), False),
    ],
)
def test_what_may_be_missing_stays_what_it_is(value: Outer) -> None:
    assert from_json(Outer, to_json(value)) == value


def test_what_may_be_missing_is_of_its_kind_where_it_is_there() -> None:
    with pytest.raises(NotStrict, match="number"):
        from_json(Inner, {"number": "7", "names": []})
