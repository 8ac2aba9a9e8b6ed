"""What the API server answers when it does not do as asked."""

from __future__ import annotations

from typing import Any

from podferry.errors import Failed, PodferryError, Refused


class ApiFailed(Failed):
    """The API server refused or failed. `status` is the HTTP status, `reason` the machine-readable word beside it."""

    code = "PF280"
    status = 0
    reason = ""


class ApiUnreachable(Failed):
    """No API server answers."""

    code = "PF281"


class ObjectNotFound(ApiFailed):
    """There is no such object."""

    code = "PF282"


class NotServed(ApiFailed):
    """Nobody serves this path: a kind that is not installed, an API server that has just started, a proxy in between. It says
    nothing of whether the object is there."""

    code = "PF288"


class Conflict(ApiFailed):
    """The object has changed since it was read, or a precondition does not hold."""

    code = "PF283"


class ObjectAlreadyExists(ApiFailed):
    """An object of this name is there already."""

    code = "PF284"


class Forbidden(ApiFailed):
    """The cluster does not allow it: rights, a quota, an admission rule, a namespace that is going."""

    code = "PF285"


class Expired(ApiFailed):
    """The watch is too far behind: list anew."""

    code = "PF286"


class NoCluster(Refused):
    """There is no configuration that names a cluster."""

    code = "PF180"


def of_status(status: int, body: dict[str, Any], what: str) -> ApiFailed:
    """The error of an answer with HTTP status `status` whose body is a `Status` object (or nothing that helps)."""
    reason, message = str(body.get("reason", "")), str(body.get("message", "")) or f"HTTP {status}"
    kind = {404: NotServed, 403: Forbidden, 410: Expired, 422: ApiFailed}.get(status, ApiFailed)
    if status == 404 and reason == "NotFound" and (body.get("details") or {}).get("name"):
        kind = ObjectNotFound  # the API server itself says so, and of which object
    causes = (body.get("details") or {}).get("causes") or []
    if status == 409:
        kind = ObjectAlreadyExists if reason == "AlreadyExists" else Conflict
    elif status == 422 and any(one.get("field") == "metadata.uid" for one in causes):
        kind = Conflict  # how the API server says that a patch was meant for another object of the name
    error = kind(what, why=message)
    error.status, error.reason = status, reason
    return error


def transient(error: PodferryError) -> bool:
    """Whether the same call may well succeed a moment later."""
    return isinstance(error, ApiUnreachable) or (isinstance(error, ApiFailed) and error.status in (429, 500, 503, 504))
