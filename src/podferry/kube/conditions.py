"""The conditions of an object: what holds of it, and since when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from podferry.kube.objects import ObjectPart
from podferry.kube.quantities import timestamp


class Condition(ObjectPart):
    """One thing that holds or does not, and why (as metav1.Condition)."""

    type: Annotated[str, Field(description="What is said to hold.", max_length=316)]
    status: Annotated[str, Field(description="True, False or Unknown.", pattern="^(True|False|Unknown)$")]
    reason: Annotated[str, Field(description="Why, in one word for programs.", max_length=1024)]
    message: Annotated[str, Field(description="Why, in words for people.", max_length=32768)] = ""
    last_transition_time: Annotated[
        str, Field(description="Since when it has this status.", json_schema_extra={"format": "date-time"})
    ]


class Conditioned(ObjectPart):
    """A status that says in conditions what holds."""

    if TYPE_CHECKING:
        conditions: list[Condition]

    def condition(self, type: str) -> Condition | None:
        """The condition of this type, if it was ever set."""
        return next((one for one in self.conditions if one.type == type), None)

    def holds(self, type: str) -> bool:
        """Whether the condition of this type is True."""
        return (found := self.condition(type)) is not None and found.status == "True"

    def set_condition(self, type: str, holds: bool, reason: str, message: str = "") -> None:
        """Set a condition. Its time changes only with its status."""
        status, before = str(holds), self.condition(type)
        since = before.last_transition_time if before is not None and before.status == status else timestamp()
        new = Condition(type=type, status=status, reason=reason, message=message, last_transition_time=since)
        self.conditions = [one for one in self.conditions if one.type != type] + [new]
