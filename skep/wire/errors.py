"""The one table between our errors and gRPC's status codes, used by servers and clients."""

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from h2.exceptions import H2Error

from skep import errors
from skep.aio.grpc import breaks_of_grpclib
from skep.errors import SkepError

STATUS_OF: tuple[tuple[type[SkepError], Status], ...] = (
    (errors.InvalidArgument, Status.INVALID_ARGUMENT),
    (errors.FailedPrecondition, Status.FAILED_PRECONDITION),
    (errors.Unauthenticated, Status.UNAUTHENTICATED),
    (errors.PermissionDenied, Status.PERMISSION_DENIED),
    (errors.NotFound, Status.NOT_FOUND),
    (errors.AlreadyExists, Status.ALREADY_EXISTS),
    (errors.OutOfSequence, Status.UNKNOWN),
    (errors.Unavailable, Status.UNAVAILABLE),
    (errors.ResourceExhausted, Status.RESOURCE_EXHAUSTED),
    (errors.Unimplemented, Status.UNIMPLEMENTED),
)
"""First match wins.  What is not listed is a bug of ours: INTERNAL, with nothing of it told to the peer."""

_ERROR_OF: dict[Status, type[SkepError]] = {
    **{status: error for error, status in STATUS_OF if status is not Status.UNKNOWN},
    Status.DEADLINE_EXCEEDED: errors.Unavailable,
    Status.ABORTED: errors.Unavailable,
    Status.CANCELLED: errors.Unavailable,
}

LOST_PEER = (StreamTerminatedError, ProtocolError, H2Error, OSError, asyncio.IncompleteReadError)
"""What using a connection raises when its other end is gone or has closed the stream."""

_MESSAGE_CHARACTERS_MAX = 2048
"""A status message travels as a header; many peers refuse headers over 8 KiB."""


PUSHBACK = "grpc-retry-pushback-ms"
"""Trailer of a call that works later, and when.  gRPC's own (proposal A6); who does not know it passes it over."""


def to_status(error: SkepError) -> GRPCError:
    """What a peer is told of ``error``; its details say when to come again, in seconds, if that is known."""
    after_s = error.after_s if isinstance(error, errors.RetryLater) else None
    for kind, status in STATUS_OF:
        if isinstance(error, kind):
            return GRPCError(status, str(error)[:_MESSAGE_CHARACTERS_MAX], after_s)
    return GRPCError(Status.UNKNOWN, str(error)[:_MESSAGE_CHARACTERS_MAX])


def from_status(error: GRPCError) -> SkepError:
    """The error that a peer told us."""
    if error.status is Status.RESOURCE_EXHAUSTED and isinstance(error.details, float):
        return errors.RetryLater(error.message or "come again later", error.details)
    kind = _ERROR_OF.get(error.status, SkepError)
    return kind(error.message or f"the peer answered {error.status.name}")


def told_pushback(value: str | bytes | None) -> float | None:
    """Seconds until the call works, as a trailer says; None: it says nothing that can be understood."""
    if not isinstance(value, str) or not (value.isascii() and value.isdigit()) or len(value) > 9:
        return None
    return int(value) / 1000


@contextmanager
def peer_errors(address: str) -> Iterator[None]:
    """Turn whatever a call to ``address`` can raise into our errors; a lost peer is ``Unavailable``."""
    try:
        with breaks_of_grpclib():
            yield
    except GRPCError as error:
        raise from_status(error) from error
    except TimeoutError as error:
        raise errors.Unavailable(f"{address} did not answer in time") from error
    except ssl.SSLCertVerificationError as error:
        raise errors.Unavailable(f"{address} is not trusted: {error.verify_message}") from error
    except LOST_PEER as error:
        raise errors.Unavailable(f"{address}: {errors.reason_of(error)}") from error
    except DecodeError as error:
        raise errors.Unavailable(f"{address} sent something that cannot be decoded") from error
