"""The generated parts of docs/protocol.md: `python -m podferry.wire.document docs/protocol.md` writes them anew.

A test holds the document to what this makes of the code.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from podferry.core.strict import DEFAULT_INT, DEFAULT_LIST, DEFAULT_TEXT, AllowedRange, JsonObject, fields_of
from podferry.wire import frames
from podferry.wire.messages import (
    MESSAGES,
    SOURCE_MESSAGES,
    TARGET_MESSAGES,
    AddressSpaceSum,
    ErrorReport,
    FileSum,
    TreeSum,
)
from podferry.wire.session import MEANING, SessionState, transitions

PARTS = (ErrorReport, FileSum, AddressSpaceSum, TreeSum)
_SECTION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(document: str) -> str:
    """The document with its generated sections made anew."""
    makers = {"messages": _messages, "parts": _parts, "states": _states, "diagram": _diagram, "frames": _frames}
    return _SECTION.sub(lambda found: found[1] + "\n".join(makers[found[2]]()) + "\n" + found[3], document)


def shape() -> str:
    """What both ends must agree on, whatever it means: frames, the fields of messages and their limits, who may say what when."""
    kinds = (f"{kind.__name__}: {_fields(kind)}" for kind in (*MESSAGES.values(), *PARTS))
    steps = (f"{state}, {role}: {name}, {after}" for state, role, name, after in transitions())
    return "\n".join((*_frames(), *kinds, *sorted(steps)))


def _messages() -> Iterator[str]:
    yield "| message | from | fields | meaning |"
    yield "|---|---|---|---|"
    for name, kind in MESSAGES.items():
        speaker = "source" if kind in SOURCE_MESSAGES else "target" if kind in TARGET_MESSAGES else "both"
        yield f"| `{name}` | {speaker} | {_fields(kind)} | {_summary(kind)} |"


def _parts() -> Iterator[str]:
    yield "| part | fields | meaning |"
    yield "|---|---|---|"
    for kind in PARTS:
        yield f"| `{kind.__name__}` | {_fields(kind)} | {_summary(kind)} |"


def _states() -> Iterator[str]:
    yield "| state | meaning | the source may say | the target may say |"
    yield "|---|---|---|---|"
    for state in SessionState:
        said: dict[str, list[str]] = {"source": [], "target": []}
        for before, role, name, after in transitions():
            if before is state:
                said[role].append(name if after is state else f"{name} → {after}")
        yield f"| **{state}** | {MEANING[state]} | {', '.join(said['source'])} | {', '.join(said['target'])} |"


def _diagram() -> Iterator[str]:
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {SessionState.IDLE}"
    labels: dict[tuple[SessionState, SessionState], list[str]] = {}
    for before, _, name, after in transitions():
        if before is not after:
            labels.setdefault((before, after), []).append(name)
    for (before, after), names in labels.items():
        yield f"    {before.replace('-', '_')} --> {after.replace('-', '_')}: {', '.join(dict.fromkeys(names))}"
    yield f"    {SessionState.ENDED} --> [*]"
    yield "```"


def _frames() -> Iterator[str]:
    yield "| kind | number | shortest body | longest body | flags |"
    yield "|---|---|---|---|---|"
    for kind, (shortest, longest) in frames.BODY_SIZES.items():
        flags = frames.FLAGS_OF.get(kind)
        yield f"| {kind.name} | {kind.value} | {shortest} | {longest} | {f'{flags.name} = {flags.value}' if flags else ''} |"


def _fields(kind: type) -> str:
    return ", ".join(f"`{name}` {_type(hint)}" for name, hint in fields_of(kind).items())


def _type(hint: Any, limit: AllowedRange | None = None) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type(*arguments)
    if origin is types.UnionType:
        return f"{_type(arguments[0], limit)} or null"
    if origin is tuple:
        return f"list of {_type(arguments[0])} ({_span(limit or DEFAULT_LIST)})"
    return "object" if hint == JsonObject else _plain(hint, limit)


def _plain(kind: type, limit: AllowedRange | None) -> str:
    if issubclass(kind, StrEnum):
        return " or ".join(f'"{choice}"' for choice in kind)
    if kind is str:
        return f"text ({_span(limit or DEFAULT_TEXT)})"
    return f"{kind.__name__} ({_span(limit)})" if limit and limit != DEFAULT_INT else kind.__name__


def _span(limit: AllowedRange) -> str:
    return f"{limit.least} to {limit.greatest}"


def _summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(render(path.read_text()))
