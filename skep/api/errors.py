"""HTTP statuses of errors, and Docker Engine's wording for errors of its swarm mode.

Docker shows errors of SwarmKit's control API as gRPC prints them (``rpc error: code = InvalidArgument desc = ...``) and
its own errors unchanged.  ``rpc_errors`` adds that wording to errors of ``manager.control``.

Source: moby 20.10, errdefs/http_helpers.go (statusCodeFromGRPCError).
"""

import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from skep.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NamesAnother,
    NotFound,
    OutOfSequence,
    PermissionDenied,
    ResourceExhausted,
    RetryLater,
    SkepError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    reason_of,
)


class Untranslated(SkepError):
    """An error that Docker returns without a class: a 500 with the sentence in it.

    Use it only where the engine does the same.  An internal failure is not a ``SkepError``.
    """


class Forbidden(SkepError):
    """The engine refuses this operation on a predefined object (403, where gRPC would say PermissionDenied)."""


class NotModified(SkepError):
    """The object is already in the requested state (304, no body), for example a container that is started twice."""


STATUSES: tuple[tuple[type[SkepError], int], ...] = (
    (InvalidArgument, 400),
    (FailedPrecondition, 400),
    (Unauthenticated, 401),
    (PermissionDenied, 403),
    (Forbidden, 403),
    (NotFound, 404),
    (AlreadyExists, 409),
    (OutOfSequence, 500),  # an untranslated gRPC error in the engine; clients retry on the message
    (Untranslated, 500),
    (RetryLater, 429),
    (ResourceExhausted, 500),  # gRPC's code has no HTTP translation in the engine
    (NotModified, 304),
    (Unimplemented, 501),
    (Unavailable, 503),
)
"""Error classes and statuses.  The first match applies, and any other ``SkepError`` is a 500."""

RPC_CODES: tuple[tuple[type[SkepError], str], ...] = (
    (InvalidArgument, "InvalidArgument"),
    (FailedPrecondition, "FailedPrecondition"),
    (Unauthenticated, "Unauthenticated"),
    (PermissionDenied, "PermissionDenied"),
    (AlreadyExists, "AlreadyExists"),
    (OutOfSequence, "Unknown"),
    (Untranslated, "Unknown"),
    (ResourceExhausted, "ResourceExhausted"),
    (Unimplemented, "Unimplemented"),
)
"""Error classes and gRPC's names of their codes.  ``NotFound`` is missing, because the engine words it itself."""

_AGENTS_RPC_CODES: tuple[tuple[type[SkepError], str], ...] = (
    *RPC_CODES,
    (NotFound, "NotFound"),
    (Unavailable, "Unavailable"),
)

_CLASSES: dict[int, type[SkepError]] = {
    304: NotModified,
    400: InvalidArgument,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    409: AlreadyExists,
    413: ResourceExhausted,
    429: ResourceExhausted,
    501: Unimplemented,
    503: Unavailable,
}


def status_of(error: SkepError) -> int:
    """Return the HTTP status of ``error``."""
    return next((status for class_, status in STATUSES if isinstance(error, class_)), 500)


def error_of(status: int, message: str) -> SkepError:
    """Return the error of a response with ``status``, for a client.

    A version conflict has no status of its own, so it is recognized by its text, as in other clients.
    """
    if status == 500 and message.endswith("update out of sequence"):
        return OutOfSequence(message)
    return _CLASSES.get(status, Untranslated)(message)


def unanswered(endpoint: str, error: BaseException) -> Unavailable:
    """Return the error of a request without a response."""
    cause = getattr(error, "certificate_error", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Unavailable(
            f"the certificate of {endpoint} is not trusted: {cause.verify_message}. Check that the authority of your "
            "context (ca.pem) has signed it for this address."
        )
    return Unavailable(f"{endpoint} does not answer: {reason_of(error)}")


@contextmanager
def rpc_errors() -> Iterator[None]:
    """Give errors that the block raises the wording of the engine for errors of SwarmKit's control API."""
    try:
        yield
    except SkepError as error:
        found = _coded(error, RPC_CODES)
        if found is None:
            raise
        class_, code = found
        prefix = f"rpc error: code = {code} desc = "
        # must stay this class, so that users who may not see the other object get the text without its name
        if isinstance(error, NamesAnother):
            raise error.prefixed(prefix) from error
        raise class_(f"{prefix}{error}") from error


@contextmanager
def rpc_words(prefix: str) -> Iterator[None]:
    """Give errors of a call to a manager the wording of the engine's agent: ``<prefix>: rpc error: code = ... desc =
    ...``.
    """
    try:
        yield
    except SkepError as error:
        class_, code = _coded(error, _AGENTS_RPC_CODES) or (Untranslated, "Unknown")
        raise class_(f"{prefix}: rpc error: code = {code} desc = {error}") from error


def _coded(
    error: SkepError, codes: Iterable[tuple[type[SkepError], str]]
) -> tuple[type[SkepError], str] | None:
    """Return the class of ``error`` and gRPC's name of its code."""
    return next(((class_, code) for class_, code in codes if isinstance(error, class_)), None)
