"""The one place where names become part of a request to the API server.

A name may come from a user (`spec.podName`), from an annotation or from a node. Unquoted, `../../victim/pods/db-0?x=` would name
another namespace's pod. So each segment of a path is checked and quoted, and so is each value of a selector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from podferry.errors import Refused

LONGEST = 253
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
"""A DNS subdomain (RFC 1123), as Kubernetes asks it of the names of pods, nodes and most other objects."""
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_FIELD = re.compile(r"[A-Za-z0-9.]+")


class NameRefused(Refused):
    """A name that cannot be part of a request: no object has it."""

    code = "PF190"


def segment(name: str) -> str:
    """`name` as one segment of a path, so that the object with this very name is meant or none.

    Raises `NameRefused` for what no object is called (Kubernetes, `path.IsValidPathSegmentName`) or would end the segment.
    """
    if not name or name in (".", "..") or len(name) > LONGEST or re.search(r"[/%\\\x00-\x1f\x7f]", name):
        raise NameRefused(
            f"{name[:100]!r} is not the name of an object", remedy="give a name as `kubectl get` lists it"
        )
    try:
        return quote(name, safe="")
    except UnicodeEncodeError as wrong:  # a lone surrogate, from JSON
        raise NameRefused(f"{name[:100]!r} is not the name of an object") from wrong


def is_subdomain(name: str) -> bool:
    """Whether an object could have this name."""
    return len(name) <= LONGEST and re.fullmatch(SUBDOMAIN, name) is not None


def of_fields(wanted: Mapping[str, str]) -> str:
    """A field selector that demands all of `wanted` (Kubernetes, `fields.EscapeValue`). Raises `NameRefused`."""
    terms = []
    for field, value in wanted.items():
        if not _FIELD.fullmatch(field) or re.search(r"[\x00-\x1f\x7f]", value):
            raise NameRefused(f"{field}={value[:100]!r} selects nothing")
        escaped = re.sub(r"([\\,=])", r"\\\1", value)
        terms.append(f"{field}={escaped}")
    return ",".join(terms)


def of_labels(wanted: Mapping[str, str | None]) -> str:
    """A label selector that demands all of `wanted`; None: that the label is there. Raises `NameRefused`."""
    terms = []
    for key, value in wanted.items():
        if not _LABEL_KEY.fullmatch(key) or (value is not None and not _LABEL_VALUE.fullmatch(value)):
            raise NameRefused(f"{key}={str(value)[:100]!r} is not a label")
        terms.append(key if value is None else f"{key}={value}")
    return ",".join(terms)
