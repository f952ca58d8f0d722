"""The errors everyone raises; the edges translate them (``api/errors.py``, ``wire/errors.py``).

An error is raised by meaning, with a message that a user can act on.  No module below the edges knows
status codes.
"""


class SkepError(Exception):
    """Root of every expected failure.  ``str(error)`` is the sentence a user reads."""


class InvalidArgument(SkepError):
    """The request can never work as it is."""


class FailedPrecondition(SkepError):
    """The request does not fit the present state of what it names."""


class Unauthenticated(SkepError):
    """The caller did not prove who they are."""


class PermissionDenied(SkepError):
    """The caller is known and may not do this."""


class NotFound(SkepError):
    """No object has this name or id (or a prefix fits several)."""


class AlreadyExists(SkepError):
    """The name or port is taken."""


class OutOfSequence(SkepError):
    """The version given with an update is not the current one."""

    def __init__(self, message: str = "update out of sequence") -> None:
        super().__init__(message)


class Unavailable(SkepError):
    """Not now, or not here: no manager, no leader, locked, a deadline passed."""


class ResourceExhausted(SkepError):
    """A bounded queue or a size limit is full."""


class Unimplemented(SkepError):
    """Known to the API, not supported by this node."""
