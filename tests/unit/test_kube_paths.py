"""Names in requests: whatever a user writes as a name, the path stays inside the collection that was meant."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podferry.kube.client import NODES, PODS
from podferry.kube.paths import NameRefused, is_subdomain, of_fields, of_labels, segment

pytestmark = pytest.mark.unit

HOSTILE = ["", ".", "..", "/", "../../victim/pods/db-0?x=", "a/b", "a%2fb", "a\\b", "a\x00", "a\n", "\ud800", "x" * 254]
anything = st.text(max_size=40) | st.sampled_from(HOSTILE) | st.from_regex(r"[a-z0-9./?#%;&=-]{1,20}", fullmatch=True)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_object_is_called_is_refused(name: str) -> None:
    for path in (lambda: segment(name), lambda: PODS.path("default", name), lambda: NODES.path("", name)):
        with pytest.raises(NameRefused):
            path()
    if name:
        with pytest.raises(NameRefused):
            PODS.path(name)
    with pytest.raises(NameRefused):
        PODS.path(name, "train")


@given(anything, anything)
def test_a_path_names_this_object_of_this_namespace_or_none(namespace: str, name: str) -> None:
    try:
        path = PODS.path(namespace, name, "status")
    except NameRefused:
        return
    sent = httpx2.Request("GET", f"http://server{path}").url.raw_path.decode()
    assert not urlsplit(sent).query
    parts = sent.split("/")
    assert (parts[:4], parts[5], parts[7:]) == (["", "api", "v1", "namespaces"], "pods", ["status"])
    assert (unquote(parts[4]), unquote(parts[6])) == (namespace, name)


@given(anything)
def test_a_field_selector_has_as_many_terms_as_were_asked_for(value: str) -> None:
    try:
        text = of_fields({"metadata.name": value, "type": "Warning"})
    except NameRefused:
        return
    terms, term, escaped = [], "", False
    for char in text:  # as fields.ParseSelector splits it
        if char == "," and not escaped:
            terms.append(term)
            term = ""
            continue
        term += char
        escaped = char == "\\" and not escaped
    assert [*terms, term][-1] == "type=Warning"
    assert len([*terms, term]) == 2


@given(anything)
def test_a_label_selector_selects_by_this_value_or_is_refused(value: str) -> None:
    try:
        text = of_labels({"podferry.dev/migration-uid": value, "app": None})
    except NameRefused:
        return
    assert text == f"podferry.dev/migration-uid={value},app"
    assert text.count(",") == 1


@pytest.mark.parametrize(
    ("name", "good"), [("train-0", True), ("a.b", True), ("A", False), ("-a", False), ("a..b", False), ("a_b", False)]
)
def test_subdomains_are_those_of_rfc_1123(name: str, good: bool) -> None:
    assert is_subdomain(name) is good
