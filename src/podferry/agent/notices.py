"""The agent asks its cloud's metadata service whether this node is about to go away, and says so on the node's object.

It does so where the owner of the cluster lets it: where its service account may patch its node (deploy/cloud-notices). How clouds
are asked is in `podferry.kube.clouds`, what the controller makes of the annotation in `podferry.controller.node_trouble`.
"""

from __future__ import annotations

import datetime
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import anyio
import structlog

from podferry.errors import Failed
from podferry.kube.api_errors import ApiFailed
from podferry.kube.client import ACCESS_REVIEWS, NODES, Api
from podferry.kube.clouds import cloud, metadata, time_of
from podferry.kube.drain import CLOUD_ANNOTATION
from podferry.kube.quantities import timestamp

EVERY, ALLOWED_EVERY = 2.0, 300.0
"""Seconds between two questions to the metadata service, and to the API server whether the agent may say the answer."""

Question = Callable[[datetime.datetime], Awaitable[datetime.datetime | None]]
"""Asked at a time: when does the node go away? Raises `Failed` where nobody answers."""


class Notices:
    """Says on the node's object when the cloud takes it away, and takes that back where the cloud does."""

    def __init__(self, api: Api, node: str, ask: Question) -> None:
        self._api, self._node, self._ask = api, node, ask
        self._log = structlog.get_logger().bind(node=node)
        self._said: str | None = None
        self._known = False
        self._failing = False

    async def run(self) -> None:
        """Ask for ever, while the owner of the cluster lets the agent say it."""
        while True:
            if await self._allowed():
                with anyio.move_on_after(ALLOWED_EVERY):
                    while True:
                        await self.step()
                        await anyio.sleep(EVERY)
            else:
                self._known = False
                await anyio.sleep(ALLOWED_EVERY)

    async def step(self) -> None:
        """Ask once, and say what has changed."""
        now = datetime.datetime.now(datetime.UTC)
        try:
            when = await self._ask(now)
        except Failed as silent:
            if not self._failing:
                self._log.warning(str(silent), why=silent.why)
            self._failing = True
            return
        self._failing = False
        if when is not None and self._said is not None and self._same(when):
            return
        text = None if when is None else timestamp(when)
        if self._known and text == self._said:
            return
        try:
            patch = {"metadata": {"annotations": {CLOUD_ANNOTATION: text}}}
            await self._api.patch(NODES, self._node, patch, uid=None)
        except ApiFailed as refused:
            self._log.warning("the cloud's notice could not be told", notice=text, why=refused.why)
            return
        if text is not None:
            self._log.warning("the cloud takes this node away", deadline=text)
        self._said, self._known = text, True

    def _same(self, when: datetime.datetime) -> bool:
        """Clouds that say no time are asked again and again: the first answer counts."""
        said = time_of(self._said)
        return said is not None and said <= when

    async def _allowed(self) -> bool:
        about = {"verb": "patch", "resource": "nodes", "name": self._node}
        with suppress(ApiFailed):
            review = {"metadata": {}, "spec": {"resourceAttributes": about}}
            answer = await self._api.create(ACCESS_REVIEWS, review)
            return bool((answer.get("status") or {}).get("allowed"))
        return False


async def watch(api: Api, node: str) -> None:
    """Watch the cloud's notices of this node, where it is one of a cloud that podferry knows."""
    if (ask := cloud()) is not None:
        async with metadata() as http:
            await Notices(api, node, partial(ask, http)).run()
