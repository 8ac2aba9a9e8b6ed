"""What `podferry.kube.client.Api` says of an API server: what is there, what is not, what nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from podferry.kube.api_errors import ApiUnreachable, Conflict, Expired, NotServed, ObjectAlreadyExists, ObjectNotFound
from podferry.kube.client import CONFIGMAPS, LEASES, MIGRATIONS, PODS, Api, Json, ResourceKind

from . import Contract

NOTHING = ResourceKind("nothing.podferry.dev/v1", "Nothing", "nothings")
PATIENCE = 30.0
UNPLAYED = "no-kubelet"
"""A node whose kubelet nobody plays: what becomes of a pod there is the test's work alone."""
POD: Json = {"containers": [{"name": "main", "image": "train"}]}


@dataclass
class ApiServerCase:
    """An API server with a namespace of the test's own and a node, reached by a line that `cut` cuts and `mend` mends."""

    api: Api
    namespace: str
    node: str
    cut: Callable[[], None]
    mend: Callable[[], None]
    forget: Callable[[], str]
    """A resource version from which on the server does not know all that became of Migrations."""

    async def make(self, name: str = "one", **data: str) -> Json:
        return await self.api.create(CONFIGMAPS, {"metadata": {"name": name}, "data": data}, self.namespace)

    async def pod(self, name: str = "train", *, node: str | None = None, **about: Any) -> Json:
        spec = {**POD, "nodeName": node or self.node}
        return await self.api.create(PODS, {"metadata": {"name": name, **about}, "spec": spec}, self.namespace)


