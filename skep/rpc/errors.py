"""The table between Skep's errors and gRPC status codes, for servers and clients."""

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.message import DecodeError

from skep import errors
from skep.errors import SkepError
from skep.rpc.status import CallFailed, StatusCode

STATUS_OF: tuple[tuple[type[SkepError], StatusCode], ...] = (
    (errors.InvalidArgument, StatusCode.INVALID_ARGUMENT),
    (errors.FailedPrecondition, StatusCode.FAILED_PRECONDITION),
    (errors.Unauthenticated, StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, StatusCode.PERMISSION_DENIED),
    (errors.NotFound, StatusCode.NOT_FOUND),
    (errors.AlreadyExists, StatusCode.ALREADY_EXISTS),
    (errors.OutOfSequence, StatusCode.UNKNOWN),
    (errors.Unavailable, StatusCode.UNAVAILABLE),
    (errors.ResourceExhausted, StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unimplemented, StatusCode.UNIMPLEMENTED),
)
"""The first match counts.  An error that is not listed is a bug, and the peer gets INTERNAL without details."""

_ERROR_OF: dict[StatusCode, type[SkepError]] = {
    **{status: error for error, status in STATUS_OF if status is not StatusCode.UNKNOWN},
    StatusCode.DEADLINE_EXCEEDED: errors.Unavailable,
    StatusCode.ABORTED: errors.Unavailable,
    StatusCode.CANCELLED: errors.Unavailable,
}

LOST_PEER = (OSError, asyncio.IncompleteReadError)
"""Exceptions raised after the peer has disconnected or closed the stream."""

NOT_TRUSTED = "is not trusted"
"""These words are in the error of a connection to a peer whose certificate has another root."""

_MESSAGE_CHARACTERS_MAX = 2048
"""Longest status message.  It is sent as a header, and many peers refuse headers over 8 KiB."""


def to_status(error: SkepError) -> CallFailed:
    """Return the status to send for ``error``."""
    after_s = error.after_s if isinstance(error, errors.RetryLater) else None
    for kind, status in STATUS_OF:
        if isinstance(error, kind):
            return CallFailed(status, str(error)[:_MESSAGE_CHARACTERS_MAX], after_s)
    return CallFailed(StatusCode.UNKNOWN, str(error)[:_MESSAGE_CHARACTERS_MAX])


def from_status(error: CallFailed) -> SkepError:
    """Return the error for a peer's status."""
    if error.status is StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is not None:
        return errors.RetryLater(error.message or "come again later", error.retry_after_s)
    kind = _ERROR_OF.get(error.status, SkepError)
    return kind(error.message or f"the peer responded with {error.status.name}")


@contextmanager
def peer_errors(address: str) -> Iterator[None]:
    """Convert exceptions of a call to ``address`` into Skep's errors.  A lost peer is ``Unavailable``."""
    try:
        yield
    except CallFailed as error:
        raise from_status(error) from error
    except TimeoutError as error:
        raise errors.Unavailable(f"{address} did not respond in time") from error
    except ssl.SSLCertVerificationError as error:
        raise errors.Unavailable(f"{address} {NOT_TRUSTED}: {error.verify_message}") from error
    except LOST_PEER as error:
        raise errors.Unavailable(f"{address}: {errors.reason_of(error)}") from error
    except DecodeError as error:
        raise errors.Unavailable(f"{address} sent something that cannot be decoded") from error
