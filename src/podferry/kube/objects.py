"""What the typed classes of podferry's objects are made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from podferry.kube.paths import LONGEST, SUBDOMAIN

DURATION = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"
IP_ADDRESS = r"^[0-9a-fA-F.:]+$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"


class ObjectPart(BaseModel):
    """A part of an object: camelCase outside, what a later version adds is kept."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="allow", use_enum_values=False)


Schema = dict[str, Any]


def rule(rule: str, message: str) -> Schema:
    """A rule of a field that the API server checks (CEL), with what it says where the rule is broken."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message}]}


FIXED = "self == oldSelf"


# For the API server alone: a name that was stored before it was checked is refused in words (`kube.paths`), not unreadable.
NAME: Schema = {"maxLength": LONGEST, "pattern": SUBDOMAIN}


def named(description: str) -> Any:
    """A field that holds the name of an object."""
    return Field(description=description, json_schema_extra=NAME)


def fixed(*fields: str, lists: tuple[str, ...] = (), objects: tuple[str, ...] = ()) -> ConfigDict:
    """Fields of a spec that can neither be changed nor added or removed later: rules of a field do not see the last two.
    `objects` have rules of their own against a change.
    """
    rules: list[Any] = [
        {
            "rule": f"(has(self.{one}) ? self.{one} : {empty}) == (has(oldSelf.{one}) ? oldSelf.{one} : {empty})",
            "message": f"{one} cannot be changed",
        }
        for one, empty in [*((one, "''") for one in fields), *((one, "[]") for one in lists)]
    ]
    rules += [
        {"rule": f"has(self.{one}) == has(oldSelf.{one})", "message": f"{one} cannot be added or removed"}
        for one in objects
    ]
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": rules})
