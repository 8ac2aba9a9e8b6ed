"""containerd's filter language, as far as snapshots use it.

    filter   := selector ("," selector)*          all must match
    selector := field ("." field)* [("==" | "!=" | "~=") value]

A field or value is a word, or quoted with `"`; the right side of `~=` may also be quoted with `/` or `|`.
Several filters match when one of them does; none at all matches everything. After containerd's `pkg/filters`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from podferry.errors import UsageError

Field = Callable[[list[str]], str | None]
"""What a filter asks of an object: the value at a field path, None where there is none."""

_FIELD = re.compile(r'\s*([A-Za-z0-9_]+|"(?:[^"\\\n]|\\.)*")')
_OPERATOR = re.compile(r"\s*([=!~]+)")
_VALUE = re.compile(r'\s*("(?:[^"\\\n]|\\.)*"|[^,\s"/|][^,\s]*)')
_PATTERN = re.compile(r'\s*("(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)*/|\|(?:[^|\\\n]|\\.)*\||[^,\s"/|][^,\s]*)')
_END = re.compile(r"\s*(,|$)")


@dataclass(frozen=True)
class Selector:
    """One condition. `operator` is empty where only the presence of a value is asked for."""

    path: list[str]
    operator: str = ""
    value: str = ""

    def matches(self, field: Field) -> bool:
        found = field(self.path)
        match self.operator:
            case "==":
                return found == self.value
            case "!=":
                return (found or "") != self.value
            case "~=":
                return re.search(self.value, found or "") is not None
            case _:
                return found is not None


def parse(filters: Sequence[str]) -> Callable[[Field], bool]:
    """A predicate for a request's filters. Raises `UsageError` for one that cannot be read."""
    alternatives = [_selectors(text) for text in filters if text]
    if not alternatives:
        return lambda field: True
    return lambda field: any(all(one.matches(field) for one in selectors) for selectors in alternatives)


def _selectors(text: str) -> list[Selector]:
    selectors, at = [], 0
    while True:
        path = []
        while True:
            field, at = _take(_FIELD, text, at)
            path.append(_unquote(text, field))
            if text[at : at + 1] != ".":
                break
            at += 1
        if _END.match(text, at):
            selectors.append(Selector(path))
        else:
            operator, at = _take(_OPERATOR, text, at)
            if operator not in ("==", "!=", "~="):
                raise _unreadable(text, f"no such operator: {operator}")
            value, at = _take(_PATTERN if operator == "~=" else _VALUE, text, at)
            value = _unquote(text, value)
            if operator == "~=":
                try:
                    re.compile(value)
                except re.error as error:
                    raise _unreadable(text, f"not a pattern: {value!r}") from error
            selectors.append(Selector(path, operator, value))
        end, at = _take(_END, text, at)
        if not end:
            return selectors


def _take(pattern: re.Pattern[str], text: str, at: int) -> tuple[str, int]:
    found = pattern.match(text, at)
    if not found:
        raise _unreadable(text, f"unexpected input at {text[at : at + 10]!r}")
    return found[1], found.end()


def _unquote(text: str, word: str) -> str:
    if word[:1] == '"':
        try:
            return str(json.loads(word))
        except ValueError as error:
            raise _unreadable(text, f"not a quoted word: {word}") from error
    if len(word) > 1 and word[0] in "/|" and word[-1] == word[0]:
        return word[1:-1].replace(f"\\{word[0]}", word[0])
    return word


def _unreadable(text: str, why: str) -> UsageError:
    return UsageError(f"cannot read the filter {text!r}", why=why)
