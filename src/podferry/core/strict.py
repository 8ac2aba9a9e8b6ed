"""JSON in and out of frozen dataclasses, driven by their annotations, and strict: what does not fit is refused whole.

Understood are `bool`, `int`, `float`, `str`, any `StrEnum`, `T | None`, `tuple[T, ...]`, dataclasses of these, and
`JsonObject` for what others decode further. `Annotated[T, Limit(...)]` narrows a number's range or a text's or list's
length. Integers are at least 0 unless a `AllowedRange` says otherwise: nothing on this wire is negative.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, NoReturn, TypeVar

JsonObject = dict[str, Any]
T = TypeVar("T")

MAX_DEPTH = 32
MAX_INT = (1 << 63) - 1


class NotStrict(ValueError):
    """Received data do not have the required shape; the text says where and why."""


@dataclass(frozen=True)
class AllowedRange:
    """The least and the greatest number, or, for texts (in characters) and lists, length."""

    least: int
    greatest: int


DEFAULT_INT = AllowedRange(0, MAX_INT)
DEFAULT_TEXT = AllowedRange(0, 4096)
DEFAULT_LIST = AllowedRange(0, 65536)


def parse(text: bytes | bytearray | memoryview) -> JsonObject:
    """The JSON object in `text`. Raises `NotStrict` for anything else, repeated keys and not-a-number included."""
    try:
        value = json.loads(str(text, "utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as cause:
        raise NotStrict(f"no JSON: {type(cause).__name__}: {cause}"[:300]) from cause
    if not isinstance(value, dict):
        raise NotStrict("no JSON object")
    _check_json(value, "", MAX_DEPTH)
    return value


def dump(value: JsonObject) -> bytes:
    """`value` as JSON that `parse` accepts. Raises `NotStrict` for what `parse` would refuse."""
    _check_json(value, "", MAX_DEPTH)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def to_json(value: Any) -> Any:
    """A dataclass as plain JSON values, its fields by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, StrEnum):
        return str(value)
    return value


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """The dataclass `kind` from what `to_json` made of one. Raises `NotStrict`."""
    return typing.cast(T, _decode(kind, value, where or kind.__name__))


def _decode(kind: Any, value: Any, where: str, limit: AllowedRange | None = None) -> Any:
    origin = typing.get_origin(kind)
    if origin is Annotated:
        inner, limit = typing.get_args(kind)
        return _decode(inner, value, where, limit)
    if origin is types.UnionType:
        inner, _ = typing.get_args(kind)  # T | None
        return None if value is None else _decode(inner, value, where, limit)
    if origin is tuple:
        if not isinstance(value, list):
            _wrong(where, "a list", value)
        _within(where, len(value), limit or DEFAULT_LIST, "entries")
        inner, _ = typing.get_args(kind)  # T, ...
        return tuple(_decode(inner, entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _decode_fields(typing.cast(type, kind), value, where)
    return _decode_plain(kind, value, where, limit)


def _decode_plain(kind: Any, value: Any, where: str, limit: AllowedRange | None) -> Any:
    if kind == JsonObject:
        kind = dict
    choices: list[str] = [str(choice) for choice in kind] if issubclass(kind, StrEnum) else []
    wanted: Any = str if choices else kind
    if type(value) is not wanted and not (kind is float and type(value) is int):
        _wrong(where, wanted.__name__, value)
    if isinstance(value, str) and not choices:
        _within(where, len(value), limit or DEFAULT_TEXT, "characters")
    elif wanted is int:
        _within(where, value, limit or DEFAULT_INT, "")
    elif choices:
        if value not in choices:
            raise NotStrict(f"{where}: {value[:100]!r} is none of {', '.join(choices)}")
        return kind(value)
    return value


def _decode_fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _wrong(where, "an object", value)
    hints = fields_of(kind)
    if unknown := value.keys() - hints.keys():
        raise NotStrict(f"{where}: unknown field {sorted(unknown)[0][:100]!r}")
    if missing := hints.keys() - value.keys():
        raise NotStrict(f"{where}: no field {sorted(missing)[0]!r}")
    return kind(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


@cache
def fields_of(kind: type) -> dict[str, Any]:
    """The fields of a dataclass and their annotations, resolved."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _wrong(where: str, wanted: str, value: Any) -> NoReturn:
    raise NotStrict(f"{where}: {wanted} expected, {type(value).__name__} found")


def _within(where: str, number: int, limit: AllowedRange, unit: str) -> None:
    if not limit.least <= number <= limit.greatest:
        found = f"{number} {unit}".strip() if abs(number) <= MAX_INT else "a huge number"
        raise NotStrict(f"{where}: {found}, allowed are {limit.least} to {limit.greatest}")


def _check_json(value: Any, where: str, depth: int) -> None:
    """Plain JSON, not too deep, its texts without lone surrogates (which no UTF-8 can hold)."""
    if depth == 0:
        raise NotStrict(f"{where}: nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise NotStrict(f"{where}: text that is not Unicode")
    elif isinstance(value, dict):
        for key, entry in value.items():
            _check_json(key, where, depth - 1)
            _check_json(entry, f"{where}.{key[:100]}", depth - 1)
    elif isinstance(value, list):
        for entry in value:
            _check_json(entry, where, depth - 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotStrict(f"{where}: not a number")
    elif value is not None and not isinstance(value, (bool, int)):
        raise NotStrict(f"{where}: {type(value).__name__} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotStrict("repeated key")
    return found


def _no_constant(name: str) -> NoReturn:
    raise NotStrict(f"{name} is no number")
