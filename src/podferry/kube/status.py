"""Changing a Migration's status: read, change, put back, and again where somebody was faster."""

from __future__ import annotations

from collections.abc import Callable

from podferry.errors import Bug
from podferry.kube.api_errors import Conflict
from podferry.kube.client import MIGRATIONS, Api
from podferry.kube.migration import Migration

TRIES = 20

Change = Callable[[Migration], bool]
"""Changes the Migration in place, as it is now. False where there is nothing to change: then nothing is written."""


async def change(api: Api, migration: Migration, change: Change) -> Migration:
    """Apply `change` to the newest state of `migration` and return what is there now. Raises `NotFound` where it is gone.

    `change` may be called several times, each time with a newer state: it must look before it changes.
    """
    current = migration
    for _ in range(TRIES):
        before = current.status.model_dump()
        if not change(current) or current.status.model_dump() == before:
            return current
        try:
            return Migration.from_json(await api.replace(MIGRATIONS, current.to_json(), "status"))
        except Conflict:
            current = Migration.from_json(await api.get(MIGRATIONS, migration.name, migration.namespace))
            if current.uid != migration.uid:
                raise
    raise Bug(f"the status of {migration.name} cannot be changed", why=f"it changed {TRIES} times meanwhile")
