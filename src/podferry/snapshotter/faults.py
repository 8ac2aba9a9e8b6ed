"""What can go wrong with a share or a layer, and how an errno becomes one of these errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from podferry.errors import Failed, PodferryError, Refused, TimedOut
from podferry.fs.beneath import NotRegular


class ShareRefused(Refused):
    """The share cannot be used as it is: not mounted, somebody else's files, no atomic rename."""

    code = "PF150"


class LayerUnfit(Refused):
    """This layer cannot be put on this share; it stays on the node's own disk."""

    code = "PF151"


class ShareUnavailable(Failed):
    """The share answers with an error, or is not mounted any more."""

    code = "PF250"


class ShareHung(TimedOut):
    """The share gives no answer at all."""

    code = "PF251"


class ShareFull(Failed):
    """No space or quota is left on the share."""

    code = "PF252"


class ShareReadOnly(Failed):
    """The share takes no writes from this node."""

    code = "PF253"


class LayerDamaged(Failed):
    """A layer on the share is not what was published."""

    code = "PF254"


class LayerMissing(Failed):
    """A layer that this node's images need is not on the share."""

    code = "PF255"


class LayerExchanged(Failed):
    """A layer on the share is whole, perhaps, but not the one that this node began to use."""

    code = "PF256"


class ShareTampered(LayerDamaged):
    """Something that no podferry puts on a share: a link, device or FIFO in place of a file or directory."""

    code = "PF257"


FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_OURS = {errno.ELOOP, errno.EXDEV, errno.ENOTDIR}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
PART_OF_THE_CONTRACT = (FileNotFoundError, FileExistsError)
"""Answers, not faults: the callers of a share ask for them."""


def fault(what: str, cause: OSError) -> PodferryError:
    """The error that a failed call on the share means."""
    if cause.errno in FULL:
        return ShareFull.because(
            what, cause, remedy="free space on the share; waiting layers are published by themselves"
        )
    if cause.errno in NOT_OURS or isinstance(cause, NotRegular):
        return ShareTampered.because(
            what, cause, remedy="find out who put a link, mount or special file there, and who may write to the share"
        )
    if cause.errno in READ_ONLY:
        return ShareReadOnly.because(
            what, cause, remedy="mount the share read-write with root not squashed, or start with --read-only"
        )
    return ShareUnavailable.because(
        what, cause, remedy="look at the mount and its server; podferry goes on by itself when it is back"
    )


@contextmanager
def faults(what: str) -> Iterator[None]:
    """Turn what the file system raises into the errors of this module; contract answers pass as they are."""
    try:
        yield
    except PART_OF_THE_CONTRACT:
        raise
    except OSError as cause:
        if cause.errno == errno.ENOTEMPTY:  # rename onto a directory: POSIX allows either number
            raise FileExistsError(errno.EEXIST, "exists", cause.filename) from cause
        raise fault(what, cause) from cause