class ApiServerContract(Contract):
    """The fixture `case` is an `ApiServerCase`."""

    # Not there, and not known.

    async def test_what_is_not_there_is_told_from_what_nobody_says(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        assert await api.find(CONFIGMAPS, "nobody", namespace) is None
        with pytest.raises(ObjectNotFound):
            await api.get(CONFIGMAPS, "nobody", namespace)
        assert await api.delete(CONFIGMAPS, "nobody", namespace) is False
        with pytest.raises(ObjectNotFound):
            await api.patch(CONFIGMAPS, "nobody", {"data": {"a": "1"}}, namespace, uid=None)

    async def test_a_kind_that_is_not_served_says_nothing_of_its_objects(self, case: ApiServerCase) -> None:
        with pytest.raises(NotServed):
            await case.api.find(NOTHING, "one", case.namespace)
        with pytest.raises(NotServed):
            await case.api.delete(NOTHING, "one", case.namespace)
        with pytest.raises(NotServed):
            await case.api.list(NOTHING)

    async def test_a_server_that_is_away_says_nothing(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        one = await case.make()
        case.cut()
        with pytest.raises(ApiUnreachable):
            await api.find(CONFIGMAPS, "one", namespace)
        with pytest.raises(ApiUnreachable):
            await api.find(CONFIGMAPS, "nobody", namespace)
        with pytest.raises(ApiUnreachable):
            await api.delete(CONFIGMAPS, "nobody", namespace)
        with pytest.raises(ApiUnreachable):
            await api.list(CONFIGMAPS, namespace)
        with pytest.raises(ApiUnreachable):
            await api.replace(CONFIGMAPS, one)
        case.mend()
        assert (await api.get(CONFIGMAPS, "one", namespace))["metadata"]["uid"] == one["metadata"]["uid"]

    # Compare and swap.

    async def test_one_name_is_one_objects(self, case: ApiServerCase) -> None:
        await case.make()
        with pytest.raises(ObjectAlreadyExists):
            await case.make()

    async def test_a_write_over_a_later_one_is_refused(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        read = await case.make(a="1")
        later = await api.replace(CONFIGMAPS, {**read, "data": {"a": "2"}})
        assert later["metadata"]["resourceVersion"] != read["metadata"]["resourceVersion"]
        with pytest.raises(Conflict):
            await api.replace(CONFIGMAPS, {**read, "data": {"a": "3"}})
        version = {"metadata": {"resourceVersion": read["metadata"]["resourceVersion"]}}
        with pytest.raises(Conflict):
            await api.patch(CONFIGMAPS, "one", {**version, "data": {"a": "3"}}, namespace, uid=None)
        with pytest.raises(Conflict):
            await api.delete(CONFIGMAPS, "one", namespace, version=read["metadata"]["resourceVersion"])
        assert (await api.get(CONFIGMAPS, "one", namespace))["data"] == {"a": "2"}

    async def test_a_write_that_changes_nothing_makes_no_version(self, case: ApiServerCase) -> None:
        read = await case.make(a="1")
        same = await case.api.patch(CONFIGMAPS, "one", {"data": {"a": "1"}}, case.namespace, uid=None)
        assert same["metadata"]["resourceVersion"] == read["metadata"]["resourceVersion"]

    async def test_another_object_of_the_name_is_not_touched(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        first = await case.make(a="1")
        await api.delete(CONFIGMAPS, "one", namespace, uid=first["metadata"]["uid"])
        second = await case.make(a="2")
        assert second["metadata"]["uid"] != first["metadata"]["uid"]
        with pytest.raises(Conflict):
            await api.delete(CONFIGMAPS, "one", namespace, uid=first["metadata"]["uid"])
        with pytest.raises(Conflict):
            await api.patch(CONFIGMAPS, "one", {"data": {"a": "3"}}, namespace, uid=first["metadata"]["uid"])
        with pytest.raises(Conflict):
            await api.replace(CONFIGMAPS, {**first, "data": {"a": "3"}})
        assert (await api.get(CONFIGMAPS, "one", namespace))["data"] == {"a": "2"}

    async def test_null_in_a_patch_removes_a_field(self, case: ApiServerCase) -> None:
        await case.make(a="1", b="2")
        patched = await case.api.patch(CONFIGMAPS, "one", {"data": {"a": None}}, case.namespace, uid=None)
        assert patched["data"] == {"b": "2"}

    # Status, generations, pods' ends.

    async def test_the_status_is_written_apart(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        pod = await case.pod(node=UNPLAYED)
        status = {**pod["status"], "reason": "Played"}
        labelled = {**pod, "status": status, "metadata": {**pod["metadata"], "labels": {"new": "yes"}}}
        whole = await api.replace(PODS, labelled)
        assert (whole.get("status") or {}).get("reason") is None
        assert whole["metadata"]["labels"] == {"new": "yes"}
        part = await api.patch(PODS, "train", {"status": {"reason": "Played"}}, namespace, uid=None, part="status")
        assert part["status"]["reason"] == "Played"
        assert part["spec"] == whole["spec"]

    async def test_a_pod_on_a_node_goes_when_its_kubelet_says_so(self, case: ApiServerCase) -> None:
        """Or at once with a grace of 0, which takes it from under the kubelet."""
        api, namespace = case.api, case.namespace
        pod = await case.pod(node=UNPLAYED)
        assert await api.delete(PODS, "train", namespace, uid=pod["metadata"]["uid"], grace=20)
        going = await api.get(PODS, "train", namespace)
        assert going["metadata"]["deletionTimestamp"]
        assert going["metadata"]["deletionGracePeriodSeconds"] == 20
        assert await api.delete(PODS, "train", namespace, grace=0)
        assert await api.find(PODS, "train", namespace) is None

    async def test_a_finalizer_holds_what_is_deleted(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        await case.pod(finalizers=["podferry.dev/test"])
        assert await api.delete(PODS, "train", namespace, grace=0)
        held = await api.get(PODS, "train", namespace)
        assert held["metadata"]["deletionTimestamp"]
        assert await api.delete(PODS, "train", namespace, grace=0)
        await api.patch(PODS, "train", {"metadata": {"finalizers": None}}, namespace, uid=held["metadata"]["uid"])
        assert await api.find(PODS, "train", namespace) is None

    async def test_an_eviction_is_of_the_pod_that_was_meant(self, case: ApiServerCase) -> None:
        pod = await case.pod()
        with pytest.raises(Conflict):
            await case.api.evict("train", case.namespace, uid="another")
        assert "deletionTimestamp" not in (await case.api.get(PODS, "train", case.namespace))["metadata"]
        await case.api.evict("train", case.namespace, uid=pod["metadata"]["uid"])
        going = await case.api.find(PODS, "train", case.namespace)
        assert going is None or going["metadata"]["deletionTimestamp"]
        with pytest.raises(ObjectNotFound):
            await case.api.evict("nobody", case.namespace, uid="another")

    # Watches.

    async def told(self, case: ApiServerCase, version: str, count: int, **selectors: Any) -> list[tuple[str, str]]:
        """The next events about config maps: (what, name)."""
        found: list[tuple[str, str]] = []
        with anyio.fail_after(PATIENCE):
            async with aclosing(case.api.watch(CONFIGMAPS, version, case.namespace, **selectors)) as events:
                async for what, one in events:
                    if what != "BOOKMARK" and one["metadata"]["name"] != "kube-root-ca.crt":
                        found.append((what, one["metadata"]["name"]))
                        if len(found) == count:
                            break
        return found

    async def test_a_watch_tells_all_that_came_after_a_list(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        await case.make("before")
        _, version = await api.list(CONFIGMAPS, namespace)
        await case.make("one")
        await api.patch(CONFIGMAPS, "one", {"data": {"a": "1"}}, namespace, uid=None)
        await api.delete(CONFIGMAPS, "one", namespace)
        wanted = [("ADDED", "one"), ("MODIFIED", "one"), ("DELETED", "one")]
        assert await self.told(case, version, 3) == wanted
        assert await self.told(case, version, 1) == wanted[:1]

    async def test_what_a_selector_leaves_is_told_as_deleted(self, case: ApiServerCase) -> None:
        api, namespace = case.api, case.namespace
        await case.make("one")
        await api.patch(CONFIGMAPS, "one", {"metadata": {"labels": {"of": "us"}}}, namespace, uid=None)
        found, version = await api.list(CONFIGMAPS, namespace, labels={"of": "us"})
        assert [one["metadata"]["name"] for one in found] == ["one"]
        await api.patch(CONFIGMAPS, "one", {"metadata": {"labels": {"of": None}}}, namespace, uid=None)
        await api.patch(CONFIGMAPS, "one", {"metadata": {"labels": {"of": "us"}}}, namespace, uid=None)
        assert await self.told(case, version, 2, labels={"of": "us"}) == [("DELETED", "one"), ("ADDED", "one")]

    async def test_a_watch_too_far_behind_says_so(self, case: ApiServerCase) -> None:
        with anyio.fail_after(PATIENCE), pytest.raises(Expired):
            async with aclosing(case.api.watch(MIGRATIONS, case.forget(), case.namespace)) as events:
                async for _ in events:
                    raise AssertionError("what was forgotten is told")

    async def test_a_watch_that_is_cut_is_no_end(self, case: ApiServerCase) -> None:
        """What was told is known; what comes later is to be asked for anew, and is there once the server is back."""
        api, namespace = case.api, case.namespace
        _, version = await api.list(CONFIGMAPS, namespace)
        await case.make("one")
        found: list[str] = []
        with anyio.fail_after(PATIENCE), pytest.raises(ApiUnreachable):
            async with aclosing(api.watch(CONFIGMAPS, version, namespace)) as events:
                async for what, one in events:
                    if what != "BOOKMARK":
                        found.append(one["metadata"]["name"])
                        version = one["metadata"]["resourceVersion"]
                        case.cut()
        assert found == ["one"]
        case.mend()
        await case.make("two")
        assert await self.told(case, version, 1) == [("ADDED", "two")]

    async def test_two_that_watch_are_told_the_same(self, case: ApiServerCase) -> None:
        _, version = await case.api.list(CONFIGMAPS, case.namespace)
        heard: list[list[tuple[str, str]]] = []

        async def listen() -> None:
            heard.append(await self.told(case, version, 2))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            tasks.start_soon(listen)
            await case.make("one")
            await case.make("two")
        assert heard == [[("ADDED", "one"), ("ADDED", "two")]] * 2

    # Leases.

    async def test_of_two_that_take_a_lease_one_gets_it(self, case: ApiServerCase) -> None:
        api = case.api
        lease = await api.create(LEASES, {"metadata": {"name": "lease"}, "spec": {}}, case.namespace)
        outcomes: list[str] = []

        async def take(who: str) -> None:
            try:
                await api.replace(LEASES, {**lease, "spec": {"holderIdentity": who}})
                outcomes.append(who)
            except Conflict:
                outcomes.append("")

        async with anyio.create_task_group() as tasks:
            for who in ("a", "b", "c"):
                tasks.start_soon(take, who)
        assert sorted(outcomes)[:2] == ["", ""]
        holder = (await api.get(LEASES, "lease", case.namespace))["spec"]["holderIdentity"]
        assert holder == max(outcomes)
