"""`spec.resources`: what the target pod's containers ask for and may have, and what is wrong with that."""

from __future__ import annotations

from typing import Any, cast

import pytest
from test_controller_pods import NOW, source

from podferry.cli.kubectl_resources import of_containers, parse
from podferry.controller import pods
from podferry.controller.resizing import misfits
from podferry.core.preflight import NoRoom
from podferry.errors import UsageError
from podferry.kube.migration import Migration
from podferry.kube.resources import ContainerResources, amount, memory_limits
from podferry.workload.inspected import Member
from podferry.workload.kinds.kubelet_pods import without_room

pytestmark = pytest.mark.unit

Json = dict[str, Any]


def wanted(*several: Json) -> list[ContainerResources]:
    return [ContainerResources.model_validate(one) for one in several]


def migration(*several: Json) -> Migration:
    about = {"name": "move", "namespace": "default", "uid": "m1"}
    return Migration.from_json({"metadata": about, "spec": {"podName": "train", "resources": list(several)}})


@pytest.mark.parametrize(
    ("text", "is_worth"),
    [
        ("2", 2.0),
        (2, 2.0),
        ("250m", 0.25),
        ("1.5Gi", 1.5 * (1 << 30)),
        ("129e6", 129e6),
        ("12E", 12e18),
        ("1E3", 1000.0),
        ("100k", 1e5),
        ("5n", 5e-9),
        (".5", 0.5),
        ("much", None),
        ("1 Gi", None),
        ("", None),
        ("-1", None),
        ("1e999", None),
    ],
)
def test_quantities_are_read_as_kubernetes_writes_them(text: object, is_worth: float | None) -> None:
    assert amount(text) == (pytest.approx(is_worth) if is_worth is not None else None)


def test_target_and_placeholder_have_what_is_wanted_and_else_what_the_source_has() -> None:
    asked = migration(
        {"name": "main", "requests": {"memory": "2Gi"}, "limits": {"memory": "3Gi", "ephemeral-storage": "1Gi"}},
        {"name": "proxy", "limits": {"cpu": "250m"}},
    )
    before = source()
    main = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "3Gi", "ephemeral-storage": "1Gi"}}
    for made in (pods.target_pod(before, asked, "b", NOW), pods.placeholder_pod(before, asked, "pause")):
        spec = made["spec"]
        found = {one["name"]: one.get("resources") for one in [*spec.get("initContainers", []), *spec["containers"]]}
        assert found == {"main": main, "proxy": {"limits": {"cpu": "250m"}}}
    assert before == source(), "the source is left as it is"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "main", "requests": {"cpu": "2"}, "limits": {"cpu": "2000m"}}, None),
        ({"name": "proxy", "limits": {"memory": "1Gi"}}, None),
        ({"name": "other", "limits": {"memory": "1Gi"}}, "no container other"),
        ({"name": "once", "limits": {"memory": "1Gi"}}, "no container once"),
        ({"name": "main", "limits": {"cpu": "500m"}}, "the request 1 is beyond the limit 500m"),
        ({"name": "main", "requests": {"memory": "1Gi"}, "limits": {"memory": "1000M"}}, "beyond the limit 1000M"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason_and_a_remedy(asked: Json, words: str | None) -> None:
    found = list(misfits(source(), wanted(asked)))
    assert bool(found) == (words is not None)
    for one in found:
        assert words
        assert words in str(one) + one.why
        assert one.reason == "ResourcesInvalid"
        assert one.remedy


def test_a_job_that_holds_more_than_its_new_limit_stays_where_it_is() -> None:
    nothing = cast(Any, None)
    members = [Member("main", nothing, nothing, held=3 << 20), Member("proxy", nothing, nothing, held=1 << 20)]
    assert not [*without_room(members, {})]
    enough = memory_limits(wanted({"name": "main", "limits": {"memory": "4Mi"}}, {"name": "proxy"}))
    assert not [*without_room(members, enough)]
    (refused,) = without_room(members, memory_limits(wanted({"name": "main", "limits": {"memory": "2Mi"}})))
    assert isinstance(refused, NoRoom)
    assert "main has more memory" in str(refused)
    assert "limits it to 2 MiB" in refused.why


def test_options_become_resources() -> None:
    typed = [*parse("requests", ["main:cpu=2,memory=4Gi"]), *parse("limits", ["main:memory=6Gi", "proxy:cpu=1"])]
    assert of_containers(typed, ()) == [
        {"name": "main", "requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "6Gi"}},
        {"name": "proxy", "limits": {"cpu": "1"}},
    ]
    assert of_containers(parse("limits", ["cpu=1"]), ["main"]) == [{"name": "main", "limits": {"cpu": "1"}}]
    with pytest.raises(UsageError, match="not clear"):
        of_containers(parse("limits", ["cpu=1"]), ["main", "proxy"])


@pytest.mark.parametrize("text", ["", "main:", "cpu", "cpu=", "cpu=much", "disk=1", "main:cpu=1,", "cpu=-1"])
def test_options_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        parse("limits", [text])
