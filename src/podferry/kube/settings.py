"""How one move is done, in the end: what its Migration asks for and what the MigrationPolicy of its pod says, put together.

The controller writes it into the Migration's status when it takes it up; from then on everybody reads it there.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from podferry.kube.objects import DURATION, QUANTITY, ObjectPart
from podferry.model import Connections, Mode

DEFAULT_TIMEOUT = "1h"


class MoveSettings(ObjectPart):
    """What holds for one move."""

    policy: Annotated[str, Field(description="The MigrationPolicy that applies to the pod; empty where none does.")] = (
        ""
    )
    mode: Annotated[Mode, Field(description="How memory moves.")] = Mode.LIVE
    allow_post_copy: Annotated[bool, Field(description="Whether a live migration may fall to post-copy.")] = False
    allow_auto_converge: Annotated[bool, Field(description="Whether a live migration may slow the job down.")] = False
    connections: Annotated[
        Connections, Field(description="What the move may do to connections whose other end stays.")
    ] = Connections.CLOSE
    max_downtime: Annotated[
        str | None,
        Field(description="The job is stopped only when that is expected to take no longer.", pattern=DURATION),
    ] = None
    max_freeze: Annotated[
        str | None, Field(description="The longest that the job may stand still on the source.", pattern=DURATION)
    ] = None
    timeout: Annotated[str, Field(description="The time that the move may take.", pattern=DURATION)] = DEFAULT_TIMEOUT
    bandwidth: Annotated[
        str | None, Field(description="Bytes a second of the link that it may use.", pattern=QUANTITY)
    ] = None
    ttl_seconds_after_finished: Annotated[
        int | None,
        Field(
            description="Seconds after its end at which the Migration is deleted, where its spec does not say.",
            ge=0,
            json_schema_extra={"format": "int32"},
        ),
    ] = None
