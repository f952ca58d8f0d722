"""The errors of all modules; the edges translate them (``api/errors.py``, ``rpc/errors.py``).

An error is raised by meaning, with a message that a user can act on.  Status codes are only used at the edges.
"""

import os
import re
import ssl
from typing import Self

_OPENSSL = re.compile(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$")
"""OpenSSL's code of an error, and Python's line that raised it."""
_CERTIFICATE_REQUIRED = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
NEEDS_CERTIFICATE = "it requires a client certificate"
"""``reason_of`` returns this text for a server that refuses clients without a certificate."""
_ERRNO = re.compile(r"\[Errno (\d+)\]")


class SkepError(Exception):
    """Root of every expected failure.  ``str(error)`` is the sentence for the user."""


class InvalidArgument(SkepError):
    """The request can never work."""


class FailedPrecondition(SkepError):
    """The request does not fit the current state of its objects."""


class NamesAnother(SkepError):
    """The message names another object, which some users may not see."""

    def __init__(self, message: str, *, stack: str = "", unnamed: str = "") -> None:
        """
        Args:
            stack: Stack of the other object, or an empty string.
            unnamed: The same message without the other object, for users who may not see it.
        """
        super().__init__(message)
        self.stack = stack
        self.unnamed = unnamed or message

    def prefixed(self, prefix: str) -> Self:
        """Return the error with ``prefix`` before both messages."""
        return type(self)(f"{prefix}{self}", stack=self.stack, unnamed=f"{prefix}{self.unnamed}")

    def without_name(self) -> Self:
        """Return the error for users who may not see the other object."""
        return type(self)(self.unnamed, stack=self.stack)


class PortTaken(NamesAnother, InvalidArgument):
    """Another service publishes the port."""


class RouteTaken(NamesAnother, InvalidArgument):
    """Another service has the host and path."""


class SubnetTaken(NamesAnother, FailedPrecondition):
    """Another network has addresses of the subnet."""


class Unauthenticated(SkepError):
    """The caller did not prove its identity."""


class PermissionDenied(SkepError):
    """The caller is known but may not do this."""


class NotFound(SkepError):
    """No object has this name or id (or a prefix fits several)."""


class AlreadyExists(SkepError):
    """The name or port is taken."""


class OutOfSequence(SkepError):
    """The version given with an update is not the current one."""

    def __init__(self, message: str = "update out of sequence") -> None:
        super().__init__(message)


class Unavailable(SkepError):
    """Not possible now, or not here: no manager, no leader, locked, a deadline passed."""


class Unreadable(Unavailable):
    """This manager cannot read a stored value.  Others may."""


class ResourceExhausted(SkepError):
    """A bounded queue or a size limit is full."""


class RetryLater(ResourceExhausted):
    """The same request works in ``after_s`` seconds."""

    def __init__(self, message: str, after_s: float) -> None:
        super().__init__(message)
        self.after_s = after_s


class Unimplemented(SkepError):
    """The API has it, but this node does not support it."""


def reason_of(error: BaseException) -> str:
    """Return why a connection or a file failed, in the system's plain words: ``connection refused``.

    asyncio and aiohttp put numbers, tuples and their own settings into the texts of their errors.
    """
    error = getattr(error, "os_error", error)
    if isinstance(error, ssl.SSLError):
        return NEEDS_CERTIFICATE if _CERTIFICATE_REQUIRED in str(error) else _OPENSSL.sub("", str(error))
    if isinstance(error, OSError):
        if error.errno and error.errno > 0:
            return os.strerror(error.errno).lower()
        # For a name with several addresses, asyncio raises one error with all their texts.
        if numbers := _ERRNO.findall(str(error)):
            return ", ".join(dict.fromkeys(os.strerror(int(number)).lower() for number in numbers))
        if error.strerror:  # a resolver error, whose number is negative
            return error.strerror.lower()
    if isinstance(error, TimeoutError):
        return str(error) or "timed out"
    return str(error) or type(error).__name__
